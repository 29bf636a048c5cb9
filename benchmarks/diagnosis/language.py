"""A small language model of characters, as in Optax's example "nanolm", but smaller.

The text is the license of optclip, which does not change.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.diagnosis.problem import Problem

TEXT = pathlib.Path(__file__).parents[2] / "LICENSE"
WIDTH, BLOCKS, HEADS, LENGTH, BATCH = 64, 3, 4, 32, 32


class Block(nnx.Module):
    def __init__(self, rngs):
        self.first_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, dropout_rate=0.2, decode=False, rngs=rngs
        )
        self.second_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.first_norm(x), mask=mask, deterministic=False)
        hidden = jax.nn.relu(self.up(self.second_norm(x)))
        return x + self.dropout(self.down(hidden))


class LanguageModel(nnx.Module):
    def __init__(self, symbols, rngs):
        self.embed = nnx.Embed(symbols, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, symbols, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places(jnp.arange(LENGTH))[None]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def loss_fn(model, batch):
    inputs, targets = batch
    logits = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def characters(seed, count=24):
    """Returns batches of (characters, next characters), and the number of kinds."""
    text = TEXT.read_text(encoding="utf-8")
    kinds = {c: i for i, c in enumerate(sorted(set(text)))}
    data = np.array([kinds[c] for c in text], np.int32)
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        starts = rng.integers(0, len(data) - LENGTH - 1, (BATCH, 1))
        rows = data[starts + np.arange(LENGTH + 1)]
        batches.append((jnp.array(rows[:, :-1]), jnp.array(rows[:, 1:])))
    return batches, len(kinds)


def language_model(seed):
    batches, symbols = characters(seed)
    model = LanguageModel(symbols, nnx.Rngs(seed))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params, batch):
        # A copy, so that every call uses the same dropout.
        mine = jax.tree.map(lambda x: x, rest)
        return loss_fn(nnx.merge(graph, params, mine), batch)

    return Problem(loss_of, params, batches, optax.adamw(2e-3))
