"""Findings in colour, for people at a terminal. Text flows in; the same text with ANSI codes around parts of it flows out.

Nothing but the codes is added: without them the text is what it was. A log record is never painted, a stream that
shows it to a person is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import IO, Any

from lossguard.findings import Finding, Severity

PLAIN, DIM = "\x1b[0m", "\x1b[2m"
CURES = "\x1b[32m"
COLOURS = {Severity.INFO: "\x1b[36m", Severity.WARNING: "\x1b[33m", Severity.ERROR: "\x1b[31m", Severity.HALT: "\x1b[1;31m"}
LABEL = slice(2, 12)  # where a row's label stands in a finding's text


def welcome(stream: IO[str] | Any) -> bool:
    """Whether a stream is a terminal that shows colours to somebody who did not refuse them (``NO_COLOR``, ``TERM=dumb``)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if sys.platform == "win32" and not (os.environ.get("WT_SESSION") or os.environ.get("TERM")):
        return False  # the old console shows the codes themselves
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False


def painted(finding: Finding) -> str:
    """The finding's text: severity and diagnosis in the colour of the severity, remedies in green, the pointer to more dim.

    >>> finding = Finding("loss_spike", Severity.WARNING, 12, "loss", "9 times its recent median")
    >>> painted(finding).splitlines()[0]
    'lossguard: \\x1b[33mwarning loss_spike\\x1b[0m at step 12'
    >>> bare(painted(finding)) == str(finding)
    True
    """
    head, *rows = str(finding).split("\n")
    named = f"{finding.severity.label} {finding.diagnosis}"
    lines, label = [head.replace(named, f"{COLOURS[finding.severity]}{named}{PLAIN}", 1)], ""
    for row in rows:
        label = row[LABEL].strip() or label
        code = {"try": CURES, "more": DIM, "silence": DIM}.get(label)
        lines.append(row if code is None else f"{code}{row}{PLAIN}")
    return "\n".join(lines)


def bare(text: str) -> str:
    """The text without colours.

    >>> bare("a \\x1b[1;31mb\\x1b[0m")
    'a b'
    """
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class _Painter(logging.Formatter):
    """A record whose only argument is a finding, painted; any other as it is."""

    def format(self, record: logging.LogRecord) -> str:
        args = record.args
        if record.msg == "%s" and isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], Finding):
            return painted(args[0])
        return super().format(record)


def last_resort(logger: logging.Logger) -> logging.Handler | None:
    """A handler that paints, where nobody handles this logger's records and Python itself would write them to a terminal; else None.

    It stands in for ``logging.lastResort``, with its level and its stream, and is attached to no logger: a handler that is
    configured later gets every record, and none is written twice.
    """
    last = logging.lastResort
    if last is None or logger.hasHandlers() or type(last) is not _PYTHONS_OWN or last.formatter is not None or last.filters or not welcome(sys.stderr):
        return None
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(last.level)
    handler.setFormatter(_Painter())
    return handler


_PYTHONS_OWN = type(logging.lastResort)  # before anybody replaced it


def emit(logger: logging.Logger, level: int, finding: Finding) -> None:
    """The finding to whoever listens to the logger; painted where that is only Python's last resort, at a terminal."""
    handler = last_resort(logger) if logger.isEnabledFor(level) else None
    if handler is None or level < handler.level:
        logger.log(level, "%s", finding, stacklevel=2)
        return
    record = logger.makeRecord(logger.name, level, __file__, 0, "%s", (finding,), None)
    kept = logger.filter(record)  # since Python 3.12 a filter may give another record
    if kept:
        handler.handle(kept if isinstance(kept, logging.LogRecord) else record)
