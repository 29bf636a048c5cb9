"""Numbers beyond the range of float16, and undefined operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diagnosis import fresh_losses as goals
from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis import losses
from benchmarks.diagnosis.fresh_flows import head_net
from benchmarks.diagnosis.fresh_sequences import draw
from benchmarks.diagnosis.kinds_pairs import pair
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def rms_error(forward, dtype="float32"):
    """The root mean square error, computed in ``dtype``."""

    def loss_fn(params, batch):
        x, y = batch
        error = forward(params, x).astype(dtype) - y.astype(dtype)
        return jnp.sqrt(jnp.square(error).mean()).astype("float32")

    return loss_fn


def attentive(key, *, dtype="float32", width=16):
    """Attention pooling over the points of a set that are not padding."""
    keys = jax.random.split(key, 3)
    params = {
        "in": draw(keys[0], 3, width, np.sqrt(2)),
        "query": draw(keys[1], width, 1),
        "out": draw(keys[2], width, 4),
    }

    def forward(params, inputs):
        x, valid = inputs
        p = jax.tree.map(lambda w: w.astype(dtype), params)
        h = jax.nn.relu(x.astype(dtype) @ p["in"])
        scores = (h @ p["query"])[..., 0]
        # The largest float16 number is 65504.
        scores = scores + jnp.where(valid > 0, 0.0, -1e6).astype(dtype)
        weights = jax.nn.softmax(scores, 1)[..., None]
        return ((h * weights).sum(1) @ p["out"]).astype("float32")

    return params, forward


def padded(seed):
    """Sets of up to 40 points; every batch contains a set without any."""
    rng = np.random.default_rng(seed)

    def pad(batch):
        x, y = batch
        count = rng.integers(10, 41, len(x))
        count[0] = 0
        valid = np.arange(40) < count[:, None]
        return (x, jnp.asarray(valid, jnp.float32)), y

    return [pad(b) for b in tasks.crowds(seed, members=40)]


def with_scale(power):
    """A fixed loss scale, which the optimizer divides by."""
    scale = 2.0**power
    return {
        "loss": goals.scaled(losses.next_token, scale),
        "optimizer": optax.chain(optax.scale(1 / scale), optax.adamw(3e-3)),
    }


def mixed_writer(key, *, dtype="float16", width=24, words=12):
    """A language model of two causal convolutions, computed in ``dtype``."""
    keys = jax.random.split(key, 4)
    params = {
        "words": 0.5 * jax.random.normal(keys[0], (words, width)),
        "conv_0": draw(keys[1], 3 * width, width, np.sqrt(2)),
        "conv_1": draw(keys[2], 3 * width, width, np.sqrt(2)),
        "out": draw(keys[3], width, words),
    }

    def forward(params, text):
        p = jax.tree.map(lambda w: w.astype(dtype), params)
        x = p["words"][text]
        for name in ("conv_0", "conv_1"):
            back = [
                jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, : x.shape[1]] for i in range(3)
            ]
            x = jax.nn.gelu(jnp.concatenate(back, -1) @ p[name])
        return (x @ p["out"]).astype("float32")

    return params, forward


def overflow():
    yield from pair(
        "Haiku MLP, rents of 600 +- 150, root of the mean square in float16",
        "Haiku MLP, rents of 600 +- 150, root of the mean square in float32",
        "overflow",
        make.rents(head_net, optax.adam(0.03), inputs=9).but(
            task=partial(tasks.rentals, price=lambda y: 600 + 150 * y), loss=rms_error
        ),
        loss=partial(rms_error, dtype="float16"),
        also=("input_scale",),
        fixes={"float32": None},
    )
    yield from pair(
        "attention over padded sets in float16, mask of -1e6",
        "attention over padded sets in float32, mask of -1e6",
        "overflow",
        Recipe(attentive, padded, optax.adam(0.01)),
        knobs=dict(dtype="float16"),
        fixes={"float32": None},
    )
    text = Recipe(mixed_writer, tasks.lagged, optax.adamw(3e-3), losses.next_token)
    yield from pair(
        "convolutional language model in float16, fixed loss scale 2**28",
        "convolutional language model in float16, fixed loss scale 2**10",
        "overflow",
        text.but(**with_scale(10)),
        **with_scale(28),
        judged=True,
        also=("loss_scale",),
        fixes={"divide_loss": 2.0**18, "float32": None},
    )


def silent(batches):
    """The first recording of each batch is silent, and so is every channel of it."""
    return [(x.at[0].set(0.0), y) for x, y in batches]


def blank(batches):
    """The first image of each batch is blank."""
    return [(image.at[0].set(0.0), words) for image, words in batches]


def box_cox(key, *, safe=True):
    """A trained power for each column; the power 0 stands for the logarithm."""
    params, forward = head_net(key, inputs=9)
    params = {"net": params, "power": jnp.zeros(9)}

    def whole(params, x):
        small = jnp.abs(params["power"]) < 1e-3
        power = jnp.where(small, 1.0, params["power"]) if safe else params["power"]
        x = jnp.where(small, jnp.log(x), (x**power - 1) / power)
        return forward(params["net"], x)

    return params, whole


def not_finite():
    yield from pair(
        "sound, deviation over time of silent channels",
        "sound, deviation over time with an epsilon",
        "not_finite",
        make.ear(pool="both", epsilon=1e-4).but(spoil_batches=silent),
        knobs=dict(epsilon=0.0),
        fixes={"add_epsilon": 1e-4},
    )
    yield from pair(
        "Poisson regression, logarithm of a relu",
        "Poisson regression, logarithm of a relu and an epsilon",
        "not_finite",
        make.counts(optax.adam(3e-3)).but(
            loss=partial(goals.poisson, link="relu", epsilon=0.1)
        ),
        loss=partial(goals.poisson, link="relu"),
        fixes={"add_epsilon": 0.1, "stable_log": None},
    )
    yield from pair(
        "image and text towers, blank images",
        "image and text towers, blank images, with an epsilon",
        "not_finite",
        make.towers().but(spoil_batches=blank),
        knobs=dict(epsilon=0.0),
        fixes={"add_epsilon": 1e-6},
    )
    yield from pair(
        "Box-Cox with powers of zero, one jnp.where",
        "Box-Cox with powers of zero, two jnp.where",
        "not_finite",
        make.rents(box_cox).but(
            task=partial(tasks.rentals, columns=lambda x, rng: np.exp(x / 2))
        ),
        knobs=dict(safe=False),
        fixes={"double_where": None},
    )
    yield from pair(
        "metric learning, distance of each image to itself",
        "metric learning, distance of each image to itself, with an epsilon",
        "not_finite",
        Recipe(
            head_net,
            tasks.captions,
            optax.adam(2e-3),
            goals.same_first_word,
            dict(inputs=24, outputs=4),
        ),
        loss=partial(goals.same_first_word, epsilon=0.0),
        fixes={"add_epsilon": 1e-6, "double_where": None},
    )


def scenarios():
    for group in (overflow, not_finite):
        yield from group()
