"""Dead units over a window: how long each ReLU unit has been silent, kept on the device. Never reads a value.

Peaks of one batch flow in (K sites of U units), the share of units silent for a whole window flows out (K,).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lossguard.device import signals

SAMPLES = 30  # a unit is dead after this many silent batches in a row ...
POSITIONS = 1500  # ... that hold at least this many positions: by the rule of three it then fires on < 0.2 % of them
FULL = 1.0 - 1e-4  # of a window: shares of it are summed in float32
BATCHES_OF_GRADIENTS = 50  # where the number of positions is not known: the window the healthy envelopes were measured with


def window(positions: int | None) -> int:
    """How many silent batches in a row make a unit dead.

    >>> window(64), window(4096), window(None)
    (30, 30, 50)
    """
    return BATCHES_OF_GRADIENTS if positions is None else max(SAMPLES, math.ceil(POSITIONS / max(positions, 1)))


class SilentUnits:
    """How much of a window each unit has been silent for without a break. A batch counts by its share of the window it
    asks for, so that batches of different sizes add up; sites measured together lie side by side."""

    def __init__(self) -> None:
        self._home: dict[Hashable, tuple[Tensor, int]] = {}  # site -> the counters it lies in, and its row there
        self._seen: dict[Hashable, float] = {}  # site -> windows seen, where not all of its counters' have seen one
        self._together: dict[tuple[Hashable, ...], Tensor] = {}  # sites -> counters that hold just them, all of which have seen a window

    def update(self, sites: Sequence[Hashable], peaks: Tensor, batches: int) -> Tensor | None:
        """peaks: (K, U), positive where a unit fired in this batch, NaN counts as firing. batches: how many like this
        one make a window. Returns the share of dead units of each site (K,) once a window was seen, None before."""
        key = tuple(sites)
        silent = self._together.get(key)
        settled = silent is not None and silent.shape == peaks.shape and silent.device == peaks.device
        if silent is None or not settled:
            silent = self._counters(sites, peaks)
        silent.add_(1.0 / batches).mul_(peaks <= 0)
        if not settled:
            for site in sites:
                self._seen[site] += 1.0 / batches
            if min(self._seen[site] for site in sites) < FULL:
                return None
            self._together[key] = silent
        return signals.where(torch.ge, silent, FULL).mean(dim=1)

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(4 * t.numel() for t in {id(t): t for t, _ in self._home.values()}.values())

    def _counters(self, sites: Sequence[Hashable], peaks: Tensor) -> Tensor:
        """The counters of these sites, brought together where they were not."""
        homes = [self._home.get(site) for site in sites]
        first = homes[0]
        if first is not None and first[0].shape == peaks.shape and all(h is not None and h[0] is first[0] and h[1] == k for k, h in enumerate(homes)):
            return first[0]
        rows: list[Tensor] = []
        for site, home in zip(sites, homes, strict=True):
            if home is not None and home[0].shape[1] == peaks.shape[1] and home[0].device == peaks.device:
                rows.append(home[0][home[1]])
            else:
                rows.append(torch.zeros(peaks.shape[1], device=peaks.device))
                self._seen[site] = 0.0
        silent = torch.stack(rows)
        self._together = {key: held for key, held in self._together.items() if not set(key) & set(sites)}
        self._home.update({site: (silent, k) for k, site in enumerate(sites)})
        return silent
