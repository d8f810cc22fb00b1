"""The gallery's contract: programs are registered here by name, and a job is what a program is given to run with.

Programs import ``from gallery.registry import Job, program`` (``benchmarks/`` is on the path). They seed nothing, print
nothing and know nothing of what is measured. What was heard, and at which step, flows out through the job.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lossguard
from lossguard import Finding, Guard, TrainingHalted

HERE = Path(__file__).parent
APART = "third"  # the family that was written blind and is measured by itself
QUICK_SHARE = {True: 24, False: 20}  # one healthy (ill) program in so many is in the quick subset, chosen by a hash of its name


@dataclass(frozen=True)
class Program:
    """One training run and what is true of it. ``run(job)`` returns its score; higher is better."""

    name: str
    run: Callable[[Job], float]
    healthy: bool
    bar: float  # the score that a healthy run reaches and an ill one misses
    expect: frozenset[str] = frozenset()  # accepted diagnoses; ill only
    cause: str = ""  # the planted root cause, for people
    causes: tuple[str, ...] = ()  # names of causes (``Cause.name``) that are accepted as the first one
    fault: Callable[[Job, float], bool] | None = None  # proof that the fault happened, where the score does not show it
    enters: int = 0  # step at which the fault enters; alarms before it are false
    nonfinite: int | None = None  # step at which the first non-finite number appears
    families: tuple[str, ...] = ()
    repairable: bool = False  # a remedy's change can be put in by ``job.planted``
    file: str = ""

    @property
    def half(self) -> str:
        """``tune`` or ``held``: rules may be looked at with the first half, and are believed on the second."""
        return "tune" if _hash(self.name) % 2 else "held"

    @property
    def quick(self) -> bool:
        """Whether it belongs to the subset that is run with the tests."""
        return APART not in self.families and _hash("quick" + self.name) % QUICK_SHARE[self.healthy] == 0


PROGRAMS: dict[str, Program] = {}


def program(
    *,
    healthy: bool = False,
    bar: float,
    expect: Iterable[str] = (),
    cause: str = "",
    causes: Iterable[str] = (),
    fault: Callable[[Job, float], bool] | None = None,
    enters: int = 0,
    nonfinite: int | None = None,
    families: Iterable[str] = (),
    repairable: bool = False,
) -> Callable[[Callable[[Job], float]], Callable[[Job], float]]:
    """Register the decorated function under its name. ``ValueError`` for what contradicts itself."""
    expect = frozenset([expect] if isinstance(expect, str) else expect)
    if healthy == bool(expect):
        raise ValueError("a healthy program expects no diagnosis, and an ill one at least one; give healthy=True or expect={...}")
    if not healthy and not cause:
        raise ValueError("an ill program says what was planted; give cause='...'")

    def register(run: Callable[[Job], float]) -> Callable[[Job], float]:
        name = run.__name__
        if name in PROGRAMS:
            raise ValueError(f"two programs are named {name!r}: in {PROGRAMS[name].file} and {run.__module__}; rename one")
        PROGRAMS[name] = Program(name, run, healthy, bar, expect, cause, tuple(causes), fault, enters, nonfinite, tuple(families), repairable, run.__module__)
        return run

    return register


@cache
def load() -> dict[str, Program]:
    """Import every ``healthy_*.py`` and ``ill_*.py`` once; all programs by name."""
    for path in sorted([*HERE.glob("healthy_*.py"), *HERE.glob("ill_*.py")]):
        importlib.import_module(f"gallery.{path.stem}")
    return PROGRAMS


@dataclass(frozen=True)
class Heard:
    """A finding, and the step at which people first heard of it (or of its graver form)."""

    step: int
    finding: Finding
    preflight: bool = False


@dataclass
class Job:
    """What a program is given. One job is one run.

    twin: the ill program with its fault taken out. overrides: what a remedy changes, by the keys of ``planted``; made by
    ``repair.overrides(finding)``. bare: no guard is attached, for comparing runs bit by bit.
    """

    seed: int = 0
    twin: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    heard: list[Heard] = field(default_factory=list)
    halts: list[Heard] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # whatever a program wants its own ``fault`` proof to see
    guards: list[Guard] = field(default_factory=list)
    preflights: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1000 + self.seed)

    def planted(self, key: str, *, ill: Any, healthy: Any) -> Any:
        """The planted value; in the twin the healthy one; where a remedy names this key, what the remedy says.

        >>> Job(overrides={"lr_factor": 0.1}).planted("lr", ill=10.0, healthy=0.1)
        1.0
        """
        if self.twin:
            return healthy
        if key in self.overrides:
            return self.overrides[key]
        if key + "_factor" in self.overrides:
            return ill * self.overrides[key + "_factor"]
        return ill

    def guard(self, model: torch.nn.Module, optimizers: Any, **keywords: Any) -> Any:
        """A guard that tells the job what it finds and lets the run go on after a halt; in bare mode one that does nothing."""
        if self.bare:
            return Bare()
        guard = _Listened(self, model, optimizers, **keywords)
        self.guards.append(guard)
        return guard

    def preflight(self, model: torch.nn.Module, batches: Any, criterion: Any, optimizer: Any = None, **keywords: Any) -> list[Finding]:
        """``lossguard.preflight``, where there is one; what it finds is heard at step 0."""
        check = getattr(lossguard, "preflight", None)
        if self.bare or not callable(check):
            return []
        found = list(check(model, batches, criterion, optimizer, **keywords))
        self.preflights += found
        self.heard += [Heard(0, f, preflight=True) for f in found]
        return found

    @property
    def findings(self) -> list[Finding]:
        """The events as they stand at the end: those of preflight, then those of each guard."""
        return [*self.preflights, *(f for guard in self.guards for f in guard.findings)]

    def close(self) -> None:
        """Judge what is left and take all guards off."""
        for guard in self.guards:
            guard.close()


class _Listened(Guard):
    """The real guard with its own halts, which are noted instead of ending the run."""

    def __init__(self, job: Job, model: torch.nn.Module, optimizers: Any, *, sinks: Iterable[Any] = (), **keywords: Any) -> None:
        self._job = job
        super().__init__(model, optimizers, sinks=[self._hear, *sinks], **keywords)

    def _hear(self, finding: Finding) -> None:
        self._job.heard.append(Heard(max(0, self.steps - 1), finding))

    def step(self, *args: Any, **keywords: Any) -> None:
        """As the guard's own, but a halt is noted."""
        self._noting(super().step, *args, **keywords)

    def validation(self, *args: Any, **keywords: Any) -> None:
        """As the guard's own, but a halt is noted."""
        self._noting(super().validation, *args, **keywords)

    def flush(self, **keywords: Any) -> None:
        """As the guard's own, but a halt is noted."""
        self._noting(super().flush, **keywords)

    def _noting(self, call: Callable[..., None], *args: Any, **keywords: Any) -> None:
        try:
            call(*args, **keywords)
        except TrainingHalted as halt:
            self._job.halts.append(Heard(max(0, self.steps - 1), halt.finding))


class Bare:
    """Has the guard's methods and does nothing."""

    findings: tuple[Finding, ...] = ()
    steps = 0

    def batches(self, loader: Any) -> Any:
        """The loader itself."""
        return loader

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not callable(getattr(Guard, name, None)):
            raise AttributeError(name)
        return lambda *_, **__: None


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
