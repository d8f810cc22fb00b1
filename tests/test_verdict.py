"""The two curves, read in a word: every pair."""

import math

import numpy as np
import pytest
import torch

from lossguard import Guard, History
from lossguard.verdict import read

FALL = np.linspace(2.0, 0.5, 200)
FLAT = np.full(200, 1.0)
RISE = np.linspace(0.5, 2.0, 200)


def history(train, val=()):
    rng = np.random.default_rng(0)
    made = History()
    for step, value in enumerate(train):
        made.add_loss(step, float(value) + 0.02 * rng.standard_normal())
    for k, value in enumerate(val):
        made.add_validation(20 * k, float(value))
    return made


@pytest.mark.parametrize(
    ("train", "val", "state"),
    [
        (FALL, [], "learning"),
        (FALL, [2.0, 1.5, 1.2, 1.0, 0.9], "learning"),
        (FALL, [1.0, 1.0, 1.0, 1.0, 1.0], "overfitting begins"),
        (FALL, [2.0, 1.5, 1.2, 1.5, 1.9], "overfitting"),
        (FLAT, [2.0, 1.5, 1.2, 1.0, 0.9], "validation mismatch"),
        (FLAT, [1.0, 1.0, 1.0, 1.0, 1.0], "bottleneck"),
        (FLAT, [], "flat"),
        (RISE, [0.5, 0.8, 1.2, 1.6, 2.0], "diverging"),
        (RISE, [], "diverging"),
        (FALL[:20], [], "too early"),
        ([*FALL, math.nan], [], "not a number"),
    ],
)
def test_each_pair_of_curves_has_its_reading(train, val, state):
    """Training and validation falling, flat or rising read as the catalogue says."""
    assert read(history(train, val)) == state


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_reading_is_free_of_scale(factor):
    """Multiplying every loss changes no reading."""
    made = History()
    for step, value in enumerate(FALL):
        made.add_loss(step, float(value) * factor)
    assert read(made) == "learning"


def test_a_run_reports_its_verdict(tmp_path):
    """guard.validation takes floats and tensors, and a real run that learns reads as learning."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.randn(4, 1)
    with Guard(model, optimizer, record=tmp_path) as guard:
        assert guard.verdict == "too early"
        for step in range(120):
            x = torch.randn(32, 4)
            loss = (model(x) - x @ target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
            if step % 20 == 19:
                guard.validation(loss.detach() if step % 40 == 19 else loss.item())
        assert guard.verdict == "learning"
        with pytest.raises(ValueError, match="must be one scalar, got a dict"):
            guard.validation({"a": 1.0})
        with pytest.raises(ValueError, match="must be a scalar, got a tensor of shape"):
            guard.validation(torch.ones(3))
    assert guard.history.validations()[:, 0].tolist() == [19, 39, 59, 79, 99, 119]
    assert (tmp_path / "rows.jsonl").read_text().count('"kind":"validation"') == 6
