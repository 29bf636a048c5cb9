"""Faults of the optimizer and of the loss."""

import functools

import optax

from benchmarks.diagnosis import fresh_losses as goals
from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import losses
from benchmarks.diagnosis.fresh_flows import kan
from benchmarks.diagnosis.kinds_pairs import faulty, pair

partial = functools.partial


def learning_rate():
    yield from pair(
        "ViT, Lion at 100 times its rate",
        "ViT, Lion",
        "learning_rate",
        make.vit(optax.lion(5e-4)),
        optimizer=optax.lion(0.05),
        fixes={"scale_learning_rate": 0.01},
    )
    yield from pair(
        "VAE, RMSprop at 300 times its rate",
        "VAE, RMSprop",
        "learning_rate",
        make.vae(optax.rmsprop(1e-3)),
        optimizer=optax.rmsprop(0.3),
        fixes={"scale_learning_rate": 1 / 300},
    )
    yield from pair(
        "word2vec, Adagrad at 200 times its rate",
        "word2vec, Adagrad",
        "learning_rate",
        make.topics(),
        optimizer=optax.adagrad(60.0),
        fixes={"scale_learning_rate": 1 / 200},
    )
    yield from pair(
        "graph convolutions, Muon at 200 times its rate",
        "graph convolutions, Muon",
        "learning_rate",
        make.gcn(optax.contrib.muon(0.02)),
        optimizer=optax.contrib.muon(4.0),
        fixes={"scale_learning_rate": 0.005},
    )
    yield from pair(
        "LSTM, clipped SGD at 100 times its rate",
        "LSTM, clipped SGD",
        "learning_rate",
        make.lstm(_clipped(0.5), forget=3.0),
        optimizer=_clipped(50.0),
        fixes={"scale_learning_rate": 0.01},
    )
    yield from pair(
        "image and text towers, Adafactor at 100 times its rate",
        "image and text towers, Adafactor",
        "learning_rate",
        make.towers(optax.adafactor(0.02)),
        optimizer=optax.adafactor(2.0),
        fixes={"scale_learning_rate": 0.01},
    )
    yield from pair(
        "ResNet, momentum at 30 times its rate, after 60 steps",
        "ResNet, momentum, after 60 steps",
        "learning_rate",
        make.resnet(),
        optimizer=optax.sgd(1.5, 0.9),
        mid=60,
        fixes={"scale_learning_rate": 1 / 30},
    )


def _clipped(rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))


def loss_sum():
    yield from pair(
        "autoencoder, sum over pixels and images, SGD",
        "autoencoder, mean over pixels and images, SGD",
        "loss_sum",
        make.autoencoder(optax.sgd(0.2, 0.9)),
        loss=partial(goals.itself, reduce=_sum),
        fixes={"change_sum": None},
    )
    yield from pair(
        "Poisson regression, sum over customers",
        "Poisson regression, mean over customers",
        "loss_sum",
        make.counts(),
        loss=partial(goals.poisson, reduce=_sum),
        fixes={"change_sum": None},
    )
    yield faulty(
        "RealNVP, sum over points, momentum",
        "loss_sum",
        make.real_nvp(optax.sgd(0.005, 0.9)),
        loss=partial(goals.flow, reduce=_sum),
        fixes={"change_sum": None},
    )
    yield from pair(
        "VAE, sum over images, momentum, after 40 steps",
        "VAE, mean over images, momentum, after 40 steps",
        "loss_sum",
        make.vae(optax.sgd(0.05, 0.9)),
        loss=partial(goals.elbo, reduce=_sum),
        mid=40,
        fixes={"change_sum": None},
    )


def _sum(x):
    return x.sum()


def uphill():
    yield faulty(
        "critic, Adam's direction times a positive rate",
        "uphill",
        make.critic(),
        optimizer=optax.chain(optax.scale_by_adam(0.5), optax.scale(2e-3)),
    )
    yield faulty(
        "search ranking, flip_sign=False",
        "uphill",
        make.search(),
        optimizer=optax.chain(
            optax.scale_by_rms(),
            optax.scale_by_learning_rate(3e-3, flip_sign=False),
        ),
    )
    yield faulty(
        "survival analysis, negative rate",
        "uphill",
        make.survival(),
        optimizer=optax.sgd(-0.1, 0.9),
    )
    yield faulty(
        "Chebyshev polynomials, sign flipped again after SGD, after 50 steps",
        "uphill",
        make.rents(kan, optax.chain(optax.sgd(0.02), optax.scale(1.0))),
        optimizer=optax.chain(optax.sgd(0.02), optax.scale(-1.0)),
        mid=50,
    )


def loss_scale():
    yield from pair(
        "VAE, divergence x1000, momentum",
        "VAE, divergence x1, momentum",
        "loss_scale",
        make.vae(optax.sgd(0.05, 0.9)),
        loss=partial(goals.elbo, beta=1000.0),
        judged=True,
        fixes={"divide_term": 1000.0},
    )
    yield from pair(
        "experts, terms of the router x1000, momentum",
        "experts, terms of the router x0.01, momentum",
        "loss_scale",
        make.experts(optax.sgd(0.03, 0.9)),
        loss=partial(goals.mixture, weight=1000.0),
        judged=True,
        fixes={"divide_term": 1e5},
    )
    yield faulty(
        "heat equation, border x100000, Adam",
        "loss_scale",
        make.pinn(),
        loss=partial(goals.heat, border=1e5),
        judged=True,
        fixes={"divide_term": 1e5},
    )
    yield from pair(
        "image and text towers, similarities x1000, momentum",
        "image and text towers, similarities x10, momentum",
        "loss_scale",
        make.towers(optax.sgd(0.03, 0.9)),
        knobs=dict(temperature=1000.0),
        fixes={"divide_factor": 100.0},
    )
    yield from pair(
        "search ranking, weight decay of 500 within the loss",
        "search ranking, weight decay of 0.0001 within the loss",
        "loss_scale",
        make.search(optax.sgd(0.05, 0.9)).but(
            loss=goals.decayed(losses.cross_entropy, 1e-4)
        ),
        loss=goals.decayed(losses.cross_entropy, 500.0),
        judged=True,
        fixes={"divide_term": 5e6},
    )


def warm_up():
    warmed = optax.linear_schedule(0.0, 0.01, 100)
    yield from pair(
        "post-norm ViT of 8 blocks, Adam from full rate",
        "post-norm ViT of 8 blocks, Adam with a warm-up",
        "warm_up",
        make.vit(optax.adam(warmed), depth=8, order="post"),
        optimizer=optax.adam(0.01),
        also=("learning_rate",),
        fixes={"warm_up": 100.0},
    )
    yield faulty(
        "Chebyshev polynomials, momentum 0.999",
        "warm_up",
        make.rents(kan, optax.sgd(0.01, 0.9)),
        optimizer=optax.sgd(0.01, 0.999),
        also=("learning_rate",),
        fixes={"set_momentum": 0.9},
    )
    yield from pair(
        "Deep Set, Nesterov momentum 0.9995, after 30 steps",
        "Deep Set, Nesterov momentum 0.9, after 30 steps",
        "warm_up",
        make.crowd(optax.sgd(0.05, 0.9, nesterov=True)),
        optimizer=optax.sgd(0.05, 0.9995, nesterov=True),
        mid=30,
        also=("learning_rate",),
        fixes={"set_momentum": 0.9},
    )


def scenarios():
    for group in (learning_rate, loss_sum, uphill, loss_scale, warm_up):
        yield from group()
