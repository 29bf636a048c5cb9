"""Measures the signals at each reachable use of the parameters in a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._engine import names as path_names
from optclip.diagnosis import _models
from optclip.diagnosis._inputs import outside_jit
from optclip.diagnosis._plan import plan_program
from optclip.diagnosis._program import Plan
from optclip.diagnosis._replay import Change, no_probes, replay

__all__ = ["Site", "Tapped", "Taps", "tap", "tapped"]

Number = float | tuple


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of parameters in a program.

    Attributes described as "one per step" are tuples for a site inside `jax.lax.scan`
    (nested tuples for nested scans) and floats otherwise.

    Attributes:
        leaf: Path of the parameter leaf, such as "layers/3/kernel"; if several leaves
            are combined before use, the path of the largest.
        leaves: Paths of all leaves that are used.
        kind: "matmul", "conv", "embedding" or "scale".
        order: Index of the site in the order of execution.
        fan_in: Number of inputs that each output sums over.
        fan_out: Number of outputs to which each input contributes.
        rms_in: Root mean square of the input, one per step; 0 for the indices of an
            embedding.
        rms_out: Root mean square of the output, one per step.
        rms_weight: Root mean square of the parameters as used, one per step.
        signal_in: Norm of the gradient of the loss with respect to the input, through
            this use alone, one per step.
        signal_out: Norm of the gradient of the loss with respect to the output, one per
            step.
        dtype: The dtype of the output.
        activation: Names of the nonlinear functions between the site ``source`` and
            this one, such as "tanh"; None if other operations lie between them, such
            as a normalization or a sum with another branch.
        source: The ``order`` of the previous site, or None.
        stacked: Whether each step has its own parameters, as in a scan over layers.
            Otherwise all steps share them, as in a recurrence.
        unmeasured: Which of "signal_in" and "signal_out" could not be measured because
            the use is inside a function with a custom derivative; they are NaN.
        signal_positions: For an embedding of sequences, the norm of the gradient with
            respect to the output at each position; otherwise empty.
        turn: Number of this use in the longest chain of uses of the same leaf of which
            each depends on the one before; the first is 1. The steps of an unrolled
            recurrence are such a chain, and the branches of a network with shared
            weights are not.
        addends: The average number of values that each entry of the input is a sum of,
            for example over neighbors in a graph; 1 if it is not a sum, or was divided
            since, as in a mean.
    """

    leaf: str
    leaves: tuple[str, ...]
    kind: str
    order: int
    fan_in: int
    fan_out: int
    rms_in: Number
    rms_out: Number
    rms_weight: Number
    signal_in: Number
    signal_out: Number
    dtype: str
    activation: str | None
    source: int | None
    stacked: bool
    unmeasured: tuple[str, ...] = ()
    signal_positions: tuple[float, ...] = ()
    turn: int = 1
    addends: float = 1.0


@dataclasses.dataclass(frozen=True)
class Taps:
    """The measurements of `tap`.

    Attributes:
        sites: The uses of parameters, in the order of execution.
        loss: The loss returned by the tapped program.
        total: Number of uses, including unreachable ones.
        not_seen: For each unreachable use, the reason.
    """

    sites: tuple[Site, ...]
    loss: float
    total: int
    not_seen: tuple[str, ...]

    def __str__(self) -> str:
        """Returns a table of the sites, with the number of sites that were measured."""
        head = ("use", "signal back", "rms in", "rms out", "fan in", "leaf")
        rows: list[tuple[str, ...]] = [head]
        for x in self.sites:
            back = "-" if "signal_out" in x.unmeasured else _brief(x.signal_out)
            sizes = (back, _brief(x.rms_in), _brief(x.rms_out))
            rows.append((x.kind, *sizes, str(x.fan_in), x.leaf))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for kind, *figures, leaf in rows:
            cells = zip(figures, widths[1:], strict=False)
            right = "".join(f"  {cell:>{width}}" for cell, width in cells)
            lines.append(f"{kind:<{widths[0]}}{right}  {leaf}")
        partly = sum(bool(x.unmeasured) for x in self.sites)
        words = f"Seen {len(self.sites) - partly} of {self.total} uses of parameters"
        words += f", and {partly} only in the forward pass" if partly else ""
        lines.append(f"{words}.")
        lines += [f"Not seen: {reason}." for reason in self.not_seen]
        return "\n".join(lines)


