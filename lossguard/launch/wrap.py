"""``python -m lossguard launch -- COMMAND``: runs a launcher and ends with the code that its workers halted with.

torchrun ends with 1 whatever its workers' codes. It copies the error file of the worker that failed first; that code
flows out here. Signals are passed on; without a halt the launcher's own code is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lossguard.launch.tell import ERROR_VARIABLE

PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2")


def main(arguments: Sequence[str]) -> int:
    """Run the command; its code, or that of its halt. A command killed by a signal gives 128 and the signal, as shells do."""
    command = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    if not command or command[0] in ("-h", "--help"):
        sys.stderr.write("usage: lossguard launch -- COMMAND ...\nRun a launcher such as torchrun and end with the code that its workers halted with.\n")
        return 0 if command else 2
    with tempfile.TemporaryDirectory(prefix="lossguard-") as folder:
        named = os.environ.get(ERROR_VARIABLE)
        path = Path(named) if named else Path(folder) / "error.json"
        before = _stamp(path)
        code = _run(command, {**os.environ, ERROR_VARIABLE: str(path)})
        halted = None if code == 0 or _stamp(path) == before else _code(path)
    if halted is not None:
        return halted
    return code if code >= 0 else 128 - code


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The command's code. Signals that come here go to it: a scheduler knows only us."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif number != signal.SIGINT or not sys.stdin.isatty():  # a terminal sends Ctrl-C to both
            child.send_signal(number)

    numbers = [getattr(signal, name) for name in PASSED_ON if hasattr(signal, name)]
    previous = {n: signal.signal(n, hand_on) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        child = subprocess.Popen(command, env=environment)
        for number in early:
            child.send_signal(number)
        return child.wait()
    except OSError as error:
        sys.stderr.write(f"lossguard: cannot run {command[0]!r}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino


def _code(path: Path) -> int | None:
    """The code of a halt in an error file; None for other errors. Not ``errorCode``: torchrun writes there how the process ended,
    which is SIGTERM for a rank that halted first and was still ending when the second did."""
    try:
        code = int(json.loads(path.read_text(encoding="utf-8"))["message"]["extraInfo"]["lossguard"]["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return code if 0 < code < 256 else None
