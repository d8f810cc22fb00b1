"""What lies beside the rows of a record: dumps of a run that stood still, the records of other ranks. Files flow in, plain values flow out."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from lossguard import sinks
from lossguard.findings import Finding

SLACK = 2.0  # seconds by which a file may seem older than its run: file systems round; our own choice


@dataclass(frozen=True)
class Dump:
    """No step ended any more after this one. text: what was written then: the finding, the newest losses, every thread's stack."""

    step: int
    name: str
    text: str


def stalls(folder: str | Path, since: float = 0.0) -> list[Dump]:
    """The dumps of a record, oldest first. since: when its run began, in seconds of the epoch; older ones belong to another."""
    found = []
    for path in Path(folder).glob("stalled-*.txt"):
        number = path.stem.partition("-")[2]
        with contextlib.suppress(OSError):
            if number.isdigit() and path.stat().st_mtime >= since - SLACK:
                found.append(Dump(int(number), path.name, path.read_text(encoding="utf-8", errors="replace")))
    return sorted(found, key=lambda dump: dump.step)


def ranks(folder: str | Path) -> dict[int, list[Finding]]:
    """What the other ranks of a run found, by rank: those whose records lie in folders ``rankN`` of this one."""
    found: dict[int, list[Finding]] = {}
    for path in Path(folder).glob("rank*"):
        number = re.fullmatch(r"rank(\d+)", path.name)
        if number is not None:
            with contextlib.suppress(ValueError, KeyError, OSError):  # a rank that wrote nothing, or not to its end, says nothing
                found[int(number.group(1))] = sinks.findings(path)
    return dict(sorted(found.items()))
