"""The tape: preallocated device memory that a step writes into. Never reads, never waits.

``Pulse`` takes a few numbers of every step, ``Row`` all numbers of a sampled step. What each number means is kept on
the host beside it (``Segment``), so no index or marker travels through the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Sites = npt.NDArray[np.intp]
Scale = npt.NDArray[np.float64]
JOINED = "joined"  # the first number of a row that all ranks measured together: 1 where all of them could, else the row is void


@dataclass(frozen=True)
class Segment:
    """What a run of numbers in a row means. A site of -1 is padding; ``scale`` is multiplied in on the host."""

    signal: str
    sites: Sites
    scale: Scale | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """What the numbers of a whole row mean, in their order. The same object as long as that does not change, so that the
    host may keep what it derives from it."""

    segments: tuple[Segment, ...]


class Pulse:
    """A block of ``rows`` steps by ``columns`` numbers, float32, written cell by cell: one copy a number.

    >>> pulse = Pulse(rows=2, columns=1, device=torch.device("cpu"))
    >>> pulse.put(0, torch.tensor(2.5)); pulse.advance(); pulse.filled
    1
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.block = torch.full((rows, columns), float("nan"), device=device)
        self.cells = [[self.block[i, j] for j in range(columns)] for i in range(rows)]
        self.rows = rows
        self.filled = 0

    def put(self, column: int, value: Tensor | float) -> None:
        """Write one number of the current step: a 0-dim tensor on any device, or a host number."""
        cell = self.cells[self.filled][column]
        if isinstance(value, Tensor):
            cell.copy_(value, non_blocking=True)
        else:
            cell.fill_(value)

    def advance(self) -> None:
        """The current step is complete."""
        self.filled += 1

    @property
    def full(self) -> bool:
        """No step fits any more: hand over, then ``clear``."""
        return self.filled == len(self.cells)

    def clear(self) -> None:
        """Start again. The next writes are ordered behind the copy that is under way."""
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.block.numel() * 4


class Row:
    """The numbers of one sampled step on one device: collected as small tensors, laid down by one concatenation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, device=device)
        self._vectors: list[Tensor] = []
        self._segments: list[Segment] = []
        self._scalars: list[Tensor] = []
        self._scalar_segments: list[Segment] = []
        self._layout = Layout(())

    def add(self, signal: str, sites: Sites, numbers: Tensor, scale: Scale | None = None) -> None:
        """A vector with one number per site (any float or integer dtype)."""
        self._vectors.append(numbers)
        self._segments.append(Segment(signal, sites, scale))

    def add_block(self, names: Sequence[str], sites: Sequence[Sites], numbers: Tensor, scale: Scale | None = None) -> None:
        """A contiguous matrix (names, K): one signal a line, each with the sites of its own."""
        self._vectors.append(numbers.view(-1))
        self._segments += [Segment(name, of, scale) for name, of in zip(names, sites, strict=False)]

    def add_scalars(self, signal: str, sites: Sites, numbers: list[Tensor], scale: Scale | None = None) -> None:
        """0-dim tensors, one per site; all scalars of a row are stacked at once."""
        self._scalars.extend(t if t.dtype == torch.float32 else t.to(torch.float32) for t in numbers)
        self._scalar_segments.append(Segment(signal, sites, scale))

    def lay_down(self) -> tuple[Tensor, Layout]:
        """All numbers in one float32 vector of preallocated memory, and their meaning in the same order. Empties the row."""
        vectors, segments = self._vectors, self._segments
        if self._scalars:
            vectors, segments = [*vectors, torch.stack(self._scalars)], [*segments, *self._scalar_segments]
        width = sum(v.numel() for v in vectors)
        if width > self._memory.numel():  # the first row, or a model that grew
            self._memory = torch.empty(width + width // 4, device=self.device)
        row = self._memory[:width]
        if vectors:
            torch.cat(vectors, out=row)
        self.discard()
        if len(segments) != len(self._layout.segments) or not all(map(_alike, segments, self._layout.segments)):
            self._layout = Layout(tuple(segments))
        return row, self._layout

    def discard(self) -> None:
        """Forget what was collected."""
        self._vectors, self._segments, self._scalars, self._scalar_segments = [], [], [], []

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self._memory.numel() * 4


def _alike(a: Segment, b: Segment) -> bool:
    """Whether two segments mean the same; mostly they hold the same arrays."""
    return a.signal == b.signal and _equal(a.sites, b.sites) and _equal(a.scale, b.scale)


def _equal(a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> bool:
    return a is b or (a is not None and b is not None and a.tobytes() == b.tobytes())
