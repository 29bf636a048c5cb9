"""Per-example gradient clipping: clips each example's gradient before averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import actions
from optclip._engine import group_norms, sharding, validation
from optclip._engine.names import leaf_names
from optclip._engine.power_sums import widen
from optclip._engine.rule import Limit, Rule
from optclip._engine.scaling import factors_of
from optclip.methods.global_norm import clip_by_global_norm

__all__ = ["ExampleStats", "clipped_grad"]


class ExampleStats(NamedTuple):
    """Statistics of the examples in one batch.

    Attributes:
        loss: float32 scalar. Mean loss of the examples that were used; 0 if none were.
        example_norms: float32[batch]. The norm of each example's gradient before
            clipping; NaN or inf if the gradient contains NaN or inf. If ``axis_name``
            is given, it covers only the examples on this device.
        clipped_share: float32 scalar. Fraction of the used examples that were clipped.
        dropped_examples: int32 scalar. Number of examples left out because of NaN or
            inf.
        aux: The auxiliary outputs of ``loss_fn``, stacked over the examples; None if
            ``has_aux`` is False.
    """

    loss: jax.Array
    example_norms: jax.Array
    clipped_share: jax.Array
    dropped_examples: jax.Array
    aux: Any = None


def _batch_size(batch: tuple) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(
            "`batch` has no arrays: call the function with (params, *batch), where the "
            "first axis of each array in the batch indexes the examples."
        )
    sizes = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            "`batch` must have the same number of examples along the first axis of "
            f"every array, got the shapes {[jnp.shape(x) for x in leaves]}. Pass what "
            "all examples share by keyword: `f(params, x, y, rate=0.1)`."
        )
    size = jnp.shape(leaves[0])[0]
    if size == 0:
        raise ValueError(
            "`batch` has no examples: the first axis of its arrays has length 0, and "
            "must have at least length 1."
        )
    return size


def _names_of(axis_name: Any) -> tuple[str, ...]:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    plain = isinstance(names, (tuple, list)) and all(isinstance(n, str) for n in names)
    if not plain or "auto" in names:
        raise ValueError(
            "`axis_name` must name the mesh axes that the batch is sharded over, such "
            f'as "data" or ("data", "model"), got {axis_name!r}.'
        )
    return tuple(names)


def _check_params(params: Any) -> None:
    leaves = jax.tree.leaves(params)
    for name, x in zip(leaf_names(params), leaves, strict=True):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            raise TypeError(
                "`params` must hold real or complex arrays only, got "
                f"{jnp.result_type(x)} at `{name}`. Pass what is not trained to "
                "`loss_fn` by keyword; for a Flax NNX model, use "
                "`nnx.split(model, nnx.Param, ...)`."
            )
    if not leaves:
        raise ValueError(f"`params` must hold arrays, got {params!r}.")


def _collectives(jaxpr: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Yields the names of the operations that communicate along the mesh axes."""

    def is_program(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for eqn in jaxpr.eqns:
        along = [eqn.params.get("axes"), eqn.params.get("axis_name")]
        if set(names) & set(jax.tree.leaves(along)):
            yield eqn.primitive.name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _collectives(inner, names)


def _check_alone(loss_fn: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Raises if a loss or its derivative communicates along the mesh axes."""
    program = jax.make_jaxpr(loss_fn)()
    mixing = set(_collectives(program.jaxpr, names)) - {"axis_index", "pvary", "pcast"}
    if mixing:
        raise ValueError(
            f"`loss_fn` must not use {sorted(mixing)[0]} along {names}, which the "
            "batch is sharded over: the gradients of examples on different devices "
            "would be summed before they are clipped. Gather the parameters before the "
            "call, and differentiate with respect to the gathered ones."
        )


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(jnp.shape(x), widen(jnp.zeros([], jnp.result_type(x))).dtype)


def _rounded_within(tree: Any, like: Any, max_norm: Any) -> Any:
    """Casts ``tree`` to the dtypes of ``like``; its norm is at most ``max_norm``."""
    leaves = jax.tree.leaves(like)
    eps = max([float(jnp.finfo(jnp.result_type(x)).eps) for x in leaves], default=0.0)
    margin = 1 - max(eps, 4 * float(jnp.finfo(jnp.float32).eps))
    bound: Any = clip_by_global_norm(max_norm * margin)
    tree, _ = bound.update(tree, bound.init(tree))
    return jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), tree, like)


def clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: jax.typing.ArrayLike,
    *,
    microbatch_size: int | None = None,
    has_aux: bool = False,
    axis_name: Any = None,
) -> Callable[..., Any]:
    """Returns a gradient function that clips each example's gradient before the mean.

    The result is the mean of g_i * min(1, max_norm / |g_i|) over all examples i whose
    gradient g_i and loss are finite. Each of n such examples contributes at most
    max_norm / n to the norm of the mean, however bad its gradient is. Clipping the mean
    gradient cannot guarantee this.

    | example                     | result                                        |
    | --------------------------- | --------------------------------------------- |
    | norm above ``max_norm``     | clipped                                       |
    | NaN or inf                  | left out of the mean, and counted             |
    | all examples NaN or inf     | zeros                                         |

    Sums are computed in float32 and rounded once, to the dtype of the parameters. The
    norm of the result is at most ``max_norm`` in every dtype.

    This is for robust training. It does *not* provide differential privacy, which
    requires noise, privacy accounting, and a divisor that doesn't depend on the data.
    For differential privacy, use jax-privacy.

    Args:
        loss_fn: Function of (params, *example, **shared) that returns the scalar loss
            of *one* example. It must not communicate with other devices along
            ``axis_name``.
        max_norm: Maximum norm of an example's gradient: a non-negative number or a
            scalar array.
        microbatch_size: Number of per-example gradients held in memory at a time. If
            None, the whole batch is processed at once. If the batch is sharded, use a
            multiple of the number of devices.
        has_aux: Whether ``loss_fn`` returns (loss, aux).
        axis_name: Inside `jax.shard_map` or `jax.pmap`, the mesh axes that the batch is
            sharded over. The parameters must then be replicated: gather them before the
            call, not inside ``loss_fn``. Under `jax.jit`, it is not needed.

    Returns:
        A function of (params, *batch, **shared) that returns (gradients,
        `ExampleStats`). The first axis of every array in the batch indexes the
        examples; keyword arguments are shared by all examples.

    Raises:
        ValueError: If an argument is out of range, the arrays of the batch have first
            axes of different lengths, ``params`` has no arrays, or ``loss_fn``
            communicates with other devices.
        TypeError: If ``loss_fn`` is not a function or does not return a scalar loss, or
            if ``params`` holds integers.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> def loss_fn(w, x, y):
        ...     return (w @ x - y) ** 2
        >>> grad_fn = optclip.clipped_grad(loss_fn, 1.0, microbatch_size=2)
        >>> x = jnp.array([[3.0, 4.0], [1e30, 0.0], [jnp.nan, 0.0]])
        >>> grads, stats = grad_fn(jnp.zeros(2), x, jnp.ones(3))
        >>> [round(float(g), 3) for g in grads], int(stats.dropped_examples)
        ([-0.8, -0.4], 1)

    Reference:
        Abadi et al., Deep Learning with Differential Privacy, 2016,
        https://arxiv.org/abs/1607.00133
    """
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function, got {loss_fn!r}.")
    if callable(max_norm) or isinstance(max_norm, Rule):
        raise TypeError(
            f"`max_norm` must be a number >= 0 or an array, got {max_norm!r}. To vary "
            "it during training, call `clipped_grad` within the step, with its value."
        )
    validation.non_negative(max_norm=max_norm)
    if microbatch_size is not None:
        microbatch_size = validation.size("microbatch_size", microbatch_size)
    names = _names_of(axis_name)

    def checked(params, *example, **shared):
        out = loss_fn(params, *example, **shared)
        if isinstance(out, tuple) != has_aux or jnp.ndim(out[0] if has_aux else out):
            raise TypeError(
                "`loss_fn` must return the loss of one example, a scalar, or (loss, "
                "aux) with `has_aux=True`, got the shapes "
                f"{jax.tree.map(jnp.shape, out)} with `has_aux={has_aux}`."
            )
        return out

    def differentiate(params, example, shared):
        return jax.value_and_grad(checked, has_aux=has_aux)(params, *example, **shared)

    def summed(losses, grads, real):
        """Returns the summed clipped gradients and statistics, and the norms."""
        norms, reduced = group_norms.rows(grads)
        limit = Limit(*[jnp.asarray(max_norm).astype(norms.dtype)] * 2)
        scale, first = factors_of(actions.rescale, norms, reduced, limit)
        bad = ~(jnp.isfinite(reduced) & jnp.isfinite(losses))
        used = real & ~bad

        def add(x):
            y = widen(x)
            along = (scale.shape[0], *(1,) * (x.ndim - 1))
            factors = [f.reshape(along).astype(y.real.dtype) for f in (first, scale)]
            y = jnp.where(used.reshape(along), y * factors[0] * factors[1], 0)
            return jnp.sum(y, axis=0)

        totals = {
            "loss": jnp.sum(jnp.where(used, losses, 0.0).astype(jnp.float32)),
            "clipped": jnp.sum(used & (norms > limit.threshold), dtype=jnp.float32),
            "used": jnp.sum(used, dtype=jnp.float32),
            "dropped": jnp.sum(real & bad, dtype=jnp.int32),
        }
        return (jax.tree.map(add, grads), totals), norms.astype(jnp.float32)

    def gradients(params, *batch, **shared):
        size = _batch_size(batch)
        _check_params(params)
        at_a_time = min(microbatch_size or size, size)
        rounds = -(-size // at_a_time)
        total = rounds * at_a_time

        def cut(x):
            x = jnp.asarray(x)
            if total > size:  # pad with examples that are not used
                x = jnp.concatenate([x, x[: total - size]])
            return x.reshape(at_a_time, rounds, *x.shape[1:])

        used = (jnp.arange(total) < size).reshape(at_a_time, rounds)
        examples = (jax.tree.map(cut, batch), used)
        # Otherwise, each example's gradient would be summed over the devices before it
        # is clipped.
        local = sharding.spread_over(params, names)
        if names:
            first = jax.tree.map(lambda x: x[0], batch)
            _check_alone(lambda: checked(local, *first, **shared), names)

        def microbatch(carry, k):
            # Examples keep their own axis, so that none is moved to another device.
            taken = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, k, 1, keepdims=False), examples
            )
            losses, grads = jax.vmap(differentiate, in_axes=(None, 0, None))(
                local, taken[0], shared
            )
            losses, aux = losses if has_aux else (losses, None)
            added, norms = summed(losses, grads, taken[1])
            return jax.tree.map(jnp.add, carry, added), (norms, aux)

        zero = jnp.zeros([], jnp.float32)
        nothing = {"loss": zero, "clipped": zero, "used": zero, "dropped": jnp.int32(0)}
        start = sharding.spread_over((jax.tree.map(_zeros, params), nothing), names)
        (sums, totals), each = lax.scan(microbatch, start, jnp.arange(rounds))
        if names:
            sums, totals = lax.psum((sums, totals), names)

        def in_order(x):
            x = jnp.swapaxes(x, 0, 1)
            return x.reshape(total, *x.shape[2:])[:size]

        norms, aux = jax.tree.map(in_order, each)
        count = jnp.maximum(totals["used"], 1.0)
        mean = jax.tree.map(lambda x: x / count.astype(x.real.dtype), sums)
        stats = ExampleStats(
            loss=totals["loss"] / count,
            example_norms=norms,
            clipped_share=totals["clipped"] / count,
            dropped_examples=totals["dropped"],
            aux=aux,
        )
        return _rounded_within(mean, params, max_norm), stats

    return gradients
