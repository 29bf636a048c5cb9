"""The demo: its output files, exact resumption, and its error messages."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for needed in ("flax", "matplotlib", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(needed)

from optclip.demo import (  # noqa: E402
    acts,
    checkpoints,
    clips,
    command,
    overflow,
    table,
    text,
    training,
)
from optclip.demo.options import Options, Sizes  # noqa: E402
from optclip.diagnosis.findings import Diagnosis  # noqa: E402

TINY = Sizes(symbols=12, hidden=4, length=5, batch=2, chunk=3)
STEPS, SEEDS = 6, 2
# Three runs at five learning rates, and four with bad batches.
NETWORKS = (3 * 5 + 4) * SEEDS
SHORT = ["--steps", str(STEPS), "--seeds", str(SEEDS)]
PROSE = "It was the best of times, it was the worst of times. " * 30


def run_demo(*words: object) -> int:
    return command.main([str(word) for word in words], TINY)


def rows_of(folder: Path) -> list[dict]:
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def newest_arrays(folder: Path, options: Options) -> list[np.ndarray]:
    """Returns all arrays of the newest checkpoint."""
    blank = training.begin(acts.plan(options), options, TINY)
    progress = checkpoints.restore(folder, blank)
    assert progress.step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(progress[1:])]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Compiles each run once; the cache key covers everything in which tests differ."""
    original, done = training.compile_chunk, {}

    def compile_chunk(run, options, sizes):
        key = (run.act, run.name, run.rates, run.threshold, options[2:5], sizes)
        if key not in done:
            done[key] = original(run, options, sizes)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_chunk", compile_chunk)
        yield


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prose):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    assert run_demo("--output", folder, "--text", prose, *SHORT) == 0
    return folder


def test_writes_a_figure_and_one_object_per_step_and_network(finished):
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(finished)
    assert len(rows) == STEPS * NETWORKS
    assert len({(r["run"], r["seed"], r["step"]) for r in rows}) == len(rows)
    assert list(rows[0]) == ["run", "seed", "step", *training.FIELDS, "nonfinite"]
    first = [row for row in rows if "learning rate" in row["run"]]
    assert not any(row["nonfinite"] for row in first)
    for row in rows[:SEEDS]:
        assert row["run"] == "no clip, learning rate 0.001"
        assert (row["threshold"], row["clipped"], row["skipped"]) == (None, 0, 0)


def test_networks_of_the_same_seed_start_with_the_same_batch_and_weights(finished):
    first = [row for row in rows_of(finished) if row["step"] == 0]
    for seed in range(SEEDS):
        losses = {row["loss"] for row in first if row["seed"] == seed}
        assert max(losses) == pytest.approx(min(losses), rel=1e-5)


def test_bad_batches_are_skipped_and_named(finished, capsys):
    large, broken = acts.incidents(STEPS)
    rows = [row for row in rows_of(finished) if "bad batches" in row["run"]]

    def of(name, step):
        return [r for r in rows if r["run"].startswith(name) and r["step"] == step]

    for name in ("no clip", "optax.clip", "optax.apply_if_finite", "optclip"):
        before, at = of(name, large - 1)[0], of(name, large)[0]
        assert at["loss"] > 500 * before["loss"]
        assert of(name, broken)[0]["nonfinite"]
        survives = name in ("optclip", "optax.apply_if_finite")
        assert of(name, STEPS - 1)[0]["nonfinite"] != survives
    assert of("optclip", broken)[0]["skipped"] == 1
    assert run_demo("--resume", "--output", finished) == 0
    out = capsys.readouterr().out
    assert f"step {broken}: NaN in embed/embedding, " in out
    line = next(x for x in out.splitlines() if x.startswith("2. loss after two"))
    assert line.count("not finite") == 2
    assert line.endswith("optclip.skip_steps")


def test_rates_are_around_that_of_the_options():
    options = Options("stabilize", None, 0.02, 1, 1, Path(), None)
    assert acts.rates_of(options) == (0.002, 0.006, 0.02, 0.06, 0.2)
    names = {(run.act, run.name): run for run in acts.plan(options)}
    assert names[acts.RATE, "optclip.stabilize"].rates == acts.rates_of(options)
    assert names[acts.BAD, "optclip.skip_steps"].rates == (0.02,)


