"""Why a value is not finite: each cause of the catalogue, produced by a real run, is the first that is named."""

import pytest
import torch
import torch.nn.functional as F
from models import make_batch, mlp
from torch import nn

from lossguard import Guard, TrainingHalted

LATE, SAMPLED = 63, 60  # a step between samples, and a sampled one


def train(make, loss_of, *, batch=None, lr=0.1, steps=120, show=True):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Guard(model, optimizer) as guard:
        for i in range(steps):
            x, y = (batch or (lambda i: make_batch("mlp", seed=i, n=32)))(i)
            if show:
                guard.batch(x, y)
            loss = loss_of(model, x, y, i)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            try:
                guard.step(loss)
            except TrainingHalted:
                break
    return guard


def nonfinite(guard):
    """The finding that ended the run, or the gravest about values that are not finite."""
    found = [f for f in guard.findings if f.diagnosis.startswith("nonfinite")]
    assert found, guard.findings
    return max(found, key=lambda f: f.severity)


def cross_entropy(model, x, y, i):
    return F.cross_entropy(model(x), y)


def squared(model, x, y, i):
    return F.mse_loss(model(x), y)


def regression(i):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(i))
    return x, 3 * x[:, :1]


def sequences(i):
    x = torch.randn(16, 60, 4, generator=torch.Generator().manual_seed(i))
    return x, x[:, :, 0].sum(1, keepdim=True)


def regressor():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


class Recurrent(nn.Module):
    """A recurrent net whose state grows through time."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.RNN(4, 64, nonlinearity="relu", batch_first=True), nn.Linear(64, 1)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, 1.5)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Cell(nn.Module):
    """The same, unrolled by hand."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.Linear(68, 64), nn.Linear(64, 1)

    def forward(self, x):
        h = x.new_zeros(len(x), 64)
        for t in range(x.shape[1]):
            h = F.relu(self.cell(torch.cat([x[:, t], h], 1)) * 1.7)
        return self.out(h)


EXPLODING = {
    "squared error, lr 1": lambda: train(regressor, squared, batch=regression, lr=1.0),
    "squared error, lr 0.35": lambda: train(regressor, squared, batch=regression, lr=0.35),
    "one layer, lr 2.5": lambda: train(lambda: nn.Linear(16, 1), squared, batch=regression, lr=2.5, steps=400),
    "cross entropy, lr 50": lambda: train(mlp, cross_entropy, lr=50.0),
    "recurrent": lambda: train(Recurrent, squared, batch=sequences, lr=1e-2),
    "unrolled": lambda: train(Cell, squared, batch=sequences, lr=1e-2),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_an_explosion_is_told_by_the_growth_before_it(name):
    """A learning rate too high, and a recurrent net: exploding gradient, with a lower learning rate and a clip value."""
    finding = nonfinite(EXPLODING[name]())
    assert finding.causes[0].name == "exploding gradient", finding
    assert {"lr"} <= {k for r in finding.remedies for k in r.change} or "max_norm" in finding.remedies[0].change


def since(step, term):
    """Cross entropy, and from a step on another term."""
    return lambda model, x, y, i: F.cross_entropy(model(x), y) + (term(model(x), x, y) if i >= step else 0.0)


def none_left(p, x, y):
    """A mean over the samples of a class that has none."""
    return (F.cross_entropy(p, y, reduction="none") * (y == 9)).sum() / (y == 9).sum()


LOSS = {
    "division by 0": none_left,
    "log of 0": lambda p, x, y: -torch.log(F.softmax(p, 1)[:, 0] * 0).mean(),
    "log of a negative": lambda p, x, y: torch.log(p.sum(1) - p.sum(1).detach() - 1e-3).mean(),
    "root at 0": lambda p, x, y: torch.sqrt((p * 0).sum(1)).mean(),
    "divergence of one-hot targets": lambda p, x, y: (F.one_hot(y, 4) * (F.one_hot(y, 4).float().log() - F.log_softmax(p, 1))).sum(),
}


@pytest.mark.parametrize("step", [SAMPLED, LATE])
@pytest.mark.parametrize("name", LOSS)
def test_a_loss_function_is_told_by_the_calm_before_it(name, step):
    """Finite inputs and a loss that fell normally: the loss function, sampled at that step or not."""
    finding = nonfinite(train(mlp, since(step, LOSS[name])))
    assert finding.causes[0].name == "loss function", finding
    assert step - 1 <= finding.step <= step + 1


def spoilt(at, value=float("nan")):
    def batch(i):
        x, y = make_batch("mlp", seed=i, n=32)
        if i == at:
            x = x.clone()
            x[3, 2] = value
        return x, y

    return batch


@pytest.mark.parametrize("step", [SAMPLED, LATE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_is_named(step, value):
    """NaN or Inf in one input: that batch, by its number."""
    finding = nonfinite(train(mlp, cross_entropy, batch=spoilt(step, value)))
    assert finding.diagnosis == "nonfinite_input" and finding.step == step and f"batch {step}" in finding.message


def test_a_bad_batch_that_nobody_showed_is_the_first_suspect():
    """A built-in loss is finite for finite outputs: without sight of the batch, the batch comes first, and how to show it."""
    finding = nonfinite(train(mlp, cross_entropy, batch=spoilt(LATE), show=False))
    assert finding.causes[0].name == "bad input" and "guard.batches" in finding.remedies[0].text


class Exponential(nn.Module):
    def forward(self, x):
        return torch.exp(x)


def loud(step):
    return lambda model, x, y, i: F.cross_entropy(model(x * (400.0 if i >= step else 1.0)), y)


def exponential():
    return nn.Sequential(nn.Linear(16, 64), Exponential(), nn.Linear(64, 4))


def test_an_overflow_in_the_forward_pass_is_placed():
    """exp of a large number, at a sampled step: the module by its name."""
    finding = nonfinite(train(exponential, loud(SAMPLED), lr=0.05))
    assert finding.diagnosis == "nonfinite_activation" and finding.where == "1 (Exponential, forward)"
    assert finding.causes[0].name == "overflow in forward"


def test_an_overflow_between_samples_is_told_from_the_loss():
    """Every weight is NaN, the batch was finite, and the loss is a built-in one: the forward pass, before the loss function."""
    finding = nonfinite(train(exponential, loud(LATE), lr=0.05))
    assert finding.diagnosis == "nonfinite_weight" and finding.causes[0].name == "overflow in forward"


def test_weights_that_are_not_finite_under_a_finite_loss():
    """The gradient of a branch that torch.where left out is NaN: weights are lost although the loss is finite."""

    def hidden(p, x, y):
        return 0.1 * torch.where(p > -1e9, p, torch.sqrt(p.detach() * 0 + 0 * p)).mean()

    guard = train(mlp, since(SAMPLED, hidden))
    finding = nonfinite(guard)
    assert finding.step == SAMPLED and finding.diagnosis == "nonfinite_gradient" and "6.bias" in finding.where
    assert torch.isfinite(torch.tensor(guard.history.losses())).all()


def test_what_came_after_the_loss_is_not_its_cause():
    """The update that a NaN loss made is huge; the loss is not blamed on it."""
    finding = nonfinite(train(mlp, since(SAMPLED, LOSS["log of a negative"])))
    assert all(c.name != "exploding gradient" or c.confidence < 0.5 for c in finding.causes)
