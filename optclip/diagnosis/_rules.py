"""Infers causes from signals; each rule detects one cause and describes its remedy."""

import math
from collections.abc import Callable

import numpy as np

from optclip.diagnosis._cap import update_cap
from optclip.diagnosis._growth_rules import (
    Candidate,
    activation,
    depth,
    initialization,
    lowered,
    recurrence,
    vanishing,
)
from optclip.diagnosis._signals import LIMITS, Signals, ended
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["judge"]


def _overflow(s: Signals) -> Candidate | None:
    broken = [b for b in s.batches if not b.finite]
    if not broken or "float16" not in s.low or not math.isfinite(s.wide_norm):
        return None
    sites = [x for x in broken[0].sites if x.dtype in ("float16", "bfloat16")]
    forward = [x for x in sites if not np.all(np.isfinite(x.rms_out))]
    measured = [x for x in sites[::-1] if "signal_out" not in x.unmeasured]
    backward = [x for x in measured if not np.all(np.isfinite(x.signal_out))]
    there = forward or backward
    where = tuple(dict.fromkeys(x.leaf for x in there))
    what = "forward" if forward or not backward else "backward"
    cure = (
        "Compute these layers in float32 or bfloat16, whose range is that of float32"
        if what == "forward"
        else "Lower the loss scale, or compute in float32 or bfloat16"
    )
    finding = Finding(
        "overflow",
        where,
        f"{len(broken)} of {len(s.batches)} batches are not finite: the {what} signal "
        f"leaves the range of float16 (65504). The same program in float32 has a "
        f"gradient of norm {s.wide_norm:.3g}.",
        f"{cure}.",
        "high",
        "measured",
        (Remedy("float32"),),
    )
    return Candidate(finding, math.inf)


def _sentence(words: str) -> str:
    return f" {words[0].upper()}{words[1:]}."


def _operation(s: Signals) -> str:
    """Describes the operation in which a batch stops being finite; "" if unknown."""
    return "" if s.origin is None else _sentence(str(s.origin))


def _bad_batch(s: Signals) -> Candidate | None:
    if not s.outliers or not s.first.finite:
        return None
    bad = [s.batches[i] for i in s.outliers]
    broken = sum(not b.finite for b in bad)
    largest = max((b.norm for b in bad if b.finite), default=math.inf)
    words = [f"{broken} not finite"] if broken else []
    if broken < len(bad):
        words.append(f"norms up to {largest:.3g}")
    bound = float(np.median([b.norm for b in s.batches if b.finite]))
    numbers = tuple(str(i) for i in s.outliers)
    finding = Finding(
        "bad_batch",
        tuple(f"batch {i}" for i in numbers),
        f"{len(bad)} of {len(s.batches)} batches: {', '.join(words)}, where the median "
        f"of all is {bound:.3g}.{_operation(s) if broken else ''}",
        "Look at these batches, and drop or fix them. `optclip.skip_steps` leaves "
        f"such steps out; a clip at {bound:.3g} bounds those that are finite.",
        "high" if broken else "medium",
        "measured",
        (Remedy("drop_batches", None, numbers), Remedy("clip", bound)),
    )
    return Candidate(finding, lowered(largest, s.norm))


def _loss_sum(s: Signals) -> Candidate | None:
    if not LIMITS.twice[0] < s.halves < LIMITS.twice[1]:
        return None
    finding = Finding(
        "loss_sum",
        (),
        f"The loss of a batch is {s.halves:.3g} times the mean loss of its halves; a "
        "mean would give 1.",
        f"Divide the loss by the number of examples, or of examples and positions, "
        f"{s.size} in a batch, so that the gradient does not grow with it.",
        "medium",
        "measured",
        (Remedy("divide_loss", float(s.size)),),
    )
    return Candidate(finding, math.log10(max(s.size, 1)))


def _promise(trust: float, smaller: float, part: float) -> str:
    """Describes how much of the predicted decrease in the loss is achieved."""
    if not (math.isfinite(trust) and math.isfinite(smaller)):
        return ""

    def brings(share: float) -> str:
        return f"brings {share:.0%} of it" if share > 0.005 else "makes the loss rise"

    less = f", one with {part:g} of its size {brings(smaller)}"
    less = less if smaller > max(trust, 0) else ""
    return f"The gradient predicts a fall of the loss; a step {brings(trust)}{less}. "


def _run_of(s: Signals, part: float, start: float, peak: float | None) -> str:
    """Describes how the rehearsals went."""

    def end_of(tried: float) -> str:
        end = ended(s.rehearsals[tried])
        return f"{end:.3g}" if math.isfinite(end) else "a value that is not finite"

    over = "" if peak is None else f" over {peak:.3g}"
    less = part in s.rehearsals and part < 0.1
    less = f"; with {part:g} of it, to {end_of(part)}" if less else ""
    return (
        f"In a rehearsal of 12 steps the loss goes from {start:.3g}{over} to "
        f"{end_of(1.0)}; with a tenth of the learning rate, to {end_of(0.1)}{less}."
    )


