"""A loader whose batches the guard sees on their way. Batches pass through untouched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

TARGETS = ("labels", "label", "targets", "target", "y")  # keys under which a dict of a batch holds its targets


class _Shown(Protocol):
    @property
    def history(self) -> Any: ...
    def _show(self, inputs: Any, targets: Any, *, handed: bool) -> None: ...


def split(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch: the first two of a tuple or list, a dict and its labels, else all of it and None.

    >>> split((1, 2)), split({"x": 1, "labels": 2}), split(3)
    ((1, 2), ({'x': 1, 'labels': 2}, 2), (3, None))
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        batch = batch if isinstance(batch, dict) else dict(batch)  # a tokenizer's batch is a mapping, but no dict
        return batch, next((batch[k] for k in TARGETS if k in batch), None)
    return batch, None


class Batches:
    """Iterates like the loader, as often as the loader allows."""

    def __init__(self, guard: _Shown, loader: Iterable[Any]) -> None:
        self._guard, self._loader = guard, loader

    def __iter__(self) -> Iterator[Any]:
        self._guard.history.notes["loader_workers"] = getattr(self._loader, "num_workers", None)
        self._guard.history.notes["loader_batches"] = _length(self._loader)
        for batch in self._loader:
            self._guard._show(*split(batch), handed=True)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches a pass has; None where the loader cannot say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
