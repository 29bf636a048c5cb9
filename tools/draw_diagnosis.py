"""Draws the plots of `docs/diagnosis.md`: for each cause, healthy compared with faulty.

Everything is measured, on small networks. Usage:
    python tools/draw_diagnosis.py [NAME ...]
"""

import argparse
import functools
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import optclip
from benchmarks.diagnosis.calibrate import counts

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static" / "diagnosis"
# Okabe and Ito's colors, which are distinguishable with all kinds of color vision.
GOOD = {"color": "#0072B2", "linestyle": "--"}
BAD = {"color": "#D55E00", "linestyle": "-"}
THIRD = {"color": "#009E73", "linestyle": ":"}
SIGNAL = "backward signal (norm)"
WIDTH, CLASSES = 32, 10


def weights_of(depth, gain=1.0):
    """Returns hidden layers, ``gain`` times He initialization, and a last layer."""
    keys = jax.random.split(jax.random.key(0), depth + 1)
    size = gain * (2 / WIDTH) ** 0.5
    hidden = [size * jax.random.normal(k, (WIDTH, WIDTH)) for k in keys[:depth]]
    last = jax.random.normal(keys[depth], (WIDTH, CLASSES)) / WIDTH**0.5
    return {"hidden": hidden, "last": last}


def data(examples=64, seed=1):
    """Returns inputs, and classes that depend on them."""
    x = jax.random.normal(jax.random.key(seed), (examples, WIDTH))
    rule = jax.random.normal(jax.random.key(99), (WIDTH, CLASSES))
    return x, jnp.argmax(x @ rule, axis=1)


def plain(x, weights, act=jax.nn.relu):
    return act(x @ weights)


def residual(x, weights):
    return x + jax.nn.relu(jax.nn.standardize(x) @ weights)


