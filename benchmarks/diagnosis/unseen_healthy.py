"""Models of the unseen split with nothing wrong, trained in typical ways."""

import optax

from benchmarks.diagnosis import frameworks, tasks
from benchmarks.diagnosis import unseen_faults as faults
from benchmarks.diagnosis import unseen_losses as goals
from benchmarks.diagnosis import unseen_more_nets as more
from benchmarks.diagnosis import unseen_tasks as own
from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.problem import Recipe


def scenarios():
    warm = faults.warm
    yield healthy("vision transformer, AdamW with a warm-up", faults.see(warm(3e-3)))
    yield healthy("variational autoencoder", faults.VAE)
    yield healthy("mixture of experts, Adafactor", faults.EXPERTS)
    yield healthy("graph network, Adam", faults.GRAPH.but(optimizer=optax.adam(5e-3)))
    yield healthy(
        "LSTM with LayerNorm, momentum",
        Recipe(
            more.layer_norm_lstm,
            own.waves,
            optax.sgd(0.1, 0.9),
            goals.pitch_and_loudness,
        ),
    )
    yield healthy(
        "ensemble under vmap, Adagrad",
        faults.ENSEMBLE.but(optimizer=optax.adagrad(0.05), loss=goals.huber),
    )
    yield healthy(
        "gated transformer in bfloat16, Lion, after 150 steps",
        faults.gated(optax.lion(1e-3, weight_decay=0.1), weights="bfloat16"),
        after=150,
    )
    yield healthy("U-Net, Nesterov, after 100 steps", faults.UNET, after=100)
    yield healthy(
        "bidirectional GRU, AdamW with a warm-up, after 150 steps",
        faults.tags(warm(5e-3)),
        after=150,
    )
    yield healthy(
        "Siamese MLP, weight decay, after 200 steps",
        faults.siamese(optax.adamw(1e-3, weight_decay=0.05)),
        after=200,
    )
    yield healthy(
        "actor and critic, after 100 steps",
        Recipe(
            frameworks.nnx_mlp,
            tasks.choices,
            optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2e-3)),
            goals.actor_critic,
            dict(inputs=16, outputs=5, depth=2, act="tanh"),
        ),
        after=100,
    )
    yield healthy("wide and deep, Adagrad, after 150 steps", faults.CLICKS, after=150)
