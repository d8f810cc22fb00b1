"""What a guard tells of its run at any time: findings, history, verdict, coverage, memory, the page. Changes nothing.

The parts that a guard wired together flow in; what people and programs read flows out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lossguard import notebook, verdict
from lossguard.coverage import Coverage, survey
from lossguard.device.recorder import Recorder
from lossguard.device.taps import Taps
from lossguard.faults import Faults
from lossguard.findings import Finding
from lossguard.host.handover import Handover
from lossguard.host.history import History
from lossguard.locating import Locator
from lossguard.recovery import Recovery
from lossguard.rules.judge import Judge
from lossguard.skipping import Skipping


class Teller:
    """The part of a guard that is asked."""

    model: nn.Module
    steps: int
    closed: bool
    _faults: Faults
    _handover: Handover
    _history: History
    _holders: tuple[Any, ...]  # what holds memory
    _judge: Judge
    _locator: Locator
    _recorder: Recorder
    _skipping: Skipping
    _taps: Taps
    recovery: Recovery

    @property
    def findings(self) -> list[Finding]:
        """The events so far, oldest first; one an episode, with counts and consequences."""
        return [self._locator.told(self._skipping.told(f)) for f in (*self.recovery.past, *self._judge.findings)]

    @property
    def skipped(self) -> dict[str, int]:
        """Updates left out so far, by the diagnosis that ``skip=`` names; as far as has arrived from the device."""
        return self._skipping.counts

    @property
    def culprits(self) -> list[dict[str, Any]]:
        """The operations that ``locate=`` has named, in plain types, each with the diagnosis and the step of its finding."""
        return self._locator.culprits

    @property
    def history(self) -> History:
        """What has arrived from the device so far, as rules see it; to be read only."""
        return self._history

    @property
    def verdict(self) -> str:
        """The reading of the loss curves now: ``learning``, ``overfitting``, ``bottleneck``, ...; see ``lossguard.verdict``."""
        return verdict.read(self._history)

    @property
    def coverage(self) -> Coverage:
        """What is observed and what is not, and why."""
        unguarded = self._skipping.unseen(self.steps)
        return survey(self._recorder, self._history, self._handover, self.steps, self._taps.backward_seen, self._faults.silenced, unguarded)

    @property
    def memory(self) -> int:
        """Bytes the guard holds now, on devices and on the host; bounded, and reached after the first full window."""
        return sum(holder.nbytes for holder in self._holders)

    def _repr_html_(self) -> str:
        state, seen = "closed" if self.closed else "watching", self.coverage
        about = f"lossguard.Guard: {type(self.model).__name__}, {len(self._recorder.roster.trained)} parameter tensors"
        return notebook.of_guard(about, state, self.steps, self.verdict, self.findings, seen.observed, seen.not_observed)

    def __repr__(self) -> str:
        state, found = "closed" if self.closed else "watching", self.findings
        what = f"{len(self._recorder.roster.trained)} parameter tensors, {self.steps} steps"
        grave = Counter(f.severity for f in found)
        told = ", ".join(f"{n} {severity.label}" for severity, n in sorted(grave.items(), reverse=True))
        count = f"{len(found) or 'no'} finding{'' if len(found) == 1 else 's'}" + (f" ({told})" if told else "")
        return f"<lossguard.Guard {state} {type(self.model).__name__}: {what}, {count}>"
