"""A series of any length in bounded memory, and the bars that show it. Numbers by step flow in, short texts flow out.

Means of stretches of steps are drawn. The least, the greatest and every non-finite number are kept beside them, exactly: a
stretch with a NaN or an infinity is marked as such, in place of its bar where it holds nothing else, in a row of its own where it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BUCKETS = 1024  # more than a terminal has columns
WIDE = 30.0  # greatest over least, above which a positive series is drawn by its logarithm; our own choice: it halves about five times
NAN, INFINITE = 1, 2  # what a stretch holds besides finite numbers


@dataclass
class Bucket:
    """Numbers of consecutive steps. bad: the first step with a non-finite one."""

    total: float = 0.0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    flags: int = 0
    lost: int = 0
    bad: int | None = None

    def add(self, step: int, value: float) -> None:
        """One number."""
        if math.isfinite(value):
            self.total, self.count = self.total + value, self.count + 1
            self.low, self.high = min(self.low, value), max(self.high, value)
            return
        self.flags |= NAN if math.isnan(value) else INFINITE
        self.lost += 1
        self.bad = step if self.bad is None else min(self.bad, step)

    def join(self, other: Bucket) -> None:
        """All of another bucket's numbers too."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.flags, self.lost = self.flags | other.flags, self.lost + other.lost
        known = [bad for bad in (self.bad, other.bad) if bad is not None]
        self.bad = min(known, default=None)

    @property
    def mean(self) -> float | None:
        """The mean of the finite numbers."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class Column:
    """What one column of a drawing stands for. mean: None where nothing finite was measured."""

    mean: float | None = None
    flags: int = 0


class Series:
    """Numbers by step.

    >>> series = Series()
    >>> for step in range(8):
    ...     series.add(step, float("nan") if step == 5 else float(8 - step))
    >>> chart(series.columns(8, 0, 7), 1)
    ['█▇▆▅▄N▂▁']
    >>> series.low, series.high, series.lost, series.first_lost
    (1.0, 8.0, 1, 5)
    """

    def __init__(self, buckets: int = BUCKETS) -> None:
        self._limit, self._span = buckets, 1
        self._buckets: dict[int, Bucket] = {}
        self.newest: tuple[int, float] | None = None

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def add(self, step: int, value: float) -> None:
        """One number; of a step that was there before, one more."""
        self._buckets.setdefault(step // self._span, Bucket()).add(step, value)
        self.newest = step, value
        while len(self._buckets) > self._limit:
            self._halve()

    def cut(self, start: int) -> None:
        """Forget what a run that took over at ``start`` does anew. Of the stretch around it the numbers before ``start`` cannot be
        told from those behind any more and stay, but no mark does that came later."""
        for key in [k for k in self._buckets if k * self._span >= start]:
            del self._buckets[key]
        edge = self._buckets.get(start // self._span)
        if edge is not None and edge.bad is not None and edge.bad >= start:
            edge.flags, edge.lost, edge.bad = 0, 0, None
        if self.newest is not None and self.newest[0] >= start:
            self.newest = None

    @property
    def low(self) -> float:
        """The least finite number ever, NaN if there was none."""
        return min((b.low for b in self._buckets.values() if b.count), default=math.nan)

    @property
    def high(self) -> float:
        """The greatest finite number ever, NaN if there was none."""
        return max((b.high for b in self._buckets.values() if b.count), default=math.nan)

    @property
    def lost(self) -> int:
        """How many numbers were not finite."""
        return sum(b.lost for b in self._buckets.values())

    @property
    def first_lost(self) -> int | None:
        """The first step whose number was not finite."""
        return min((b.bad for b in self._buckets.values() if b.bad is not None), default=None)

    def columns(self, width: int, first: int, last: int) -> list[Column]:
        """The steps from first to last in so many columns. Between two measured columns the earlier one goes on; a mark does not."""
        steps = last - first + 1
        held: dict[int, Bucket] = {}
        for key in sorted(self._buckets):
            begin, end = max(key * self._span, first), min((key + 1) * self._span - 1, last)
            if begin > end:
                continue
            for column in range((begin - first) * width // steps, (end - first) * width // steps + 1):
                held.setdefault(column, Bucket()).join(self._buckets[key])
        shown = [Column(held[c].mean, held[c].flags) if c in held else Column() for c in range(width)]
        for c in range(1, max(held, default=0)):
            if c not in held:
                shown[c] = Column(shown[c - 1].mean)
        return shown

    def _halve(self) -> None:
        self._span *= 2
        joined: dict[int, Bucket] = {}
        for key, bucket in self._buckets.items():
            joined.setdefault(key // 2, Bucket()).join(bucket)
        self._buckets = joined


@dataclass(frozen=True)
class Ink:
    """The characters of a drawing, for terminals that know them and for those that do not."""

    bars: str = "▁▂▃▄▅▆▇█"
    nan: str = "N"
    infinite: str = "∞"
    cut: str = "…"
    dot: str = "·"


ASCII = Ink(".:-=+*%#", "N", "I", "~", "|")


def logarithmic(low: float, high: float) -> bool:
    """Whether a series between these is drawn by its logarithm."""
    return bool(low > 0 and high / low > WIDE)


def drawn_range(columns: Sequence[Column]) -> tuple[float, float]:
    """The least and the greatest mean of the columns; 0 where there is none."""
    means = [c.mean for c in columns if c.mean is not None]
    return min(means, default=0.0), max(means, default=0.0)


def chart(columns: Sequence[Column], height: int, bounds: tuple[float, float] | None = None, ink: Ink = Ink()) -> list[str]:
    """Bars, ``height`` rows of them, the topmost first, and a row of marks beneath where bars are drawn over non-finite numbers.

    A column with nothing but non-finite numbers is a mark from top to bottom. bounds: the numbers at the bottom and at the
    top; without them the least and the greatest of the columns.

    >>> chart([Column(0.0), Column(1.0), Column(flags=INFINITE)], 2)
    [' █∞', '▁█∞']
    >>> chart([Column(0.0), Column(1.0, flags=NAN), Column(2.0)], 1)
    ['▁▅█', ' N ']
    """
    low, high = bounds or drawn_range(columns)
    scale = math.log if logarithmic(low, high) else float
    bottom, top = scale(low), scale(high)
    levels = len(ink.bars) * height
    drawn: list[str] = []
    for column in columns:
        if column.mean is None:
            drawn.append(_mark(column, ink) * height)
        else:
            share = 0.5 if not top > bottom else (scale(min(max(column.mean, low), high)) - bottom) / (top - bottom)
            drawn.append(_bar(1 + round(share * (levels - 1)), height, ink))
    beneath = "".join(" " if column.mean is None else _mark(column, ink) for column in columns)
    return ["".join(bar[row] for bar in drawn) for row in range(height)] + ([beneath] if beneath.strip() else [])


def _mark(column: Column, ink: Ink) -> str:
    return ink.nan if column.flags & NAN else ink.infinite if column.flags else " "


def _bar(level: int, height: int, ink: Ink) -> str:
    """A bar of so many eighths, its topmost character first."""
    full, part = divmod(level, len(ink.bars))
    bar = ink.bars[-1] * full + (ink.bars[part - 1] if part else "")
    return bar.ljust(height)[::-1]
