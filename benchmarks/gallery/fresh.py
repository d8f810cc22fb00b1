"""The loop that most of the fresh healthy programs share, and a table of prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gallery import data
from gallery.registry import Job

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Any]


def fit(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, loss_of: Loss, *,
    schedule: Any = None, clip: float | None = None, every: int = 0, validate: Callable[[], float] | None = None, **keywords: Any,
) -> None:  # fmt: skip
    """The loop of most programs here. every: steps between evaluations."""
    guard = job.guard(model, optimizer, **keywords)
    model.train()
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        terms, total = (loss, sum(loss.values())) if isinstance(loss, dict) else (loss, loss)
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        guard.step(terms)
        if validate is not None and every and (i + 1) % every == 0:
            model.eval()
            with torch.no_grad():
                held = validate()
            model.train()
            guard.validation(held)
    model.eval()


def explained(prediction: Tensor, y: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - float((prediction.squeeze(-1) - y).square().mean() / y.var())


def houses(n: int = 3000) -> data.Split:
    """Prices as a housing table has them: skewed features, one interaction, a long upper tail that is capped."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, 8, generator=g)
    x[:, :3] = x[:, :3].mul(0.8).exp()
    y = 0.5 * x[:, 0] + 0.3 * x[:, 3] * x[:, 4] + 0.4 * torch.sin(2 * x[:, 5]) + 0.2 * x[:, 1] + 0.3 * torch.randn(n, generator=g)
    x = (x - x.mean(0)) / x.std(0)
    return data.split(x, ((y - y.mean()) / y.std()).clamp(max=3.0))
