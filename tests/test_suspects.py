"""Why steps are too large, weights stand still or a loss rises: the first cause is the one that was planted, in real runs."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard
from lossguard.advice import faster, slower, stopped_rate
from lossguard.device import roles
from lossguard.findings import Severity
from lossguard.host.history import History, Param, Sample
from lossguard.rules.suspects import suspects

EXPLODED = ("update_ratio_high", "oscillating_loss", "diverging_loss", "exploding_gradient", "loss_spike")
WAYS = torch.randn(16, 4, generator=torch.Generator().manual_seed(7))


def data(i, n=32):
    """Four classes, told apart by a fixed linear map."""
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(i))
    return x, (x @ WAYS).argmax(1)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def train(make=net, *, lr=0.1, steps=240, batch=data, loss_of=F.cross_entropy, change=None, cleared=None, **settings):
    """One run; halts are passed over. change(step, model, optimizer) is called before each step."""
    torch.manual_seed(0)
    model = make()
    optimizer = settings.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=lr, **settings)
    with Guard(model, optimizer, halt=()) as guard:
        for i in range(steps):
            if change is not None:
                change(i, model, optimizer)
            x, y = batch(i)
            guard.batch(x, y)
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
            if cleared is not None:
                optimizer.zero_grad(set_to_none=cleared)
            optimizer.step()
            guard.step(loss)
    return guard


def events(guard):
    """Every finding, roots before what follows from them."""
    for finding in guard.findings:
        yield finding
        yield from finding.consequences


def first(guard, *diagnoses):
    """The first alarm of these, wherever it stands."""
    found = [f for f in events(guard) if f.diagnosis in diagnoses and f.severity >= Severity.WARNING]
    assert found, [f.diagnosis for f in events(guard)]
    return found[0]


def set_lr(at, lr):
    def change(step, model, optimizer):
        if step >= at:
            optimizer.param_groups[0]["lr"] = lr

    return change


def test_a_rate_that_rose_is_named_with_the_one_before():
    """The learning rate jumps: it is the cause, and the remedy is the rate from before."""
    finding = first(train(change=set_lr(150, 20.0)), "update_ratio_high")
    assert finding.causes[0].name == "learning rate too high" and "rose from 0.1 to 20" in finding.causes[0].because
    assert finding.remedies[0].change == {"lr": 0.1}


@pytest.mark.parametrize(("scale", "last", "name"), [(20, 1000, "input changed"), (1000, 150, "odd batch")])
def test_an_input_that_changed_is_told_from_one_odd_batch(scale, last, name):
    """Another scale in one batch, or from there on."""

    def batch(i):
        x, y = data(i)
        return (x * scale if 150 <= i <= last else x), y

    finding = first(train(batch=batch, momentum=0.9, lr=0.05), "update_ratio_high", "diverging_loss")
    assert finding.causes[0].name == name and "step 150" in finding.causes[0].because, finding


@pytest.mark.parametrize(("optimizer", "decay", "lr"), [(torch.optim.SGD, 1.5, 0.1), (torch.optim.AdamW, 100.0, 2e-3)])
def test_decay_that_makes_the_update_is_named(optimizer, decay, lr):
    """A weight decay that is larger than the gradient, coupled or not: its size is the remedy."""
    finding = first(train(optimizer=optimizer, weight_decay=decay, lr=lr), "update_ratio_high")
    assert finding.causes[0].name == "weight decay too high" and finding.remedies[0].change["weight_decay"] < 0.1


def test_an_ordinary_decay_is_not_blamed_for_a_rate():
    """A rate far too high under the usual decay is a rate too high."""
    finding = first(train(optimizer=torch.optim.AdamW, lr=1.0, weight_decay=0.01), "update_ratio_high")
    assert finding.causes[0].name == "learning rate too high"


def test_targets_far_from_the_outputs_are_named():
    """Targets of ten thousand: standardise them."""
    finding = first(
        train(
            lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)),
            batch=lambda i: (data(i)[0], 1e4 * data(i)[0][:, :1]),
            loss_of=F.mse_loss, lr=0.02, momentum=0.9, steps=60,
        ),
        "update_ratio_high",
    )  # fmt: skip
    assert finding.causes[0].name == "targets not standardised" and finding.remedies[0].change == {"standardize_targets": True}


def test_a_summed_loss_is_named():
    """reduction="sum" multiplies the rate by the batch size."""
    finding = first(train(loss_of=nn.CrossEntropyLoss(reduction="sum"), lr=0.5, steps=60), "update_ratio_high")
    assert finding.causes[0].name == "sum reduction" and finding.remedies[0].change == {"loss_reduction": "mean"}


def test_inputs_that_are_not_normalised_are_named():
    """Inputs of 300 from the first step on."""
    finding = first(train(batch=lambda i: (300 * data(i)[0], data(i)[1]), momentum=0.9, steps=100), "update_ratio_high")
    assert finding.causes[0].name == "input not normalised" and finding.remedies[0].change == {"normalize_input": True}


def test_weights_that_are_written_back_are_named():
    """A checkpoint is loaded before every step: the loss rises, and no rate is to blame."""
    kept = {}

    def change(step, model, optimizer):
        if step == 0:
            kept.update(copy.deepcopy(model.state_dict()))
        if step >= 150:
            model.load_state_dict(kept)

    finding = first(train(change=change), "diverging_loss", "loss_spike")
    assert finding.causes[0].name == "weights are overwritten", finding


def test_labels_that_slip_are_named():
    """The loss leaps to where it began, and neither the rate nor the input changed."""

    def batch(i):
        x, y = data(i)
        return x, (y.roll(3) if i >= 180 else y)

    finding = first(train(batch=batch, lr=0.2), "diverging_loss", "loss_spike")
    assert finding.causes[0].name == "labels or targets do not belong to the inputs", finding


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_before_the_step_are_named(to_none):
    """zero_grad() between backward() and step(), with gradients of None or of 0."""
    finding = first(train(steps=60, cleared=to_none), "unchanged_weights")
    assert finding.causes[0].name == "gradients are cleared before the step", finding


def test_a_probability_that_underflowed_is_named():
    """The logarithm of the smallest float32 as a loss for every batch."""

    def make():
        model = net()
        model[-1].bias.data[3] = 300.0
        return model

    def loss_of(out, y):
        return -torch.softmax(out, 1).gather(1, (y % 3).unsqueeze(1)).clamp(min=torch.finfo(torch.float32).tiny).log().mean()

    finding = first(train(make, loss_of=loss_of, steps=60), "unchanged_weights")
    assert finding.causes[0].name == "softmax underflow" and "87.33" in finding.causes[0].because


def test_a_rate_that_is_not_a_number_is_named():
    """0 / 0 in a warm-up: neither the loss function nor an explosion."""
    finding = first(train(lr=0.1, change=set_lr(0, float("nan")), steps=30), "nonfinite_weight")
    assert finding.causes[0].name == "learning rate is not finite"


def test_weights_written_to_between_steps_are_told_from_an_overflow():
    """NaN in the first layer's weights, a finite input and a finite update before it."""

    def change(step, model, optimizer):
        if step == 120:
            with torch.no_grad():
                model[0].weight[5] = float("nan")

    finding = first(train(change=change, steps=140), "nonfinite_activation", "nonfinite_loss", "nonfinite_weight")
    assert finding.causes[0].name in ("bad weights", "weights are overwritten"), finding


