"""A guard that is switched off: ``LOSSGUARD=off`` in the environment. Every call is taken, nothing is watched, nothing attached.

It is made as any guard, so that it has all parts, but without a halt, a vote, a thread or a record, and is closed, with all
taken off, when it is made. What a checkpoint of an earlier, guarded run holds is kept for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossguard.coverage import Coverage
from lossguard.safekeeping import Checkpoints, Soundness

QUIET: Mapping[str, Any] = {"halt": None, "agree": False, "stall": False}  # keywords of a guard that does nothing; the others at their defaults


class Idle:
    """Stands before ``Guard`` in the classes of one that is switched off, and takes the calls that do something."""

    configured: dict[str, str]
    closed: bool
    steps: int
    _loaded: Mapping[str, Any] | None = None  # what an earlier run has left

    def step(self, loss: Any, *, logits: Any = None) -> None:
        """Counts."""
        self.steps += 1

    def batch(self, inputs: Any, targets: Any = None) -> None:
        """Nothing."""

    def validation(self, loss: Any, *, accuracy: Any = None, train_accuracy: Any = None) -> None:
        """Nothing."""

    def watch_forward(self, on: bool) -> None:
        """Nothing."""

    def report(self, path: str | Path) -> Path:
        """Nothing is written: there is nothing to tell of."""
        return Path(path)

    def safe_to_save(self, *, together: bool | None = None) -> Soundness:
        """Always: nobody has looked."""
        return Soundness(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """What was loaded, or the steps alone."""
        return {"batches": 0, **(self._loaded or {}), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Kept for the next checkpoint."""
        self._loaded, self.steps = dict(state), state["steps"]

    @property
    def coverage(self) -> Coverage:
        """Nothing is observed."""
        return Coverage({}, {"everything": "switched off by LOSSGUARD=off"})

    def __repr__(self) -> str:
        return "<lossguard.Guard switched off by LOSSGUARD=off>"

    # ---- inside

    def _keep(self) -> None:
        self._fatal, self._checkpoints, self._unison = None, Checkpoints(), None

    def _show(self, inputs: Any, targets: Any, *, handed: bool) -> None:
        """A loader's batches pass."""

    def _check_open(self) -> None:
        """It is closed, and that is no error."""
