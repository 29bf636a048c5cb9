"""Checks that each scenario has the fault it claims to have, without any diagnosis.

A fault is real if the model without the fault trains, and training with the fault
fails: the loss is not finite, ends above its initial value, or ends twice as high as,
or 0.5 nat above, that of the same model without the fault. If the fault is a vanishing
signal, training must make almost no progress. A healthy model must train; if it is
examined after some steps, its loss must not rise by more than a twentieth.

Usage: python -m benchmarks.diagnosis.check_truth [--split tune]
       [--only NAME_OR_CAUSE] [--seeds 1] [--rates] [--variants]
"""

import argparse
import time

import jax
import numpy as np

from benchmarks.diagnosis import faults_training, unseen_faults
from benchmarks.diagnosis.kinds_pairs import Faulty
from benchmarks.diagnosis.problem import train, typical_loss
from benchmarks.diagnosis.scenarios import SCENARIOS, SPLITS, split

STEPS = 200


def outcome(problem, judge=None):
    """Returns (typical loss before, typical loss after, whether all was finite).

    The loss is that of the problem ``judge``, if it is given.
    """
    params, _, _, finite = train(problem, STEPS)
    judge = judge or problem
    return typical_loss(judge, problem.params), typical_loss(judge, params), finite


def trained(before, after, finite):
    return finite and after < before


def no_worse(after, wanted, start):
    """Returns whether a loss is neither twice, nor 0.5 nat above, another.

    Near zero a factor of two is negligible: an increase by a tenth of the initial loss
    is also fine.
    """
    return after < wanted + min(max(wanted, 0.1 * start), 0.5)


def failed(got, sound, share):
    """Returns whether training failed, compared with training without the fault.

    ``share`` is how many times larger the loss is by definition, for example a sum.
    """
    before, after, finite = got
    if not trained(before, after, finite):
        return True
    return not no_worse(after / share, sound[1], sound[0])


def share_of(problem, sound):
    """Returns the ratio of the losses of both problems on the sound parameters."""
    if structure(problem) != structure(sound):
        return 1.0
    ratio = typical_loss(problem, sound.params) / typical_loss(sound)
    return ratio if np.isfinite(ratio) and ratio > 1 else 1.0


def structure(problem):
    return jax.tree.structure(problem.params)


def truth(scenario, seed):
    """Returns whether the scenario has the claimed fault, and the losses."""
    problem = scenario.make(seed)
    sound_problem = scenario.sound(seed)
    judge = sound_problem if isinstance(scenario, Faulty) and scenario.judged else None
    got = outcome(problem, judge)
    sound = outcome(sound_problem)
    if scenario.cause == "healthy":
        begins = problem.opt_state is None
        well = got[2] and got[1] < (0.9 if begins else 1.05) * got[0]
        return well and trained(*sound), got, sound
    if scenario.cause == "vanishing":
        moved = (got[0] - got[1]) / (sound[0] - sound[1])
        return trained(*sound) and moved < 0.1, got, sound
    share = scenario.units if isinstance(scenario, Faulty) else 1.0
    if scenario.cause == "loss_sum":
        share = share_of(problem, sound_problem)
    return trained(*sound) and failed(got, sound, share), got, sound


def largest_rate(key, at_rate):
    """Returns the largest rate whose final loss is close to the best one."""
    ends = {}
    for power in range(-10, 8):
        ends[2.0**power] = got = outcome(at_rate(key, 2.0**power)(0))
        if power > -7 and not trained(*got):
            break
    best = min((r for r, e in ends.items() if e[2]), key=lambda r: ends[r][1])
    largest = best
    while (e := ends.get(2 * largest)) and no_worse(e[1], ends[best][1], e[0]) and e[2]:
        largest *= 2
    return largest


def variants(chosen, seed=0):
    """Prints whether the model trains after each remedy that changes the program."""
    for scenario in chosen:
        for name, make in scenario.variants.items():
            got = outcome(make(seed))
            word = "true " if trained(*got) else "FALSE"
            figures = f"{got[0]:.3g} -> {got[1]:.3g}"
            print(word, scenario.name, "|", name, "|", figures, flush=True)


def rates(only, module):
    for key in module.RECIPES if not only else [only]:
        largest, now = largest_rate(key, module.at_rate), module.LARGEST[key]
        print(f'    "{key}": {largest:.4g},  # now {now}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a name or a cause")
    parser.add_argument("--split", choices=SPLITS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", action="store_true", help="check the remedies")
    parser.add_argument("--rates", action="store_true", help="search learning rates")
    options = parser.parse_args()
    if options.rates:
        unseen = options.split == "unseen"
        return rates(options.only, unseen_faults if unseen else faults_training)
    chosen = split(options.split) if options.split else SCENARIOS.values()
    chosen = [s for s in chosen if options.only in (s.name, s.cause, "")]
    if options.variants:
        return variants(chosen)
    for scenario in chosen:
        for seed in range(options.seeds):
            start = time.time()
            holds, got, sound = truth(scenario, seed)
            figures = [
                f"{b:.3g} -> {a:.3g}{'' if f else ' !'}" for b, a, f in (got, sound)
            ]
            print(
                "true " if holds else "FALSE",
                scenario.cause,
                "|",
                scenario.name,
                "|",
                " | ".join(figures),
                f"| {time.time() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
