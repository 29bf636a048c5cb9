"""The code of `docs/migrating.md` gives the same results as the code it replaces.

The code is read from the page. Optax is called directly; the formulas of the others are
reimplemented here in NumPy, in float64. `tests/parity` calls the packages themselves.
"""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_docs import blocks

import optclip

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "migrating.md").read_text(
    encoding="utf-8"
)
PREAMBLE, *SECTIONS = re.split(r"^## ", TEXT, flags=re.M)
SECTIONS = {words.split("\n", 1)[0]: words for words in SECTIONS}


@functools.cache
def page(heading):
    """Returns the names that the code below a heading of the page defines."""
    names = {}
    for _, code, _ in blocks(PREAMBLE) + blocks(SECTIONS[heading]):
        exec(compile(code, heading, "exec"), names)
    return names


SHAPES = {"w": (3, 4), "b": (4,), "head": (4, 2)}
# Global norms well below, near and far above a threshold of 1.
SIZES = [0.1, 0.999, 1.001, 7.0, 1e4]
each_size = pytest.mark.parametrize("size", SIZES)
PARAMS = {
    name: jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
}


def norm(tree):
    squares = [np.sum(np.square(np.asarray(x, np.float64))) for x in tree.values()]
    return np.sqrt(sum(squares))


def draw(size, seed=0):
    """Returns float32 gradients whose joint norm is ``size``."""
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    factor = size / norm(tree)
    return {name: jnp.asarray(x * factor, jnp.float32) for name, x in tree.items()}


def scaled(grads, factor):
    return {name: np.asarray(g, np.float64) * factor for name, g in grads.items()}


def by_adamw(grads):
    """Returns the first updates of the page's AdamW from these gradients."""
    adamw = page("PyTorch")["adamw"]
    grads = {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}
    return adamw.update(grads, adamw.init(PARAMS), PARAMS)[0]


@functools.cache
def update_of(tx):
    """Returns the jitted update: one compilation for gradients of all sizes."""
    return jax.jit(tx.update)


def out(tx, grads, **extra):
    return update_of(tx)(grads, tx.init(PARAMS), PARAMS, **extra)[0]


def close(ours, theirs, rtol=2e-6, atol=1e-8):
    chex.assert_trees_all_close(ours, theirs, rtol=rtol, atol=atol)


def clip_of(chain, grads):
    """Returns the gradients after the first transformation of a chain with AdamW."""
    # Adam cancels constant factors, so this reads the input of its first moment.
    _, state = update_of(chain)(grads, chain.init(PARAMS), PARAMS)
    (moments,) = [
        s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    ]  # fmt: skip
    return jax.tree.map(lambda m: m / (1 - 0.9), moments.mu)


@each_size
@pytest.mark.parametrize(
    ("heading", "max_norm"),
    [("PyTorch", 1.0), ("Lightning", 0.5), ("Hugging Face Trainer", 1.0)],
)
def test_torch_by_norm(heading, max_norm, size):
    names, grads = page(heading), draw(size)
    expected = scaled(grads, min(1.0, max_norm / (norm(grads) + 1e-6)))
    chain = names.get("by_norm", names.get("optimizer"))
    close(clip_of(chain, grads), expected)
    clipped, before = optclip.clip_grad_norm(grads, max_norm)
    close(clipped, expected)
    np.testing.assert_allclose(before, norm(grads), rtol=1e-6)


def test_torch_functions_on_the_page():
    names = page("PyTorch")
    close(names["clipped"], {"w": np.array([3.0, 4.0]) / (5 + 1e-6)})
    assert float(names["norm"]) == 5.0
    close(names["bounded"], {"w": np.array([0.5, 0.5])})


@each_size
@pytest.mark.parametrize("heading", ["PyTorch", "Lightning", "Keras"])
def test_by_value(heading, size):
    grads = draw(size)
    expected = {name: np.clip(np.asarray(g), -0.5, 0.5) for name, g in grads.items()}
    close(clip_of(page(heading)["by_value"], grads), expected)


