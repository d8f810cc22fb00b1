"""Watches every operation of a step, forward and backward, and remembers where each non-finite value was made.

Operations flow in through a dispatch mode; for each piece of memory with non-finite values its ``Origin`` flows out.
An operation is an origin if it made such a value out of finite ones, or NaN out of infinities that were put there on
purpose (masks). Everything downstream inherits the earliest origin among those inputs that carry the value on, so that a
value which is masked away leaves no trace. Reads values; to be used after a fault only.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard.culprit.states import FINE, Range, State, key_of, range_of, readable, sick_elements, state_of, tensors_in

# Operations that write a given number: an infinity that they write was meant.
FILLS = frozenset({"full", "full_like", "new_full", "fill", "fill_", "masked_fill", "masked_fill_", "scalar_tensor", "where", "index_fill", "index_fill_",
                   "constant_pad_nd", "lift_fresh", "lift_fresh_copy"})  # fmt: skip
# Operations that look at none of what their first argument held before.
OVERWRITE = frozenset({"copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "set_", "resize_", "trunc_normal_"})
# Operations for which -inf is an ordinary argument: a row of nothing else is what they cannot take.
SOFTMAX = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "softmax", "log_softmax", "_masked_softmax"})
FUSED_ATTENTION = ("_scaled_dot_product", "_efficient_attention", "_flash_attention")
LANES = ("_foreach_", "_fused_", "_amp_foreach_")  # lists of tensors that have nothing to do with each other
_INSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))  # frames of these folders are not the user's


@dataclass(frozen=True)
class Site:
    """Where in the user's code an operation was called. module: its path in the model, None outside of it; kind: its class."""

    module: str | None = None
    kind: str = ""
    source: tuple[str, int, str] | None = None  # file, line, function


@dataclass(frozen=True)
class Origin:
    """Where a non-finite value comes from: an operation, or a tensor that held it from the beginning (``leaf``)."""

    index: int
    op: str
    phase: str
    site: Site
    inner: str = ""  # the operation of the derivative's formula
    ranges: tuple[Range, ...] = ()
    outputs: tuple[int, int, int] = (0, 0, 0)  # NaN, infinite, all
    first: tuple[int, ...] = ()
    state: State = FINE
    legal: bool = False
    masked: bool = False  # NaN out of infinities that were put there on purpose
    hidden: bool = False  # the value was thrown away afterwards (the gradient that came in was 0)
    given: bool = False  # a number that is not finite stands in the code: among the operation's plain arguments
    leaf: str = ""  # weight, buffer, input, constant
    name: str = ""


@dataclass
class Blame:
    """The earliest origin of what is sick in a piece of memory; ``legal``: of what is infinite on purpose."""

    made: Origin | None = None
    legal: Origin | None = None

    def join(self, other: Blame) -> None:
        """The earlier of each."""
        self.made, self.legal = _earlier(self.made, other.made), _earlier(self.legal, other.legal)


@dataclass
class Step:
    """A differentiable operation of the forward pass, for the derivative that will carry its number."""

    op: str
    site: Site
    ranges: tuple[Range, ...]


@dataclass
class _Argument:
    name: str
    tensor: Tensor
    written: bool
    state: State | None = None  # as it was before the operation; None: ask the tensor
    range: Range | None = None


