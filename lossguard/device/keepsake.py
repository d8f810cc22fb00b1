"""The weights as they were before the first sick step: a copy that the device itself stops renewing. Never reads a value.

Tensors flow in once a step; the copy stays on its devices until somebody asks for it, after a halt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lossguard.device.outputs import float_tensors


class Keepsake:
    """One copy of a model's parameters and buffers, from before the newest step whose loss and weights were sound.

    Costs as much memory as the model, and one selection a tensor and step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"]
        self._copies = [t.clone() for t in self._tensors]
        self._at = {device: torch.zeros((), dtype=torch.int64, device=device) for device in {t.device for t in self._tensors}}

    def keep(self, step: int, losses: Iterable[Tensor]) -> None:
        """Step ``step`` is over. Where its loss is finite and so are all weights, they become the copy, else the copy stays."""
        with torch.no_grad():
            found = list(losses)
            for device, at in self._at.items():
                sound = self._sound(device, found)
                at.copy_(torch.where(sound, step + 1, at))
                for tensor, copy in zip(self._tensors, self._copies, strict=True):
                    if tensor.device == device:
                        torch.where(sound, tensor, copy, out=copy)

    def _sound(self, device: torch.device, losses: list[Tensor]) -> Tensor:
        """Whether the losses that lie on the device and all weights there are finite: a boolean that stays there."""
        weights = [t for t in float_tensors(self._tensors) if t.device == device and t.numel()]
        numbers = [n.reshape(()).to(torch.float32) for n in torch._foreach_norm(weights, float("inf"))] if weights else []
        numbers += [loss.detach().reshape(()).to(torch.float32) for loss in losses if loss.device == device]
        return torch.isfinite(torch.stack(numbers)).all() if numbers else torch.ones((), dtype=torch.bool, device=device)

    def put_back(self) -> None:
        """The model's tensors become the copy."""
        with torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(copy)

    @property
    def at(self) -> list[Tensor]:
        """The step that the copy comes before, on each device."""
        return list(self._at.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._copies)
