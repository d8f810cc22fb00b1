"""The live view of a job: real records made by real runs, followed while they grow; a real terminal."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import math
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossguard import Guard
from lossguard.cli import main
from lossguard.record import Reader
from lossguard.watch.job import Job
from lossguard.watch.run import SIGNALS, Run, shared
from lossguard.watch.series import ASCII, Series, chart
from lossguard.watch.tail import Tail, newest_loss

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="not installed: rich")
ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b"


class Training:
    """A real guarded run that is stepped by hand."""

    def __init__(self, folder, *, poison=(), seed=0, tracker=None, state=None, terms=False, every=10):
        torch.manual_seed(seed)
        self.poison, self.terms, self.i = set(poison), terms, 0
        self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        optimizer = self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.guard = Guard(self.model, optimizer, record=folder, halt=None, trackers=[tracker] if tracker else [], every=every)
        if state is not None:
            self.guard.load_state_dict(state)
            self.i = self.guard.steps

    def steps(self, count):
        for _ in range(count):
            x = torch.randn(32, 8)
            loss = F.cross_entropy(self.model(x), x[:, :3].argmax(1)) * (math.nan if self.i in self.poison else 1.0)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.guard.step({"fit": loss, "penalty": loss.detach() * 0.1} if self.terms else loss)
            self.i += 1
            if self.i % 25 == 0:
                self.guard.validation(loss.detach() * 1.1)
        self.guard.settle()  # what is under way gets into the record
        return self

    def die(self):
        """As after a kill: no last line is written."""
        for file in self.guard._record._files.values():
            file.flush()
        self.guard._record._files = {}
        self.guard.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The record of an ill run that is over, and its guard."""
    folder = tmp_path_factory.mktemp("finished")
    run = Training(folder, poison={150}, terms=True).steps(200)
    run.guard.close()
    return folder, run.guard


def read(folder):
    job = Job(folder)
    job.read()
    return job


def known(run: Run):
    """All that a run tells, in comparable form."""
    series = {"loss": run.losses, "validation": run.validation, **run.terms, **run.signals}
    drawn = {name: [(c.mean, c.flags) for c in s.columns(50, 0, max(run.step, 0))] for name, s in series.items()}
    return drawn, [str(f) for f in run.findings], run.step, run.verdict, run.ended, run.best, dict(run.facts), run.runs


# ---- what is read


def test_the_numbers_are_those_of_the_trackers(tmp_path):
    """Losses and signals of the view are the scalars that trackers get, to the six digits of a record."""
    told = []
    run = Training(tmp_path, tracker=lambda step, numbers: told.append((step, dict(numbers)))).steps(120)
    run.guard.close()
    lead = read(tmp_path).lead
    for name in SIGNALS:
        step, value = next((s, n[name]) for s, n in reversed(told) if name in n and (name != "dead_fraction_largest" or s == lead.signals[name].newest[0]))
        assert lead.signals[name].newest[0] == step
        np.testing.assert_allclose(lead.signals[name].newest[1], value, rtol=1e-5)
    assert lead.step == 119
    np.testing.assert_allclose([v for _, v in lead.window], run.guard.history.losses(), rtol=1e-5)


def test_the_verdict_is_the_guards(tmp_path):
    """While a run goes on, the verdict read from its record is the one that its guard would give, at every look."""
    run, job, words = Training(tmp_path), Job(tmp_path), []
    for _ in range(10):
        run.steps(30)
        job.read()
        words.append(job.lead.verdict)
        assert words[-1] == run.guard.verdict
    assert len(set(words)) > 1
    run.guard.close()


def test_only_what_is_new_is_read(tmp_path):
    """Each byte of a growing record is read once: a look reads what was added since the last one, and an idle look nothing."""
    run, job, sizes = Training(tmp_path), Job(tmp_path), []
    for _ in range(8):
        run.steps(25)
        job.read()
        lead = job.lead
        sizes.append((tmp_path / "rows.jsonl").stat().st_size)
        assert lead.rows.consumed == sizes[-1]
        assert lead.told.consumed == (tmp_path / "findings.jsonl").stat().st_size
        read_by_us = _bytes_read()
        assert not job.read()
        if read_by_us is not None:
            assert _bytes_read() - read_by_us < 4096 < sizes[-1]
    assert sizes == sorted(set(sizes))
    run.guard.close()


