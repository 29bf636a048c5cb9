"""Shared by the benchmarks: the name of the machine, and where results are written."""

import argparse
import os
import pathlib
import platform

import jax
import optax

import optclip


def machine():
    """Describes the machine and the versions that were measured."""
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
    """Returns a command-line parser with the option ``--output``."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--output", type=pathlib.Path, help="folder to write to")
    return made


def write(folder, name, lines):
    """Writes the results into the folder ``--output``, if it was given."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
