"""``lossguard watch``: a job's record followed live. A folder flows in; a screen, or lines of text, flows out. Nothing is written to it.

Only what is new is read at each look, so that a long record costs no more than a short one. The library that draws is an extra
(``pip install 'lossguard[watch]'``) and is imported when a job is watched.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

__all__ = ["main"]

NEEDS = "watching needs rich; install it with: pip install 'lossguard[watch]'"


def main(folder: str | Path, *, once: bool = False, interval: float = 1.0) -> int:
    """Follow the record in ``folder`` until it says that the run is over, or until Ctrl-C; 0 either way.

    once: show the present state and end. interval: seconds between two looks. A terminal gets a screen that is redrawn; a pipe
    or a file gets plain lines. Raises ``ValueError`` for what cannot be watched, or where the drawing library is missing.
    """
    if not (math.isfinite(interval) and interval > 0):
        raise ValueError(f"--interval is a number of seconds above 0, got {interval}")
    try:
        importlib.import_module("rich.live")
    except ModuleNotFoundError:
        raise ValueError(NEEDS) from None
    from lossguard.watch import follow

    return follow.main(Path(folder), once=once, interval=interval)
