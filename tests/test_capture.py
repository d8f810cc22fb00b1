"""A CUDA graph: what is captured is not recorded, what is replayed calls nobody, and neither is taken for a fault.

No GPU is needed: a captured step is one whose numbers are garbage while torch says that it captures, a replayed one moves the
weights without a call of the model or the optimizer. The same on a real graph is in test_gpu.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard, Severity
from lossguard.device import capture

STEPS = 300


@pytest.fixture
def capturing(monkeypatch):
    """Switches what torch says of the current stream."""
    now = [False]
    monkeypatch.setattr(capture, "in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0])
    return lambda on: now.__setitem__(0, on)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def batch(step):
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(64, 16, generator=draw)
    return x, x[:, :4].argmax(1)


def update(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Graph:
    """A step that was captured after some warm-up: replays happen behind the model's back."""

    def __init__(self, model, optimizer, capturing):
        self.model, before = model, copy.deepcopy(model.state_dict())
        capturing(True)
        update(model, optimizer, batch(0)[0] * math.nan, batch(0)[1])  # nothing is computed yet: whatever memory holds
        capturing(False)
        model.load_state_dict(before)
        self.twin, _ = network()
        self.twin.load_state_dict(before)
        self.optimizer = torch.optim.SGD(self.twin.parameters(), lr=optimizer.param_groups[0]["lr"])

    def replay(self, x, y):
        loss = update(self.twin, self.optimizer, x, y)
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.twin.parameters(), strict=True):
                mine.copy_(theirs)
        return loss


@pytest.mark.parametrize("warm", [0, 3, 60])
def test_a_captured_step_is_not_taken_for_a_fault(capturing, warm):
    """Garbage that hooks see during the capture, sampled or not, is never judged; the replays' losses are; what no hook tells of is listed."""
    model, optimizer = network()
    with Guard(model, optimizer, every=5) as guard:
        for step in range(warm):
            guard.step(update(model, optimizer, *batch(step)))
        graph = Graph(model, optimizer, capturing)
        for step in range(warm, STEPS):
            guard.step(graph.replay(*batch(step)))
    assert [f for f in guard.findings if f.severity > Severity.INFO] == []
    assert guard.history.losses().size == STEPS and guard.history.losses()[-1] < 0.6 * guard.history.losses()[0]
    told = guard.coverage.not_observed
    if warm:
        assert all(f"none was seen since step {guard.history.steps()[guard.history.seen(signal).any(axis=1)][-1]}" in told[what]
                   for what, signal in (("gradients", "grad_norm"), ("updates", "update_norm"), ("activations", "activation_rms")))  # fmt: skip
    else:
        assert {"gradients", "activations"} <= set(told)


def test_a_step_that_no_graph_replays_is_still_a_fault(capturing):
    """The weights are looked at all the same: where nothing calls the guard's hooks and nothing moves either, no optimizer steps."""
    model, optimizer = network()
    moved, still = [], []
    for found, moves in ((moved, True), (still, False)):
        with Guard(model, optimizer, every=5) as guard:
            graph = Graph(model, optimizer, capturing)
            for step in range(STEPS):
                loss = graph.replay(*batch(step)) if moves else F.cross_entropy(graph.twin(batch(step)[0]), batch(step)[1]).detach()
                guard.step(loss)
        found += [f.diagnosis for f in guard.findings if f.severity > Severity.INFO]
    assert moved == [] and still == ["unchanged_weights"]


def test_a_guards_step_within_a_capture_is_left_out(capturing):
    """It would be captured as well, once and for all: it is a warning that says where the call belongs."""
    model, optimizer = network()
    with Guard(model, optimizer) as guard:
        guard.step(update(model, optimizer, *batch(0)))
        capturing(True)
        with pytest.warns(RuntimeWarning, match=r"guard\.step\(\) was called while a CUDA graph is captured.*after each replay\(\)"):
            guard.step(torch.tensor(math.nan))
        capturing(False)
        guard.step(update(model, optimizer, *batch(1)))
    assert guard.steps == 2 and guard.findings == [] and guard.history.losses().size == 2
