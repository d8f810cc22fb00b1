"""What a check before training is, and the registry of checks. A bench flows in, an answer flows out; nothing is kept.

A check is a frozen dataclass: its thresholds are documented fields, its ``look`` reads the bench (``bench.py``) and says
pass, fail or cannot tell. It may read values and train copies; it never touches what the user handed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from lossguard.findings import DIAGNOSES, Cause, Evidence, Finding, Remedy, Severity

if TYPE_CHECKING:
    from lossguard.preflight.bench import Bench

BEFORE = -1  # the step of a finding made before the first step
MOST_CAUSES = 3  # of one finding; more is a lecture


@dataclass(frozen=True)
class Answer:
    """What a check says: "pass", "fail" or "cannot tell", why, and its findings.

    >>> Answer("pass", "no class is rare").findings
    ()
    """

    verdict: str
    reason: str
    findings: tuple[Finding, ...] = ()


def passed(reason: str) -> Answer:
    """The check looked and found nothing."""
    return Answer("pass", reason)


def unknown(reason: str) -> Answer:
    """The check could not look; the reason says why."""
    return Answer("cannot tell", reason)


def failed(*findings: Finding) -> Answer:
    """The check found something; the reason is the first finding's message."""
    return Answer("fail", f"{findings[0].where}: {findings[0].message}", findings)


@runtime_checkable
class Check(Protocol):
    """The protocol of a check.

    >>> from lossguard.preflight.balance import ClassImbalance
    >>> isinstance(ClassImbalance(ratio=50.0), Check), ClassImbalance.diagnosis
    (True, 'class_imbalance')
    """

    diagnosis: ClassVar[str]

    def look(self, bench: Bench) -> Answer:
        """The answer for this model and these batches."""
        ...


CHECKS: dict[str, type[Any]] = {}  # in the order in which they are made and reported: roots before what follows from them
C = TypeVar("C")


def check(cls: type[C]) -> type[C]:
    """Register a check class under its diagnosis; a custom check is complete with this decorator.

    >>> @check
    ... @dataclass(frozen=True)
    ... class FewBatches:
    ...     \"\"\"few_batches: an epoch has hardly any batches.\"\"\"
    ...     diagnosis = "few_batches"
    ...     least: int = 2  # batches; our own bar
    ...     def look(self, bench):
    ...         return passed("enough") if len(bench.kept) >= self.least else unknown("too few batches to say")
    >>> "few_batches" in CHECKS
    True
    >>> unregister("few_batches")
    """
    name = getattr(cls, "diagnosis", None)
    if not isinstance(name, str) or not callable(getattr(cls, "look", None)):
        raise ValueError(f"{cls.__name__} is no check; expected an attribute diagnosis (a name) and a method look(bench)")
    CHECKS[name] = cls
    if name not in DIAGNOSES:
        summary = (cls.__doc__ or name.replace("_", " ")).strip().splitlines()[0].rstrip(".").removeprefix(f"{name}: ")
        DIAGNOSES[name] = (Severity.WARNING, summary[0].lower() + summary[1:])
    return cls


def unregister(name: str) -> None:
    """Take a custom check out of the registry."""
    CHECKS.pop(name)
    DIAGNOSES.pop(name)


def finding(
    diagnosis: str, where: str, message: str, evidence: list[Evidence], advice: list[tuple[Cause, list[Remedy]]], severity: Severity | None = None
) -> Finding:
    """A finding from causes with their own remedies: most confident first, at most three."""
    chosen = sorted(advice, key=lambda pair: -pair[0].confidence)[:MOST_CAUSES]
    causes, remedies = tuple(cause for cause, _ in chosen), tuple(dict.fromkeys(r.text for _, rs in chosen for r in rs))
    by_text = {r.text: r for _, rs in chosen for r in rs}
    grave = DIAGNOSES[diagnosis][0] if severity is None else severity
    return Finding(diagnosis, grave, BEFORE, where, message, tuple(evidence), causes, tuple(by_text[text] for text in remedies))
