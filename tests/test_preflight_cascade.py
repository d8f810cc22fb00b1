"""What follows from a fault stands behind it: the roots of a preflight are its findings, the rest are their consequences."""

from __future__ import annotations

import preflight_tasks
import pytest
import torch
from torch import nn

from lossguard import Severity, preflight
from lossguard.findings import Cause, Finding
from lossguard.preflight.cascade import cascade


def found(name, severity=Severity.WARNING, cause="any"):
    return Finding(name, severity, -1, "model", "measured", causes=(Cause(cause, 0.9, "measured"),))


def flown(task):
    torch.manual_seed(0)
    model, batches, criterion, optimizers, keywords = task()
    return preflight(model, batches, criterion, optimizers, **keywords)


@pytest.mark.parametrize("root", ["wrong_output_activation", "invalid_labels", "unnormalized_input", "poor_initialization", "unchanged_weights"])
def test_a_root_takes_what_follows_from_it(root):
    """A first loss that is off and a batch that is not learned are no events of their own beside such a root."""
    events = cascade([found(root), found("initial_loss_off"), found("cannot_overfit_batch")])
    assert [e.diagnosis for e in events] == [root]
    assert [f.diagnosis for f in events[0].consequences] == ["initial_loss_off", "cannot_overfit_batch"]


@pytest.mark.parametrize("cause", ["sum reduction", "over-regularised", "targets not standardised"])
def test_a_fault_of_its_own_is_no_consequence(cause):
    """A first loss that is off because of the loss itself stands beside another root."""
    events = cascade([found("unnormalized_input"), found("initial_loss_off", cause=cause)])
    assert [e.diagnosis for e in events] == ["unnormalized_input", "initial_loss_off"] and not events[0].consequences


def test_an_info_explains_nothing_and_a_halt_is_never_hidden():
    """Only warnings and graver findings are roots; what halts stands at the top."""
    events = cascade([found("unnormalized_input", Severity.INFO), found("cannot_overfit_batch")])
    assert [e.diagnosis for e in events] == ["unnormalized_input", "cannot_overfit_batch"]
    assert len(cascade([found("invalid_labels"), found("initial_loss_off", Severity.HALT)])) == 2


def test_what_follows_is_told_in_words():
    """The text names a consequence and when it was seen."""
    result = flown(preflight_tasks.all_zero)
    assert "then       cannot_overfit_batch before the first step" in str(result)


def test_a_leak_between_samples_has_its_own_name():
    """Samples that reach into each other are a diagnosis of their own, and weights that stay are another."""
    result = flown(preflight_tasks.leaking)
    assert [f.diagnosis for f in result] == ["cross_sample_leak"] and result.answers["unchanged_weights"] == "pass"


def test_a_loss_by_hand_over_equal_shapes_is_no_broadcast():
    """The same loss on outputs and targets of one shape passes, and so does one that squeezes."""
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for target, loss in ((x[:, :1], lambda o, y: ((o - y) ** 2).mean()), (x[:, 0], lambda o, y: ((o.squeeze(1) - y) ** 2).mean())):
        torch.manual_seed(0)
        result = preflight(nn.Linear(8, 1), preflight_tasks.loader(x, target), loss)
        assert result.answers["invalid_labels"] != "fail", str(result)