def _bytes_read():
    """What this process has read so far, as the kernel counts it, without the counting itself."""
    path = Path("/proc/self/io")
    return int(re.search(r"rchar: (\d+)", path.read_text()).group(1)) if path.exists() else None


@pytest.mark.parametrize("seed", range(3))
def test_pieces_make_the_same_as_the_whole(finished, tmp_path, seed):
    """However a record arrives, cut anywhere, in the middle of lines and characters, what is known at the end is the same."""
    folder, _ = finished
    dice, job = random.Random(seed), Job(tmp_path)
    contents = {name: (folder / name).read_bytes() for name in ("rows.jsonl", "findings.jsonl")}
    files = {name: (tmp_path / name).open("ab", buffering=0) for name in contents}
    while any(contents.values()):
        for name in contents:
            size = dice.choice([1, 7, 300, 5000, 40000])
            files[name].write(contents[name][:size])
            contents[name] = contents[name][size:]
        job.read(dice.choice([None, 100, 5000]))
    while job.read() or job.behind:
        pass
    assert known(job.lead) == known(read(folder).lead)
    assert job.over


def test_a_half_written_line_waits_for_its_end(finished, tmp_path):
    """A last line that is not complete is neither used nor lost."""
    folder, _ = finished
    rows = (folder / "rows.jsonl").read_bytes()
    (tmp_path / "findings.jsonl").write_bytes((folder / "findings.jsonl").read_bytes().splitlines(keepends=True)[0])
    line = next(m for m in re.finditer(rb'\{"kind":"losses","first":(\d+),', rows) if int(m.group(1)) > 50)
    cut = line.end() + 12
    (tmp_path / "rows.jsonl").write_bytes(rows[:cut])
    job = read(tmp_path)
    assert job.lead.step == int(line.group(1)) - 1
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(rows[cut:])
    job.read()
    assert job.lead.step == 199


def test_a_resumed_run_is_joined(tmp_path):
    """A run killed in the middle of a line and resumed at an earlier step is joined at that step, as the report joins it; marks of what was undone go."""
    first = Training(tmp_path, poison={95}).steps(80)
    state = first.guard.state_dict()
    job = read(tmp_path)
    first.steps(40)
    job.read()
    assert job.lead.losses.lost > 0
    first.die()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"kind":"losses","first":120,"tot')
    job.read()
    second = Training(tmp_path, state=state, seed=1).steps(30)
    job.read()
    reader = Reader(tmp_path)
    assert [s.step for s in reader][-1] >= 100
    expected = Series()
    for step, value in reader.story.losses.tolist():
        expected.add(int(step), value)
    assert job.lead.losses.columns(110, 0, 109) == expected.columns(110, 0, 109)
    assert job.lead.losses.lost == 0 and job.lead.step == 109 and job.lead.runs == 2 and job.lead.first == 80
    assert job.lead.findings == [] == second.guard.findings
    assert job.lead.verdict == second.guard.verdict
    second.guard.close()
    job.read()
    assert job.over
    assert known(job.lead) == known(read(tmp_path).lead)


def test_a_record_begun_anew_is_followed(tmp_path):
    """A record that was removed and begun anew, longer or shorter than before, is followed from its beginning."""
    for count in (60, 20, 90):
        for name in ("rows.jsonl", "findings.jsonl"):
            (tmp_path / name).unlink(missing_ok=True)
        run = Training(tmp_path, seed=count).steps(count)
        if count == 60:
            job = Job(tmp_path)
        job.read()
        assert job.lead.step == count - 1
        assert job.lead.runs == 1
        run.die()
        assert known(job.lead) == known(read(tmp_path).lead)


def test_a_longer_record_in_the_same_place_is_another(finished, tmp_path):
    """A record that was replaced by a longer one between two looks, in files with the same number on the disk, is no continuation of it."""
    folder, _ = finished
    Training(tmp_path, seed=3).steps(20).guard.close()
    job = read(tmp_path)
    for name in ("findings.jsonl", "rows.jsonl"):
        number = (tmp_path / name).stat().st_ino
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        assert (tmp_path / name).stat().st_ino == number
    job.read()
    assert known(job.lead) == known(read(folder).lead)


