"""Our own faults never end a run: one warning for each place, then that part stays silent. Calls flow in, results flow out."""

from __future__ import annotations

import warnings
from typing import Any

OFF = "is switched off for this run"


class Faults:
    """Which parts of a guard have failed once and rest since then."""

    def __init__(self) -> None:
        self.silenced: set[str] = set()

    def watch(self, call: Any, *args: Any, part: str | None = None, **keywords: Any) -> Any:
        """What ``call`` returns, or None where it fails or has failed before. part: its name in the warning."""
        name = str(part or getattr(call, "__qualname__", type(call).__name__))
        if name in self.silenced:
            return None
        try:
            return call(*args, **keywords)
        except Exception as error:
            self.silenced.add(name)
            warnings.warn(f"lossguard: {name} failed and {OFF} ({type(error).__name__}: {error}); training goes on", RuntimeWarning, stacklevel=3)
            return None

    def of_rule(self, diagnosis: str, error: Exception) -> None:
        """A rule failed; the judge asks it no more."""
        self.silenced.add(f"rule {diagnosis}")
        warnings.warn(f"lossguard: the rule {diagnosis} failed and {OFF} ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=3)
