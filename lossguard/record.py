"""A run's record read back: a folder flows in, the run's facts, curves and samples flow out. No torch.

What is read is the record's last run. A run that was resumed on its own record is joined with what came before it, up to
the step at which it took over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lossguard import sinks
from lossguard.findings import Finding
from lossguard.host.history import Array, Sample

FOREVER = 1 << 62
_STEP = re.compile(r'"(?:first|step)":(\d+)')


@dataclass
class Story:
    """What a record says besides its samples.

    header: how the run began. findings: as they stood at its end, or as they were heard. events: what else happened, as the lines of
    the record. resumed: the steps at which it was taken up again. facts, coverage: how it ended; empty where it was killed or
    written by an older version.
    losses: (steps, 2) of step and loss. terms: the loss's named parts, as long. validations: (n, 2) of step and loss.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    losses: Array = field(default_factory=lambda: np.zeros((0, 2)))
    terms: dict[str, Array] = field(default_factory=dict)
    validations: Array = field(default_factory=lambda: np.zeros((0, 2)))


@dataclass
class Reader:
    """Reads the rows of a record once, in order: iterate it for the samples; then ``story`` is complete.

    params, units: names and kinds of the sites, as far as they are known at the present sample.
    """

    folder: Path
    params: list[tuple[str, str]] = field(default_factory=list)
    units: list[tuple[str, str]] = field(default_factory=list)
    story: Story = field(default_factory=Story)

    def __iter__(self) -> Iterator[Sample]:
        segments = _segments(self.folder / "rows.jsonl") if (self.folder / "rows.jsonl").exists() else []
        self.story = _ending(self.folder, segments)
        steps: list[Array] = []
        totals: list[Array] = []
        terms: dict[str, list[tuple[int, Array]]] = {}
        validations: list[tuple[float, float]] = []
        count = 0
        for line, until in _rows(self.folder, segments):
            kind = line["kind"]
            if kind == "losses":
                kept = max(0, min(len(line["total"]), until - line["first"]))
                steps.append(np.arange(line["first"], line["first"] + kept, dtype=np.float64))
                totals.append(_numbers(line["total"][:kept]))
                for name, values in line.get("terms", {}).items():
                    terms.setdefault(name, []).append((count, _numbers(values[:kept])))
                count += kept
            elif kind in ("parameters", "units"):
                setattr(self, "params" if kind == "parameters" else "units", list(zip(line["names"], line["kinds"], strict=True)))
            elif line["step"] >= until:
                continue
            elif kind == "validation":
                validations.append((line["step"], float(line["loss"])))
            elif kind == "sample":
                values = {name: (np.asarray(sites, dtype=np.intp), _numbers(numbers)) for name, (sites, numbers) in line["values"].items()}
                yield Sample(line["step"], values, {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in line["facts"].items()})
        if steps:
            self.story.losses = np.stack([np.concatenate(steps), np.concatenate(totals)], axis=1)
        for name, parts in terms.items():
            self.story.terms[name] = np.full(count, np.nan)
            for begin, values in parts:
                self.story.terms[name][begin : begin + len(values)] = values
        self.story.validations = np.array(validations, dtype=np.float64).reshape(-1, 2)


def _ending(folder: Path, segments: list[int]) -> Story:
    """The lines of ``findings.jsonl``: those of the last run and, where it was resumed, of what it goes on from."""
    parts: list[list[dict[str, Any]]] = []
    for line in sinks.read(folder):
        if line["kind"] == "header":
            parts.append([])
        if parts:
            parts[-1].append(line)
    if len(parts) != len(segments):  # one of the files was cut, or put together by hand: what goes on from what is not known
        segments = [0] * (len(parts) - 1) + [FOREVER]
    living = [(lines, until) for lines, until in zip(parts, segments) if until > 0]
    story, found = Story(), dict[tuple[str, int], Finding]()
    story.resumed = [until for _, until in living if until < FOREVER]
    for lines, until in living:
        story.header, story.facts, story.coverage, story.ended = {**lines[0], "time": story.header.get("time", lines[0].get("time"))}, {}, {}, False
        found.update({(f.diagnosis, f.step): f for f in sinks.heard(lines) if f.step < until})
        story.events += [line for line in lines if line["kind"] == "event" and line["step"] <= until]
        for line in lines:
            if line["kind"] == "summary":
                story.facts, story.coverage, story.ended = line.get("facts", {}), line.get("coverage", {}), True
    story.findings = list(found.values())
    return story


def _rows(folder: Path, segments: list[int]) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of the last run with the step at which another took over from theirs."""
    number = -1
    for line in sinks.read(folder, "rows"):
        if line.get("kind") == "header":
            number += 1
        elif number >= 0 and segments[number] > 0 and line.get("kind") in ("losses", "sample", "validation", "parameters", "units"):
            yield line, segments[number]


def _segments(path: Path) -> list[int]:
    """For each header, the step before which its lines count: 0 for a run that was begun anew later, FOREVER for the last."""
    starts: list[int | None] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if text.startswith('{"kind":"header"') and _whole(text):
                starts.append(None)
            elif starts and starts[-1] is None and text.startswith('{"kind":"') and (found := _STEP.search(text[:200])):
                starts[-1] = int(found.group(1))
    until, ends = FOREVER, []
    for start in reversed(starts):
        ends.append(until)
        until = until if start is None else min(until, start)
    return ends[::-1]


def _whole(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _numbers(values: list[Any]) -> Array:
    """Numbers and the names of those that JSON does not know."""
    return np.array(values, dtype=np.float64)
