"""The post-mortem page: what is read back, what downsampling keeps, what the page says, and that it works in a browser."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lossguard import Evidence, Finding, Guard, History, Severity, TrainingHalted, report
from lossguard.cli import main
from lossguard.findings import DIAGNOSES
from lossguard.record import Reader
from lossguard.report import markup, payload, reading, words
from lossguard.report.downsample import NAN, NEGATIVE, POSITIVE, Grid, envelope, flags_of

anything = st.floats(allow_nan=True, allow_infinity=True, width=32)
needs_plotly = pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is not installed")


def train(folder=None, *, lr=0.1, steps=80, poison=None, halt=None, validate=False, seed=0, guard_of=None):
    """A small classifier on fixed data; returns its closed guard."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x = torch.randn(256, 8)
    y = (x[:, :3]).argmax(dim=1)
    with Guard(model, optimizer, record=folder, halt=halt) as guard:
        for step in range(steps):
            chosen = torch.randint(256, (32,))
            inputs = x[chosen]
            if step == poison:
                inputs = inputs * math.nan
            guard.batch(inputs, y[chosen])
            loss = torch.nn.functional.cross_entropy(model(inputs), y[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
            if validate and step % 10 == 9:
                guard.validation(loss.detach())
    return guard


def block(text):
    return gzip.decompress(base64.b64decode(text))


# ---- downsampling


@given(hnp.arrays(np.float64, st.integers(0, 200), elements=anything), st.integers(1, 40))
def test_a_curve_keeps_what_stands_out(values, buckets):
    """Of every bucket of a curve the least, the greatest and each kind of non-finite number survive; buckets cover all steps once."""
    steps = np.arange(len(values)) * 3 + 1
    curve = envelope(steps, values, buckets)
    assert len(curve.first) <= buckets
    covered = np.zeros(len(values), dtype=int)
    for k in range(len(curve.first)):
        inside = (steps >= curve.first[k]) & (steps <= curve.last[k])
        covered += inside
        bucket = values[inside]
        finite = bucket[np.isfinite(bucket)]
        assert np.array_equal(curve.low[k], finite.min() if finite.size else np.nan, equal_nan=True)
        assert np.array_equal(curve.high[k], finite.max() if finite.size else np.nan, equal_nan=True)
        assert np.array_equal(curve.middle[k], np.sort(finite)[(finite.size - 1) // 2] if finite.size else np.nan, equal_nan=True)
        assert bool(curve.flags[k] & NAN) == bool(np.isnan(bucket).any())
        assert bool(curve.flags[k] & POSITIVE) == bool((bucket == np.inf).any())
        assert bool(curve.flags[k] & NEGATIVE) == bool((bucket == -np.inf).any())
    assert (covered == 1).all()


@settings(max_examples=60)
@given(st.data(), st.integers(0, 90), st.integers(1, 4), st.sampled_from([2, 4, 10]))
def test_a_grid_keeps_what_stands_out(data, samples, sites, limit):
    """However many samples come, a grid has at most its limit of buckets, and each holds its least, greatest and non-finite numbers exactly."""
    values = data.draw(hnp.arrays(np.float64, (samples, sites), elements=anything))
    seen = data.draw(hnp.arrays(np.bool_, (samples, sites)))
    steps = np.cumsum(data.draw(hnp.arrays(np.int64, samples, elements=st.integers(1, 9))))
    grid = Grid(limit)
    for k in range(samples):
        grid.add(int(steps[k]), values[k], seen[k])
    assert len(grid.first) <= limit
    assert len(grid.first) > limit // 2 or samples <= limit
    assert grid.samples.sum() == samples
    for k in range(len(grid.first)):
        inside = (steps >= grid.first[k]) & (steps <= grid.last[k])
        assert inside.sum() == grid.samples[k]
        for site in range(sites):
            bucket = values[inside, site][seen[inside, site]]
            finite = bucket[np.isfinite(bucket)]
            assert np.array_equal(grid.low[k, site], finite.min() if finite.size else np.nan, equal_nan=True)
            assert np.array_equal(grid.high[k, site], finite.max() if finite.size else np.nan, equal_nan=True)
            assert grid.flags[k, site] == (np.bitwise_or.reduce(flags_of(bucket)) if bucket.size else 0)


def test_a_grid_takes_sites_that_come_late():
    """A site first seen in a later sample reads as not measured before."""
    grid = Grid(4)
    grid.add(0, np.array([1.0]), np.array([True]))
    grid.add(1, np.array([2.0, 3.0]), np.array([True, True]))
    assert np.isnan(grid.low[0, 1])
    assert grid.low[1].tolist() == [2.0, 3.0]


@given(hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(allow_nan=True, allow_infinity=False)))
def test_rounding_for_the_page(values):
    """Rounded numbers are within 1 / 4096 of the true ones, finite where these are, and in the same order."""
    short = payload.rounded(values).astype(np.float64)
    assert (np.isnan(short) == np.isnan(values)).all()
    assert not np.isinf(short).any()
    usual = np.isfinite(values) & (np.abs(values) < 3e38) & (np.abs(values) > 1e-37)
    assert (np.abs(short[usual] - values[usual]) <= np.abs(values[usual]) / 4096).all()
    order = np.argsort(values[np.isfinite(values)], kind="stable")
    assert (np.diff(short[np.isfinite(values)][order]) >= 0).all()


def test_wrong_use_of_downsampling():
    """Arrays that do not fit and odd limits are refused in words."""
    with pytest.raises(ValueError, match="2 steps and 3 values"):
        envelope(np.arange(2), np.zeros(3), 4)
    with pytest.raises(ValueError, match="even number of at least 2"):
        Grid(3)


# ---- what is read back


def test_a_record_gives_what_the_guard_saw(tmp_path):
    """Losses, samples with their derived signals, names, facts and coverage come back from the record as the guard held them."""
    guard = train(tmp_path, validate=True)
    run, live = reading.from_record(tmp_path), reading.from_history(guard.history, {"steps": 80}, "live")
    assert run.ended
    assert run.facts["model"] == "Sequential"
    assert run.facts["devices"] == ["cpu"]
    assert run.facts["verdict"] == guard.verdict == run.state
    assert run.coverage["observed"] == guard.coverage.observed
    assert (run.steps, run.samples) == (80, guard.history.samples)
    assert run.rows == live.rows
    assert list(run.grids) == list(live.grids)
    assert {"grad_norm", "update_ratio", "dead_fraction", "activation_rms"} <= set(run.grids)
    for name, grid in run.grids.items():
        np.testing.assert_allclose(grid.high, live.grids[name].high, rtol=1e-5)
        assert grid.first.tolist() == live.grids[name].first.tolist()
    np.testing.assert_allclose(run.curves["loss"].middle, guard.history.losses(), rtol=1e-5)
    np.testing.assert_allclose(run.validations, guard.history.validations()[:, :2], rtol=1e-5)


def test_a_record_of_an_older_version_is_read(tmp_path):
    """A summary without facts and coverage, as older versions wrote it, is read, and the page says that coverage is not known."""
    train(tmp_path)
    path = tmp_path / "findings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("facts", None), line.pop("coverage", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = reading.from_record(tmp_path)
    assert run.ended
    assert run.steps == 80
    assert "what was not observed is not known" in markup.coverage([run])


def test_weights_that_begin_at_zero_are_no_fault(tmp_path):
    """While weights are all zero an update has no ratio to them: the heat map shows nothing there, and nothing infinite."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer, record=tmp_path) as guard:
        for _ in range(5):
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(1.0)
    assert np.isinf(guard.history.last("update_ratio")[0, 1])
    for run in (reading.from_record(tmp_path), reading.from_history(guard.history, {}, "live")):
        grid = run.grids["update_ratio"]
        assert not grid.flags.any()
        assert np.isnan(grid.high[0, 1])
        assert grid.high[1:, 1].min() > 0


def test_a_killed_run_says_so(tmp_path):
    """A record without its end is shown as far as it goes, and the page says that it has none."""
    train(tmp_path)
    for name, cut in (("findings", '{"kind":"summary"'), ("rows", None)):
        path = tmp_path / f"{name}.jsonl"
        text = path.read_text()
        path.write_text(text[: text.index(cut)] if cut else text[:-30])
    run = reading.from_record(tmp_path)
    assert not run.ended
    assert "has no end" in markup.notices([run])
    assert len(run.curves["loss"].first) > 60


def test_a_run_begun_anew_hides_the_old_one_and_a_resumed_one_continues_it(tmp_path):
    """Of two runs in one record the last is shown; one that was resumed is joined to what came before the step it took over at."""
    train(tmp_path, steps=40)
    train(tmp_path, steps=30)
    assert reading.from_record(tmp_path).steps == 30
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"kind":"header","schema":1}\n{"kind":"losses","first":20,"total":[7.0,8.0,"NaN"]}\n')
    run = reading.from_record(tmp_path)
    assert run.curves["loss"].first.tolist() == list(range(23))
    assert run.curves["loss"].middle[20:22].tolist() == [7.0, 8.0]
    assert run.curves["loss"].flags[22] == NAN
    assert run.grids["grad_norm"].last.max() < 20


def test_an_empty_record(tmp_path):
    """A run that never took a step has a page without curves."""
    train(tmp_path, steps=0)
    run = reading.from_record(tmp_path)
    assert run.curves == {}
    assert words.headline(run).tone == "note"
    assert "{{" not in report.page([run], "")


# ---- what it says


def finding(diagnosis="loss_spike", severity=Severity.WARNING, step=5, where="loss", **more):
    return Finding(diagnosis, severity, step, where, "so it is", **more)


def test_the_headline_names_the_gravest_finding_and_of_a_cascade_its_root():
    """The verdict speaks of the gravest finding; where one follows from another, of that other."""
    root = finding("dead_relu", Severity.ERROR, 29, "3 (ReLU)", consequences=(finding("collapsed_activation", Severity.ERROR, 1),))
    run = reading.Run("r", findings=[finding("collapsed_activation", Severity.ERROR, 26), root, finding(step=0)], state="learning", steps=100)
    head = words.headline(run)
    assert "ReLU units are silent" in head.sentence
    assert head.tone == "ill"
    run.findings.append(finding("nonfinite_loss", Severity.HALT, 90))
    assert words.headline(run).sentence == "Lost at step 90: the loss is NaN or infinite."
    run.facts = {"halted": True}
    assert words.headline(run).sentence.startswith("Stopped at step 90")


@pytest.mark.parametrize("state", sorted(words.CURVES))
def test_every_reading_of_the_curves_has_its_words(state):
    """Every state of the verdict is a sentence, and only a run that learns and has no finding above info is called healthy."""
    run = reading.Run("r", state=state, steps=100, findings=[finding(severity=Severity.INFO)])
    head = words.headline(run)
    assert head.sentence.endswith(".")
    assert (head.tone == "well") == (state in words.GOOD)


@pytest.mark.parametrize("diagnosis", sorted(DIAGNOSES))
def test_every_diagnosis_has_a_story(diagnosis):
    """A story has severity, measurement with limit, causes with confidence, remedies, consequences, how to silence it, and the page of explain."""
    measured, later = (Evidence("norm", 9.0, 3.0),), (finding("constant_loss", step=9),)
    told = finding(diagnosis, Severity.ERROR, 7, "2.weight", evidence=measured, consequences=later, note="skipped", count=3, last_step=12)
    text = markup.stories([reading.Run("r", findings=[told])])
    for words_ in (diagnosis, "■", "limit 3", "constant_loss", "Skipped", "3 times until step 12", f"mute={{&quot;{diagnosis}&quot;}}", "<h5>Limits</h5>"):
        assert words_ in text, words_


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf, -2.0])
@pytest.mark.parametrize("limit", [None, 0.0, 1.0, 1e-6, math.inf, math.nan, -1.0])
def test_bars_stay_in_their_frame(value, limit):
    """A bar and its tick stand between 0 and 100 %, whatever the numbers."""
    for share in re.findall(r"(?:width|left):([^%]*)%", markup.bar(Evidence("x", value, limit))):
        assert 0.0 <= float(share) <= 100.0


def test_what_users_name_cannot_break_the_page():
    """Names and messages are text on the page, never markup or script."""
    nasty = '</script><script>alert(1)</script><b a="'
    run = reading.Run(
        nasty, findings=[finding(where=nasty, evidence=(Evidence(nasty, 1.0, 2.0),), note=nasty)], coverage={"not_observed": {nasty: nasty}}, steps=9
    )
    history = History(losses=8, samples=4)
    run.curves[nasty] = reading.from_history(history, {}, "x").curves.get("loss") or envelope(np.arange(3), np.ones(3), 9)
    html = report.page([run], "")
    assert "<script>alert" not in html
    assert html.count("</script>") == html.count("<script")


def test_two_runs_stand_side_by_side(tmp_path):
    """A page of two runs has both verdicts, both lists of findings under names of their own, and the facts that differ marked."""
    train(tmp_path / "a")
    train(tmp_path / "b", poison=40, steps=60)
    runs = [reading.from_record(tmp_path / name) for name in "ab"]
    html = report.page(runs, "")
    assert 'id="fB1"' in html
    assert 'id="fA1"' not in html
    assert "No finding" in html
    assert "differs" in html
    assert [r["label"] for r in payload.make(runs).data["runs"]] == ["a", "b"]


def test_a_finding_leads_to_its_row(tmp_path):
    """The mark of a finding names the signal its rule reads and the row of its site; one without a site leads to the gradients."""
    train(tmp_path)
    run = reading.from_record(tmp_path)
    assert payload.place(finding("dead_relu", where="1 (ReLU)"), run) == ("dead_fraction", "1 (ReLU)")
    assert payload.place(finding("update_ratio_high", where="2.weight"), run) == ("update_ratio", "2.weight")
    assert payload.place(finding("nonfinite_gradient", where="2.bias (backward)"), run) == ("grad_norm", "2.bias")
    assert payload.place(finding("nonfinite_input", where="input 0"), run) == ("grad_norm", None)


def test_numbers_on_the_page_are_those_of_the_record(tmp_path):
    """A heat map's block unpacks to the grid's numbers, NaN and Inf told apart."""
    train(tmp_path, poison=30, steps=40)
    run = reading.from_record(tmp_path)
    made = payload.make([run])
    data = next(g for g in made.data["runs"][0]["grids"] if g["signal"] == "grad_norm")
    raw, cells = block(made.blocks[data["block"]]), len(data["rows"]) * len(data["first"])
    assert data["same"]
    assert data["flagged"]
    low = np.frombuffer(raw[: 4 * cells], "<f4").reshape(len(data["rows"]), -1)
    flags = np.frombuffer(raw[4 * cells :], np.uint8).reshape(low.shape)
    np.testing.assert_allclose(low, run.grids["grad_norm"].low.T, rtol=1 / 4096)
    assert (flags == run.grids["grad_norm"].flags.T).all()
    assert flags.any(axis=0).tolist() == [s >= 30 for s in data["first"]]


# ---- the file


@needs_plotly
def test_the_command_writes_one_file(tmp_path, capsys):
    """The command writes one file that is under 5 MB, well-formed, and fetches nothing."""
    train(tmp_path / "run", poison=40)
    assert main(["report", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "report.html"
    assert str(path) in capsys.readouterr().out
    html = path.read_text(encoding="utf-8")
    assert len(html.encode()) < 5_000_000
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|@import|url\(', html)
    Balanced().feed(html)
    assert main(["report", str(tmp_path / "run"), "--compare", str(tmp_path / "run"), "-o", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").exists()


class Balanced(HTMLParser):
    """Elements that are opened are closed, in order, and no name is given twice."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        name = dict(attrs).get("id")
        assert name is None or name not in self.names, name
        self.names.add(name)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@needs_plotly
@pytest.mark.parametrize("kept", [True, False])
def test_a_guard_writes_its_page_at_any_time(tmp_path, kept):
    """guard.report works in mid-run and after the end, with a record and without, and a halt that is due is still raised by the next step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(model, optimizer, record=tmp_path / "run" if kept else None, lag=4)
    for step in range(30):
        loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 29 else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(loss)
    path = guard.report(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert "nonfinite" in path.read_text(encoding="utf-8")
    with pytest.raises(TrainingHalted):
        guard.step(torch.tensor(1.0))
    guard.close()
    assert guard.report(tmp_path / "end.html").exists()


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Without the plotting library the command ends with code 2 and names the extra."""
    train(tmp_path, steps=5)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install 'lossguard[report]'" in capsys.readouterr().err


@needs_plotly
def test_a_folder_without_a_record(tmp_path, capsys):
    """A folder without a record is refused in words, and nothing is written."""
    assert main(["report", str(tmp_path)]) == 2
    assert "no record at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_reader_streams(tmp_path):
    """A record is read sample by sample, and its story is complete at the end."""
    train(tmp_path, steps=20)
    reader = Reader(tmp_path)
    assert [s.step for s in reader] == list(range(20))
    assert reader.story.losses.shape == (20, 2)
    assert [name for name, _ in reader.params] == ["0.weight", "0.bias", "2.weight", "2.bias"]