def cross_entropy(params, batch, layer=plain, reduce=jnp.mean):
    x, labels = batch
    for weights in params["hidden"]:
        x = layer(x, weights)
    scores = (jax.nn.standardize(x) if layer is residual else x) @ params["last"]
    return reduce(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def sites_of(params, layer=plain):
    """Returns what `optclip.diagnosis.tap` measures at the hidden layers."""
    loss = functools.partial(cross_entropy, layer=layer)
    sites = optclip.diagnosis.tap(loss, params, data()).sites
    return [site for site in sites if site.leaf.startswith("hidden")]


def signal_of(params, layer=plain):
    return [site.signal_out for site in sites_of(params, layer)]


def grad_norm(batch, depth, **how):
    loss = functools.partial(cross_entropy, **how)
    return float(optax.tree.norm(jax.grad(loss)(weights_of(depth), batch)))


def panels(*names):
    """Returns a 1200 by 600 pixel figure, and axes for each (x, y) pair of labels."""
    figure = Figure(figsize=(7.5, 3.75), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    every = np.atleast_1d(figure.subplots(1, len(names)))
    for axes, (x, y) in zip(every, names, strict=True):
        axes.set_xlabel(x, fontsize=12.5)
        axes.set_ylabel(y, fontsize=12.5)
        axes.set_yscale("log")
        axes.margins(y=0.1)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=11.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, *every


def label(axes, x, y, words, color, shift=(9, 0), **how):
    """Writes text next to a point, by default to the right of it."""
    how = {"va": "center", "fontsize": 12.5, "annotation_clip": False} | how
    how |= {"xytext": shift, "textcoords": "offset points", "color": color}
    axes.annotate(words, (x, y), **how)


def curve(axes, x, y, words, style, shift=(9, 0), **how):
    """Draws a line with its name next to its last finite point."""
    y = np.where(np.isfinite(y), y, np.nan)
    axes.plot(x, y, linewidth=2.4, **style, **how)
    last = np.flatnonzero(np.isfinite(y))[-1]
    label(axes, x[last], y[last], words, style["color"], shift)


def backwards(axes, values, words, style):
    """Draws a line over the layers or steps, from the last to the first."""
    count = len(values)
    marker = "o" if count < 50 else ""
    places = np.arange(count, 0, -1)
    curve(axes, places, values[::-1], words, style, marker=marker, markersize=5)
    apart = 1 if count < 20 else 10
    axes.set_xticks([1, *range(max(apart, 2), count + 1, apart)])
    axes.set_xlim(count + 0.03 * count, 1 - 0.03 * count)


def over_layers(*lines, y=SIGNAL, what="layer"):
    """Returns a figure of (values, text, style)."""
    figure, axes = panels((f"{what}, from the last back to the first", y))
    for line in lines:
        backwards(axes, *line)
    return figure


def draw_tap():
    params = weights_of(10, gain=2.0)
    sites = sites_of(params)
    grads = jax.grad(cross_entropy)(params, data())["hidden"]
    return over_layers(
        ([float(jnp.linalg.norm(g)) for g in grads], "gradient of\nthe weights", GOOD),
        ([s.signal_out for s in sites], "backward\nsignal", BAD),
        ([s.rms_in for s in sites], "forward\nsignal", THIRD),
        y="norm (forward signal: rms)",
    )


def draw_initialization():
    twice, usual = signal_of(weights_of(10, 2.0)), signal_of(weights_of(10))
    return over_layers(
        (twice, "twice\nas large", BAD), (usual, "He\ninitialization", GOOD)
    )


def draw_depth():
    deep = weights_of(40, gain=1.2)
    grown, kept = signal_of(deep), signal_of(deep, residual)
    words = "normalized,\nresidual"
    return over_layers((grown, "plain", BAD), (kept, words, GOOD))


def draw_recurrence():
    keys = jax.random.split(jax.random.key(2), 3)
    turn, _ = jnp.linalg.qr(jax.random.normal(keys[0], (WIDTH, WIDTH)))
    last = jax.random.normal(keys[1], (WIDTH,)) / WIDTH
    x = jax.random.normal(keys[2], (60, 64, WIDTH))

    def loss(params, x):
        def step(state, now):
            return now + state @ params["recurrent"], None

        state, _ = jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)
        return jnp.mean(state @ params["last"])

    lines = []
    for factor, style in ((1.15, BAD), (1.0, GOOD)):
        params = {"recurrent": factor * turn, "last": last}
        signal = optclip.diagnosis.tap(loss, params, x).sites[0].signal_out
        lines.append((signal, rf"$\times${factor:g} a step", style))
    return over_layers(*lines, what="step of the sequence")


def draw_activation():
    figure, shapes, axes = panels(
        ("input", "output"), ("layer, from the last\nback to the first", SIGNAL)
    )
    shapes.set_yscale("linear")
    x = np.linspace(-3, 3, 121)
    for act, words, style in ((jnp.square, "x·x", BAD), (jax.nn.relu, "relu", GOOD)):
        curve(shapes, x, act(x), words, style)
        layer = functools.partial(plain, act=act)
        backwards(axes, signal_of(weights_of(4), layer), words, style)
    return figure


def train(rate, steps=60):
    """Returns the loss of a small network over the steps."""
    params, losses = weights_of(3, 0.7), []
    layer = functools.partial(plain, act=jnp.tanh)
    loss_fn = functools.partial(cross_entropy, layer=layer)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for number in range(steps):
        loss, grads = value_and_grad(params, data(seed=number))
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        losses.append(float(loss))
    return losses


def draw_learning_rate():
    figure, valley, axes = panels(("a weight", "loss"), ("training step", "loss"))
    valley.set_yscale("linear")
    x = np.linspace(-2.2, 2.2, 121)
    valley.plot(x, x**2, color="black", linewidth=1, alpha=0.6)
    small, high = (0.1, "small", -0.4, GOOD), (1.08, "too high", 4, BAD)
    for rate, words, height, style in (small, high):
        places = -((1 - 2 * rate) ** np.arange(5.0))  # down the slope 2 w
        valley.plot(places, places**2, linewidth=2, marker="o", **style)
        label(valley, 0, height, words, style["color"], (0, 0), ha="center")
    valley.set_ylim(-0.7, 4.6)
    for rate, style in ((5.0, BAD), (0.3, GOOD)):
        losses = train(rate)
        curve(axes, np.arange(len(losses)), losses, f"rate {rate:g}", style)
    return figure


def draw_bad_batch():
    odd, norms = 17, []
    for number in range(24):
        x, labels = data(seed=number)
        norms.append(grad_norm((255 * x if number == odd else x, labels), 4))
    figure, axes = panels(("batch", "gradient norm"))
    usual, middle = np.delete(np.arange(24), odd), float(np.median(norms))
    axes.axhline(middle, color="black", linewidth=1.2)
    label(axes, 24.2, middle, "median", "black", (6, 0))
    axes.plot(usual, np.array(norms)[usual], "o", color=GOOD["color"], markersize=7)
    axes.plot(odd, norms[odd], "X", color=BAD["color"], markersize=11)
    words = f"batch {odd}: inputs\n255 times too large"
    label(axes, odd, norms[odd], words, BAD["color"], (-12, 0), ha="right")
    return figure


def draw_overflow():
    x, labels = data()

    def narrow(params, batch):
        params, x = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch[0]))
        return cross_entropy(params, (x, batch[1]))

    figure, axes = panels(("layer", "output of the layer (rms)"))
    wide = (cross_entropy, "float32", GOOD, (9, 0))
    words = "float16: the largest entry of\nthe next layer is infinite"
    half = (narrow, words, BAD, (-2, -28))
    for loss, words, style, shift in (wide, half):
        sites = optclip.diagnosis.tap(
            loss, weights_of(10, 1.8), (1000 * x, labels)
        ).sites[:10]
        sizes = [site.rms_out for site in sites]
        curve(axes, np.arange(1, 11), sizes, words, style, shift, marker="o")
    axes.axhline(65504, color="black", linewidth=1.2)
    label(axes, 1, 65504, "65504: float16 ends here", "black", (0, 4), va="bottom")
    axes.set_xticks(range(1, 11))
    return figure


