"""A ring of rows whose columns belong to named signals: one matrix, so that a row is written at once. Numpy only.

Every row is written twice, one capacity apart, so that the last n rows are always one slice: a view, never a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Sites = npt.NDArray[np.intp]
KEPT = 16  # sets of arrays of sites whose columns are kept: sampled steps have two or three


class Columns:
    """Numbers, which of them were measured, and the first finite one of each column.

    >>> ring = Columns(capacity=2)
    >>> ring.put(0, {"a": (np.array([1]), np.array([5.0]))})
    >>> ring.values("a", slice(0, 1))
    array([[nan,  5.]])
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.places: dict[str, tuple[int, int]] = {}  # signal -> first column, width
        self._numbers: Array = np.full((2 * capacity, 0), np.nan)
        self._seen: Mask = np.zeros((2 * capacity, 0), dtype=np.bool_)
        self._born: Array = np.full(0, np.nan)
        self._unborn = 0  # columns without a finite number so far
        self.sound = True  # whether all measured numbers of the newest row are finite
        self.births = 0  # how often ``born`` has changed
        self._rank: dict[str, int] = {}  # signal -> its place among those in use, from left to right
        self._starts: Sites = np.empty(0, dtype=np.intp)  # the first column of each of them
        self._low: Array = np.empty((2 * capacity, 0))  # of each row and signal the least number,
        self._high: Array = np.empty((2 * capacity, 0))  # and the greatest
        self._fresh: Array = np.empty(0)  # a row being written
        self._there: Mask = np.empty(0, dtype=np.bool_)
        self._known: dict[tuple[Any, ...], tuple[Sites, list[Sites]]] = {}  # signals and arrays of sites -> their columns; the arrays are held

    def put(self, row: int, values: Mapping[str, tuple[Sites, npt.NDArray[Any]]], widths: Mapping[str, int] | None = None) -> None:
        """Write a whole row; what is not in it was not measured. A signal is as wide as its largest site, or as ``widths`` says."""
        columns = self._columns(values, widths or {})
        self._fresh.fill(np.nan)
        there = self._there
        there.fill(False)
        self.sound = True
        if columns.size:
            numbers = np.concatenate([numbers for _, numbers in values.values()])
            self._fresh[columns] = numbers
            there[columns] = True
            self.sound = bool(np.isfinite(numbers).all())
            self._bear(numbers, columns)
        for at in (row, row + self.capacity):
            self._numbers[at] = self._fresh
            self._seen[at] = there
        if self._starts.size:
            self._low[row] = self._low[row + self.capacity] = np.fmin.reduceat(self._fresh, self._starts)
            self._high[row] = self._high[row + self.capacity] = np.fmax.reduceat(self._fresh, self._starts)

    def extremes(self, signal: str, rows: slice) -> tuple[float, float]:
        """The least and the greatest measured number of a signal in these rows; (inf, -inf) if there is none."""
        lows, highs = self.row_extremes(signal, rows)
        low, high = float(np.fmin.reduce(lows, initial=np.inf)), float(np.fmax.reduce(highs, initial=-np.inf))
        return low, high

    def row_extremes(self, signal: str, rows: slice) -> tuple[Array, Array]:
        """The same of each of these rows, NaN where nothing was measured."""
        at = self._rank.get(signal)
        if at is None:
            return np.full(rows.stop - rows.start, np.nan), np.full(rows.stop - rows.start, np.nan)
        return self._low[rows, at], self._high[rows, at]

    def values(self, signal: str, rows: slice) -> Array:
        """The numbers of a signal in these rows, a view: (rows, sites); (0, 0) if it was never written."""
        place = self.places.get(signal)
        return np.empty((0, 0)) if place is None else self._numbers[rows, place[0] : place[0] + place[1]]

    def seen(self, signal: str, rows: slice) -> Mask:
        """Where :meth:`values` holds measured numbers."""
        place = self.places.get(signal)
        return np.empty((0, 0), dtype=np.bool_) if place is None else self._seen[rows, place[0] : place[0] + place[1]]

    def born(self, signal: str) -> Array:
        """The first finite number of each site: (sites,)."""
        place = self.places.get(signal)
        return np.empty(0) if place is None else self._born[place[0] : place[0] + place[1]]

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return self._numbers.nbytes + self._seen.nbytes + self._born.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Plain types and arrays."""
        return {"places": dict(self.places), "numbers": self._numbers, "seen": self._seen, "born": self._born, "sound": self.sound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.places = {name: (first, width) for name, (first, width) in state["places"].items()}
        self._numbers, self._seen, self._born = state["numbers"], state["seen"], state["born"]
        self.capacity = len(self._numbers) // 2
        self.sound = bool(state.get("sound", False))  # unknown is looked at
        self._widened()

    def _columns(self, values: Mapping[str, tuple[Sites, npt.NDArray[Any]]], widths: Mapping[str, int]) -> Sites:
        """The columns of these sites of these signals, end to end; found again by the arrays' identity."""
        key = tuple([(name, id(sites)) for name, (sites, _) in values.items()])
        known = self._known.get(key)
        if known is not None and not any(name in self.places and self.places[name][1] < width for name, width in widths.items()):
            return known[0]
        for signal, (sites, _) in values.items():
            self._place(signal, widths.get(signal, 0), int(sites.max(initial=-1)) + 1)
        found = [sites + self.places[signal][0] for signal, (sites, _) in values.items()]
        columns = np.concatenate(found) if found else np.empty(0, dtype=np.intp)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = columns, [sites for sites, _ in values.values()]
        return columns

    def _bear(self, numbers: Array, columns: Sites) -> None:
        """Keep the first finite number of each column."""
        if not self._unborn:
            return
        new = np.isnan(self._born[columns]) & np.isfinite(numbers)
        if not new.any():
            return
        self._born[columns[new]] = numbers[new]
        self._unborn = int(np.isnan(self._born).sum())
        self.births += 1

    def _widened(self) -> None:
        """The matrix has other columns than before."""
        self.births += 1
        self._known.clear()
        width = self._numbers.shape[1]
        self._fresh, self._there = np.empty(width), np.empty(width, dtype=np.bool_)
        self._unborn = int(np.isnan(self._born).sum())
        used = sorted((first, name) for name, (first, width) in self.places.items() if width)
        self._rank = {name: k for k, (_, name) in enumerate(used)}
        self._starts = np.array([first for first, _ in used], dtype=np.intp)
        if used:
            self._low = np.fmin.reduceat(self._numbers, self._starts, axis=1)
            self._high = np.fmax.reduceat(self._numbers, self._starts, axis=1)

    def _place(self, signal: str, least: int, needed: int) -> None:
        """A place for the signal, at the end of the matrix; one that has become too narrow moves there."""
        held = self.places.get(signal)
        width = max(least, needed)
        if held is not None and held[1] >= width:
            return
        first = self._numbers.shape[1]
        self._numbers = np.hstack([self._numbers, np.full((2 * self.capacity, width), np.nan)])
        self._seen = np.hstack([self._seen, np.zeros((2 * self.capacity, width), dtype=np.bool_)])
        self._born = np.concatenate([self._born, np.full(width, np.nan)])
        self.places[signal] = first, width
        if held is not None:
            self._move(signal, held)
        self._widened()

    def _move(self, signal: str, held: tuple[int, int]) -> None:
        """Take the old numbers along, then close the gap they leave."""
        first, _ = self.places[signal]
        old, new = slice(held[0], held[0] + held[1]), slice(first, first + held[1])
        self._numbers[:, new], self._seen[:, new], self._born[new] = self._numbers[:, old], self._seen[:, old], self._born[old]
        keep = np.ones(self._numbers.shape[1], dtype=np.bool_)
        keep[old] = False
        self._numbers, self._seen, self._born = self._numbers[:, keep], self._seen[:, keep], self._born[keep]
        self.places = {name: (at - held[1] if at > held[0] else at, width) for name, (at, width) in self.places.items()}
