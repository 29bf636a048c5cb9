"""Takes all measurements of a diagnosis once; the rules only read them."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._engine.scale_invariance import ignores_scale
from optclip.diagnosis import _growth
from optclip.diagnosis._candidates import lowered
from optclip.diagnosis._inputs import broken_parts, not_finite_leaves
from optclip.diagnosis._limits import LIMITS
from optclip.diagnosis._models import is_weight
from optclip.diagnosis._origins import Origin
from optclip.diagnosis._outside import excess_of, larger_steps, unseen_ratios
from optclip.diagnosis._positions import position_growth
from optclip.diagnosis._probe import Batch, Knobs, Probe, halves_of
from optclip.diagnosis._rehearsals import Rehearsal, Run, ended
from optclip.diagnosis._replay import Change

__all__ = ["LIMITS", "Signals", "ended", "measure"]

# Rehearsals use these parts of the learning rate, one after the other.
PARTS = (1.0, 0.1, 0.03, *(10.0**-n for n in range(2, 10)))


@dataclasses.dataclass(frozen=True)
class Signals:
    """The measurements of a diagnosis.

    Attributes:
        batches: The measurements of each batch.
        outliers: Indices of the batches that differ from the others.
        typical: Index of the batch that represents the others.
        layers: The layers of the program, in the order of depth.
        depth: Growth over the layers, or None.
        time: Growth over the steps of a recurrence, or None.
        he: Size of the weights relative to He initialization, by leaf.
        gains: Backward and forward gains of activations.
        relu_norm: Norm of the gradient with every activation replaced by relu; NaN if
            not measured.
        wide_norm: The same with float16 and bfloat16 replaced by float32.
        wide_loss: The loss with float16 and bfloat16 replaced by float32.
        lost_updates: Fraction of the next updates that rounding makes ineffective, of
            the parameters whose dtype is narrower than float32; 0 if there are none.
        low: Names of the dtypes in the program that are narrower than float32.
        scaled_norm: Norm of the gradient with weights of typical size.
        scaled_loss: The loss with weights of typical size.
        scaled: For each leaf, the factor that gives it a typical size.
        halves: Loss of a batch divided by the mean loss of its halves; NaN if it can't
            be measured.
        size: Number of examples, or of examples times positions, that the loss sums.
        perhaps: Number of positions of an example, if it can't be measured whether the
            loss sums over these too; otherwise 1.
        trust: Fraction of the predicted change in the loss achieved, by update scale.
        slope: The change in the loss that the gradient predicts for a step.
        still: Whether the next step is known to change nothing.
        bad_updates: Whether the next step's updates are not finite, though the
            gradient is.
        no_steps: The reason why no steps could be tried; "" if they could.
        broken: If no batch has a finite gradient, the paths of "parameters" and the
            indices of "batches" that contain non-finite numbers, and the indices of
            batches that are "empty". If the updates are not finite, the paths of
            non-finite leaves in the "optimizer" state. In other cases such numbers may
            be intended, such as a mask of -inf or an initial best loss of inf.
        origin: The operation in which the numbers of a batch stop being finite.
        scaled_trust: As ``trust``, for full steps with weights of typical size.
        rehearsals: Losses over a few steps of training, by update scale; only those at
            the full rate if nothing about them is suspicious.
        starts: Losses of the same batches before those steps.
        empty_loss: If the run has started, the loss of the same model with all
            parameters set to 0, as a proxy for an untrained model.
        begun: Whether the run has started.
        repeats: The same with the batches in the reverse order, for the full rate and
            for the parts of it that seem better; empty if none does.
        repeat_starts: Losses of these batches before those steps.
        dead: The parts of the learning rate at which the gradient becomes exactly 0.
        adaptive: Whether the optimizer ignores the scale of its gradients, as Adam.
        excess: Average ratio of the update to its cap, in a run that has started; 1 if
            there is no cap.
        uncapped: Losses over the same steps of training, by the factor that the
            updates are enlarged by, if a cap divides them.
        positions: Growth of the derivative of the loss over the positions of an input,
            or None.
        rehearsed_norms: Norm of the gradient of each leaf, by step of the rehearsal
            at the full learning rate.
        evened: The measurements of each batch with weights of typical size, if only
            these show which batches differ from the others; otherwise empty.
        memory: Over how many steps the optimizer spreads each gradient.
    """

    batches: tuple[Batch, ...]
    outliers: tuple[int, ...]
    typical: int
    layers: list[_growth.Layer]
    depth: _growth.Growth | None
    time: _growth.Growth | None
    he: dict[str, float]
    gains: list[tuple[_growth.Layer, float, float]]
    relu_norm: float = math.nan
    wide_norm: float = math.nan
    wide_loss: float = math.nan
    lost_updates: float = 0.0
    low: tuple[str, ...] = ()
    scaled_norm: float = math.nan
    scaled_loss: float = math.nan
    scaled: dict[str, float] = dataclasses.field(default_factory=dict)
    halves: float = math.nan
    size: int = 0
    perhaps: int = 1
    trust: dict[float, float] = dataclasses.field(default_factory=dict)
    slope: float = math.nan
    still: bool = False
    bad_updates: bool = False
    no_steps: str = ""
    origin: Origin | None = None
    broken: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    scaled_trust: float = math.nan
    rehearsals: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    starts: list[float] = dataclasses.field(default_factory=list)
    empty_loss: float = math.nan
    begun: bool = False
    repeats: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    repeat_starts: list[float] = dataclasses.field(default_factory=list)
    dead: frozenset[float] = frozenset()
    adaptive: bool = False
    excess: float = 1.0
    uncapped: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    positions: _growth.Growth | None = None
    rehearsed_norms: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    evened: tuple[Batch, ...] = ()
    memory: float = 1.0

    @property
    def first(self) -> Batch:
        """The measurements of the representative batch."""
        return self.batches[self.typical]

    @property
    def norm(self) -> float:
        """The gradient norm of the representative batch."""
        return self.first.norm

    @property
    def whole(self) -> Rehearsal | None:
        """The rehearsals at the full rate; None if there are not two of them."""
        if 1.0 not in self.repeats:
            return None
        first = Run(self.starts, self.rehearsals[1.0])
        second = Run(self.repeat_starts, self.repeats[1.0])
        return Rehearsal((first, second), self.empty_loss)

    @property
    def unstable(self) -> bool:
        """Whether a full step, or a few of them, achieve little or do harm."""
        if not self.rehearsals:
            return False
        whole = Run(self.starts, self.rehearsals[1.0])
        return whole.fails or self.trust.get(1.0, 1.0) < LIMITS.mild_trust

    @property
    def growing(self) -> float:
        """The number of decades by which a signal grows over the layers."""
        if self.depth is None:
            return 0.0
        return max(self.depth.back, self.depth.forward)

    @property
    def learned(self) -> bool:
        """Whether the weights were learned: those of typical size raise the loss."""
        before = self.first.loss
        return self.first.finite and self.scaled_loss > max(1.1 * before, before + 0.1)

    @property
    def by_depth(self) -> bool:
        """Whether a signal grows because many layers each amplify it slightly."""
        depth = self.depth
        if depth is None or depth.count < LIMITS.many or depth.each > LIMITS.layer:
            return False
        drop = lowered(self.norm, self.scaled_norm)
        evened = drop > LIMITS.drop and not self.learned
        return self.growing > (LIMITS.mild_growth if evened else LIMITS.growth)


def outliers_of(batches: list[Batch]) -> tuple[int, ...]:
    """Returns the indices of batches that differ from the rest, if there are few."""
    logs = np.array(
        [math.log10(b.norm) if b.finite and b.norm > 0 else np.nan for b in batches]
    )
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


def _typical(batches: list[Batch], outliers: tuple[int, ...]) -> int:
    """Returns the index of the batch with the median norm."""
    fine = [i for i, b in enumerate(batches) if b.finite and i not in outliers]
    fine = fine or [i for i in range(len(batches)) if i not in outliers] or [0]
    order = sorted(fine, key=lambda i: batches[i].norm if batches[i].finite else 0.0)
    return order[len(order) // 2]


def _low_dtypes(probe: Probe, params: Any, batch: Any) -> tuple[str, ...]:
    """Returns the dtypes narrower than float32 in which the program computes."""
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
    """Returns the median ratio of a batch's loss to the mean loss of its halves."""
    ratios = []
    for batch in chosen[:3]:
        try:
            losses = [probe.loss(params, part) for part in halves_of(batch, axis)]
        except Exception:  # a program for one batch size only, or a graph
            return math.nan
        if not losses:
            return math.nan
        whole, mean = losses[0], (losses[1] + losses[2]) / 2
        ratios.append(whole / mean if mean and np.isfinite(mean) else math.nan)
    return float(np.median(ratios)) if ratios else math.nan


