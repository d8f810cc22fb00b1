"""What the page tells of a run besides its findings: skips, cures, culprits, halts, checkpoints, resumptions, standstills, other ranks."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossguard import Finding, Guard, Severity, TrainingHalted, beside, report
from lossguard.recovery import Ladder
from lossguard.report import happened, markup, payload, reading, words
from lossguard.report.happened import Event


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def train(guard, steps, *, ill=(), first=0, factor=math.nan, saved=None):
    """Steps of a small classifier; the losses of the ill ones are multiplied by the factor."""
    model, optimizer = guard.model, guard.optimizers[0]
    for step in range(first, first + steps):
        x = torch.randn(32, 8)
        guard.batch(x)
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(dim=1)) * (factor if step in ill else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(loss)
        if saved and step + 1 == saved:
            guard.saved(f"checkpoints/{step + 1}.pt")


def cut(folder, kind):
    """The record as a kill leaves it: without its lines of this kind."""
    path = folder / "findings.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"kind":"{kind}"' not in line))


# ---- updates left out


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)), max_size=600))
def test_every_left_out_update_is_told_once(rows):
    """Whatever the counters, the events hold all that was left out, none twice, in order, in bounded number."""
    step, nans, spikes, counts = -1, 0, 0, [(0, 0, 0)]
    for gap, more, out in rows:
        step, nans, spikes = step + gap, nans + more, spikes + out
        counts.append((step + 1, nans + spikes, spikes))
    events = happened.skips(counts)
    assert sum(e.count for e in events) == nans + spikes
    assert len(events) <= happened.SKIPS
    assert all(a.last < b.first for a, b in pairwise(events))
    more = [b[1] > a[1] for a, b in pairwise(counts)]
    runs = sum(here and not before for before, here in pairwise([False, *more]))
    assert len(events) == runs or runs > happened.SKIPS  # what was left out at different times is told apart


def test_what_was_configured_from_outside_stands_among_the_facts(tmp_path, monkeypatch):
    """Whoever reads the page sees which settings the code did not make, and where they came from."""
    monkeypatch.setenv("LOSSGUARD_EVERY", "13")
    model = network()
    with Guard(model, torch.optim.SGD(model.parameters(), lr=0.01), record=tmp_path) as guard:
        train(guard, 20)
    assert dict(words.facts(reading.from_record(tmp_path)))["Configured"] == "every = 13 (LOSSGUARD_EVERY)"


def test_skips_stand_where_they_happened(tmp_path):
    """The record of a run whose updates were left out says how many, why and in which steps, as the guard itself does, and the run counts as spared."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with Guard(model, optimizer, record=tmp_path, skip={"nonfinite_gradient"}) as guard:
        train(guard, 100, ill=(20, 21, 75))
    assert guard.skipped["nonfinite_gradient"] == 3
    live = reading.from_history(guard.history, {"cures": []}, "live")
    for run in (reading.from_record(tmp_path), live):
        skips = [e for e in run.events if e.kind == "skip"]
        assert [e.count for e in skips] == [2, 1]
        assert (skips[0].first, skips[0].last) == (20, 21)  # every step is sampled there
        assert skips[1].first <= 75 <= skips[1].last
    run = reading.from_record(tmp_path)
    assert ("Left out", "3 updates (nonfinite_gradient)") in words.facts(run)
    assert words.headline(run).word == "Spared"
    assert "3 updates left out" in words.headline(run).sentence


# ---- cures


