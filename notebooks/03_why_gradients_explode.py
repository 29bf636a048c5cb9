# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why do gradients explode?
#
# During backpropagation, each layer multiplies the gradient signal on its way from the
# loss to the first layer. If each layer makes it a little larger, many layers make it
# huge. Four causes are shown here on one small network: initial weights that are too
# large, too many layers, activations that grow faster than their input, and a learning
# rate that is too high, which leads to the same result within a few steps. Then the
# remedies are measured on the same network.

# %%
import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits

import optclip

# These programs are small and run once, so compile time matters more than run time.
jax.config.update("jax_disable_most_optimizations", True)
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE = "#006BA4", "#FF800E"

# %% [markdown]
# ## One network
#
# Eight layers of 64 units classify scikit-learn's handwritten digits. `Net()` is a
# network that trains; its arguments say what is changed. The weights of all layers are
# stacked in one array, and `jax.lax.scan` runs over them, which compiles quickly.


# %%
@dataclasses.dataclass(frozen=True)
class Net:
    depth: int = 8
    gain: float = 1.0  # weights, as a multiple of He initialization
    act: str = "relu"
    norm: bool = False
    residual: bool = False
    rate: float = 0.02
    adaptive: bool = False
    clip: bool = False


ACTS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "square": jnp.square}
x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray((x[order] - x.mean()) / x.std(), jnp.float32), jnp.asarray(y[order])
train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]


def weights(net, seed=1):
    first, last = jax.random.split(jax.random.key(seed))
    hidden = jax.random.normal(first, (net.depth, 64, 64)) * net.gain * (2 / 64) ** 0.5
    return {"hidden": hidden, "last": jax.random.normal(last, (64, 10)) / 8}


def scores(net, params, x):
    def layer(x, w):
        out = x @ w
        out = ACTS[net.act](jax.nn.standardize(out) if net.norm else out)
        return (x + out if net.residual else out), None

    if isinstance(params["hidden"], list):
        for w in params["hidden"]:
            x, _ = layer(x, w)
    else:
        x, _ = jax.lax.scan(layer, x, params["hidden"])
    return (jax.nn.standardize(x) if net.residual else x) @ params["last"]


def apart(params):
    """Returns one array per layer, so that `diagnose` sees each activation."""
    return {**params, "hidden": list(params["hidden"])}