@dataclass(eq=False)
class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode with its two hooks on modules; use it as a context.

    names: module paths by the modules' ids. leaves: kind and name of the tensors that were there before, by ``key_of``.
    learns: whether the names are taken from the modules that are called, because the model is not known yet.
    """

    names: dict[int, str]
    leaves: dict[int, tuple[str, str]]
    learns: bool = False
    backward_ran: bool = False
    operations: int = 0
    blind: set[str] = field(default_factory=set)  # operations whose result could not be read
    _blames: dict[int, Blame] = field(default_factory=dict)
    _held: dict[int, StorageWeakRef] = field(default_factory=dict)  # keeps a key from being given to other memory
    _steps: dict[int, Step] = field(default_factory=dict)  # by autograd's sequence number
    _modules: list[tuple[str | None, str]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Trace:
        self._handles = [register_module_forward_pre_hook(self._enter_module), register_module_forward_hook(self._leave_module, always_call=True)]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._modules = [], []

    def origin(self, tensor: Tensor, name: str = "") -> Blame:
        """Where the non-finite values of a tensor come from."""
        return self._blame_of(_Argument(name, tensor, written=False), state_of(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation: it runs as it would have run, then its result is looked at."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = list(_arguments(func, args, kwargs))
        if func._schema.is_mutable:
            for one in inputs:
                if one.written and readable(one.tensor):
                    one.state = state_of(one.tensor)
                    one.range = range_of(one.name, one.tensor)
        result = func(*args, **kwargs)
        try:
            self._look(func, name, inputs, args, kwargs, result)
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            self.blind.add(name)
        return result

    # ---- one operation

    def _look(self, func: Any, name: str, inputs: list[_Argument], args: Any, kwargs: Any, result: Any) -> None:
        self.operations += 1
        node = torch._C._current_autograd_node()
        self.backward_ran = self.backward_ran or node is not None
        forward = node is None or bool(self._modules)  # a checkpoint runs its modules again in the backward pass
        sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        if forward and threading.get_ident() == self._thread and sequence >= 0 and sequence not in self._steps:
            ranges = tuple(_ranges(inputs))
            self._steps[sequence] = Step(str(func.overloadpacket), self._site(), ranges)
        for outputs, sources in _lanes(name, inputs, result):
            keys = {key_of(one.tensor) for one in sources if not one.written}
            for output in outputs:
                if not readable(output) or (key_of(output) in keys and not func._schema.is_mutable):  # a view: its memory was looked at
                    continue
                state = state_of(output)
                if state.sick:
                    used = [one for one in sources if not (one.written and (name in OVERWRITE or one.name == "out"))]
                    self._remember(output, self._judge(func, name, used, (args, kwargs), output, state, None if forward else node))
                elif output.numel() * output.element_size() == output.untyped_storage().nbytes():
                    self._blames.pop(key_of(output), None)

    def _judge(self, func: Any, name: str, inputs: list[_Argument], given: Any, output: Tensor, state: State, node: Any) -> Blame:
        """Who is to blame for a result that is not finite."""
        sick = []
        for one in inputs:
            if readable(one.tensor):
                before = one.state or state_of(one.tensor)
                sick += [(one, before)] if before.sick else []
        if state.nan and any(before.nan for _, before in sick):
            return self._inherited((one, before) for one, before in sick if before.nan)
        if not sick:
            legal = name in FILLS and not state.nan and any(isinstance(x, float) and math.isinf(x) for x in _scalars(given))
            origin = self._new(func, inputs, given, output, state, node, legal=legal)
            return Blame(legal=origin) if legal else Blame(made=origin)
        blame = self._inherited(sick)
        if not state.nan or blame.made is not None:
            return blame
        assert blame.legal is not None
        if blame.legal.leaf == "input" and name not in SOFTMAX and not name.startswith(FUSED_ATTENTION):
            return Blame(made=blame.legal)
        return Blame(made=self._new(func, inputs, given, output, state, node, masked=True))

    def _inherited(self, carriers: Iterable[tuple[_Argument, State]]) -> Blame:
        joined = Blame()
        for one, state in carriers:
            joined.join(self._blame_of(one, state))
        return joined

    def _blame_of(self, one: _Argument, state: State) -> Blame:
        known = self._blames.get(key_of(one.tensor))
        if known is not None:
            return known
        leaf, name = self.leaves.get(key_of(one.tensor), ("constant", one.name))
        legal = not state.nan and (leaf in ("constant", "buffer") or (leaf == "input" and not state.plus))
        nans, infinite, first = sick_elements(one.tensor)
        ranges = tuple(_ranges([_Argument(name, one.tensor, written=False)]))
        counts = (nans, infinite, one.tensor.numel())
        found = Origin(-1, "", "forward", self._site(), "", ranges, counts, first, state, legal, leaf=leaf, name=name)
        return Blame(legal=found) if legal else Blame(made=found)

    def _new(
        self, func: Any, inputs: list[_Argument], given: Any, output: Tensor, state: State, node: Any, *, legal: bool = False, masked: bool = False
    ) -> Origin:
        nans, infinite, first = sick_elements(output)
        name = func._schema.name.partition("::")[2]
        op, site, ranges, phase, inner, hidden = str(func.overloadpacket), self._site(), tuple(_ranges(inputs)), "forward", "", False
        if node is not None:
            step = self._steps.get(node._sequence_nr())
            phase, inner = "backward", op
            op, site, ranges = (step.op, step.site, step.ranges or ranges) if step is not None else (node.name(), Site(), ranges)
            op = op if node.name()[-1:].isdigit() else node.name().removesuffix("Backward")
            hidden = hidden and op.startswith("aten.")  # of a derivative that the user wrote nothing is known
            hidden = state.nan and name in ("mul", "div") and _zero_there(inputs, output, first)
        counts, infinite_given = (nans, infinite, output.numel()), any(isinstance(x, float) and not math.isfinite(x) for x in _scalars(given))
        return Origin(self.operations, op, phase, site, inner, ranges, counts, first, state, legal, masked, hidden, infinite_given)

    def _remember(self, output: Tensor, blame: Blame) -> None:
        key = key_of(output)
        self._blames[key] = blame
        if key not in self._held:
            self._held[key] = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]

    # ---- where it was called

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if self.learns and not self._modules and id(module) not in self.names:
            self._learn(module)
        self._modules.append((self.names.get(id(module)), type(module).__name__))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._modules:
            self._modules.pop()

    def _learn(self, model: nn.Module) -> None:
        """The names of a model that is called for the first time; what its weights hold now was loaded, whoever copied it there."""
        parameters = {key_of(p): ("weight", name) for name, p in model.named_parameters() if readable(p)}
        if parameters:
            self.names.update({id(m): name for name, m in model.named_modules()})
            self.leaves.update({key_of(b): ("buffer", name) for name, b in model.named_buffers() if readable(b)} | parameters)
            for key in self.leaves:
                self._blames.pop(key, None)

    def _site(self) -> Site:
        module, kind = self._modules[-1] if self._modules else (None, "")
        return Site(module, kind, _source())


def _source() -> tuple[str, int, str] | None:
    """The innermost frame of the user's own code."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_INSIDE) and not code.co_filename.startswith("<frozen"):
            return code.co_filename, frame.f_lineno, code.co_name
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def _arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[_Argument]:
    """The tensors given to an operation, by the names of its schema."""
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for name, tensor in tensors_in(value, argument.name):
            yield _Argument(name, tensor, written)


