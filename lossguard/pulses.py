"""The few numbers of every step: the loss, its terms, whether the batch was finite. One device copy a number, no wait.

Scalars flow in on their device; blocks of steps flow into the hand-over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lossguard.device.outputs import float_tensors
from lossguard.device.tape import Pulse
from lossguard.fingerprint import Fingerprints, samples
from lossguard.host.handover import Handover, host_view
from lossguard.host.intake import PLAIN

MAX_LEAVES = 2  # float tensors of a batch looked at in every step
MAX_CHECKED = 2**20  # elements of a batch on the host that are looked at in every step of a run on an accelerator


def check_loss(loss: Tensor | float | Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """The loss as named terms (``{"": loss}`` for a plain one). ``ValueError`` if a term is no scalar."""
    terms = dict(loss) if isinstance(loss, Mapping) else {"": loss}
    if not terms:
        raise ValueError("the loss is an empty dict; give a scalar tensor or a dict of named scalar tensors")
    for name, value in terms.items():
        what = f"loss term {name!r}" if name else "loss"
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"the {what} must be a scalar, got a tensor of shape {tuple(value.shape)}; reduce it first, with .mean() for instance")
        elif isinstance(value, bool) or not isinstance(value, Real):
            got = type(value).__name__
            raise ValueError(f"the {what} must be a scalar tensor, a float or a dict of them, got {got}; pass the loss that was backpropagated")
    return terms


def evaluation(loss: Tensor | float, accuracy: Tensor | float | None, train_accuracy: Tensor | float | None) -> Tensor:
    """An evaluation's three numbers in one tensor, on the device where they are; NaN for what is not told. ``ValueError`` for what is no scalar."""
    if isinstance(loss, Mapping):
        raise ValueError("the validation loss must be one scalar, got a dict; give the sum that you select checkpoints by")
    given: list[Tensor | float] = []
    for name, value in (("validation loss", loss), ("accuracy", accuracy), ("train_accuracy", train_accuracy)):
        given.append(math.nan if value is None else check_loss({name: value})[name])
    device = next((v.device for v in given if isinstance(v, Tensor) and v.device.type != "cpu"), torch.device("cpu"))
    with torch.no_grad():
        cells = torch.empty(len(given), dtype=torch.float32, device=device)
        for cell, value in zip(cells, given, strict=True):
            cell.copy_(value.detach().reshape(()), non_blocking=True) if isinstance(value, Tensor) else cell.fill_(float(value))
    return cells