@each_size
@pytest.mark.parametrize("heading", ["Keras", "TensorFlow"])
def test_keras_and_tensorflow_by_norm(heading, size):
    names, grads = page(heading), draw(size)
    expected = scaled(grads, min(1 / norm(grads), 1.0))
    close(clip_of(names["by_norm"], grads), expected)
    each = {k: np.asarray(g) / max(norm({k: g}), 1.0) for k, g in grads.items()}
    close(clip_of(names.get("by_variable", names.get("by_tensor")), grads), each)


@each_size
def test_tensorflow_over_axes_and_between_bounds(size):
    names, grads = page("TensorFlow"), draw(size)
    kernels = {name: g for name, g in grads.items() if g.ndim == 2}
    columns = {
        name: g / np.maximum(np.linalg.norm(g, axis=0, keepdims=True), 1.0)
        for name, g in kernels.items()
    }
    clipped = clip_of(names["by_column"], grads)
    close({name: clipped[name] for name in kernels}, columns)
    bounded = {name: np.clip(np.asarray(g), -0.5, 0.3) for name, g in grads.items()}
    close(clip_of(names["by_value"], grads), bounded)
    close(names["clipped"], {"w": np.array([0.6, 0.8])})


ROWS = re.findall(
    r"^\| `(optax\..*?)` \| `(optclip\..*?)` \|$", SECTIONS["Optax"], re.M
)


@functools.cache
def line(code):
    """Returns the object that a line of the table makes."""
    return eval(code, page("Optax"))


@each_size
@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[row[0] for row in ROWS])
def test_optax(theirs, ours, size):
    assert len(ROWS) == 7
    grads = draw(size)
    close(out(line(ours), grads), out(line(theirs), grads), rtol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_optax_leaves_infinity_where_it_replaces_nan(bad):
    theirs, ours = map(line, ROWS[-1])
    grads = draw(7.0)
    grads["b"] = grads["b"].at[1].set(bad)
    mine, peer = out(ours, grads), out(theirs, grads)
    assert mine["b"][1] == 0
    if np.isnan(bad):
        close(mine, peer)
    else:
        assert np.isnan(peer["b"][1])
        assert not np.any(peer["w"])


def test_optax_applies_the_sixth_nan_in_a_row_and_skip_steps_none():
    theirs, ours = map(line, ROWS[-2])
    bad = jax.tree.map(lambda g: g * jnp.nan, draw(1.0))
    for tx, applied in ((theirs, [False] * 5 + [True]), (ours, [False] * 6)):
        state, found, update = tx.init(PARAMS), [], jax.jit(tx.update)
        for _ in range(6):
            updates, state = update(bad, state, PARAMS)
            found.append(bool(np.isnan(updates["w"]).any()))
        assert found == applied


@pytest.mark.parametrize("shape", [(), (5,)])
def test_bias_is_one_unit_in_both_adaptive_clips(shape):
    grads = {"b": jnp.asarray(np.linspace(1.0, 5.0, 5)[: shape[0] if shape else 1])}
    grads = {"b": grads["b"].reshape(shape)}
    params = {"b": jnp.full(shape, 0.5)}
    for tx in (optax.adaptive_grad_clip(0.01), optclip.adaptive_grad_clip(0.01)):
        updates, _ = tx.update(grads, tx.init(params), params)
        factor = 0.01 * norm(params) / norm(grads)
        close(updates, scaled(grads, factor))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1, 5), (1, 1, 1, 5), (1, 3, 4)])
