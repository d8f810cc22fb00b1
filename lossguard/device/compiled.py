"""Module calls inside compiled code: what ``torch.compile`` traces of the forward hook, and what that brings. Never reads a value.

Only for guards that ask for it: while Dynamo traces a module, :func:`traced` puts one opaque operation behind its output,
in the variant of the code that sampled steps run; the variant of plain steps holds nothing of it. Two variants are compiled,
once each, however often sampling changes. A compiler that fuses may round otherwise in the sampled variant: hence the asking.
The operation runs Python and hands the output to the listener that watches the module. Blocks of one shape share compiled
code: which of them runs is told by the memory of a parameter that goes along.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOST = 100_000  # module calls numbered in one process; a traced module takes one number
PENDING = 64  # calls of one region that wait for a parameter to say where they are
CRITERION = 0  # the number of every nn.CrossEntropyLoss: it belongs to whoever listens
NOT_WATCHED = -1


class Listener(Protocol):
    """Who takes what modules give inside compiled code."""

    @property
    def known(self) -> Mapping[int, tuple[str, str]]:
        """id of a module watched inside compiled code -> (name, class name); empty where nothing is to be put there."""

    @property
    def anchors(self) -> Mapping[int, Sequence[str]]:
        """Address of a watched module's first parameter -> names of the modules that hold it."""

    def inside(self, name: str, kind: str, given: tuple[Tensor, ...], output: Tensor, graded: bool) -> None:
        """A watched module ended. ``output`` is the listener's own only until it returns."""

    def criterion(self, logits: Tensor, targets: Tensor) -> None:
        """A ``nn.CrossEntropyLoss`` ended."""


class Switch:
    """``on``: some guard samples the current step; compiled code is specialised on it. ``traced``: code was compiled
    in this process while a guard watched. ``forbidden``: the user forbade a second compilation, so nothing was put inside."""

    def __init__(self) -> None:
        self.on = self.traced = self.forbidden = False


@dataclass(frozen=True)
class _Call:
    """A traced module call: in which trace, the how many-th there, and which module was traced."""

    trace: int
    place: int
    name: str
    kind: str


class _Region:
    """One run of one piece of compiled code: where the modules that it was traced with lie now."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.moved = ("", "")  # prefix of the traced names -> prefix of the names they stand for
        self.pending: list[tuple[_Call, tuple[Tensor, ...], Tensor, bool]] = []

    def place(self, call: _Call, listener: Listener, names: Sequence[str]) -> None:
        """One of ``names`` holds the parameter that went along with this call."""
        self.listener = listener
        name = call.name if call.name in names else max(names, key=lambda n: _shared(call.name, n))
        shared = _shared(call.name, name)
        old, new = call.name.split("."), name.split(".")
        self.moved = ".".join(old[: len(old) - shared]), ".".join(new[: len(new) - shared])

    def name(self, call: _Call) -> str | None:
        """Which module this call is of, in the model that runs now."""
        old, new = self.moved
        if old == new:
            return call.name
        return new + call.name[len(old) :] if call.name.startswith(f"{old}.") else None


SWITCH = Switch()
_listeners: dict[int, weakref.ref[Any]] = {}
_calls: list[_Call] = [_Call(0, 0, "", "")]  # by number; 0 is CRITERION
_tracing: list[Any] = [None, 0, 0]  # Dynamo's graph being traced (weak), its number, calls in it so far
_found = [NOT_WATCHED]  # what the newest look at a traced module found
_region = [_Region()]
_token = torch.zeros(1)  # the operation is declared to write here, so that no pass takes it for dead code; it never does


def join(key: int, listener: weakref.ref[Any]) -> None:
    """This listener's modules are looked for while tracing, and given to it."""
    _listeners[key] = listener
    _define()


def leave(key: int) -> None:
    """Forget a listener."""
    _listeners.pop(key, None)


