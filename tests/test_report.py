"""The report: reading logs, the headline, the page and the plot."""

import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")

import optclip
from optclip.diagnosis import __main__ as command
from optclip.diagnosis.findings import Diagnosis, Finding, Remedy
from optclip.diagnosis.page import write_report
from optclip.diagnosis.records import read_run
from optclip.diagnosis.summary import diverged_at, headline, pick
from optclip.telemetry import NonfiniteLeaf

NAN, INF = float("nan"), float("inf")


class Site(NamedTuple):
    """The fields of a site that the plots use."""

    leaf: str
    order: int
    signal_out: Any


def only(source):
    (run,) = read_run(source)
    return run


def log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(step, norm=1.0, **others):
    """Returns a row of the demo's log; JSON represents non-finite values as None."""
    own = {"run": "a", "seed": 0, "step": step, "loss": 2.0, "norm_before": norm}
    return own | {"threshold": 1.5, "clipped": float((norm or 0) > 1.5)} | others


# --- reading --------------------------------------------------------------------------


def test_reads_the_demos_log(tmp_path):
    rows = [
        row(0),
        row(1, 3.0),
        row(2, None, loss=None),
        row(0, seed=1),
        row(0, run="b"),
    ]
    log(tmp_path / "metrics.jsonl", rows)
    first, second, third = read_run(tmp_path)
    assert (first.name, first.seed, first.title) == ("a", "0", "a, seed 0")
    assert (second.title, third.title) == ("a, seed 1", "b, seed 0")
    assert first.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(first.norms, [1.0, 3.0, NAN])
    np.testing.assert_array_equal(first.losses, [2.0, 2.0, NAN])
    assert first.thresholds.tolist() == [1.5] * 3
    assert first.clipped.tolist() == [False, True, False]
    assert first.nonfinite.tolist() == [False, False, True]
    assert first.skipped is None
    assert {first.norms.dtype, first.losses.dtype} == {np.dtype("float64")}


def test_reads_what_metrics_returns(tmp_path):
    chain = optax.chain(optclip.clip_by_global_norm(6.0), optax.sgd(0.1))
    tx = optclip.skip_steps(chain, when=100.0)
    state, history, params = tx.init(jnp.ones(2)), [], jnp.ones(2)
    update = jax.jit(tx.update)
    for scale in (1.0, 2.0, 1e3, NAN, 1.0):
        grads = jnp.array([3.0, 4.0]) * scale
        _, state = update(grads, state, params, loss=scale)
        history.append({k: float(x) for k, x in optclip.metrics(state).items()})
    run = only(history)
    np.testing.assert_array_equal(run.norms, [5.0, 10.0, 5000.0, NAN, 5.0])
    np.testing.assert_array_equal(run.losses, [1.0, 2.0, 1e3, NAN, 1.0])
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.thresholds.tolist() == [6.0] * 5
    # The clip did not see steps 2 and 3, so its metrics are those of step 1.
    assert run.clipped.tolist() == [False, True, False, False, False]
    assert run.skipped.tolist() == [False, False, True, True, False]
    assert run.nonfinite.tolist() == [False, False, False, True, False]
    path = log(tmp_path / "mine.jsonl", history)
    for source in (path, str(path), tmp_path):
        np.testing.assert_array_equal(only(source).norms, run.norms)
    arrays = {key: np.array([r[key] for r in history]) for key in history[0]}
    np.testing.assert_array_equal(only(arrays).clipped, run.clipped)


def test_finds_a_clip_with_another_prefix_and_no_leaf():
    rows = {
        "blocks/w/norm_before": [7.0],
        "train/mine/norm_before": [3.0],
        "train/mine/threshold": [2.0],
        "train/mine/clipped_steps": [1],
        "step": [41],
        "train/loss": [0.5],
    }
    run = only(rows)
    assert (run.norms.tolist(), run.thresholds.tolist()) == ([3.0], [2.0])
    assert (run.steps.tolist(), run.losses.tolist()) == ([41], [0.5])
    assert run.clipped.tolist() == [True]


def test_counters_cover_steps_that_were_not_logged():
    columns = {"clip/norm_before": [1.0] * 4, "step": [10, 20, 30, 40]}
    counts = {"clip/clipped_steps": [3, 3, 5, 2], "clip/nonfinite_steps": [0, 1, 1, 1]}
    run = only(columns | counts)
    assert run.clipped.tolist() == [False, False, True, False]
    assert run.nonfinite.tolist() == [False, True, False, False]


def test_list_of_norms_is_a_run():
    run = only(jnp.array([1.0, INF, 2.0]))
    assert run.steps.tolist() == [0, 1, 2]
    assert run.nonfinite.tolist() == [False, True, False]
    assert run.losses is run.thresholds is run.clipped is run.skipped is None


