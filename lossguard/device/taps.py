"""Where the recorder's phases are called from in a plain loop: hooks on modules, gradients and optimizers.

Nothing is measured here and nothing is attached to the model's modules: forward passes are seen through one global hook
that exists during sampled steps only, so copies and pickles of the model carry nothing of the guard.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from lossguard.device.recorder import Recorder

WITNESSES = 3  # parameters of an optimizer whose gradient hook tells that a backward pass is under way


class Taps:
    """Hooks that call a recorder. after_backward: called when a backward pass has ended and somebody listens.

    listening: whether the end of this step's backward pass matters; sampled steps and armed gates set it.
    """

    def __init__(self, recorder: Recorder, after_backward: Callable[[], None], after_update: Callable[[int], None], *, backward: bool) -> None:
        self.listening = False
        self.backward_seen = False
        self._recorder = recorder
        self._after_backward = after_backward
        self._queued = False
        self._forward: Any = None
        self._handles: list[Any] = []
        self._grad_handles: list[Any] = []
        self._settled = False
        self._watch_backward = backward
        mine = weakref.ref(self)
        for i, optimizer in enumerate(recorder.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(lambda o, a, k, i=i: _call(mine, "_pre_step", i)))
            self._handles.append(optimizer.register_step_post_hook(lambda o, a, k, i=i: after_update(i)))
        if backward:
            self._hook_gradients([p for p in recorder.model.parameters() if p.requires_grad])

    def watch_forward(self, on: bool) -> None:
        """Attach or remove the one global forward hook."""
        if on and self._forward is None:
            mine = weakref.ref(self)

            def forward_ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                _call(mine, "_forward_ended", module, args, output)

            self._forward = register_module_forward_hook(forward_ended)
        elif not on and self._forward is not None:
            self._forward.remove()
            self._forward = None

    def rehook(self) -> None:
        """Listen to every trainable parameter again: parameters came or went, or no backward pass was seen."""
        if self._watch_backward:
            self._settled = False
            self._hook_gradients([p for p in self._recorder.model.parameters() if p.requires_grad])

    def close(self) -> None:
        """Take everything off."""
        self.watch_forward(False)
        for handle in [*self._handles, *self._grad_handles]:
            handle.remove()
        self._handles.clear()
        self._grad_handles.clear()

    # ---- inside

    def _hook_gradients(self, parameters: Sequence[Tensor]) -> None:
        for handle in self._grad_handles:
            handle.remove()
        mine = weakref.ref(self)
        self._grad_handles = [p.register_post_accumulate_grad_hook(lambda p: _call(mine, "_gradient_arrived")) for p in parameters if p.is_leaf]

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._recorder.module_called(module, args, output)

    def _pre_step(self, index: int) -> None:
        self._recorder.before_update(index)

    def _gradient_arrived(self) -> None:
        """The first gradient of a backward pass queues a call for its end (once more behind a data-parallel reducer's own)."""
        if not self.listening or self._queued:
            return
        self._queued = True
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(self._backward_ended))

    def _backward_ended(self) -> None:
        self._queued = False
        self.backward_seen = True
        self._after_backward()
        if not self._settled:
            self._settled = True
            self._settle()

    def _settle(self) -> None:
        """From now on a few parameters of each optimizer suffice."""
        chosen: list[Tensor] = []
        for bank in self._recorder.banks:
            arrived = [p for p in bank.parameters if p.grad is not None]
            chosen += arrived[:: max(1, len(arrived) // WITNESSES)][:WITNESSES]
        if chosen:
            self._hook_gradients(chosen)


def _call(mine: weakref.ref[Taps], method: str, *args: Any) -> None:
    """Hooks hold the taps weakly, so that a forgotten guard is collected and its hooks do nothing."""
    taps = mine()
    if taps is not None:
        getattr(taps, method)(*args)


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a trainer's wrapper."""
    for _ in range(4):
        if isinstance(optimizer, Optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
    raise ValueError(f"expected a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}")