def _has_positions(leaf: Any) -> bool:
    """Whether axis 1 is one of positions; that of a table of features is not."""
    whole = not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return np.ndim(leaf) > 2 or (np.ndim(leaf) == 2 and whole)


def _sums(probe: Probe, params: Any, chosen: list[Any]) -> dict[str, Any]:
    """Returns the ratio that reveals a sum and the number of terms in that sum."""
    leaves = jax.tree.leaves(chosen[0])
    size = next((np.shape(x)[0] for x in leaves if np.ndim(x)), 0)
    first, perhaps = _halves(probe, params, chosen, 0), 1
    if LIMITS.twice[0] < first < LIMITS.twice[1]:
        second = _halves(probe, params, chosen, 1)  # perhaps also over positions
        if LIMITS.twice[0] < second < LIMITS.twice[1]:
            size *= next(np.shape(x)[1] for x in leaves if np.ndim(x) > 1)
        elif math.isnan(second):  # the model may accept one length only
            lengths = (np.shape(x)[1] for x in leaves if _has_positions(x))
            perhaps = next(lengths, 1)
    return {"halves": first, "size": size, "perhaps": perhaps}


def _factors(signals: Signals) -> dict[str, float]:
    """Returns the factors that would bring weights to a typical size, if they help.

    Weights larger than He initialization are scaled down to it. If these do not
    account for half of the growth of the signal over many layers, each weight gets the
    factor that would keep the signal constant.
    """
    he, depth = signals.he, signals.depth
    large = {leaf: round(1 / x, 4) for leaf, x in he.items() if x > LIMITS.weights}
    if depth is None or depth.count < LIMITS.many:
        return large
    accounted = -sum(map(math.log10, large.values()))
    if signals.growing < LIMITS.mild_growth or accounted > signals.growing / 2:
        return large
    return dict.fromkeys(depth.leaves, round(1 / depth.each, 4))