def _brief(number: Number) -> str:
    if isinstance(number, float):
        return f"{number:.3g}"
    flat = np.ravel(np.asarray(number))
    return f"{flat[0]:.2g}..{flat[-1]:.2g}"


class Tapped(NamedTuple):
    """A loss function and the program that was read from it.

    Attributes:
        plan: The program and its sites.
        paths: Paths of the leaves of ``params``.
        sizes: Sizes of those leaves.
        run: ``(params, args, probes, change) -> (loss, figures)``.
    """

    plan: Plan
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    run: Callable[..., tuple[jax.Array, list[jax.Array]]]

    def sites(self, figures: Any, signals: Any) -> tuple[Site, ...]:
        """Returns the sites with their measurements."""
        found = []
        for spec, rms, signal in zip(self.plan.sites, figures, signals, strict=True):
            leaves = sorted(spec.leaves, key=lambda i: -self.sizes[i])
            rms, signal = np.asarray(rms, float), np.array(signal, float)
            for at, name in enumerate(("signal_in", "signal_out")):
                if name in spec.unmeasured:
                    signal[..., at] = np.nan
            chained = spec.source is not None
            found.append(
                Site(
                    leaf=self.paths[leaves[0]],
                    leaves=tuple(self.paths[i] for i in leaves),
                    kind=spec.kind,
                    order=spec.number,
                    fan_in=spec.fan_in,
                    fan_out=spec.fan_out,
                    rms_in=_nested(rms[..., 0]),
                    rms_out=_nested(rms[..., 1]),
                    rms_weight=_nested(rms[..., 2]),
                    signal_in=_nested(signal[..., 0]),
                    signal_out=_nested(signal[..., 1]),
                    dtype=spec.dtype,
                    activation=_function(spec.functions) if chained else None,
                    source=spec.source,
                    stacked=spec.stacked,
                    unmeasured=spec.unmeasured,
                    signal_positions=tuple(signal[2 : 2 + spec.positions].tolist()),
                    turn=spec.turn,
                    addends=spec.addends,
                )
            )
        return tuple(found)


# The primitives that JAX inlines for functions that are not programs of their own.
_WRITTEN_OUT = {
    frozenset({"logistic", "mul"}): "silu",
    frozenset({"integer_pow", "tanh", "mul"}): "gelu",
    frozenset({"erf", "mul"}): "gelu",
    frozenset({"erfc", "mul"}): "gelu",
}


def _function(names: tuple[str, ...]) -> str:
    """Returns the name of the function that these primitives implement."""
    return _WRITTEN_OUT.get(frozenset(names), " ".join(names))


def _nested(values: np.ndarray) -> Number:
    def tuples(x):
        return tuple(map(tuples, x)) if isinstance(x, list) else x

    return tuples(values.tolist())


def _loss_of(value: Any) -> jax.Array:
    try:
        loss = jnp.asarray(None if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`loss_fn` must return a real scalar, got {type(value).__name__}."
        ) from error
    if loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"`loss_fn` must return a real scalar, got {loss.dtype} of shape "
            f"{loss.shape}."
        )
    return loss