class Attention(nn.Module):
    """One head over rows; rows of zeros are padding."""

    def __init__(self):
        super().__init__()
        self.score, self.value, self.head = nn.Linear(4, 1), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x):
        rows = x.view(-1, 4, 4)
        scores = self.score(rows).squeeze(-1).masked_fill(rows.abs().sum(-1) == 0, float("-inf"))
        return self.head((scores.softmax(-1).unsqueeze(-1) * self.value(rows)).sum(1))


def test_a_row_that_is_masked_altogether_is_named():
    """A sample of padding only: its softmax is 0/0."""

    def batch(i):
        x, y = data(i)
        x[3] *= 0.0 if i == 80 else 1.0
        return x, y

    finding = first(train(Attention, batch=batch, steps=100), "nonfinite_activation")
    assert finding.causes[0].name == "fully masked attention", finding


def run_of(ratios, lr):
    """A history of update ratios of one matrix."""
    history = History(params=[Param("w", 100)])
    for step, u in enumerate(ratios):
        values = {"weight_norm": (np.array([0]), np.array([1.0])), "update_norm": (np.array([0]), np.array([u]))}
        history.add_sample(Sample(step, values, {"lr": lr, "stepped": 1.0}))
    return history


@pytest.mark.parametrize(
    ("ratios", "lr", "expected"),
    [([0.5, 14.0, 20.0], 20.0, 0.2), ([23.0, 0.8, 0.3], 0.2, 5e-3), ([5.0], 0.3, 3e-3), ([], 1.0, 0.1), ([1e-4], 1.0, 0.1)],
)
def test_a_lower_rate_is_chosen_by_what_the_rate_did(ratios, lr, expected):
    """Updates of about a hundredth of the weights, by the gentlest of the first; a tenth at most, a hundredth at least."""
    assert slower(run_of(ratios, lr) if ratios else run_of([float("nan")], lr)).change["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(("ratios", "lr", "expected"), [([2e-10, 1.5e-10], 1e-8, 0.5), ([1e-3], 0.01, 0.1)])
def test_a_higher_rate_is_chosen_by_what_the_rate_did(ratios, lr, expected):
    """The same upwards, ten times at least."""
    assert faster(run_of(ratios, lr)).change["lr"] == pytest.approx(expected)


def test_a_schedule_that_ended_is_named_and_a_small_rate_is_not():
    """A rate that fell to nothing was taken away; one that never was larger was chosen."""
    history = run_of([1e-3], 0.1)
    history.add_sample(Sample(1, {}, {"lr": 1e-9}))
    assert stopped_rate(history) is not None and stopped_rate(run_of([1e-3], 1e-9)) is None


def test_a_momentum_that_forgets_too_slowly_is_the_cause_of_swings():
    """At a momentum of 0.999 the loss swings: the momentum is named, and what it usually is. 0.99, which recipes use, is never named."""
    named = [f for f in events(train(momentum=0.999, lr=0.05, steps=400)) if f.diagnosis in EXPLODED and f.severity >= Severity.WARNING]
    assert "oscillating_loss" in [f.diagnosis for f in named]
    assert {(f.causes[0].name, f.remedies[0].change.get("momentum")) for f in named} == {("momentum too high", 0.9)}
    assert not any(cause.name == "momentum too high" for f in events(train(momentum=0.99, lr=0.5)) for cause in f.causes)


def test_the_first_beta_of_adam_is_its_momentum():
    """Betas in the wrong order: a mean that lasts 1000 steps."""
    optimizer = torch.optim.Adam(net().parameters(), betas=(0.999, 0.9))
    assert roles.settings([optimizer])["momentum"] == 0.999
    history = History()
    history.add_sample(Sample(0, {}, roles.settings([optimizer])))
    assert [cause.name for cause, _ in suspects(history)] == ["momentum too high"]
