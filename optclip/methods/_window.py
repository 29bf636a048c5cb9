"""Clips whose threshold is found in the history of the norm, by published name."""

from __future__ import annotations

from typing import Any

import jax

from optclip import actions, rules, scopes
from optclip._checks import Static
from optclip.clipping import clip
from optclip.methods._fixed import Clip, hard

__all__ = ["autoclip", "percentile_clip", "quantile_clip", "rolling_sigma_clip"]

# No plain ints: `optax.inject_hyperparams` would make them arrays.
WINDOW, SHORT_WINDOW, SIGMA_WINDOW = Static(1000), Static(100), Static(128)


def autoclip(
    percentile: jax.typing.ArrayLike = 10.0,
    *,
    window: Any = WINDOW,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips to a percentile of the norms so far (AutoClip).

    u' = u * min(1, t / n) with t the percentile of the last ``window`` norms, this one
    included and unclipped, as `numpy.percentile` gives it. With the published 10, nine
    steps of ten are clipped: choose the learning rate as for normalised gradients.
    Scale invariant, unless ``original``.

    Args:
        percentile: Between 0 and 100.
        window: How many norms are kept; as long as they have not filled it, this is the
            original with its whole history. None for the whole history in 4 KB per
            group, to within 6%: `optclip.rules.log_histogram_percentile`.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: As the original, record zero norms and divide by n + 1e-6, which
            scales down all norms that are not far above 1e-6.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.autoclip(10.0)

    Reference:
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, https://arxiv.org/abs/2007.14469
    """
    rule = (
        rules.log_histogram_percentile(percentile)
        if window is None
        else rules.window_percentile(percentile, window=window, record_zeros=original)
    )
    return clip(
        rule._replace(name="autoclip"),
        scope=scope,
        action=hard(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def percentile_clip(
    percentile: jax.typing.ArrayLike = 5.0,
    *,
    window: Any = SHORT_WINDOW,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips to a rank among the last hundred norms (bitsandbytes' percentile clipping).

    u' = u * min(1, t / n) with t the entry number ``percentile * window / 100`` of the
    last norms, sorted, this one included. The first norm fills the whole window, so
    that it dominates the first steps. bitsandbytes removed its option in 2026. Scale
    invariant.

    Args:
        percentile: Between 0 and 100.
        window: How many norms are kept, at least 1.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: Record zero norms, as the original does.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.percentile_clip(5)

    Reference:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022,
        https://arxiv.org/abs/2110.02861 (the option is the library's, not the paper's)
    """
    rule = rules.window_percentile(
        percentile, window=window, by_rank=True, record_zeros=original
    )
    return clip(
        rule._replace(name="percentile_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def rolling_sigma_clip(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    window: Any = SIGMA_WINDOW,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips norms above the mean plus three deviations of the last 128 (Levanter).

    u' = u * min(1, t / n) with t = m + sigmas * s of the norms before this one,
    unclipped; nothing is clipped before half the window is filled. Levanter puts it
    after Adam, on the updates. s counts for at least a millionth of the largest norm in
    the window, so that the clip is scale invariant.

    Args:
        sigmas: Standard deviations above the mean, at least 0.
        window: How many norms are kept, at least 2.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: As the original, record zero norms, and let s count for at least 1e-6.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.rolling_sigma_clip(3.0)

    Reference:
        The Levanter trainer, its `ClipUpdateNorm`,
        https://github.com/stanford-crfm/levanter
    """
    rule = rules.window_sigma(
        sigmas, window=window, floor=1e-6 if original else None, record_zeros=original
    )
    return clip(
        rule._replace(name="rolling_sigma_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def quantile_clip(
    quantile: jax.typing.ArrayLike = 0.1,
    *,
    margin: jax.typing.ArrayLike = 2.0,
    rate: jax.typing.ArrayLike = 0.05,
    warmup_steps: jax.typing.ArrayLike = 5,
    scope: scopes.Scope = scopes.tree(),
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips to twice a low quantile of the norm, which it follows: nothing to pick.

    u' = u * min(1, t / n), t = margin * exp(q), with q the estimate of a quantile of
    log n: see `optclip.rules.geometric_quantile`. From step 20 on, a spike of any size
    raises q by at most 0.05, the threshold by 5%; at an earlier step, after the
    warm-up, by at most 1 / step, at step 6 by 18%. While norms stay within ten
    thresholds, exp(q) needs 140 steps to double and 15 to halve. No parameter has the
    unit of a gradient: the same defaults fit any loss scale.

    It bounds the harm of bad batches, not that of a learning rate that is too high:
    when norms rise permanently, the threshold follows. `optclip.cap_update` is the
    other half, and `optclip.stabilize` puts both around an optimizer.

    Args:
        quantile: Between 0 and 1.
        margin: The threshold in units of the quantile, above 0.
        rate: The largest change of q per step, above 0, after the first ``1 / rate``
            steps.
        warmup_steps: Steps in which q follows the smallest norm so far.
        scope: Which entries share one norm, from `optclip.scopes`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optclip.quantile_clip(), optax.sgd(0.1))

    Reference:
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
        https://arxiv.org/abs/1905.03871 (the update of its threshold, without noise)
    """
    rule = rules.geometric_quantile(
        quantile, margin=margin, rate=rate, warmup_steps=warmup_steps
    )
    return clip(
        rule._replace(name="quantile_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
