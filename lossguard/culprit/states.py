"""What stands in a tensor: is it finite, its range, where its first bad element is. Tensors flow in, plain numbers flow out.

Reads values, so nothing here may be used while recording; it serves the search after a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossguard.findings import number


@dataclass(frozen=True)
class State:
    """Which kinds of non-finite values a tensor holds."""

    nan: bool = False
    plus: bool = False
    minus: bool = False

    @property
    def sick(self) -> bool:
        """Whether any value is not finite."""
        return self.nan or self.plus or self.minus


FINE = State()


@dataclass(frozen=True)
class Range:
    """The finite values of one argument: smallest, largest, and the smallest magnitude.

    >>> print(range_of("self", torch.tensor([0.0, 2.0])))
    self float32[2] in [0, 2]
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    least: float

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.name} {self.dtype}[{shape}] in [{number(self.low)}, {number(self.high)}]"


def readable(tensor: Any) -> bool:
    """Whether a thing is a dense tensor of floats whose values lie somewhere."""
    return (
        isinstance(tensor, Tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and tensor.device.type != "meta"
        and tensor.layout == torch.strided
        and tensor.numel() > 0
        and torch._C._has_storage(tensor)
    )


def state_of(tensor: Tensor) -> State:
    """Which non-finite values a readable tensor holds.

    >>> state_of(torch.tensor([1.0, float("-inf")]))
    State(nan=False, plus=False, minus=True)
    """
    with torch.no_grad():
        values = _plain(tensor)
        if bool(torch.isfinite(values).all()):
            return FINE
        return State(bool(torch.isnan(values).any()), bool((values == torch.inf).any()), bool((values == -torch.inf).any()))


def range_of(name: str, tensor: Tensor) -> Range | None:
    """The range of the finite values; None where there are none."""
    with torch.no_grad():
        values = _plain(tensor)
        low, high = (x.item() for x in torch.aminmax(values))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):  # NaN too
            values = values[torch.isfinite(values)]
            if not values.numel():
                return None
            low, high = (x.item() for x in torch.aminmax(values))
        least = min(abs(low), abs(high)) if low > 0 or high < 0 else float(values.abs().amin())
        return Range(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), low + 0.0, high + 0.0, float(least))  # no -0


def sick_elements(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """How many elements are NaN, how many infinite, and the index of the first of either."""
    with torch.no_grad():
        values = tensor.detach()
        if values.dtype.itemsize == 1:
            values = values.float()
        bad = ~torch.isfinite(values)
        first = tuple(int(i) for i in torch.nonzero(bad)[0])
        nans = int(torch.isnan(values).sum())
        return nans, int(bad.sum()) - nans, first


def key_of(tensor: Tensor) -> int:
    """The same number for all tensors that share their memory, as long as something of it is referred to."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested lists, tuples and dicts with a name such as ``batch[0]['x']``."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth < 6 and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{name}[{i}]", depth + 1)
    elif depth < 6 and isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}[{key!r}]", depth + 1)


def _plain(tensor: Tensor) -> Tensor:
    """The values in a type that comparisons know: parts of complex numbers, float32 for 8-bit floats."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj().resolve_neg())
    return values.float() if values.dtype.itemsize == 1 else values
