"""Findings in colour: on a terminal where nobody configured logging, and nowhere else."""

from __future__ import annotations

import io
import logging
import math
import os
import pty
import re
import select
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lossguard import Cause, Finding, Guard, Remedy, Severity
from lossguard.cli import main
from lossguard.painting import bare, painted

logger = logging.getLogger("lossguard")
ESCAPE = "\x1b"
ILL = Finding(
    "loss_spike", Severity.WARNING, 12, "loss", "9 times its recent median",
    causes=(Cause("a bad batch", 0.8, "its gradient is 40 times the usual"), Cause("learning rate too high", 0.2, "updates are 3 %")),
    remedies=(Remedy("leave batch 12 out", {"drop_batch": 12}), Remedy("learning rate 0.1 -> 0.01", {"lr": 0.01})),
    consequences=(Finding("diverging_loss", Severity.ERROR, 20, "loss", "rises"),), note="checkpoint 11", count=3, last_step=14,
)  # fmt: skip


def ill_run():
    """A real run that is told of NaN; the guard."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, halt=None) as guard:
        for step in range(3):
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 2 else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert guard.findings
    return guard


@contextmanager
def terminal(monkeypatch, name="stderr"):
    """A stream of ours is a real terminal; gives what is read from its other end once the block is over."""
    ours, theirs = pty.openpty()
    heard = []
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        yield heard
        stream.flush()
        parts = []
        while select.select([ours], [], [], 0.1)[0]:
            parts.append(os.read(ours, 1 << 16))
        heard.append(b"".join(parts).decode().replace("\r\n", "\n"))
    os.close(ours)


@pytest.fixture
def nobody_listens(monkeypatch):
    """Call it for a script that configures no logging: pytest's own handlers are out of sight. They come between fixture and test."""

    def begin():
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "propagate", False)
        assert not logger.hasHandlers()

    return begin


@pytest.mark.parametrize("severity", list(Severity))
def test_paint_adds_codes_and_nothing_else(severity):
    """Without its codes a painted finding is its text; severity and diagnosis, every remedy and the last line are painted, no other row."""
    finding = Finding.from_dict({**ILL.to_dict(), "severity": severity.label})
    text = painted(finding)
    assert bare(text) == str(finding)
    rows = text.split("\n")
    touched = [bare(row).split()[0] for row in rows if ESCAPE in row]
    assert touched == ["lossguard:", "try", "learning", "more"]
    assert re.search(rf"\x1b\[[\d;]+m{severity.label} loss_spike\x1b\[0m at step 12", rows[0])
    assert all(row.count(ESCAPE) in (0, 2) for row in rows)


def test_a_terminal_sees_colours(nobody_listens, monkeypatch):
    """Where no handler is configured and stderr is a terminal, findings come in colour, their text unchanged, and no handler stays behind."""
    nobody_listens()
    with terminal(monkeypatch) as heard:
        guard = ill_run()
        assert logger.handlers == []
    first = str(Finding.from_dict({**guard.findings[0].to_dict(), "count": 1, "consequences": []})).splitlines()[0]
    assert ESCAPE in heard[0]
    assert bare(heard[0]).splitlines()[0] == first


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_refuses_colours_gets_none(nobody_listens, monkeypatch, name, value):
    """NO_COLOR and TERM=dumb give plain text on a terminal."""
    nobody_listens()
    monkeypatch.setenv(name, value)
    with terminal(monkeypatch) as heard:
        ill_run()
    assert "nonfinite" in heard[0]
    assert ESCAPE not in heard[0]


def test_a_file_gets_plain_text(nobody_listens, monkeypatch):
    """A stderr that is no terminal gets plain text, each finding once."""
    nobody_listens()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    guard = ill_run()
    assert ESCAPE not in stream.getvalue()
    assert stream.getvalue().count("lossguard: halt ") == len(guard.findings)


@pytest.mark.parametrize("where", ["own", "root"])
def test_a_users_handlers_get_plain_text(nobody_listens, monkeypatch, where):
    """A handler of the user's own, even one that writes to the same terminal, gets the record as ever: plain, once, and nobody else speaks."""
    nobody_listens()
    target = logger if where == "own" else logging.getLogger()
    if where == "root":
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr(logger, "propagate", True)
    records = []
    with terminal(monkeypatch) as heard:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("<%(levelname)s> %(message)s"))
        handler.addFilter(lambda record: records.append(record) or True)
        target.addHandler(handler)
        try:
            ill_run()
        finally:
            target.removeHandler(handler)
    assert records and all(ESCAPE not in r.getMessage() for r in records)
    assert ESCAPE not in heard[0]
    assert heard[0].count("lossguard: halt ") == heard[0].count("<ERROR> lossguard: halt ") == len(records)


def test_levels_filters_and_silence_hold(nobody_listens, monkeypatch):
    """What a user sets on the logger, a level or a filter, and a last resort of the user's own hold on a terminal too."""
    nobody_listens()
    with terminal(monkeypatch) as heard, monkeypatch.context() as patch:
        patch.setattr(logger, "level", logging.CRITICAL)
        logger.manager._clear_cache()
        ill_run()
    logger.manager._clear_cache()
    with terminal(monkeypatch) as also, monkeypatch.context() as patch:
        patch.setattr(logger, "filters", [lambda record: False])
        ill_run()
    with terminal(monkeypatch) as none, monkeypatch.context() as patch:
        patch.setattr(logging, "lastResort", None)
        ill_run()
    kept = io.StringIO()
    with terminal(monkeypatch) as own, monkeypatch.context() as patch:
        patch.setattr(logging, "lastResort", logging.StreamHandler(kept))
        ill_run()
    assert heard + also + own == ["", "", ""]
    assert none == ['No handlers could be found for logger "lossguard"\n']  # what Python says then
    assert "nonfinite" in kept.getvalue() and ESCAPE not in kept.getvalue()


def test_an_info_is_as_quiet_as_ever(nobody_listens, monkeypatch):
    """What Python's last resort does not show, an info, is not shown in colour either."""
    nobody_listens()
    from lossguard import actions

    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()
    with terminal(monkeypatch) as heard:
        actions.log(Finding("validation_below_training", Severity.INFO, 3, "validation", "below"))
        actions.log(ILL)
    monkeypatch.undo()
    logger.manager._clear_cache()
    assert bare(heard[0]) == f"{ILL}\n"


def test_the_findings_command_paints_for_a_terminal_only(tmp_path, monkeypatch, capsys):
    """python -m lossguard findings is in colour on a terminal and plain in a pipe, with the same words."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, halt=None, record=tmp_path) as guard:
        guard.step(torch.tensor(math.nan))
    assert main(["findings", str(tmp_path)]) == 0
    plain = capsys.readouterr().out
    with terminal(monkeypatch, "stdout") as heard:
        assert main(["findings", str(tmp_path)]) == 0
    assert ESCAPE not in plain and ESCAPE in heard[0]
    assert bare(heard[0]) == plain
