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
# # How does clipping work on many devices?
#
# Clipping must bound the norm of the whole gradient, however it is sharded. Under
# `jax.jit` this is automatic: the norms on eight devices equal those on one, up to
# float32 rounding. Inside `jax.shard_map`, a transformation sees only its local shard,
# and must be told so with `axis_name="auto"`. Agreeing on the norm costs one all-reduce
# of a few bytes.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optclip

plt.style.use("tableau-colorblind10")
plt.rcParams.update({
    "font.size": 12, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.35,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip
BLUE, ORANGE, GRAY = "#006BA4", "#FF800E", "#8C8C8C"
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

# %% [markdown]
# ## Two ways to parallelize a training step
#
# A *sharding* says which device holds which part of an array. Here, eight CPU devices,
# simulated by the flag above, form one mesh axis called `"data"`. Both ways split the
# batch. *Data parallelism* replicates the weights on every device. *FSDP* (fully
# sharded data parallelism) also shards the weights and the optimizer's moments.
#
# The network has one hidden layer. Its inputs differ in scale, as raw data does, and in
# every eighth batch the targets are a hundred times too large.


# %%
def init_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (32, 64)) * (2 / 32) ** 0.5,
            "bias": jnp.zeros(64),
        },
        "out": {"kernel": jax.random.normal(second, (64, 8)) / 8, "bias": jnp.zeros(8)},
    }


def make_batches(steps=24):
    x = jax.random.normal(jax.random.key(1), (steps, 128, 32))
    bad = jnp.arange(steps) % 8 == 5
    y = jnp.tanh(x[..., :8]) * jnp.where(bad, 100.0, 1.0)[:, None, None]
    return x * jnp.linspace(2.0, 0.1, 32), y


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["out"]["kernel"] + params["out"]["bias"] - y) ** 2)


def place(tree, params, like_params, rest):
    shapes = [x.shape for x in jax.tree.leaves(params)]
    where = jax.tree.map(lambda x: like_params if x.shape in shapes else rest, tree)
    return jax.device_put(tree, where)


optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(3e-3))
params, batches = init_params(), make_batches()
state = optimizer.init(params)

alone = SingleDeviceSharding(jax.devices()[0])
whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
batch_cut = NamedSharding(mesh, P(None, "data"))  # the first axis is over steps
# The shardings of the parameters and moments, of the rest of the state, and of the
# batches.
PLACES = {
    "one device": (alone, alone, alone),
    "data parallel": (whole, whole, batch_cut),
    "FSDP": (cut, whole, batch_cut),
}
placed = {
    name: (place((params, state), params, *of), jax.device_put(batches, of_batch))
    for name, (*of, of_batch) in PLACES.items()
}


def draw(axis, array, along=0):
    if array.sharding.is_fully_replicated:
        axis.barh(0, 1, 1, align="edge", color="0.85", edgecolor="w")
        axis.text(0.5, 0.5, "all of it\non each", ha="center", va="center")
    else:
        size = array.shape[along]
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            start, stop, _ = index[along].indices(size)
            color = plt.cm.viridis(device.id / 7.5)
            height = (stop - start) / size
            axis.barh(start / size, 1, height, align="edge", color=color, edgecolor="w")
            axis.text(
                0.5, (start + stop) / size / 2, device.id, ha="center", va="center",
                color="w" if device.id < 5 else "k",
            )  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


figure, grid = plt.subplots(2, 5, figsize=(8.5, 4.4), layout="constrained")
for axes, name in zip(grid, ("data parallel", "FSDP"), strict=True):
    (held, (clip_state, adam_state)), (x, y) = placed[name]
    draw(axes[0], x, along=1)
    draw(axes[1], held["hidden"]["kernel"])
    draw(axes[2], held["out"]["kernel"])
    draw(axes[3], adam_state[0].mu["hidden"]["kernel"])
    draw(axes[4], clip_state.norm_before)
    axes[0].set_ylabel(name, fontsize=13)
titles = (
    "batch\n128, 32", "hidden weights\n32, 64", "output weights\n64, 8",
    "Adam's moment\n32, 64", "clip's norm\none number",
)  # fmt: skip
for axis, title in zip(grid[0], titles, strict=True):
    axis.set_title(title, fontsize=12)
plt.show()

# %% [markdown]
# The numbers are device indices. Everything is read from the arrays themselves. Under
# FSDP the gradients are sharded like the weights, so no device can compute the global
# norm alone. The transformation's state is a few numbers, which are replicated on every
# device.
#
# ## Under `jax.jit` there is nothing to do
#
# The same jitted program runs with all three shardings. It is written as if there were
# one device; XLA's partitioner inserts the communication between devices.


# %%
@jax.jit
def train(start, batches):
    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optclip.metrics(state)

    return jax.lax.scan(step, start, batches)


norms, trained = {}, {}
for name, (start, of_batch) in placed.items():
    (trained[name], _), record = train(start, of_batch)
    norms[name] = np.asarray(record["clip/norm_before"])
