"""Recipes of the split "fresh" that train: a function per model."""

import optax

from benchmarks.diagnosis import fresh_flows as flows
from benchmarks.diagnosis import fresh_losses as goals
from benchmarks.diagnosis import fresh_nets as nets
from benchmarks.diagnosis import fresh_sequences as series
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis import losses
from benchmarks.diagnosis.problem import Recipe


def vit(optimizer=None, **knobs):
    return Recipe(nets.vit, tasks.gratings, optimizer or optax.adam(3e-3), knobs=knobs)


def unet(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(3e-3)
    return Recipe(nets.unet, tasks.disks, optimizer, goals.per_pixel, knobs)


def resnet(optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.05, 0.9)
    return Recipe(nets.resnet, tasks.gratings, optimizer, knobs=knobs)


def crypto(optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.02, 0.9)
    return Recipe(nets.crypto_net, tasks.gratings, optimizer, knobs=knobs)


def autoencoder(optimizer=None, **knobs):
    optimizer = optimizer or optax.adamw(3e-3)
    return Recipe(nets.autoencoder, tasks.gratings, optimizer, goals.itself, knobs)


def writer(optimizer=None, **knobs):
    optimizer = optimizer or optax.adamw(3e-3)
    return Recipe(nets.writer, tasks.lagged, optimizer, losses.next_token, knobs)


def crowd(optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.1, 0.9)
    return Recipe(nets.crowd, tasks.crowds, optimizer, knobs=knobs)


def lstm(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(0.01)
    return Recipe(series.lstm, tasks.recall, optimizer, knobs=knobs)


def forecast(optimizer=None, net=series.forecast, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    return Recipe(net, tasks.seasons, optimizer, losses.squared_error, knobs)


def listener(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(3e-3)
    return Recipe(series.listener, tasks.speech, optimizer, goals.ctc, knobs)


def ear(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    return Recipe(series.ear, tasks.tones, optimizer, knobs=knobs)


def neural_ode(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(0.01)
    return Recipe(
        series.neural_ode, tasks.orbits, optimizer, losses.squared_error, knobs
    )


def pole(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(0.01)
    return Recipe(series.pole, tasks.starts, optimizer, goals.cost, knobs)


def gcn(optimizer=None, net=series.gcn, **knobs):
    return Recipe(net, tasks.papers, optimizer or optax.adam(5e-3), knobs=knobs)


def real_nvp(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(3e-3)
    return Recipe(flows.real_nvp, tasks.moons, optimizer, goals.flow, knobs)


def experts(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    return Recipe(flows.experts, tasks.rentals, optimizer, goals.mixture, knobs)


def towers(optimizer=None, **knobs):
    optimizer = optimizer or optax.adamw(3e-3)
    return Recipe(flows.towers, tasks.captions, optimizer, goals.matching, knobs)


def pinn(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    return Recipe(flows.siren, tasks.rod, optimizer, goals.heat, knobs)


def vae(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(3e-3)
    return Recipe(flows.bars_vae, tasks.bars, optimizer, goals.elbo, knobs)


def rents(net, optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.03, 0.9)
    return Recipe(net, tasks.rentals, optimizer, losses.squared_error, knobs)


def counts(optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.01, 0.9)
    return Recipe(flows.head_net, tasks.visits, optimizer, goals.poisson, knobs)


def topics(optimizer=None, **knobs):
    optimizer = optimizer or optax.adagrad(0.3)
    return Recipe(flows.topics, tasks.neighbors, optimizer, goals.negatives, knobs)


def player(optimizer=None, **knobs):
    knobs = {"inputs": 8, "outputs": 3, "width": 48, **knobs}
    optimizer = optimizer or optax.sgd(0.03, 0.9)
    return Recipe(flows.head_net, tasks.moves, optimizer, goals.bellman, knobs)


def search(optimizer=None, **knobs):
    def net(key, **knobs):
        params, score = flows.head_net(key, **knobs)
        return params, lambda params, x: score(params, x)[..., 0]

    optimizer = optimizer or optax.rmsprop(3e-3)
    return Recipe(net, tasks.results, optimizer, knobs=knobs)


def survival(optimizer=None, **knobs):
    optimizer = optimizer or optax.sgd(0.1, 0.9)
    knobs = {"inputs": 8, **knobs}
    return Recipe(flows.head_net, tasks.patients, optimizer, goals.cox, knobs)


def matching(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    knobs = {"inputs": 3, "outputs": 2, "depth": 3, "act": "silu", **knobs}
    return Recipe(flows.head_net, tasks.moons, optimizer, goals.flow_matching, knobs)


def critic(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(2e-3, 0.5)
    knobs = {"inputs": 2, "act": "leaky_relu", **knobs}
    return Recipe(flows.head_net, tasks.moons, optimizer, goals.hinge_critic, knobs)


def uncertain(optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(5e-3)
    knobs = {"inputs": 9, "outputs": 2, **knobs}
    return Recipe(flows.head_net, tasks.rentals, optimizer, goals.gaussian, knobs)
