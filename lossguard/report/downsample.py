"""Long series made short, honestly: the least, the greatest and every non-finite number of a bucket survive. Numpy only.

Numbers flow in by step, buckets of consecutive steps flow out. Nothing is averaged: what stands for a bucket was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lossguard.host.history import Array, Mask

Steps = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]

NAN, POSITIVE, NEGATIVE = np.uint8(1), np.uint8(2), np.uint8(4)  # what a bucket holds besides finite numbers


def flags_of(values: Array) -> Flags:
    """Which of NaN, +Inf and -Inf each number is; 0 for a finite one.

    >>> flags_of(np.array([1.0, np.nan, np.inf, -np.inf])).tolist()
    [0, 1, 2, 4]
    """
    kinds = np.isnan(values) * NAN + (values == np.inf) * POSITIVE + (values == -np.inf) * NEGATIVE
    return np.asarray(kinds, dtype=np.uint8)


@dataclass(frozen=True)
class Curve:
    """Buckets of a series. first, last: the steps of each, inclusive. low, high, middle: its least, greatest and median
    finite number, NaN where it has none. flags: which non-finite numbers it holds."""

    first: Steps
    last: Steps
    low: Array
    high: Array
    middle: Array
    flags: Flags


def envelope(steps: Steps, values: Array, buckets: int) -> Curve:
    """A series as at most ``buckets`` runs of equally many neighbours.

    >>> curve = envelope(np.arange(6), np.array([3.0, 1.0, 2.0, np.nan, 9.0, 4.0]), buckets=2)
    >>> curve.low.tolist(), curve.high.tolist(), curve.flags.tolist()
    ([1.0, 4.0], [3.0, 9.0], [0, 1])
    """
    if len(steps) != len(values):
        raise ValueError(f"{len(steps)} steps and {len(values)} values; give one step for each value")
    if not len(steps):
        none = np.zeros(0)
        return Curve(np.zeros(0, np.int64), np.zeros(0, np.int64), none, none, none, np.zeros(0, np.uint8))
    size = -(-len(steps) // buckets)
    starts = np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    flags = np.bitwise_or.reduceat(flags_of(values), starts)
    finite = np.where(np.isfinite(values), values, np.nan)
    if size == 1:
        return Curve(steps, steps, finite, finite, finite, flags)
    table = np.full(len(starts) * size, np.nan)
    table[: len(values)] = finite
    table = np.sort(table.reshape(-1, size), axis=1)  # NaN stands last
    counted = np.isfinite(table).sum(axis=1)
    row = np.arange(len(table))
    none = counted == 0
    middle = np.where(none, np.nan, table[row, np.maximum(counted - 1, 0) // 2])
    low, high = np.where(none, np.nan, table[:, 0]), np.where(none, np.nan, table[row, np.maximum(counted - 1, 0)])
    return Curve(steps[starts], steps[ends], low, high, middle, flags)


class Grid:
    """Samples of many sites, taken in one at a time and held in at most ``limit`` buckets, however many come.

    When all are full, neighbours are joined two by two: memory stays bounded and the extremes of each bucket exact.

    >>> grid = Grid(limit=2)
    >>> for step, value in enumerate([1.0, 5.0, 2.0]):
    ...     grid.add(step, np.array([value]), np.array([True]))
    >>> grid.low[:, 0].tolist(), grid.high[:, 0].tolist(), grid.first.tolist(), grid.samples.tolist()
    ([1.0, 2.0], [5.0, 2.0], [0, 2], [2, 1])
    """

    def __init__(self, limit: int) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be an even number of at least 2, since buckets are joined two by two, got {limit}")
        self._limit, self._per_bucket = limit, 1
        self._used, self._inside = 0, 0  # buckets in use; samples in the newest
        self._range = np.zeros((limit, 3), np.int64)  # first step, last step, samples
        self._low = np.zeros((limit, 0))
        self._high = np.zeros((limit, 0))
        self._flags = np.zeros((limit, 0), np.uint8)

    def add(self, step: int, values: Array, seen: Mask) -> None:
        """The next sample: values of all sites, and which of them were observed."""
        if len(values) > self._low.shape[1]:
            self._widen(len(values))
        if self._inside == self._per_bucket and self._used == self._limit:
            self._join()
        if self._used == 0 or self._inside == self._per_bucket:
            self._range[self._used] = step, step, 0
            self._low[self._used] = self._high[self._used] = np.nan
            self._flags[self._used] = 0
            self._used, self._inside = self._used + 1, 0
        row, wide = self._used - 1, slice(0, len(values))
        self._inside += 1
        self._range[row, 1:] = step, self._inside
        finite = np.where(seen & np.isfinite(values), values, np.nan)
        self._low[row, wide] = np.fmin(self._low[row, wide], finite)
        self._high[row, wide] = np.fmax(self._high[row, wide], finite)
        self._flags[row, wide] |= np.where(seen, flags_of(values), np.uint8(0))

    @property
    def first(self) -> Steps:
        """The first step of each bucket."""
        return self._range[: self._used, 0]

    @property
    def last(self) -> Steps:
        """The last step of each bucket."""
        return self._range[: self._used, 1]

    @property
    def samples(self) -> Steps:
        """How many samples each bucket holds."""
        return self._range[: self._used, 2]

    @property
    def low(self) -> Array:
        """(buckets, sites): the least finite number, NaN where there is none."""
        return self._low[: self._used]

    @property
    def high(self) -> Array:
        """(buckets, sites): the greatest finite number, NaN where there is none."""
        return self._high[: self._used]

    @property
    def flags(self) -> Flags:
        """(buckets, sites): which non-finite numbers were measured."""
        return self._flags[: self._used]

    @property
    def empty(self) -> bool:
        """Nothing was ever observed."""
        return not (np.isfinite(self.low).any() or self.flags.any())

    def _widen(self, width: int) -> None:
        more = ((0, 0), (0, width - self._low.shape[1]))
        self._low = np.pad(self._low, more, constant_values=np.nan)
        self._high = np.pad(self._high, more, constant_values=np.nan)
        self._flags = np.pad(self._flags, more)

    def _join(self) -> None:
        half = self._limit // 2
        self._range[:half] = np.stack([self._range[::2, 0], self._range[1::2, 1], self._range[::2, 2] + self._range[1::2, 2]], axis=1)
        self._low[:half] = np.fmin(self._low[::2], self._low[1::2])
        self._high[:half] = np.fmax(self._high[::2], self._high[1::2])
        self._flags[:half] = self._flags[::2] | self._flags[1::2]
        self._used, self._per_bucket = half, 2 * self._per_bucket
        self._inside = self._per_bucket
