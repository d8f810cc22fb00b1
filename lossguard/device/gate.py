"""Decides on the device whether an update is left out, and counts. Never reads a value.

Gradients flow in before they are clipped, a flag of exactly 0.0 or 1.0 flows to the optimizer (``means.py`` says how), and
counters flow into rows of the tape. Of sharded gradients the whole norm is taken, by one reduction, so that all ranks decide alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.device import signals
from lossguard.device.buffers import Buffers
from lossguard.device.means import FoundInf, Means, PutBack
from lossguard.device.spikes import Limit, Spikes
from lossguard.device.tape import Row

SKIPPABLE = ("exploding_gradient", "nonfinite_gradient")  # what the device can decide before the update
FUSED = "Adam, AdamW, SGD, Adagrad"
COUNTS = ("total_skips", "spike_skips", "tried_updates")
STATE = ("run", "totals", "spikes")  # what a resumed run takes over


def why_not(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer cannot skip by ``found_inf``, or None if it can."""
    name = type(optimizer).__name__
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if all(group.get("fused") for group in optimizer.param_groups):  # Adagrad does not in torch 2.11, and does in 2.13
            return f"{name} of torch {torch.__version__} does not honour found_inf although it is fused; use another of {FUSED}, or a newer torch"
        return f"{name} does not honour found_inf; build it with fused=True ({FUSED})"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{name} has a parameter group without fused=True; give fused=True to the optimizer itself"
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        return f"{name} with dampening keeps uninitialised momentum when its first step is skipped; set dampening=0"
    return None