def test_the_speed_is_that_of_the_newest_steps(tmp_path):
    """Steps a second are taken between the newest news, by the clock of the files; with too little seen, and after the run, over all of it."""
    run, job = Training(tmp_path), Job(tmp_path)
    began = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["time"]
    for steps, when in ((20, 5.0), (20, 7.0), (40, 11.0), (40, 200.0)):
        run.steps(steps)
        for name in ("rows", "findings"):
            os.utime(tmp_path / f"{name}.jsonl", (began + when,) * 2)
        job.read()
        expected = {5.0: (4.0, True), 7.0: (10.0, False), 11.0: (10.0, False), 200.0: (80 / 193, False)}[when]
        assert job.speed == (pytest.approx(expected[0], rel=1e-3), expected[1])
    run.guard.close()
    job.read()
    assert job.speed == (pytest.approx(120 / (job.lead.facts["ended"] - began)), True)


@needs_rich
def test_a_long_record_is_seen_to_be_read(finished):
    """While a long record is being read its share is said, and the run does not count as over."""
    from lossguard.watch.screen import status

    job, told = Job(finished[0]), []
    while not told or job.behind:
        job.read(20_000)
        told.append(status(job))
        assert job.over == (not job.behind)
    shares = [int(word.split()[1]) for word in told[:-1]]
    assert len(shares) > 3 and shares == sorted(shares) and told[-1] == "over"


def test_a_newer_record_is_refused(tmp_path):
    """A record of a newer schema is refused in words."""
    (tmp_path / "findings.jsonl").write_text(json.dumps({"kind": "header", "schema": 99}) + "\n")
    with pytest.raises(ValueError, match="schema 99, this version reads up to 1; update lossguard"):
        Job(tmp_path).read()


