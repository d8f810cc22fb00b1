"""Tells the launcher why the run was halted: torchrun's error file, Kubernetes' termination message, a last line.

A halt flows in, small texts flow out. What cannot be written is one warning; nothing here raises.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lossguard import exits
from lossguard.actions import TrainingHalted
from lossguard.aftermath import write_whole
from lossguard.findings import Finding

TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes' default terminationMessagePath; the kubelet creates it
TERMINATION_VARIABLE = "LOSSGUARD_TERMINATION_LOG"  # where a pod's terminationMessagePath is another
TERMINATION_BYTES = 4096  # the kubelet cuts longer messages
ERROR_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def everyone(halt: TrainingHalted, termination_log: str | Path | None = None) -> None:
    """All that listen, each once for a halt."""
    if getattr(halt, "told", False):
        return
    halt.told = True  # type: ignore[attr-defined]
    _harmless("the error file", error_file, halt)
    _harmless("the termination message", termination_message, halt, termination_log)
    _harmless("the last line", last_line, halt)


def summary(halt: TrainingHalted) -> str:
    """One line with the words that log classifiers look for.

    >>> from lossguard.findings import Severity
    >>> summary(TrainingHalted(Finding("nonfinite_loss", Severity.HALT, 7, "loss", "NaN")))
    'lossguard: halted: nonfinite_loss at step 7 in loss (non-finite, loss: nan); exit code 83: a retry will not help'
    """
    finding = halt.finding
    words = _words(finding)
    left = f"; left behind in {halt.folder}" if halt.folder else ""
    return (
        f"lossguard: halted: {finding.diagnosis} at step {finding.step} in {finding.where}{f' ({words})' if words else ''}; "
        f"exit code {halt.exit_code}: {exits.meaning(halt.exit_code)}{left}"
    )


def error_file(halt: TrainingHalted) -> None:
    """What torchrun reads when a worker fails: it exits with 1 whatever the worker's code, this file holds the true one."""
    name = os.environ.get(ERROR_VARIABLE)
    if not name:
        return
    stack = "".join(traceback.format_exception(type(halt), halt, halt.__traceback__))
    extra: dict[str, Any] = {
        "py_callstack": stack,
        "timestamp": str(int(time.time())),
        "lossguard": {"exit_code": halt.exit_code, "finding": halt.finding.to_dict()},
    }
    message = {"message": summary(halt), "errorCode": halt.exit_code, "extraInfo": extra}
    write_whole(Path(name), json.dumps({"message": message}, allow_nan=False))


def termination_message(halt: TrainingHalted, path: str | Path | None = None) -> None:
    """The finding as the pod's last words. The first process of a pod speaks; nothing is created where the kubelet made no file."""
    chosen = path or os.environ.get(TERMINATION_VARIABLE)
    target = Path(chosen) if chosen else TERMINATION_LOG
    if not chosen and not target.is_file():
        return
    if target.exists() and target.stat().st_size:
        return
    target.write_bytes(cut(f"{summary(halt)}\n{halt.finding}\n", TERMINATION_BYTES))


def cut(text: str, most: int) -> bytes:
    """The text in UTF-8, at most so many bytes, ending between two characters.

    >>> cut("aé", 2), cut("aé", 3)
    (b'a', b'a\\xc3\\xa9')
    """
    return text.encode()[:most].decode(errors="ignore").encode()


def last_line(halt: TrainingHalted) -> None:
    """The summary on standard error."""
    sys.stdout.flush()
    sys.stderr.write(summary(halt) + "\n")
    sys.stderr.flush()


def _words(finding: Finding) -> str:
    heard = [f for f in (finding, *finding.consequences) if f.diagnosis.startswith("nonfinite")]
    if not heard:
        return ""
    nan = any(f.diagnosis == "nonfinite_loss" and "nan" in f.message.lower() for f in heard)
    return "non-finite, loss: nan" if nan else "non-finite"


def _harmless(what: str, tell: Callable[..., None], *args: Any) -> None:
    try:
        tell(*args)
    except Exception as error:
        warnings.warn(f"lossguard: {what} could not be written ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=3)
