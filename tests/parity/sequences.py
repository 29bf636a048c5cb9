"""Gradients whose norms jump, stay constant and vanish, for both libraries."""

import jax
import numpy as np

STEPS = 300
SHAPES = ((4, 3), (5,))


def norms(seed=0, zeros=True):
    """Returns log-normal norms with spikes, two plateaus and, optionally, zeros."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 0.5, STEPS))
    size[rng.choice(np.arange(10, STEPS), 10, replace=False)] *= 50
    size[60:90] = 0.8
    size[200:225] = 2.5
    if zeros:
        size[[30, 31, 130, 215, 260]] = 0
    return size


def gradients(seed=0, zeros=True):
    """Returns a list of two leaves, each with the steps on its first axis."""
    rng = np.random.default_rng(seed + 100)
    leaves = [rng.normal(size=(STEPS, *shape)) for shape in SHAPES]
    squares = sum(np.square(x).reshape(STEPS, -1).sum(1) for x in leaves)
    factor = norms(seed, zeros) / np.sqrt(squares)
    shaped = [factor.reshape(-1, *[1] * (x.ndim - 1)) for x in leaves]
    pairs = zip(leaves, shaped, strict=True)
    return [np.asarray(x * f, np.float32) for x, f in pairs]


BOTH = (gradients(0, zeros=False), gradients(1, zeros=True))


def runner(tx):
    """Returns a function that returns the stacked updates and states of all steps."""

    def step(state, grad):
        updates, state = tx.update(grad, state)
        return state, (updates, state)

    scan = jax.jit(lambda state, grads: jax.lax.scan(step, state, grads)[1])

    def run(grads):
        return jax.tree.map(np.asarray, scan(tx.init([g[0] for g in grads]), grads))

    return run


def run(tx, grads):
    """Returns the updates and the states of all steps, stacked."""
    return runner(tx)(grads)


def close(ours, theirs, atol=0.0):
    """Asserts that two arrays are the same to 1e-5."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol)


def all_close(ours, theirs):
    """Asserts that two lists of leaves are the same to 1e-5."""
    for mine, peer in zip(ours, theirs, strict=True):
        close(mine, peer)


def parameters(torch, grads):
    return [torch.nn.Parameter(torch.ones(g.shape[1:])) for g in grads]


def put(torch, params, grads, step):
    """Sets the gradient of each parameter to that of this step."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad[step])


def taken(params):
    return [p.grad.numpy().copy() for p in params]


def stacked(rows):
    """Turns a list of steps, each a list of leaves, into a list of stacked leaves."""
    return [np.stack(leaf) for leaf in zip(*rows, strict=True)]