def test_adaptive_clips_differ_if_at_most_one_axis_is_longer_than_one(shape):
    rng = np.random.default_rng(0)
    grads, params = (
        {"first": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}}
        for _ in range(2)
    )

    def by(tx):
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    peer = by(optax.adaptive_grad_clip(0.01))
    mine = by(optclip.adaptive_grad_clip(0.01))
    # Of these shapes, (5, 1) is one unit in both, and (1, 3, 4) has 12 units in both.
    same = shape in [(5, 1), (1, 3, 4)]
    assert np.allclose(*map(jax.tree.leaves, (mine, peer)), rtol=1e-4) == same
    if len(shape) == 2:
        close(by(page("Optax")["agc"]), peer)
    axes = {"first/kernel": tuple(range(len(shape)))}
    if max(shape) == np.prod(shape):
        close(by(optclip.adaptive_grad_clip(0.01, axis=axes)), peer)


def test_normalizing_without_eps_differs_from_optax():
    grads = draw(1e-5)
    theirs = out(optax.normalize_by_update_norm(), grads)
    np.testing.assert_allclose(norm(theirs), 1e-5 / (1e-5 + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(
        norm(out(optclip.normalize_by_norm(), grads)), 1.0, rtol=1e-6
    )


def test_other_per_example_clips_return_sums_and_ours_a_mean():
    names = page("Per-example clipping: Optax, jax-privacy")
    loss_fn, params, x, y = (names[key] for key in ("loss_fn", "params", "x", "y"))
    each = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, x, y)
    (sums,), _ = optax.per_example_global_norm_clip([each["w"]], 1.0)
    close(names["sums"]["w"], sums)
    close(3 * names["means"]["w"], sums)
    bad = x.at[1, 0].set(jnp.nan)
    each = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, bad, y)
    (sums,), _ = optax.per_example_global_norm_clip([each["w"]], 1.0)
    assert np.isnan(sums).all()
    means, stats = optclip.clipped_grad(loss_fn, 1.0)(params, bad, y)
    assert int(stats.dropped_examples) == 1
    close(2 * means["w"], jnp.sum(each["w"][::2] / jnp.maximum(
        jnp.linalg.norm(each["w"][::2], axis=1, keepdims=True), 1.0), 0))  # fmt: skip


def run(tx, norms, losses=None):
    """Returns which of the steps with these norms and losses are skipped."""
    tx = optax.with_extra_args_support(tx)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    direction, found = draw(1.0), []
    for step, size in enumerate(norms):
        grads = jax.tree.map(lambda g, s=size: g * np.float32(s), direction)
        extra = {} if losses is None else {"loss": jnp.float32(losses[step])}
        _, state = update(grads, state, PARAMS, **extra)
        found.append(bool(state.skipped_run > 0))
    return np.flatnonzero(found).tolist()


def noise(seed, sigma=0.2, steps=300):
    return np.exp(sigma * np.random.default_rng(seed).normal(size=steps))


def skipped_by_sigma(norms, losses, ddof, needed):
    """Mean plus six deviations of the last 128 norms and losses, including spikes."""

    def over(values, step):
        known = values[max(step - 128, 0) : step]
        if step < needed:
            return False
        return values[step] > known.mean() + 6 * max(known.std(ddof=ddof), 1e-6)

    return [t for t in range(len(norms)) if over(norms, t) or over(losses, t)]


@pytest.mark.parametrize(
    ("heading", "ddof", "needed"), [("MaxText, OLMo-core", 1, 63), ("Levanter", 0, 64)]
)
def test_rules_of_six_deviations(heading, ddof, needed):
    norms, losses = noise(0), noise(1, 0.05)
    norms[[150, 200, 250]] *= [10, 100, 1.5]
    losses[[170, 280]] *= [4, 10]
    expected = skipped_by_sigma(norms, losses, ddof, needed)
    assert {150, 170, 200, 280} <= set(expected)
    assert run(page(heading)["optimizer"], norms, losses) == expected


def test_nan_skips_one_step_where_other_rules_skip_until_they_forget_it():
    norms, losses = noise(0), noise(1, 0.05)
    norms[150] = np.nan
    with np.errstate(invalid="ignore"):
        known = [norms[t - 128 : t].mean() for t in range(150, 279)]
    assert np.isnan(known[1:]).all()  # comparisons with NaN are false
    assert run(page("MaxText, OLMo-core")["optimizer"], norms, losses) == [150]


