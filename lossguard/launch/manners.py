"""``exit_on_halt``: an uncaught halt ends the process with its code, after telling the launcher. Off unless called."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from torch import distributed

from lossguard.actions import TrainingHalted
from lossguard.launch import tell
from lossguard.launch.signals import Flush

LINGER = 60.0  # seconds; our own choice: twice the time that torchrun gives its workers to end

_current: Manners | None = None


class Manners:
    """What :func:`exit_on_halt` has set; ``close()`` or the end of a ``with`` puts everything back."""

    def __init__(self, termination_log: str | Path | None, linger: float | None, signals: Iterable[int], *, hook: bool) -> None:
        self._log, self._linger = termination_log, linger
        self._flush = Flush(signals)
        self._previous = sys.excepthook
        self._hook = self._uncaught  # one bound method, so that it is known again
        if hook:
            sys.excepthook = self._hook

    def told(self, halt: TrainingHalted) -> int:
        """Tell everyone, and return the code to end with. From now on the process ends with it even if its teardown hangs or a launcher ends it."""
        tell.everyone(halt, self._log)
        self._flush.code = halt.exit_code
        if self._linger is not None and distributed.is_available() and distributed.is_initialized():
            last = threading.Timer(self._linger, os._exit, (halt.exit_code,))  # a communicator may wait for ranks that are gone
            last.daemon = True
            last.start()
        return halt.exit_code

    def close(self) -> None:
        """Put back the excepthook and the signal handlers that were there."""
        global _current
        if sys.excepthook == self._hook:
            sys.excepthook = self._previous
        self._flush.close()
        if _current is self:
            _current = None

    def __enter__(self) -> Manners:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, TrainingHalted):
            return  # still on its way to the excepthook
        self.close()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._previous(kind, error, trace)
        if isinstance(error, TrainingHalted):
            sys.exit(self.told(error))


def exit_on_halt(
    *, termination_log: str | Path | None = None, linger: float | None = LINGER, signals: Iterable[int] = (signal.SIGTERM,), hook: bool = True
) -> Manners:
    """From now on an uncaught ``TrainingHalted`` ends this process with its exit code; other exceptions pass as ever.

    Before that it writes torchrun's error file (where ``TORCHELASTIC_ERROR_FILE`` names one), the Kubernetes termination
    message (``termination_log``, else ``LOSSGUARD_TERMINATION_LOG``, else ``/dev/termination-log`` where it exists) and a
    last line on standard error. ``signals`` flush the records of open guards and then do what they did before. linger:
    seconds until a process whose communicators hang at the end is ended all the same; None for never. hook: False where
    the caller catches the halt itself. Called again, it gives what was set at first.

    >>> with exit_on_halt():
    ...     pass  # train
    """
    global _current
    if _current is None:
        _current = Manners(termination_log, linger, signals, hook=hook)
    return _current
