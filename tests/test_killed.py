"""Runs that are killed and resume, with one process and with several."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "multihost.py"
# Runs share a compilation cache.
CACHE = tempfile.mkdtemp(prefix="optclip-compiled-")
QUIET = {
    "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE,
}  # fmt: skip


def environment():
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, **QUIET, "PYTHONPATH": path}


def start(*arguments, **variables):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env={**environment(), **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def killed_after(process, line):
    """Kills a process once it prints a matching line; returns its output."""
    said = []
    for text in process.stdout:
        said.append(text)
        if re.search(line, text):
            process.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail("it ended by itself:\n" + "".join(said[-20:]))
    process.communicate(timeout=60)
    return "".join(said)


def finished(process, seconds=600):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.mark.slow
def test_killed_run_resumes_bitwise_identically(tmp_path):
    run, steps = TESTS / "resumed_run.py", 30
    finished(start(run, tmp_path / "whole", steps, tmp_path / "whole.npz"))
    rng = np.random.default_rng()
    stops = sorted(rng.choice(np.arange(5, 28), 2, replace=False))
    print(f"killed after steps {stops}")
    for stop in stops:
        process = start(run, tmp_path / "cut", steps, tmp_path / "cut.npz", 0.05)
        killed_after(process, rf"done {stop}\b")
    last = finished(start(run, tmp_path / "cut", steps, tmp_path / "cut.npz"))
    assert re.search(r"from [1-9]", last)
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        assert len(whole.files) > 100
        for name in whole.files:
            assert whole[name].tobytes() == cut[name].tobytes()


def sums(said):
    found = re.search(r"in ([\d.e+-]+), out ([\d.e+-]+)", said)
    return [float(x) for x in found.groups()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "data"])
def test_two_processes_train_like_one(layout):
    options = ("--steps", 8, "--layout", layout)
    one = finished(start(EXAMPLE, *options, "--devices", 8))
    two = finished(start(EXAMPLE, *options, "--processes", 2, "--devices", 4))
    assert "2 processes, 8 devices" in two
    assert "skipped 1" in two  # both know of the NaN in one shard
    for said in (one, two):
        assert "step   3  left out: 4096 NaN in in" in said
    np.testing.assert_allclose(sums(two), sums(one), rtol=1e-6)


def children_after(launcher, line):
    """Returns the processes that a launcher started, once it has printed the line."""
    for text in launcher.stdout:
        if re.search(line, text):
            break
    listed = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(child) for child in listed.read_text().split()]


@pytest.mark.slow
def test_two_slurm_processes_connect_with_assigned_devices():
    ports = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    each = [
        start(EXAMPLE, "--steps", 2, "--devices", 2, SLURM_NTASKS="2",
              SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **ports)
        for i in range(2)
    ]  # fmt: skip
    said = [finished(process) for process in each]
    assert "2 processes, 4 devices" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_launcher_ends_all_processes_without_a_traceback(number):
    options = ("--processes", 2, "--devices", 1, "--steps", 1000, "--pause", 0.1)
    launcher = start(EXAMPLE, *options)
    children = children_after(launcher, r"step +1 ")
    launcher.send_signal(number)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number
    assert "Traceback" not in said
    assert len(children) == 2
    assert not any(pathlib.Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_single_process_trains_without_orbax(tmp_path):
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "__init__.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    said = finished(start(EXAMPLE, "--steps", 1, PYTHONPATH=path))
    assert "this is the only process" in said
    assert "1 processes" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--processes", 2, "--process", 0), "No other process was found"),
        (("--process", 0), "give each process --coordinator"),
        (("--processes", 0), "must be at least 1, got 0"),
        (("--save-every", 0), "must be at least 1, got 0"),
    ],
)
def test_inconsistent_options_raise_errors(options, message):
    process = start(EXAMPLE, *options)
    said, _ = process.communicate(timeout=120)
    assert process.returncode
    assert message in said
    assert "Traceback" not in said


def test_srun_and_the_launcher_do_not_both_start_processes():
    process = start(EXAMPLE, "--processes", 2, SLURM_STEP_NUM_TASKS="2")
    said, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "leave out --processes" in said


@pytest.mark.slow
def test_killed_process_ends_the_other_and_the_run_resumes(tmp_path):
    options = ("--steps", 24, "--checkpoint", tmp_path / "cut", "--save-every", 4)
    two = ("--processes", 2, "--devices", 4)
    whole = finished(start(EXAMPLE, "--steps", 24, *two))
    launcher = start(EXAMPLE, *options, *two, "--pause", 0.3)
    children = children_after(launcher, r"step +10")
    os.kill(children[1], signal.SIGKILL)
    began = time.monotonic()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, said[-2000:]
    assert time.monotonic() - began < 60
    again = finished(start(EXAMPLE, *options, *two))
    assert not re.search(r"step +3  loss", again)  # it did not start from scratch
    assert sums(again) == sums(whole)
