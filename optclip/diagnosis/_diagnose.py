"""Diagnoses exploding gradients: runs the measurements and applies the rules."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optclip._engine import validation
from optclip.diagnosis import _models, _probe, _rules, _signals
from optclip.diagnosis._history_facts import facts_of
from optclip.diagnosis._inputs import batches_of, fitted, outside_jit
from optclip.diagnosis._memory import memory_of, rehearsal_length
from optclip.diagnosis._outside import norms_by_path
from optclip.diagnosis._timeline import timeline_of
from optclip.diagnosis._trials import Trials
from optclip.diagnosis.findings import Diagnosis
from optclip.diagnosis.taps import scalar_loss

__all__ = ["diagnose"]

# The rows of a log.
Rows = Sequence[Mapping[str, Any]]
MOST = 24
# The mean loss of the last 4 steps is compared, so a rehearsal needs a few more steps.
STEPS, FEWEST_STEPS = 12, 8


def _quiet(words: str) -> None:
    del words


def _loud(words: str) -> None:
    print(f"optclip.diagnose: {words}", file=sys.stderr, flush=True)


def _listed(probe: _probe.Probe, signals: _signals.Signals) -> dict[str, Any]:
    """Returns the signals by name, as stored in `Diagnosis.signals`."""
    plan = probe.tapped and probe.tapped.plan
    partly = sum(bool(x.unmeasured) for x in plan.sites) if plan else 0
    seen = len(plan.sites) - partly if plan else 0
    depth, time = signals.depth, signals.time
    return {
        "batch_losses": tuple(b.loss for b in signals.batches),
        "batch_norms": tuple(b.norm for b in signals.batches),
        "outlier_batches": signals.outliers,
        "typical_batch": signals.typical,
        "depth_growth": depth and max(depth.back, depth.forward),
        "backward_growth": depth and depth.back,
        "forward_growth": depth and depth.forward,
        "time_growth": time and max(time.back, time.forward),
        "position_growth": signals.positions and signals.positions.back,
        "weights_beside_he": dict(signals.he),
        "loss_beside_halves": signals.halves,
        "trust": dict(signals.trust),
        "norm_with_relu": signals.relu_norm,
        "norm_in_float32": signals.wide_norm,
        "norm_with_typical_weights": signals.scaled_norm,
        "rehearsals": {k: tuple(v) for k, v in signals.rehearsals.items()},
        "update_relative_to_cap": signals.excess,
        "rehearsals_above_cap": {k: tuple(v) for k, v in signals.uncapped.items()},
        "origin": signals.origin,
        "limits": _signals.LIMITS,
        "sites": signals.first.sites,
        "uses": (seen, seen + partly + len(plan.hidden)) if plan else None,
        "forward_uses": partly,
        "leaf_norms": norms_by_path(
            probe.paths, [b.leaf_norms for b in signals.batches]
        ),
        "rehearsed_leaf_norms": norms_by_path(probe.paths, signals.rehearsed_norms),
    }


def _not_seen(probe: _probe.Probe, signals: _signals.Signals, more: bool) -> list[str]:
    """Lists the parts that could not be inspected, with the reasons."""
    words = []
    if probe.tapped is None:
        words.append(
            f"where the signal grows: the program could not be read with JAX "
            f"{jax.__version__} ({probe.why_not})"
        )
    else:
        hidden, sites = probe.tapped.plan.hidden, probe.tapped.plan.sites
        total = len(sites) + len(hidden)
        partly = [x.inside for x in sites if x.unmeasured]
        for what, reasons in (("", hidden), ("the backward signal of ", partly)):
            if reasons:
                why = ", ".join(dict.fromkeys(reasons))
                count = f"{what}{len(reasons)} of {total}"
                words.append(f"{count} uses of parameters: {why}")
        if not total:
            words.append(
                "where the signal grows: the loss has no matrix product, convolution, "
                "lookup or scale with the parameters"
            )
    if all(b.norm == 0 for b in signals.batches):
        words.append(
            "anything of the gradient: it is 0 in all batches, as if the loss did not "
            "depend on the parameters"
        )
    if len(signals.batches) < 4:
        words.append("bad batches: it takes 4 batches or more to compare them")
    if not signals.first.finite:
        words.append("what a step does: the loss or its gradient is not finite")
    elif signals.no_steps:
        words.append(
            f"what a step does: the optimizer could not be run ({signals.no_steps})"
        )
    elif signals.still:
        words.append(
            "what a step does: the next one changes nothing, as in a warm-up that "
            "begins at 0 or while gradients are accumulated. Give the `opt_state` of a "
            "later step, or the optimizer without these"
        )
    if signals.first.finite and not np.isfinite(signals.halves):
        words.append(
            "whether the loss is a sum: the arrays of a batch have no common leading "
            "axis, or a half of it can't be given to the loss"
        )
    if more:
        words.append(f"batches after the first {len(signals.batches)}")
    return words


def diagnose(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    optimizer: optax.GradientTransformation,
    opt_state: Any = None,
    logs: str | os.PathLike[str] | Rows | Mapping[str, Any] | None = None,
    has_aux: bool = False,
    max_batches: int = MOST,
    rehearsal_steps: int | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Determines why gradients explode, where in the model, and how to fix it.

    `diagnose` measures the gradients of the batches, the signals at each use of a
    parameter (see `optclip.diagnosis.tap`), and the effect of a few steps. It then
    tries remedies without changing your parameters or state: it runs the same program
    with relu and in float32, and trains for a few steps with smaller steps, smaller
    weights, standardized batches and smaller factors in the loss. Findings are ordered
    by how much their remedy helps. If training fails for none of the reasons below, the
    cause is "unknown", and the finding lists what was measured.

    | cause            | what is measured                                        |
    | ---------------- | ------------------------------------------------------- |
    | `input_scale`    | the same batches, standardized                          |
    | `loss_scale`     | smaller factors in the loss                             |
    | `initialization` | weights relative to He initialization; gradient at that size |
    | `depth`          | growth of the signal over the layers                    |
    | `recurrence`     | growth over the steps of a scan, or over input positions |
    | `activation`     | gain of each activation; the gradient with relu         |
    | `learning_rate`  | loss decrease relative to the prediction; twelve steps  |
    | `warm_up`        | sixty steps with a warm-up                              |
    | `update_cap`     | steps larger than the cap on the update allows          |
    | `bad_batch`      | norms of the batches relative to their median           |
    | `overflow`       | the same program in float32                             |
    | `precision`      | updates that are rounded away; the same in float32      |
    | `loss_sum`       | loss of a batch relative to the loss of its halves      |
    | `vanishing`      | the opposite of growth                                  |
    | `uphill`         | the change in the loss that the gradient predicts       |

    A model with non-finite values is never reported as healthy. Parts of the program
    that can't be inspected, such as the backward pass of functions with a custom
    derivative, are judged from the outside, by gradients, losses and trial steps, and
    the headline says so. A diagnosis of a healthy model costs about as much as 60
    training steps and compiles about five programs; each remedy that is tried costs 24
    further steps. Run it when training fails or before a long run.

    Args:
        loss_fn: ``loss_fn(params, batch)`` returns a real scalar. Close over dropout
            keys and batch statistics, so that two calls return the same loss.
        params: A pytree of arrays, a Flax NNX model or an Equinox model. The model
            itself is not changed: ``loss_fn`` receives a copy.
        batches: Batches of the training data: at least one, preferably 8 to 24. They
            are numbered from 0 in the order given.
        optimizer: The Optax optimizer of the run, including its clipping.
        opt_state: The optimizer state, if the run has started; defaults to
            ``optimizer.init(params)``. In a run that has started, small progress per
            step is normal, so only a rising loss indicates a learning rate that is too
            high.
        logs: The history of the run, to report what it shows and which step to go back
            to: the path of ``metrics.jsonl`` or of its folder, a list of rows (one dict
            per step), or a mapping of arrays. The keys are those of `optclip.metrics`
            and, optionally, of `optclip.leaf_metrics`, "step" and "loss". A norm or a
            loss is required. Non-finite values may be NaN or None. Of several runs,
            the first that diverged is used, else the first with a bad step.
        has_aux: Whether ``loss_fn`` returns (loss, aux).
        max_batches: The maximum number of batches to use.
        rehearsal_steps: The number of steps of each rehearsal, at least 8; defaults to
            12, or, if the optimizer is SGD with a momentum above 0.96, to twice the
            steps over which it averages, at most 200. More steps can show faults that
            only show later.
        progress: Whether to print each stage to stderr.

    Returns:
        A `Diagnosis`. Print it to read the report. What ``logs`` show is in
        ``history``, and does not change the findings.

    Raises:
        TypeError: If ``optimizer`` is not a gradient transformation, or ``batches`` is
            not an iterable of batches, or ``logs`` are of a wrong type.
        ValueError: If the loss is not a real scalar, ``batches`` is empty, ``params``
            contains no real or complex arrays, ``opt_state`` does not match
            ``params``, or ``logs`` contain no rows, or neither a norm nor a loss.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optclip
        >>> def loss_fn(params, batch):
        ...     for weights in params:
        ...         batch = jax.nn.relu(batch @ weights)
        ...     return jnp.mean(batch**2)
        >>> keys = jax.random.split(jax.random.key(0), 6)
        >>> params = [jax.random.normal(key, (16, 16)) for key in keys]
        >>> batches = [jax.random.normal(key, (8, 16)) for key in keys]
        >>> found = optclip.diagnose(
        ...     loss_fn, params, batches, optimizer=optax.sgd(1e-12), progress=False
        ... )
        >>> found.findings[0].cause
        'initialization'
    """
    validation.transformation(optimizer=optimizer)
    steps = rehearsal_steps
    if steps is not None:
        steps = validation.size("rehearsal_steps", steps, FEWEST_STEPS)
    timeline = None if logs is None else timeline_of(logs)
    loss_fn, params = _models.as_arrays(scalar_loss(loss_fn, has_aux), params)
    wrapped = optax.with_extra_args_support(optimizer)
    given, more = batches_of(batches, validation.size("max_batches", max_batches))
    begun = opt_state is not None
    if begun:
        opt_state = fitted(params, opt_state, jax.eval_shape(wrapped.init, params))
    else:
        outside_jit("diagnose", params)
        opt_state = wrapped.init(params)
    probe = _probe.Probe(loss_fn, wrapped, _loud if progress else _quiet)
    probe.show("reading the program")
    probe.read(params, given[0])
    probe.try_steps(params, opt_state, given[0])
    memory = memory_of(wrapped, params)
    steps = steps or rehearsal_length(memory, STEPS)
    signals = _signals.measure(probe, params, opt_state, given, begun, steps)
    signals = dataclasses.replace(signals, memory=memory)
    fine = [b for i, b in enumerate(given) if i not in signals.outliers]
    trials = Trials(probe, params, opt_state, fine, begun, steps, signals.whole)
    words = _not_seen(probe, signals, more)
    found = _rules.judge(signals, trials)
    history = () if timeline is None else facts_of(timeline)
    if timeline is not None and timeline.others:
        words.append(f"the other runs in the logs: {timeline.others}")
    return Diagnosis(found, _listed(probe, signals), tuple(words), history)
