"""Compiles and runs the programs of a diagnosis, each compiled only once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import norms
from optclip._engine import names as path_names
from optclip.diagnosis._origins import Origin, origin_of
from optclip.diagnosis._positions import (
    differentiable_sequences,
    norms_over_positions,
)
from optclip.diagnosis._replay import Change, no_probes
from optclip.diagnosis.taps import Site, Tapped, tapped

__all__ = ["Batch", "Knobs", "Probe", "Step", "halves_of", "lost_part"]

# Each step is tried with its updates scaled by these factors.
PARTS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


class Knobs(NamedTuple):
    """Changes of a step that need no other program.

    Attributes:
        update: Factor of the updates.
        loss: Factor of the loss and its gradient, before the optimizer.
        bound: Largest norm of the gradient, before the optimizer.
    """

    update: Any = 1.0
    loss: Any = 1.0
    bound: Any = math.inf


class Step(NamedTuple):
    """Predictions and measurements for the next step of the optimizer.

    Attributes:
        finite: Whether the updates are finite.
        zero: Whether all updates are 0.
        slope: The change in the loss that the gradient predicts; negative is downhill.
        trust: Fraction of the predicted change that is achieved, by update scale.
        lost: Fraction of the updates that rounding makes ineffective, of parameters
            whose dtype is narrower than float32; 0 if there are none.
    """

    finite: bool
    zero: bool
    slope: float
    trust: dict[float, float]
    lost: float = 0.0


class Batch(NamedTuple):
    """The measurements of one batch.

    Attributes:
        loss: Loss of the batch.
        norm: Norm of the gradient.
        bad_leaves: Paths of the leaves whose gradient is not finite.
        sites: The measurements at each site, if the program could be read.
        leaf_norms: Norm of the gradient of each leaf.
        position_norms: For each leaf of the batch that is a sequence, the norm of the
            gradient with respect to it at each position.
    """

    loss: float
    norm: float
    bad_leaves: tuple[str, ...]
    sites: tuple[Site, ...]
    leaf_norms: tuple[float, ...] = ()
    position_norms: Mapping[str, tuple[float, ...]] = MappingProxyType({})

    @property
    def finite(self) -> bool:
        """Whether the loss and the gradient are finite."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.norm))


