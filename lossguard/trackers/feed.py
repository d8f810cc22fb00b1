"""Hands what has arrived on the host to every tracker. A history and findings flow in, calls flow out; nothing waits.

A tracker that raises is one warning and gets no more; training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from lossguard.faults import Faults
from lossguard.findings import Finding
from lossguard.host.history import History
from lossguard.scalars import chosen


@runtime_checkable
class Tracker(Protocol):
    """What gets a guard's scalars. ``finding(finding)`` and ``close()`` are called where they exist; a true attribute
    ``layers`` asks for every layer's own numbers too."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one sampled step, under names without a prefix."""


class Function:
    """A plain callable as a tracker: it is called with the step and its numbers."""

    def __init__(self, call: Callable[[int, Mapping[str, float]], Any]) -> None:
        self.scalars = call


class Feed:
    """The trackers of one guard.

    Raises ``ValueError`` for what is no tracker.

    >>> heard = []
    >>> feed = Feed([lambda step, numbers: heard.append(step)], Faults())
    >>> history = History(); history.add_loss(0, 0.5); feed.arrived(History(), []); heard
    []
    """

    def __init__(self, trackers: Iterable[Any], faults: Faults) -> None:
        self._trackers = [_a_tracker(given) for given in _a_list(trackers)]
        self._faults = faults

    def arrived(self, history: History, findings: Collection[Finding]) -> None:
        """A sample has newly arrived in the history."""
        if not self._trackers or not history.samples:
            return
        step = int(history.steps(1)[0])
        for k, tracker in enumerate(self._trackers):
            self._watch(k, tracker.scalars, step, {**_loss(history, step), **chosen(history, findings, of_layers=bool(getattr(tracker, "layers", False)))})

    def finding(self, finding: Finding) -> None:
        """A finding was heard; a sink."""
        self._all("finding", finding)

    def close(self) -> None:
        """The run is over."""
        self._all("close")

    def _all(self, method: str, *args: Any) -> None:
        for k, tracker in enumerate(self._trackers):
            call = getattr(tracker, method, None)
            if call is not None:
                self._watch(k, call, *args)

    def _watch(self, k: int, call: Callable[..., Any], *args: Any) -> None:
        self._faults.watch(call, *args, part=f"the tracker {type(self._trackers[k]).__name__} ({k})")


def _loss(history: History, step: int) -> dict[str, float]:
    """The loss of a step, if it is still in the window: a sample arrives right behind its loss."""
    steps = history.loss_steps(1)
    return {"loss": float(history.losses(1)[0])} if steps.size and int(steps[0]) == step else {}


def _a_list(trackers: Any) -> list[Any]:
    return [trackers] if isinstance(trackers, Tracker) or callable(trackers) else list(trackers)


def _a_tracker(given: Any) -> Tracker:
    if isinstance(given, Tracker) and not isinstance(given, type):
        return given
    if hasattr(given, "add_scalar") and hasattr(given, "add_text"):
        raise ValueError("trackers= holds a SummaryWriter itself; give lossguard.trackers.TensorBoard(writer)")
    if callable(given) and not isinstance(given, type):
        return Function(given)
    known = "TensorBoard(folder), WandB(run), MLflow(run_id), CSV(path), Heartbeat(every) of lossguard.trackers, or a callable that takes (step, numbers)"
    raise ValueError(f"trackers= holds {given!r}, which is no tracker; give {known}")