def _seen(probe: Probe, params: Any, state: Any, batch: Any, number: int) -> Batch:
    try:
        return probe.norms(params, state, batch)
    except Exception as error:
        error.add_note(f"This came of batch {number}, the first being number 0.")
        raise


def measure(
    probe: Probe,
    params: Any,
    opt_state: Any,
    batches: list[Any],
    begun: bool,
    steps: int = 12,
) -> Signals:
    """Runs every stage of measurement, skipping stages that have nothing to measure."""
    probe.show(f"gradients of {len(batches)} batches")
    seen = [_seen(probe, params, opt_state, b, i) for i, b in enumerate(batches)]
    outliers = outliers_of(seen)
    typical = _typical(seen, outliers)
    batch = batches[typical]
    this, grads = probe.batch(params, batch)
    seen[typical] = this
    broken = next((i for i, b in enumerate(seen) if not b.finite), typical)
    if broken != typical:
        seen[broken] = probe.batch(params, batches[broken])[0]
    layers = _growth.layers_of(this.sites)
    he = _growth.he_ratios(layers)
    he |= unseen_ratios(probe.tapped, params, he)
    signals = Signals(
        tuple(seen),
        outliers,
        typical,
        layers,
        _growth.depth_growth(layers) if len(layers) >= _growth.FEWEST else None,
        _growth.time_growth(this.sites),
        he,
        _growth.activation_gains(layers),
        low=_low_dtypes(probe, params, batch),
        positions=position_growth(this.position_norms, this.sites),
        begun=begun,
    )
    more: dict[str, Any] = {}
    if not any(b.finite for b in seen):
        more["broken"] = broken_parts(params, batches)
    for number, b in enumerate(seen):
        if not (b.finite or any(broken_parts(params, [batches[number]]).values())):
            probe.show("where numbers stop being finite")
            more["origin"] = probe.origin(params, batches[number])
            break
    gained = [max(b, f) for _, b, f in signals.gains if np.isfinite(max(b, f))]
    if signals.gains and (
        not this.finite or max(gained, default=0) > LIMITS.activation
    ):
        probe.show("the same with relu")
        more["relu_norm"] = probe.changed(params, batch, Change(relu=True))[1]
    if signals.low and (this.finite or "float16" in signals.low):
        probe.show("the same in float32")
        wide = probe.changed(params, batch, Change(wide=True))
        more["wide_loss"], more["wide_norm"] = wide
    large = _factors(signals)
    if large:
        probe.show("the same with weights of the typical size")
        scaled = _scale(params, large, probe.tapped.paths if probe.tapped else ())
        after, after_grads = probe.batch(scaled, batch)
        more |= {
            "scaled_norm": after.norm,
            "scaled_loss": after.loss,
            "scaled": large,
        }
        if after.finite and not probe.no_steps:
            step = probe.step(scaled, opt_state, batch, after_grads, after.loss)
            more["scaled_trust"] = step.trust.get(1.0, math.nan)
        learned = dataclasses.replace(signals, **more).learned
        if after.finite and not (outliers or learned) and len(batches) > 1:
            # Large weights can make all batches alike, by saturating what follows.
            evened = [probe.norms(scaled, opt_state, b) for b in batches]
            if hidden := outliers_of(evened):
                more |= {"outliers": hidden, "evened": tuple(evened)}
                if typical in hidden:
                    typical = _typical(evened, hidden)
                    this, grads = probe.batch(params, batches[typical])
                    seen[typical] = this
                    more |= {"typical": typical, "batches": tuple(seen)}
    signals = dataclasses.replace(signals, **more)
    if this.finite:
        more = _training(probe, params, opt_state, batches, grads, signals, steps)
    return dataclasses.replace(signals, **more)


