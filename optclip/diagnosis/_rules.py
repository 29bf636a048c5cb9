"""Decides which causes to name: rules propose them, and remedies are tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._rehearsals import Rehearsal, better
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis._trials import Trials
from optclip.diagnosis.causes.activation import activation
from optclip.diagnosis.causes.bad_batch import bad_batch
from optclip.diagnosis.causes.depth import depth
from optclip.diagnosis.causes.initialization import initialization
from optclip.diagnosis.causes.input_scale import input_scale
from optclip.diagnosis.causes.learning_rate import learning_rate
from optclip.diagnosis.causes.loss_scale import loss_scale
from optclip.diagnosis.causes.loss_sum import loss_sum
from optclip.diagnosis.causes.not_finite import given_not_finite, not_finite
from optclip.diagnosis.causes.overflow import overflow
from optclip.diagnosis.causes.precision import precision
from optclip.diagnosis.causes.recurrence import recurrence
from optclip.diagnosis.causes.unknown import unknown
from optclip.diagnosis.causes.update_cap import update_cap
from optclip.diagnosis.causes.uphill import uphill
from optclip.diagnosis.causes.vanishing import vanishing
from optclip.diagnosis.causes.warm_up import warm_up
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["judge"]

RULES: tuple[Callable[[Signals], Candidate | None], ...] = (
    overflow,
    bad_batch,
    activation,
    recurrence,
    initialization,
    depth,
    loss_sum,
    uphill,
    precision,
    learning_rate,
    update_cap,
    vanishing,
)
# Explanations for a growing signal. Only the one whose remedy helps most is kept.
GROWTH = {"activation", "recurrence", "initialization", "depth"}
# Causes that a lower learning rate also hides.
RATES = {"learning_rate", "warm_up"}
# The bases of findings with a remedy that was tried and helped.
HELPED = {"works", "helps"}


def _suspected(s: Signals, trials: Trials | None) -> list[Candidate]:
    """Returns the causes that are named only if their remedy works."""
    if trials is None or not s.rehearsals:
        return []
    found = [input_scale(trials.scales)]
    if s.unstable:
        found += loss_scale(trials.factors, s.adaptive)
    return [c for c in found if c is not None]


def _words(new: Rehearsal, old: Rehearsal, also: str = "") -> str:
    steps = len(new.runs[0].losses)
    return (
        f"In rehearsals of {steps} steps{also}, the loss goes {new.words()} with this "
        f"remedy, and {old.words()} without it."
    )


def _tried(candidate: Candidate, trials: Trials) -> Candidate:
    """Tries the remedies of a candidate, and leaves out those that don't help."""
    finding, base = candidate.finding, trials.base
    times = LIMITS.factor_wins if finding.cause == "loss_scale" else LIMITS.wins
    kept: list[Remedy] = []
    worked = failed = False
    for remedy in finding.remedies:
        if not remedy.advice or math.isinf(candidate.benefit):
            kept.append(remedy)
            continue
        if worked and remedy.kind == kept[-1].kind:
            continue  # a smaller change was enough
        new = trials.of(remedy)
        if new is not None and better(new, base, times):
            kept.append(dataclasses.replace(remedy, tried=_words(new, base)))
            worked = True
        elif new is None or not (base.fails or candidate.suspected):
            # Not tried, or nothing was wrong within the rehearsal.
            kept.append(remedy)
        else:
            failed = True
    basis = "fails" if failed else "measured"
    if worked:
        basis = "works" if base.fails else "helps"
    finding = dataclasses.replace(finding, remedies=tuple(kept), basis=basis)
    return candidate._replace(finding=finding)


