"""Faults of the data's scale, of the loss's terms, and of the start of training."""

import dataclasses
import functools

import optax

from benchmarks.diagnosis import attention, frameworks, losses, plain, tasks
from benchmarks.diagnosis import kinds_losses as goals
from benchmarks.diagnosis import kinds_nets as nets
from benchmarks.diagnosis import kinds_tasks as own
from benchmarks.diagnosis.kinds_pairs import pair
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def numbers(net, optimizer, **knobs):
    knobs = {"inputs": 12, "outputs": 1, "depth": 3, **knobs}
    return Recipe(net, own.table, optimizer, losses.squared_error, knobs)


def points(net, optimizer, **knobs):
    knobs = {"inputs": 20, "outputs": 8, **knobs}
    return Recipe(net, own.clusters, optimizer, knobs=knobs)


def input_scale():
    standardize = {"standardize": None}
    yield from pair(
        "CNN on pixels of 0 to 255, SGD, after 60 steps",
        "CNN on standardized pixels, SGD, after 60 steps",
        "input_scale",
        Recipe(nets.linen_cnn, own.pictures, optax.sgd(0.02)),
        task=partial(own.pictures, raw=True),
        mid=60,
        fixes=standardize,
    )
    yield from pair(
        "Equinox MLP, features of 500 +- 300, AdamW",
        "Equinox MLP, standardized features, AdamW",
        "input_scale",
        numbers(frameworks.eqx_mlp, optax.adamw(3e-3), act="gelu"),
        task=partial(own.table, change=lambda x, rng: 500 + 300 * x),
        fixes=standardize,
    )
    yield from pair(
        "MLP, targets of 3000 +- 1500, momentum",
        "MLP, standardized targets, momentum",
        "input_scale",
        numbers(plain.mlp, optax.sgd(0.01, 0.9), act="relu"),
        task=partial(own.table, target=lambda y: 3000 + 1500 * y),
        units=1500.0**2,
        fixes=standardize,
    )
    # The deviation of a flag that was almost never set when it was estimated is far too
    # small, so the flag becomes 2000 where it is set.
    yield from pair(
        "NNX MLP, a rare flag divided by a tiny deviation, SGD",
        "NNX MLP, a rare flag divided by its deviation, SGD",
        "input_scale",
        numbers(frameworks.nnx_mlp, optax.sgd(0.01)).but(
            task=partial(own.table, change=own.rare_flag)
        ),
        task=partial(own.table, change=own.nearly_constant),
        fixes=standardize,
    )
    yield from pair(
        "tanh MLP, one column x10000, RMSprop",
        "tanh MLP, columns of one scale, RMSprop",
        "input_scale",
        numbers(plain.mlp, optax.rmsprop(2e-3), act="tanh"),
        task=partial(own.table, change=own.one_large_column),
        fixes=standardize,
    )


