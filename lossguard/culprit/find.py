"""``find``: the operation that made the first non-finite value of a step. A function that computes the loss flows in, a ``Culprit`` out.

The step is run once, in eager mode, under ``Trace``; afterwards weights, buffers, gradients, modes and random states are
put back bit for bit. Reads values: opt-in, after the fault, never while recording.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.culprit.states import key_of, readable, state_of, tensors_in
from lossguard.culprit.trace import Blame, Origin, Trace
from lossguard.culprit.words import told
from lossguard.findings import Cause, Remedy
from lossguard.preflight.keep import Keeper

CODE = 100  # characters of a line of code that are shown
SURE = 0.95  # confidence: the value was seen to come into being there; our own choice, because the replay may differ from the run


@dataclass(frozen=True)
class Culprit:
    """Where the first non-finite value of a step came into being.

    kind: ``operation``; ``weight``, ``buffer``, ``input`` or ``constant`` where a tensor held it before the step. op: such as
    ``aten.sqrt``, the operation whose forward or derivative (``phase`` ``forward``, ``backward`` or ``update``) made it;
    empty for tensors. name: of the tensor. module: path in the model; inside: False outside of all its modules, as a loss
    function is. source: the line of the user's code. arguments: their ranges. output: how much of the result is not finite.
    reason, remedy: what that means and what to change.
    """

    kind: str
    op: str
    phase: str
    name: str
    module: str
    module_kind: str
    source: str
    arguments: tuple[str, ...]
    output: str
    reason: str
    remedy: Remedy
    inside: bool = True

    @property
    def what(self) -> str:
        """The operation, or the tensor, in a few words."""
        return self.op if self.kind == "operation" else f"{self.kind} {self.name}"

    @property
    def where(self) -> str:
        """Module, class and phase in a few words."""
        if self.inside:
            return f"{self.module or 'the model itself'} ({self.module_kind}, {self.phase})"
        return f"{self.module_kind or 'the step'}, outside of the model's modules ({self.phase})"

    def cause(self) -> Cause:
        """The culprit as a finding's cause."""
        return Cause(f"{self.what} in {self.where}", SURE, f"{self.reason}; {self.source}" if self.source else self.reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**asdict(self), "remedy": {"text": self.remedy.text, "change": dict(self.remedy.change)}, "where": self.where}

    def __str__(self) -> str:
        rows = [("culprit", f"{self.what} in {self.where}"), ("because", self.reason), ("called at", self.source), ("result", self.output),
                ("try", self.remedy.text)]  # fmt: skip
        return "\n".join(f"  {label:<10} {text}" for label, text in rows if text)


