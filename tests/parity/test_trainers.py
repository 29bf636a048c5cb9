"""One step of Lightning's and Hugging Face's trainers, with their clip and ours."""

import logging

import numpy as np
import optax
import pytest
from trees import SHAPES, assert_same, draw, imported, updates_of

import optclip

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SIZES = [0.1, 3.0, 1e4]


def linear(grads, base):
    """Returns a module whose loss is the inner product of its parameters and grads."""

    class Linear(base):
        def __init__(self):
            super().__init__()
            for name, shape in SHAPES.items():
                setattr(self, name, torch.nn.Parameter(torch.zeros(shape)))

        def loss(self):
            pairs = ((getattr(self, k), torch.tensor(g)) for k, g in grads.items())
            return sum((p * g).sum() for p, g in pairs)

        def values(self):
            return {name: getattr(self, name).detach().numpy() for name in SHAPES}

    return Linear


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": torch.ones(1)}


def by_lightning(grads, accumulate=1, **options):
    """Returns how far one step of SGD with a rate of 1 moves zero parameters."""
    lightning = imported("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Model(linear(grads, lightning.LightningModule)):
        def training_step(self, batch):
            return self.loss()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    model = Model()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate, **options,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(Ones()))
    return model.values()


def by_trainer(grads, folder, accumulate=1, **options):
    """Returns the same for Hugging Face's Trainer, and the norm that it logs."""
    transformers = imported("transformers")
    imported("accelerate")

    class Model(linear(grads, torch.nn.Module)):
        def forward(self, x):
            return {"loss": self.loss(), "logits": x}

    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder), max_steps=1, per_device_train_batch_size=1,
            use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
            save_strategy="no", gradient_accumulation_steps=accumulate, **options,
        ),
        train_dataset=Ones(), optimizers=(sgd, constant),
    )  # fmt: skip
    trainer.train()
    (norm,) = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
    return model.values(), float(norm)


def ours(clip, grads):
    tx = optax.chain(clip, optax.sgd(1.0))
    return updates_of(tx, grads)


@pytest.mark.parametrize("size", SIZES)
def test_lightning_by_norm(size):
    grads = draw(size)
    theirs = by_lightning(grads, gradient_clip_val=0.5)
    assert_same(ours(optclip.clip_by_global_norm(0.5, eps=1e-6), grads), theirs)


def test_lightning_by_value_and_disabled():
    grads = draw(3.0)
    theirs = by_lightning(grads, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert_same(ours(optclip.clip_by_value(0.5), grads), theirs)
    off = by_lightning(grads, gradient_clip_val=0.0)
    assert_same(ours(optclip.clip_by_global_norm(np.inf, eps=1e-6), grads), off)


def test_lightning_clips_the_mean_of_accumulated_gradients():
    grads = draw(3.0)
    theirs = by_lightning(grads, accumulate=2, gradient_clip_val=0.5)
    assert_same(ours(optclip.clip_by_global_norm(0.5, eps=1e-6), grads), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_hugging_face_clips_and_logs_the_norm_before_clipping(size, tmp_path):
    grads = draw(size)
    theirs, logged = by_trainer(grads, tmp_path, max_grad_norm=1.0)
    tx = optclip.clip_by_global_norm(1.0, eps=1e-6)
    assert_same(ours(tx, grads), theirs)
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(logged, state.norm_before, rtol=1e-6)


def test_hugging_face_clips_the_accumulated_gradient_and_zero_disables_clipping(
    tmp_path,
):
    grads = draw(3.0)
    theirs, _ = by_trainer(grads, tmp_path, accumulate=2, max_grad_norm=1.0)
    assert_same(ours(optclip.clip_by_global_norm(1.0, eps=1e-6), grads), theirs)
    off, _ = by_trainer(grads, tmp_path, max_grad_norm=0.0)
    assert_same(ours(optclip.clip_by_global_norm(np.inf, eps=1e-6), grads), off)
