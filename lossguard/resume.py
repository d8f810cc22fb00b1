"""State as tensors and plain types, so that ``torch.load(weights_only=True)`` reads it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch


def pack(value: Any) -> Any:
    """Numpy arrays and scalars to tensors and numbers, through nested containers.

    >>> unpack(pack({"a": np.arange(2), "b": (1, "x")}))
    {'a': array([0, 1]), 'b': (1, 'x')}
    """
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: pack(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pack(v) for v in value)
    return value


def unpack(value: Any) -> Any:
    """The inverse of :func:`pack`."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, dict):
        return {k: unpack(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unpack(v) for v in value)
    return value


class Resumable(Protocol):
    """A part of a guard whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Numpy arrays and plain types."""

    def load_state_dict(self, state: Any) -> None:
        """Take over what :meth:`state_dict` gave."""


def states(parts: Mapping[str, Resumable]) -> dict[str, Any]:
    """Each part's state under its name, packed."""
    return {name: pack(part.state_dict()) for name, part in parts.items()}


def restore(parts: Mapping[str, Resumable], state: Mapping[str, Any]) -> None:
    """The inverse of :func:`states`; a part that an older checkpoint lacks starts anew."""
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(unpack(state[name]))
