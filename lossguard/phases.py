"""The phases of a step, told to a guard by hooks, or by trainers that know better than hooks. Nothing is measured here.

A backward pass or an update flows in; the recorder, the gate of ``skip=`` and the schedule hear of it.
"""

from __future__ import annotations

from typing import Any

from lossguard.device.recorder import Recorder
from lossguard.device.taps import Taps
from lossguard.faults import Faults
from lossguard.schedule import Schedule
from lossguard.skipping import Skipping


class Phased:
    """The part of a guard that is told what happens within a step."""

    closed: bool
    _explicit: bool  # trainers call the phases, no hooks
    _faults: Faults
    _quiet: int  # coming steps that record their loss only
    _recorder: Recorder
    _scaler: Any
    _schedule: Schedule
    _skipping: Skipping
    _taps: Taps

    def _open_step(self) -> None:
        raise NotImplementedError

    def abandon(self) -> None:
        """This iteration has no loss and counts as no step: forget what it recorded."""
        if not self.closed:
            self._open_step()

    def watch_forward(self, on: bool) -> None:
        """Whether forward passes count from here on in this step: of an update's several micro-batches one suffices."""
        self._taps.watch_forward(on and self._recorder.on and not self.closed)

    def after_backward(self, *, unscaled: bool = False) -> None:
        """A backward pass ended; gradients are complete and unclipped. unscaled: they have their true scale already."""
        if self.closed or self._quiet:
            return
        self._schedule.update_tried = self._explicit
        self._faults.watch(self._recorder.backward_done, unscaled=unscaled)
        self._skipping.judge(None if unscaled else getattr(self._scaler, "_scale", None))

    def before_update(self, index: int = 0) -> None:
        """Optimizer ``index`` is about to step on gradients as they are now, clipped or not. Its own hook says so too."""
        if not self.closed and not self._quiet:
            self._faults.watch(self._recorder.before_update, index)

    def after_update(self, index: int = 0) -> None:
        """Optimizer ``index`` stepped. Its own hook says so too."""
        if self.closed or self._quiet:
            return
        self._schedule.update_seen = True
        self._faults.watch(self._recorder.after_update, index)
