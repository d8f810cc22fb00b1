"""Where the recorder's phases are called from in a plain loop: hooks on modules, gradients and optimizers.

Nothing is measured here and nothing is attached to the model's modules: forward passes are seen through the process's one
global hook (``listening``), so copies and pickles of the model carry nothing of the guard.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import listening
from lossguard.device.capture import capturing
from lossguard.device.recorder import Recorder

FIRST = 2  # steps for which the forward hook stays, sampled or not: what is compiled in them is compiled under it
HEARD = (nn.CrossEntropyLoss, nn.parallel.DistributedDataParallel)  # whose calls tell something, though their outputs are not measured
WITNESSES = 3  # parameters of an optimizer whose gradient hook tells that a backward pass is under way

_transform = torch._C._functorch.peek_interpreter_stack


class Taps:
    """Hooks that call a recorder. after_backward: called when a backward pass has ended and somebody listens.

    compiled: whether compiled code is looked into. listening: whether this step's backward pass and updates matter, as on
    sampled steps; otherwise no gradient has a hook. watch: calls its argument and swallows what that raises, so that a hook's own fault never reaches the loop.
    """

    def __init__(
        self,
        recorder: Recorder,
        after_backward: Callable[[], None],
        after_update: Callable[[int], None],
        watch: Callable[..., Any],
        *,
        backward: bool,
        compiled: bool = False,
    ) -> None:
        self.listening = False
        self.backward_seen = False
        self._recorder = recorder
        self._after_backward, self._after_update, self._watch = after_backward, after_update, watch
        self._handles: list[Any] = []
        self._grad_handles: list[Any] = []
        self._hooked: list[Tensor] = []
        self._settled = False
        self._arrived: dict[int, int] = {}  # backward pass of this step -> gradients that arrived in it
        self._witnesses: list[Tensor] = []
        self._reached = 0  # parameters with a gradient when the last backward pass ended
        self._watch_backward, recorder.passes.looks_inside = backward, compiled
        mine = weakref.ref(self)
        for i, optimizer in enumerate(recorder.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(partial(_before_step, mine, i)))
            self._handles.append(optimizer.register_step_post_hook(partial(_after_step, mine, i)))
        self._steps = 0
        self._key = listening.attach(self)
        weakref.finalize(self, _let_go, self._key, self._handles, self._grad_handles).atexit = False
        self.rehook()

    def watch_forward(self, on: bool) -> None:
        """Whether the coming step's forward passes are recorded."""
        self._steps += 1
        listening.listen(self._key, self, on, keep=self._steps <= FIRST)

    def forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module was called, outside of compiled code. Most are none of ours, or their output is kept and looked at later."""
        passes = self._recorder.passes
        known = passes.asked.get(id(module))
        if (known is None and not isinstance(module, HEARD)) or self._captured():
            return
        if _transform() is not None:
            if known is not None:
                passes.forward.unwatched.add(f"{known[0]}: it ran inside of torch.func (vmap, grad, ...), whose tensors are the transform's own")
        elif known is not None:
            try:
                if passes.again(module, output):
                    return
            except Exception:  # the long way fails as well, and is watched
                pass
            self._watch(passes.module_called, module, args, output, part=known[0])
        elif type(module) is nn.CrossEntropyLoss:
            self._watch(passes.criterion_called, args, part="CrossEntropyLoss")
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            self._watch(self._recorder.wrapper_called, module)

    @property
    def known(self) -> Mapping[int, tuple[str, str]]:
        """The modules that are watched inside compiled code too."""
        return self._recorder.passes.modules if self._recorder.passes.looks_inside else {}

    @property
    def anchors(self) -> Mapping[int, Sequence[str]]:
        """Which watched module is where, by the memory of its first parameter; as of this step."""
        return self._recorder.passes.anchors()

    def inside(self, name: str, kind: str, given: tuple[Tensor, ...], output: Tensor, graded: bool) -> None:
        """A module was called inside compiled code."""
        if self._recorder.on and not self._captured():
            self._watch(self._recorder.passes.called_inside, name, kind, given, output, graded, part=name)

    def criterion(self, logits: Tensor, targets: Tensor) -> None:
        """A ``nn.CrossEntropyLoss`` was called inside compiled code."""
        if self._recorder.on and not self._captured():
            self._watch(self._recorder.passes.criterion_called, (logits, targets), part="CrossEntropyLoss")

    def listen(self, on: bool) -> None:
        """Whether the coming step's backward pass and updates matter."""
        self.listening = on
        if not on:
            _remove(self._grad_handles)
        elif not self._grad_handles:
            self._attach()

    def next_step(self) -> None:
        """A step is over. If each of its backward passes reached all parameters that have gradients, a few witnesses
        suffice from now on (not so with several networks in turn or reentrant checkpoints); if none was seen although
        somebody listened, all are asked again."""
        arrived, self._arrived = self._arrived, {}
        if self.listening and not arrived:
            self.rehook()
        elif not self._settled and self._witnesses and len(set(arrived.values())) == 1 and self._reached in arrived.values():
            self._settled = True
            self._choose(self._witnesses)
        self._witnesses = []

    def rehook(self) -> None:
        """Listen to every trainable parameter again: parameters came or went, or no backward pass was seen."""
        if self._watch_backward:
            self._settled = False
            self._choose([p for p in self._recorder.model.parameters() if p.requires_grad])

    def close(self) -> None:
        """Take everything off."""
        _let_go(self._key, self._handles, self._grad_handles)

    # ---- inside

    def _captured(self) -> bool:
        """Whether what is called now only goes into a CUDA graph: there are no numbers yet, so this step is not recorded."""
        if not capturing():
            return False
        self._recorder.drop()
        return True

    def _choose(self, parameters: Sequence[Tensor]) -> None:
        """These parameters' gradients tell of backward passes from now on."""
        _remove(self._grad_handles)
        self._hooked = [p for p in parameters if not nn.parameter.is_lazy(p) and p.is_leaf]
        if self.listening:
            self._attach()

    def _attach(self) -> None:
        mine = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            taps = mine()
            if taps is not None:
                taps._gradient_arrived()

        self._grad_handles += [p.register_post_accumulate_grad_hook(arrived) for p in self._hooked if p.requires_grad]  # type: ignore[no-untyped-call]

    def _pre_step(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The update comes next; where the step is given a closure, which runs backward and clips, it comes when that returns."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not self._recorder.on or closure is None:
            self._watch(self._recorder.before_update, index)
            return None
        watch, recorder = self._watch, self._recorder

        def closed() -> Any:
            loss = closure()
            watch(recorder.before_update, index)
            return loss

        return (args, {**kwargs, "closure": closed}) if "closure" in kwargs else ((args[0], closed, *args[2:]), kwargs)

    def _gradient_arrived(self) -> None:
        """The first gradient of a backward pass queues a call for its end (once more behind a data-parallel reducer's own)."""
        if not self.listening or self._captured():
            return
        backward = torch._C._current_graph_task_id()  # by its number, so that a pass that raised midway blocks no later one
        before = self._arrived.get(backward, 0)
        self._arrived[backward] = before + 1
        if not before:
            engine: Any = torch.autograd.Variable._execution_engine
            ended = partial(_untraced(_backward_ended), self)
            engine.queue_callback(lambda: engine.queue_callback(ended))

    def _choose_witnesses(self) -> None:
        """A few parameters of each optimizer; none while an optimizer has no gradient at all."""
        self._reached = sum(p.grad is not None for p in self._hooked)
        arrived = [[p for p in bank.parameters if p.grad is not None] for bank in self._recorder.banks]
        self._witnesses = [p for of in arrived for p in of[:: max(1, len(of) // WITNESSES)][:WITNESSES]] if all(arrived) else []


# Hooks hold the taps weakly, so that a forgotten guard is collected and its hooks do nothing.


def _backward_ended(taps: Taps) -> None:
    taps.backward_seen = True
    taps._after_backward()
    if not taps._settled:
        taps._choose_witnesses()


def _untraced(function: Callable[[Taps], None]) -> Callable[[Taps], None]:
    """The function as Dynamo leaves it alone: where a whole step is compiled, it would trace what the engine calls, too."""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _left_alone:
        _left_alone[function] = torch._dynamo.disable(function)  # type: ignore[no-untyped-call]
    return _left_alone[function]


_left_alone: dict[Callable[[Taps], None], Callable[[Taps], None]] = {}


def _before_step(mine: weakref.ref[Taps], index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    taps = mine()
    return taps._pre_step(index, args, kwargs) if taps is not None and taps.listening and not taps._captured() else None


def _after_step(mine: weakref.ref[Taps], index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    taps = mine()
    if taps is not None and taps.listening and not taps._captured():
        taps._after_update(index)


def _let_go(key: int, *handles: list[Any]) -> None:
    listening.detach(key)
    _remove(*handles)


def _remove(*handles: list[Any]) -> None:
    for some in handles:
        while some:
            some.pop().remove()


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a trainer's wrapper. Accelerate's wrapper is an optimizer by its class only: never
    initialised as one, it has no hooks and its ``step`` calls the inner one's, so the inner one is meant."""
    for _ in range(4):
        if isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, Optimizer):
        return optimizer
    raise ValueError(f"expected a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}")