def test_evaluation_rows_are_ignored_and_the_last_row_of_a_step_wins(tmp_path):
    rows = [row(0), row(1), {"step": 1, "eval_loss": 3.0, "run": "a", "seed": 0}]
    rows += [row(2, 5.0), row(1, 2.0), row(2, 3.0)]
    run = only(log(tmp_path / "log.jsonl", rows))
    assert run.steps.tolist() == [0, 1, 2]
    assert run.norms.tolist() == [1.0, 2.0, 3.0]


def test_missing_loss_is_not_a_nonfinite_loss():
    rows = [{"norm": 1.0, "loss": 2.0}, {"norm": 1.0}, {"norm": 1.0, "loss": None}]
    assert only(rows).nonfinite.tolist() == [False, False, True]


def test_incomplete_last_line_is_ignored(tmp_path):
    path = log(tmp_path / "metrics.jsonl", [row(0), row(1)])
    path.write_text(path.read_text() + '{"run": "a", "se')
    assert only(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no metrics\.jsonl\. Name the file"),
        ("", "has no rows: nothing was recorded"),
        ("\n\n", "has no rows"),
        ("step,norm\n0,1\n", "line 1 is no JSON object"),
        ("[1, 2]\n", "line 1 is no JSON object"),
        ('{"norm": 1}\n{"no\n{"norm": 1}\n', "line 2 is no JSON object"),
        ('{"loss": 1}\n', "has no gradient norm: none of skip/norm, clip/norm_before"),
        ('{"norm": "x"}\n', r"'norm' must be a number, got 'x'"),
        (b"\xff\xfe\x00", r"is not UTF-8 text \(byte 0\)"),
    ],
)
def test_invalid_logs_raise_errors(content, message, tmp_path):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "no/such/run",
            ValueError,
            "does not exist. Name the folder of a recorded run",
        ),
        ([], ValueError, "has no rows"),
        (3.0, TypeError, "A run must be a folder, a log, .* got float"),
        (
            {"norm": [1.0], "loss": [1.0, 2.0]},
            ValueError,
            r"one entry a step, got norm",
        ),
        (np.ones((2, 2)), ValueError, r"one entry a step, got norm \(2, 2\)"),
        ({"loss": [1.0]}, ValueError, "The mapping has no gradient norm"),
    ],
)
def test_invalid_sources_raise_errors(source, error, message):
    with pytest.raises(error, match=message):
        read_run(source)


# --- in one sentence ------------------------------------------------------------------


def steps(number, **changed):
    """Returns columns of a run with falling loss, changed by {column: {step: x}}."""
    columns = {
        "norm": np.ones(number),
        "loss": np.linspace(2.0, 1.0, number),
        "threshold": np.full(number, 1.5),
    }
    for name, entries in changed.items():
        for at, value in entries.items():
            at = slice(*at) if isinstance(at, tuple) else at
            columns[name][at] = value
    return columns


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (steps(600), "None of 600 steps clipped; all finite."),
        ({"norm": [1.0]}, "1 step without a clip; all finite."),
        (
            steps(600, norm={(0, 412): 2.0, 500: NAN}),
            "412 of 600 steps clipped; 1 step not finite.",
        ),
        (
            steps(600, loss={(87, None): NAN}),
            "None of 600 steps clipped; 513 steps not finite; diverged at step 87, not "
            "finite from there on.",
        ),
        (
            steps(100, loss={(87, None): 9.0}),
            "None of 100 steps clipped; all finite; diverged at step 87: the loss "
            "stayed above 2, where it began.",
        ),
        (
            steps(100, loss={(95, None): 9.0}),
            "None of 100 steps clipped; all finite.",
        ),
        (
            {"norm": [NAN, INF]},
            "2 steps without a clip; not one of them finite; diverged at step 0, not "
            "finite from there on.",
        ),
        (
            {"norm": [0.0, 1.0], "step": [0, 50]},
            "2 recorded steps without a clip; all finite; 1 gradient of norm 0.",
        ),
    ],
)
def test_headline(columns, sentence):
    assert headline(only(columns)) == sentence


def test_skipped_steps_do_not_make_a_run_diverge():
    columns = steps(30, norm={(20, None): NAN})
    columns["skip/skipped_steps"] = np.maximum(np.arange(30) - 19, 0)
    run = only(columns)
    assert diverged_at(run) is None
    said = "None of 30 steps clipped; 10 left out; 10 steps not finite."
    assert headline(run) == said


def test_picks_informative_panels():
    quiet = only(steps(30))
    bad = only(steps(30, norm={3: NAN}))
    lost = only(steps(30, norm={(9, None): NAN}))
    assert pick([quiet, bad, lost]) is lost
    assert pick([quiet, bad]) is bad
    assert pick([quiet, quiet]) is quiet