def test_what_is_no_record_line_is_passed_over(tmp_path):
    """Lines that are no lines of a record, such as a number or half an object, are passed over."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'5\n{"kind":"los\n\xff\xfe\n\n{"a":1}\n{"kind":"losses","first":0,"total":[1.0]}\n')
    assert [line["kind"] for line in Tail(path).read()] == ["losses"]


def test_the_newest_loss_is_found_from_the_end(tmp_path):
    """The newest loss of a long file is found without reading it all, also behind a very long line; a file without one has none."""
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    assert newest_loss(path) is None and newest_loss(tmp_path / "none") is None
    for filler in (10, 200_000, 2_000_000):
        path.write_text('{"kind":"losses","first":40,"total":[1.5,"NaN"]}\n{"kind":"losses","first":42,"total":[0.5,"-Infinity"]}\n' + "x" * filler)
        assert newest_loss(path) == (43, -math.inf)


# ---- what is drawn


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_nan_and_no_infinity_is_hidden(data):
    """Wherever a NaN or an infinity stands among however many numbers, its column has a mark, NaN before infinity; no other column has one."""
    count, width, buckets = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 90)), data.draw(st.sampled_from([4, 64, 1024]))
    bad = data.draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from([math.nan, math.inf, -math.inf]), max_size=4))
    height = data.draw(st.integers(1, 4))
    series = Series(buckets)
    for step in range(count):
        series.add(step, bad.get(step, 1.0 + step % 7))
    rows = chart(series.columns(width, 0, count - 1), height)
    assert len({len(row) for row in rows}) == 1 == len({width, len(rows[0])})
    marked = {c for row in rows for c in range(width) if row[c] in "N∞"}
    for step, value in bad.items():
        spot = step * width // count
        assert spot in marked
        assert not math.isnan(value) or any(row[spot] == "N" for row in rows)
    span = max(1, count // buckets * 4) * width // count + 1
    assert all(any(abs(step * width // count - c) <= span for step in bad) for c in marked)
    assert len(series._buckets) <= buckets
    assert series.lost == len(bad) and series.first_lost == min(bad, default=None)


def test_bars_follow_the_numbers():
    """Higher numbers have higher bars; a wide range is drawn by its logarithm; a flat series is a flat line; gaps between measurements are bridged."""
    series = Series()
    for step in range(8):
        series.add(step, float(step))
    assert chart(series.columns(8, 0, 7), 1) == ["▁▂▃▄▅▆▇█"]
    assert chart(series.columns(8, 0, 7), 1, ink=ASCII) == [".:-=+*%#"]
    wide, flat, gaps = Series(), Series(), Series()
    for step in range(8):
        wide.add(step, 10.0**step)
        flat.add(step, 3.0)
    assert chart(wide.columns(8, 0, 7), 1) == ["▁▂▃▄▅▆▇█"]
    assert len(set(chart(flat.columns(8, 0, 7), 1)[0])) == 1
    gaps.add(0, 0.0)
    gaps.add(4, 1.0)
    assert chart(gaps.columns(8, 0, 7), 1) == ["▁▁▁▁█   "]


# ---- the command


@pytest.fixture
def plain(monkeypatch, capsys):
    """A stdout that is no terminal; gives what was written."""
    for name in ("NO_COLOR", "COLUMNS", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return lambda: capsys.readouterr().out


@needs_rich
def test_once_in_a_pipe(finished, plain):
    """--once writes the present state as plain text, each finding in one whole line with its severity, and says what is not a number."""
    folder, guard = finished
    assert main(["watch", "--once", str(folder)]) == 0
    text = plain()
    assert ESCAPE not in text
    for finding in guard.findings:
        assert any(
            finding.severity.label in row and f"{finding.diagnosis} x{finding.count}" in row and row.endswith(finding.message) for row in text.splitlines()
        )
    assert "step 199" in text and "verdict not a number" in text and "steps/s (mean)" in text
    for name in ("loss", "fit", "penalty", "validation", *SIGNALS.values()):
        assert re.search(rf"^{name} +\S", text, re.MULTILINE), name
    assert "loss 50 times, first at step 150" in text.replace("\n", " ")
    assert re.search(r"^loss +.*N+  ", text, re.MULTILINE)


@needs_rich
@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_width_is_respected(finished, plain, monkeypatch, width):
    """Every row but the findings and the folder's name fits the width that COLUMNS gives, and bars use it."""
    monkeypatch.setenv("COLUMNS", str(width))
    folder, _ = finished
    monkeypatch.chdir(folder.parent)
    assert main(["watch", "--once", folder.name]) == 0
    rows = plain().splitlines()
    rows = rows[: rows.index("findings (1)")]
    assert max(map(len, rows)) <= width
    bars = re.match(r"gradient norm +(\S+)", next(r for r in rows if r.startswith("gradient norm"))).group(1)
    assert len(bars) == width - 45 and len(rows) > 10


@needs_rich
def test_an_encoding_without_bars(finished, monkeypatch):
    """Where the encoding has no block characters, ASCII stands for them, and nothing fails."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["watch", "--once", str(finished[0])]) == 0
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "N not a number, I infinite" in text and re.search(r"^loss +[#%*]", text, re.MULTILINE)


@needs_rich
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--once", "/nowhere"], "no record at /nowhere; give the folder that was passed as Guard(record=...)"),
        (["--interval", "0", "."], "--interval is a number of seconds above 0, got 0.0"),
        (["--interval", "nan", "."], "above 0, got nan"),
        ([__file__], "is a file; give the folder"),
    ],
)
def test_wrong_use_is_answered_in_words(arguments, words, capsys):
    """Wrong use ends with code 2 and says what to do."""
    assert main(["watch", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(finished, monkeypatch, capsys):
    """Without the drawing library the command ends with code 2 and names the extra."""
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main(["watch", str(finished[0])]) == 2
    assert "pip install 'lossguard[watch]'" in capsys.readouterr().err


def during(monkeypatch, *deeds):
    """Each time the view would wait, the next deed is done instead."""
    left = list(deeds)
    monkeypatch.setattr("lossguard.watch.follow.time.sleep", lambda seconds: left.pop(0)())
    return left


@needs_rich
def test_lines_into_a_file(tmp_path, plain, monkeypatch):
    """Without a terminal it waits for the record, writes one line at each news and one for each finding as it comes, and ends with the run."""
    folder, runs = tmp_path / "later", []
    deeds = [lambda: None, lambda: runs.append(Training(folder, poison={60}).steps(30)), lambda: None, lambda: runs[0].steps(40)]
    left = during(monkeypatch, *deeds, lambda: runs[0].guard.close())
    assert main(["watch", str(folder)]) == 0
    rows = plain().splitlines()
    assert not left and ESCAPE not in "".join(rows)
    assert rows[0] == f"no record in {folder} yet; waiting for Guard(record=...) to begin one (Ctrl-C ends)"
    assert rows[1].startswith("step 29  loss ") and rows[1].endswith("running")
    assert re.match(r" +60  halt +nonfinite_gradient", rows[2])
    assert rows[3].startswith("step 69  loss NaN  ")
    assert sum(row.startswith("step ") for row in rows) == 3 and "over" in rows[4]
    assert "findings (1)" in rows


@needs_rich
def test_all_ranks_are_shown(tmp_path, plain, monkeypatch):
    """Every rank's folder is seen: which there are, how far they are, whose loss is lost, and the findings of all, alike ones once."""
    runs = {}
    for rank, poison in ((0, ()), (1, {40}), (2, {40})):
        monkeypatch.setenv("RANK", str(rank))
        runs[rank] = Training(tmp_path, poison=poison).steps(60 - rank)
    job = read(tmp_path)
    assert sorted(job.ranks) == [0, 1, 2] and job.lead.rank == 0 and not job.over
    for run in runs.values():
        run.guard.close()
    assert main(["watch", str(tmp_path)]) == 0
    text = plain()
    assert "ranks 0-2: steps 57 to 59, last rank 2\nloss not finite on ranks 1-2\n" in text
    assert len(re.findall(r"^ +40  halt +ranks 1-2  nonfinite_gradient", text, re.MULTILINE)) == 2  # as it came, and at the end
    assert "findings (1)" in text


