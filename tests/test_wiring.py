"""Real runs whose pieces are wired wrongly, beside sound ones that look alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard, Severity


def net(p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(p), nn.Linear(32, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def causes(guard: Guard) -> list[str]:
    return [f.causes[0].name for f in guard.findings if f.severity >= Severity.WARNING]


@pytest.mark.parametrize("rebuilt", [True, False])
def test_a_loss_rebuilt_from_its_number_is_heard(rebuilt: bool) -> None:
    """No parameter has a gradient when the optimizer steps: it is detached from the loss."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for step in range(40):
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            loss = torch.tensor(loss.item(), requires_grad=True) if rebuilt else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert causes(guard) == (["detached from the loss"] if rebuilt else [])


@pytest.mark.parametrize("back", [True, False])
def test_an_average_that_is_written_back_is_heard(back: bool) -> None:
    """A moving average beside the model is sound; written back after each step it undoes the training."""
    model = net()
    average, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for step in range(60):
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1e-3)
                    if back:
                        fast.copy_(slow)
            guard.step(loss)
    assert causes(guard) == (["weights are overwritten"] if back else [])


@pytest.mark.parametrize(("forgotten", "p"), [(True, 0.5), (False, 0.5), (True, 0.0)])
def test_a_forgotten_eval_is_heard(forgotten: bool, p: float) -> None:
    """Evaluations in training mode are heard where the model has dropout at work, and only there."""
    model = net(p)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Guard(model, optimizer) as guard:
        for step in range(60):
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
            if step % 10 == 9:
                model.train(forgotten)
                with torch.no_grad():
                    value = F.cross_entropy(model(batch(1000)[0]), batch(1000)[1])
                model.train()
                guard.validation(value)
    assert ("eval() is not called" in causes(guard)) == (forgotten and p > 0)


def test_a_model_without_matrices_undoes_nothing() -> None:
    """Where no weight is large enough to be judged as a matrix, no update is said to be undone."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for step in range(40):
            x = batch(step)[0][:, :4]
            loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert causes(guard) == []