@pytest.mark.parametrize(("spike", "skipped"), [(63, []), (64, [64])])
def test_maxtext_judges_one_step_earlier(spike, skipped):
    norms, losses = noise(0, steps=100), noise(1, 0.05, steps=100)
    norms[spike] *= 100
    assert skipped_by_sigma(norms, losses, ddof=1, needed=63) == [spike]
    assert run(page("MaxText, OLMo-core")["optimizer"], norms, losses) == skipped


def levanter_updates(grads, params, rates):
    """Adam, decay, a clip by the last 128 norms of these updates, then the rate."""
    params = {k: np.asarray(p, np.float64) for k, p in params.items()}
    mu, nu = ({k: 0.0 for k in params} for _ in range(2))
    history, found = [], []
    for step, (tree, rate) in enumerate(zip(grads, rates, strict=True), 1):
        tree = scaled(tree, 1 / max(norm(tree), 1.0))
        mu = {k: 0.9 * mu[k] + 0.1 * g for k, g in tree.items()}
        nu = {k: 0.95 * nu[k] + 0.05 * g**2 for k, g in tree.items()}
        update = {
            k: mu[k] / (1 - 0.9**step) / (np.sqrt(nu[k] / (1 - 0.95**step)) + 1e-8)
            + 0.1 * params[k]
            for k in params
        }
        size = norm(update)
        if len(history) >= 64:
            last = np.array(history[-128:])
            bound = last.mean() + 3 * max(last.std(), 1e-6)
            update = scaled(update, min(1.0, bound / size))
        history.append(size)
        found.append(scaled(update, -rate))
        params = {k: p + found[-1][k] for k, p in params.items()}
    return found


def test_levanter_bounds_the_update_before_the_learning_rate():
    rng, steps = np.random.default_rng(3), 160
    sizes = noise(4, 0.3, steps)
    # Gradients of constant sign make Adam's updates large.
    signs = [rng.choice([-1.0, 1.0], 24) for _ in range(steps)]
    signs[115:135] = [np.ones(24)] * 20
    grads = []
    for size, sign in zip(sizes, signs, strict=True):
        flat = sign * np.abs(rng.normal(size=24)) * size
        leaves = np.split(flat, np.cumsum([12, 4])[:2])
        grads.append({
            name: jnp.asarray(x.reshape(shape), jnp.float32)
            for (name, shape), x in zip(SHAPES.items(), leaves, strict=True)
        })  # fmt: skip
    rates = np.minimum(np.arange(steps) / 100, 1.0) * 6e-4

    def apply(tx):
        tx, params, found = optax.with_extra_args_support(tx), PARAMS, []
        state, update = tx.init(params), jax.jit(tx.update)
        for tree in grads:
            updates, state = update(tree, state, params, loss=jnp.float32(1.0))
            params = optax.apply_updates(params, updates)
            found.append(updates)
        return found, state

    expected = levanter_updates(grads, PARAMS, rates)
    found, state = apply(page("Levanter")["optimizer"])
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, rtol=2e-3, atol=1e-7)
    assert int(optclip.metrics(state)["clip_2/clipped_steps"]) > 0
    # After the whole optimizer, the recorded norms include the schedule, so the bound
    # differs.
    schedule = optax.linear_schedule(0.0, 6e-4, 100)
    behind = optax.chain(
        optclip.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1),
        optclip.rolling_sigma_clip(3.0, window=128),
    )
    found, _ = apply(behind)
    sizes = np.array([[norm(u) for u in each[1:]] for each in (found, expected)])
    assert np.max(np.abs(sizes[0] / sizes[1] - 1)) > 0.05


