"""Unusual logs, names and folders that a report must handle."""

import json
import math
import os
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import __main__ as command
from optclip.diagnosis.records import read_run
from optclip.diagnosis.taps import Site


def log(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def fails(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(folder)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_numbers_beyond_the_float_range(tmp_path, capsys):
    rows = [{"norm": 10**400}, *({"norm": x} for x in [1.0, 1e100, 1e200] * 10)]
    rows = [{**row, "threshold": 1e250} for row in rows]
    assert command.main([str(log(tmp_path, rows))]) == 0
    assert "1 step not finite" in capsys.readouterr().out
    said = str(optclip.diagnosis.suggest_threshold([1e-300, 1e300] * 20))
    assert "a factor of 1e+600" in said


def test_step_numbers_beyond_int64_are_renumbered(tmp_path):
    rows = [{"step": 10**30 + i, "norm": 1.0} for i in range(30)]
    assert command.main([str(log(tmp_path, rows))]) == 0


def test_metrics_of_a_warm_up_are_valid_json_and_no_threshold_is_drawn(tmp_path):
    tx = optclip.zclip(warmup_steps=3, max_grad_norm=None)
    state, rows = tx.init(jnp.ones(2)), []
    for size in [1.0, 1.1, 0.9, 1.0, np.nan, 50.0, 1.0]:
        _, state = tx.update(jnp.full(2, size), state)
        row = {k: float(x) for k, x in jax.device_get(optclip.metrics(state)).items()}
        rows.append({k: x if math.isfinite(x) else None for k, x in row.items()})
        json.dumps(rows[-1], allow_nan=False)
    missing = [row["clip/threshold"] > 3.4e38 for row in rows]
    assert missing == [True, True, True, False, False, False, False]
    (run,) = read_run(log(tmp_path, rows))
    assert np.isnan(run.thresholds).tolist() == missing
    assert run.nonfinite.tolist() == [False] * 4 + [True, False, False]
    assert run.clipped.tolist() == [False] * 5 + [True, False]
    assert command.main([str(tmp_path)]) == 0


@pytest.mark.parametrize("prefix", ["clip", "critic"])
@pytest.mark.parametrize("grouped", [False, True])
def test_metrics_with_prefixes_and_groups_are_read(prefix, grouped):
    tx = optclip.skip_steps(optax.sgd(0.1), when=3.0)
    tx = optax.partition({"all": tx}, "all") if grouped else tx
    state, rows = tx.init(jnp.ones(1)), []
    for size in [1.0, 2.0, 5.0, 1.0]:
        _, state = tx.update(jnp.full(1, size), state)
        rows.append(jax.device_get(optclip.metrics(state, prefix=prefix)))
    (run,) = read_run(rows)
    assert run.norms.tolist() == [1.0, 2.0, 5.0, 1.0]
    assert run.skipped.tolist() == [False, False, True, False]
    assert run.thresholds.tolist() == [3.0] * 4


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, "x"])
def test_invalid_lines_are_named(tmp_path, capsys, line):
    rows = [{"norm": 1.0}, line, {"norm": 1.0}]
    assert "line 2 is no JSON object" in fails(log(tmp_path, rows), capsys)


def test_negative_norm_is_reported_by_its_key(tmp_path, capsys):
    rows = [{"norm": 1.0}, {"norm": -2.0}]
    assert "'norm' must be a norm" in fails(log(tmp_path, rows), capsys)


NAMES = ["$\\frac{$", "a$b$c_{", "\x00\x07", "\x1b[31mred", "\ud800", "<script>&'\""]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_can_be_shown(tmp_path, capsys, name):
    numbers = dict(
        fan_in=4, fan_out=4, rms_in=1.0, rms_out=1.0, rms_weight=1.0, signal_in=1.0,
        signal_out=1.0, dtype="float32", activation=None, source=None, stacked=False,
    )  # fmt: skip
    sites = tuple(Site(name, (name,), "matmul", i, **numbers) for i in range(3))
    finding = optclip.diagnosis.Finding(
        "depth",
        (name,),
        name,
        (optclip.diagnosis.Remedy("advice", advice=name),),
        "high",
    )
    found = optclip.diagnosis.Diagnosis((finding,), {"sites": sites})
    rows = [{"run": name, "norm": 1.0 + i} for i in range(12)]
    _, page = optclip.diagnosis.write_report(rows, diagnosis=found, output=tmp_path)
    text = page.read_text(encoding="utf-8")
    xml.etree.ElementTree.fromstring(text.replace("<!DOCTYPE html>", ""))
    assert "<script" not in text
    assert command.main([str(log(tmp_path / "run", rows))]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_report_does_not_write_through_a_symlink(tmp_path):
    victim, folder = tmp_path / "victim.txt", tmp_path / "run"
    victim.write_text("mine")
    os.symlink(victim, log(folder, [{"norm": 1.0}] * 12) / "report.html")
    assert command.main([str(folder)]) == 0
    assert victim.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()
    assert sorted(x.suffix for x in folder.iterdir()) == [".html", ".jsonl", ".png"]


def test_constant_signal_is_drawn_as_constant(tmp_path):
    from optclip.diagnosis._axes import log_axis

    matplotlib = pytest.importorskip("matplotlib.figure")
    axes = matplotlib.Figure().subplots()
    log_axis(axes.yaxis, np.array([0.9, 1.1]), least=1.5)
    low, high = axes.get_ylim()
    assert np.log10(high / low) > 1.5