def halves_of(batch: Any, axis: int) -> list[Any]:
    """Returns an even-sized slice of a batch and its two halves, or an empty list."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[axis] if len(shape) > axis else 0 for shape in shapes}
    if len(sizes) != 1 or (half := sizes.pop() // 2) < 1:
        return []
    kept = slice(0, 2 * half), slice(0, half), slice(half, 2 * half)
    before = (slice(None),) * axis
    return [jax.tree.map(lambda x, k=k: x[(*before, k)], batch) for k in kept]


def _each_norm(grads: Any) -> jax.Array:
    return jnp.stack(
        [x.astype(jnp.float32) for x in jax.tree.leaves(norms.leaf_norms(grads))]
    )


def _each_finite(grads: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)])


def _inner(g: jax.Array, u: jax.Array) -> jax.Array:
    wide = jnp.promote_types(jnp.result_type(g, u), jnp.float32)
    return jnp.vdot(g.astype(wide), u.astype(wide), precision="highest").real


def lost_part(params: Any, updates: Any) -> float:
    """Returns the fraction of updates that rounding makes ineffective.

    Only parameters whose dtype is narrower than float32 count; without any, returns 0.
    """
    lost = total = 0
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        if jnp.finfo(p.dtype).bits < 32:
            moves = u != 0
            lost += int(jnp.sum(moves & (optax.apply_updates(p, u) == p)))
            total += int(jnp.sum(moves))
    return lost / total if total else 0.0


@dataclasses.dataclass
class Probe:
    """The programs of the model under diagnosis, each compiled once.

    Attributes:
        loss_fn: ``loss_fn(params, batch)`` returns a scalar.
        optimizer: The optimizer.
        show: Called with a short message before each stage.
        tapped: The program of the loss, or None if it could not be read.
        why_not: The reason why the program could not be read.
        no_steps: The reason why no steps can be tried; "" if they can.
        paths: Paths of the parameters, known even if the program can't be read.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    optimizer: optax.GradientTransformationExtraArgs
    show: Callable[[str], None]
    tapped: Tapped | None = None
    why_not: str = ""
    no_steps: str = ""
    paths: tuple[str, ...] = ()

    def read(self, params: Any, batch: Any) -> None:
        """Reads the program of the loss, if this version of JAX is supported."""
        self.paths = tuple(path_names.leaf_names(params))
        self._programs: dict[Any, Tapped | None] = {}
        self._gradient = jax.jit(self._gradients)
        self.tapped = self._read(params, batch)
        self._loss = jax.jit(self.loss_fn)
        self._step = jax.jit(self._one_step)
        self._next = jax.jit(self._next_step)
        self._changed = jax.jit(self._changed_norm, static_argnums=2)

    def of(self, loss_fn: Callable[[Any, Any], jax.Array]) -> "Probe":
        """Returns the programs of another loss of the same parameters."""
        other = dataclasses.replace(self, loss_fn=loss_fn, tapped=None)
        other._loss = jax.jit(loss_fn)
        other._step = jax.jit(other._one_step)
        return other

    def try_steps(self, params: Any, opt_state: Any, batch: Any) -> None:
        """Checks whether the optimizer can be run, before any expensive measurement."""
        try:
            jax.eval_shape(self._step, params, opt_state, batch, Knobs())
        except Exception as error:
            self.no_steps = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _read(self, params: Any, batch: Any) -> Tapped | None:
        """Returns the program for batches of this shape; None if it can't be read."""
        key = (
            jax.tree.structure(batch),
            tuple(
                (jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(batch)
            ),
        )
        if key not in self._programs:
            # Raises errors in the user's function first.
            jax.eval_shape(self.loss_fn, params, batch)
            try:
                seen = tapped(self.loss_fn, params, batch)
                self._programs[key] = seen
                # With the jitted function, the trace is used again when it is called.
                jax.eval_shape(self._gradient, params, batch)
            except Exception as error:
                self._programs[key] = None
                self.why_not = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return self._programs[key]

    def _gradients(self, params, batch):
        """Returns the loss, the gradients, their norms, and statistics of all sites."""
        seen = self._read(params, batch)
        inputs = differentiable_sequences(lambda b: self.loss_fn(params, b), batch)

        def loss_of(params, probes, leaves):
            batch = inputs.replaced(leaves)
            if seen is None:
                return self.loss_fn(params, batch), []
            return seen.run(params, (batch,), probes)

        every = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
        probes = no_probes(seen.plan) if seen else []
        (loss, statistics), found = every(params, probes, inputs.leaves)
        grads, signals, by_input = found
        places = dict(
            zip(inputs.paths, norms_over_positions(by_input, inputs.axes), strict=True)
        )
        each, fine = _each_norm(grads), _each_finite(grads)
        # For complex parameters, JAX's gradient is the conjugate of the ascent
        # direction.
        grads = jax.tree.map(jnp.conj, grads)
        return (loss, each, fine, statistics, signals, places), grads

    def _changed_norm(self, params, batch, change):
        """Returns the loss and gradient norm of the changed program."""
        seen = self._read(params, batch)
        assert seen is not None
        run = seen.run
        loss, grads = jax.value_and_grad(lambda p: run(p, (batch,), (), change)[0])(
            params
        )
        return loss, norms.global_norm(grads)

    def _one_step(self, params, opt_state, batch, knobs):
        loss, grads = jax.value_and_grad(self.loss_fn)(params, batch)
        each, fine = _each_norm(grads), _each_finite(grads)
        # A norm of infinity keeps its gradient, which is then not finite either.
        norm = knobs.loss * norms.global_norm(grads)
        scale = knobs.loss * jnp.where(norm > knobs.bound, knobs.bound / norm, 1.0)
        grads = jax.tree.map(lambda g: (scale * jnp.conj(g)).astype(g.dtype), grads)
        value = knobs.loss * loss
        updates, opt_state = self._updates(grads, opt_state, params, batch, value)
        updates = jax.tree.map(lambda u: knobs.update * u, updates)
        return optax.apply_updates(params, updates), opt_state, loss, (each, fine)

    def _updates(self, grads, opt_state, params, batch, loss):
        """Computes the updates, passing all extra arguments that Optax supports."""
        more = {
            "value": loss,
            "grad": grads,
            "value_fn": lambda p: self.loss_fn(p, batch),
        }
        return self.optimizer.update(grads, opt_state, params, **more)

    def _next_step(self, grads, opt_state, params, batch, loss):
        """Returns the next updates, the predicted change in loss, and their norm."""
        updates, _ = self._updates(grads, opt_state, params, batch, loss)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True)
        slope = sum(_inner(g, u) for g, u in pairs)
        return updates, slope, norms.global_norm(updates)

    def batch(self, params: Any, batch: Any) -> tuple[Batch, Any]:
        """Returns the measurements of one batch and its gradients."""
        (loss, each, fine, statistics, signals, places), grads = self._gradient(
            params, batch
        )
        seen = self._read(params, batch)
        sites = seen.sites(statistics, signals) if seen else ()
        rows = {
            path: tuple(np.asarray(x, float).tolist()) for path, x in places.items()
        }
        found = self._measured(loss, each, fine)
        return found._replace(sites=sites, position_norms=rows), grads

    def norms(self, params: Any, opt_state: Any, batch: Any) -> Batch:
        """Returns the loss and the norms of one batch, without the signals at sites.

        It runs the program of a training step, which is needed anyway.
        """
        if self.no_steps:
            return self.batch(params, batch)[0]
        _, _, loss, measured = self._step(params, opt_state, batch, Knobs())
        return self._measured(loss, *measured)

    def _measured(self, loss: Any, each: Any, fine: Any) -> Batch:
        flags = zip(self.paths, np.asarray(fine), strict=True)
        bad = tuple(path for path, good in flags if not good)
        sizes = np.asarray(each, float)
        return Batch(float(loss), math.hypot(*sizes), bad, (), tuple(sizes.tolist()))

    def changed(self, params: Any, batch: Any, change: Change) -> tuple[float, float]:
        """Returns the loss and norm after a change; NaN if the change can't be made."""
        if self.tapped is None:
            return float("nan"), float("nan")
        try:
            loss, norm = self._changed(params, batch, change)
        except Exception:  # a change that can't be built is not evidence
            return float("nan"), float("nan")
        return float(loss), float(norm)

    def origin(self, params: Any, batch: Any) -> Origin | None:
        """Returns where the loss or its gradient stops being finite, if it is known."""
        try:
            return origin_of(self.loss_fn, params, batch)
        except Exception:  # an operation that can't be evaluated alone
            return None

    def loss(self, params: Any, batch: Any) -> float:
        """Returns the loss of one batch."""
        return float(self._loss(params, batch))

    def step(
        self, params: Any, opt_state: Any, batch: Any, grads: Any, loss: float
    ) -> Step:
        """Returns the next step, with the achieved fraction of its predicted change."""
        value = jnp.asarray(loss, jnp.float32)
        updates, slope, size = self._next(grads, opt_state, params, batch, value)
        slope, size = float(slope), float(size)
        found = {}
        for part in PARTS if np.isfinite(size) else ():
            # A change below rounding error is not evidence.
            if not abs(part * slope) > 1e-5 * abs(loss):
                continue
            moved = self._moved(params, updates, part)
            found[part] = (self.loss(moved, batch) - loss) / (part * slope)
        lost = lost_part(params, updates)
        return Step(bool(np.isfinite(size)), size == 0, slope, found, lost)

    def _moved(self, params: Any, updates: Any, part: float) -> Any:
        smaller = jax.tree.map(lambda u: part * u, updates)
        return optax.apply_updates(params, smaller)

    def rehearse(
        self,
        params: Any,
        opt_state: Any,
        batches: Iterable[Any],
        knobs: Knobs | Callable[[int], Knobs],
    ) -> tuple[list[float], list[tuple[float, ...]]]:
        """Trains for a few steps.

        Args:
            params: The parameters to start from.
            opt_state: The state of the optimizer to start from.
            batches: One batch per step.
            knobs: What to change in each step, or a function of the step's number.

        Returns:
            The loss and the per-leaf gradient norms of each step.
        """
        losses, sizes = [], []
        for number, batch in enumerate(batches):
            now = knobs if isinstance(knobs, Knobs) else knobs(number)
            params, opt_state, loss, (each, _) = self._step(
                params, opt_state, batch, now
            )
            losses.append(float(loss))
            sizes.append(tuple(np.asarray(each, float).tolist()))
            if not np.isfinite(losses[-1]):
                break
        return losses, sizes