@pytest.mark.parametrize(("size", "dropped"), [(0.5, False), (50, False), (150, True)])
def test_axlearn_drops_above_a_bound_and_clips_below(size, dropped):
    optimizer, grads = page("axlearn")["optimizer"], draw(size)
    expected = by_adamw(scaled(grads, min(1.0, 1 / (size + 1e-8))))
    expected = jax.tree.map(lambda u: u * (1.0 - dropped), expected)
    close(out(optimizer, grads), expected, rtol=1e-5)


def test_axlearn_drops_above_a_multiple_of_the_running_average():
    norms = noise(2)
    norms[[1, 30, 31, 200]] = [9.0, 30.0, 12.0, 50.0]
    average, count, expected, bounds = 1.0, 0, [], []
    for step, size in enumerate(norms):
        bounds.append(20 * average)
        if size >= 20 * average:
            expected.append(step)
            continue
        decay = 0.99 * (1 - 0.99**count) / (1 - 0.99 ** (count + 1))
        average, count = decay * average + (1 - decay) * size, count + 1
    assert expected == [30, 200]
    tx = page("axlearn")["by_average"]
    assert run(tx, norms) == expected
    state, update, direction = tx.init(PARAMS), jax.jit(tx.update), draw(1.0)
    for step, size in enumerate(norms):
        grads = jax.tree.map(lambda g, s=size: g * np.float32(s), direction)
        _, state = update(grads, state, PARAMS)
        if step:  # theirs starts at 20 times 1
            bound = float(optclip.metrics(state)["skip/threshold"])
            np.testing.assert_allclose(bound, bounds[step], rtol=1e-4)


def test_zclip_clips_a_spike_as_the_package_does():
    tx = optax.chain(*[optclip.zclip(2.5, alpha=0.97, max_grad_norm=1.0)])
    assert "optclip.zclip(2.5, alpha=0.97, max_grad_norm=1.0)" in SECTIONS["zclip"]
    norms = noise(2, steps=60) / 3
    norms[[40, 50]] *= [3, 20]
    state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
    mean, variance = norms[:25].mean(), norms[:25].var()
    for step, size in enumerate(norms):
        updates, state = update({"w": jnp.array([size], jnp.float32)}, state)
        got, kept = float(updates["w"][0]), size
        if step >= 25:
            score = (size - mean) / (np.sqrt(variance) + 1e-6)
            if score > 2.5:
                kept = mean + 2.5 / score * 2.5 * np.sqrt(variance)
            mean = 0.97 * mean + 0.03 * kept
            variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
        np.testing.assert_allclose(got, min(kept, 1.0), rtol=1e-4)


CLIPS = [
    optclip.clip_by_global_norm, optclip.clip_by_leaf_norm, optclip.clip_by_value,
    optclip.clip_by_block_rms, optclip.clip_by_unit_norm,
]  # fmt: skip


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.__name__)
def test_zero_does_not_disable_clipping_but_infinity_does(clip):
    grads = draw(7.0)
    assert not any(np.any(u) for u in out(clip(0.0), grads).values())
    chex.assert_trees_all_equal(out(clip(jnp.inf), grads), grads)
    assert not any(
        np.any(u) for u in out(optax.clip_by_global_norm(0.0), grads).values()
    )
    off = page("Zero is not off")["off"]
    updates, state = off.update(grads, off.init(PARAMS))
    chex.assert_trees_all_equal(updates, grads)
    np.testing.assert_allclose(state.norm_before, 7.0, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_gradients(bad):
    grads = draw(7.0)
    grads["b"] = grads["b"].at[1].set(bad)
    chex.assert_trees_all_equal(out(optclip.clip_by_global_norm(1.0), grads), grads)
    peers = (
        optclip.clip_grad_norm(grads, 1.0)[0],
        out(optax.clip_by_global_norm(1.0), grads),
    )
    for peer in peers:
        assert np.isnan(peer["b"][1])
        rest = np.asarray(peer["w"])
        assert np.isnan(rest).all() if np.isnan(bad) else not rest.any()
