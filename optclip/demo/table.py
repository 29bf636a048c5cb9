"""The demo's table of results: one part per act."""

from typing import Any

import jax
import numpy as np

import optclip
from optclip.demo.acts import FINITE, NONE, OPTAX, RATE, Run
from optclip.demo.overflow import BOUND, HUGE, Overflow
from optclip.demo.training import Progress

__all__ = ["final_losses", "left_out", "median", "render"]


def median(values: np.ndarray) -> np.ndarray:
    """Returns the lower median over the last axis; non-finite values rank last."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.inf), axis=-1)
    return ordered[..., (ordered.shape[-1] - 1) // 2]


def final_losses(run: Run, record: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the mean loss of the last tenth of the steps, [rates, seeds]."""
    loss = record["loss"].astype(np.float64)
    with np.errstate(invalid="ignore"):
        final = loss[-max(1, len(loss) // 10) :].mean(axis=0)
    final = np.where(np.isfinite(final), final, np.inf)
    return final.reshape(len(run.rates), -1)


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "not finite"


def _size(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "not finite"


def _rows(
    runs: list[Run], progress: Progress, overflow: Overflow
) -> list[tuple[str, ...]]:
    ends = {}
    for run, record in zip(runs, progress.records, strict=True):
        ends[run.act, run.name] = median(final_losses(run, record))
    (rates,) = {run.rates for run in runs if run.act == RATE}
    high, lows, bad, finite = [], [], [], ""
    for (act, name), losses in ends.items():
        if act == RATE:
            best = int(np.argmin(losses))
            high.append(_number(losses[-1]))
            lows.append(f"{_number(losses[best])} (at {rates[best]:g})")
        elif name == FINITE:
            finite = _number(losses[0])
        else:
            bad.append(_number(losses[0]))
    names = {run.act: run.name for run in runs}
    huge = [_size(HUGE), *(_size(overflow.huge[p]) for p in ("optax", "optclip"))]
    return [
        ("", NONE, OPTAX, "optclip", ""),
        (f"1. loss at a learning rate of {rates[-1]:g}", *high, names[RATE]),
        ("   loss at the best of five rates", *lows, ""),
        ("2. loss after two bad batches", *bad, runs[-1].name),
        (f"   the same in {FINITE}", "", finite, "", ""),
        (f"3. norm, clipped at {BOUND:g}", *huge, "optclip.clip_by_global_norm"),
    ]


def render(runs: list[Run], progress: Progress, overflow: Overflow) -> str:
    """Returns the table as text."""
    rows = _rows(runs, progress, overflow)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells, last in rows:
        sizes = zip(cells, widths[1:-1], strict=True)
        right = "".join(f"  {cell:>{width}}" for cell, width in sizes)
        lines.append(f"{first:<{widths[0]}}{right}  {last}".rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def left_out(state: Any) -> list[str]:
    """Describes the steps that `skip_steps` left out for the first seed."""
    params, opt_state = state
    found: dict[int, list[Any]] = {}
    one = [_first(tree) for tree in (opt_state, params)]
    for leaf in optclip.nonfinite_leaves(*one):
        found.setdefault(leaf.step, []).append(leaf)
    lines = []
    for step, leaves in sorted(found.items()):
        if any(leaf.nan for leaf in leaves):
            words = f"NaN in {', '.join(leaf.path for leaf in leaves)}"
        else:
            (leaf, *_) = leaves
            words = f"a norm of {leaf.norm:.3g} in {leaf.path}, the largest"
        lines.append(f"step {step}: {words}")
    return lines


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
