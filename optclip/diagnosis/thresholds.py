"""Suggests a threshold from recorded gradient norms, or explains why it can't."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from optclip._engine import validation
from optclip.diagnosis._histories import History, history_of
from optclip.diagnosis.findings import Diagnosis

__all__ = ["Suggestion", "suggest_threshold"]

# Fewer norms than this are too few to estimate the typical norm.
FEWEST = 10
# In decades (powers of ten): an outlier is this far above the median ...
FAR = 1.0
# ... and by this many robust deviations, after adding the floor to the deviation.
DEVIATIONS, FLOOR = 5.0, 0.05
# In decades: a spread or drift above this triggers a warning.
WIDE, DRIFTED = 0.5, 0.5
# If a larger fraction of the norms is far above, they are not outliers.
SHARE = 0.25
# Causes whose remedy changes the typical norm.
_FIRST = {
    "input_scale",
    "loss_scale",
    "initialization",
    "depth",
    "activation",
    "overflow",
    "bad_batch",
    "loss_sum",
    "vanishing",
    "uphill",
    "not_finite",
}


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A threshold for clipping by the global norm, and how far it can be trusted.

    Attributes:
        max_norm: The threshold; None if none can be suggested.
        spread: Decades (powers of ten) between the 10% and 90% quantiles of the norms
            that count; None if there are no norms.
        outliers: Number of norms excluded because they are far above the others.
        drift: Decades from the median of the first quarter of the norms to the median
            of the last, negative if norms fell; None if their order is unknown.
        nonfinite: Number of steps with a non-finite norm.
        samples: Number of norms, including the excluded ones.
        warnings: Caveats to read before using the threshold.
        declined: The reason why there is no threshold; None if there is one.
    """

    max_norm: float | None
    spread: float | None
    outliers: int
    drift: float | None
    nonfinite: int
    samples: int
    warnings: tuple[str, ...] = ()
    declined: str | None = None

    def __str__(self) -> str:
        """Returns the suggestion as a few lines of text."""
        if self.max_norm is None:
            return f"No threshold is suggested: {self.declined}"
        lines = [f"Clip at {self.max_norm:.3g} (from {self.samples} norms)"]
        if self.outliers or self.nonfinite:
            lines.append(
                f"  left out: {self.outliers} far above the others, "
                f"{self.nonfinite} not finite"
            )
        if self.spread is not None:
            between = "from the 10% to the 90% quantile"
            lines.append(f"  spread:   a factor of {factor_of(self.spread)} {between}")
        if self.drift is not None:
            way = "from the first norms to the last"
            lines.append(f"  drift:    a factor of {factor_of(self.drift)} {way}")
        lines += [f"  warning:  {words}" for words in self.warnings]
        return "\n".join(lines)


def factor_of(decades: float) -> str:
    """Returns 10 to this power as text, even if it exceeds float64."""
    return f"{10**decades:.3g}" if abs(decades) < 300 else f"1e{decades:+.0f}"


def _outliers(logs: np.ndarray) -> np.ndarray:
    """Indicates which norms are outliers, that is, far above the median."""
    above = logs - np.median(logs)
    deviation = 1.4826 * np.median(np.abs(above)) + FLOOR
    far = (above > FAR) & (above > DEVIATIONS * deviation)
    return far if np.mean(far) <= SHARE else np.zeros_like(far)


