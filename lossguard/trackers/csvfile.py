"""A CSV file: one line for each sampled step, one for each finding. Numbers flow in; NaN and infinity are written as they are."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lossguard.findings import Finding
from lossguard.scalars import SCALARS

COLUMNS = ("step", "loss", *SCALARS, "loss_scale", "findings", "finding")


class CSV:
    """path: the file; one that a run has begun is continued. Each line is complete when it is written.

    A number that was not measured in a sample leaves its field empty; a finding has a line of its own, its headline in the last field.
    Raises ``ValueError`` for a file that holds something else.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
    >>> tracker = CSV(path); tracker.scalars(3, {"loss": 0.5, "grad_norm": float("nan")}); tracker.close()
    >>> path.read_text().splitlines()[1].startswith("3,0.5,nan,,")
    True
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        old = ""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open(encoding="utf-8", newline="") as file:
                old = file.readline().rstrip("\r\n")
            if old != ",".join(COLUMNS):
                raise ValueError(f"{self.path} exists and is no CSV file of this version (its first line is {old[:60]!r}); give another path or remove it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._lines = csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        if not old:
            self._lines.writeheader()
            self._file.flush()

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """A line of numbers, six significant digits each."""
        self._write({"step": step, **{name: f"{value:.6g}" for name, value in numbers.items()}})

    def finding(self, finding: Finding) -> None:
        """A line with the finding's step and headline."""
        self._write({"step": finding.step, "finding": headline(finding)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Mapping[str, object]) -> None:
        self._lines.writerow(line)
        self._file.flush()


def headline(finding: Finding) -> str:
    """A finding in one line.

    >>> from lossguard.findings import Severity
    >>> headline(Finding("nonfinite_loss", Severity.HALT, 7, "loss", "the loss is NaN"))
    'halt nonfinite_loss at step 7, loss: the loss is NaN'
    """
    return f"{finding.severity.label} {finding.diagnosis} at step {finding.step}, {finding.where}: {finding.message}"
