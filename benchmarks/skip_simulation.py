"""Which steps of simulated runs `skip_steps` skips, and which other libraries skip.

All runs have 5,000 steps whose norms are log-normal, exp(sigma * z):

- a new source: from step 500 on, a random fraction of the batches has norms that are
  larger by a factor;
- isolated spikes: single norms ten times as large;
- a shift: from step 1,000 on, all norms are larger by a factor;
- growth: the norms grow exponentially over the whole run;
- no event at all.

`skip_steps` is the real transformation; one jitted `lax.scan` runs all cells. The rules
of OLMo-core, MaxText and Levanter are NumPy copies, for the norm alone; unlike
`skip_steps`, they keep skipped norms in their history. The rule of optclip 0.1.0 is
`skip_steps` with OLMo-core's threshold, a history of the steps taken, and no count of
similar norms.

Usage: python benchmarks/skip_simulation.py [--output benchmarks/results]
"""

import itertools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _results import machine, parser, write

import optclip

STEPS, START, SEEDS = 5000, 500, 4
SIGMAS = (0.3, 0.7, 1.0, 1.5)
SHARES = (0.02, 0.05, 0.10, 0.15, 0.20, 0.50)
SIZES = (3, 5, 10, 30, 100)
RATES = (0.002, 0.005, 0.01)
SHIFTS = (3, 10, 100, 10_000)
GROWTHS = (10, 1000, 1e6)


def transformation(**options):
    """Returns the function from norms[steps, runs] to which steps are skipped."""
    tx = optclip.skip_steps(optax.sgd(1.0), **options)

    @jax.jit
    def skipped(norms):
        def step(states, row):
            _, states = jax.vmap(tx.update)(row[:, None], states)
            return states, states.skipped_run > 0

        first = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (norms.shape[1], *x.shape)),
            tx.init(jnp.zeros(1)),
        )
        return jax.lax.scan(step, first, norms)[1]

    return lambda norms: np.asarray(skipped(jnp.asarray(norms, jnp.float32)))


