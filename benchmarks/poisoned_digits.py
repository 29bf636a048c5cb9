"""Trains on digits of which one batch in twenty is corrupted: which variants survive?

A small network learns scikit-learn's handwritten digits. In the corrupted runs every
twentieth batch on average, chosen at random, has pixels that are NaN, infinite or 1e20,
or random labels. All variants see the same batches. Accuracy is measured on unseen,
clean digits.

Usage: python benchmarks/poisoned_digits.py [--output benchmarks/results]

It needs scikit-learn: `uv pip install --group bench .`
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _results import machine, parser, write
from sklearn.datasets import load_digits

import optclip

SEEDS, STEPS, BATCH, WIDTH, SHARE = 8, 1500, 64, 64, 0.05
KINDS = ("NaN", "inf", "1e20", "labels")


def data():
    """Returns (train, test), each of them images and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = (images[order] / 16).astype(np.float32)
    y = labels[order].astype(np.int32)
    return (x[:1347], y[:1347]), (x[1347:], y[1347:])


def schedule(seed, poisoned):
    """Returns the examples of each step, and how it is corrupted (0: not at all)."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 1347, (STEPS, BATCH))
    wrong = np.where(rng.random(STEPS) < SHARE, rng.integers(1, 5, STEPS), 0)
    return rows, wrong if poisoned else 0 * wrong, rng.integers(0, 10, (STEPS, BATCH))


def init(key):
    shapes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(k, s) * (2 / s[0]) ** 0.5, jnp.zeros(s[1]))
        for k, s in zip(keys, shapes, strict=True)
    ]


def logits(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def loss_fn(params, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return jnp.mean(losses)


def train(optimizer, seeds, poisoned):
    """Returns the accuracy for each seed, and how many steps were skipped."""
    (x, y), (x_test, y_test) = data()
    plans = [schedule(seed, poisoned) for seed in seeds]
    rows, wrong, lots = (jnp.asarray(np.stack(p)) for p in zip(*plans, strict=True))

    def run(key, rows, wrong, lots):
        params = init(key)

        def step(carry, plan):
            params, state = carry
            at, kind, lot = plan
            value = jnp.array([0.0, jnp.nan, jnp.inf, 1e20, 0.0])[kind]
            bad = (kind > 0) & (kind < 4)
            image = jnp.where(bad & (jnp.arange(64) < 8)[None], value, x[at])
            label = jnp.where(kind == 4, lot, y[at])
            loss, grads = jax.value_and_grad(loss_fn)(params, image, label)
            updates, state = optimizer.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        (params, state), _ = jax.lax.scan(step, start, (rows, wrong, lots))
        found = jnp.argmax(logits(params, x_test), axis=1)
        skipped = optclip.metrics(state).get("skip/skipped_steps", 0)
        return jnp.mean(found == y_test), skipped

    x, y, x_test, y_test = map(jnp.asarray, (x, y, x_test, y_test))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return jax.jit(jax.vmap(run))(keys, rows, wrong, lots)


def variants():
    """Returns (name, whether the data are corrupted, optimizer)."""
    ours = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(3e-3))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    plain = optax.with_extra_args_support
    return [
        ("clean data, optclip's clip", False, ours),
        ("no clip", True, plain(optax.adam(3e-3))),
        ("optax.clip_by_global_norm", True, plain(theirs)),
        ("the same in optax.apply_if_finite(..., 5)", True,
         optax.apply_if_finite(theirs, 5)),
        ("optclip.clip_by_global_norm, nonfinite='skip'", True,
         optax.chain(optclip.clip_by_global_norm(1.0, nonfinite="skip"),
                     optax.adam(3e-3))),
        ("optclip.skip_steps(clip, Adam)", True, optclip.skip_steps(ours)),
        ("optclip.stabilize(Adam)", True, optclip.stabilize(optax.adam(3e-3))),
    ]  # fmt: skip


def main():
    options = parser(__doc__).parse_args()
    lines = [
        "| training | batches | accuracy, mean | worst seed | steps skipped |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, poisoned, optimizer in variants():
        accuracy, skipped = train(optimizer, range(SEEDS), poisoned)
        left_out = f"{np.mean(skipped):.0f}" if np.any(skipped) else ""
        lines.append(
            f"| {name} | {'poisoned' if poisoned else 'clean'} | "
            f"{100 * np.mean(accuracy):.1f}% | {100 * np.min(accuracy):.1f}% | "
            f"{left_out} |"
        )
        print(lines[-1], flush=True)
    bad = np.mean([np.sum(schedule(s, True)[1] > 0) for s in range(SEEDS)])
    lines += [
        "",
        f"{SEEDS} seeds, {STEPS} steps, {bad:.0f} of them poisoned on average. "
        f"Measured by `benchmarks/poisoned_digits.py` on {machine()}.",
    ]
    write(options.output, "poisoned_digits.md", lines)


if __name__ == "__main__":
    main()
