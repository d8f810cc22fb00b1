"""What only half precision can do: overflow, and updates that are rounded away. Costs nothing where all is float32.

Outputs and gradients in float16, and weights in either half, flow in; shares flow into rows. Never reads a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lossguard.device import outputs, shards, signals
from lossguard.device.roles import Trained
from lossguard.device.tape import Row

RowOf = Callable[[torch.device], Row]
HALVES = (torch.float16, torch.bfloat16)
LIMIT = torch.finfo(torch.float16).max  # 65504; bfloat16 reaches as far as float32
SAMPLED = 256  # elements of a weight looked at for rounding
MOST = 32  # weights looked at for rounding, spread over the model


class Halves:
    """The half-precision parameters of a model, known since :meth:`plan`."""

    def __init__(self) -> None:
        self._weights: dict[int, list[tuple[int, Tensor]]] = {}  # optimizer -> (index, weight) of those looked at for rounding
        self._narrow: list[tuple[int, Tensor]] = []  # float16 parameters
        self._before: dict[int, tuple[list[int], Tensor]] = {}

    def plan(self, trained: Sequence[Trained]) -> None:
        """The parameters are listed anew."""
        halves = [(i, t) for i, t in enumerate(trained) if t.optimizer >= 0 and t.tensor.dtype in HALVES and t.tensor.layout == torch.strided]
        self._narrow = [(i, t.tensor) for i, t in halves if t.tensor.dtype == torch.float16]
        large = [(i, t) for i, t in halves if shards.own(t.tensor).numel() >= SAMPLED and shards.own(t.tensor).is_contiguous()]
        self._weights = {}
        for i, t in large[:: max(1, -(-len(large) // MOST))]:
            self._weights.setdefault(t.optimizer, []).append((i, t.tensor))

    def begin(self) -> None:
        """A new step."""
        self._before.clear()

    @staticmethod
    def output(site: int, kind: str, output: Tensor, row: Row) -> None:
        """A module's output: how near its largest element is to the end of float16."""
        if output.dtype == torch.float16 and kind not in outputs.ELEMENTWISE:
            with torch.no_grad():
                peak = signals.largest(output.detach())
            row.add_scalars("activation_reach", np.array([site], dtype=np.intp), [peak], np.array([1.0 / LIMIT]))

    def gradients(self, row_of: RowOf) -> None:
        """The gradients after a backward pass, where no loss scaler puts them near the end by design."""
        held = [(i, shards.own(p.grad)) for i, p in self._narrow if p.grad is not None and p.grad.layout == torch.strided]
        held = [(i, g) for i, g in held if g.numel()]
        for device in {g.device for _, g in held}:
            some = [(i, g.detach()) for i, g in held if g.device == device]
            peaks = torch._foreach_norm([g for _, g in some], math.inf, dtype=torch.float32)
            scale = np.full(len(some), 1.0 / LIMIT)
            row_of(device).add_scalars("gradient_reach", np.array([i for i, _ in some], dtype=np.intp), list(peaks), scale)

    def before_update(self, optimizer: int) -> None:
        """Keep a few elements of each weight, and which of their gradients are not zero."""
        for device in {p.device for _, p in self._weights.get(optimizer, ())}:
            there = [(i, p, shards.own(p.grad)) for i, p in self._weights[optimizer] if p.device == device and p.grad is not None]
            there = [(i, p, g) for i, p, g in there if g.layout == torch.strided and g.is_contiguous() and g.numel() >= SAMPLED]
            if there:
                weights, gradients = torch.cat([_few(p) for _, p, _ in there]), torch.cat([_few(g) for _, _, g in there])
                self._before[optimizer] = [i for i, _, _ in there], torch.where(gradients != 0, weights, math.nan)

    def after_update(self, optimizer: int, row_of: RowOf) -> None:
        """How many of those elements with a gradient are exactly as they were."""
        held = self._before.pop(optimizer, None)
        if held is None:
            return
        sites, before = held
        by_site = dict(self._weights[optimizer])
        after = torch.cat([_few(by_site[i]) for i in sites])
        pushed = torch.isfinite(before).view(len(sites), SAMPLED)
        same = (after == before).view(len(sites), SAMPLED)
        share = same.sum(dim=1) / pushed.sum(dim=1)  # 0 / 0, no gradient at all, is NaN: nothing was to be rounded
        row_of(before.device).add("rounded_away", np.array(sites, dtype=np.intp), share.to(torch.float32))


def _few(t: Tensor) -> Tensor:
    """SAMPLED elements spread over a contiguous tensor, a view; the odd stride does not stay in one column."""
    t = shards.own(t)
    step = max(1, t.numel() // SAMPLED - 1) | 1
    return torch.as_strided(t.detach(), (SAMPLED,), (step if step * (SAMPLED - 1) < t.numel() else 1,), t.storage_offset())
