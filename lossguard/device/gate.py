"""Skips an update on the device: the optimizer itself leaves everything as it was. Never reads a value.

Gradients flow in, a flag of exactly 0.0 or 1.0 flows into ``optimizer.found_inf``, which torch's fused optimizers honour
without the host: parameters, moments and step counters stay (checked for Adam, AdamW, SGD, Adagrad). Optimizers that do
not honour it are refused, for no other way of skipping is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SKIPPABLE = ("nonfinite_gradient",)  # what the device can decide before the update
FUSED = "Adam, AdamW, SGD, Adagrad"


def why_not(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer cannot skip exactly, or None if it can."""
    name = type(optimizer).__name__
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"{name} does not honour found_inf; build it with fused=True ({FUSED})"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{name} has a parameter group without fused=True; give fused=True to the optimizer itself"
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        return f"{name} with dampening keeps uninitialised momentum when its first step is skipped; set dampening=0"
    return None


class Gate:
    """The verdict on one optimizer's gradients, and the counters of updates skipped in a row and in all."""

    def __init__(self, optimizer: Optimizer) -> None:
        reason = why_not(optimizer)
        if reason is not None:
            raise ValueError(f"skip= needs an optimizer that can leave an update out exactly: {reason}, or use halt= instead of skip=")
        self.optimizer = optimizer
        self.device = optimizer.param_groups[0]["params"][0].device
        self.flag = torch.zeros((), dtype=torch.float32, device=self.device)
        self.in_a_row = torch.zeros((), dtype=torch.float32, device=self.device)
        self.total = torch.zeros((), dtype=torch.float32, device=self.device)
        self._hook = optimizer.register_step_pre_hook(self._merge)
        _fill_momentum(optimizer)
        self._arm()

    def judge(self, gradients: Sequence[Tensor]) -> None:
        """Decide from the gradients as they are now. A norm that overflows float32 (above 1.8e19) counts as non-finite."""
        if gradients:
            total = torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)).sum()
            self.flag.copy_(~torch.isfinite(total))
            self.in_a_row.add_(1.0).mul_(self.flag)
            self.total.add_(self.flag)
        self._arm()

    def close(self) -> None:
        """Disarm."""
        self._hook.remove()
        if getattr(self.optimizer, "found_inf", None) is self.flag:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _arm(self) -> None:
        self.optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def _merge(self, optimizer: Optimizer, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        """A GradScaler puts its own flag in place just before the step: either flag skips."""
        theirs = getattr(optimizer, "found_inf", None)
        if theirs is None:
            self._arm()
        elif theirs is not self.flag:
            optimizer.found_inf = torch.maximum(theirs.to(self.flag.device), self.flag)  # type: ignore[attr-defined]


def _fill_momentum(optimizer: Optimizer) -> None:
    """SGD whose first step is skipped would keep uninitialised momentum: zeros first (with dampening 0 the result is the same)."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for p in group["params"]:
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
