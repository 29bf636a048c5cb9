"""Measures how a signal grows over the sites of a program, and why."""

import collections
import math
from typing import NamedTuple

import numpy as np

from optclip.diagnosis.taps import Site

__all__ = [
    "Growth",
    "Layer",
    "backward_signal",
    "depth_growth",
    "growth_over_steps",
    "he_ratios",
    "layers_of",
    "logs_of",
    "time_growth",
]

# A leaf with a chain of this many uses is a recurrence rather than weight sharing.
USES = 4
# The fewest layers or steps whose growth can be distinguished from noise.
FEWEST = 4


class Layer(NamedTuple):
    """One matrix product or convolution; layers are ordered by depth.

    Attributes:
        leaf: Path of the layer's parameters.
        back_in: Norm of the backward signal at the input, over all steps; NaN if it
            could not be measured.
        back_out: The same at the output.
        rms_in: Root mean square of the input.
        rms_out: Root mean square of the output.
        he: Root mean square of the weights divided by that of He initialization, for
            the sum over the inputs and over what each of them is a sum of.
        activation: Functions between the previous layer and this one, or None.
        source: Index of the previous layer in the list, or None.
        measured: Whether both backward signals were measured.
        addends: The number of values that each entry of the input is a sum of.
    """

    leaf: str
    back_in: float
    back_out: float
    rms_in: float
    rms_out: float
    he: float
    activation: str | None
    source: int | None
    measured: bool = True
    addends: float = 1.0

    @property
    def back(self) -> float:
        """Norm of the backward signal at the output, or else at the input."""
        known = self.measured or not math.isnan(self.back_out)
        return self.back_out if known else self.back_in


class Growth(NamedTuple):
    """How much a signal grows.

    Attributes:
        back: Decades by which the backward signal grows from the last layers (or steps)
            to the first.
        forward: Decades by which the forward signal grows from the first to the last.
        count: Number of layers or steps.
        leaves: Paths of the leaves involved.
        each: Growth factor per layer or step.
        half: Decades of growth over the earlier half of the steps alone.
    """

    back: float
    forward: float
    count: int
    leaves: tuple[str, ...]
    each: float
    half: float = 0.0


