"""What each remedy does against each cause of exploding gradients, on one small net.

A relu network learns scikit-learn's digits with plain SGD. For each cause, one thing is
made wrong; then one remedy at a time is added, and nothing else is changed. The results
are medians over the seeds.

Usage: python -m benchmarks.remedies [--seeds 5] [--steps 400]
       [--output benchmarks/results]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optclip
from benchmarks._results import machine, parser, write

WIDTH, CLASSES, BATCH = 64, 10, 64
ACTS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "square": jnp.square}


@dataclasses.dataclass(frozen=True)
class Net:
    """A network and how it is trained; with the defaults, it trains.

    Attributes:
        depth: Hidden layers.
        init: "he", "xavier", or "he" times ``gain``.
        gain: Multiplies the initial weights.
        act: A key of `ACTS`.
        norm: "", "layer" or "batch": what normalizes the input of each activation.
        residual: Whether each layer is added to its input.
        rate: Learning rate.
        slower: Multiplies the learning rate.
        adaptive: Whether AdamW replaces SGD, with 0.001 for the default rate.
        clip: A transformation before the optimizer.
        l1: Weight of the sum of absolute weights in the loss.
        l2: Weight of half the sum of squared weights in the loss.
    """

    depth: int = 10
    init: str = "he"
    gain: float = 1.0
    act: str = "relu"
    norm: str = ""
    residual: bool = False
    rate: float = 0.03
    slower: float = 1.0
    adaptive: bool = False
    clip: Any = None
    l1: float = 0.0
    l2: float = 0.0


CAUSES = {
    "initialization: weights x4": {"gain": 4.0},
    "depth: 40 layers, x1.25 each": {"depth": 40, "gain": 1.25},
    "activation: x * x": {"act": "square"},
    "learning rate x30": {"rate": 0.9},
}
REMEDIES = {
    "none": {},
    "He initialization": {"gain": 1.0, "init": "he"},
    "Xavier initialization": {"gain": 1.0, "init": "xavier"},
    "layer normalization": {"norm": "layer"},
    "batch normalization": {"norm": "batch"},
    "residual connections, layer norm": {"norm": "layer", "residual": True},
    "5 layers": {"depth": 5},
    "relu": {"act": "relu"},
    "tanh": {"act": "tanh"},
    "learning rate / 30": {"slower": 1 / 30},
    "AdamW": {"adaptive": True},
    "L2 of 0.001": {"l2": 1e-3},
    "L1 of 0.0001": {"l1": 1e-4},
    "clip by global norm, 1": {"clip": optclip.clip_by_global_norm(1.0)},
    "clip by value, 0.01": {"clip": optclip.clip_by_value(0.01)},
    "quantile_clip": {"clip": optclip.quantile_clip()},
}


def weights_of(net, key):
    """Returns the hidden layers and a last one."""
    first, last = jax.random.split(key)
    power = 2.0 if net.init == "he" else 1.0  # Xavier; fan_in equals fan_out
    size = net.gain * (power / WIDTH) ** 0.5
    return {
        "hidden": size * jax.random.normal(first, (net.depth, WIDTH, WIDTH)),
        "last": jax.random.normal(last, (WIDTH, CLASSES)) / WIDTH**0.5,
    }


def scores_of(net, params, x):
    """Returns the logits."""
    axis = {"layer": -1, "batch": 0}.get(net.norm)

    def layer(x, weights):
        y = x @ weights
        y = y if axis is None else jax.nn.standardize(y, axis=axis)
        y = ACTS[net.act](y)
        return (x + y if net.residual else y), None

    x, _ = jax.lax.scan(layer, x, params["hidden"])
    return (jax.nn.standardize(x) if net.residual else x) @ params["last"]


def loss_fn(params, x, labels, net):
    """Returns the mean cross-entropy, with penalties."""
    scores = scores_of(net, params, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    leaves = jax.tree.leaves(params)
    if net.l1:
        loss += net.l1 * sum(jnp.abs(w).sum() for w in leaves)
    if net.l2:
        loss += net.l2 / 2 * sum(jnp.square(w).sum() for w in leaves)
    return loss


def digits():
    """Returns standardized training and test data."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    x = (x - x.mean()) / x.std()
    cut = len(x) - 360
    return tuple(map(jnp.asarray, (x[:cut], y[:cut], x[cut:], y[cut:])))


def train(net, data, seed, steps):
    """Returns the norm of the first gradient, and the test accuracy."""
    x, y, test_x, test_y = data
    rate = net.slower * net.rate
    typical = Net().rate
    optimizer = optax.adamw(1e-3 * rate / typical) if net.adaptive else optax.sgd(rate)
    optimizer = optax.chain(net.clip or optax.identity(), optimizer)
    key, draw = jax.random.split(jax.random.key(seed))
    params = weights_of(net, key)
    gradient = jax.grad(loss_fn)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(x), (BATCH,))
        grads = gradient(params, x[chosen], y[chosen], net)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    first = optclip.norms.global_norm(gradient(params, x[:BATCH], y[:BATCH], net))
    start = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(draw, steps))
    scores = scores_of(net, params, test_x)
    right = jnp.argmax(scores, 1) == test_y
    fine = jnp.isfinite(scores).all()
    return first, jnp.where(fine, right.mean(), jnp.nan)


def measure(net, data, seeds, steps):
    """Returns the median norm and accuracy; NaN if most seeds end non-finite."""
    run = jax.jit(jax.vmap(lambda seed: train(net, data, seed, steps)))
    firsts, rights = (np.asarray(x) for x in run(jnp.arange(seeds)))
    lost = np.isnan(rights)
    right = np.nan if lost.mean() >= 0.5 else np.median(np.where(lost, 0.0, rights))
    return float(np.median(firsts)), float(right)


def cell(first, right):
    """Returns the text of one cell of the table."""
    norm = f"{first:.2g}" if np.isfinite(first) else "not finite"
    return f"{norm}: " + ("NaN" if np.isnan(right) else f"**{right:.0%}**")


def row(name, change, columns, data, options):
    """Returns one line of the table."""
    cells = []
    for fault in columns.values():
        useless = change and all(
            getattr(Net(**fault), k) == v for k, v in change.items()
        )
        net = Net(**{**fault, **change})
        cells.append(
            "" if useless else cell(*measure(net, data, options.seeds, options.steps))
        )
        jax.clear_caches()
    line = " | ".join([name, *cells])
    print(f"| {line} |", flush=True)
    return f"| {line} |"


def main():
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--steps", type=int, default=400)
    options = made.parse_args()
    columns, data = {"nothing wrong": {}, **CAUSES}, digits()
    lines = [
        "| remedy | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    lines += [row(*item, columns, data, options) for item in REMEDIES.items()]
    lines += [
        "",
        f"Norm of the first gradient, and the test accuracy after "
        f"{options.steps} steps of {BATCH} digits: medians of {options.seeds} seeds. "
        "NaN: most seeds ended non-finite. 10% is guessing.",
        "",
        f"Measured by `benchmarks/remedies.py` on {machine()}.",
    ]
    write(options.output, "remedies.md", lines)


if __name__ == "__main__":
    main()
