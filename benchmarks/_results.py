"""What the benchmarks share: the name of the machine, and where results go."""

import argparse
import os
import pathlib
import platform

import jax
import optax

import optclip


def machine():
    """Names what the figures were measured on."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        rows = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [r.split(":")[1].strip() for r in rows if r.startswith("model name")]
        processor = names[0] if names else processor
    return (
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores of "
        f"{processor}; Python {platform.python_version()}, JAX {jax.__version__}, "
        f"Optax {optax.__version__}, optclip {optclip.__version__}"
    )


def parser(doc):
    """Returns a parser of the command line that knows ``--output``."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--output", type=pathlib.Path, help="folder to write to")
    return made


def write(folder, name, lines):
    """Writes the results where ``--output`` said, if it did."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
