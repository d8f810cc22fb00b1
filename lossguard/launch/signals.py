"""Preemption: a signal flushes the guards' records and goes on to whom it was meant for. Never swallows one, never hangs.

A Python handler runs only when the main thread is in Python. A rank that is stuck in a collective would so outlive a
SIGTERM that ended it before; a thread sees the signal at once and ends the process if the handler has no chance to.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

from lossguard import watching
from lossguard.actions import TrainingHalted

STUCK = 5.0  # seconds that the main thread may stay outside Python; our own choice, below the 10 to 30 of launchers before SIGKILL
BUSY = 0.05, 20  # seconds until a signal that came inside the guard is sent again, and how often
REST = 10  # seconds for the interpreter to end after its last handler; our own choice, below the 30 of torchrun before SIGKILL
OUTSIDE = ("lossguard.launch", "lossguard.cli", "lossguard.__main__", "lossguard.batches", "lossguard.integrations", "lossguard.demo")

_all: weakref.WeakSet[Flush] = weakref.WeakSet()


class Flush:
    """Flushes on these signals until closed. A signal that is ignored, or handled outside of Python, is left alone."""

    def __init__(self, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
        self._pid, self._tries = os.getpid(), 0
        self.code: int | None = None  # of a halt that is on its way out: a launcher that ends the other ranks must not hide it
        self._previous: dict[int, Any] = {}
        self._wake: socket.socket | None = None
        self._old_fd = -1
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread set handlers
        for number in signals:
            previous = signal.getsignal(number)
            if previous is not None and previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handle)
        if signal.SIG_DFL in self._previous.values():
            self._watch_over()
        _all.add(self)

    def close(self) -> None:
        """The handlers that were there before are back, unless somebody has set others meanwhile."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._previous.clear()
        if self._wake is not None:
            held = signal.set_wakeup_fd(self._old_fd)
            if held != self._wake.fileno():
                signal.set_wakeup_fd(held)  # somebody else's by now
            self._wake.close()
            self._wake = None
        _all.discard(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            inside = _inside(frame)
            halting = self.code is None and isinstance(sys.exc_info()[1], TrainingHalted)  # on its way to where it is told
            ours = self._previous.get(number) == signal.SIG_DFL and signal.getsignal(number) == self._handle
            if (inside or halting) and ours and self._tries < BUSY[1]:
                self._tries += 1
                later = threading.Timer(BUSY[0], os.kill, (self._pid, number))
                later.daemon = True
                later.start()
                return
            if not inside:
                _flush(number)
        self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        elif signal.getsignal(number) != self._handle:
            return  # called by a handler set later (Lightning's), which would have found no other and has its own way to end
        elif self.code is not None and os.getpid() == self._pid:
            os._exit(self.code)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch_over(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        if self._old_fd != -1:  # an event loop listens there already
            signal.set_wakeup_fd(self._old_fd)
            ours.close()
            theirs.close()
            return
        self._wake = theirs
        deadly = frozenset(n for n, previous in self._previous.items() if previous == signal.SIG_DFL)
        threading.Thread(target=_wait, args=(weakref.ref(self), ours, deadly, self._pid), name="lossguard-signals", daemon=True).start()


def _wait(owner: weakref.ref[Flush], wake: socket.socket, deadly: frozenset[int], pid: int) -> None:
    """Until the other end closes: a deadly signal that has not ended the process in time takes its course all the same."""
    with wake:
        while numbers := wake.recv(64):
            for number in deadly.intersection(numbers):
                time.sleep(STUCK)
                flush = owner()
                if flush is not None and signal.getsignal(number) == flush._handle:  # nobody has taken it over meanwhile
                    if flush.code is not None:
                        os._exit(flush.code)
                    ctypes.pythonapi.PyOS_setsig(number, None)  # SIG_DFL, from this thread: signal.signal refuses
                    os.kill(pid, number)
                del flush


def _flush(number: int) -> None:
    """Guards write what they have. Whatever goes wrong, the signal goes on."""
    for guard in watching.guards():
        with contextlib.suppress(Exception):
            guard.settle(patience=watching.PATIENCE)
        with contextlib.suppress(Exception):
            guard.note(f"signal {signal.Signals(number).name}")


def _inside(frame: FrameType | None) -> bool:
    """Whether the signal came while the guard itself was at work, so that its state may be half changed."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("lossguard") and not name.startswith(OUTSIDE):
            return True
        frame = frame.f_back
    return False


@atexit.register
def _last() -> None:
    """Behind all other handlers at exit. From here on the interpreter takes Python's handlers away: a signal would hide the code
    of a halt in the short rest of its life, so it has none any more, and an alarm ends a rest that is not short."""
    for flush in list(_all):
        if flush.code is not None:
            deadly = [number for number, previous in flush._previous.items() if previous == signal.SIG_DFL]
            flush.close()
            for number in deadly:
                signal.signal(number, signal.SIG_IGN)
                if hasattr(signal, "alarm"):
                    signal.alarm(REST)


def _child() -> None:
    """A forked child (a loader's worker) has the handlers of its parent from before, and must not wake its parent's thread."""
    for flush in list(_all):
        with contextlib.suppress(Exception):
            flush.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork either
    os.register_at_fork(after_in_child=_child)
