"""Faults of the unseen split, which was written without looking at the rules."""

import functools

import jax.numpy as jnp
import optax

from benchmarks.diagnosis import frameworks, losses, tasks
from benchmarks.diagnosis import unseen_losses as goals
from benchmarks.diagnosis import unseen_more_nets as more
from benchmarks.diagnosis import unseen_nets as nets
from benchmarks.diagnosis import unseen_tasks as own
from benchmarks.diagnosis.problem import Recipe, fault
from benchmarks.diagnosis.recipes import scaled

BOTH = ("normalize", "residual")


def nesterov(rate):
    return optax.sgd(rate, 0.9, nesterov=True)


def warm(rate):
    """AdamW with a linear warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 30, 500)
    return optax.adamw(schedule, weight_decay=0.01)


def sentences(seed):
    return tasks.tokens(seed, size=12, length=20, vocabulary=20)


def hear(optimizer, **knobs):
    return Recipe(nets.tcn, own.waves, optimizer, goals.pitch_and_loudness, knobs)


def see(optimizer, **knobs):
    return Recipe(nets.vit, own.gratings, optimizer, knobs=knobs)


def gated(optimizer, **knobs):
    return Recipe(
        nets.glu_transformer, sentences, optimizer, losses.next_token, knobs=knobs
    )


def tags(optimizer, **knobs):
    return Recipe(more.two_ways, own.neighbors, optimizer, goals.huber, knobs)


def siamese(optimizer, **knobs):
    knobs = {"inputs": 20, "sizes": (32, 32, 16), **knobs}
    return Recipe(frameworks.haiku_mlp, own.couples, optimizer, goals.margin, knobs)


UNET = Recipe(nets.unet, own.discs, nesterov(0.05), goals.pixels)
GRAPH = Recipe(nets.graph_net, own.nodes, optax.sgd(0.1))
SETS = Recipe(more.deep_sets, own.sets, nesterov(0.003), losses.squared_error)
VAE = Recipe(nets.vae, own.drawings, optax.adam(2e-3), goals.evidence)
WORLD = Recipe(more.world_model, own.rollouts, optax.sgd(0.003), losses.squared_error)
RANKS = Recipe(more.highway, own.documents, optax.sgd(0.1, 0.9), goals.ranking)
CLICKS = Recipe(more.wide_deep, own.clicks, optax.adagrad(0.05), goals.pixels)
ENSEMBLE = Recipe(more.ensemble, own.documents, nesterov(0.01), losses.squared_error)
EXPERTS = Recipe(nets.experts, own.kinds, optax.adafactor(0.01))

# The largest rate that trains, found by `check_truth --split unseen --rates`.
LARGEST = {
    "lion glu": 0.03125,
    "adafactor experts": 0.25,
    "nesterov ensemble": 0.25,
    "warm gru": 0.25,
}
RECIPES = {
    "lion glu": (optax.lion, gated(optax.lion(1e-3))),
    "adafactor experts": (optax.adafactor, EXPERTS),
    "nesterov ensemble": (nesterov, ENSEMBLE),
    "warm gru": (warm, tags(warm(1e-3))),
}


def at_rate(key, rate):
    """Returns the recipe with this learning rate."""
    make, recipe = RECIPES[key]
    return recipe.but(optimizer=make(rate))


def too_high(name, key, times, **how):
    make, _ = RECIPES[key]
    recipe = at_rate(key, LARGEST[key] / 4)
    optimizer = make(times * LARGEST[key])
    return fault(name, "learning_rate", recipe, optimizer=optimizer, **how)


def initialization():
    yield fault(
        "gated transformer, AdamW, init x8",
        "initialization",
        gated(warm(1e-3)),
        knobs=dict(gain=8.0),
    )
    yield fault(
        "temporal convolutions, init x1.8",
        "initialization",
        hear(nesterov(0.01), depth=7),
        knobs=dict(gain=1.8),
        remedies=BOTH,
    )
    yield fault(
        "graph network, weights of standard normal",
        "initialization",
        GRAPH,
        knobs=dict(deviation=1.0),
        remedies=BOTH,
    )
    yield fault(
        "U-Net, weights x2.5 after 120 steps",
        "initialization",
        UNET,
        spoil_params=scaled(2.5),
        mid=120,
    )


def depth():
    good = dict(norm=True, residual=True)
    yield fault(
        "vision transformer of 16 blocks without normalization",
        "depth",
        see(nesterov(0.01), depth=16, gain=1.4),
        knobs=dict(norm=False),
        remedies=("normalize",),
    )
    yield fault(
        "Siamese MLP of 32 layers, growth 1.15",
        "depth",
        siamese(optax.sgd(0.01), sizes=(32,) * 32 + (16,), **good),
        knobs=dict(gain=1.15, norm=False, residual=False),
        remedies=BOTH,
    )
    yield fault(
        "48 scanned maxout layers, growth 1.1",
        "depth",
        Recipe(more.maxout, own.kinds, nesterov(0.01), knobs=good),
        knobs=dict(gain=1.1, norm=False, residual=False),
        remedies=BOTH,
    )


def recurrence():
    remedies = ("gate", "normalize")
    yield fault(
        "bidirectional relu RNN, growth 1.1, 60 steps",
        "recurrence",
        tags(optax.sgd(0.01), cell="relu", growth=0.9),
        knobs=dict(growth=1.1),
        remedies=remedies,
    )
    yield fault(
        "cellular automaton of 40 updates, growth 1.1",
        "recurrence",
        Recipe(
            more.automaton,
            own.ring,
            optax.adam(1e-3),
            losses.squared_error,
            dict(growth=0.9),
        ),
        knobs=dict(growth=1.1),
        remedies=remedies,
    )
    yield fault(
        "world model, recurrent weights x1.2 after 120 steps",
        "recurrence",
        WORLD.but(knobs=dict(growth=0.9)),
        spoil_params=scaled(1.2, "recur"),
        mid=120,
    )


def activation():
    remedies = ("change_activation", "normalize")
    yield fault(
        "deep sets with x + x**2",
        "activation",
        SETS,
        knobs=dict(act="poly"),
        remedies=remedies,
    )
    yield fault(
        "temporal convolutions with exp(x) - 1",
        "activation",
        hear(nesterov(0.01), depth=8),
        knobs=dict(act="expm1"),
        remedies=remedies,
    )


def vanishing():
    yield fault(
        "graph network, weights of standard deviation 0.02",
        "vanishing",
        GRAPH,
        knobs=dict(deviation=0.02),
        remedies=BOTH,
    )
    yield fault(
        "10 scanned maxout layers, weights x0.3 after 100 steps",
        "vanishing",
        Recipe(more.maxout, own.kinds, optax.sgd(0.02), knobs=dict(depth=10)),
        spoil_params=scaled(0.3),
        mid=100,
        remedies=BOTH,
    )


def learning_rate():
    yield too_high("gated transformer, Lion, rate 5x", "lion glu", 5)
    yield too_high("bidirectional GRU, AdamW, peak of the warm-up 20x", "warm gru", 20)
    yield too_high(
        "mixture of experts, Adafactor, rate 10x after 150 steps",
        "adafactor experts",
        10,
        mid=150,
    )
    yield too_high("ensemble under vmap, Nesterov, rate 100x", "nesterov ensemble", 100)


def bad_batch():
    yield fault(
        "two tasks, NaN in 1 target of 2 batches",
        "bad_batch",
        hear(optax.adam(3e-3), act="silu"),
        spoil_batches=tasks.spoiled([3, 19], y=lambda y: y.at[5, 1].set(jnp.nan)),
    )
    yield fault(
        "temporal convolutions, 1 batch x300 after 100 steps",
        "bad_batch",
        hear(nesterov(0.003)),
        spoil_batches=tasks.spoiled([10], x=lambda x: 300 * x),
        mid=100,
    )


def overflow():
    half = dict(dtype="float16")
    yield fault(
        "16-bit sound in float16, root mean square",
        "overflow",
        hear(optax.adam(2e-3), norm=True).but(
            task=functools.partial(own.waves, scale=8000.0)
        ),
        knobs=half,
        remedies=("float32",),
    )
    yield fault(
        "contrastive loss, float16 after 150 steps",
        "overflow",
        Recipe(
            frameworks.linen_mlp,
            own.views,
            optax.adam(2e-3),
            goals.likeness,
            dict(inputs=20, depth=2, outputs=8),
        ),
        knobs=half,
        mid=150,
        remedies=("float32",),
    )


def loss_sum():
    yield fault(
        "U-Net, sum over examples and pixels",
        "loss_sum",
        UNET,
        loss=functools.partial(goals.pixels, reduce=jnp.sum),
    )
    yield fault(
        "highway net, ranking, sum over pairs after 100 steps",
        "loss_sum",
        RANKS,
        loss=functools.partial(goals.ranking, reduce=jnp.sum),
        mid=100,
    )


def scenarios():
    for group in (initialization, depth, recurrence, activation, vanishing):
        yield from group()
    for group in (learning_rate, bad_batch, overflow, loss_sum):
        yield from group()