def find(model: nn.Module, step: Callable[[], Any], *, batch: Any = None, keep: Iterable[Any] = (), prepare: Callable[[], Any] | None = None) -> Culprit | None:
    """The operation that made the first non-finite value of a step; None where loss, gradients and weights came out finite.

    step: a function without arguments that computes the loss as the training loop does and returns it (a tensor, a dict of
    tensors, or an object with ``loss``); the backward pass is run here, unless the function runs it itself, and an
    optimizer's step in it is looked at too. batch: what the step is computed from, so that its tensors are known by name;
    what the function itself refers to is found without. keep: more objects to put back afterwards. prepare: called first, to
    set weights and random states to what they were; this is put back too.

    Runs on the device of the model, once, and costs several times a step. Raises what ``step`` raises, and ``ValueError``
    for arguments that cannot work. Not for a model whose step talks to other ranks.

    >>> layer, x = nn.Linear(1, 1), torch.zeros(1, 1)
    >>> culprit = find(layer, lambda: (layer(x) * 0.0).sqrt().sum())
    >>> culprit.op, culprit.phase, culprit.remedy.text
    ('aten.sqrt', 'backward', 'torch.sqrt(x + 1e-08)')
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}; give the model first: find(model, step)")
    if not callable(step):
        raise ValueError(
            f"step is a {type(step).__name__}; give a function without arguments that returns the loss: find(model, lambda: criterion(model(x), y))"
        )
    reach = dict(_reach(step))
    reach.update({"batch": batch} if batch is not None else {})
    given = [(name, t) for key, value in reach.items() for name, t in tensors_in(value, key) if not isinstance(t, nn.Parameter)]
    modules = [model, *(v for v in reach.values() if isinstance(v, nn.Module) and v is not model)]
    inputs = _Inputs([t for _, t in given])
    keeper = Keeper([*modules, *(v for v in reach.values() if isinstance(v, Optimizer)), step, *keep])
    try:
        if prepare is not None:
            prepare()
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        with Trace({id(m): n for n, m in model.named_modules()}, _leaves(modules, given)) as trace, _eager(), torch.enable_grad():
            found = _run(modules, step, trace)
        if trace.blind:
            names = ", ".join(sorted(trace.blind)[:3])
            warnings.warn(f"lossguard: the results of {len(trace.blind)} kinds of operations could not be read ({names})", RuntimeWarning, stacklevel=2)
        return found
    finally:
        keeper.restore()
        inputs.restore()


def _run(modules: list[nn.Module], step: Callable[[], Any], trace: Trace) -> Culprit | None:
    """One step under the trace, from the loss back to what made it sick."""
    result = step()
    losses = [t for _, t in tensors_in(_of_output(result), "loss") if readable(t)]
    found = _first(trace, losses)
    if found is None and not trace.backward_ran:
        sources = [t for t in losses if t.requires_grad and t.grad_fn is not None]
        if sources:
            torch.autograd.backward([t.sum() for t in sources])
    if found is not None:
        return culprit_of(found)
    found = _first(trace, [p.grad for m in modules for p in m.parameters() if p.grad is not None])
    if found is not None:
        return culprit_of(found, by="gradient")
    found = _first(trace, [t for m in modules for t in m.parameters()])
    return None if found is None else culprit_of(found, by="update")


def culprit_of(origin: Origin, *, by: str = "loss") -> Culprit:
    """An origin as people read it. by: what it was reached from, ``loss``; ``gradient`` where the loss was finite, so that its
    own result was masked away; ``update`` where the gradients were finite as well, so that an optimizer made it."""
    if by == "gradient" and origin.phase == "forward" and not origin.leaf:
        origin = replace(origin, hidden=True)
    reason, remedy = told(origin)
    nans, infinite, size = origin.outputs
    output = f"{nans} NaN and {infinite} infinite of {size} values, the first at {list(origin.first)}"
    inner = f" (its formula's {origin.inner})" if origin.inner and origin.inner != origin.op else ""
    phase = "update" if by == "update" and not origin.leaf else origin.phase
    return Culprit(origin.leaf or "operation", "" if origin.leaf else origin.op, phase, origin.name, origin.site.module or "", origin.site.kind,
                   _line(origin.site.source), tuple(map(str, origin.ranges)), output + inner, reason, remedy, origin.site.module is not None)  # fmt: skip


def of_call(function: Callable[[], Any], batch: Any = None) -> tuple[Any, Culprit | None]:
    """What a function returns, and the culprit of its result's tensors, or of the gradients of what they were computed from.

    For a process of its own: nothing is put back. The model is the outermost module with parameters that the function calls.
    """
    with Trace({}, _leaves([], tensors_in(batch, "batch")), learns=True) as trace, _eager(), torch.enable_grad():
        result = function()
        losses = [t for _, t in tensors_in(_of_output(result), "loss") if readable(t)]
        found, by = _first(trace, losses), "loss"
        sources = [t for t in losses if t.requires_grad and t.grad_fn is not None]
        leaves = list(_graph_leaves(sources))
        if found is None:
            if sources and not trace.backward_ran:
                torch.autograd.backward([t.sum() for t in sources], inputs=leaves or None)
            found, by = _first(trace, [t.grad for t in leaves if t.grad is not None]), "gradient"
    return result, None if found is None else culprit_of(found, by=by)


# ---- the parts


class _Inputs:
    """The tensors that a step is computed from, to be put back where the step has written to them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._kept = [(t, t.detach().clone(), _version(t), t.grad if t.is_leaf else None) for t in tensors]
        for tensor in tensors:
            if tensor.is_leaf:
                tensor.grad = None

    def restore(self) -> None:
        for tensor, copy, version, grad in self._kept:
            if tensor.is_leaf:
                tensor.grad = grad
            if _version(tensor) != version:
                tensor.data.copy_(copy)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _first(trace: Trace, tensors: Iterable[Tensor]) -> Origin | None:
    """The earliest origin of what is not finite in any of the tensors; infinities on purpose only where nothing else is to blame."""
    joined = Blame()
    for tensor in tensors:
        if readable(tensor) and state_of(tensor).sick:
            joined.join(trace.origin(tensor))
    return joined.made or joined.legal


def _of_output(result: Any) -> Any:
    """The loss in what a step returned."""
    loss = getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) else result


def _leaves(modules: Iterable[nn.Module], given: Iterable[tuple[str, Tensor]]) -> dict[int, tuple[str, str]]:
    """Kind and name of the tensors that are there before the step."""
    known = {key_of(t): ("input", name) for name, t in given if readable(t)}
    for module in reversed(list(modules)):
        known.update({key_of(b): ("buffer", name) for name, b in module.named_buffers() if readable(b)})
        known.update({key_of(p): ("weight", name) for name, p in module.named_parameters() if readable(p)})
    return known


def _reach(step: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What a function refers to, by name: its closure, its defaults, its own object and the globals that it names."""
    if isinstance(step, MethodType):
        yield "self", step.__self__
        yield from _reach(step.__func__, depth)
    elif isinstance(step, FunctionType):
        for name, cell in zip(step.__code__.co_freevars, step.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield name, cell.cell_contents
                if depth < 3 and isinstance(cell.cell_contents, FunctionType):
                    yield from _reach(cell.cell_contents, depth + 1)
        for name in step.__code__.co_names:
            value = step.__globals__.get(name)
            if isinstance(value, (Tensor, nn.Module, Optimizer, list, tuple, dict)):
                yield name, value
            elif depth < 3 and isinstance(value, FunctionType):
                yield from _reach(value, depth + 1)
        for k, value in enumerate(step.__defaults__ or ()):
            yield f"default {k}", value
    elif hasattr(step, "func") and hasattr(step, "keywords"):  # functools.partial
        yield from ((f"argument {k}", value) for k, value in enumerate(step.args))
        yield from step.keywords.items()
        yield from _reach(step.func, depth)


def _graph_leaves(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors whose gradients a backward pass would write."""
    seen: set[Any] = set()
    nodes: list[Any] = [t.grad_fn for t in losses]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        nodes += [parent for parent, _ in node.next_functions]


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run in eager mode inside: their operations are seen one by one."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with warnings.catch_warnings(), stance("force_eager"):
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        yield


def _line(source: tuple[str, int, str] | None) -> str:
    """``file:line in function: code``."""
    if source is None:
        return ""
    file, line, function = source
    code = linecache.getline(file, line).strip()
    code = code if len(code) <= CODE else f"{code[: CODE - 4]} ..."
    return f"{Path(file).name}:{line} in {function}" + (f": {code}" if code else "")