def _training(probe, params, opt_state, batches, grads, s, steps) -> dict[str, Any]:
    """Measures the effect of steps, and whether the loss is a sum."""
    probe.show("halves of batches")
    chosen = [i for i in range(len(batches)) if i not in s.outliers]
    fine, batch = [batches[i] for i in chosen], batches[s.typical]
    more: dict[str, Any] = _sums(probe, params, fine)
    if probe.no_steps:
        return {**more, "no_steps": probe.no_steps}
    probe.show("steps of several sizes")
    step = probe.step(params, opt_state, batch, grads, s.first.loss)
    more |= {"trust": step.trust, "slope": step.slope, "still": step.zero}
    more["lost_updates"] = step.lost
    if not step.finite:
        broken = {"optimizer": not_finite_leaves(opt_state)}
        return {**more, "bad_updates": True, "broken": broken}
    # The batches in order, and from the last to the first.
    orders = [[i % len(fine) for i in range(steps)]]
    orders.append([len(fine) - 1 - i for i in orders[0]])
    runs = [[fine[i] for i in order] for order in orders]
    starts = [[s.batches[chosen[i]].loss for i in order] for order in orders]
    run = runs[0]
    if s.begun:
        zeros = jax.tree.map(_emptied, params)
        more["empty_loss"] = float(np.mean([probe.loss(zeros, b) for b in run[-4:]]))
    distrusted = not s.begun and step.trust.get(1.0, 1.0) < LIMITS.mild_trust
    more |= _rehearsals(probe, params, opt_state, runs, starts, distrusted)
    if len(more["rehearsals"]) > 1:  # otherwise, no rule asks
        more["adaptive"] = bool(ignores_scale(probe.optimizer, params))
    if s.begun:
        more["excess"] = excess_of(opt_state)
        more["uncapped"] = {
            part: probe.rehearse(params, opt_state, run, Knobs(part))[0]
            for part in larger_steps(more["excess"])
        }
    return more


def _emptied(leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if is_weight(leaf) else leaf


def _is_fine(whole: Run) -> bool:
    """Whether nothing in a rehearsal at the full rate calls for one at a lower rate."""
    if whole.fails or len(whole.losses) >= LIMITS.long:
        return False
    return max(whole.losses) <= whole.start + LIMITS.leap * abs(whole.start)


def _dies(norms: list[tuple[float, ...]]) -> bool:
    """Whether the gradient becomes exactly 0 in a rehearsal."""
    return any(norms[0]) and not any(norms[-1])


def _rehearsals(probe, params, opt_state, runs, starts, distrusted) -> dict[str, Any]:
    """Trains at the full rate and, if needed, at lower ones while the loss improves.

    What seems better than the full rate is repeated with another order of the batches.
    """
    found: dict[float, list[float]] = {}
    dead: set[float] = set()
    last, sizes = math.inf, []
    for part in PARTS:
        found[part], each = probe.rehearse(params, opt_state, runs[0], Knobs(part))
        sizes, whole = sizes or each, Run(starts[0], found[1.0])
        if _dies(each):
            dead.add(part)
            continue
        if part == 1.0 and _is_fine(whole) and not distrusted:
            break
        end = ended(found[part])
        stalls = math.isfinite(last) and not end < last - LIMITS.worse * abs(last)
        if stalls and (end < whole.start or not whole.fails):
            break
        last = end
    end = math.inf if 1.0 in dead else whole.end - whole.noise
    more = [p for p in found if ended(found[p]) < end and p not in dead]
    repeats: dict[float, list[float]] = {}
    if more or whole.fails:
        for part in (1.0, *more):
            repeats[part], each = probe.rehearse(
                params, opt_state, runs[1], Knobs(part)
            )
            if _dies(each):
                dead.add(part)
    return {
        "starts": starts[0],
        "repeat_starts": starts[1],
        "rehearsals": found,
        "dead": frozenset(dead),
        "repeats": repeats,
        "rehearsed_norms": sizes,
    }
