"""How an update is left out: by the optimizer itself (``FoundInf``), or by putting back what it changed (``PutBack``).

Both are exact. A flag of exactly 0.0 or 1.0 flows in, on the device; weights and state stay or become as they were. Never reads a value.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class Means(Protocol):
    """One way of leaving an update out."""

    @property
    def nbytes(self) -> int:
        """Device bytes held."""

    def arm(self, flag: Tensor) -> None:
        """The verdict will stand in this tensor."""

    def before(self, *, closure: bool) -> Tensor | None:
        """The optimizer is about to step. Gives the flag of somebody else (a loss scaler) who leaves this update out or not."""

    def after(self) -> None:
        """The optimizer stepped."""

    def disarm(self) -> None:
        """As if nobody had been here."""


_flags: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # those of guards


class FoundInf:
    """``optimizer.found_inf``, which torch's fused optimizers honour without the host: nothing is written at all."""

    nbytes = 0

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Any = optimizer
        self._flag = torch.zeros(())
        self._theirs: Tensor | None = None
        self._filled = 0

    def arm(self, flag: Tensor) -> None:
        """Put the flag in its place, unless somebody else's is there."""
        there = getattr(self.optimizer, "found_inf", None)
        if there is None or _flags.get(id(there)) is there:  # another guard's asks again at the step, as ours does
            self.optimizer.found_inf = flag
        _flags[id(flag)] = flag
        self._flag = flag

    def before(self, *, closure: bool) -> Tensor | None:
        """A GradScaler puts its own flag in place just before the step: either flag skips. It counts devices, so any number but 0 is a yes."""
        self._fill_momentum(closure)
        theirs = self._theirs = getattr(self.optimizer, "found_inf", None)
        if theirs is None or theirs is self._flag:
            self.optimizer.found_inf, self._theirs = self._flag, None
            return None
        said: Tensor = (theirs != 0).to(self._flag.device, self._flag.dtype, non_blocking=True)
        self.optimizer.found_inf = torch.maximum(said, self._flag)
        return said

    def after(self) -> None:
        """What was somebody else's is theirs again."""
        if self._theirs is not None:
            self.optimizer.found_inf, self._theirs = self._theirs, None

    def disarm(self) -> None:
        """The optimizer steps as if nobody had watched."""
        if getattr(self.optimizer, "found_inf", None) is self._flag:
            del self.optimizer.found_inf

    def _fill_momentum(self, closure: bool) -> None:
        """SGD whose first step is skipped would keep uninitialised momentum: zeros first (with dampening 0 the result is the same)."""
        if not isinstance(self.optimizer, torch.optim.SGD):
            return
        groups, state = [group for group in self.optimizer.param_groups if group["momentum"]], self.optimizer.state
        if sum(len(group["params"]) for group in groups) == self._filled == len(state):
            return
        for p in (p for group in groups for p in group["params"] if closure or p.grad is not None):
            if state[p].get("momentum_buffer") is None:
                state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._filled = len(state)


class CannotPutBack(RuntimeError):
    """An update changed something that is no tensor, so that it cannot be undone."""


