"""Whether a gradient norm stands far above the run's own, decided on the device. Never reads a value.

Norms flow in, one an update; a limit for the next norm flows out, infinite while nothing can be said. What was left out
never enters the statistics, and a level that stays is learnt anew, so that the gate cannot lock itself out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limit:
    """How far a gradient norm may stand above the run's own before the update is left out.

    A norm is a spike if its logarithm is above the running mean by ``sigmas`` running deviations, and at least by ``ln(times)``.
    ``Guard(skip={"exploding_gradient": Limit(times=100.0)})`` sets another limit.

    >>> Limit(times=0.5)
    Traceback (most recent call last):
    ValueError: Limit(times=0.5) would leave out usual updates; give a factor above 1, such as 32.0
    """

    times: float = 32.0  # over the geometric mean of accepted norms; healthy single steps reach 31.7 times the median (survey)
    sigmas: float = 6.0  # deviations of the logarithm; OLMo-core's bar for norms, there on a linear scale (survey)
    warmup: int = 64  # accepted updates before anything is a spike; OLMo-core: half a window of 128
    horizon: int = 100  # updates that the running statistics reach back; our own choice, near the 128 of the rules
    patience: int = 10  # spikes in a row after which the new level is learnt; our own choice, below the bound at which skipping halts

    def __post_init__(self) -> None:
        if not self.times > 1.0:
            raise ValueError(f"Limit(times={self.times!r}) would leave out usual updates; give a factor above 1, such as 32.0")
        if not self.sigmas > 0.0:
            raise ValueError(f"Limit(sigmas={self.sigmas!r}) must be a positive number of deviations, such as 6.0")
        for name in ("warmup", "horizon", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise ValueError(f"Limit({name}={value!r}) must be an integer of at least 2: it counts updates")


class Spikes:
    """The running statistics of one optimizer's gradient norms; all of them 0-dim float32 tensors on one device."""

    def __init__(self, limit: Limit, device: torch.device) -> None:
        self.setting = limit
        self.numbers = torch.zeros(4, device=device)  # mean and variance of ln(norm), updates learnt from, spikes in a row
        self.mean, self.variance, self.learnt, self.high = self.numbers.unbind()
        self.limit = torch.full((), math.inf, device=device)  # the next norm must be below it

    def learn(self, norm: Tensor, spiked: Tensor, skipped: Tensor) -> None:
        """An update is over. norm: of its gradients; spiked: 1.0 if that is why it was left out; skipped: 1.0 if it was, for any reason."""
        usable = torch.isfinite(norm) & (norm > 0)
        taken = (1.0 - skipped) * usable
        log = torch.where(usable, norm.log(), self.mean)
        self.learnt.mul_(1.0 - taken * (self.high >= self.setting.patience))  # a level that stays: begin again from here
        rate = taken / (self.learnt + 1.0).clamp(max=self.setting.horizon)
        away = log - self.mean
        self.mean.add_(rate * away)
        self.variance.add_(rate * away.square()).mul_(1.0 - rate)
        self.learnt.add_(taken)
        self.high.add_(spiked).mul_(skipped)
        self.renew()

    def renew(self) -> None:
        """The limit that follows from the statistics."""
        above = (self.setting.sigmas * self.variance.sqrt()).clamp(min=math.log(self.setting.times))
        known = (self.learnt >= self.setting.warmup) & (self.high < self.setting.patience)
        self.limit.copy_(torch.where(known, torch.exp(self.mean + above), math.inf))