def scalar_loss(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Wraps a loss function to drop its auxiliary output and check its result."""
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function, got {type(loss_fn).__name__}.")

    def loss(*args):
        out = loss_fn(*args)
        if has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise ValueError("With `has_aux`, `loss_fn` must return (loss, aux).")
            out = out[0]
        elif isinstance(out, tuple):
            raise ValueError(
                "`loss_fn` returns a tuple. If it is (loss, aux), give `has_aux=True`."
            )
        return _loss_of(out)

    return loss


def tapped(loss_fn: Callable[..., Any], params: Any, *args: Any) -> Tapped:
    """Reads the program of ``loss_fn(params, *args)``, which returns a scalar."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    program = jax.make_jaxpr(loss_fn)(params, *args)
    plan = plan_program(program, len(flat))

    def run(params, args, probes=(), change=Change()):  # noqa: B008
        values = jax.tree.leaves((params, args))
        (loss,), figures = replay(plan, values, probes, change)
        return loss.astype(jnp.float32) if change.wide else loss, figures

    paths = tuple(path_names.leaf_names(params))
    return Tapped(plan, paths, tuple(int(np.size(x)) for _, x in flat), run)


def tap(
    loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False
) -> Taps:
    """Measures the signals at each use of the parameters in a loss function.

    The norm of a parameter's gradient does not reveal where a signal grows: in a deep
    network without normalization, it is the same in every layer, because the forward
    signal loses what the backward signal gains. `tap` reads the program of the loss and
    measures the backward signal itself, at the input and the output of every matrix
    product, convolution, lookup and elementwise scale that uses a parameter, at each
    step of a scan. The model needs no hooks or changes.

    `tap` looks inside `jax.jit`, `jax.checkpoint`, `jax.vmap`, `jax.lax.scan` and
    `jax.lax.cond`. Functions with a custom derivative keep it. Inside such a function,
    the forward signal is measured, and the backward signal only of uses that are the
    first or last operation (`Site.unmeasured`). Uses inside a `jax.lax.while_loop`, a
    `jax.shard_map`, a callback, a Pallas kernel or a linear solve can't be measured;
    they are counted and listed.

    A call costs about as much as one training step and compiles its own program, so
    call `tap` occasionally, not at every step.

    Args:
        loss_fn: ``loss_fn(params, *args)`` returns a real scalar.
        params: A pytree of arrays, a Flax NNX model or an Equinox model. The model
            itself is not changed: ``loss_fn`` receives a copy.
        *args: The other arguments of ``loss_fn``: pytrees of arrays.
        has_aux: Whether ``loss_fn`` returns (loss, aux).

    Returns:
        `Taps`, with a `Site` for each use. Print it to see a table.

    Raises:
        TypeError: If ``loss_fn`` is not a function.
        ValueError: If the loss is not a real scalar, or if `tap` is called inside jit.
        NotImplementedError: If the programs of this version of JAX can't be read.

    Example:
        >>> import jax, jax.numpy as jnp, optclip
        >>> def loss_fn(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["first"]) @ params["last"])
        >>> params = {"first": 9 * jnp.ones((2, 3)), "last": jnp.ones((3, 1))}
        >>> taps = optclip.diagnosis.tap(loss_fn, params, jnp.ones((4, 2)))
        >>> [(site.leaf, site.fan_in, site.activation) for site in taps.sites]
        [('first', 2, None), ('last', 3, 'tanh')]
        >>> taps.sites[-1].signal_out  # of 4 outputs, with a derivative of 1 each
        2.0
    """
    outside_jit("tap", params, args)
    loss_fn, params = _models.as_arrays(scalar_loss(loss_fn, has_aux), params)
    jax.eval_shape(loss_fn, params, *args)  # raises errors in the user's function first
    try:
        seen = tapped(loss_fn, params, *args)

        def loss_of(probes, params, args):  # no compiled constants
            return seen.run(params, args, probes)

        given = no_probes(seen.plan), params, args
        measure = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        jax.eval_shape(measure, *given)
    except (AttributeError, KeyError, TypeError, AssertionError) as error:
        raise NotImplementedError(
            f"`tap` can't read the programs of JAX {jax.__version__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    (loss, figures), signals = measure(*given)
    hidden = seen.plan.hidden
    sites = seen.sites(figures, signals)
    return Taps(sites, float(loss), len(sites) + len(hidden), hidden)
