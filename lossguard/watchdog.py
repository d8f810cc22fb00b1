"""Notices that no step ends any more, from a thread of its own. Host values only: it never touches a device, nor a lock of the run.

The guard's steps flow in as times; where none comes for too long, every thread's stack and the newest losses flow into the log
and into a file of the run's record, at once, since the process may never come back. If it does, the guard reports as usual.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lossguard import actions
from lossguard.host.history import History
from lossguard.rules import Rule
from lossguard.rules.stall import Stall, StalledTraining

KEPT = 64  # durations of steps
ROWS = 20  # newest losses told
MOST = 5  # dumps of one run: a run that is slow again and again is told of, and no disk is filled


class Watchdog:
    """Watches one guard's steps. wanted: as ``Guard(stall=...)``; ranks: whether several agree. Nothing runs where it is not wanted."""

    def __init__(self, history: History, rules: Sequence[Rule], folder: Path | None, wanted: bool | float | None, *, ranks: bool) -> None:
        if not (wanted is None or isinstance(wanted, (bool, int, float))) or (not isinstance(wanted, bool) and wanted is not None and not wanted > 0):
            raise ValueError(f"stall must be True, False or a number of seconds above 0, got {wanted!r}; leave it out to watch where there are several ranks")
        self._history, self._folder = history, folder
        self._rule = next((r for r in rules if isinstance(r, StalledTraining)), StalledTraining())
        self._least = None if wanted is None or isinstance(wanted, bool) else float(wanted)
        self._durations: deque[float] = deque(maxlen=KEPT)
        self._longest = 0.0  # pause that ended by itself
        self._last = time.monotonic()
        self._step = -1
        self._paused = 0
        self._told: Stall | None = None  # since the last step
        self._dumps = 0
        self._end = threading.Event()
        self.on = ranks if wanted is None else wanted is not False
        if self.on:
            self._main = threading.get_ident()
            threading.Thread(target=_watch, args=(weakref.ref(self), self._end), name="lossguard watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step ends; to be told where ``on``."""
        now = time.monotonic()
        took, self._last, told = now - self._last, now, self._told
        if self._step >= 0:
            self._durations.append(took)
            if len(self._durations) > self._rule.fewest:  # the first steps compile
                self._longest = max(self._longest, took)
        self._step = step
        if told is not None:  # it goes on: said by the rule as well, so that it stands among the findings
            self._told = None
            self._history.notes["stall"] = told

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens meanwhile takes as long as it takes."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._last = time.monotonic()

    def close(self) -> None:
        """The run is over."""
        self._end.set()
        if self._told is not None:
            self._history.notes["stall"] = self._told

    # ---- in the thread

    def look(self) -> float:
        """Is it too long? Returns the seconds until the next look."""
        limit, median = self._limit()
        quiet = time.monotonic() - self._last
        if quiet > limit and self._told is None and not self._paused and self._step >= 0 and self._dumps < MOST:
            self._dumps += 1
            self._tell(quiet, limit, median)
        return min(max(self._rule.seconds(KEPT, 0.0, 0.0, self._least) / 20, 0.05), 10.0)

    def _limit(self) -> tuple[float, float]:
        durations = np.array(_copy(self._durations))
        median = float(np.median(durations)) if durations.size else float("nan")
        return self._rule.seconds(durations.size, median, self._longest, self._least), median

    def _tell(self, quiet: float, limit: float, median: float) -> None:
        names = {t.ident: t.name for t in threading.enumerate()}
        stacks = [(names.get(i, str(i)), i == self._main, traceback.extract_stack(frame)) for i, frame in sys._current_frames().items()]
        stacks = [s for s in sorted(stacks, key=lambda s: not s[1]) if s[0] != threading.current_thread().name]
        main = [(frame.filename, frame.name, frame.lineno or 0) for frame in stacks[0][2]] if stacks else []
        stall = Stall(self._step, quiet, limit, median, tuple(main))
        finding = self._rule.finding(stall)
        steps, losses = self._history.loss_steps(ROWS), self._history.losses(ROWS)
        rows = [f"  step {step}: loss {loss:.6g}" for step, loss in zip(steps.tolist(), losses.tolist(), strict=False)]
        parts = [f"thread {name}{' (main)' if main else ''}\n{''.join(traceback.format_list(stack))}" for name, main, stack in stacks]
        text = "\n".join([str(finding), "", "newest losses", *rows, "", *parts])
        if self._folder is not None:
            with contextlib.suppress(OSError):  # a full disk: the log has it all
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"stalled-{self._step}.txt"
                path.with_suffix(".part").write_text(text, encoding="utf-8")
                path.with_suffix(".part").replace(path)
        actions.log(finding)
        actions.logger.warning("%s", "\n".join(["newest losses", *rows, "", *parts]))
        self._told = stall


def _watch(mine: weakref.ref[Watchdog], end: threading.Event) -> None:
    """The thread: it ends with its guard, even a forgotten one."""
    pause = 0.05
    while not end.wait(pause):
        watchdog = mine()
        if watchdog is None:
            return
        with contextlib.suppress(Exception):  # a fault of our own ends no run
            pause = watchdog.look()
        del watchdog


def _copy(numbers: deque[float]) -> list[float]:
    """The main thread may append meanwhile."""
    for _ in range(3):
        with contextlib.suppress(RuntimeError):
            return list(numbers)
    return []
