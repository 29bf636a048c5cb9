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
# # What does a clip do on many devices?
#
# It must bound the norm of the whole gradient, wherever its parts lie. Under `jax.jit`
# it does so by itself: the norms on eight devices are those on one, up to the rounding
# of float32. Inside `jax.shard_map` a clip sees one part only, and must be told so by
# `axis_name="auto"`. To agree costs one all-reduce of a few bytes.

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
BLUE, ORANGE, GREY = "#006BA4", "#FF800E", "#8C8C8C"
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

# %% [markdown]
# ## Two ways to spread a training step
#
# A *sharding* says which device holds which part of an array. Here eight CPU devices,
# made up by the flag above, form one mesh axis called `"data"`. Both ways cut the
# batch. *Data parallel* keeps all weights on every device. *FSDP* (fully sharded data
# parallel) cuts the weights and the optimizer's moments too.
#
# The network has one hidden layer. Its inputs differ in size, as raw data do, and in
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
batch_cut = NamedSharding(mesh, P(None, "data"))  # the first axis counts steps
# For each: where parameters and moments lie, where the rest of the state, the batches.
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
# The numbers are those of the devices. All is read from the arrays themselves. Under
# FSDP the gradients lie as the weights do, so no device can take their norm alone. The
# clip's state is a few numbers, which every device has.
#
# ## Under `jax.jit` there is nothing to do
#
# The same jitted program runs on all three layouts. It is written as if there were one
# device; XLA's partitioner puts in what the devices must tell each other.


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
# All three see the same norms: they differ by 2e-7 of their size at most, which is what
# float32 leaves to the order of a sum. The three bad batches are there on all devices.
#
# ## Inside `jax.shard_map` a clip must be told
#
# In `jax.shard_map` you write the program of *one* device, and a clip sees the part of
# the gradient that this device holds. Below is the first FSDP step by hand: each device
# gathers the weights, takes the loss of its part of the batch, and gets its part of the
# gradient. Three clips with a bound of 1 see that part.

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
    seen["not cut"] = optax.global_norm(jax.grad(mean_loss)(whole_params, x, y))
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
left.bar(at - 0.2, seen["optax"], 0.38, color=ORANGE, label="optax: its own part")
left.bar(
    at + 0.2, seen["optclip, auto"], 0.38, color=BLUE, hatch="//", edgecolor="w",
    label='optclip, axis_name="auto"',
)  # fmt: skip
left.axhline(right, color="k", linestyle="--", linewidth=1.5)
left.text(-0.4, 1.03 * right, "norm of the whole gradient")
left.set(xlabel="device", ylabel="norm that the clip sees", xticks=at)
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

for name in ("optclip", "not cut"):
    print(f"{name}:", *(f"{norm:.3f}" for norm in seen[name]))

# %% [markdown]
# Each device that clips by its own part takes it for the whole. None of the eight norms
# is the right one. All parts are brought to a norm of 1, so the update has the norm
# 2.83, the square root of 8, where 1 was asked for. The more devices, the weaker the
# bound. `optclip` without `axis_name` does the same (first line above): nobody told it
# that there are other parts. With `axis_name="auto"` each leaf's own type says along
# which mesh axes it is cut, and all eight devices find 4.635, the norm of one device.
#
# The trap is there only where the gradient is cut. The gradient of weights that all
# devices share is whole on each of them: JAX has added it up already (second line).
#
# ## What does it cost to agree?
#
# An *all-reduce* adds up one array over all devices. How many does a clip need, and how
# many bytes go through them? That can be read from the program that XLA compiled, here
# for the gradients of two layers of 1024 units.

# %%
LAYERS = [(1024, 1024), (1024,), (1024, 1024), (1024,)]
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(clip, sharding):
    grads = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=sharding) for x in LAYERS]
    state = jax.eval_shape(clip.init, grads)
    text = jax.jit(clip.update).lower(grads, state).compile().as_text()
    usual_path = text.split("\nENTRY")[1].split("\n}")[0]  # the rare branch is apart
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
axis.plot(all_bytes, 4, "s", color=GREY, markersize=9)
axis.text(all_bytes / 1.5, 4, f"{all_bytes:,} bytes", va="center", ha="right")
axis.set(xscale="log", xlim=(5, 3e7), ylim=(4.5, -0.5), yticks=range(5))
axis.set(yticklabels=[*costs, "the gradients themselves"], xlabel="bytes")
axis.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# One all-reduce, whatever the scope. Tree and leaf scope send one number a leaf, unit
# scope one a unit: half a million times less than the gradients, or a thousand times.
# Where nothing is cut, as in data parallel, nothing is sent. (One branch of the program
# sends more. It is taken where a sum of squares overflows, by all devices together.)
#
# The same as assertions, so that this notebook is a test as well:

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
for name in ("optclip, auto", "not cut"):
    assert np.allclose(seen[name], right, rtol=1e-5)
assert np.isclose(after["optax"], np.sqrt(8), rtol=1e-4)
assert np.isclose(after["optclip"], np.sqrt(8), rtol=1e-4)
assert np.isclose(after["optclip, auto"], 1.0, rtol=1e-5)

assert all(ops == ["all-reduce"] for ops, _ in costs.values())
assert [size for _, size in costs.values()] == [16, 16, 16, 8200]
assert all(cost == ([], 0) for cost in costs_not_cut)

# %% [markdown]
# ## What to take away
#
# - Under `jax.jit`, automatic sharding gives the right norm. Write the step as for one
#   device.
# - Inside `jax.shard_map`, pass `axis_name="auto"` to each clip, or the tree of
#   PartitionSpecs; unit and layer scope need the latter. A clip that was not told
#   bounds each part, not the whole.
# - To agree on the norm costs one small all-reduce. It is no reason to leave it out.
#
# More: [Many devices](../scaling.md), with `jax.pmap`, several processes and the
# collectives of more clips.
