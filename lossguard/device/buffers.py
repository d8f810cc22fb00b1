"""What the forward pass of a bad batch writes: running statistics and other buffers, put back with the update. Never reads a value.

A batch with a NaN would leave the running mean of a batch-norm NaN for good, though no weight was touched. Buffers are kept as they
were after the last update, and where the next update is left out they become that again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 2**20  # elements of a buffer that is kept; our own choice: statistics and queues fit, tables and masks, which do not change, cost nothing
EVERY = 100  # updates between two searches for buffers that are new; our own choice, a search walks through the whole model


@dataclass
class _Kept:
    """Buffers of one dtype on one device, end to end."""

    live: list[Tensor] = field(default_factory=list)
    flat: Tensor = field(default_factory=lambda: torch.empty(0))

    def look(self) -> Tensor:
        return torch.cat([t.reshape(-1) for t in self.live])

    def write(self) -> None:
        parts = torch.split(self.flat, [t.numel() for t in self.live])
        torch._foreach_copy_(self.live, [part.view(t.shape) for part, t in zip(parts, self.live, strict=True)])


class Buffers:
    """The model's buffers, as they were after the last update."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[str, nn.Module, str]] = []  # name, module, its own name for the buffer
        self._looks = 0
        self._kept: dict[tuple[torch.device, torch.dtype], _Kept] = {}
        self._updated = True  # since the last look: what changes buffers behind an update belongs to it
        self.large: list[str] = []  # not kept

    def begin(self) -> None:
        """A new step of the run starts: what was done to buffers after the update, such as an average of weights, stays."""
        if self._updated:
            self._updated = False
            if self._looks % EVERY == 0:
                self._places = [(f"{path}.{key}".lstrip("."), m, key) for path, m in self._model.named_modules() for key in m._buffers]
            self._looks += 1
            self._keep()

    def _keep(self) -> None:
        for key, group in self._groups().items():
            group.flat = group.look()
            self._kept[key] = group

    def after(self, flag: Tensor) -> None:
        """An update is over; where it was left out, buffers are what they were before its batches."""
        self._updated = True
        bad = flag != 0
        for key, group in self._groups().items():
            old = self._kept.get(key)
            if old is None or [t.shape for t in old.live] != [t.shape for t in group.live] or key[0].type != flag.device.type:
                continue  # buffers came or went: kept anew by the next step
            mask = bad if key[0] == flag.device else bad.to(key[0], non_blocking=True)
            group.flat = torch.where(mask, old.flat, group.look())
            group.write()
            self._kept[key] = group

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(group.flat.numel() * group.flat.element_size() for group in self._kept.values())

    def _groups(self) -> dict[Any, _Kept]:
        groups: dict[Any, _Kept] = {}
        self.large = []
        seen: set[int] = set()
        for name, module, key in self._places:
            buffer = module._buffers.get(key)
            if buffer is None or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            if buffer.layout != torch.strided or buffer.is_quantized or not buffer.numel() or not buffer.is_contiguous() or hasattr(buffer, "to_local"):
                continue
            if buffer.numel() > LARGEST:
                self.large.append(name)
                continue
            # .data: what was saved for a backward pass to come is not called changed, for it is not, unless the update was left out
            groups.setdefault((buffer.device, buffer.dtype), _Kept()).live.append(buffer.data)
        return groups
