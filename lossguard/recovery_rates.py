"""A factor on learning rates that no scheduler sees: put on just before an optimizer steps, taken off just after.

Schedulers write rates, some from formulas of their own and some from the rate that stands there; a cut that stood in the
group would be lost in the first case and compounded in none. Reads no value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rates:
    """The factor, and the hooks of the optimizers. factor: 1.0 until a cure. before: called before each step of one."""

    def __init__(self, optimizers: Sequence[Optimizer], before: Callable[[], None]) -> None:
        self.factor, self._before = 1.0, before
        self._set: dict[int, list[Any]] = {}  # optimizer -> the rates that their owner set, while it steps
        self._hooks = [hook for o in optimizers for hook in (o.register_step_pre_hook(self._cut), o.register_step_post_hook(self._restore))]

    def close(self) -> None:
        """Take everything off."""
        while self._hooks:
            self._hooks.pop().remove()

    def _cut(self, optimizer: Optimizer, args: Any, keywords: Any) -> None:
        self._before()
        self._restore(optimizer, args, keywords)  # a step that raised has left its rates cut
        if self.factor == 1.0:
            return
        self._set[id(optimizer)] = [_held(group.get("lr")) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, Tensor):
                with torch.no_grad():
                    rate.mul_(self.factor)
            elif rate is not None:
                group["lr"] = rate * self.factor

    def _restore(self, optimizer: Optimizer, args: Any, keywords: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._set.pop(id(optimizer), []), strict=False):
            if isinstance(rate, Tensor):
                with torch.no_grad():
                    group["lr"].copy_(rate)
            elif rate is not None:
                group["lr"] = rate


def _held(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