def logs_of(values: np.ndarray | list[float]) -> np.ndarray:
    """Returns logarithms; NaN where they are not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.asarray(values, float))
    return np.where(np.isfinite(logs), logs, np.nan)


def _ends(logs: np.ndarray) -> float:
    """Returns the last quarter's mean minus the first's, ignoring non-finite values."""
    logs = logs[np.isfinite(logs)]
    if len(logs) < 2:
        return 0.0
    quarter = max(len(logs) // 4, 1)
    return float(logs[-quarter:].mean() - logs[:quarter].mean())


def _total(number) -> float:
    """Returns the norm over all steps."""
    return float(np.sqrt(np.sum(np.square(np.asarray(number, float)))))


def _typical(number) -> float:
    """Returns the rms over all steps."""
    return float(np.sqrt(np.mean(np.square(np.asarray(number, float)))))


def _columns(site: Site) -> list[tuple[float, ...]]:
    """Returns the five statistics of a site, one tuple per layer it represents."""
    statistics = (
        site.signal_in,
        site.signal_out,
        site.rms_in,
        site.rms_out,
        site.rms_weight,
    )
    if not site.stacked:
        over = (_total, _total, _typical, _typical, _typical)
        return [tuple(f(x) for f, x in zip(over, statistics, strict=True))]
    rows = [np.asarray(x, float) for x in statistics]
    rows = [r.reshape(-1, r.shape[-1]) for r in rows]
    sums = [np.sqrt(np.sum(np.square(r), 0)) for r in rows[:2]]
    means = [np.sqrt(np.mean(np.square(r), 0)) for r in rows[2:]]
    return list(zip(*sums, *means, strict=True))


def _is_layer(site: Site) -> bool:
    return site.kind in ("matmul", "conv")


def backward_signal(site: Site):
    """Returns the backward signal at the output, or at the input if only it is known.

    NaN if neither was measured, as inside a function with a custom derivative.
    """
    return site.signal_in if "signal_out" in site.unmeasured else site.signal_out


def repeated(sites: tuple[Site, ...]) -> set[str]:
    """Returns the leaves that an unrolled program uses repeatedly, step after step."""
    return {s.leaf for s in sites if _is_layer(s) and s.turn >= USES}


def layers_of(sites: tuple[Site, ...]) -> list[Layer]:
    """Returns the layers by depth.

    The steps of a recurrence count as one layer, and of branches that share weights
    only the first counts.
    """
    again, found, place = repeated(sites), [], {}
    first: dict[tuple[str, int], Site] = {}
    for site in filter(_is_layer, sites):
        turn = 1 if site.leaf in again else site.turn
        first.setdefault((site.leaf, turn), site)
    chosen = sorted(first.values(), key=lambda site: site.order)
    blocks: list[list[Site]] = []
    for site in chosen:  # sites in one scan over layers are interleaved
        length = len(_columns(site))
        stacked = site.stacked and length > 1
        before = blocks[-1][-1] if blocks else None
        if stacked and before and before.stacked and len(_columns(before)) == length:
            blocks[-1].append(site)
        else:
            blocks.append([site])
    for block in blocks:
        for row in range(len(_columns(block[0]))):
            for site in block:
                back_in, back_out, rms_in, rms_out, rms = _columns(site)[row]
                he = rms / math.sqrt(2 / max(site.fan_in * site.addends, 1))
                place[site.order] = len(found)
                found.append(
                    Layer(
                        site.leaf,
                        back_in,
                        back_out,
                        rms_in,
                        rms_out,
                        he,
                        site.activation,
                        place.get(site.source),
                        not site.unmeasured,
                        site.addends,
                    )
                )
    return found


def depth_growth(layers: list[Layer]) -> Growth:
    """Returns the growth of the signals over the layers."""
    back = -_ends(logs_of([x.back for x in layers]))
    forward = _ends(logs_of([x.rms_out for x in layers]))
    steps = max(0.75 * len(layers), 1)
    each = 10 ** (max(back, forward) / steps)
    leaves = tuple(dict.fromkeys(x.leaf for x in layers))
    return Growth(back, forward, len(layers), leaves, each)


def growth_over_steps(signal: np.ndarray, rms: np.ndarray, leaf: str) -> Growth | None:
    """Returns the growth over steps, backward in time: the first step comes last."""
    if len(signal) < FEWEST:
        return None
    backward = logs_of(signal)[::-1]
    forward = logs_of(rms)
    later, grown = len(signal) // 2, 0.0
    for logs in (backward, forward):
        logs = logs[np.isfinite(logs)]
        if len(logs) >= FEWEST:
            grown = max(grown, _ends(logs[min(later, len(logs) // 2) :]))
    back, ahead = _ends(backward), _ends(forward)
    each = 10 ** (max(back, ahead) / max(0.75 * len(signal), 1))
    return Growth(back, ahead, len(signal), (leaf,), each, grown)


def time_growth(sites: tuple[Site, ...]) -> Growth | None:
    """Returns the largest growth over the steps of any recurrence, or None."""
    found = []
    for site in sites:
        used = _is_layer(site) or site.kind == "scale"
        if used and isinstance(site.signal_out, tuple) and not site.stacked:
            signal = np.asarray(backward_signal(site), float)
            rms = np.asarray(site.rms_in, float)
            signal = np.sqrt(np.sum(np.square(signal.reshape(-1, signal.shape[-1])), 0))
            rms = np.sqrt(np.mean(np.square(rms.reshape(-1, rms.shape[-1])), 0))
            found.append(growth_over_steps(signal, rms, site.leaf))
    for leaf in repeated(sites):
        uses = [s for s in sites if s.leaf == leaf and _is_layer(s)]
        signal = np.array([_total(backward_signal(s)) for s in uses])
        rms = np.array([_typical(s.rms_in) for s in uses])
        found.append(growth_over_steps(signal, rms, leaf))
    grown = [g for g in found if g is not None]
    if not grown:
        return None

    def size(g: Growth) -> float:
        return max(g.back, g.forward)

    most = max(grown, key=size)
    # All leaves of the same recurrence have the same growth.
    alike = [g.leaves[0] for g in grown if size(g) > 0.9 * size(most)]
    return most._replace(leaves=tuple(dict.fromkeys(alike)))


def he_ratios(layers: list[Layer]) -> dict[str, float]:
    """Returns the size of the weights relative to He initialization, by leaf."""
    ratios = collections.defaultdict(list)
    for layer in layers:
        ratios[layer.leaf].append(layer.he)
    return {leaf: float(np.median(x)) for leaf, x in ratios.items()}


def activation_gains(layers: list[Layer]) -> list[tuple[Layer, float, float]]:
    """Returns each layer after an activation with its backward and forward gains."""
    found = []
    for layer in layers:
        if not layer.activation or layer.source is None:
            continue
        before = layers[layer.source]
        if not (layer.measured and before.measured):
            continue  # a relu can't be tried inside a function with its own derivative
        with np.errstate(all="ignore"):
            back = np.float64(before.back_out) / layer.back_in
            forward = np.float64(layer.rms_in) / before.rms_out
        found.append((layer, float(back), float(forward)))
    return found
