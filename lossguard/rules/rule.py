"""What a rule is, and the registry of rules. Numpy only; no torch, no state.

A rule is a frozen dataclass: its thresholds are documented fields, its ``check`` is a pure function from a history to a
finding or None. Patience, grace, episodes and cascades are the judge's business (``judge.py``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from lossguard.findings import DIAGNOSES, Finding, Severity
from lossguard.host.history import History


@runtime_checkable
class Rule(Protocol):
    """The protocol. ``reads`` names the signals it needs: with ``("loss",)`` alone it is asked at every hand-over,
    otherwise once for every new sample. A rule whose law spans many steps may have a ``pace``: it is asked at most once
    in so many steps. A rule is ``slow`` if its law spans so many samples that one more or less decides nothing: while nothing stirs
    it is asked at every other sample.

    >>> from lossguard.rules.curves import LossSpike
    >>> isinstance(LossSpike(sigmas=10.0), Rule), LossSpike.diagnosis
    (True, 'loss_spike')
    """

    diagnosis: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]

    @property
    def grace(self) -> int:
        """Steps at the start of a run during which the rule is not asked."""
        ...

    @property
    def patience(self) -> int:
        """How many times in a row it must find before it is heard."""
        ...

    def check(self, history: History) -> Finding | None:
        """The finding for the newest data, or None. Pure: the same history gives the same answer."""
        ...


RULES: dict[str, type[Any]] = {}
R = TypeVar("R")


def rule(cls: type[R]) -> type[R]:
    """Register a rule class under its diagnosis; a custom rule is complete with this decorator and a ``summary``.

    >>> from dataclasses import dataclass
    >>> @rule
    ... @dataclass(frozen=True)
    ... class LossAboveTen:
    ...     \"\"\"The loss is above ten.\"\"\"
    ...     diagnosis = "loss_above_ten"
    ...     reads = ("loss",)
    ...     limit: float = 10.0  # our own bar
    ...     grace: int = 0
    ...     patience: int = 1
    ...     def check(self, history):
    ...         now = history.losses(1)
    ...         if not now.size or now[0] <= self.limit:
    ...             return None
    ...         return Finding(self.diagnosis, Severity.WARNING, history.step, "loss", f"{now[0]:g} is above {self.limit:g}")
    >>> "loss_above_ten" in RULES
    True
    >>> unregister("loss_above_ten")
    """
    name = getattr(cls, "diagnosis", None)
    if not isinstance(name, str) or not callable(getattr(cls, "check", None)) or not isinstance(getattr(cls, "reads", None), tuple):
        raise ValueError(f"{cls.__name__} is no rule; expected attributes diagnosis (a name), reads (a tuple of signal names) and a method check(history)")
    RULES[name] = cls
    if name not in DIAGNOSES:
        summary = (cls.__doc__ or name.replace("_", " ")).strip().splitlines()[0].rstrip(".")
        DIAGNOSES[name] = (Severity.WARNING, summary[0].lower() + summary[1:])
    return cls


def unregister(name: str) -> None:
    """Take a custom rule out of the registry."""
    RULES.pop(name)
    DIAGNOSES.pop(name)