def traced(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Called by the forward hook while Dynamo traces it. Only what Dynamo can trace may stand here."""
    torch._dynamo.comptime.comptime(_look)
    number = _number()
    if number != NOT_WATCHED and module.training and SWITCH.on:
        result = output
        while isinstance(result, (tuple, list)) and len(result) > 0:
            result = result[0]
        anchor = None
        for p in module._parameters.values():
            if p is not None and anchor is None:
                anchor = p.detach()
        given = [x.detach() for x in args if isinstance(x, Tensor)]
        if number == CRITERION:
            torch.ops.lossguard.tap.default(given[0], given[1:], None, _token, number, torch.is_grad_enabled())
        elif isinstance(result, Tensor):
            torch.ops.lossguard.tap.default(result.detach(), given, anchor, _token, number, torch.is_grad_enabled())


# ---- inside


def _look(context: Any) -> None:
    """While tracing: number the module call that is traced just now. Leaves no guard in the code, so that blocks share it."""
    _found[0] = NOT_WATCHED
    try:
        translator = context._ComptimeContext__tx
        module = context.get_local("module")._ComptimeVar__variable.value
        SWITCH.traced = True
        asked = [known for listener in _all() if (known := listener.known)]
        SWITCH.forbidden = asked != [] and getattr(torch._dynamo.config, "error_on_recompile", False) is True
        if SWITCH.forbidden or not asked or not _allowed(translator):
            return
        if type(module) is nn.CrossEntropyLoss:
            _found[0] = CRITERION
            return
        names = next((modules[id(module)] for modules in asked if id(module) in modules), None)
        if names is not None and len(_calls) < MOST:
            _found[0] = len(_calls)
            _calls.append(_Call(*_place(translator.output), *names))
    except Exception:  # another version of Dynamo: nothing is put inside, and the coverage says that nothing was seen
        return


def _allowed(translator: Any) -> bool:
    """Not in an exported program, under vmap or grad, nor in a branch or loop that may have no effects."""
    exporting = getattr(translator, "export", False) is True or (hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting())
    nested = getattr(translator.output.current_tracer, "parent", None) is not None
    return not exporting and not nested and torch._C._functorch.peek_interpreter_stack() is None


def _place(graph: Any) -> tuple[int, int]:
    known = _tracing[0]() if _tracing[0] is not None else None
    if known is not graph:
        _tracing[:] = [weakref.ref(graph), _tracing[1] + 1, 0]
    _tracing[2] += 1
    return _tracing[1], _tracing[2] - 1


def _constant() -> int:
    return _found[0]


_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what assume_constant_result does, without importing Dynamo
_number = _constant


def _all() -> list[Listener]:
    found = [ref() for ref in list(_listeners.values())]
    return [listener for listener in found if listener is not None]


def _ran(output: Tensor, given: list[Tensor], anchor: Tensor | None, token: Tensor, number: int, graded: bool) -> None:
    """The operation, run by compiled code in sampled steps. A recomputation in the backward pass is counted already."""
    if not SWITCH.on or torch._C._current_graph_task_id() != -1:
        return
    if number == CRITERION:
        for listener in _all():
            if listener.known:
                listener.criterion(output, given[0])
        return
    call = _calls[number]
    if call.place == 0:
        _region[0] = _Region()
    region = _region[0]
    if anchor is not None:
        address = anchor.data_ptr()
        found = next(((listener, names) for listener in _all() if (names := listener.anchors.get(address))), None)
        if found is None:
            region.listener = None  # a parameter that is gathered or cast for this call: nobody knows whose it is
            return
        region.place(call, *found)
        waiting, region.pending = region.pending, []
        for earlier in waiting:
            _give(region, *earlier)
    elif region.listener is None:
        if len(region.pending) < PENDING:
            region.pending.append((call, tuple(given), output.clone(), graded))
        return
    _give(region, call, tuple(given), output, graded)


def _give(region: _Region, call: _Call, given: tuple[Tensor, ...], output: Tensor, graded: bool) -> None:
    name = region.name(call)
    if region.listener is not None and name is not None:
        region.listener.inside(name, call.kind, given, output, graded)


def _shared(a: str, b: str) -> int:
    """How many parts at the end two dotted names share."""
    first, second = a.split("."), b.split(".")
    return next((i for i, (x, y) in enumerate(zip(reversed(first), reversed(second), strict=False)) if x != y), min(len(first), len(second)))


_library: list[Any] = []


def _define() -> None:
    """Register the operation, once. Its inputs may lie in memory as the compiler likes, and no CUDA graph is made of it."""
    if _library:
        return
    tags = [getattr(torch.Tag, name) for name in ("flexible_layout", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
    library: Any = torch.library.Library("lossguard", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("tap(Tensor output, Tensor[] given, Tensor? anchor, Tensor(a!) token, int number, bool graded) -> ()", tags=tags)
    library.impl("tap", _ran, "CompositeExplicitAutograd")
    torch.library.register_fake("lossguard::tap", lambda output, given, anchor, token, number, graded: None, lib=library)
    _library.append(library)
