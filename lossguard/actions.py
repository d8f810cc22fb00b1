"""What a finding leads to: a line in the log, or the end of the run. Findings flow in, exceptions and log lines flow out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from lossguard.findings import Finding, Severity, check_names

logger = logging.getLogger("lossguard")

LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR, Severity.HALT: logging.ERROR}
EXIT_CODE = 83  # halted, and a retry will not help; outside the codes of shells, sysexits and launchers


class TrainingHalted(RuntimeError):
    """A finding ended the run. The message is the finding as people read it.

    >>> finding = Finding("nonfinite_loss", Severity.HALT, 7, "loss", "NaN")
    >>> TrainingHalted(finding).exit_code, TrainingHalted(finding).finding.step
    (83, 7)
    """

    def __init__(self, finding: Finding, exit_code: int = EXIT_CODE) -> None:
        super().__init__(finding, exit_code)
        self.finding = finding
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.finding)


@dataclass(frozen=True)
class Policy:
    """Which findings halt: those named, or those of a severity and above."""

    names: frozenset[str] = frozenset()
    severity: Severity | None = Severity.HALT

    @classmethod
    def of(cls, halt: Iterable[str] | Severity | str | None) -> Policy:
        """From what a user writes: a set of diagnosis names, a ``Severity`` or its name, or None for never."""
        if halt is None:
            return cls(severity=None)
        if isinstance(halt, Severity):
            return cls(severity=halt)
        if isinstance(halt, str) and halt in [s.label for s in Severity]:
            return cls(severity=Severity.parse(halt))
        return cls(names=check_names(halt, "halt"), severity=None)

    def halts(self, finding: Finding) -> bool:
        """Whether this finding ends the run. A named diagnosis halts from a warning up."""
        if self.severity is not None:
            return finding.severity >= self.severity
        return finding.diagnosis in self.names and finding.severity >= Severity.WARNING


def log(finding: Finding) -> None:
    """The finding in the log ``lossguard``, at the level of its severity."""
    logger.log(LEVELS[finding.severity], "%s", finding)