@needs_rich
def test_a_rank_that_never_ends_holds_nobody(tmp_path, plain, monkeypatch):
    """A rank whose record just stopped does not keep the view of a job whose first rank is over from ending."""
    monkeypatch.setenv("RANK", "1")
    Training(tmp_path).steps(10).die()
    monkeypatch.setenv("RANK", "0")
    run = Training(tmp_path).steps(20)
    run.guard.close()
    job = read(tmp_path)
    assert not job.over
    for name in ("rows", "findings"):
        os.utime(tmp_path / "rank1" / f"{name}.jsonl", (time.time() - 60,) * 2)
    assert main(["watch", str(tmp_path)]) == 0
    assert "over on rank 0" in plain()


def test_a_thousand_ranks_are_looked_at_in_turn(finished, tmp_path):
    """Of very many ranks some are read at each look, in turn, so that each is heard; the first of all at every look."""
    folder, _ = finished
    rows, told = ((folder / name).read_bytes() for name in ("rows.jsonl", "findings.jsonl"))
    for rank in range(100):
        place = tmp_path / f"rank{rank}" if rank else tmp_path
        place.mkdir(exist_ok=True)
        (place / "rows.jsonl").write_bytes(rows[-3000:])
        (place / "findings.jsonl").write_bytes(told)
    job, heard = Job(tmp_path), []
    for _ in range(4):
        job.read(1 << 20)
        heard.append(sum(run.step == 199 for run in job.ranks.values()))
        assert job.lead.rank == 0 and job.lead.step == 199
    assert heard == [1 + 32, 1 + 64, 1 + 96, 100]
    assert sum(run.step == 199 for run in read(tmp_path).ranks.values()) == 100
    assert shared(job.ranks)[0][1] == list(range(100))


@needs_rich
def test_without_rank_0_the_lowest_leads(tmp_path, plain, monkeypatch):
    """Where rank 0's record lies elsewhere, the lowest rank there is shows its curves."""
    monkeypatch.setenv("RANK", "3")
    Training(tmp_path).steps(20).guard.close()
    assert main(["watch", "--once", str(tmp_path)]) == 0
    text = plain()
    assert "rank 3: step 19" in text and "gradient norm" in text


