"""A copy of a training state in memory, and the way back to it, bit for bit. Never reads a value, never waits on its own.

A model, optimizers, a loss scaler and whatever else has a ``state_dict`` flow in; the same objects flow out as they were:
every tensor is written back in place, so graphs, views and references stay. Copies on the host are enqueued behind the step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard import aftermath
from lossguard.soundness import local

SCALER = ("_scale", "_growth_tracker", "_growth_factor", "_backoff_factor", "_growth_interval")  # of a GradScaler: device tensors, where it has begun
PLACES = ("host", "device")


@dataclass
class State:
    """What a snapshot holds. also: objects with ``state_dict`` and ``load_state_dict`` (schedulers, averaged weights)."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    scaler: Any = None
    also: Sequence[Any] = ()


@dataclass
class Snapshot:
    """The state after ``step`` steps. own: the guard's own part."""

    step: int
    own: dict[str, Any]
    _held: list[_Copy] = field(default_factory=list)
    _groups: list[list[dict[str, Any]]] = field(default_factory=list)
    _moments: list[dict[Any, Any]] = field(default_factory=list)
    _scaler: dict[str, Any] = field(default_factory=dict)
    _also: list[Any] = field(default_factory=list)
    _random: dict[str, Any] | None = None

    @classmethod
    def take(cls, step: int, state: State, own: dict[str, Any], *, place: str, random: bool, reuse: Snapshot | None = None) -> Snapshot:
        """Copy the state now. place: ``host`` or ``device``. reuse: a snapshot that nobody needs any more, for its memory."""
        self = cls(step, own)
        store = _Store(place, {} if reuse is None else reuse._memory())
        with torch.no_grad():
            self._held = [store.keep(t) for t in _tensors_of(state.model)]
            for optimizer in state.optimizers:
                self._groups.append([{k: store.tree(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
                self._moments.append({p: store.tree(s) for p, s in optimizer.state.items()})
            if state.scaler is not None:
                self._scaler = {name: store.tree(vars(state.scaler)[name]) for name in SCALER if name in vars(state.scaler)}
            self._also = [store.detached(thing.state_dict()) for thing in state.also]
        self._random = aftermath.random_states() if random else None
        return self

    def put_back(self, state: State) -> None:
        """Write the state back. Gradients are zero then: those that lie there are of a state that is gone."""
        with torch.no_grad():
            for one in self._held:
                one.back()
            for p in state.model.parameters():
                if p.grad is not None:
                    p.grad = None if p.grad.layout != torch.strided else p.grad.zero_()
            for optimizer, groups, moments in zip(state.optimizers, self._groups, self._moments, strict=True):
                for group, kept in zip(optimizer.param_groups, groups, strict=False):
                    group.update({k: _back(v) for k, v in kept.items()})
                for holder in [h for h in optimizer.state if h not in moments]:
                    del optimizer.state[holder]
                for holder, state_then in moments.items():
                    _fill(optimizer.state, holder, _back(state_then))
            for name, value in self._scaler.items():
                setattr(state.scaler, name, _back(value))
        for thing, its_state in zip(state.also, self._also, strict=True):
            thing.load_state_dict(copy.deepcopy(its_state))
        if self._random is not None:
            aftermath.set_random_states(self._random)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(t.numel() * t.element_size() for t in self._copies())

    def _copies(self) -> Iterator[Tensor]:
        yield from _leaves([self._held, self._groups, [list(m.values()) for m in self._moments], self._scaler, self._also])

    def _memory(self) -> dict[Any, list[Tensor]]:
        found: dict[Any, list[Tensor]] = {}
        for t in self._copies():
            found.setdefault(_kind(t, t.device), []).append(t)
        self._held, self._groups, self._moments, self._scaler, self._also = [], [], [], {}, []
        return found


@dataclass
class _Copy:
    """A tensor and what it held: the tensor itself stays the same object."""

    tensor: Tensor
    held: Tensor

    def back(self) -> Tensor:
        local(self.tensor.detach()).copy_(self.held, non_blocking=True)
        return self.tensor


class _Store:
    """Makes copies, in used memory where it fits."""

    def __init__(self, place: str, spare: dict[Any, list[Tensor]]) -> None:
        self._place, self._spare = place, spare

    def keep(self, tensor: Tensor) -> _Copy:
        return _Copy(tensor, self._copy(local(tensor.detach())))

    def tree(self, value: Any) -> Any:
        """A nested value with its tensors kept; what is neither a container nor a tensor is copied."""
        if isinstance(value, Tensor):
            return self.keep(value)
        if isinstance(value, dict):
            return _Tree(type(value), {k: self.tree(v) for k, v in value.items()})
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return _Tree(type(value), [self.tree(v) for v in value])
        return copy.deepcopy(value)

    def detached(self, value: Any) -> Any:
        """A nested value with its tensors copied: it is loaded, not written back in place."""
        if isinstance(value, Tensor):
            return self._copy(local(value.detach()))
        if isinstance(value, dict):
            return {k: self.detached(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.detached(v) for v in value)
        return copy.deepcopy(value)

    def _copy(self, tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if self._place == "host" and tensor.device.type != "meta" else tensor.device
        if tensor.layout != torch.strided:
            return tensor.clone()
        spare = self._spare.get(_kind(tensor, device))
        pinned = device.type == "cpu" and tensor.device.type == "cuda"
        held = spare.pop() if spare else torch.empty_like(tensor, device=device, pin_memory=pinned)
        return held.copy_(tensor, non_blocking=True)


@dataclass
class _Tree:
    kind: type
    parts: Any


def _back(value: Any) -> Any:
    """A nested value as it was, in the tensors that it was in."""
    if isinstance(value, _Copy):
        return value.back()
    if isinstance(value, _Tree):
        if isinstance(value.parts, dict):
            return {k: _back(v) for k, v in value.parts.items()}  # torch's own states are plain dicts
        return value.kind(_back(v) for v in value.parts)
    return copy.deepcopy(value)


def _fill(states: Any, holder: Any, value: Any) -> None:
    """In the dict that is there, which others may hold."""
    if isinstance(states.get(holder), dict) and isinstance(value, dict):
        states[holder].clear()
        states[holder].update(value)
    else:
        states[holder] = value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, _Copy):
        yield value.held
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Tree):
        yield from _leaves(value.parts)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _kind(tensor: Tensor, device: torch.device) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, device


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and all buffers, also those that are not saved: they are part of what the next step sees."""
    for p in model.parameters():
        if not nn.parameter.is_lazy(p):
            yield p
    yield from (b for b in model.buffers() if not nn.parameter.is_lazy(b))
