"""Keeps a preflight to its own process and its own time. A model flows in; what would wait for other processes is replaced or refused.

Only one process may call a preflight, so nothing of it may wait for the others: batch-norm layers that share their statistics use their own,
and every collective operation raises. Every pass asks the clock first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVE = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # namespaces of torch's operations between processes
REFUSED = "it waits for other processes ({}), which a preflight does not do: a preflight runs in one of them alone"


class OutOfTime(BaseException):
    """The time budget is used up. No ``Exception``, so that no check takes it for a fault of the model."""


class Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises in the place of each operation between processes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Called by torch in the place of every operation."""
        if getattr(func, "namespace", "") in COLLECTIVE:
            raise RuntimeError(REFUSED.format(func.__name__.partition(".")[0].strip("_")))
        return func(*args, **(kwargs or {}))


def alone() -> AbstractContextManager[Any]:
    """Refuses collective operations where processes are joined; does nothing, and costs nothing, elsewhere."""
    joined = dist.is_available() and dist.is_initialized()
    return Alone() if joined else nullcontext()  # type: ignore[no-untyped-call]


class OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What a ``SyncBatchNorm`` is for a while: the same layer with the statistics of its own process."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions, as in ``SyncBatchNorm``."""


def groups(model: Any) -> dict[int, Any]:
    """For ``copy.deepcopy``: process groups are shared by copies, since they cannot be copied."""
    found = (m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)) if isinstance(model, nn.Module) else ()
    return {id(m.process_group): m.process_group for m in found if m.process_group is not None}


@contextmanager
def unsynchronised(model: Any) -> Iterator[None]:
    """The model's synchronised batch-norm layers use their own statistics until the end."""
    layers = [m for m in model.modules() if type(m) is nn.SyncBatchNorm] if isinstance(model, nn.Module) else []
    for layer in layers:
        layer.__class__ = OwnBatchNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.SyncBatchNorm
