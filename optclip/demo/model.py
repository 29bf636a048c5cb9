"""A character-level vanilla RNN, the network whose gradients explode most readily."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

__all__ = ["CharRNN", "create", "define", "loss"]


class CharRNN(nnx.Module):
    """Predicts the next character: h' = tanh(embed(x) + W h + b), logits = V h' + c.

    W is initialized to an orthogonal matrix, so that the gradients neither vanish nor
    explode over time at the start of training.
    """

    def __init__(self, symbols: int, hidden: int, *, rngs: nnx.Rngs):
        """Initializes the network's parameters."""
        small = nnx.initializers.normal(0.1)
        orthogonal = nnx.initializers.orthogonal()
        self.embed = nnx.Embed(symbols, hidden, embedding_init=small, rngs=rngs)
        self.recur = nnx.Linear(hidden, hidden, kernel_init=orthogonal, rngs=rngs)
        self.readout = nnx.Linear(hidden, symbols, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """Returns logits [batch, time, symbols] for codes [batch, time]."""

        def advance(state, inputs):
            state = jnp.tanh(inputs + self.recur(state))
            return state, state

        inputs = jnp.swapaxes(self.embed(codes), 0, 1)
        _, states = jax.lax.scan(advance, jnp.zeros_like(inputs[0]), inputs)
        return jnp.swapaxes(self.readout(states), 0, 1)


def define(symbols: int, hidden: int) -> Any:
    """Returns the network without its parameters."""
    blank = nnx.eval_shape(lambda: CharRNN(symbols, hidden, rngs=nnx.Rngs(0)))
    return nnx.graphdef(blank)


@functools.partial(jax.jit, static_argnums=(0, 1))
def create(symbols: int, hidden: int, seeds: jax.Array) -> dict[str, Any]:
    """Returns the initial parameters, a dict of arrays whose first axis is the seed."""

    def create_one(seed):
        network = CharRNN(symbols, hidden, rngs=nnx.Rngs(jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(network))

    return jax.vmap(create_one)(seeds)


def loss(params: dict[str, Any], definition: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean loss per character, in nats, for windows [batch, T + 1]."""
    network = nnx.merge(definition, nnx.State(params))
    logits = network(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses)