def test_picks_requested_panels(tmp_path):
    rows = [row(0, run=name, seed=seed) for name in ("a", "b") for seed in (0, 1)]
    runs = read_run(log(tmp_path / "log.jsonl", rows))
    assert pick(runs, "b").title == "b, seed 0"
    assert pick(runs, "b", 1).title == "b, seed 1"
    with pytest.raises(
        ValueError, match=r"There is no run 'c', seed 1\. There are: a, s"
    ):
        pick(runs, "c", 1)
    with pytest.raises(
        ValueError, match=r"no run seed 7\. .* a, seeds 0, 1; b, seeds 0, 1"
    ):
        pick(runs, seed="7")


# --- the page -------------------------------------------------------------------------

DEEP = tuple(Site(f"layers/{i}/kernel", i, 10.0 ** (4 - i)) for i in range(4))
TALL = tuple(Site(f"layers/{i}/kernel", i, 1.1**i) for i in range(30))
TIME = tuple(
    Site(f"cell_{i}", i, tuple(1.2 ** np.arange(40.0, 0, -1))) for i in range(2)
)
HEAT = tuple(Site(f"cell_{i}", i, tuple(1.2 ** np.arange(200.0))) for i in range(8))
BROKEN = (Site("a", 0, NAN), Site("b", 1, INF), Site("c", 2, 1.0), Site("d", 3, 3.0))
TRAP = "<script>&\"'</script> $x_1$"


ADVICE = Remedy("clip", 1.0, advice="Use `clip`.")


def diagnosis(sites, cause="recurrence"):
    finding = Finding(cause, ("w",) * 9, TRAP, (ADVICE,), "high")
    return Diagnosis((finding,), {"sites": sites}, ("2 of 5 matmuls",))


def noisy(number):
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, number))
    return {"norm": norms, "loss": 1 / (1 + norms), "threshold": np.ones(number)}


def spiky():
    columns = noisy(600)
    columns["norm"][[50, 300]] *= 1e5
    columns["norm"][[100, 101]] = NAN
    columns["skip/skipped_steps"] = np.cumsum(np.isin(np.arange(600), [50, 100, 101]))
    return columns