def _drift(logs: np.ndarray) -> float:
    part = max(FEWEST // 2, len(logs) // 4)
    return float(np.median(logs[-part:]) - np.median(logs[:part]))


def _open_cause(diagnosis: Diagnosis | None) -> str | None:
    """Returns the reason why the diagnosis advises against a threshold, or None."""
    for finding in () if diagnosis is None else diagnosis.findings:
        if finding.cause in _FIRST and finding.severity != "low":
            return (
                f"the diagnosis has an open finding ({finding.title}), whose remedy "
                "changes what a typical norm is. Fix that first, and record again."
            )
    return None


def _reason(
    history: History, typical: np.ndarray, diagnosis: Diagnosis | None
) -> str | None:
    """Returns the reason why no threshold can be suggested, or None."""
    cause = _open_cause(diagnosis)
    if cause:
        return cause
    if history.nonfinite > SHARE * history.steps:
        return (
            f"{history.nonfinite} of {history.steps} norms are not finite. Find out "
            "why first: `optclip.nonfinite_leaves` names the leaves."
        )
    if history.missing:
        return history.missing
    if len(typical) < FEWEST:
        return (
            f"{len(typical)} usable norms are too few to know what is typical. Record "
            f"at least {FEWEST}, better 100."
        )
    return None


def _warnings(
    history: History, spread: float, drift: float | None, outliers: int, zeros: int
) -> list[str]:
    words = [history.note] if history.note else []
    if history.nonfinite:
        words.append(
            f"Not finite: {history.nonfinite} of {history.steps} norms, which a "
            "threshold does not fix. See `nonfinite=` of the clip, or `skip_steps`."
        )
    if zeros:
        words.append(f"Norms of 0 do not count: there are {zeros}.")
    if outliers:
        words.append(
            "Norms more than ten times the median, and far from the others, do not "
            f"count: there are {outliers}."
        )
    if spread > WIDE:
        words.append(
            f"The norms spread over a factor of {factor_of(spread)}: one number will "
            "shorten some steps much, or others not at all."
        )
    if drift is not None and abs(drift) > DRIFTED:
        verb = "rose" if drift > 0 else "fell"
        words.append(
            f"The norms {verb} by a factor of {10 ** abs(drift):.3g} meanwhile: a "
            "clip that follows them, such as `optclip.quantile_clip`, fits better."
        )
    return words


def suggest_threshold(
    norms_or_state: Any,
    *,
    quantile: float = 0.5,
    diagnosis: Diagnosis | None = None,
) -> Suggestion:
    """Suggests a threshold for `clip_by_global_norm` from recorded norms.

    The threshold is the ``quantile`` of the norms, excluding norms that are non-finite,
    0, or far above the others: more than a decade and more than five robust deviations
    (1.4826 times the median deviation, plus 0.05 decades) above the median.

    | norms                                      | then                    |
    | ------------------------------------------ | ----------------------- |
    | fewer than 10 that count                   | declined                |
    | more than a quarter not finite             | declined                |
    | an open cause in ``diagnosis``             | declined                |
    | spread or drift of more than half a decade | a warning               |
    | more than a quarter far above              | no outliers: they count |

    An open cause is a finding of severity "medium" or "high" whose remedy changes the
    typical norm: any cause except a recurrence or the learning rate. A threshold at the
    median scales down half of the steps, which matters little for an optimizer that is
    invariant to the scale of gradients, such as Adam.

    Args:
        norms_or_state: Gradient norms, one number per step in order (None counts as
            non-finite); or an optimizer state that contains `skip_steps` or a clipping
            transformation whose rule stores norms: `autoclip`, `percentile_clip` in
            tree scope, or `rolling_sigma_clip`. If the rule records clipped norms, the
            threshold is computed from the clipped norms.
        quantile: The quantile to use, between 0 and 1.
        diagnosis: The result of `diagnose`, if it was run.

    Returns:
        A `Suggestion`. Print it, or read its ``max_norm``, which is None if no
        threshold can be suggested.

    Raises:
        TypeError: If ``norms_or_state`` is neither norms nor a state of optclip, or
            ``diagnosis`` is not a `Diagnosis`.
        ValueError: If there are no norms, a norm is negative, the norms have several
            axes or are traced, the state is a batch of states, or ``quantile`` is out
            of range.

    Example:
        >>> import optclip
        >>> norms = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.0, 1.3, 0.9, 1.0, 250.0]
        >>> suggestion = optclip.diagnosis.suggest_threshold(norms)
        >>> suggestion.max_norm, suggestion.outliers
        (1.0, 1)
    """
    validation.fraction(quantile=quantile)
    if diagnosis is not None:
        validation.instance("diagnosis", diagnosis, Diagnosis, "of `optclip.diagnose`")
    history = history_of(norms_or_state)
    positive = history.norms[np.isfinite(history.norms) & (history.norms > 0)]
    zeros = int(np.sum(history.norms == 0))
    logs = np.log10(positive)
    far = _outliers(logs) if len(logs) else np.zeros(0, bool)
    typical, outliers = positive[~far], int(np.sum(far))

    spread = drift = None
    words: list[str] = []
    if len(typical):
        low, high = np.quantile(logs[~far], [0.1, 0.9])
        spread = float(high - low)
        drift = _drift(logs[~far]) if history.ordered else None
        words = _warnings(history, spread, drift, outliers, zeros)
    declined = _reason(history, typical, diagnosis)
    max_norm = None if declined else float(np.quantile(typical, quantile))
    return Suggestion(
        max_norm,
        spread,
        outliers,
        drift,
        history.nonfinite,
        len(history.norms),
        tuple(words),
        declined,
    )