def _lanes(name: str, inputs: list[_Argument], result: Any) -> Iterator[tuple[list[Tensor], list[_Argument]]]:
    """Results with the arguments they may depend on: all, or those of the same place in operations over lists."""
    results = [tensor for _, tensor in tensors_in(result)] + [one.tensor for one in inputs if one.written]
    seen: set[int] = set()
    results = [t for t in results if id(t) not in seen and not seen.add(id(t))]  # type: ignore[func-returns-value]
    if not name.startswith(LANES):
        yield results, inputs
        return
    alone = [one for one in inputs if not one.name.endswith("]")]
    for k, output in enumerate(results):
        place = next((one.name.rpartition("[")[2] for one in inputs if one.tensor is output), f"{k}]")
        yield [output], [one for one in inputs if one.name.endswith(f"[{place}")] + alone


def _ranges(inputs: Iterable[_Argument]) -> Iterator[Range]:
    for one in inputs:
        if one.range is not None:
            yield one.range
        elif readable(one.tensor):
            found = range_of(one.name, one.tensor)
            if found is not None:
                yield found


def _scalars(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple)):
        for item in given:
            yield from _scalars(item)
    elif isinstance(given, dict):
        yield from _scalars(list(given.values()))
    else:
        yield given


def _zero_there(inputs: list[_Argument], output: Tensor, first: tuple[int, ...]) -> bool:
    """Whether NaN came from a gradient of 0: 0/0 or 0 times infinity. The gradient is the first factor or the dividend."""
    gradient = next((one.tensor for one in inputs if one.name == "self" and readable(one.tensor) and not one.written), None)
    return gradient is not None and gradient.shape == output.shape and not bool(gradient[first])


def _earlier(a: Origin | None, b: Origin | None) -> Origin | None:
    if a is None or b is None:
        return a or b
    return a if a.index <= b.index else b
