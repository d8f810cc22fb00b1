"""One readable line now and then, from a real run."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard
from lossguard.trackers import Heartbeat

LINE = re.compile(r"step \d+  loss \S+  grad norm \S+(  update/weight \d\.\de[+-]\d\d)?(  dead \d+ %)?(  logit peak \S+)?  \d+ findings?(  [\d.e+]+ steps/s)?")


def train(*trackers, steps=100, poison=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Guard(model, optimizer, trackers=trackers, dense=20, halt=None) as guard:
        for step in range(steps):
            x = torch.randn(16, 4)
            loss = F.cross_entropy(model(x), x[:, :3].argmax(1)) * (math.nan if step == poison else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return guard


def steps_of(lines):
    return [int(re.search(r"step (\d+)", line).group(1)) for line in lines]


@pytest.mark.parametrize(("every", "expected"), [(1, [*range(20), *range(20, 100, 10)]), (25, [0, 30, 50, 80]), (1000, [0])])
def test_one_line_each_so_many_steps(every, expected):
    """A line comes at the first sampled step of each stretch of ``every`` steps, with the numbers of that step in words, none missing that was measured."""
    text = io.StringIO()
    guard = train(Heartbeat(every, text))
    lines = text.getvalue().splitlines()
    assert steps_of(lines) == expected
    assert all(LINE.fullmatch(line) for line in lines), lines
    losses = dict(zip(guard.history.loss_steps().tolist(), guard.history.losses().tolist(), strict=True))
    for step, line in zip(expected, lines, strict=True):
        assert f"loss {losses[step]:.4g}  " in line
    assert all(line.endswith("steps/s") for line in lines[1:])


def test_not_a_number_is_said():
    """NaN is written as NaN, and the findings are counted."""
    text = io.StringIO()
    train(Heartbeat(1, text), poison=50)
    before, after = (next(line for line in text.getvalue().splitlines() if line.startswith(f"step {s} ")) for s in (40, 50))
    assert "0 findings" in before and "NaN" not in before
    assert "loss NaN  grad norm NaN" in after


def test_the_log_gets_it_at_info(caplog):
    """Without a stream the lines are records of the log ``lossguard`` at INFO, and nobody is warned."""
    with caplog.at_level(logging.INFO, logger="lossguard"), warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Heartbeat(25))
    beats = [r for r in caplog.records if r.getMessage().startswith("step ")]
    assert steps_of(r.getMessage() for r in beats) == [0, 30, 50, 80]
    assert {(r.name, r.levelno) for r in beats} == {("lossguard", logging.INFO)}


def test_a_level_that_nobody_shows_is_one_warning():
    """Where INFO is not shown, one warning says how to see the lines; the run goes on."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        guard = train(Heartbeat(10))
    told = [str(w.message) for w in heard if "heartbeat" in str(w.message)]
    assert len(told) == 1 and "logging.basicConfig(level=logging.INFO)" in told[0] and "stream=sys.stderr" in told[0]
    assert guard.steps == 100


def test_a_run_that_goes_back_is_told_again():
    """After a return to an earlier step lines come from there on, without a speed that would be negative."""
    text = io.StringIO()
    beat = Heartbeat(10, text)
    for step in (0, 10, 20, 5, 10):
        beat.scalars(step, {"loss": 1.0})
    assert steps_of(text.getvalue().splitlines()) == [0, 10, 20, 5, 10]
    assert "steps/s" not in text.getvalue().splitlines()[3]


@pytest.mark.parametrize(
    ("given", "words"), [({"every": 0}, "at least 1, got 0"), ({"every": "5"}, "got '5'"), ({"stream": "log.txt"}, "such as sys.stderr, got 'log.txt'")]
)
def test_wrong_use_is_refused_in_words(given, words):
    """What cannot work is a ValueError that says what was given and what was expected."""
    with pytest.raises(ValueError, match=words):
        Heartbeat(**given)
