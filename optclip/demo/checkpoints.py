"""Orbax checkpoints, one folder per chunk; the newest complete checkpoint is used.

Orbax writes to a folder with a temporary name and renames the folder after everything
is on disk. The previous checkpoint is deleted only after that, so a complete checkpoint
always exists.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optclip.demo.training import Progress

__all__ = ["clear", "read_settings", "restore", "save"]


def _folder(output: Path) -> Path:
    return output.resolve() / "checkpoints"


def _complete(output: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    folders = [p for p in _folder(output).glob("*") if p.name.isdigit() and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name))


def _newest(output: Path) -> Path:
    found = _complete(output)
    if not found:
        raise ValueError(
            f"There is no checkpoint in {output} to resume. Leave --resume out, or "
            "name the folder of the run with --output."
        )
    return found[-1]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _tree(progress: Progress) -> dict[str, Any]:
    return {"states": progress.states, "records": progress.records}


def _load(path: Path, **items: Any) -> Any:
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**items))
    except Exception as error:
        # Orbax and TensorStore raise errors of many types for a damaged checkpoint.
        raise ValueError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}). Start "
            "again without --resume."
        ) from error


def clear(output: Path) -> None:
    """Deletes the checkpoints of any earlier run in this folder."""
    shutil.rmtree(_folder(output), ignore_errors=True)


def save(output: Path, progress: Progress, settings: dict[str, Any]) -> None:
    """Saves the progress and the settings, then deletes older checkpoints."""
    older = _complete(output)
    with _checkpointer() as checkpointer:
        checkpointer.save(
            _folder(output) / str(progress.step),
            args=ocp.args.Composite(
                progress=ocp.args.StandardSave(_tree(progress)),
                settings=ocp.args.JsonSave(settings),
            ),
        )
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def read_settings(output: Path) -> dict[str, Any]:
    """Returns the settings of the newest checkpoint.

    Raises:
        ValueError: If there is no checkpoint, or if it cannot be read.
    """
    loaded = _load(_newest(output), settings=ocp.args.JsonRestore())
    return loaded["settings"]


def restore(output: Path, blank: Progress) -> Progress:
    """Returns the progress of the newest checkpoint.

    Args:
        output: Folder of the run.
        blank: Progress of the same runs at step 0, which provides the structure and
            the shapes.

    Raises:
        ValueError: If there is no checkpoint, or if it cannot be read.
    """
    path = _newest(output)
    # Restored as NumPy arrays and placed on the default device like a fresh state.
    # Arrays placed by Orbax are committed to their device, which would make jit
    # recompile.
    target = ocp.args.StandardRestore(jax.device_get(_tree(blank)))
    loaded = _load(path, progress=target)["progress"]
    states = jax.tree.map(jnp.asarray, loaded["states"])
    return Progress(int(path.name), states, loaded["records"])
