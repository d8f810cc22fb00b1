"""One readable line now and then, for people who follow a log. A sample's numbers flow in, a line flows out; nothing waits."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger("lossguard")


class Stream(Protocol):
    """What takes text, such as ``sys.stderr``."""

    def write(self, text: str, /) -> object:
        """Take it."""

    def flush(self) -> object:
        """Show it."""


def _decimal(value: float) -> str:
    return _unless_lost(value, f"{value:.4g}")


def _power(value: float) -> str:
    return _unless_lost(value, f"{value:.1e}")


def _percent(value: float) -> str:
    return _unless_lost(value, f"{100 * value:.0f} %")


def _unless_lost(value: float, text: str) -> str:
    return text if math.isfinite(value) else "NaN" if math.isnan(value) else "-Inf" if value < 0 else "Inf"


# what a tracker is given -> how it reads; what was not measured is left out
WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", _decimal),
    "grad_norm": ("grad norm", _decimal),
    "update_ratio_median": ("update/weight", _power),
    "dead_fraction_largest": ("dead", _percent),
    "logit_peak": ("logit peak", _decimal),
}


class Heartbeat:
    """One line each ``every`` steps, at the first sampled step from there on: ``Guard(..., trackers=[Heartbeat(every=100)])``.

    every: in steps, at least 1; sampled steps are ``Guard(every=)`` apart, so that a smaller number gives one line a sample.
    stream: where lines go, such as ``sys.stderr``; without one they go to the log ``lossguard`` at INFO, and one warning says so
    if nobody shows that level. The speed is of the steps since the line before; ``dead`` is the layer with most dead units.

    >>> import sys
    >>> beat = Heartbeat(every=100, stream=sys.stdout)
    >>> beat.scalars(0, {"loss": 2.3, "grad_norm": 1.5, "findings": 0.0})
    step 0  loss 2.3  grad norm 1.5  0 findings
    >>> beat.scalars(10, {"loss": 2.2, "findings": 0.0})  # too early
    >>> beat.scalars(100, {"loss": float("nan"), "dead_fraction_largest": 0.02, "findings": 1.0})  # doctest: +ELLIPSIS
    step 100  loss NaN  dead 2 %  1 finding  ... steps/s
    """

    def __init__(self, every: int = 100, stream: Stream | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Heartbeat(every=) is a number of steps, at least 1, got {every!r}")
        if stream is not None and not (hasattr(stream, "write") and hasattr(stream, "flush")):
            raise ValueError(f"Heartbeat(stream=) takes what can be written to, such as sys.stderr, got {stream!r}")
        self.every = every
        self._stream = stream
        self._due = 0
        self._before: tuple[int, float] | None = None  # step and time of the line before
        self._warned = False

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a sampled step; a line if one is due."""
        if self._before is not None and self._before[0] < step < self._due:
            return  # an earlier step than the last line's is a run that went back: it begins anew
        self._say("  ".join([f"step {step}", *self._told(numbers), *self._speed(step)]))
        self._due = step - step % self.every + self.every

    def _told(self, numbers: Mapping[str, float]) -> list[str]:
        parts = [f"{label} {text(numbers[name])}" for name, (label, text) in WORDS.items() if name in numbers]
        count = int(numbers.get("findings", 0.0))
        return [*parts, f"{count} finding{'' if count == 1 else 's'}"]

    def _speed(self, step: int) -> list[str]:
        now, before = time.monotonic(), self._before
        self._before = step, now
        if before is None or step <= before[0] or now <= before[1]:
            return []
        return [f"{(step - before[0]) / (now - before[1]):.3g} steps/s"]

    def _say(self, line: str) -> None:
        if self._stream is not None:
            self._stream.write(line + "\n")
            self._stream.flush()
            return
        if not self._warned and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
            self._warned = True
            how = "call logging.basicConfig(level=logging.INFO), or give Heartbeat(stream=sys.stderr)"
            warnings.warn(f"lossguard: the heartbeat goes to the log 'lossguard' at INFO, which nobody shows; {how}", UserWarning, stacklevel=2)
        logger.info("%s", line)
