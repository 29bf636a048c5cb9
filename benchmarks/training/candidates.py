"""Variants of `optclip.stabilize` with another clip of the gradients or another cap.

They are compared on the tuning tasks only. All have the skipping and restarting of
`stabilize`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

import optclip
from optclip import rules, scopes
from optclip.wrappers.stabilize import guarded

__all__ = ["CANDIDATES"]

Method = Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]
quantile = functools.partial(rules.geometric_quantile, margin=2.0)
cap = functools.partial(optclip.cap_update, nonfinite="skip")
# The cap of version 0.1.0.
OLD = functools.partial(cap, 0.02, ramp_steps=0, lasting=False)


def candidate(
    rule: Any,
    last: optax.GradientTransformation,
    normalize: bool | None = None,
) -> Method:
    """Returns the method with this rule for the gradients and this cap of updates."""

    def build(optimizer, value):
        del value
        first = optclip.clip_by_rule(rule, nonfinite="skip")
        inner = optax.with_extra_args_support(optimizer)
        return guarded(inner, first, last, 5, 200, normalize, None)

    return build


# Each name says what differs from `stabilize`.
CANDIDATES = {
    "0.1.0": candidate(quantile(0.1), OLD(floor=1e-2), normalize=False),
    "0.1.0 with the new floor": candidate(quantile(0.1), OLD(), normalize=False),
    "no ramp": candidate(quantile(0.1), cap(ramp_steps=0)),
    "not lasting": candidate(quantile(0.1), cap(lasting=False)),
    "ratio 0.02": candidate(quantile(0.1), cap(0.02)),
    "ratio 0.08": candidate(quantile(0.1), cap(0.08)),
    "cap per leaf": candidate(quantile(0.1), cap(scope=scopes.leaf())),
    "quantile 0.25, margin 4": candidate(
        rules.geometric_quantile(0.25, margin=4.0), cap()
    ),
    "median": candidate(quantile(0.5), cap()),
    "zclip": candidate(rules.ema_zscore(), cap()),
    "no cap": candidate(quantile(0.1), cap(np.inf)),
    "no clip": candidate(np.inf, cap()),
}
