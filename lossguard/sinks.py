"""Where findings and samples go: the run's record on disk. Host values flow in; a folder of JSON Lines flows out.

Each line is complete when it is written, so a record is readable after a kill; a truncated last line is ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lossguard.findings import Finding, plain
from lossguard.host.history import History, Sample

SCHEMA = 1
Sink = Callable[[Finding], None]


class Record:
    """A folder with ``findings.jsonl`` and ``rows.jsonl``; opened again, a run is appended behind a new header."""

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"kind": "header", "schema": SCHEMA, "time": time.time(), "python": platform.python_version(), **facts}
        self._files: dict[str, IO[str]] = {}
        self._told = False  # that a file could not be written
        for name in ("findings", "rows"):
            path = self.folder / f"{name}.jsonl"
            _end_last_line(path)
            self._files[name] = path.open("a", encoding="utf-8")
            self._write(name, header)
        self._units = 0
        self._params = 0

    def finding(self, finding: Finding) -> None:
        """One event, as it stands now."""
        self._write("findings", {"kind": "finding", **finding.to_dict()})

    def summary(self, findings: Sequence[Finding], facts: Mapping[str, Any] | None = None, coverage: Mapping[str, Any] | None = None) -> None:
        """All events as they stand at the end of the run, with their counts and consequences; what run it was, and what was observed."""
        ending = {"facts": dict(facts or {}), "coverage": dict(coverage or {})}
        self._write("findings", {"kind": "summary", "findings": [f.to_dict() for f in findings], **ending})

    def losses(self, first: int, totals: list[float], terms: Mapping[str, list[float]]) -> None:
        """The losses of consecutive steps."""
        line = {"kind": "losses", "first": first, "total": [_short(v) for v in totals]}
        self._write("rows", {**line, "terms": {k: [_short(v) for v in vs] for k, vs in terms.items()}} if terms else line)

    def validation(self, step: int, value: float, accuracy: float = math.nan, train_accuracy: float = math.nan) -> None:
        """One evaluation's loss, after this step, and accuracies where they are told."""
        told = {"accuracy": accuracy, "train_accuracy": train_accuracy}
        line = {"kind": "validation", "step": step, "loss": _short(value)}
        self._write("rows", {**line, **{name: _short(v) for name, v in told.items() if not math.isnan(v)}})

    def sample(self, sample: Sample, history: History) -> None:
        """One sampled step: ``values`` maps a signal to its sites and numbers; names of sites stand in lines of their own."""
        if len(history.params) > self._params:
            self._params = len(history.params)
            self._write("rows", {"kind": "parameters", "names": [p.name for p in history.params], "kinds": [p.kind for p in history.params]})
        if len(history.units) > self._units:
            self._units = len(history.units)
            self._write("rows", {"kind": "units", "names": [u.name for u in history.units], "kinds": [u.kind for u in history.units]})
        pairs = ((name, sites.tolist(), np.asarray(numbers, dtype=np.float64).tolist()) for name, (sites, numbers) in sample.values.items())
        values = {name: [sites, [_short(v) for v in numbers]] for name, sites, numbers in pairs}
        facts = {k: plain(v) for k, v in sample.facts.items() if isinstance(v, (int, float, str))}
        self._write("rows", {"kind": "sample", "step": sample.step, "facts": facts, "values": values})

    def event(self, step: int, what: str, **details: Any) -> None:
        """Something that happened to the run after so many steps, such as a signal. details: the same for programs, in plain types."""
        self._write("findings", {"kind": "event", "step": step, "what": what, "time": time.time(), **details})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            _close(file)
        self._files.clear()

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        """A line in a file; a file that cannot be written (a full disk) is given up, and the first such failure is raised."""
        file = self._files.get(name)
        if file is None:
            return
        text = json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            file.write(text)
            file.flush()
        except OSError:
            _close(self._files.pop(name))
            if not self._told:
                self._told = True
                raise


def read(folder: str | Path, name: str = "findings") -> Iterator[dict[str, Any]]:
    """The lines of a record's ``findings`` or ``rows``, oldest first; a line that a kill cut short is passed over.

    Raises ``ValueError`` for a folder without a record or with a newer schema.
    """
    path = Path(folder) / f"{name}.jsonl"
    if not path.exists():
        raise ValueError(f"no record at {path}; give the folder that was passed as Guard(record=...)")
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line.get("kind") == "header" and line.get("schema", 0) > SCHEMA:
                raise ValueError(f"{path} has schema {line['schema']}, this version reads up to {SCHEMA}; update lossguard")
            yield line


def findings(folder: str | Path) -> list[Finding]:
    """The events of a record's last run: as they stood at its end, or as they were heard if it was killed."""
    return heard(read(folder))


def heard(lines: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """The events that lines of ``findings`` tell of, from the last header on."""
    known: list[Finding] = []
    for line in lines:
        if line["kind"] == "header":
            known = []
        elif line["kind"] == "finding":
            new = Finding.from_dict(line)
            known = [f for f in known if (f.diagnosis, f.step) != (new.diagnosis, new.step)] + [new]
        elif line["kind"] == "summary":
            known = [Finding.from_dict(f) for f in line["findings"]]
    return known


def _close(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # what cannot be written any more was told already
        file.close()


def _short(value: float) -> Any:
    """Six significant digits keep a record small; non-finite numbers become text."""
    return plain(float(f"{value:.6g}"))


def _end_last_line(path: Path) -> None:
    """A file that a kill cut short gets its line ended, so that the next one stands alone."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
