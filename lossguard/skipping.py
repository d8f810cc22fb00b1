"""Leaving bad updates out: which gates are armed, which steps were skipped, and what a finding then says.

Optimizers flow in, counters flow into rows of the tape, and sampled rows flow back in once they are on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim import Optimizer

from lossguard import actions
from lossguard.device import gate
from lossguard.device.tape import Row
from lossguard.findings import Finding, check_names
from lossguard.host.history import Sample

REMEMBERED = 1024  # sampled steps whose update was left out; our own choice, above any window of a rule


class Skipping:
    """The gates of one guard; none where nothing is to be skipped.

    Raises ``ValueError`` for a diagnosis that cannot be skipped, and for an optimizer that cannot leave an update out exactly.
    """

    def __init__(self, skip: Iterable[str], optimizers: Sequence[Optimizer]) -> None:
        names = check_names(skip, "skip", gate.SKIPPABLE) if skip else frozenset()
        self.gates = gate.armed(optimizers) if names else []
        self._skipped: deque[int] = deque(maxlen=REMEMBERED)

    def __bool__(self) -> bool:
        return bool(self.gates)

    def judge(self) -> None:
        """A backward pass ended: decide on the update to come. On the device."""
        for one in self.gates:
            one.judge()

    def lay(self, row_of: Callable[[torch.device], Row]) -> None:
        """The counters, into the sampled step's row."""
        gate.lay(self.gates, row_of)

    def arrived(self, sample: Sample | None) -> None:
        """A sampled row is on the host."""
        if sample is not None and "consecutive_skips" in sample.values and sample.values["consecutive_skips"][1].any():
            self._skipped.append(sample.step)

    def told(self, finding: Finding) -> Finding:
        """The finding, with what the gates have done about it."""
        return actions.spared(finding, gate.SKIPPABLE, self._skipped) if self.gates else finding

    def close(self) -> None:
        """Disarm: the optimizers step as if nobody had watched."""
        for one in self.gates:
            one.close()