def _uphill(s: Signals) -> Candidate | None:
    # In a run that has started, momentum may point uphill for a step.
    if s.begun or not s.slope > 1e-5 * abs(s.first.loss):
        return None
    finding = Finding(
        "uphill",
        (),
        f"The gradient predicts that the next step raises the loss by {s.slope:.3g}. "
        "The updates of an optimizer are added to the parameters, so they must point "
        "down the gradient.",
        "Check that the chain ends with a negative learning rate, as in "
        "`optax.sgd(0.1)` or `optax.scale(-0.1)`. A clip alone does not change the "
        "sign of the gradient, and neither does `optax.masked` for the leaves that it "
        "excludes.",
        "high",
        "measured",
    )
    return Candidate(finding, math.inf)


def _rehearsed(s: Signals, most: float) -> float:
    """Returns the best rate scale, or 0 if its loss is not below ``most``."""
    ends = {part: ended(losses) for part, losses in s.rehearsals.items() if part < 1}
    best = min(ends, key=lambda part: ends[part])
    return best if ends[best] < most else 0.0


def _learning_rate(s: Signals) -> Candidate | None:
    if not s.rehearsals or _uphill(s):
        return None
    whole, tenth = (s.rehearsals[part] for part in (1.0, 0.1))
    start = float(np.mean(s.starts[-4:]))
    end, slow = ended(whole), ended(tenth)
    margin = LIMITS.worse * max(abs(start), 1e-12)
    better = slow < end - margin
    trust = s.trust.get(1.0, math.nan)
    good = [p for p, t in s.trust.items() if p < 1 and t > LIMITS.trust_after]
    distrusted = trust < LIMITS.trust and any(p <= 0.3 for p in good)
    diverged = end > start + margin and better
    # A step that achieves only half as much as a smaller one is close to achieving
    # nothing, unless the run makes faster progress with such steps.
    tried = s.trust.get(0.1, math.nan)
    mild = trust < LIMITS.mild_trust and tried > 2 * LIMITS.trust_after
    mild = mild and not end < slow - min(margin, 0.5 * abs(slow))
    hopeless = math.isinf(end) and math.isinf(slow)
    leaped = max(whole) > start + LIMITS.leap * max(abs(start), 1e-12)
    early = mild or diverged or (distrusted and better)
    if s.begun:  # steps that achieve little are normal, and such a run still trains
        gained = s.empty_loss - start
        floor = start + (LIMITS.lost * gained if gained > 0 else 0.0)
        # Near a loss of 0, a harder batch can have a loss many times as large.
        leaped = leaped and max(whole) > floor
        early = better and end > max(LIMITS.rise * abs(start), floor)
    else:
        # Steps of every size that was tried fail; only far smaller ones might work.
        wrong = s.trust and min(s.trust) <= 0.01 and max(s.trust.values()) < 0
        early = early or (wrong and end > start + margin and slow > start + margin)
    if not (hopeless or leaped or early):
        return None
    part = max([p for p in good if p <= 0.3], default=0.01 if hopeless else 0.1)
    if slow > start + margin:
        part = min(part, 0.01)
    if (leaped or early) and not good and s.trust:
        part = min(s.trust)
    rehearsed = _rehearsed(s, start + (margin if s.begun else 0.0))
    part = max(part, rehearsed)
    peak = max(whole) if leaped and math.isfinite(end) else None
    other = (
        ""
        if s.adaptive
        else " An adaptive optimizer such as AdamW tolerates larger steps than SGD."
    )
    finding = Finding(
        "learning_rate",
        (),
        _promise(trust, s.trust.get(part, math.nan), part)
        + _run_of(s, part, start, peak),
        f"Multiply the learning rate by about {part:g}, or warm it up.{other}",
        "high" if not math.isfinite(end) or end > 2 * abs(start) else "medium",
        "by elimination" if hopeless and not rehearsed else "measured",
        (Remedy("scale_learning_rate", part),),
    )
    # Other causes also make steps fail; findings whose remedy helps more come first.
    relative = (min(end, 1e30) - slow) / max(abs(start), 1e-12)
    relative = 0.0 if hopeless else max(relative, 0.0)
    return Candidate(finding, min(math.log10(1 + relative), 0.9))


