"""Repeats claims of papers at a small scale: long dependencies, and spikes.

Usage, from the repository:
    python -m benchmarks.training.papers --output benchmarks/results
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._results import machine, parser, write
from benchmarks.training import tasks
from benchmarks.training.methods import CONSTANT, METHODS
from benchmarks.training.run import program_of, train
from benchmarks.training.tasks import temporal_order

SEEDS = 16
# Pascanu, Mikolov and Bengio (2013) call a run successful if it makes at most 1% errors
# on the test data. They train for up to 5 million steps; these are 2,000.
LENGTHS = (10, 20, 40)
STEPS = 2000
ERRORS = 0.01
RATES = (0.003, 0.01, 0.03, 0.1)
REMEMBERED = ("none", f"{CONSTANT}(1)", "zclip", "stabilize")
# Gradients of these fractions of the steps are multiplied by these factors.
SPIKES = {0.2: 1e2, 0.4: 1e4, 0.6: 1e3, 0.8: 1e2}
SPIKED = (
    "none", f"{CONSTANT}(1)", "zclip", "autoclip", "adagc", "percentile_clip",
    "spam_clip", "quantile_clip", "skip_steps", "stabilize",
)  # fmt: skip
MODELS = {"pre_norm_transformer": (0.003, 0.01, 0.03), "char_rnn": (0.1, 0.3, 1.0)}


def method_of(name):
    """Returns a method; a constant has its only value."""
    if not name.startswith(f"{CONSTANT}("):
        return METHODS[name]
    return METHODS[CONSTANT]._replace(values=(float(name[len(CONSTANT) + 1 : -1]),))


def dependency(length):
    """Returns the temporal order task at a length, judged by its fraction of errors."""

    def make(key, count):
        return temporal_order.make(key, count, length)

    def errors(params):
        symbols, classes = make(jax.random.key(0), 500)
        guesses = jnp.argmax(temporal_order.scores(params, symbols), axis=-1)
        return jnp.mean(guesses != classes)

    return temporal_order.TASK._replace(
        batch=lambda key, step: make(key, temporal_order.BATCH),
        clean=errors,
        rates=RATES,
        steps=STEPS,
        cosine=False,
    )


def successes():
    """Returns a row per method: the fraction of successes at the best rate."""
    lines = [
        f"| method | {' | '.join(f'length {n}' for n in LENGTHS)} |",
        "| --- |" + " --- |" * len(LENGTHS),
    ]
    for name in REMEMBERED:
        cells = []
        for length in LENGTHS:
            program = program_of(dependency(length), method_of(name), range(SEEDS))
            solved = (train(program).clean <= ERRORS)[0].mean(axis=-1)
            best = int(np.argmax(solved))
            cells.append(f"{solved[best]:.0%} at rate {RATES[best]:g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def spiked(task):
    """Returns the task with four steps whose gradients are far too large."""
    steps = jnp.array([round(part * task.steps) for part in SPIKES])
    sizes = jnp.array(list(SPIKES.values()), jnp.float32)

    def gradient(key, step, grads):
        size = 1 + jnp.sum(jnp.where(steps == step, sizes - 1, 0))
        return jax.tree.map(lambda g: size * g, grads)

    return task._replace(gradient=gradient)


def damage():
    """Returns a row per method: the loss with spikes, over that without any clip."""
    columns = [f"{n}, rate {r:g}" for n, rates in MODELS.items() for r in rates]
    lines = [f"| method | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    plain = {}

    @functools.cache
    def loss_of(model, name, spikes):
        task = tasks.load(model)._replace(rates=MODELS[model])
        task = spiked(task) if spikes else task
        clean = train(program_of(task, method_of(name), range(SEEDS))).clean[0]
        top = 2 * task.chance
        return np.log(np.where(clean < top, clean, top)).mean(axis=-1)

    for model in MODELS:
        plain[model] = loss_of(model, "none", False)
    for name in SPIKED:
        cells = []
        for model in MODELS:
            for without, spikes in zip(
                np.exp(loss_of(model, name, False) - plain[model]),
                np.exp(loss_of(model, name, True) - plain[model]),
                strict=True,
            ):
                cells.append(f"{spikes:.2f} ({without:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


TABLES = {"spikes": damage, "lengths": successes}


def main():
    made = parser(__doc__)
    made.add_argument("--only", choices=TABLES, help="one of the tables")
    options = made.parse_args()
    trained = (
        f"{SEEDS} seeds. Trained by `benchmarks/training/papers.py` on {machine()}."
    )
    for name, table in TABLES.items():
        if options.only in (name, None):
            lines = [*table(), "", trained]
            write(options.output, f"papers_{name}.md", lines)


if __name__ == "__main__":
    main()