def test_a_cured_run_is_told_as_cured(tmp_path):
    """A rollback stands on the curve with where it went back to; the verdict says that the run was cured, from the record and from the guard alike."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer, record=tmp_path, recover=Ladder(every=20)) as guard:
        train(guard, 220, ill=(90,))
        cure = guard.recovery.cures[0]
    for killed in (False, True):
        if killed:
            cut(tmp_path, "summary")
        run = reading.from_record(tmp_path)
        event = next(e for e in run.events if e.kind == "rollback")
        assert (event.when, event.to) == (f"after {cure.step} steps", cure.to - 0.5)
        assert "learning rate is multiplied by 0.5" in event.text
        assert "1 rollback" in dict(words.facts(run))["Cured"]
        assert payload.make([run]).data["runs"][0]["events"][0]["kind"] == "rollback"
        assert "Rolled back" in markup.done([run])
        if not killed:
            assert words.headline(run).word == "Cured"
            assert "was cured by a rollback because of nonfinite" in words.headline(run).sentence
    live = reading.from_history(guard.history, {"cures": [vars(cure)]}, "live")
    assert [e.kind for e in live.events] == ["rollback"]


def test_what_was_not_cured_comes_first():
    """A finding that nobody has dealt with goes before a graver one that was."""
    cured = Finding("nonfinite_loss", Severity.ERROR, 5, "loss", "NaN", note="cured by a rollback after 6 steps")
    other = Finding("dead_relu", Severity.WARNING, 50, "1 (ReLU)", "silent")
    run = reading.Run("r", findings=[cured, other], state="learning", steps=100)
    assert words.main_finding(run) is other
    assert words.headline(run).tone == "ill"


# ---- culprits and halts


@pytest.mark.parametrize("killed", [False, True])
def test_a_culprit_is_named_in_its_story(tmp_path, killed):
    """The operation that made the NaN, its line of code and what the halt left behind stand in the story, also of a run that was killed at once."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_of(x, y):
        return (model(x) * 0.0).sqrt().sum() if len(x) == 7 else model(x).square().mean()

    guard = Guard(model, optimizer, record=tmp_path, locate=loss_of)
    with pytest.raises(TrainingHalted):
        for step in range(40):
            x = torch.randn(7 if step == 30 else 8, 8)
            guard.batch(x)
            loss = loss_of(x, None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
            if step == 20:
                guard.saved("checkpoints/21.pt")
    guard.close()
    if killed:
        cut(tmp_path, "summary")
    story = markup.stories([reading.from_record(tmp_path)])
    assert "First made by" in story
    assert "aten.sqrt" in story
    assert "in loss_of: return (model(x) * 0.0).sqrt().sum()" in story
    assert "83: a retry will not help" in story
    assert "<code>checkpoints/21.pt</code>, after 21 steps" in story
    assert "replay" in story
    assert ("Last good state" in dict(words.facts(reading.from_record(tmp_path)))) == (not killed)


def test_halts_of_another_run_are_not_told(tmp_path):
    """A folder that another start of the run has left at another step does not enter the story."""
    run = reading.Run("r", findings=[Finding("nonfinite_loss", Severity.HALT, 7, "loss", "NaN")])
    run.halts = [(tmp_path / "halt-3", {"exit_code": 84, "finding": {"diagnosis": "nonfinite_loss", "step": 3}})]
    assert "left behind" not in markup.stories([run])
    run.halts.append((tmp_path / "halt-7", {"exit_code": 84, "finding": {"diagnosis": "nonfinite_loss", "step": 7}}))
    assert "halt-7/" in markup.stories([run])


# ---- resumed runs


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_keeps_what_it_goes_on_from(tmp_path, killed):
    """Findings and checkpoints from before the step of resumption stay, those beyond it go, and the place is marked, ended or killed."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model, optimizer, record=tmp_path, halt=None)
    train(guard, 60, ill=(30,), factor=1e4, saved=40)
    state = guard.state_dict()
    train(guard, 30, first=60, ill=(70,), saved=80)
    guard.close()
    cut(tmp_path, "summary")
    known = {(f.diagnosis, f.step) for f in guard.findings}
    with Guard(model, optimizer, record=tmp_path, halt=None) as guard:
        guard.load_state_dict(state)
        train(guard, 60, first=60)
    if killed:
        cut(tmp_path, "summary")
    run = reading.from_record(tmp_path)
    found = {(f.diagnosis, f.step) for f in run.findings}
    early = {(d, s) for d, s in known if s < 60}
    assert early and early <= found
    assert not any(d.startswith("nonfinite") for d, _ in found)
    assert [(e.kind, e.when) for e in run.events] == [("saved", "after 40 steps"), ("resumed", "after 60 steps")]
    assert dict(words.facts(run))["Resumed"] == "after 60 steps"
    assert run.steps == 120


# ---- standstills and other ranks


def test_a_run_that_stood_still_says_so(tmp_path):
    """A dump of threads makes the verdict where the run was killed after it; one from before the run's beginning is not read."""
    model = network()
    with Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), record=tmp_path) as guard:
        train(guard, 60)
    (tmp_path / "stalled-59.txt").write_text("thread main <here>")
    assert words.headline(reading.from_record(tmp_path)).tone == "well"  # it went on
    cut(tmp_path, "summary")
    run = reading.from_record(tmp_path)
    assert words.headline(run).sentence == "The run stood still after step 59, and was killed."
    assert words.short(run) == "stood still after step 59"
    assert "thread main &lt;here&gt;" in markup.done([run])
    os.utime(tmp_path / "stalled-59.txt", (1.0, 1.0))
    assert reading.from_record(tmp_path).stalls == []


