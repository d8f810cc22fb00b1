"""Runs one program once and writes down what happened: a name, a seed and a variant in, an ``Outcome`` of plain types out."""

from __future__ import annotations

import logging
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from gallery.registry import Heard, Job, Program, load
from lossguard import Finding, Severity

LIMIT = 180  # seconds for one run; one that takes longer is listed as an error
VARIANTS = ("itself", "twin", "repaired")


@dataclass
class Said:
    """One finding as it was heard or as it stood at the end."""

    diagnosis: str
    severity: int
    heard: int  # step at which it was heard; -1 where only the end was read
    step: int  # step at which the finding says that the fault shows
    cause: str
    where: str
    message: str
    preflight: bool = False

    @property
    def alarm(self) -> bool:
        """Warning or above."""
        return self.severity >= Severity.WARNING


@dataclass
class Outcome:
    """One run."""

    program: str
    seed: int
    variant: str
    score: float = float("nan")
    proven: bool = False  # the run did what the program says of it
    error: str = ""
    seconds: float = 0.0
    steps: int = 0
    heard: list[Said] = field(default_factory=list)
    final: list[Said] = field(default_factory=list)  # top-level findings at the end
    buried: list[str] = field(default_factory=list)  # diagnoses that stand as consequences at the end
    halts: list[Said] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # the guard's own faults
    overrides: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def measure(name: str, seed: int, variant: str = "itself", *, bare: bool = False) -> Outcome:
    """Run a program. ``repaired``: it is run as it is, then again with the change of the first remedy that was heard."""
    program = load()[name]
    if variant != "repaired":
        return _run(program, Job(seed, twin=variant == "twin", bare=bare), variant)
    from gallery import repair

    ill = Job(seed)
    first = _run(program, ill, "itself")
    finding = _advised(program, ill.heard)
    overrides = dict(repair.overrides(finding)) if finding is not None else {}
    error = first.error or ("" if first.proven else "there is nothing to repair: the fault does not show")
    if error or not overrides:
        return Outcome(name, seed, variant, error=error, score=first.score, heard=first.heard, seconds=first.seconds)
    second = _run(program, Job(seed, overrides=overrides), variant)
    second.overrides, second.seconds = {k: str(v) for k, v in overrides.items()}, first.seconds + second.seconds
    return second


def _advised(program: Program, heard: list[Heard]) -> Finding | None:
    """The finding whose advice a user would follow: the first accepted one with a remedy, else the first alarm with one."""
    alarms = [h.finding for h in heard if h.finding.severity >= Severity.WARNING and h.finding.remedies]
    accepted = [f for f in alarms if f.diagnosis in program.expect]
    return next(iter(accepted + alarms), None)


def _run(program: Program, job: Job, variant: str) -> Outcome:
    outcome = Outcome(program.name, job.seed, variant)
    logger = logging.getLogger("lossguard")
    silent, logger.disabled = logger.disabled, True  # findings are collected, not printed
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _limited(LIMIT):
                outcome.score = float(program.run(job))
                outcome.proven = _proof(program, job, outcome.score, variant)
        except Exception as error:  # a program that crashes is listed, and the others go on
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome.error = f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
        finally:
            job.close()
            logger.disabled = silent
    outcome.seconds = time.perf_counter() - begun
    outcome.steps = max((g.steps for g in job.guards), default=0)
    outcome.heard = [_said(h.finding, h.step, h.preflight) for h in job.heard]
    outcome.halts = [_said(h.finding, h.step) for h in job.halts]
    outcome.final = [_said(f, -1) for f in job.findings]
    outcome.buried = [c.diagnosis for f in job.findings for c in f.consequences]
    outcome.broken = [str(w.message) for w in caught if "switched off" in str(w.message) and "lossguard" in str(w.message)]
    return outcome


def _proof(program: Program, job: Job, score: float, variant: str) -> bool:
    """A healthy, twin or repaired run reaches its bar (and shows no fault); an ill one misses it, or shows its fault otherwise."""
    reached = bool(score >= program.bar)  # a NaN misses
    if program.healthy:
        return reached
    faulty = program.fault(job, score) if program.fault is not None else not reached
    return faulty if variant == "itself" else reached and not faulty


def _said(finding: Finding, heard: int, preflight: bool = False) -> Said:
    cause = finding.causes[0].name if finding.causes else ""
    return Said(finding.diagnosis, int(finding.severity), heard, finding.step, cause, finding.where, finding.message, preflight)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """``TimeoutError`` after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