BAD = [
    NonfiniteLeaf("w", 3, True, True, False, NAN, 2.0),
    NonfiniteLeaf(None, 4, False, False, False, 3.0, INF),
]
PAGES = {
    "healthy": (noisy(600), Diagnosis((), {"sites": DEEP}), None),
    "spikes": (spiky(), diagnosis((*BROKEN, *TIME)), BAD),
    "diverged": (steps(200, norm={(87, None): NAN}), diagnosis(TALL), None),
    "five": (noisy(5), None, None),
    "all not finite": ({"norm": [NAN] * 30}, None, BAD * 5),
    "long": (noisy(5000), diagnosis(HEAT, "depth"), None),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Text of each page and the folder of its files; each is made when first used."""
    made = {}

    def page(name):
        if name not in made:
            columns, found, nonfinite_leaves = PAGES[name]
            folder = tmp_path_factory.mktemp("page") / "new" / "folder"
            made[name] = write_report(
                columns,
                diagnosis=found,
                nonfinite_leaves=nonfinite_leaves,
                output=folder,
            )
        png, path = made[name]
        return png, path.read_text(encoding="utf-8")

    return page


class Words(html.parser.HTMLParser):
    """Collects the visible text."""

    def __init__(self, page):
        super().__init__()
        self.words, self.inside = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if not {"style", "head"} & set(self.inside):
            self.words.append(data)


def words_of(page):
    return " ".join(" ".join(Words(page).words).split())


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed_and_self_contained(name, pages):
    png, page = pages(name)
    assert png.read_bytes().startswith(b"\x89PNG")
    tree = ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    names = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(names) == len(set(names))
    assert "<script" not in page
    assert "http" not in page
    assert "@import" not in page
    references = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', page)
    assert all((a or b).startswith("#") for a, b in references)
    assert {(a or b)[1:] for a, b in references} <= set(names)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_shows_nan_as_a_value(name, pages):
    words = words_of(pages(name)[1])
    assert not re.search(r"\bnan\b|\binf\b(?<!\+inf)", words)
    assert not re.search(r"\d NaN", words)


PANELS = {
    "healthy": ["Gradient norm", "Backward signal by depth", "How the norms"],
    "spikes": [
        "Gradient norm",
        "Backward signal by depth",
        "Backward signal over",
        "How the norms",
    ],
    "diverged": ["Gradient norm", "Backward signal by depth", "How the norms"],
    "five": ["Gradient norm"],
    "all not finite": [],
    "long": ["Gradient norm", "Backward signal over", "How the norms"],
}


@pytest.mark.parametrize("name", PAGES)
def test_panels_without_data_are_left_out(name, pages):
    tree = ET.fromstring(pages(name)[1].removeprefix("<!DOCTYPE html>\n"))
    drawn = [
        s.findtext("h2") for s in tree.iter("section") if s.find("svg") is not None
    ]
    assert len(drawn) == len(PANELS[name])
    assert all(map(str.startswith, drawn, PANELS[name]))
    assert all(svg.get("aria-label") for svg in tree.iter("svg"))


def test_page_contains_the_findings(pages):
    words = words_of(pages("spikes")[1])
    assert "3 left out; 2 steps not finite." in words
    assert (
        "1. The signal grows from step to step of a recurrence (severity: high; pr"
        in words
    )
    assert "w, w, w, w, w, w and 3 more" in words
    assert TRAP in words
    assert "Use clip ." in words
    assert "Not seen: 2 of 5 matmuls" in words
    assert "Step 3 held NaN, +inf; gradient norm not finite; loss 2" in words
    assert "the loss Step 4 gradient norm 3; loss not finite" in words
    assert "Clip at a gradient norm of 0.9" in words
    assert "and 2 more" in words_of(pages("all not finite")[1])


def test_suggested_threshold_uses_the_steps_before_divergence(pages):
    assert "Only steps before it diverged, at step 87, count" in words_of(
        pages("diverged")[1]
    )
    columns = steps(100, norm={(5, None): NAN})
    from optclip.diagnosis._contents import suggestion_of

    declined = suggestion_of(only(columns), None).declined
    assert declined.startswith("5 usable norms are too few")
    assert declined.endswith("Only steps before it diverged, at step 5, count.")


def test_open_cause_suppresses_the_suggested_threshold(pages):
    words = words_of(pages("long")[1])
    assert "No threshold is suggested: the diagnosis has an open finding" in words


def test_output_is_byte_identical_regardless_of_matplotlib_style(pages, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        png, page = write_report(PAGES["five"][0], output=tmp_path)
        assert dict(matplotlib.rcParams) == before
    first, text = pages("five")
    assert page.read_text(encoding="utf-8") == text
    assert png.read_bytes() == first.read_bytes()


def test_report_of_several_runs_shows_the_diverged_one(tmp_path):
    rows = [row(i, run=name) for name in ("a", "b") for i in range(4)]
    rows[-1]["norm_before"] = None
    log(tmp_path / "metrics.jsonl", rows)
    _, page = write_report(tmp_path, output=tmp_path)
    assert "Gradient report: b, seed 0" in page.read_text()


def test_invalid_arguments_raise_errors(tmp_path):
    norms = [1.0, 2.0]
    with pytest.raises(TypeError, match="`diagnosis` must be a Diagnosis of"):
        write_report(norms, diagnosis=[], output=tmp_path)
    with pytest.raises(TypeError, match="`output` must be a folder, got None"):
        write_report(norms, output=None)
    with pytest.raises(ValueError, match=r"cannot be written to .*\. Name another"):
        write_report(norms, output=__file__)


def test_missing_matplotlib_raises_an_error_naming_the_package(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.startswith("optclip.diagnosis._panels")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("optclip.diagnosis.pictures", "optclip.diagnosis"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "optclip\[report\]"'):
        write_report([1.0], output=tmp_path)


# --- the command line -----------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    rows = [row(i, 1.0 + i % 2, run=name) for name in ("a", "b") for i in range(12)]
    log(tmp_path / "metrics.jsonl", rows)
    return tmp_path


def test_command_writes_the_report_of_a_folder(recorded, tmp_path, capsys):
    assert command.main([str(recorded)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "a, seed 0: 6 of 12 steps clipped; all finite.\nClip at 1.5 ("
    )
    assert "Others in it, for --run and --seed: b, seed 0." in out
    assert f"Wrote {recorded / 'report.png'} and {recorded / 'report.html'}." in out
    other = tmp_path / "other"
    words = [str(recorded / "metrics.jsonl"), "--run", "b", "--seed", "0"]
    assert command.main([*words, "--output", str(other)]) == 0
    assert capsys.readouterr().out.startswith("b, seed 0: ")
    assert (other / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN_FOLDER"),
        (["no/such"], "no/such does not exist. Name the folder of a recorded run."),
        ([""], "must be a path, got an empty one"),
        (
            ["RUN", "--run", "c"],
            "There is no run 'c'. There are: a, seed 0; b, seed 0.",
        ),
        (["RUN", "--output", __file__], "cannot be written to"),
        (["RUN", "--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_invalid_command_prints_a_one_line_error(words, message, recorded, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main([str(recorded) if word == "RUN" else word for word in words])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m optclip.diagnosis: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
