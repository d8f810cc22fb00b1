"""Puts everything back as it was: weights, buffers, gradients, modes, random states, loaders. Objects flow in, none out.

Before the checks, the contents of all tensors of the model, the criterion and the optimizers are copied to the CPU, and a
walk through the Python objects at hand (loader, samplers, datasets, what closures hold) keeps a shallow copy of each one's
attributes, small containers and random generators. Afterwards all is written back, bit for bit, also when a check raised.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOST_OBJECTS = 20_000  # objects walked at most: some 10 us each
LARGEST = 10_000  # elements of a list, dict or set that is looked into; larger ones are data, not state
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, Tensor, np.ndarray, BuiltinFunctionType, torch.dtype, torch.device)


class Keeper:
    """Remembers at construction, restores on :meth:`restore`.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.weight.item()
    >>> keeper = Keeper([layer])
    >>> _ = layer.weight.data.fill_(9.0)
    >>> keeper.restore()
    >>> layer.weight.item() == before
    True
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        roots = list(roots)
        self._random = _random_states()
        self._generators: list[Callable[[], Any]] = []
        self._shapes: list[tuple[Any, Any]] = []  # object -> shallow copy of its attributes or elements
        self._loaders: list[tuple[Any, Any]] = []
        self._tensors = [_Kept(t) for t in _tensors(roots)]
        self._walk(roots)

    def restore(self) -> None:
        """Write back whatever differs; a part that cannot be written back does not keep the others from it."""
        steps: list[Callable[[], Any]] = [partial(_put_back, thing, shape) for thing, shape in reversed(self._shapes)]
        steps += [kept.restore for kept in self._tensors]
        steps += [partial(loader.load_state_dict, state) for loader, state in self._loaders]
        steps += [*self._generators, partial(_set_random_states, self._random)]
        faults = []
        for step in steps:
            try:
                step()
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
        if faults:
            warnings.warn(f"preflight could not put back {len(faults)} of {len(steps)} parts: {faults[0]}", RuntimeWarning, stacklevel=3)

    def _walk(self, roots: list[Any]) -> None:
        seen: set[int] = set()
        queue = deque(roots)
        while queue and len(seen) < MOST_OBJECTS:
            thing = queue.popleft()
            if id(thing) in seen or isinstance(thing, PLAIN):
                continue
            seen.add(id(thing))
            put = _generator(thing)
            if put is not None:
                self._generators.append(put)
                continue
            if not isinstance(thing, (nn.Module, Optimizer)) and callable(getattr(type(thing), "load_state_dict", None)):
                with contextlib.suppress(Exception):  # a wrapper may have the methods and nothing behind them: then there is no state to put back
                    self._loaders.append((thing, copy.deepcopy(thing.state_dict())))
            children = list(_children(thing))
            shape = _shape(thing)
            if shape is not None:
                self._shapes.append((thing, shape))
            queue.extend(children)


class _Kept:
    """The bits of one tensor, its gradient and its flag."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.needs = tensor, tensor.requires_grad
        self.data = tensor.detach().to("cpu", copy=True)
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_data = None if self.grad is None else self.grad.detach().to("cpu", copy=True)

    def restore(self) -> None:
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.needs)
            self.tensor.grad = self.grad
        if self.tensor.shape == self.data.shape:
            self.tensor.data.copy_(self.data)  # through .data: a graph that the user still holds stays valid
        else:
            self.tensor.data = self.data.to(self.tensor.device)
        if self.grad is not None and self.grad_data is not None:
            self.grad.data.copy_(self.grad_data)


def _tensors(roots: Iterable[Any]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for root in roots:
        found: list[Any] = []
        if isinstance(root, nn.Module):
            found = [*root.parameters(), *root.buffers()]
        elif isinstance(root, Optimizer):
            found = [v for state in root.state.values() for v in (state.values() if isinstance(state, dict) else ())]
        for t in found:
            if isinstance(t, Tensor) and id(t) not in seen and not nn.parameter.is_lazy(t) and t.device.type != "meta":
                seen.add(id(t))
                yield t


def _children(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        if len(thing) <= LARGEST:
            yield from thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        if len(thing) <= LARGEST:
            yield from thing
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
        yield from thing.__defaults__ or ()
    elif isinstance(thing, MethodType):
        yield thing.__self__
        yield thing.__func__
    elif hasattr(thing, "func") and hasattr(thing, "keywords"):  # functools.partial
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(getattr(thing, "__dict__", None), dict):
        yield from vars(thing).values()


def _shape(thing: Any) -> Any:
    """A shallow copy of what may change in an object, None if nothing may."""
    if isinstance(thing, CONTAINERS):
        return copy.copy(thing) if len(thing) <= LARGEST else None
    if isinstance(getattr(thing, "__dict__", None), dict) and not isinstance(thing, FunctionType):
        return dict(vars(thing))
    return None


def _put_back(thing: Any, shape: Any) -> None:
    if isinstance(thing, CONTAINERS):
        if not _same(thing, shape):
            thing.clear()
            thing.extend(shape) if isinstance(thing, (list, deque)) else thing.update(shape)
    elif not _same(vars(thing), shape):
        vars(thing).clear()
        vars(thing).update(shape)


def _same(now: Any, then: Any) -> bool:
    """Equal by identity of the elements: no comparison of the user's values takes place."""
    if len(now) != len(then):
        return False
    if isinstance(now, dict):
        return all((a is b or (isinstance(a, str) and a == b)) and now[a] is then[b] for a, b in zip(now, then))
    if isinstance(now, set):
        return {id(x) for x in now} == {id(x) for x in then}
    return all(a is b for a, b in zip(now, then))


def _generator(thing: Any) -> Callable[[], Any] | None:
    """How to put a random generator back, None for anything else."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state().clone()
        return lambda: thing.set_state(state)
    if isinstance(thing, np.random.Generator):
        bits = copy.deepcopy(thing.bit_generator.state)
        return lambda: setattr(thing.bit_generator, "state", bits)
    if isinstance(thing, np.random.RandomState):
        old = thing.get_state()
        return lambda: thing.set_state(old)
    if isinstance(thing, random.Random):
        python = thing.getstate()
        return lambda: thing.setstate(python)
    return None


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "torch.mps" in sys.modules and torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])
