"""The first steps at the chosen learning rate, on a copy: how far they go, and whether the loss bears them. A bench flows in, a ``Pace`` flows out.

What makes a sum over the batch or a large target a fault is the learning rate that was not chosen for it; this is where that is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossguard.preflight.bench import Bench, Twin
from lossguard.preflight.rates import rebuilt

STEPS = 5  # a rate far too high shows within; momentum is half awake by then
Change = Callable[[Any], Any]


@dataclass
class Pace:
    """worst: the largest loss after a step over the first loss. ratio: norm of the first update over the weights', the middle matrix.
    moved: root mean square of the outputs' change per step."""

    worst: float
    ratio: float
    moved: float


def pace(bench: Bench, targets: Change | None = None) -> Pace | None:
    """A few steps of the user's own optimizers; None where there is none or it cannot be tried. targets: what to make of them first."""
    if not bench.optimizers or not bench.kept:
        return None
    try:
        return _walk(bench, targets)
    except Exception:  # an optimizer that cannot be rebuilt, or a criterion that does not take the targets
        return None


def _walk(bench: Bench, targets: Change | None) -> Pace:
    with bench.twin() as twin:
        names = {id(p): n for n, p in Twin(bench.model, bench.criterion, bench.forward).trainable.items()}
        optimizers = [rebuilt(o, names, twin.trainable, 1.0) for o in bench.optimizers]
        if targets is not None:
            criterion = twin.criterion
            twin.criterion = lambda outputs, given: criterion(outputs, targets(given))
        matrices = [p for p in twin.trainable.values() if p.dim() > 1]
        before = [p.detach().clone() for p in matrices]
        batch = bench.kept[0]
        first = twin.run(batch)
        worst, ratio, done = 0.0, math.nan, first
        for step in range(STEPS):
            done = twin.run(batch, grad=True)
            worst = max(worst, done.loss / first.loss if math.isfinite(done.loss) else math.inf)
            if done.value is None or not math.isfinite(done.loss):
                break
            for optimizer in optimizers:
                optimizer.zero_grad()
            done.value.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            if step == 0:
                ratio = _middle([_ratio(old, p.detach()) for old, p in zip(before, matrices)])
        done = twin.run(batch)
        worst = max(worst, done.loss / first.loss if math.isfinite(done.loss) else math.inf)
        return Pace(worst, ratio, _distance(first.outputs, done.outputs) / STEPS)


def _ratio(old: Tensor, new: Tensor) -> float:
    norm = float(old.norm())
    return float((new - old).norm()) / norm if norm > 0 else math.nan


def _middle(values: list[float]) -> float:
    kept = sorted(v for v in values if not math.isnan(v))
    return kept[len(kept) // 2] if kept else math.nan


def _distance(one: Any, two: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.shape != two.shape:
        return math.nan
    return float(torch.sub(two.float(), one.float()).square().mean().sqrt())
