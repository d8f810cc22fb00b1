"""Turns what the hand-over delivers into history, in order. Numbers flow in, history grows, news flow out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lossguard.host.decode import Decoder
from lossguard.host.handover import Handover, Numbers
from lossguard.host.history import History, Sample

PLAIN = ("",)  # the names of the terms of a loss that is no dict


class _Writer(Protocol):
    def losses(self, first: int, totals: list[float], terms: dict[str, list[float]]) -> None: ...
    def sample(self, sample: Sample, history: History) -> None: ...
    def validation(self, step: int, value: float, accuracy: float, train_accuracy: float) -> None: ...


class _Sender(Protocol):
    def send(self) -> None: ...


@dataclass
class News:
    """What became known at once: losses of consecutive steps, and perhaps a sample at their end."""

    first: int = 0
    totals: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    sample: Sample | None = None
    validation: tuple[int, float, float, float] | None = None  # the step before an evaluation, its loss, accuracies (NaN: not told)
    sick: bool = False  # a loss or a batch is not finite

    def write(self, record: _Writer, history: History) -> None:
        """Put it into the run's record."""
        if self.totals:
            record.losses(self.first, self.totals, self.terms)
        if self.sample is not None:
            record.sample(self.sample, history)
        if self.validation is not None:
            record.validation(*self.validation)


class Intake:
    """Receives blocks of losses and rows of samples; rows of one step from several devices become one sample."""

    def __init__(self, history: History, handover: Handover) -> None:
        self._history, self._handover, self._decoder = history, handover, Decoder()
        self._parts: list[tuple[Numbers, Any]] = []

    def receive(self, now: int, *, everything: bool = False) -> Iterator[News]:
        """What is due at step ``now``: one piece of news for each sample, and one for losses without a sample behind them."""
        news = News()
        for numbers, meaning in self._handover.receive(now, everything=everything):
            if meaning[0] == "pulse":
                if news.totals:  # a block without a sample behind it
                    yield news
                    news = News()
                if numbers is not None:
                    self._take_losses(numbers, meaning, news)
                continue
            if meaning[0] == "validation":
                if numbers is not None:
                    news.validation = meaning[1], float(numbers[0]), float(numbers[1]), float(numbers[2])
                    self._history.add_validation(*news.validation)
                    yield news  # each evaluation is judged by itself
                    news = News()
                continue
            _, step, layout, facts, last = meaning
            if numbers is not None and _void(numbers, layout):
                self._history.notes["void_rows"] = self._history.notes.get("void_rows", 0) + 1
            elif numbers is not None:
                self._parts.append((numbers.copy(), layout))
            if last:
                parts, self._parts = self._parts, []
                if parts:
                    news.sample = self._decoder.decode(step, parts, facts, self._history.params)
                    self._history.add_sample(news.sample)
                    yield news
                news = News()
        if news.totals:
            yield news

    def drop(self, pulses: _Sender) -> None:
        """Forget what is under way. Waits for it."""
        pulses.send()
        self._parts = []
        for _ in self._handover.receive(0, everything=True):
            pass

    def _take_losses(self, numbers: Numbers, meaning: Any, news: News) -> None:
        _, news.first, looked, names, printed, sizes = meaning
        leaves = numbers.shape[1] - len(names)
        rows = numbers.astype(np.float64).tolist()
        for k, row in enumerate(rows):
            values = row[leaves:]
            terms = dict(zip(names, values, strict=True)) if names != PLAIN else None
            finite = float(all(map(math.isfinite, row[: looked[k]]))) if looked[k] else math.nan
            total = sum(values)
            self._history.add_loss(news.first + k, total, terms, finite, row[0] if printed[k] else math.nan, sizes[k])
            news.totals.append(total)
            for name, value in (terms or {}).items():
                news.terms.setdefault(name, []).append(value)
            news.sick |= not math.isfinite(total) or finite == 0.0


def _void(numbers: Numbers, layout: Any) -> bool:
    """Whether some rank could not measure its part of these numbers."""
    return bool(layout.segments and layout.segments[0].signal == "joined" and numbers[0] != 1.0)
