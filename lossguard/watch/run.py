"""One rank's record as it grows. Its files' new lines flow in; curves, findings and a verdict of bounded size are held.

What is held is of the record's last run, joined with what came before it up to the step at which it took over, as
``lossguard.record`` reads a finished one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lossguard import verdict
from lossguard.findings import Finding
from lossguard.host.columns import Array, Mask, Sites
from lossguard.host.derived import derive
from lossguard.host.history import History
from lossguard.scalars import SCALARS
from lossguard.watch.series import Series
from lossguard.watch.tail import Tail, newest_loss

WINDOW = 2048  # losses that the verdict is read from, as many as a guard holds
SIGNALS = {  # the scalars that are drawn, under the names that trackers have for them, and how they are called here
    "grad_norm": "gradient norm",
    "update_ratio_median": "update ratio",
    "dead_fraction_largest": "dead units",
    "logit_peak": "logit peak",
}
LINES = 1000  # findings and events kept for the screen; a run with more is told of by its newest


class Run:
    """The record of one rank. curves: whether its losses and samples are followed, or only its newest loss."""

    def __init__(self, folder: Path, rank: int = 0, *, curves: bool = True) -> None:
        self.folder, self.rank, self.curves = folder, rank, curves
        self.told, self.rows = Tail(folder / "findings.jsonl"), Tail(folder / "rows.jsonl")
        self._born = (0, 0)
        self._told_anew()
        self._rows_anew()

    # ---- what is known

    @property
    def exists(self) -> bool:
        """Whether there is a record by now."""
        return bool(self.header)

    @property
    def behind(self) -> int:
        """Bytes that are there and not read yet."""
        return self.told.behind + (self.rows.behind if self.curves else 0)

    @property
    def changed(self) -> float:
        """When its files last grew, by the clock of their disk."""
        return max(self.told.changed, self.rows.changed)

    @property
    def verdict(self) -> str:
        """The guard's own last word, or the reading of the curves now."""
        return str(self.facts.get("verdict") or verdict.read(self._history))

    # ---- what arrives

    def read(self, budget: int | None = None) -> bool:
        """Take what is new, of the rows at most ``budget`` bytes. Returns whether anything was."""
        before = self._state()
        self.told.look()
        if self.told.born != self._born[0]:
            self._told_anew()
        for line in self.told.read():
            self._tell(line)
        self.rows.look()  # behind the findings: a run's rows are complete where its end is told
        if self.rows.born != self._born[1]:
            self._rows_anew()
        self._born = self.told.born, self.rows.born
        if self.curves:
            for line in self.rows.read(budget):
                self._take(line)
        elif self._state() != before and (newest := newest_loss(self.rows.path)) is not None:
            self.step, self.loss = newest
        return self._state() != before

    def _state(self) -> tuple[int, int, int, float, tuple[int, int]]:
        return self.told.consumed, self.rows.consumed, self.rows.size, self.rows.changed, self._born

    def _told_anew(self) -> None:
        self.header: Mapping[str, Any] = {}
        self.facts: Mapping[str, Any] = {}
        self.findings: list[Finding] = []
        self.events: deque[tuple[int, str]] = deque(maxlen=LINES)
        self.runs, self.ended = 0, False

    def _tell(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "header":
            runs = self.runs + 1
            self._told_anew()
            self.header, self.runs = line, runs
        elif kind == "finding":
            new = Finding.from_dict(line)
            self.findings = [f for f in self.findings if (f.diagnosis, f.step) != (new.diagnosis, new.step)][-LINES:] + [new]
        elif kind == "event":
            self.events.append((int(line["step"]), str(line["what"])))
        elif kind == "summary":
            self.findings = [Finding.from_dict(f) for f in line["findings"]]
            self.facts, self.ended = line.get("facts", {}), True

    def _rows_anew(self) -> None:
        self.step, self.loss = -1, float("nan")
        self.first = -1  # the first step of the last run
        self.losses, self.validation = Series(), Series()
        self.terms: dict[str, Series] = {}
        self.signals = {name: Series() for name in SIGNALS}
        self.best: tuple[int, float] | None = None
        self.window: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._validations: list[tuple[int, float, float, float]] = []
        self._beginning: list[tuple[int, float]] = []
        self._history = History(losses=WINDOW, samples=1)
        self._matrix: Mask = np.zeros(0, dtype=np.bool_)  # which parameters are matrices
        self._begun = False  # a header stands before the next line

    def _take(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "header":
            self._begun = True
        elif kind == "parameters":
            self._matrix = np.array([kind == "matrix" for kind in line["kinds"]], dtype=np.bool_)
        elif kind in ("losses", "sample", "validation"):
            step = int(line["first"] if kind == "losses" else line["step"])
            if self._begun:
                self._begun, self.first = False, step
                if step <= self.step:
                    self._cut(step)
            if kind == "losses":
                self._take_losses(step, line)
            elif kind == "sample":
                self._take_sample(step, line["values"])
            else:
                self._take_validation(step, float(line["loss"]), float(line.get("accuracy", "nan")), float(line.get("train_accuracy", "nan")))

    def _take_losses(self, first: int, line: Mapping[str, Any]) -> None:
        for step, value in enumerate(map(float, line["total"]), first):
            self.losses.add(step, value)
            self.window.append((step, value))
            self._history.add_loss(step, value)
            if len(self._beginning) < WINDOW:
                self._beginning.append((step, value))
            self.step, self.loss = step, value
        for name, values in line.get("terms", {}).items():
            series = self.terms.setdefault(name, Series())
            for step, value in enumerate(map(float, values), first):
                series.add(step, value)

    def _take_validation(self, step: int, *numbers: float) -> None:
        self.validation.add(step, numbers[0])
        self._history.add_validation(step, *numbers)
        self._validations = [*self._validations[-WINDOW + 1 :], (step, *numbers)]  # type: ignore[list-item]
        if self.best is None or numbers[0] < self.best[1]:
            self.best = (step, numbers[0]) if numbers[0] == numbers[0] else self.best

    def _take_sample(self, step: int, told: Mapping[str, Any]) -> None:
        """The numbers that trackers get, of the signals that are drawn."""
        wanted = ("grad_norm", "weight_norm", "update_norm", "dead_fraction", "logit_peak")
        values = {n: (np.asarray(told[n][0], dtype=np.intp), np.array(told[n][1], dtype=np.float64)) for n in wanted if n in told}
        parameters = [sites for n, (sites, _) in values.items() if n.endswith("_norm") and sites.size]
        found = derive(values, np.ones(max((int(sites.max()) + 1 for sites in parameters), default=0)))
        for name in SIGNALS:
            signal, reduce = SCALARS[name]
            places, numbers = found.get(signal, (np.zeros(0, np.intp), np.zeros(0)))
            if signal == "update_ratio" and len(numbers):
                numbers = numbers[self._with_ratio(places, values)]
            if len(numbers):
                with np.errstate(all="ignore"):
                    self.signals[name].add(step, reduce(numbers))

    def _with_ratio(self, places: Sites, values: Mapping[str, tuple[Sites, Array]]) -> Mask:
        """Matrices, if there are any. Weights that are still all zero have no ratio, however sound their update."""
        (weights, norms), (updates, moved) = values["weight_norm"], values["update_norm"]
        known = np.ones(places.size, dtype=np.bool_)
        if (norms == 0.0).any():
            known = ~np.isin(places, np.intersect1d(weights[norms == 0.0], updates[np.isfinite(moved)]))
        matrix = known & self._matrix[places] if places.size and places.max() < self._matrix.size else known
        return matrix if matrix.any() else known

    def _cut(self, start: int) -> None:
        """A run took over at this step: what came from there on is done anew."""
        for series in (self.losses, self.validation, *self.terms.values(), *self.signals.values()):
            series.cut(start)
        self.terms = {name: series for name, series in self.terms.items() if series}
        self.window = deque((pair for pair in self.window if pair[0] < start), maxlen=WINDOW)
        self._beginning = [pair for pair in self._beginning if pair[0] < start]
        self._validations = [row for row in self._validations if row[0] < start]
        self.best = min(((s, v) for s, v, *_ in self._validations if v == v), key=lambda pair: pair[1], default=None)
        self._history = History(losses=WINDOW, samples=1)
        known = dict(self._beginning) | dict(self.window)
        evaluations = {step: numbers for step, *numbers in self._validations}
        for step, value in sorted(known.items()):
            self._history.add_loss(step, value)
            if step in evaluations:
                self._history.add_validation(step, *evaluations[step])
        self.step, self.loss = (self.losses.newest or (start - 1, float("nan"))) if self.window else (start - 1, float("nan"))


def shared(runs: Mapping[int, Run]) -> list[tuple[Finding, list[int]]]:
    """The findings of all ranks, by step; one that several ranks have alike stands once, with their numbers."""
    together: dict[tuple[str, int, str, str], tuple[Finding, list[int]]] = {}
    for rank, run in sorted(runs.items()):
        for finding in run.findings:
            key = finding.diagnosis, finding.step, finding.severity.label, finding.where
            held, ranks = together.get(key, (finding, []))
            together[key] = replace(held, count=max(held.count, finding.count)), [*ranks, rank]
    return sorted(together.values(), key=lambda pair: (pair[0].step, pair[1][0]))