BROKEN = {
    "parameters": (
        "These parameters hold numbers that are not finite, so every loss is too.",
        "Go back to a checkpoint from before. `optclip.skip_steps` keeps steps that "
        "are not finite out of the parameters, and `optclip.nonfinite_leaves` names "
        "the leaf where it began.",
    ),
    "optimizer": (
        "The optimizer's state holds numbers that are not finite, and so do its "
        "updates, though the gradient is finite.",
        "Go back to a checkpoint from before, or begin with `optimizer.init(params)`. "
        "`optclip.skip_steps` keeps steps that are not finite out of the state.",
    ),
    "batches": (
        "All of these batches hold numbers that are not finite, in the data itself.",
        "Look where the data come from: a division by a deviation of 0, a missing "
        "value, a file that was read wrongly.",
    ),
    "empty": (
        "These batches hold no numbers: the mean over no examples is not finite.",
        "Leave empty batches out.",
    ),
}


def _given(s: Signals) -> Finding | None:
    """Returns a finding if an input was not finite before anything was computed."""
    for name, (evidence, remedy) in BROKEN.items():
        where = s.broken.get(name, ())
        if name in ("batches", "empty"):
            where = tuple(f"batch {i}" for i in where)
            if len(where) < len(s.batches):
                continue
        if where:
            return Finding("not_finite", where, evidence, remedy, "high", "measured")
    if s.bad_updates:
        return Finding(
            "not_finite",
            (),
            "The gradient is finite, and the optimizer's updates are not.",
            "Look at the optimizer's numbers: a learning rate that is not finite, or a "
            "division by a root mean square of 0 with an `eps` of 0.",
            "high",
            "measured",
        )
    return None


# What to do about the operation in which numbers stop being finite.
CURES = {
    "gather": "Check that labels and indices are within the size of their axis.",
    "log": "Use a stable function such as `jax.nn.log_softmax` or `optax.losses`, or "
    "keep the argument of the logarithm above zero.",
    "exp": "Use a stable function such as `jax.nn.log_softmax` or `jax.nn.logsumexp`, "
    "which subtract the maximum first.",
    "div": "Keep the divisor away from zero, for example by adding a small constant.",
    "sqrt": "Keep the argument of the square root at or above zero.",
    "rsqrt": "Add a small constant to the argument of the inverse square root.",
}
DERIVATIVE = (
    "The loss is finite and its derivative is not, as for a square root at zero. If a "
    "`jnp.where` selects another branch there, apply `jnp.where` to the argument of "
    "this operation as well, since the branch that is not taken is differentiated too."
)


def _cure(s: Signals) -> str:
    """Returns what to do about the operation that was found, or how to find it."""
    if s.origin is None:
        return (
            "Look for a logarithm, root or division of zero, or an exponential of a "
            "large number: `jax.config.update('jax_debug_nans', True)` stops at it."
        )
    if s.origin.backward:
        return DERIVATIVE
    known = CURES.get(s.origin.primitive)
    return known or "Look at the operands of this operation."


def _not_finite(s: Signals) -> Finding:
    broken = [b for b in s.batches if not b.finite]
    worst = broken[0]
    sites = [x for x in worst.sites if not np.all(np.isfinite(x.rms_out))]
    where = (sites[0].leaf,) if sites else worst.bad_leaves[:4]
    if s.origin is not None:
        first = _operation(s)
    elif sites:
        first = (
            f" The first use of parameters whose result is not finite is {where[0]}."
        )
    else:
        first = ""
    return Finding(
        "not_finite",
        where,
        f"{len(broken)} of {len(s.batches)} batches have a loss or gradient that is "
        f"not finite.{first}",
        f"{_cure(s)} `optclip.skip_steps` keeps such steps out of the optimizer.",
        "high",
        "measured" if s.origin is not None else "by elimination",
        (),
    )


RULES: tuple[Callable[[Signals], Candidate | None], ...] = (
    _overflow,
    _bad_batch,
    activation,
    recurrence,
    initialization,
    depth,
    _loss_sum,
    _uphill,
    _learning_rate,
    update_cap,
    vanishing,
)
# Explanations for a growing signal. Only the one whose remedy helps most is kept.
GROWTH = {"activation", "recurrence", "initialization", "depth"}


def judge(signals: Signals) -> tuple[Finding, ...]:
    """Returns the causes, ordered by how much their remedy helps."""
    if (given := _given(signals)) is not None:
        return (given,)
    found = [c for rule in RULES if (c := rule(signals)) is not None]
    causes = {c.finding.cause for c in found}
    # These causes explain growth over the layers, so depth is not the cause.
    if causes & {"activation", "initialization", "recurrence"}:
        found = [c for c in found if c.finding.cause != "depth"]
    found.sort(key=lambda c: -c.benefit)
    findings = [c.finding for c in found]
    others = [b for i, b in enumerate(signals.batches) if i not in signals.outliers]
    explained = causes & (GROWTH | {"overflow"})
    explained = explained or ("bad_batch" in causes and all(b.finite for b in others))
    if not all(b.finite for b in signals.batches) and not explained:
        findings.append(_not_finite(signals))
    return tuple(findings)