def loss_of(net):
    def loss_fn(params, batch):
        x, y = batch
        logits = scores(net, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn


def optimizer_of(net, rate):
    adam = optax.adamw(0.05 * rate)  # 0.001 for the default rate
    last = adam if net.adaptive else optax.sgd(rate)
    return optax.chain(optclip.clip_by_global_norm(1.0), last) if net.clip else last


@functools.cache
def program(net, steps=150):
    """Returns the compiled training function, for any weights and learning rate."""
    loss_fn = loss_of(net)

    def step(optimizer, carry, start):
        params, state = carry
        x, y = (jax.lax.dynamic_slice_in_dim(z, start, 64) for z in (train_x, train_y))
        grads = jax.grad(loss_fn)(params, (x, y))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    def run(params, rate):
        optimizer = optimizer_of(net, rate)
        start = (params, optimizer.init(params))
        places = jnp.arange(steps) * 64 % 1280
        (params, _), norms = jax.lax.scan(partial(step, optimizer), start, places)
        logits = scores(net, params, test_x)
        right = (jnp.argmax(logits, 1) == test_y).mean()
        return norms, jnp.where(jnp.isfinite(logits).all(), right, jnp.nan)

    return jax.jit(run)


def train(net):
    """Returns the gradient norms and the test accuracy."""
    run = program(dataclasses.replace(net, gain=1.0, rate=1.0))
    norms, right = run(weights(net), net.rate)
    return np.asarray(norms), float(right)


# %% [markdown]
# ## Four causes
#
# In each column below, one thing is wrong. `optclip.diagnosis.tap` measures the
# *backward signal* at each layer: the norm of the gradient of the loss with respect to
# the layer's output. The learning rate has no effect before the first step, so its
# column shows the norm of the gradient over the steps instead.

# %%
HEALTHY = Net()
CAUSES = {
    "initialization": Net(gain=3.0),
    "depth": Net(depth=30, gain=1.25),
    "activation": Net(depth=4, act="square"),
    "learning rate": Net(rate=0.8),
}


def signal(net):
    taps = optclip.diagnosis.tap(
        loss_of(net), weights(net), (train_x[:64], train_y[:64])
    )
    return np.array(taps.sites[0].signal_out)


titles = ["weights 3 times\nas large", "30 layers,\n1.25 each",
          "4 layers, x * x\nfor relu", "learning rate\n40 times as high"]  # fmt: skip
pairs = {
    name: (signal(net), signal(Net(depth=net.depth)))
    for name, net in CAUSES.items() if name != "learning rate"
}  # fmt: skip
pairs["learning rate"] = (
    train(CAUSES["learning rate"])[0][:12],
    train(HEALTHY)[0][:12],
)

figure, every = plt.subplots(1, 4, figsize=(10, 3.9))
for axes, title, (name, (bad, good)) in zip(every, titles, pairs.items(), strict=True):
    back = name != "learning rate"
    places = np.arange(len(bad), 0, -1) if back else np.arange(len(bad))
    bad, good = (v[::-1] if back else v for v in (bad, good))
    axes.semilogy(places, bad, color=ORANGE, lw=2.2, label="faulty")
    axes.semilogy(places, good, color=BLUE, lw=2.2, ls="--", label="healthy")
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("layer, from the\nlast to the first" if back else "training step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if back:
        axes.invert_xaxis()
every[0].set_ylabel("backward signal (norm)")
every[3].set_ylabel("gradient (norm)")
figure.legend(*every[0].get_legend_handles_labels(), loc="upper center", ncols=2,
              frameon=False)  # fmt: skip
figure.tight_layout(rect=(0, 0, 1, 0.93))
plt.show()

# %% [markdown]
# In the healthy network (dashed), the signal stays level. With weights three times as
# large, each layer multiplies the signal by about three. Thirty layers at 1.25 do the
# same more gradually. `x * x` does it immediately, because its slope grows with its
# input. With the high learning rate, the first gradient is the same as in the healthy
# network. A few steps later it is not finite, and nothing is drawn.
#
# ## Which is it?
#
# In your own model, you do not know what is wrong. `optclip.diagnose` measures this
# signal and tries the remedies on copies of the parameters.

# %%
batches = [(train_x[i : i + 64], train_y[i : i + 64]) for i in range(0, 256, 64)]
named = {}
for name, net in {"nothing": HEALTHY, **CAUSES}.items():
    params, optimizer = apart(weights(net)), optimizer_of(net, net.rate)
    found = optclip.diagnose(
        loss_of(net), params, batches, optimizer=optimizer, progress=False
    )
    named[name] = found.findings[0].cause if found.findings else "nothing"
    print(f"fault: {name:15} diagnosed: {named[name]}")

# %% [markdown]
# ## Remedies, measured
#
# Each remedy is added to each network, and nothing else is changed. The number is the
# test accuracy after 150 steps. Guessing gives 10%; NaN means that the weights were not
# finite at the end.

# %%
REMEDIES = {
    "none": {},
    "He initialization": {"gain": 1.0},
    "layer normalization,\nresidual connections": {"norm": True, "residual": True},
    "AdamW": {"adaptive": True},
    "clip by norm, 1": {"clip": True},
}
columns = {"nothing": HEALTHY, **CAUSES}
table = np.array([
    [train(dataclasses.replace(net, **change))[1] for net in columns.values()]
    for change in REMEDIES.values()
])  # fmt: skip

figure, axes = plt.subplots(figsize=(9.5, 4.2))
axes.imshow(np.nan_to_num(table), cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
for (row, column), share in np.ndenumerate(table):
    words = "NaN" if np.isnan(share) else f"{share:.0%}"
    color = "white" if share > 0.8 else "black"
    axes.text(column, row, words, ha="center", va="center", color=color, fontsize=13)
axes.set_xticks(range(len(columns)), list(columns))
axes.set_yticks(range(len(REMEDIES)), list(REMEDIES))
axes.xaxis.tick_top()
axes.set_xlabel("what is wrong", labelpad=12)
axes.xaxis.set_label_position("top")
axes.set_ylabel("what is added")
axes.grid(False)
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Each cause has a specific remedy. For example, He initialization fixes weights that
# are too large, but it does nothing about the activation or the learning rate.
# Normalization together with residual connections helps in every column: each layer
# rescales the signal, and the signal can also bypass the layer. AdamW, which divides
# each entry of the gradient by its typical magnitude, only partly compensates for each
# cause; in the last column its learning rate is 40 times as high, like that of SGD.
#
# Clipping turns every NaN into a run that continues. For the learning rate, that is
# enough. For the other causes it is not: every step is bounded, but the network that
# the steps start from is still a bad one. In the first column clipping even reduces
# accuracy: the typical norm there is above 1, so nearly all steps are scaled down.
# Clipping protects a training run that works; it does not fix one that does not.
# [Exploding gradients](../exploding-gradients.md) has a table of more remedies, among
# them tanh, L1 and L2 penalties, fewer layers and a lower learning rate, and
# [Diagnosis](../diagnosis.md) explains each cause.
#
# The same claims as assertions, so that this notebook is also a test:

# %%
right = dict(zip(REMEDIES, table[:, 1:], strict=True))
typical = dict(zip(REMEDIES, table[:, 0], strict=True))
growth = {name: bad[0] / bad[-1] for name, (bad, _) in pairs.items()}
assert growth["initialization"] > 100
assert growth["activation"] > 1000
assert growth["depth"] > 20
assert all(0.1 < good[0] / good[-1] < 10 for _, good in list(pairs.values())[:3])
assert np.isnan(pairs["learning rate"][0][-1])
assert named == {"nothing": "nothing"} | {
    name: name.replace(" ", "_") for name in CAUSES
}
assert np.isnan(right["none"]).all()
assert right["He initialization"][0] > 0.7
assert np.isnan(right["He initialization"][2:]).all()
assert right["layer normalization,\nresidual connections"].min() > 0.7
assert typical["none"] > 0.8
assert right["AdamW"].max() < typical["AdamW"]
assert np.isfinite(right["clip by norm, 1"]).all()
assert right["clip by norm, 1"][3] > 0.7 > right["clip by norm, 1"][:3].max()
assert typical["clip by norm, 1"] < typical["none"]