def test_other_ranks_are_told_where_they_differ(tmp_path):
    """What other ranks found stands below, alike ones in one line; what this rank found too is not repeated; a broken record is passed over."""
    model = network()
    with Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), record=tmp_path) as guard:
        train(guard, 10)
    mine = Finding("loss_spike", Severity.WARNING, 3, "loss", "mine")
    theirs = Finding("dead_relu", Severity.ERROR, 5, "1 (ReLU)", "<silent>")
    for rank in (1, 2, 11):
        (tmp_path / f"rank{rank}").mkdir()
        lines = [{"kind": "header", "schema": 1}, *({"kind": "finding", **f.to_dict()} for f in (mine, theirs))]
        (tmp_path / f"rank{rank}" / "findings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "rank3").mkdir()
    assert list(beside.ranks(tmp_path)) == [1, 2, 11]
    run = reading.from_record(tmp_path)
    run.findings = [mine]
    text = markup.stories([run])
    assert "rank 1, 2, 11, step 5" in text
    assert "&lt;silent&gt;" in text
    assert text.count("loss_spike") == markup.stories([reading.Run("r", findings=[mine])]).count("loss_spike")


# ---- the page


def test_nothing_told_of_events_breaks_the_page(tmp_path):
    """Names and texts from files are text on the page, never markup or script."""
    nasty = '</script><script>alert(1)</script><b a="'
    told = Finding("nonfinite_loss", Severity.HALT, 1, nasty, nasty)
    run = reading.Run(nasty, findings=[told], steps=9, events=[Event(kind, 0.5, 0.5, nasty) for kind in ("note", "saved", "unfit", "cut")])
    run.facts = {"culprits": [{"diagnosis": "nonfinite_loss", "step": 1, "kind": "operation", "op": nasty, "name": nasty, "where": nasty, "source": nasty,
                               "arguments": [nasty], "output": nasty, "reason": nasty, "remedy": {"text": nasty}}],
                 "last_good": {"path": nasty, "after_steps": 1}}  # fmt: skip
    run.halts = [(tmp_path / nasty.replace("/", "_"), {"exit_code": 1, "finding": told.to_dict(), "checkpoint": {"path": nasty, "after_steps": 1}})]
    run.stalls, run.ranks = [beside.Dump(3, nasty, nasty)], {1: [Finding(nasty, Severity.ERROR, 2, nasty, nasty)]}
    html = report.page([run], "")
    assert "<script>alert" not in html
    assert html.count("</script>") == html.count("<script")


def test_of_very_many_checkpoints_some_are_drawn_and_all_are_listed():
    """The curve shows evenly spread checkpoints and the newest; the list has all of them."""
    run = reading.Run("r", events=[Event("saved", k - 0.5, k - 0.5, f"checkpoint {k}") for k in range(1, 1001)])
    drawn = payload.make([run]).data["runs"][0]["events"]
    assert len(drawn) <= payload.CHECKPOINTS + 1
    assert drawn[-1]["text"] == "checkpoint 1000"
    assert markup.done([run]).count("<li") == 1000