class Gate:
    """The verdict on one optimizer's gradients, and the counters of updates skipped in a row and in all.

    on_fault: called with an error of the gate's own, which takes it off, for it must not end the run.
    """

    def __init__(self, optimizer: Optimizer, means: Means, limit: Limit | None, on_fault: Callable[[Exception], None], buffers: Buffers | None = None) -> None:
        self.optimizer, self.means, self.buffers = optimizer, means, buffers
        self.late = 0  # updates that were judged at the update itself, since no backward pass was seen to end
        self.broken = False  # a fault of our own: the gate stands open
        self.scaled = False  # whether somebody else's flag, such as a loss scaler's, was ever there
        self.device = torch.device("meta")
        self._limit, self._on_fault = limit, on_fault
        self._judged = False  # since the last update
        self._seen: list[tuple[int, int]] = []  # the gradients that were judged, and how often each had been written to
        self._depth = 0  # a step that calls the step of its base class is one update, though hooks run for both
        self._theirs: Tensor | None = None
        mine = weakref.ref(self)  # the optimizer outlives a forgotten guard, and must not stay shut then
        hooks = [optimizer.register_step_pre_hook(_eager(partial(_before, mine))), optimizer.register_step_post_hook(_eager(partial(_after, mine)))]
        self.close = weakref.finalize(self, _disarm, means, hooks)  # disarms, once
        self.close.atexit = False
        self._place(optimizer.param_groups[0]["params"][0].device)

    def judge(self, scale: Tensor | None = None) -> None:
        """Decide from the gradients as they are now. scale: of a loss scaler whose gradients are not unscaled yet.

        A norm that overflows float32 (above 1.8e19) counts as non-finite. The last backward pass before the update decides.
        """
        self._run_own(self._judge, scale)

    def _judge(self, scale: Tensor | None) -> None:
        gradients = self._gradients()
        self._judged, self._seen = True, _versions(gradients)
        if not gradients:
            self.verdict[:2].zero_()
            return
        if gradients[0].device != self.device:
            self._place(gradients[0].device)
        norm = total_norm(gradients, self.device)
        if self.spikes is None:
            self.flag.copy_(~torch.isfinite(norm))
            return
        if scale is not None:
            norm = norm / scale.to(self.device, non_blocking=True)
        self.norm.copy_(norm)
        self.flag.copy_(~(norm < self.spikes.limit))
        self.spiked.copy_(self.flag * torch.isfinite(norm))

    def before(self, *, closure: bool) -> None:
        """The optimizer is about to step. A closure runs the backward pass inside the step, and what it ends in is judged then."""
        self._depth += 1
        if self._depth == 1:
            self._run_own(self._before, closure)

    def begin(self) -> None:
        """No step is under way, even if one raised midway."""
        self._depth = 0

    def _before(self, closure: bool) -> None:
        if not self._judged and not closure:
            self._judge(getattr(self.optimizer, "grad_scale", None))
            self.late += 1
        elif not closure and (gradients := self._gradients()) and _versions(gradients) != self._seen:
            # clipped, or changed otherwise, since they were judged: what has become non-finite meanwhile is left out too
            self.flag.copy_(torch.maximum(self.flag, (~torch.isfinite(total_norm(gradients, self.device))).to(self.flag.dtype)))
        self._theirs = self.means.before(closure=closure)
        self.scaled |= self._theirs is not None

    def after(self) -> None:
        """The optimizer stepped: one count for each update, however many backward passes led to it."""
        self._depth -= 1
        if self._depth == 0:
            self._run_own(self._after)

    def _after(self) -> None:
        self._judged = False
        self.means.after()
        theirs, self._theirs = self._theirs, None
        skipped, verdict = self.flag, self.verdict
        if theirs is not None:  # what a loss scaler leaves out anyway is no doing of ours
            skipped, verdict = torch.maximum(theirs, self.flag), self.verdict * (1.0 - theirs)
        self.run.add_(verdict[0]).mul_(skipped)
        self.totals.add_(verdict)
        if self.spikes is not None:
            self.spikes.learn(self.norm, verdict[1], skipped)
        if self.buffers is not None:
            self.buffers.after(verdict[0])

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.means.nbytes + 4 * sum(t.numel() for t in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """The counters and statistics, as they stand on the device."""
        return {"run": self.run, "totals": self.totals, **({} if self.spikes is None else {"spikes": self.spikes.numbers})}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave; what is missing begins anew."""
        for name, own in self.state().items():
            if name in state:
                own.copy_(state[name])
        if self.spikes is not None:
            self.spikes.renew()

    def lay(self, index: int, row: Row) -> None:
        """The counters, into a row of the tape."""
        row.add_scalars("consecutive_skips", np.array([index]), [self.run])
        for name, count in zip(COUNTS, self.totals.unbind(), strict=True):
            row.add_scalars(name, np.array([index]), [count])

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _place(self, device: torch.device) -> None:
        """Counters live where the gradients do; parameters may move after the guard was made."""
        old = self.state() if self.device.type != "meta" else {}
        self.device = device
        self.verdict = torch.zeros(3, device=device)  # left out; left out as a spike; tried, which is always 1
        self.verdict[2:].fill_(1.0)
        self.flag, self.spiked, _ = self.verdict.unbind()
        self.run = torch.zeros((), device=device)
        self.totals = torch.zeros(3, device=device)
        self.norm = torch.zeros((), device=device)
        self.spikes = None if self._limit is None else Spikes(self._limit, device)
        self.resume(old)
        self.means.arm(self.flag)

    def _run_own(self, part: Callable[..., None], *args: Any) -> None:
        """Our own faults end no run; a gate that cannot judge stands open and says so."""
        if self.broken or not self.close.alive:
            return
        try:
            with torch.no_grad():
                part(*args)
        except Exception as error:
            self.broken = True  # the hooks stay, for this may be one of them, and do nothing
            self.means.disarm()
            self._on_fault(error)


def total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The L2 norm of all gradients together, of sharded ones (DTensor) over all ranks: one reduction for each way of sharding."""
    groups: dict[Any, list[Tensor]] = {}
    for g in gradients:
        sharded: Any = g if hasattr(g, "full_tensor") else None
        layout = None if sharded is None else (sharded.device_mesh, sharded.placements)
        groups.setdefault(layout, []).append(g._values() if g.is_sparse else g)
    found: list[Tensor] = []
    for layout, group in groups.items():
        each = signals.l2_of_each(group)
        if layout is None:
            found.append(torch.stack([n.to(device, non_blocking=True) for n in each]))
        else:
            whole: Any = torch.stack(each)
            found.append(whole.full_tensor().to(device, non_blocking=True))
    return signals.l2(found[0] if len(found) == 1 else torch.cat(found))


def _versions(gradients: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(g), g._version) for g in gradients]


def armed(
    optimizers: Sequence[Optimizer],
    limit: Limit | None = None,
    *,
    put_back: Sequence[Optimizer] = (),
    buffers: Buffers | None = None,
    on_fault: Callable[[Exception], None],
) -> list[Gate]:
    """A gate for each optimizer. put_back: those that do not honour ``found_inf``. buffers: of the model, put back as well."""
    ways: list[Means] = [PutBack(o) if any(o is other for other in put_back) else FoundInf(o) for o in optimizers]
    return [Gate(o, way, limit, on_fault, buffers) for o, way in zip(optimizers, ways, strict=True)]


def _eager(hook: Callable[..., None]) -> Any:
    """Inside of a compiled step the hook runs as it is; the compiler is loaded by now, for every optimizer loads it."""
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


# Hooks hold the gate weakly.


def _before(mine: weakref.ref[Gate], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gate = mine()
    if gate is not None:
        gate.before(closure=(kwargs.get("closure") or (args[1] if len(args) > 1 else None)) is not None)


def _after(mine: weakref.ref[Gate], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gate = mine()
    if gate is not None:
        gate.after()


def _disarm(means: Means, hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    means.disarm()