def draw_loss_sum():
    figure, axes = panels(("examples in the batch", "gradient norm"))
    sizes = [8, 16, 32, 64, 128, 256, 512]
    for reduce, words, style in ((jnp.sum, "sum", BAD), (jnp.mean, "mean", GOOD)):
        norms = [grad_norm(data(size), 3, reduce=reduce) for size in sizes]
        curve(axes, sizes, norms, words, style, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    return figure


def draw_vanishing():
    sigmoid = functools.partial(plain, act=jax.nn.sigmoid)
    usual, dying = signal_of(weights_of(12)), signal_of(weights_of(12), sigmoid)
    return over_layers((usual, "relu", GOOD), (dying, "sigmoid", BAD))


def draw_uphill():
    figure, axes = panels(("step", "loss"))
    clip = optclip.clip_by_global_norm(1.0)
    tails = {"clip, then sgd": (optax.sgd(0.3), GOOD), "clip alone": (None, BAD)}
    for words, (tail, style) in tails.items():
        optimizer = optax.chain(clip, tail) if tail else clip
        params, losses = weights_of(4), []
        state = optimizer.init(params)
        for _ in range(13):
            loss, grads = jax.value_and_grad(cross_entropy)(params, data())
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
        curve(axes, np.arange(13), np.array(losses), words, style, marker="o")
    axes.set_xticks(range(0, 13, 2))
    return figure


def draw_update_cap():
    figure, axes = panels(("step", "loss"))
    for ratio, style in ((0.04, GOOD), (1e-3, BAD)):
        params, losses = weights_of(4), []
        optimizer = optclip.stabilize(optax.adam(1e-2), max_ratio=ratio)
        state = optimizer.init(params)
        for _ in range(61):
            loss, grads = jax.value_and_grad(cross_entropy)(params, data())
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
        words = f"max_ratio={ratio:g}"
        curve(axes, np.arange(61), np.array(losses), words, style)
    return figure


def steps_of(loss_fn, params, rate, steps=40, optimizer=optax.sgd):
    """Returns the loss over the steps of an optimizer, on the same batch."""
    optimizer = optimizer(rate)
    state, losses = optimizer.init(params), []
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(steps):
        loss, grads = value_and_grad(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses


def draw_input_scale():
    x, labels = data()
    pixels = jnp.clip(130 + 60 * x, 0, 255)
    standardized = (pixels - pixels.mean(0)) / pixels.std(0)
    figure, axes = panels(("step", "loss"))
    raw = pixels, "values of\n0 to 255", BAD, (9, 12)
    scaled = standardized, "standardized", GOOD, (9, -6)
    for inputs, words, style, shift in (raw, scaled):
        losses = steps_of(
            lambda p, x=inputs: cross_entropy(p, (x, labels)), weights_of(3), 0.1
        )
        curve(axes, np.arange(len(losses)), losses, words, style, shift)
    return figure


def draw_loss_scale():
    def with_penalty(factor):
        def loss_fn(params):
            sizes = [jnp.mean(jnp.square(w)) for w in params["hidden"]]
            return cross_entropy(params, data()) + factor * sum(sizes)

        return loss_fn

    figure, axes = panels(("step", "loss"))
    for factor, style in ((3e4, BAD), (1.0, GOOD)):
        losses = steps_of(with_penalty(factor), weights_of(3), 0.1)
        curve(axes, np.arange(len(losses)), losses, f"penalty x{factor:g}", style)
    return figure


def draw_precision():
    figure, axes = panels(("step", "loss"))
    axes.set_yscale("linear")
    for dtype, style in ((jnp.bfloat16, BAD), (jnp.float32, GOOD)):
        params = jax.tree.map(lambda w, d=dtype: w.astype(d), weights_of(3))

        def loss_fn(params):
            wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
            return cross_entropy(wide, data())

        losses = steps_of(loss_fn, params, 1e-4, 200, optax.adam)
        words = f"stored in\n{jnp.dtype(dtype).name}"
        curve(axes, np.arange(len(losses)), losses, words, style)
    return figure


def draw_not_finite():
    figure, axes = panels(("score of a wrong class above the right one", "loss"))
    axes.set_yscale("linear")
    gap = np.linspace(0, 130, 261, dtype=np.float32)
    pair = jnp.stack([gap, np.zeros_like(gap)])
    by_hand = -jnp.log(jnp.exp(pair[1]) / jnp.exp(pair).sum(0))
    library = -jax.nn.log_softmax(pair, axis=0)[1]
    curve(axes, gap, library, "jax.nn.\nlog_softmax", GOOD)
    curve(axes, gap, by_hand, "exp, divide, log:\nthen infinite", BAD, (12, -14))
    return figure


def interval(right, total):
    """Returns Wilson's 95% interval of a fraction."""
    z, share = 1.96, right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    spread = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    spread /= 1 + z**2 / total
    return middle - spread, middle + spread


def counted(names):
    """Returns how many first findings were right, and of how many, by basis."""
    paths = [RESULTS / f"diagnosis_{name}.json" for name in names]
    every = counts([row for path in paths for row in json.loads(path.read_text())])
    return {basis: every[basis] for basis in ("measured", "works", "helps")}


def draw_reliability():
    """Compares the probability of findings with how often they were right."""
    before = ("tune", "held_out", "unseen", "tune_kinds")
    said = counted([f"before_{name}" for name in before])
    found = counted(["fresh"])
    figure, axes = panels(("share of findings that name the true cause", ""))
    axes.set_yscale("linear")
    for y, basis in enumerate(reversed(found)):
        right, total = said[basis]
        axes.plot(right / total, y + 0.18, "o", markersize=9, color=GOOD["color"])
        words = f"{right} of {total}"
        label(axes, right / total, y + 0.18, words, GOOD["color"], (-9, 0), ha="right")
        right, total = found[basis]
        low, high = interval(right, total)
        axes.plot([low, high], [y - 0.18] * 2, linewidth=2.4, color=BAD["color"])
        axes.plot(right / total, y - 0.18, "o", markersize=9, color=BAD["color"])
        words = f"{right} of {total}"
        label(axes, low, y - 0.18, words, BAD["color"], (-9, 0), ha="right")
    label(axes, 0.2, 2.4, "models of the development", GOOD["color"])
    label(
        axes, 0.2, 2.1, "models that the rules\nhad never seen", BAD["color"], va="top"
    )
    axes.set_yticks(range(len(found)), reversed(found))
    axes.set_xlim(0.2, 1.02)
    axes.set_ylim(-0.6, len(found) - 0.3)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    return figure


DRAW = {name[5:]: draw for name, draw in list(globals().items()) if name[:5] == "draw_"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DRAW))
    for name in parser.parse_args().names or DRAW:
        drawn = io.BytesIO()
        DRAW[name]().savefig(drawn)
        # With a palette of 64 colors, the file is a third as large.
        small = Image.open(drawn).convert("RGB").quantize(64)
        small.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
