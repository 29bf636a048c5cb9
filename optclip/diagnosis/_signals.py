"""All that a diagnosis measures, taken once and then only read."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip.diagnosis import _growth
from optclip.diagnosis._probe import Batch, Probe, halves_of
from optclip.diagnosis._replay import Change

__all__ = ["LIMITS", "Limits", "Signals", "measure"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a signal begins to count; `diagnose` shows them in its signals.

    Attributes:
        growth: Decades over the layers of a network.
        mild_growth: The same where there are ``many`` layers, and evening it out lowers
            the norm.
        many: Layers.
        time_growth: Decades over the earlier half of the steps of a recurrence. A sum
            of equal contributions makes 0.3 there.
        shrink: Decades over the layers by which a signal dies out.
        drop: Decades by which a remedy must lower the norm.
        mild_drop: The same if it also makes a step keep its promise.
        weights: Weights beside He's initialization.
        layer: Growth of each layer from which on it is the weights' fault and not the
            depth's.
        activation: Gain of an activation.
        outlier: Decades by which a bad batch stands out.
        outlier_z: The same in robust standard deviations.
        few: The largest share of batches that can be bad ones.
        trust: Share of the predicted fall of the loss that comes true.
        mild_trust: The same, if steps of a tenth keep all of their promise.
        trust_after: The same with smaller steps.
        twice: What counts as twice a loss.
        rise: Factor by which the loss must rise in a rehearsal of a run that has begun.
        worse: Share of the first loss by which a rehearsal must end higher than one
            with smaller steps.
    """

    growth: float = 2.0
    mild_growth: float = 0.8
    many: int = 16
    time_growth: float = 0.5
    shrink: float = 3.0
    drop: float = 1.0
    mild_drop: float = 0.5
    weights: float = 1.2
    layer: float = 1.3
    activation: float = 1.2
    outlier: float = 1.0
    outlier_z: float = 5.0
    few: float = 0.25
    trust: float = 0.25
    mild_trust: float = 0.4
    trust_after: float = 0.35
    twice: tuple[float, float] = (1.8, 2.2)
    rise: float = 1.5
    worse: float = 0.1


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Signals:
    """What was measured.

    Attributes:
        batches: What each batch gave.
        outliers: Numbers of the batches that are unlike the others.
        usual: Number of the batch that stands for the others.
        layers: The layers of the program, in the order of depth.
        depth: Growth over them, or None.
        time: Growth over the steps of a recurrence, or None.
        he: Size of the weights beside He's initialization, by leaf.
        gains: Backward and forward gains of activations.
        relu_norm: Norm of the gradient with relu for every activation; NaN if not
            asked.
        wide_norm: The same in float32 for float16 and bfloat16.
        low: Names of dtypes below float32 in the program.
        scaled_norm: The same with weights of the usual size.
        scaled_loss: The loss with these.
        scaled: The factor for each leaf that makes its size usual.
        halves: Loss over the mean of the losses of its halves; NaN if it can't be.
        size: Examples in a batch, or examples and positions, that the loss sums over.
        trust: Share of the predicted fall of the loss that comes true, by part.
        scaled_trust: The same for whole steps, with weights of the usual size.
        rehearsals: Losses of a few steps, by part of the updates.
        starts: Losses of the same batches before them.
        begun: Whether the run has begun.
    """

    batches: tuple[Batch, ...]
    outliers: tuple[int, ...]
    usual: int
    layers: list[_growth.Layer]
    depth: _growth.Growth | None
    time: _growth.Growth | None
    he: dict[str, float]
    gains: list[tuple[_growth.Layer, float, float]]
    relu_norm: float = math.nan
    wide_norm: float = math.nan
    low: tuple[str, ...] = ()
    scaled_norm: float = math.nan
    scaled_loss: float = math.nan
    scaled: dict[str, float] = dataclasses.field(default_factory=dict)
    halves: float = math.nan
    size: int = 0
    trust: dict[float, float] = dataclasses.field(default_factory=dict)
    scaled_trust: float = math.nan
    rehearsals: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    starts: list[float] = dataclasses.field(default_factory=list)
    begun: bool = False

    @property
    def first(self) -> Batch:
        """What the usual batch gave."""
        return self.batches[self.usual]

    @property
    def norm(self) -> float:
        """Norm of the usual batch's gradient."""
        return self.first.norm


def outliers_of(batches: list[Batch]) -> tuple[int, ...]:
    """Returns the numbers of batches that are unlike the others, if they are few."""
    logs = np.array([math.log10(b.norm) if b.finite and b.norm > 0 else np.nan
                     for b in batches])  # fmt: skip
    fine = logs[np.isfinite(logs)]
    if len(batches) < 4 or not fine.size:
        return ()
    middle = np.median(fine)
    spread = 1.4826 * np.median(np.abs(fine - middle)) + 0.05
    above = (logs - middle > LIMITS.outlier) & (
        (logs - middle) / spread > LIMITS.outlier_z
    )
    bad = np.array([not b.finite for b in batches]) | above
    return tuple(np.flatnonzero(bad).tolist()) if bad.mean() <= LIMITS.few else ()