apart = {name: norm / norms["one device"] - 1 for name, norm in norms.items()}

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8.5, 4.6), sharex=True, height_ratios=[1.4, 1]
)
top.semilogy(norms["one device"], color="0.75", linewidth=7, label="one device")
top.semilogy(norms["data parallel"], color=BLUE, linewidth=3, label="data parallel")
top.semilogy(norms["FSDP"], "--", color=ORANGE, linewidth=2, label="FSDP")
top.set(ylabel="norm of the gradients")
top.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
bottom.plot(apart["data parallel"] * 1e7, "o", color=BLUE, markersize=7)
bottom.plot(apart["FSDP"] * 1e7, "D", color=ORANGE, markersize=5)
bottom.axhline(0, color="0.75", linewidth=3, zorder=0)
bottom.set(xlabel="step", ylabel="relative\ndifference ($10^{-7}$)", ylim=(-10, 10))
figure.align_ylabels()
figure.tight_layout()
plt.show()

print("hidden weights on a device:", trained["FSDP"]["hidden"]["kernel"].sharding
      .shard_shape((32, 64)), "of (32, 64)")  # fmt: skip

# %% [markdown]
# All three see the same norms: they differ by at most 2e-7 in relative terms, which is
# the rounding error of summing float32 numbers in a different order. The three bad
# batches appear in all three runs.
#
# ## Inside `jax.shard_map`, pass `axis_name`
#
# In `jax.shard_map` you write the program of *one* device, and a transformation sees
# the shard of the gradient that this device holds. Below, the first FSDP step is
# written by hand: each device gathers the weights, computes the loss on its part of the
# batch, and gets its shard of the gradient. Three transformations with a bound of 1 see
# that shard.

# %%
CLIPS = {
    "optax": optax.clip_by_global_norm(1.0),
    "optclip": optclip.clip_by_global_norm(1.0),
    "optclip, auto": optclip.clip_by_global_norm(1.0, axis_name="auto"),
}


def mean_loss(params, x, y):
    return jax.lax.pmean(loss_fn(params, x, y), "data")


def on_one_device(params, whole_params, x, y):
    def loss_of_parts(params):
        gathered = jax.tree.map(
            lambda part: jax.lax.all_gather(part, "data", tiled=True), params
        )
        return mean_loss(gathered, x, y)

    grads = jax.grad(loss_of_parts)(params)
    clipped, seen = {}, {"optax": optax.global_norm(grads)}
    for name, clip in CLIPS.items():
        clipped[name], state = clip.update(grads, clip.init(grads))
        if name != "optax":
            seen[name] = optclip.metrics(state)["clip/norm_before"]
    seen["replicated"] = optax.global_norm(jax.grad(mean_loss)(whole_params, x, y))
    return clipped, jax.tree.map(lambda norm: norm[None], seen)


on_all_devices = jax.jit(
    jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=P("data"),
    )
)
first_batch = jax.device_put([b[0] for b in batches], cut)
clipped, seen = on_all_devices(placed["FSDP"][0][0], params, *first_batch)
seen = jax.device_get(seen)
after = {name: float(optax.global_norm(tree)) for name, tree in clipped.items()}
right = norms["one device"][0]

figure, (left, side) = plt.subplots(
    1, 2, figsize=(8.5, 4.2), width_ratios=[2.6, 1], layout="constrained"
)
at = np.arange(8)
left.bar(at - 0.2, seen["optax"], 0.38, color=ORANGE, label="optax: local shard")
left.bar(
    at + 0.2, seen["optclip, auto"], 0.38, color=BLUE, hatch="//", edgecolor="w",
    label='optclip, axis_name="auto"',
)  # fmt: skip
left.axhline(right, color="k", linestyle="--", linewidth=1.5)
left.text(-0.4, 1.03 * right, "norm of the whole gradient")
left.set(xlabel="device", ylabel="norm seen by the transformation", xticks=at)
left.set(title="before the clip", ylim=(0, 1.15 * right))
left.grid(axis="x", visible=False)
figure.legend(*left.get_legend_handles_labels(), ncols=2, loc="outside upper center",
              frameon=False)  # fmt: skip
bars = side.bar(
    ["optax", 'optclip,\n"auto"'], [after["optax"], after["optclip, auto"]],
    color=[ORANGE, BLUE], hatch=["", "//"], edgecolor="w", width=0.6,
)  # fmt: skip
side.bar_label(bars, fmt="%.2f", padding=2)
side.axhline(1.0, color="k", linestyle="--", linewidth=1.5)
side.set(title="after it (bound: 1)", ylabel="norm of the whole update", ylim=(0, 3.2))
side.grid(axis="x", visible=False)
plt.show()

for name in ("optclip", "replicated"):
    print(f"{name}:", *(f"{norm:.3f}" for norm in seen[name]))