def loss_scale():
    yield from pair(
        "MLP, loss x2**15 kept after float16, after 100 steps",
        "MLP, loss without a scale, momentum, after 100 steps",
        "loss_scale",
        points(plain.mlp, optax.sgd(0.01, 0.9), depth=3),
        loss=partial(goals.scaled_cross_entropy, scale=2.0**15),
        judged=True,
        mid=100,
        fixes={"divide_factor": 2.0**15},
    )
    yield from pair(
        "Wasserstein critic, gradient penalty x10000",
        "Wasserstein critic, gradient penalty x10",
        "loss_scale",
        Recipe(
            plain.mlp,
            own.two_clouds,
            optax.sgd(0.003, 0.9),
            goals.critic,
            dict(inputs=2, outputs=1, depth=3, act="gelu"),
        ),
        loss=partial(goals.critic, weight=1e4),
        judged=True,
        fixes={"divide_factor": 1e3},
    )
    yield from pair(
        "MLP with two heads, auxiliary weight 1000",
        "MLP with two heads, auxiliary weight 1",
        "loss_scale",
        Recipe(
            plain.mlp,
            own.rotated,
            optax.sgd(0.01, 0.9),
            goals.two_heads,
            dict(inputs=20, outputs=9, depth=3),
        ),
        loss=partial(goals.two_heads, weight=1e3),
        judged=True,
        fixes={"divide_factor": 1e3},
    )
    yield from pair(
        "diffusion model, weights 1/level**2, momentum",
        "diffusion model, equal weights, momentum",
        "loss_scale",
        Recipe(
            frameworks.linen_mlp,
            own.noised,
            optax.sgd(0.1, 0.9),
            goals.denoising,
            dict(inputs=9, outputs=8, depth=3, width=48, act="gelu"),
        ),
        loss=partial(goals.denoising, weigh=goals.over),
        judged=True,
        fixes={"divide_factor": None},
    )
    yield from pair(
        "LoRA, alpha 800 instead of 8, AdamW",
        "LoRA, alpha 8, AdamW",
        "loss_scale",
        points(nets.lora, optax.adamw(1e-2)),
        knobs=dict(alpha=800.0),
        fixes={"divide_factor": 100.0},
    )
    yield from pair(
        "contrastive loss, temperature 0.01, momentum",
        "contrastive loss, temperature 0.1, momentum",
        "loss_scale",
        Recipe(
            frameworks.haiku_mlp,
            own.views,
            optax.sgd(0.03, 0.9),
            goals.likeness,
            dict(inputs=20, sizes=(32, 32, 8)),
        ),
        loss=partial(goals.likeness, temperature=0.01),
        judged=True,
        fixes={"divide_factor": 10.0},
    )


def warm_up_to(rate, steps):
    return optax.linear_schedule(0.0, rate, steps)


def eight(task):
    """Keeps the first eight batches of a task."""
    return lambda seed: task(seed)[: own.COUNT]


def warm_up():
    post = Recipe(
        attention.transformer,
        eight(tasks.tokens),
        optax.adam(warm_up_to(3e-3, 80)),
        losses.next_token,
        dict(order="post", depth=12, scanned=True, act="relu", width=24),
    )
    yield from pair(
        "post-norm transformer of 12 blocks, Adam from full rate",
        "post-norm transformer of 12 blocks, Adam with a warm-up",
        "warm_up",
        post,
        optimizer=optax.adam(3e-3),
        fixes={"warm_up": 80.0},
    )
    # The steps add up to 1000 times the rate instead of 10 times.
    yield from pair(
        "CNN, SGD with momentum 0.999",
        "CNN, SGD with momentum 0.9",
        "warm_up",
        Recipe(nets.nnx_cnn, own.pictures, optax.sgd(0.01, 0.9)),
        optimizer=optax.sgd(0.01, 0.999),
        also=("learning_rate",),
        fixes={"set_momentum": 0.9},
    )
    restarted, twin = restart()
    yield _with_new_state(restarted)
    yield twin


def restart():
    """A model restarted at the rate that its first run only reached by a warm-up."""
    peak = 0.03
    decayed = optax.warmup_cosine_decay_schedule(0.0, peak, 50, 150, 0.02 * peak)
    regression = Recipe(
        frameworks.haiku_mlp,
        own.table,
        optax.sgd(decayed, 0.9),
        losses.squared_error,
        dict(inputs=12, sizes=(32, 32, 32, 32, 1)),
    )
    return pair(
        "Haiku MLP, restarted at the rate from before its decay",
        "Haiku MLP, at the end of its decay",
        "warm_up",
        regression,
        optimizer=optax.sgd(peak, 0.9),
        mid=150,
        also=("learning_rate",),
        fixes={"scale_learning_rate": 0.02},
        other={
            "warm_up": regression.but(optimizer=optax.sgd(warm_up_to(peak, 100), 0.9))
        },
    )


def _with_new_state(scenario):
    """Returns the scenario whose optimizer starts again from an empty state."""

    def forget(make):
        return lambda seed: dataclasses.replace(make(seed), opt_state=None)

    warmed = {"warm_up": forget(scenario.variants["warm_up"])}
    variants = {**scenario.variants, **warmed}
    return dataclasses.replace(scenario, make=forget(scenario.make), variants=variants)


def scenarios():
    for group in (input_scale, loss_scale, warm_up):
        yield from group()