def olmo_core(norms, window=128, sigmas=6.0):
    """Above mean plus unbiased deviations of the last 128, skipped ones included."""
    skipped = np.zeros(norms.shape, bool)
    for t in range(max(20, window // 2) - 1, len(norms)):
        past = norms[max(t - window, 0) : t]
        skipped[t] = norms[t] > past.mean(0) + sigmas * past.std(0, ddof=1)
    return skipped


def maxtext(norms, window=128, sigmas=6.0):
    """The same, but the ring buffer starts as ones and already includes this norm."""
    ring, skipped = np.ones((window, norms.shape[1])), np.zeros(norms.shape, bool)
    for t, norm in enumerate(norms):
        known = ring[: max(min(t, window), 2)]
        if t + 1 >= max(2, window // 2):
            skipped[t] = norm > known.mean(0) + sigmas * known.std(0, ddof=1)
        ring[t % window] = norm
    return skipped


def levanter(norms, window=129, sigmas=6.0):
    """Above mean plus biased deviations of the last 129, skipped ones included."""
    skipped = np.zeros(norms.shape, bool)
    for t in range(64, len(norms)):
        past = norms[max(t - window, 0) : t]
        deviation = np.maximum(past.std(0), 1e-6)
        skipped[t] = norms[t] > past.mean(0) + sigmas * deviation
    return skipped


def of_010():
    """The rule of optclip 0.1.0."""
    rule = optclip.rules.window_sigma(6.0, unbiased=True)
    return transformation(when=rule, max_similar=None)


RULES = {
    "`skip_steps()`": transformation(),
    "OLMo-core": olmo_core,
    "MaxText": maxtext,
    "Levanter": levanter,
    "optclip 0.1.0": of_010(),
}


def noise(rng, sigma, runs):
    return np.exp(sigma * rng.normal(size=(STEPS, runs)))


def new_source(seed=0, shares=SHARES, sizes=SIZES, sigmas=SIGMAS, seeds=SEEDS):
    """Returns the cells, their norms[steps, cells], and which are of the new source."""
    rng = np.random.default_rng(seed)
    cells = list(itertools.product(shares, sizes, sigmas, range(seeds)))
    share, size, sigma, _ = map(np.array, zip(*cells, strict=True))
    norms = np.exp(sigma * rng.normal(size=(STEPS, len(cells))))
    late = np.arange(STEPS)[:, None] >= START
    new = late & (rng.random(norms.shape) < share)
    return cells, np.where(new, size * norms, norms), new


def taken_again(lost, run=10):
    """Returns how many batches are lost before ``run`` of them are taken in a row."""
    for k in range(len(lost) - run + 1):
        if not lost[k : k + run].any():
            return int(lost[:k].sum())
    return None


def of_new_source(skip):
    """Yields what a rule loses in each cell."""
    cells, norms, new = new_source()
    skipped = skip(norms)
    for k, (share, size, sigma, seed) in enumerate(cells):
        lost = skipped[new[:, k], k]
        yield {
            "share": share, "size": size, "sigma": sigma, "seed": seed,
            "lost": round(float(lost.mean()), 4),
            "lost_before_taken_again": taken_again(lost),
            "good_lost": round(float(skipped[~new[:, k], k].mean()), 5),
        }  # fmt: skip


def of_rest(skip):
    """Returns how a rule handles isolated spikes, shifts, growth, and no event."""
    rng = np.random.default_rng(1)
    runs, out = 20, {"spikes": {}, "shift": {}, "growth": {}, "nothing": {}}
    at = np.arange(STEPS)[:, None]
    for rate in RATES:
        calm = noise(rng, 0.3, runs)
        spike = (at >= START) & (rng.random(calm.shape) < rate)
        skipped = skip(np.where(spike, 10 * calm, calm))
        out["spikes"][rate] = {
            "skipped": round(float(skipped[spike].mean()), 4),
            "good_lost": round(float(skipped[~spike].mean()), 5),
        }
    for factor in SHIFTS:
        skipped = skip(noise(rng, 0.3, runs) * np.where(at >= 1000, factor, 1))
        out["shift"][factor] = int(skipped.sum(0).max())
    for factor in GROWTHS:
        skipped = skip(noise(rng, 0.3, runs) * factor ** (at / STEPS))
        out["growth"][int(factor)] = int(skipped.sum(0).max())
    for sigma in SIGMAS:
        skipped = skip(noise(rng, sigma, runs))
        out["nothing"][sigma] = round(float(skipped.mean()), 5)
    return out


def by_cell(runs):
    """Yields one entry for the runs of each cell: lists of the batches lost."""
    key = operator.itemgetter("share", "size", "sigma")
    for cell, members in itertools.groupby(runs, key):
        several = list(members)
        yield dict(zip(("share", "size", "sigma"), cell, strict=True)) | {
            name: [run[name] for run in several]
            for name in ("lost", "lost_before_taken_again", "good_lost")
        }


def percent(x):
    return f"{100 * x:.2g}%" if 0 < x < 0.1 else f"{100 * x:.0f}%"


def table(results):
    """Yields the lines of the table."""
    yield "| | " + " | ".join(results) + " |"
    yield "| --- |" + " --- |" * len(results)

    def line(label, cell):
        return f"| {label} | " + " | ".join(map(cell, results.values())) + " |"

    for share in SHARES:
        for key, label in (
            ("lost", f"new source in {share:.0%}: its batches lost, mean (worst run)"),
            (
                "lost_before_taken_again",
                "batches lost before ten in a row are taken, worst run",
            ),
        ):

            def cell(result, share=share, key=key):
                values = [c[key] for c in result["new_source"] if c["share"] == share]
                if key == "lost":
                    return f"{percent(np.mean(values))} ({percent(max(values))})"
                return "never" if None in values else str(max(values))

            yield line(label, cell)
    for rate in RATES:
        yield line(
            f"isolated spikes, one step in {1 / rate:.0f}: skipped",
            lambda r, k=rate: f"{100 * r['rest']['spikes'][k]['skipped']:.1f}%",
        )
    for factor in SHIFTS:
        yield line(
            f"all norms {factor:,} times as large: steps lost, worst run",
            lambda r, k=factor: str(r["rest"]["shift"][k]),
        )
    for factor in GROWTHS:
        yield line(
            f"norms grow to {int(factor):,} times: steps lost, worst run",
            lambda r, k=int(factor): str(r["rest"]["growth"][k]),
        )
    for sigma in SIGMAS:
        yield line(
            f"no event, sigma {sigma}: steps lost",
            lambda r, k=sigma: percent(r["rest"]["nothing"][k]),
        )


def main():
    options = parser(__doc__).parse_args()
    results = {}
    for name, skip in RULES.items():
        results[name] = {"new_source": list(of_new_source(skip)), "rest": of_rest(skip)}
        print(name, "done", flush=True)
    lines = [
        *table(results),
        "",
        f"Simulated by `benchmarks/skip_simulation.py`: {STEPS:,} steps per run; for a "
        f"new source {len(SIZES)} sizes, from {SIZES[0]} to {SIZES[-1]} times, "
        f"{len(SIGMAS)} sigmas, from {SIGMAS[0]} to {SIGMAS[-1]}, and {SEEDS} runs of "
        "each; spikes, ten times as large, shifts and growth at sigma 0.3, and 20 runs "
        f"of each. On {machine()}.",
    ]
    print("\n".join(lines))
    write(options.output, "skip_simulation.md", lines)
    for result in results.values():
        result["new_source"] = list(by_cell(result["new_source"]))
    stored = json.dumps({"machine": machine(), "results": results})
    write(options.output, "skip_simulation.json", [stored.replace("}, {", "},\n{")])


if __name__ == "__main__":
    main()