class PutBack:
    """Copies weights and tensor state before the update, and selects between old and new behind it; costs that memory.

    State that is born in an update that is left out becomes what it begins as: torch's optimizers are asked to make it before
    the update, that of others begins at zero (``lossguard.rehearsal`` refuses those where that is not the same).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._flag = torch.zeros(())
        self._old: dict[Any, Tensor] = {}
        self._numbers: dict[Any, float] = {}
        self._known: set[Any] = set()

    @property
    def nbytes(self) -> int:
        """Device bytes held: the weights and the optimizer's state once more."""
        return sum(t.numel() * t.element_size() for t in self._old.values())

    def arm(self, flag: Tensor) -> None:
        """The verdict will stand in this tensor."""
        self._flag = flag

    def before(self, *, closure: bool) -> Tensor | None:
        """Copy what the update may change."""
        begin(self.optimizer, closure=closure)
        tensors, self._numbers = held(self.optimizer)
        self._known = set(tensors)
        for path, t in tensors.items():
            if path[0] == "state" and t.device.type == "cpu" != self._flag.device.type:
                raise CannotPutBack(f"it keeps {path[-1]!r} on the host, which cannot know of a skip in time")
            old = self._old.get(path)
            if old is None or old.shape != t.shape or old.dtype != t.dtype or old.device != t.device:
                self._old[path] = torch.empty_like(t)
        for path in [path for path in self._old if path not in tensors]:
            del self._old[path]
        if tensors:
            torch._foreach_copy_([self._old[path] for path in tensors], list(tensors.values()))
        return None

    def after(self) -> None:
        """Where the flag is up, what was copied comes back."""
        tensors, numbers = held(self.optimizer)
        bad = self._flag != 0
        for path, t in tensors.items():
            mask = bad if t.device == bad.device else bad.to(t.device, non_blocking=True)
            old = self._old.get(path) if path in self._known else None
            if old is None:
                t.masked_fill_(mask, 0)
            elif old.shape != t.shape or old.dtype != t.dtype:
                raise CannotPutBack(f"its state changed shape or dtype, from {tuple(old.shape)} to {tuple(t.shape)}")
            else:
                torch.where(mask, old, t, out=t)
        moved = next((path for path, n in self._numbers.items() if numbers.get(path, n) != n), None)
        if moved is not None:
            raise CannotPutBack(f"it counts on the host: {moved[-1]!r} went from {self._numbers[moved]} to {numbers[moved]}")
        if self._known - tensors.keys():
            raise CannotPutBack("it removed a part of its state")

    def disarm(self) -> None:
        """Give the memory back."""
        self._old.clear()


def held(optimizer: Optimizer) -> tuple[dict[Any, Tensor], dict[Any, float]]:
    """All tensors that an optimizer may change, this rank's part of sharded ones, and all host numbers, by their place."""
    tensors: dict[Any, Tensor] = {}
    numbers: dict[Any, float] = {}
    for i, group in enumerate(optimizer.param_groups):
        tensors.update({("weights", i, k): local(p.detach()) for k, p in enumerate(group["params"])})
        for key, value in group.items():
            if key != "params":
                _walk(value, ("group", i, key), tensors, numbers)
    for p, state in optimizer.state.items():
        _walk(state, ("state", id(p)), tensors, numbers)
    return tensors, numbers


def begin(optimizer: Optimizer, *, closure: bool) -> None:
    """Let one of torch's optimizers make the state that it would make in the coming step. closure: gradients come later, take all parameters."""
    make = getattr(optimizer, "_init_group", None)
    if make is None or not type(optimizer).__module__.startswith("torch.optim"):
        return
    lists = _lists(make)
    for group in optimizer.param_groups:
        new = [p for p in group["params"] if not optimizer.state.get(p)]
        if closure:
            empty = [p for p in new if p.grad is None and p.requires_grad]
        else:
            new, empty = [p for p in new if p.grad is not None], []
        if not new:
            continue
        for p in empty:
            p.grad = p.detach()  # costs no memory; the optimizer asks only whether there is one
        try:
            make({**group, "params": new}, *([] for _ in range(lists)))
        finally:
            for p in empty:
                p.grad = None


def local(t: Tensor) -> Tensor:
    """The tensor itself, or of a sharded one this rank's part."""
    part: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return part


def _lists(make: Any) -> int:
    """How many lists torch's ``_init_group`` fills beside the group."""
    kinds = [p for p in inspect.signature(make).parameters.values() if p.default is inspect.Parameter.empty]
    return len(kinds) - 1


def _walk(value: Any, path: tuple[Any, ...], tensors: dict[Any, Tensor], numbers: dict[Any, float]) -> None:
    if isinstance(value, Tensor):
        tensors[path] = local(value.detach())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers[path] = value
    else:
        for key, inner in _items(value):
            _walk(inner, (*path, key), tensors, numbers)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from enumerate(value)
