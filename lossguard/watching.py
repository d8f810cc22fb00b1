"""Which guards watch in this process: one a model, closed at the latest when the interpreter ends. Holds them weakly."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from typing import Protocol

from torch import nn

PATIENCE = 2.0  # seconds to wait for the device when the process ends; our own choice, because launchers kill after 10 to 30


class Watcher(Protocol):
    """What is known of a guard here."""

    closed: bool

    def close(self, *, patience: float | None = None) -> None:
        """Flush and detach; ``patience``: seconds to wait for the device at most."""

    def settle(self, *, patience: float | None = None) -> None:
        """Flush; a halt waits for the next step."""

    def note(self, event: str) -> None:
        """A line in the record."""


_watching: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Watcher], int]] = weakref.WeakKeyDictionary()


def take_over(model: nn.Module, guard: Watcher) -> None:
    """One guard a model: a second one (a notebook cell run again) closes the first."""
    old = watcher(model)
    if old is not None and not old.closed:
        message = "this model was watched by another Guard, which is closed now; use one Guard for each model, or close() the old one first"
        warnings.warn(message, UserWarning, stacklevel=4)
        old.close()
    _watching[model] = weakref.ref(guard), os.getpid()


def release(model: nn.Module, guard: Watcher) -> None:
    """This guard watches no more."""
    if watcher(model) is guard:
        del _watching[model]


def watcher(model: nn.Module) -> Watcher | None:
    """The guard that watches a model now."""
    held = _watching.get(model)
    return held[0]() if held is not None else None


def guards() -> list[Watcher]:
    """The guards that are open in this process; those of a parent, inherited by a fork, are not ours to end."""
    alive = [held[0]() for held in list(_watching.values()) if held[1] == os.getpid()]
    return [guard for guard in alive if guard is not None and not guard.closed]


@atexit.register
def close_all() -> None:
    """The interpreter ends: what is still open is flushed, as far as the device answers, and closed."""
    for guard in guards():
        try:
            guard.close(patience=PATIENCE)
        except Exception as error:
            warnings.warn(f"lossguard: a guard could not be closed at exit ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2)
