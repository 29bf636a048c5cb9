"""The command ``python -m optclip.demo``: trains in chunks and presents the results."""

import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optclip.demo import text as texts
from optclip.demo.options import DEFAULTS, Options, Parser, Sizes, merge

__all__ = ["main"]

_NEXT = """
What to try next:
  make demo ARGS="--resume --diagnose"   why the highest learning rate fails
  make demo ARGS="--method soft_clip"    another method (see --help)
  docs/choosing.md                       how to choose a clip
  notebooks/01_what_clipping_does.ipynb  what clipping does, in plots"""

# A shell convention: 128 + SIGINT.
_INTERRUPTED = 130
_SIZES = Sizes()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _require_extras() -> None:
    names = ("flax", "orbax.checkpoint", "matplotlib", "tqdm")
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise ValueError(
            f"The demo needs {', '.join(missing)}, not installed here. Run: "
            'pip install "optclip[demo]"'
        )


def _open_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written to ({error.strerror}). Name another "
            "folder."
        ) from error


class _Task(NamedTuple):
    """The validated inputs of the training.

    Attributes:
        options: The user's choices.
        sizes: The network's sizes.
        text: The text to train on.
        resumed: Whether to continue from a checkpoint.
    """

    options: Options
    sizes: Sizes
    text: texts.Text
    resumed: bool

    def settings(self) -> dict[str, Any]:
        """Returns the JSON data that a checkpoint stores alongside the progress."""
        options = self.options._asdict()
        del options["output"]
        path = options["text"]
        options["text"] = None if path is None else str(path)
        return {
            "options": options,
            "sizes": self.sizes._asdict(),
            "digest": self.text.digest,
        }


def _prepare(given: dict[str, Any], resume: bool, sizes: Sizes) -> _Task:
    """Returns the task, or raises a `ValueError` with instructions for the user."""
    _require_extras()
    if not resume:
        options = merge(given, None)
        text = texts.load(options.text, sizes.symbols)
        _open_folder(options.output)
        return _Task(options, sizes, text, resumed=False)
    from optclip.demo import checkpoints

    settings = checkpoints.read_settings(given["output"] or DEFAULTS["output"])
    stored = settings["options"]
    path = stored["text"]
    options = merge(given, stored | {"text": None if path is None else Path(path)})
    sizes = Sizes(**settings["sizes"])
    text = texts.load(options.text, sizes.symbols)
    if text.digest != settings["digest"]:
        raise ValueError(
            "The text is not the one that the checkpoint was trained on: the file or "
            "the Python version has changed. Start again without --resume."
        )
    _open_folder(options.output)
    return _Task(options, sizes, text, resumed=True)


def _begin(task: _Task, runs: list[Any]) -> Any:
    from optclip.demo import checkpoints, diagnosing, training

    progress = training.begin(runs, task.options, task.sizes)
    output = task.options.output
    if task.resumed:
        return checkpoints.restore(output, progress)
    checkpoints.clear(output)
    for name in ("figure.png", *diagnosing.NAMES):
        (output / name).unlink(missing_ok=True)
    checkpoints.save(output, progress, task.settings())
    return progress


def _train(task: _Task, runs: list[Any], progress: Any) -> Any:
    """Returns the progress at the last step; logs and saves after each chunk."""
    import jax
    from tqdm import tqdm

    from optclip.demo import checkpoints, records, training

    options, output, steps = task.options, task.options.output, task.options.steps
    chunks = [training.compile_chunk(run, options, task.sizes) for run in runs]
    codes = jax.numpy.asarray(task.text.codes)
    log = records.open_log(output / records.LOG, runs, progress)
    bar = tqdm(desc="training", total=steps, initial=progress.step, unit="step")
    with log, bar:
        while progress.step < steps:
            begun, ended = progress.step, min(progress.step + task.sizes.chunk, steps)
            progress = training.advance(progress, chunks, ended - begun, codes)
            records.write_rows(log, runs, progress, begun)
            checkpoints.save(output, progress, task.settings())
            bar.update(ended - begun)
    return progress


def _show(task: _Task, runs: list[Any], progress: Any) -> None:
    from optclip.demo import figure, overflow, records, table

    output, entropy, options = task.options.output, task.text.entropy, task.options
    norms = overflow.measure(options, task.sizes, task.text.codes)
    figure.draw(output / "figure.png", runs, progress, norms, entropy)
    print(f"\n{table.render(runs, progress, norms)}\n")
    print("Losses are in nats per character: means over the last tenth of the steps,")
    print("medians of the seeds. Predicting from the frequencies of characters alone")
    print(f"gives {entropy:.2f}.\n")
    print("Steps that skip_steps skipped, for the first seed:")
    print("\n".join(f"  {words}" for words in table.left_out(progress.states[-1])))
    print(f"\nWrote {output / 'figure.png'} and {output / records.LOG}.\n{_NEXT}")


def _diagnose(task: _Task, runs: list[Any]) -> None:
    from optclip.demo import diagnosing

    print(f"Diagnosing the run {diagnosing.chosen(runs)[0]!r} ...")
    paths = diagnosing.write(task.options, task.sizes, task.text.codes, runs)
    print(f"Wrote {paths[0]} and {paths[1]}.")


def _how_to_resume(output: Path, diagnose: bool) -> str:
    words = ["python", "-m", "optclip.demo", "--resume"]
    if output != DEFAULTS["output"]:
        words += ["--output", str(output)]
    return shlex.join([*words, "--diagnose"] if diagnose else words)


def main(argv: Sequence[str] | None = None, sizes: Sizes = _SIZES) -> int:
    """Runs the demo.

    Args:
        argv: Command-line arguments; defaults to the arguments of the process.
        sizes: Sizes of the network. A resumed run keeps its original sizes.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        SystemExit: If an option is invalid. The code is 2, and one line is written to
            stderr.
    """
    parser = Parser()
    given = vars(parser.parse_args(argv))
    resume, diagnose = given.pop("resume"), given.pop("diagnose")
    output = None
    try:
        task = _prepare(given, resume, sizes)
        from optclip.demo import acts

        options = task.options
        runs = acts.plan(options)
        progress = _begin(task, runs)
        output = options.output
        rates = acts.rates_of(options)
        print(
            f"Learning {len(task.text.codes):,} characters with Adam, {options.steps} "
            f"steps, {options.seeds} seeds each:\n"
            "  1. No clip, Optax's and optclip's at learning rates from "
            f"{rates[0]:g} to {rates[-1]:g}.\n"
            f"  2. The same at {options.learning_rate:g} with two bad batches.\n"
            "  3. Gradients so large that the sum of their squares overflows."
        )
        progress = _train(task, runs, progress)
        _show(task, runs, progress)
        if diagnose:
            _diagnose(task, runs)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"a result could not be written ({error}). Free some space.")
    except KeyboardInterrupt:
        if output is None:
            print("\nStopped before training started.", file=sys.stderr)
        else:
            how = _how_to_resume(output, diagnose)
            print(f"\nStopped. To resume:\n  {how}", file=sys.stderr)
        return _INTERRUPTED
    return 0