def _tried_with(
    rate: Remedy, candidate: Candidate, proposed: Finding, trials: Trials
) -> Candidate:
    """Tries again what failed at the full learning rate, at a lower one."""
    lower = trials.of(rate)
    if candidate.finding.basis != "fails" or lower is None:
        return candidate
    for remedy in proposed.remedies:
        both = trials.of(remedy, rate) if remedy.advice else None
        if both is not None and better(both, lower, LIMITS.wins):
            also = f" at {rate.amount:g} of the learning rate"
            words = _words(both, lower, also)
            kept = (dataclasses.replace(remedy, tried=words),)
            remedies = kept + candidate.finding.remedies
            finding = dataclasses.replace(
                candidate.finding, remedies=remedies, basis="helps"
            )
            return candidate._replace(finding=finding)
    return candidate


def _warmed(s: Signals, trials: Trials) -> Candidate | None:
    """Returns the warm-up as the cause, if the full rate is best after one."""
    candidate = warm_up(s, trials.ramp)
    if candidate is None:
        return None
    (remedy,) = candidate.finding.remedies
    warmed = trials.of(remedy)
    if warmed is None or not warmed.trains:
        return None
    full, tenth = trials.long(), trials.long(0.1)
    for new, without, slow in zip(warmed.runs, full.runs, tenth.runs, strict=True):
        if not (new.end < without.end - new.noise and new.end < slow.end):
            return None
    remedy = dataclasses.replace(remedy, tried=_words(warmed, full))
    basis = "works" if full.fails else "helps"
    finding = dataclasses.replace(candidate.finding, remedies=(remedy,), basis=basis)
    return candidate._replace(finding=finding)


def _proposed(s: Signals) -> list[Candidate]:
    found = [c for rule in RULES if (c := rule(s)) is not None]
    return _without_depth(found, {c.finding.cause for c in found if not c.suspected})


def _without_depth(found: list[Candidate], causes: set[str]) -> list[Candidate]:
    # These causes explain growth over the layers, so depth is not the cause.
    if causes & {"activation", "initialization", "recurrence"}:
        return [c for c in found if c.finding.cause != "depth"]
    return found


def _judged(
    s: Signals, found: list[Candidate], trials: Trials | None
) -> list[Candidate]:
    """Tries the remedies of all candidates, and leaves out what they rule out."""
    if trials is None or not s.rehearsals:
        return [c for c in found if not c.suspected or math.isinf(c.benefit)]
    rated = [c for c in found if c.finding.cause in RATES]
    others = [c for c in found if c.finding.cause not in RATES]
    others += _suspected(s, trials)
    judged = [_tried(c, trials) for c in others]
    # If a model trains at the full rate without another fault, the rate is innocent.
    if any(c.finding.basis == "works" for c in judged):
        rated = []
    elif rated:
        rate = rated[0].finding.remedies[0]
        pairs = zip(judged, others, strict=True)
        judged = [_tried_with(rate, c, o.finding, trials) for c, o in pairs]
        rated = [_warmed(s, trials) or rated[0]]
    named = [c for c in judged if not (c.suspected and c.finding.basis not in HELPED)]
    return _without_depth([*named, *rated], {c.finding.cause for c in named})


def _order(candidate: Candidate) -> tuple:
    finding = candidate.finding
    first = math.isinf(candidate.benefit)
    rank = 0 if finding.basis in HELPED and finding.cause not in RATES else 1
    if finding.basis == "fails":
        rank = 2
    return (not first, rank, -candidate.benefit)


def judge(signals: Signals, trials: Trials | None = None) -> tuple[Finding, ...]:
    """Returns the causes, ordered by how much their remedy helps."""
    if (given := given_not_finite(signals)) is not None:
        return (given,)
    proposed = _proposed(signals)
    judged = sorted(_judged(signals, proposed, trials), key=_order)
    findings = [c.finding for c in judged]
    causes = {finding.cause for finding in findings}
    others = [b for i, b in enumerate(signals.batches) if i not in signals.outliers]
    explained = causes & (GROWTH | {"overflow"})
    explained = explained or ("bad_batch" in causes and all(b.finite for b in others))
    if not all(b.finite for b in signals.batches) and not explained:
        findings.append(not_finite(signals))
    if not findings and (found := unknown(signals)) is not None:
        return (found,)
    return tuple(findings)
