"""A job's record as it grows, all its ranks: which there are, what they found, how fast they go, whether it is over.

A folder flows in; what the screen shows flows out. Times are those of the files, so that a far disk's clock tells them all.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from pathlib import Path

from lossguard.watch.run import Run

SPAN = 60.0  # seconds over which the speed is taken; our own choice: long enough for blocks of ten steps that take seconds each
FEWEST = 3  # news of the newest steps are kept for it however old they are
QUIET = 30.0  # seconds without news before it is said; our own choice
GRACE = 5.0  # seconds without news of the other ranks, after which a job whose first rank is over counts as over
AT_ONCE = 32  # other ranks looked at each time; our own choice: two small reads each, which a far disk answers in time
_RANK = re.compile(r"rank(\d+)")


class Job:
    """The ranks of a job. ``lead`` is the rank whose curves are followed: 0, or the lowest there is.

    Raises ``ValueError`` for a path that cannot be a record.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; give the folder that was passed as Guard(record=...)")
        self.ranks: dict[int, Run] = {}
        self._turn = 0  # of the other ranks, where there are very many
        self._pace: deque[tuple[float, int]] = deque()

    def read(self, budget: int | None = None) -> bool:
        """Take what is new, of the curves at most ``budget`` bytes and of very many ranks some. Returns whether anything was."""
        self._find()
        others = [run for _, run in sorted(self.ranks.items()) if not run.curves]
        if budget is not None and len(others) > AT_ONCE:
            begin, self._turn = self._turn % len(others), self._turn + AT_ONCE
            others = [*others, *others][begin : begin + AT_ONCE]
        news = [run.read(budget) for run in (*(run for run in self.ranks.values() if run.curves), *others)]
        lead = self.lead
        if lead is not None and not lead.behind and lead.step >= 0:
            self._note(lead.changed, lead.step)
        return any(news)

    @property
    def lead(self) -> Run | None:
        """The rank whose curves are shown; None without a record."""
        return next((run for _, run in sorted(self.ranks.items()) if run.exists), None)

    @property
    def behind(self) -> float:
        """The share of what lies there that is not read yet."""
        lead = self.lead
        return lead.behind / max(1, lead.rows.size) if lead is not None and lead.behind else 0.0

    @property
    def speed(self) -> tuple[float, bool] | None:
        """Steps a second, and whether this is the mean over the run because too little was seen of it yet; None if unknown."""
        lead = self.lead
        if lead is None or lead.step < 0:
            return None
        if len(self._pace) >= 2 and not lead.ended:
            (then, before), (now, step) = self._pace[0], self._pace[-1]
            if now > then and step > before:
                return (step - before) / (now - then), False
        end = float(lead.facts.get("ended", lead.changed))
        took = end - float(lead.header.get("time", end))
        done = lead.step - lead.first + 1 if lead.first >= 0 else 0
        return (done / took, True) if took > 0 and done > 0 else None

    @property
    def quiet(self) -> float:
        """Seconds since there was news."""
        return max(0.0, time.time() - max((run.changed for run in self.ranks.values()), default=time.time()))

    @property
    def over(self) -> bool:
        """The run has said its last, on every rank, or on the first and the others say nothing any more; all is read."""
        lead = self.lead
        if lead is None or not lead.ended or lead.behind:
            return False
        return all(run.ended or time.time() - run.changed > GRACE for run in self.ranks.values() if run.exists)

    @property
    def stalled(self) -> Path | None:
        """What the watchdog left behind about a step that has not ended yet."""
        lead = self.lead
        if lead is None or lead.ended:
            return None
        left = [(int(path.stem.rpartition("-")[2]), path) for path in lead.folder.glob("stalled-*.txt") if path.stem.rpartition("-")[2].isdigit()]
        newest = max(left, default=None)
        return newest[1] if newest is not None and newest[0] >= lead.step else None

    def _find(self) -> None:
        """Ranks that are new here; the first of all is followed whole, the others by their findings and their newest loss."""
        there = {0: self.folder}
        with contextlib.suppress(OSError):  # not there yet
            there |= {int(m.group(1)): path for path in self.folder.iterdir() if (m := _RANK.fullmatch(path.name)) and path.is_dir()}
        for rank, folder in sorted(there.items()):
            if rank not in self.ranks:
                self.ranks[rank] = Run(folder, rank, curves=False)
        lowest = next((rank for rank in sorted(there) if (there[rank] / "findings.jsonl").exists()), None)
        for rank in list(self.ranks):
            if rank not in there:  # removed
                del self.ranks[rank]
            elif self.ranks[rank].curves != (rank == lowest):
                self.ranks[rank] = Run(there[rank], rank, curves=rank == lowest)

    def _note(self, when: float, step: int) -> None:
        """The pace of the newest steps; a run that went back begins anew."""
        if self._pace and (step < self._pace[-1][1] or when < self._pace[-1][0]):
            self._pace.clear()
        if not self._pace or step > self._pace[-1][1]:
            self._pace.append((when, step))
        while len(self._pace) > FEWEST and when - self._pace[0][0] > SPAN:
            self._pace.popleft()
