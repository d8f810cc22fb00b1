"""Skips an update on the device: the optimizer itself leaves everything as it was. Never reads a value.

Gradients flow in, a flag of exactly 0.0 or 1.0 flows into ``optimizer.found_inf``, which torch's fused optimizers honour
without the host: parameters, moments and step counters stay (checked for Adam, AdamW, SGD, Adagrad). Optimizers that do
not honour it are refused, for no other way of skipping is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.device import signals
from lossguard.device.tape import Row

SKIPPABLE = ("nonfinite_gradient",)  # what the device can decide before the update
FUSED = "Adam, AdamW, SGD, Adagrad"


def why_not(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer cannot skip exactly, or None if it can."""
    name = type(optimizer).__name__
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if all(group.get("fused") for group in optimizer.param_groups):  # Adagrad does not in torch 2.11, and does in 2.13
            return f"{name} of torch {torch.__version__} does not honour found_inf although it is fused; use another of {FUSED}, or a newer torch"
        return f"{name} does not honour found_inf; build it with fused=True ({FUSED})"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{name} has a parameter group without fused=True; give fused=True to the optimizer itself"
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        return f"{name} with dampening keeps uninitialised momentum when its first step is skipped; set dampening=0"
    return None


class Gate:
    """The verdict on one optimizer's gradients, and the counters of updates skipped in a row and in all."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.device = optimizer.param_groups[0]["params"][0].device
        self.flag = torch.zeros((), dtype=torch.float32, device=self.device)
        self.in_a_row = torch.zeros((), dtype=torch.float32, device=self.device)
        self.total = torch.zeros((), dtype=torch.float32, device=self.device)
        self._filled = 0
        mine = weakref.ref(self)  # the optimizer outlives a forgotten guard, and must not stay shut then
        hooks = [
            optimizer.register_step_pre_hook(lambda o, a, k: _call(mine, "_merge")),
            optimizer.register_step_post_hook(lambda o, a, k: _call(mine, "_count")),
        ]
        self.close = weakref.finalize(self, _disarm, optimizer, self.flag, hooks)  # disarms, once
        self.close.atexit = False
        self._arm()

    def judge(self) -> None:
        """Decide from the gradients as they are now. A norm that overflows float32 (above 1.8e19) counts as non-finite."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms = signals.l2_of_each([g._values() if g.is_sparse else g for g in gradients])
            total = torch.stack([n.to(self.device, non_blocking=True) for n in norms]).sum()
            self.flag.copy_(~torch.isfinite(total))
        self._arm()

    def _arm(self) -> None:
        self.optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def _merge(self) -> None:
        """A GradScaler puts its own flag in place just before the step: either flag skips."""
        self._fill_momentum()
        theirs = getattr(self.optimizer, "found_inf", None)
        if theirs is None:
            self._arm()
        elif theirs is not self.flag:
            self.optimizer.found_inf = torch.maximum(theirs.to(self.flag.device), self.flag)  # type: ignore[attr-defined]

    def _count(self) -> None:
        """One count for each update, however many backward passes led to it."""
        self.in_a_row.add_(1.0).mul_(self.flag)
        self.total.add_(self.flag)

    def _fill_momentum(self) -> None:
        """SGD whose first step is skipped would keep uninitialised momentum: zeros first (with dampening 0 the result is the same)."""
        groups = self.optimizer.param_groups
        held = sum(len(group["params"]) for group in groups)
        if held == self._filled or not isinstance(self.optimizer, torch.optim.SGD):
            return
        self._filled = held
        for group in groups:
            if group["momentum"] and not group["dampening"]:
                for p in group["params"]:
                    self.optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


def armed(optimizers: Sequence[Optimizer]) -> list[Gate]:
    """A gate for each optimizer. Raises ``ValueError`` before any is armed if one cannot skip exactly."""
    for optimizer in optimizers:
        reason = why_not(optimizer)
        if reason is not None:
            raise ValueError(f"skip= needs an optimizer that can leave an update out exactly: {reason}, or use halt= instead of skip=")
    return [Gate(optimizer) for optimizer in optimizers]


def _disarm(optimizer: Optimizer, flag: Tensor, hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    if getattr(optimizer, "found_inf", None) is flag:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _call(mine: weakref.ref[Gate], method: str) -> None:
    gate = mine()
    if gate is not None:
        getattr(gate, method)()


def lay(some: Sequence[Gate], row_of: Callable[[torch.device], Row]) -> None:
    """The counters of skipped updates, into rows of the tape."""
    for k, gate in enumerate(some):
        row_of(gate.device).add_scalars("consecutive_skips", np.array([k]), [gate.in_a_row])
        row_of(gate.device).add_scalars("total_skips", np.array([k]), [gate.total])