@needs_rich
def test_a_stall_and_a_silence_are_said(tmp_path, plain):
    """What the watchdog left behind is named while its step lasts; a record that has not grown for long is said to be quiet."""
    run = Training(tmp_path).steps(20)
    (tmp_path / "stalled-19.txt").write_text("stacks")
    assert main(["watch", "--once", str(tmp_path)]) == 0
    assert "stalled, see stalled-19.txt" in plain()
    run.steps(11)
    for name in ("rows", "findings"):
        os.utime(tmp_path / f"{name}.jsonl", (time.time() - 300,) * 2)
    assert main(["watch", "--once", str(tmp_path)]) == 0
    assert "no news for 5 min" in plain()
    run.die()


@needs_rich
def test_a_records_text_cannot_write_to_the_terminal(tmp_path, plain):
    """Control characters and markup in a record's names are shown as plain text."""
    header = {"kind": "header", "schema": 1, "time": 1.0, "model": "A\x1b[2JB [red]x[/red]"}
    (tmp_path / "findings.jsonl").write_text(json.dumps(header) + "\n")
    assert main(["watch", "--once", str(tmp_path)]) == 0
    text = plain()
    assert ESCAPE not in text and "A [2JB [red]x[/red]" in text


# ---- a real terminal


def seen(text):
    """What a person reads of what was written to a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *command, width=80, height=30, **environment):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "RANK")}
        clean |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lossguard", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=clean, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def until(self, words, patience=60.0):
        """Read on until these words, a regular expression, come behind what was read before."""
        begin, end = len(self.text), time.monotonic() + patience
        while not re.search(words, seen(self.text[begin:]), re.DOTALL):
            assert time.monotonic() < end, f"{words} did not come: {seen(self.text)[-2000:]}"
            assert self._more(0.2) or self.process.poll() is None, f"ended before {words} came: {seen(self.text)[-2000:]}"
        return self.text[begin:]

    def press(self, key):
        os.write(self.ours, key)

    def rest(self, patience=60.0):
        """Wait for its end; what it wrote until then, and its exit code."""
        begin, end = len(self.text), time.monotonic() + patience
        while self.process.poll() is None:
            self._more(0.2)
            assert time.monotonic() < end, "it does not end"
        while self._more(0.1):
            pass
        os.close(self.ours)
        return self.text[begin:], self.process.returncode

    def _more(self, seconds):
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        try:
            new = os.read(self.ours, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.text += new.decode(errors="replace")
        return bool(new)


@needs_rich
def test_a_terminal_shows_a_run_live(tmp_path):
    """On a terminal it waits for the record, redraws as the run goes on, within the width, shows a finding in colour, and Ctrl-C ends it quietly with 0."""
    terminal = Terminal("watch", str(tmp_path / "run"), "--interval", "0.1", width=64)
    terminal.until("no record in")
    run = Training(tmp_path / "run", poison={60}).steps(30)
    terminal.until("step 29 .*no findings")
    run.steps(20)
    terminal.until("step 49 ")
    run.steps(20)
    shown = terminal.until("step 69 .*nonfinite_gradient")
    assert re.search(r"\x1b\[1;31mhalt", shown) and "N" in seen(shown)
    terminal.press(b"\x03")
    text, code = terminal.rest()
    run.guard.close()
    assert code == 0 and "Traceback" not in terminal.text
    assert "\x1b[?1049l" in text and "\x1b[?25h" in text  # the screen and the cursor are given back
    left = text.partition("\x1b[?1049l")[2]
    assert "nonfinite_gradient" in left  # the last state stays on the terminal
    assert max(map(len, seen(left).splitlines())) <= 64


@needs_rich
def test_a_terminal_without_colours(tmp_path):
    """With NO_COLOR --once writes not one escape code to a terminal; a live view ends by itself with the run; SIGTERM gives the screen back."""
    run = Training(tmp_path).steps(20)
    once = Terminal("watch", str(tmp_path), "--once", NO_COLOR="1")
    killed, live = (Terminal("watch", str(tmp_path), "--interval", "0.1") for _ in range(2))
    text, code = once.rest()
    assert code == 0 and "step 19" in text and ESCAPE not in text
    killed.until("step 19")
    killed.process.send_signal(signal.SIGTERM)
    text, code = killed.rest()
    assert code == 128 + signal.SIGTERM and "\x1b[?1049l" in text and "Traceback" not in text
    live.until("step 19")
    run.guard.close()
    text, code = live.rest()
    assert code == 0 and re.search(r"over +step 19", seen(text.partition("\x1b[?1049l")[2]))
