"""Rows of the tape, carried to the host. Never waits inside a step unless a row is late at its due step, and counts that.

The only module that moves data to the host. A copy is enqueued on the current stream into pinned memory, and an event
behind it is asked at a fixed later step. On a CPU device the numbers are there at once and nothing is copied.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lossguard.device.capture import capturing

Numbers = npt.NDArray[np.float32]


class Handover:
    """A queue of device tensors on their way to the host.

    lag: steps between sending and receiving; the same on every run and rank, so that what is decided from the numbers
    is decided at a fixed step. 0 is right on a CPU. late: how often a row had not arrived when it was due.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.late = 0
        self.waiting: deque[tuple[int, Tensor | None, Any, Any]] = deque()  # what is under way, oldest first: due, numbers, event, meaning
        self._spare: dict[int, list[Tensor]] = {}
        self._held = 0

    def send(self, step: int, numbers: Tensor, meaning: Any) -> None:
        """Enqueue the copy of a contiguous float32 tensor; ``meaning`` comes back with it."""
        if numbers.device.type == "cpu":
            # host memory already; copied so that the device side may reuse its block
            self.waiting.append((step + self.lag, numbers.clone() if self.lag else numbers, None, meaning))
        elif numbers.device.type == "meta":
            self.waiting.append((step + self.lag, None, None, meaning))  # no values exist
        else:
            mirror = self._mirror(numbers)
            mirror.copy_(numbers, non_blocking=True)
            self.waiting.append((step + self.lag, mirror, _event(numbers.device), meaning))

    def due(self, step: int) -> bool:
        """Whether something is to be received at ``step``."""
        return bool(self.waiting) and self.waiting[0][0] <= step

    def receive(self, step: int, *, everything: bool = False) -> Iterator[tuple[Numbers | None, Any]]:
        """What is due at ``step``, oldest first; None for a device without values. ``everything`` may wait for the rest."""
        while self.waiting and (everything or self.waiting[0][0] <= step):
            _, mirror, event, meaning = self.waiting.popleft()
            if mirror is None:
                yield None, meaning
                continue
            if event is not None and not event.query():
                self.late += not everything
                event.synchronize()  # host read: the only place that may wait, and only for a row that is late
            numbers = mirror.detach().numpy()  # host read: the row has arrived, so this does not wait
            yield numbers, meaning
            if event is not None:
                self._spare.setdefault(mirror.numel(), []).append(mirror)

    def arrived(self, patience: float) -> bool:
        """Whether all that was sent is there, asked for ``patience`` seconds at most; False while a CUDA graph is captured."""
        events = [event for _, _, event, _ in self.waiting if event is not None]
        if not events:
            return True
        if capturing():
            return False  # asking an event would break the capture
        end = time.monotonic() + patience
        while not events[-1].query():  # one stream: the last is behind all others
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return all(event.query() for event in events)

    @property
    def nbytes(self) -> int:
        """Host bytes held for rows in flight and for reuse."""
        return self._held

    def _mirror(self, numbers: Tensor) -> Tensor:
        spare = self._spare.get(numbers.numel())
        if spare:
            return spare.pop().view(numbers.shape)
        self._held += numbers.numel() * 4
        return torch.empty(numbers.shape, dtype=torch.float32, device="cpu", pin_memory=_can_pin(numbers.device))


def host_view(tensor: Tensor) -> npt.NDArray[Any] | None:
    """The numbers of a tensor that lies in host memory, without a copy; None for any other device or dtype."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or tensor.dtype == torch.bfloat16:
        return None
    return tensor.detach().numpy()  # host memory: nobody waits


def _can_pin(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def _event(device: torch.device) -> Any:
    """An event behind the copy, or None where copies are done when they return."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # no timing: cheap to record and to ask
        event.record(torch.cuda.current_stream(device))
        return event
    if device.type in ("xpu", "mps"):
        event = torch.Event(device.type)
        event.record()
        return event
    return None
