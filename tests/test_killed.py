"""Runs that are killed, and go on: one process, and several."""

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
# What one run compiled, the next need not.
CACHE = tempfile.mkdtemp(prefix="optclip-compiled-")
QUIET = {
    "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE,
}  # fmt: skip


def environment():
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, **QUIET, "PYTHONPATH": path}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def killed_after(process, line):
    """Kills a process once it has printed a line that matches; returns what it said."""
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


def finished(process, seconds=240):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise_as_if_it_had_not_been(tmp_path):
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
def test_two_processes_train_as_one_does(layout):
    options = ("--steps", 8, "--layout", layout)
    one = finished(start(EXAMPLE, *options, "--devices", 8))
    two = finished(start(EXAMPLE, *options, "--processes", 2, "--devices", 4))
    assert "2 processes, 8 devices" in two
    assert "skipped 1" in two  # the NaN in one shard is known to both
    np.testing.assert_allclose(sums(two), sums(one), rtol=1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path):
    options = ("--steps", 24, "--checkpoint", tmp_path / "cut", "--save-every", 4)
    two = ("--processes", 2, "--devices", 4)
    whole = finished(start(EXAMPLE, "--steps", 24, *two))
    launcher = start(EXAMPLE, *options, *two, "--pause", 0.3)
    for text in launcher.stdout:
        if re.search(r"step +10", text):
            break
    children = pathlib.Path(
        f"/proc/{launcher.pid}/task/{launcher.pid}/children"
    ).read_text().split()  # fmt: skip
    os.kill(int(children[1]), signal.SIGKILL)
    began = time.monotonic()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, said[-2000:]
    assert time.monotonic() - began < 60
    again = finished(start(EXAMPLE, *options, *two))
    assert not re.search(r"step +3 ", again)  # it did not begin anew
    assert sums(again) == sums(whole)
