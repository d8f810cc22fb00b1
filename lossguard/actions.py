"""What a finding leads to: a line in the log, or the end of the run. Findings flow in, exceptions and log lines flow out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lossguard import exits, painting
from lossguard.findings import Finding, Severity, check_names

logger = logging.getLogger("lossguard")

LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR, Severity.HALT: logging.ERROR}

# How the note of a finding begins that did no harm.
SPARED = ("updates with non-finite gradients are skipped on the device", "the update of this step was skipped on the device")


class TrainingHalted(RuntimeError):
    """A finding ended the run. The message is the finding as people read it.

    exit_code: what the process should end with, by the table in ``lossguard.exits``. folder: what was left behind for a
    post-mortem, None without a record. culprit: the operation that made a non-finite value, as ``Guard(locate=...)`` found it.

    >>> finding = Finding("nonfinite_loss", Severity.HALT, 7, "loss", "NaN")
    >>> TrainingHalted(finding).exit_code, TrainingHalted(finding).finding.step
    (83, 7)
    """

    def __init__(self, finding: Finding, exit_code: int | None = None, *, codes: Mapping[str, int] | None = None) -> None:
        code = exits.code_of(finding.diagnosis, codes) if exit_code is None else exit_code
        super().__init__(finding, code)
        self.finding = finding
        self.exit_code = code
        self.folder: Path | None = None
        self.culprit: Mapping[str, Any] | None = None

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


def spared(finding: Finding, harmless: Collection[str], skipped: Collection[int]) -> Finding:
    """What the gate keeps from the weights has done no harm, and says so. harmless: diagnoses that reach the weights by a
    non-finite gradient or not at all. skipped: the steps whose update was left out."""
    if finding.diagnosis in harmless:
        note = f"{SPARED[0]}: weights and moments are those before them"
        return replace(finding, severity=min(finding.severity, Severity.WARNING), note=note)
    if finding.diagnosis.startswith(("nonfinite", "exploding")) and finding.step in skipped:
        return replace(finding, note=f"{SPARED[1]}: weights and moments are those before it")
    return finding


def log(finding: Finding) -> None:
    """The finding in the log ``lossguard``, at the level of its severity; in colour on a terminal where no handler is configured."""
    painting.emit(logger, LEVELS[finding.severity], finding)