def _usual(batches: list[Batch], outliers: tuple[int, ...]) -> int:
    """Returns the number of the batch with the median norm."""
    fine = [i for i, b in enumerate(batches) if b.finite and i not in outliers]
    fine = fine or [i for i in range(len(batches)) if i not in outliers] or [0]
    order = sorted(fine, key=lambda i: batches[i].norm if batches[i].finite else 0.0)
    return order[len(order) // 2]


def _low_dtypes(probe: Probe, params: Any, batch: Any) -> tuple[str, ...]:
    """Returns the dtypes below float32 that the program computes in."""
    if probe.tapped is None:
        dtypes = {str(jnp.result_type(x)) for x in jax.tree.leaves((params, batch))}
    else:
        short = set(re.findall(r"\b(b?f16)\[", str(probe.tapped.plan.jaxpr)))
        dtypes = {{"f16": "float16", "bf16": "bfloat16"}[name] for name in short}
    return tuple(sorted(dtypes & {"float16", "bfloat16"}))


def _scale(params: Any, factors: dict[str, float], paths: tuple[str, ...]) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    scaled = [
        (x * factors.get(path, 1.0)).astype(x.dtype)
        for x, path in zip(leaves, paths, strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled)


def _halves(probe: Probe, params: Any, chosen: list[Any], axis: int) -> float:
    """Returns the median over some batches of the loss over that of its halves."""
    ratios = []
    for batch in chosen[:3]:
        losses = [probe.loss(params, part) for part in halves_of(batch, axis)]
        if not losses:
            return math.nan
        whole, mean = losses[0], (losses[1] + losses[2]) / 2
        ratios.append(whole / mean if mean and np.isfinite(mean) else math.nan)
    return float(np.median(ratios)) if ratios else math.nan


def _sums(probe: Probe, params: Any, chosen: list[Any]) -> dict[str, Any]:
    """Returns whether the loss sums over examples, and over how many numbers."""
    shapes = [np.shape(x) for x in jax.tree.leaves(chosen[0])]
    size = next((shape[0] for shape in shapes if shape), 0)
    first = _halves(probe, params, chosen, 0)
    if LIMITS.twice[0] < first < LIMITS.twice[1]:
        try:  # positions in a sequence, perhaps
            second = _halves(probe, params, chosen, 1)
        except Exception:  # a program of its own, which may be of one length only
            second = math.nan
        if LIMITS.twice[0] < second < LIMITS.twice[1]:
            size *= next(shape[1] for shape in shapes if len(shape) > 1)
    return {"halves": first, "size": size}


def _factors(signals: Signals) -> dict[str, float]:
    """Returns the factors that would make the weights of a usual size, if they help.

    Weights above He's size get that; else, where the signal grows over many layers,
    each gets the factor that would keep it level.
    """
    he, depth = signals.he, signals.depth
    large = {leaf: round(1 / x, 4) for leaf, x in he.items() if x > LIMITS.weights}
    if large or depth is None or depth.count < LIMITS.many:
        return large
    if max(depth.back, depth.forward) < LIMITS.mild_growth:
        return {}
    return dict.fromkeys(depth.leaves, round(1 / depth.each, 4))


def measure(
    probe: Probe, params: Any, opt_state: Any, batches: list[Any], begun: bool
) -> Signals:
    """Measures everything; a stage that has nothing to look at is left out."""
    probe.show(f"gradients of {len(batches)} batches")
    seen = [probe.batch(params, b)[0] for b in batches]
    outliers = outliers_of(seen)
    usual = _usual(seen, outliers)
    batch, this = batches[usual], seen[usual]
    grads = probe.batch(params, batch)[1]
    layers = _growth.layers_of(this.sites)
    signals = Signals(
        tuple(seen), outliers, usual, layers,
        _growth.depth_growth(layers) if len(layers) >= _growth.FEWEST else None,
        _growth.time_growth(this.sites), _growth.he_ratios(layers),
        _growth.activation_gains(layers), low=_low_dtypes(probe, params, batch),
        begun=begun,
    )  # fmt: skip
    more: dict[str, Any] = {}
    gained = [max(b, f) for _, b, f in signals.gains if np.isfinite(max(b, f))]
    if signals.gains and (
        not this.finite or max(gained, default=0) > LIMITS.activation
    ):
        probe.show("the same with relu")
        more["relu_norm"] = probe.changed(params, batch, Change(relu=True))[1]
    if "float16" in signals.low and not all(b.finite for b in seen):
        probe.show("the same in float32")
        more["wide_norm"] = probe.changed(params, batch, Change(wide=True))[1]
    large = _factors(signals)
    if large:
        probe.show("the same with weights of the usual size")
        scaled = _scale(params, large, probe.tapped.paths if probe.tapped else ())
        after, after_grads = probe.batch(scaled, batch)
        more |= {
            "scaled_norm": after.norm, "scaled_loss": after.loss, "scaled": large,
        }  # fmt: skip
        if after.finite:
            trust = probe.trust(scaled, opt_state, batch, after_grads, after.loss)
            more["scaled_trust"] = trust.get(1.0, math.nan)
    if this.finite:
        fine = [b for i, b in enumerate(batches) if i not in outliers]
        more |= _training(probe, params, opt_state, fine, batch, grads, this)
    return dataclasses.replace(signals, **more)


def _training(probe, params, opt_state, fine, batch, grads, this) -> dict[str, Any]:
    """Measures what steps do, and whether the loss is a sum."""
    probe.show("halves of batches")
    more: dict[str, Any] = _sums(probe, params, fine)
    probe.show("steps of several sizes")
    more["trust"] = probe.trust(params, opt_state, batch, grads, this.loss)
    run = [fine[i % len(fine)] for i in range(12)]
    more["starts"] = [probe.loss(params, b) for b in run]
    more["rehearsals"] = {
        part: probe.rehearse(params, opt_state, run, part) for part in (1.0, 0.1)
    }
    return more
