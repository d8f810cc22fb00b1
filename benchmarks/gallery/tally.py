"""Outcomes in, figures out. Pure counting; what each figure means stands beside its field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from gallery.measure import Outcome, Said
from gallery.registry import PROGRAMS, Program


@dataclass
class Share:
    """So many of so many."""

    hits: int = 0
    of: int = 0

    def add(self, hit: bool) -> None:
        """Count one."""
        self.hits, self.of = self.hits + int(hit), self.of + 1

    def __str__(self) -> str:
        return f"{self.hits}/{self.of} ({self.hits / self.of:.1%})" if self.of else "-"


@dataclass
class Figures:
    """The figures of a set of runs."""

    recall: Share = field(default_factory=Share)  # ill runs in which an accepted diagnosis was heard, at or after the fault
    cause: Share = field(default_factory=Share)  # of those that name accepted causes: the first cause is one of them
    delays: list[int] = field(default_factory=list)  # steps from the fault to the first accepted diagnosis
    false_healthy: Share = field(default_factory=Share)  # healthy runs with an alarm
    false_twins: Share = field(default_factory=Share)  # twins with an alarm
    false_halts: Share = field(default_factory=Share)  # healthy runs and twins that would have been halted
    early: Share = field(default_factory=Share)  # ill runs with an alarm before the fault entered
    located: Share = field(default_factory=Share)  # runs whose first non-finite number is reported at its very step
    untrue: Share = field(default_factory=Share)  # ill runs with an alarm of another root at the end
    repairs: Share = field(default_factory=Share)  # repairable ill runs that reach their bar with the first remedy
    alarms: list[tuple[Outcome, Said]] = field(default_factory=list)  # every false alarm
    missed: list[Outcome] = field(default_factory=list)
    wrong_cause: list[tuple[Outcome, Said]] = field(default_factory=list)
    others: list[tuple[Outcome, Said]] = field(default_factory=list)  # what makes ``untrue``

    @property
    def delay(self) -> str:
        """The median."""
        return f"{median(self.delays):g}" if self.delays else "-"


def usable(outcome: Outcome) -> bool:
    """Whether the run did what its program says, so that the guard can be judged on it."""
    return not outcome.error and (outcome.proven or outcome.variant == "repaired")


def count(outcomes: Iterable[Outcome]) -> Figures:
    """The figures of the usable runs."""
    figures = Figures()
    for outcome in outcomes:
        if not usable(outcome):
            continue
        program = PROGRAMS[outcome.program]
        if outcome.variant == "repaired":
            figures.repairs.add(outcome.proven)
        elif program.healthy or outcome.variant == "twin":
            _count_healthy(figures, outcome)
        else:
            _count_ill(figures, outcome, program)
    return figures


def _count_healthy(figures: Figures, outcome: Outcome) -> None:
    alarms = unlike(outcome.heard)
    (figures.false_twins if outcome.variant == "twin" else figures.false_healthy).add(bool(alarms))
    figures.false_halts.add(bool(outcome.halts))
    figures.alarms += [(outcome, said) for said in alarms]


def _count_ill(figures: Figures, outcome: Outcome, program: Program) -> None:
    early = [s for s in unlike(outcome.heard) if s.heard < program.enters and not s.preflight]
    figures.early.add(bool(early))
    figures.alarms += [(outcome, said) for said in early]
    said = accepted(outcome, program)
    figures.recall.add(said is not None)
    if said is None:
        figures.missed.append(outcome)
    else:
        figures.delays.append(max(0, said.heard - program.enters))
        if program.causes:
            figures.cause.add(said.cause in program.causes)
            figures.wrong_cause += [] if said.cause in program.causes else [(outcome, said)]
    if program.nonfinite is not None:
        figures.located.add(any(s.diagnosis.startswith("nonfinite") and s.step == program.nonfinite for s in outcome.heard))
    others = [s for s in outcome.final if s.alarm and s.diagnosis not in program.expect]
    figures.untrue.add(bool(others))
    figures.others += [(outcome, s) for s in others]


def accepted(outcome: Outcome, program: Program) -> Said | None:
    """The first alarm with an accepted name, once the fault is there."""
    return next((s for s in outcome.heard if s.alarm and s.diagnosis in program.expect and (s.heard >= program.enters or s.preflight)), None)


def unlike(heard: Sequence[Said]) -> list[Said]:
    """The alarms, one for each diagnosis."""
    first: dict[str, Said] = {}
    for said in heard:
        if said.alarm:
            first.setdefault(said.diagnosis, said)
    return list(first.values())


@dataclass
class Row:
    """What is known of one diagnosis."""

    expected: int = 0  # ill runs that accept it
    heard: int = 0  # of those: it was heard as an alarm, at or after the fault
    first: int = 0  # of those: it was the first accepted one
    delays: list[int] = field(default_factory=list)
    false: int = 0  # healthy runs and twins in which it was heard
    untrue: int = 0  # ill runs that do not accept it, and end with it at the top


def by_diagnosis(outcomes: Iterable[Outcome]) -> dict[str, Row]:
    """One row for each diagnosis that is expected or was heard."""
    rows: dict[str, Row] = {}
    for outcome in outcomes:
        program = PROGRAMS[outcome.program]
        if not usable(outcome) or outcome.variant == "repaired":
            continue
        if program.healthy or outcome.variant == "twin":
            for said in unlike(outcome.heard):
                rows.setdefault(said.diagnosis, Row()).false += 1
            continue
        first = accepted(outcome, program)
        for name in program.expect:
            row = rows.setdefault(name, Row())
            row.expected += 1
            said = next((s for s in outcome.heard if s.alarm and s.diagnosis == name and (s.heard >= program.enters or s.preflight)), None)
            if said is not None:
                row.heard, row.first = row.heard + 1, row.first + int(first is not None and first.diagnosis == name)
                row.delays.append(max(0, said.heard - program.enters))
        for name in Counter(s.diagnosis for s in outcome.final if s.alarm and s.diagnosis not in program.expect):
            rows.setdefault(name, Row()).untrue += 1
    return dict(sorted(rows.items()))
