"""The cost of a wrapper that can skip a step, relative to the wrapped optimizer.

Until it is known whether a step is taken, both the old and the new state must be kept.
These rows show what that costs. Usage:

    python benchmarks/wrapper_cost.py [--output benchmarks/results]
"""

import jax.numpy as jnp
import optax
import step_cost
from _results import machine, parser, write

import optclip

TREE = "29M parameters in 81 leaves"


def clipped(optimizer):
    return optax.chain(optclip.clip_by_global_norm(1.0), optimizer)


def wrappers(dtype):
    """Returns the wrappers to compare by name."""
    del dtype
    return {
        "AdamW alone": None,
        "optclip.clip_by_global_norm": optclip.clip_by_global_norm(1.0),
        "optax.apply_if_finite, clip inside": lambda optimizer: optax.apply_if_finite(
            clipped(optimizer), max_consecutive_errors=10
        ),
        "optclip.skip_steps, clip inside": lambda optimizer: optclip.skip_steps(
            clipped(optimizer)
        ),
        "optclip.stabilize": optclip.stabilize,
    }


def main():
    options = parser(__doc__).parse_args()
    text = step_cost.table(TREE, jnp.float32, 32, None, wrappers)
    print(text)
    lines = text.splitlines()[2:]
    source = f"{TREE}, measured by `benchmarks/wrapper_cost.py` on {machine()}."
    write(options.output, "wrapper_cost.md", [*lines, "", source])


if __name__ == "__main__":
    main()