def test_gradients_that_overflow_are_clipped_to_the_bound():
    codes = text.encode(PROSE, TINY.symbols).codes
    found = overflow.measure(None, TINY, codes)
    for dtype, before in found.before.items():
        want = np.minimum(before, overflow.BOUND)
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(found.after["optclip", dtype], want, rtol=tolerance)
        theirs = found.after["optax", dtype]
        kept = before < 10
        np.testing.assert_allclose(theirs[kept], want[kept], rtol=tolerance)
        assert not np.allclose(theirs, want, rtol=tolerance)
    assert found.huge["optclip"] == pytest.approx(overflow.BOUND)
    assert found.huge["optax"] == 0


def test_resuming_a_finished_run_prints_its_results_again(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run_demo("--resume", "--output", finished) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    names = ("no clip", "optax.clip_by_global_norm", "optclip.stabilize", "five rates")
    assert all(name in out for name in names)


def test_diagnose_writes_the_report_of_the_highest_rate(finished, monkeypatch, capsys):
    module = importlib.import_module("optclip.diagnosis._diagnose")
    asked = []

    def diagnose(loss_fn, params, batches, *, optimizer):
        assert optimizer.init(params) is not None
        asked.extend(float(loss_fn(params, batch)) for batch in batches)
        return Diagnosis((), {})

    monkeypatch.setattr(module, "diagnose", diagnose)
    assert run_demo("--resume", "--output", finished, "--diagnose") == 0
    # The first step uses the first batch and the initial parameters.
    name = "no clip, learning rate 0.1"
    first = next(row for row in rows_of(finished) if row["run"] == name)
    assert (first["seed"], first["step"]) == (0, 0)
    assert asked[0] == pytest.approx(first["loss"], rel=1e-5)
    assert len(asked) == len(set(asked)) == STEPS
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert f"Gradient report: {name}, seed 0" in page
    assert f"{STEPS} steps without a clip; all finite." in page
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(finished / "report.html") in capsys.readouterr().out


# The first checkpoint is that of step 0.
@pytest.mark.parametrize("stop", [(training, "advance", 2), (checkpoints, "save", 3)])
def test_interrupted_run_resumes_bitwise_identically(
    stop, finished, prose, tmp_path, monkeypatch, capsys
):
    module, name, fatal = stop
    original, calls = getattr(module, name), []

    def interrupted(*args):
        calls.append(name)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return original(*args)

    folder = tmp_path / "a folder"
    folder.mkdir()
    for old in ("figure.png", "report.png"):
        (folder / old).touch()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        words = ["--output", folder, "--text", prose, *SHORT, "--diagnose"]
        assert run_demo(*words) == 130
    how = f"python -m optclip.demo --resume --output '{folder}' --diagnose\n"
    assert how in capsys.readouterr().err
    assert not (folder / "figure.png").exists()
    assert not (folder / "report.png").exists()

    assert run_demo("--resume", "--output", folder) == 0
    log = (folder / "metrics.jsonl").read_bytes()
    assert log == (finished / "metrics.jsonl").read_bytes()
    options = Options("stabilize", None, 0.01, STEPS, SEEDS, folder, prose)
    resumed, whole = newest_arrays(folder, options), newest_arrays(finished, options)
    for array, other in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(array, other)  # bad batches leave NaN


@pytest.mark.parametrize("method", clips.METHODS)
def test_every_method_trains(method):
    options = Options(method, clips.METHODS[method].threshold, 0.01, 3, 2, Path(), None)
    run = acts.plan(options)[2]
    assert run.name == f"optclip.{method}"
    progress = training.begin([run], options, TINY)
    codes = jax.numpy.asarray(text.encode(PROSE, TINY.symbols).codes)
    chunk = training.compile_chunk(run, options, TINY)
    record = training.advance(progress, [chunk], 3, codes).records[0]
    assert record["loss"].shape == (3, 10)
    assert np.isfinite(record["loss"]).all()
    assert len(np.unique(record["loss"])) > 2 * SEEDS


def test_diverged_runs_are_marked_in_table_figure_and_log(
    prose, tmp_path, monkeypatch, capsys
):
    advance = training.advance

    def explode(progress, *args):
        progress = advance(progress, *args)
        for name in ("loss", "norm_before"):  # without a clip, at the highest rate
            progress.records[0][name][2:, -2:] = np.nan
        return progress

    monkeypatch.setattr(training, "advance", explode)
    words = ["--output", tmp_path, "--text", prose, "--steps", 3, "--seeds", 2]
    assert run_demo(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [x for x in lines if x.startswith("1. loss at a learning rate of 0.1")]
    assert line.count("not finite") == 1
    last = [row for row in rows_of(tmp_path) if row["step"] == 2][: 5 * SEEDS]
    assert [i for i, row in enumerate(last) if row["nonfinite"]] == [8, 9]
    assert last[-1]["loss"] is last[-1]["norm_before"] is None


def test_entropy_and_token_codes_of_a_text():
    codes, entropy, _ = text.encode("aaaabbcd", 3)
    assert codes.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert entropy == pytest.approx(1.5 * np.log(2))
    assert text.load(None, 64).codes.shape == (450_000,)


def test_median_ranks_nonfinite_values_last():
    rows = np.array([[np.nan, 1.0, 2.0], [np.nan, np.inf, 2.0]])
    assert table.median(rows).tolist() == [2.0, np.inf]


def fails(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run_demo(*words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m optclip.demo: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "clip"], "choose from .*soft_clip"),
        (["--threshold", "1"], "--threshold does not apply to stabilize, which has"),
        (["--threshold", "-1"], "must be a number above 0, got '-1'"),
        (["--threshold", "nan"], "must be a number above 0, got 'nan'"),
        (["--threshold", "inf"], "must be a number above 0, got 'inf'"),
        (["--learning-rate", "-0.1"], "--learning-rate: must be a number above 0"),
        (["--learning-rate", "fast"], "must be a number above 0, got 'fast'"),
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["--steps", "1.5"], "must be a whole number of at least 1"),
        (["--seeds", "-2"], "--seeds: must be a whole number"),
        (["--output", ""], "must be a path"),
        (["--output", __file__], r"cannot be written to .*\. Name another folder"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
        (["--text", "/no/such"], r"cannot be read \(No such file.*Give a text file"),
    ],
)
def test_invalid_options_print_a_one_line_error(words, message, capsys):
    err = fails(capsys, *words)
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", "has 9 characters, which is too short"),
        (b"\xff\xfe\x00" * 500, "is not UTF-8 text"),
        (b"a" * 2000, "repeats one character"),
    ],
)
def test_invalid_texts_print_a_one_line_error(content, message, tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert message in fails(capsys, "--text", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["flax", "orbax.checkpoint", "matplotlib", "tqdm"])
def test_missing_extra_prints_a_one_line_error(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    message = f'needs {module}, not installed here. Run: pip install "optclip[demo]"'
    assert message in fails(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "7"], "--steps 7 differs from the checkpoint's (6). Leave it out"),
        (["--method", "soft_clip"], "the checkpoint's (stabilize)"),
        (["--threshold", "0.25"], "--threshold 0.25 differs"),
        (["--learning-rate", "1"], "--learning-rate 1.0 differs"),
        (["--text", "other.txt"], "differs from the checkpoint's"),
    ],
)
def test_resuming_with_other_options_prints_a_one_line_error(
    words, message, finished, capsys
):
    assert message in fails(capsys, "--resume", "--output", finished, *words)


