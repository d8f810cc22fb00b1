"""Dead units over a window: how long each ReLU unit has been silent, kept on the device. Never reads a value.

Peaks of one batch flow in (K sites of U units), the share of units silent for a whole window flows out (K,).
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

SAMPLES = 30  # a unit is dead after this many silent batches in a row ...
POSITIONS = 1500  # ... that hold at least this many positions: by the rule of three it then fires on < 0.2 % of them
BATCHES_OF_GRADIENTS = 50  # where the number of positions is not known: the window the healthy envelopes were measured with


def window(positions: int | None) -> int:
    """How many silent batches in a row make a unit dead.

    >>> window(64), window(4096), window(None)
    (30, 30, 50)
    """
    return BATCHES_OF_GRADIENTS if positions is None else max(SAMPLES, math.ceil(POSITIONS / max(positions, 1)))


class SilentUnits:
    """Counters of silent batches in a row, one per unit; groups are made at first sight."""

    def __init__(self) -> None:
        self._silent: dict[Hashable, Tensor] = {}
        self._batches: dict[Hashable, int] = {}

    def update(self, group: Hashable, peaks: Tensor, batches: int) -> Tensor | None:
        """peaks: (K, U), positive where a unit fired in this batch, NaN counts as firing. Returns the share of dead
        units of each site (K,) once ``batches`` batches were seen, None before."""
        silent = self._silent.get(group)
        if silent is None or silent.shape != peaks.shape:
            silent = self._silent[group] = torch.zeros(peaks.shape, device=peaks.device)
            self._batches[group] = 0
        silent.add_(1.0).mul_(peaks <= 0)
        self._batches[group] += 1
        if self._batches[group] < batches:
            return None
        return (silent >= batches).to(torch.float32).mean(dim=1)

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(4 * t.numel() for t in self._silent.values())
