"""The loop of ``lossguard watch``: look, show, wait. A job flows in; a terminal's screen or lines of text flow out."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType

from rich.console import Console
from rich.live import Live

from lossguard.watch import screen
from lossguard.watch.job import Job
from lossguard.watch.run import shared

BUDGET = 1 << 20  # bytes of a record read between two drawings, a fraction of a second: a long one is seen to be read
PLAIN_WIDTH = 100  # columns of drawings where no terminal says its own


def main(folder: Path, *, once: bool, interval: float) -> int:
    """Show a job once, or until it is over."""
    job, console = Job(folder), _console()
    try:
        with _ends() as asked:
            if once:
                job.read()
                if job.lead is None:
                    raise ValueError(f"no record at {folder}; give the folder that was passed as Guard(record=...)")
            elif console.is_terminal:
                _live(job, console, interval, asked)
            else:
                _lines(job, console, interval, asked)
    except KeyboardInterrupt:
        pass  # the way to end it
    if job.lead is not None:
        plain = not console.is_terminal
        console.print(screen.Screen(job, whole=plain), soft_wrap=plain)
    return 0


def _live(job: Job, console: Console, interval: float, asked: Event) -> None:
    """Redraw the screen until the job is over, or somebody asked for the end. What stood on it is told once more on the terminal behind it."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while not asked.is_set():
            job.read(BUDGET)
            live.update(screen.Screen(job, lines=console.height), refresh=True)
            if job.over:
                return
            if not job.behind:
                time.sleep(interval)


def _lines(job: Job, console: Console, interval: float, asked: Event) -> None:
    """Every finding as it comes, and one line about the state where there is news: for a file or a pipe."""
    said: set[tuple[str, int, str]] = set()
    before, idle = "", ""
    while not asked.is_set():
        news = job.read(BUDGET)
        state = screen.status(job)
        if not job.behind:
            for finding, ranks in shared(job.ranks):
                key = finding.diagnosis, finding.step, finding.where
                if key not in said:
                    said.add(key)
                    _say(console, screen.of_finding(finding, ranks if len(job.ranks) > 1 else ()).plain)
            text = screen.line(job)
            if text != before and (news or state.partition(" for ")[0] != idle):
                _say(console, text)
                before, idle = text, state.partition(" for ")[0]
        if job.over:
            return
        if not job.behind:
            time.sleep(interval)


def _say(console: Console, text: str) -> None:
    console.out(text, highlight=False)
    console.file.flush()


def _console() -> Console:
    """Colours and a screen on a terminal; else plain text. ``NO_COLOR`` takes every style; ``TERM=dumb`` the screen too."""
    terminal = bool(sys.stdout.isatty()) and os.environ.get("TERM") != "dumb"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name in a record that the terminal's encoding does not have
    styled = terminal and not os.environ.get("NO_COLOR")
    width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else PLAIN_WIDTH
    return Console(
        file=sys.stdout, force_terminal=terminal, force_interactive=terminal, force_jupyter=False, width=width,
        color_system="auto" if styled else None, highlight=False, markup=False, emoji=False,
    )  # fmt: skip


@contextmanager
def _ends() -> Iterator[Event]:
    """Ctrl-C and SIGTERM leave the terminal as it was found. What they raise can get lost, in a finalizer for instance: the event
    that is given stays set, so that the next look is the last."""
    asked, numbers = Event(), (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, frame: FrameType | None) -> None:
        asked.set()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