def test_resuming_without_a_run_prints_a_one_line_error(tmp_path, capsys):
    assert "no checkpoint" in fails(capsys, "--resume", "--output", tmp_path)


def test_resuming_a_damaged_checkpoint_prints_a_one_line_error(
    finished, tmp_path, capsys
):
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / str(STEPS) / "progress")
    assert "cannot be read" in fails(capsys, "--resume", "--output", copy)


def test_resuming_with_a_changed_text_prints_a_one_line_error(
    finished, prose, capsys, monkeypatch
):
    monkeypatch.setattr(text, "_read", lambda path: PROSE.upper())
    words = ["--resume", "--output", finished, "--text", prose]
    assert "The text is not the one" in fails(capsys, *words)


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as caught:
        run_demo("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(method in out for method in clips.METHODS)
    assert max(map(len, out.splitlines())) <= 80


def test_demo_runs_as_a_module_and_is_not_imported_by_the_library(finished):
    code = """
import runpy, sys, optclip
assert not {"flax", "matplotlib", "optclip.demo"} & set(sys.modules)
runpy.run_module("optclip.demo", run_name="__main__", alter_sys=True)
"""
    words = [sys.executable, "-W", "error", "-c", code]
    words += ["--resume", "--output", str(finished)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "What to try next" in done.stdout