class Pulses:
    """Blocks of steps on their way. Columns: finiteness of up to two leaves of the batch, then the loss's terms."""

    def __init__(self, handover: Handover, rows: int) -> None:
        self._handover, self._rows = handover, rows
        self._pulse: Pulse | None = None
        self._names: tuple[str, ...] = ()
        self._first = 0
        self._batch: Any = None
        self._looked: list[int] = []  # how many leaves were looked at in each step of the block
        self._printed: list[bool] = []  # whether the first column of each step tells its batch from others
        self._sizes: list[float] = []  # how many samples the batch of each step had
        self._size = math.nan  # of the coming step's
        self._prints = Fingerprints()
        self._no_grad = torch.no_grad()
        self._host: Any = None  # the block as numpy where it lies in host memory

    def show(self, batch: Any, *, handed: bool = False) -> None:
        """The coming step's batch; its float tensors are summed when the step ends. handed: by a loader, so that it should be new."""
        inputs = batch[0]
        self._batch, self._size = batch, inputs.shape[0] if type(inputs) is Tensor and inputs.dim() else samples(inputs)
        self._prints.show(inputs, handed=handed)

    def quick(self, loss: object) -> bool:
        """A plain step's loss, where the block is under way and takes a scalar tensor: one copy. False if nothing was
        written: the block is at its end, the loss is of another kind, or it is not finite."""
        pulse = self._pulse
        if pulse is None or self._names != PLAIN or type(loss) is not Tensor or loss.dim() or not 0 < pulse.filled < pulse.rows - 1:
            return False
        row, host = pulse.filled, self._host
        value = None if host is None or loss.dtype is not torch.float32 else host_view(loss)
        if host is None or value is None:
            pulse.put(MAX_LEAVES, loss.detach())
        else:
            host[row, MAX_LEAVES] = value
        if host is not None and not math.isfinite(host.item(row, MAX_LEAVES)):
            return False
        self._looked.append(0)
        self._printed.append(False)
        self._sizes.append(self._size)
        if self._batch is not None:
            if host is None or self._prints.leaf is not None:
                self._see_batch(pulse, look=host is None)
            self._batch, self._size = None, math.nan
        pulse.filled = row + 1
        return True

    def write(self, step: int, terms: Mapping[str, Tensor | float]) -> bool:
        """One step's numbers. True if they lie in host memory already and one is not finite."""
        pulse = self._ready(step, terms)
        row = pulse.filled
        with self._no_grad:
            for k, value in enumerate(terms.values(), MAX_LEAVES):
                pulse.put(k, value.reshape(()) if isinstance(value, Tensor) and value.dim() else value)
            sick = self._host is not None and not all(map(math.isfinite, self._host[row, MAX_LEAVES:].tolist()))
            if self._batch is not None:
                self._see_batch(pulse, look=sick or self._host is None)  # where the loss is at hand, a finite one clears its batch
        pulse.advance()
        return sick

    def _see_batch(self, pulse: Pulse, *, look: bool) -> None:
        """What the batch of the current row tells: whether it is finite, and which it is."""
        if look:
            self._looked[-1] = self._look(pulse)
        row = pulse.filled
        self._printed[-1] = self._prints.write(pulse.cells[row][0], None if self._host is None else self._host[row], self._looked[-1])
        self._batch, self._size = None, math.nan

    def _look(self, pulse: Pulse) -> int:
        """Sums of the batch's leaves into the current row; returns how many were looked at."""
        looked = 0
        for _, leaf in zip(range(MAX_LEAVES), float_tensors(self._batch), strict=False):
            looked += self._look_at(looked, leaf, pulse)
        return looked

    def send(self) -> None:
        """Hand the block over, complete or not, and start the next."""
        if self._pulse is not None and self._pulse.filled:
            filled = self._pulse.filled
            meaning = "pulse", self._first, self._looked, self._names, self._printed, self._sizes
            self._handover.send(self._first + filled - 1, self._pulse.block[:filled], meaning)
            self._pulse.clear()
            self._looked, self._printed, self._sizes = [], [], []

    @property
    def full(self) -> bool:
        """The block must be sent before the next step."""
        return self._pulse is not None and self._pulse.full

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return 0 if self._pulse is None else self._pulse.nbytes

    def _ready(self, step: int, terms: Mapping[str, Tensor | float]) -> Pulse:
        names = tuple(terms)
        if self._pulse is None or names != self._names:
            self.send()
            device = next((v.device for v in terms.values() if isinstance(v, Tensor)), torch.device("cpu"))
            self._pulse, self._names = Pulse(self._rows, MAX_LEAVES + len(names), device), names
            self._host = host_view(self._pulse.block)
        if self._pulse.full:
            self.send()
        if not self._pulse.filled:
            self._first = step
        self._looked.append(0)
        self._printed.append(False)
        self._sizes.append(self._size)
        return self._pulse

    def _look_at(self, column: int, leaf: Tensor, pulse: Pulse) -> int:
        """The sum of a leaf shows whether it is finite. Returns how many columns were used."""
        cell = pulse.cells[pulse.filled][column]
        if leaf.device == cell.device:
            torch.sum(leaf.detach(), dim=tuple(range(leaf.dim())), dtype=torch.float32, out=cell)
            return 1
        host = host_view(leaf) if leaf.numel() <= MAX_CHECKED else None
        if host is None:
            return 0
        cell.fill_(float(host.sum()))
        return 1