# %% [markdown]
# Optax's transformation treats each device's shard as the whole gradient. None of the
# eight norms is the right one. Every shard is scaled to a norm of 1, so the norm of the
# update is 2.83, the square root of 8, instead of the requested 1. The more devices
# there are, the weaker the bound. `optclip` without `axis_name` does the same (first
# line above), because it does not know about the other shards. With `axis_name="auto"`,
# the type of each leaf says which mesh axes it is sharded over, and all eight devices
# compute 4.635, the norm on one device.
#
# This mistake is only possible where the gradient is sharded. The gradient of
# replicated weights is replicated too: JAX has already summed it over the devices
# (second line).
#
# ## What does it cost to agree?
#
# An *all-reduce* sums one array over all devices. How many all-reduces does clipping
# need, and how many bytes do they transfer? Both can be read from the program that XLA
# compiles, here for the gradients of two layers of 1024 units.

# %%
LAYERS = [(1024, 1024), (1024,), (1024, 1024), (1024,)]
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(clip, sharding):
    grads = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=sharding) for x in LAYERS]
    state = jax.eval_shape(clip.init, grads)
    text = jax.jit(clip.update).lower(grads, state).compile().as_text()
    usual_path = text.split("\nENTRY")[1].split("\n}")[0]  # without the rare branch
    found = re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", usual_path)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(kind for kind, _ in found))
    entries = sum(np.prod([int(n) for n in x.split(",") if n]) for x in shapes)
    return [name for _, name in found], int(4 * entries)


by_unit = optclip.clip_by_unit_norm(1.0)
costs = {
    "tree scope, Optax": collectives(CLIPS["optax"], cut),
    "tree scope": collectives(CLIPS["optclip"], cut),
    "leaf scope": collectives(optclip.clip_by_leaf_norm(1.0), cut),
    "unit scope": collectives(by_unit, cut),
}
costs_not_cut = [collectives(clip, whole) for clip in (CLIPS["optclip"], by_unit)]
all_bytes = 4 * sum(int(np.prod(x)) for x in LAYERS)

figure, axis = plt.subplots(figsize=(8.5, 3.2))
for row, (name, (ops, size)) in enumerate(costs.items()):
    axis.plot(size, row, "o", color=ORANGE if "Optax" in name else BLUE, markersize=9)
    axis.text(size * 1.5, row, f"{len(ops)} {ops[0]}, {size:,} bytes", va="center")
axis.plot(all_bytes, 4, "s", color=GRAY, markersize=9)
axis.text(all_bytes / 1.5, 4, f"{all_bytes:,} bytes", va="center", ha="right")
axis.set(xscale="log", xlim=(5, 3e7), ylim=(4.5, -0.5), yticks=range(5))
axis.set(yticklabels=[*costs, "the gradients themselves"], xlabel="bytes")
axis.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# There is one all-reduce, whatever the scope. Tree and leaf scope transfer one number
# per leaf, and unit scope one per unit: half a million times less than the gradients,
# or a thousand times less. If nothing is sharded, as in data parallelism, nothing is
# transferred. (One branch of the program transfers more. All devices take it together
# when a sum of squares overflows.)
#
# The same claims as assertions, so that this notebook is also a test:

# %%
for name in ("data parallel", "FSDP"):
    assert np.abs(apart[name][0]) < 1e-6
    assert np.abs(apart[name]).max() < 1e-5
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.allclose(a, b, rtol=1e-3, atol=1e-5),
            *jax.device_get((trained[name], trained["one device"])),
        )
    )
for leaf in jax.tree.leaves(trained["FSDP"]):
    assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 8

assert (seen["optax"] < 0.7 * right).all()
assert (seen["optax"] > 1.0).all()
assert np.isclose(np.linalg.norm(seen["optax"]), right)
assert np.allclose(seen["optclip"], seen["optax"])
for name in ("optclip, auto", "replicated"):
    assert np.allclose(seen[name], right, rtol=1e-5)
assert np.isclose(after["optax"], np.sqrt(8), rtol=1e-4)
assert np.isclose(after["optclip"], np.sqrt(8), rtol=1e-4)
assert np.isclose(after["optclip, auto"], 1.0, rtol=1e-5)

assert all(ops == ["all-reduce"] for ops, _ in costs.values())
assert [size for _, size in costs.values()] == [16, 16, 16, 8200]
assert all(cost == ([], 0) for cost in costs_not_cut)

# %% [markdown]
# ## Takeaways
#
# - Under `jax.jit`, automatic sharding computes the right norm. Write the step as for
#   one device.
# - Inside `jax.shard_map`, pass `axis_name="auto"` or the tree of PartitionSpecs to
#   each clipping transformation; unit and layer scope need the latter. Without it, each
#   shard is bounded separately instead of the whole gradient.
# - Agreeing on the norm costs one small all-reduce, which is not a reason to train
#   without clipping.
#
# For more, see [Many devices](../scaling.md), which covers `jax.pmap`, several
# processes and the collectives of more methods.
