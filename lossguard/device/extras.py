"""What a sampled step records besides banks and module outputs; each part costs nothing where it does not apply.

The recorder's phases flow in, numbers flow into its rows: headroom and rounding of halves, frozen parameters that the
optimizer moves, constant weights at the start, attention logits behind fused kernels, updates without any gradient,
learning rates of 0, parameters that move though no optimizer holds them. Never reads a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import shards, signals
from lossguard.device.attention import AttentionLogits
from lossguard.device.halves import Halves, RowOf
from lossguard.device.roles import Trained
from lossguard.device.tape import Row

FROZEN = 16  # frozen parameters with a left-over gradient looked at
FROZEN_ELEMENTS = 4096  # the first elements of each
OUTSIDE = 16  # parameters in no optimizer looked at, the first elements of each as well
ABRUPT = 0.5  # of a group's largest rate: from above it a rate of 0 was not approached; our own choice
BORN = 256  # matrices looked at once for weights that are all equal
BORN_ELEMENTS = 64  # of each
SYMMETRIC = ("Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "MultiheadAttention")


class Extras:
    """The parts, and when each is asked. ``facts`` is what the host knows of this step, to be merged into the recorder's."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.halves, self.attention = Halves(), AttentionLogits()
        self._model, self._optimizers = model, optimizers
        self._trained: Sequence[Trained] = ()
        self._frozen: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # optimizer -> tensors, copies
        self._born_seen = False
        self._without: set[int] = set()  # modules in training mode that ran without gradients in this step
        self._bootstraps = False  # one of them ran again, with gradients
        self.in_evaluation = False  # a module in evaluation mode ran with gradients in this step
        self._evaluated: set[bool] = set()  # the modes (training or not) in which modules ran without gradients since the last step
        self._outside: tuple[list[Tensor], list[Tensor]] = ([], [])  # in no optimizer; copies of the sample before
        self._void: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # optimizer that steps without any gradient -> tensors, copies
        self._fed: set[int] = set()  # optimizers that step with a gradient
        self._rates: dict[tuple[int, int], tuple[float, float]] = {}  # group -> its largest rate so far, and its last one that was not 0

    def plan(self, trained: Sequence[Trained]) -> None:
        """The parameters are listed anew."""
        self._trained = trained
        held_by_none: list[Tensor] = [t.tensor for t in trained if t.optimizer < 0 and _readable(t.tensor)]
        outside = held_by_none[:OUTSIDE]
        if list(map(id, outside)) != list(map(id, self._outside[0])):  # else the copies still tell whether they move
            self._outside = outside, []
        self.halves.plan(trained)

    def begin(self) -> None:
        """A new step."""
        self.halves.begin()
        self.attention.begin()
        self._frozen.clear()
        self._void.clear()
        self._fed.clear()
        self._evaluated.clear()
        self._without.clear()
        self._bootstraps = self.in_evaluation = False

    def module_called(self, site: int, name: str, kind: str, args: tuple[Any, ...], output: Tensor, row: Row) -> None:
        """A watched module's forward pass ended."""
        self.halves.output(site, kind, output, row)
        self.attention.module_called(site, name, kind, args, output, row)

    def ran_without_gradients(self, module: nn.Module) -> None:
        """A watched module was called under no_grad: an evaluation, or a part of a step."""
        self._evaluated.add(module.training)
        if module.training:
            self._without.add(id(module))

    def ran_with_gradients(self, module: nn.Module) -> None:
        """A watched module was called as part of the loss. If it ran without gradients before, in the same step, that may have made the targets."""
        self._bootstraps = self._bootstraps or id(module) in self._without

    @property
    def may_bootstrap(self) -> bool:
        """Whether some module ran without gradients in this step."""
        return len(self._without) > 0

    @property
    def evaluated_in_training_mode(self) -> bool:
        """Since the last step modules ran without gradients, all of them in training mode, and in the model dropout or batch norm is at work."""
        return self._evaluated == {True} and any(_has_modes(m) for m in self._model.modules())

    def wants(self, site: int, output: Tensor) -> bool:
        """Whether this module's outputs must go on being shown here."""
        return output.dtype == torch.float16 or site in self.attention.sites

    def backward_done(self, row_of: RowOf, *, scaled: bool) -> None:
        """Gradients are there. scaled: by a loss scaler, which seeks the end of float16 by design."""
        if not scaled:
            self.halves.gradients(row_of)
        if not self._born_seen and self._trained:
            self._born_seen = True
            self._look_at_birth(row_of)

    def finish(self, facts: dict[str, Any], row_of: RowOf) -> None:
        """The step is over: have the parameters that no optimizer holds moved since the sample before?"""
        if self._bootstraps:
            facts["bootstraps"] = 1.0
        if self.in_evaluation:
            facts["in_evaluation"] = 1.0
        tensors, copies = self._outside
        if not tensors:
            return
        facts["outside"] = len(tensors)
        for k, (p, copy) in enumerate(zip(tensors, copies, strict=False)):
            row_of(p.device).add_scalars("outside_update", np.array([k], dtype=np.intp), [signals.l2(_first(p) - copy)])
        self._outside = tensors, [_first(p).clone() for p in tensors]

    def before_update(self, index: int) -> None:
        """An optimizer is about to step: keep what it must not move. A parameter without a gradient it leaves alone anyway."""
        self.halves.before_update(index)
        groups = self._optimizers[index].param_groups
        if any(p.grad is not None for group in groups for p in group["params"]):
            self._fed.add(index)
            self._void.pop(index, None)
        else:
            some = [p for group in groups for p in group["params"] if _readable(p)][:FROZEN]
            self._void[index] = some, [_first(p).clone() for p in some]
        frozen = [p for group in groups for p in group["params"] if not p.requires_grad and p.grad is not None]
        frozen = [p for p in frozen if _readable(p)][:FROZEN]
        if frozen and any(p.requires_grad for group in groups for p in group["params"]):  # else somebody computes gradients by hand
            self._frozen[index] = frozen, [_first(p).clone() for p in frozen]

    def after_update(self, index: int, facts: dict[str, Any], row_of: RowOf) -> None:
        """It stepped."""
        self.halves.after_update(index, row_of)
        for k, (p, copy) in enumerate(zip(*self._void.get(index, ([], [])), strict=True)):
            row_of(p.device).add_scalars("void_update", np.array([k], dtype=np.intp), [signals.l2(_first(p) - copy)])
        facts["void"] = 1.0 if self._void and not self._fed else 0.0
        self._look_at_rates(index, facts)
        tensors, copies = self._frozen.pop(index, ([], []))
        if not tensors:
            return
        names = {id(p): name for name, p in self._model.named_parameters()}
        facts["frozen"] = known = (*facts.get("frozen", ()), *(names.get(id(p), "a parameter outside of the model") for p in tensors))
        first = len(known) - len(tensors)
        for k, (p, copy) in enumerate(zip(tensors, copies, strict=True), first):
            row_of(p.device).add_scalars("frozen_update", np.array([k], dtype=np.intp), [signals.l2(_first(p) - copy)])

    # ---- inside

    def _look_at_rates(self, index: int, facts: dict[str, Any]) -> None:
        """Which parameters have a learning rate of exactly 0, and whether it was approached. Rates on a device are not read."""
        groups = self._optimizers[index].param_groups
        rates = [g["lr"] if isinstance(g.get("lr"), (int, float)) else math.nan for g in groups]
        resting: set[int] = set()
        for k, rate in enumerate(rates):
            top, last = self._rates.get((index, k), (0.0, 0.0))
            self._rates[index, k] = max(top, rate), rate if rate > 0 else last
            if rate == 0:
                resting.update(id(p) for p in groups[k]["params"])
                facts["rate_cut"] = max(facts.get("rate_cut", 0.0), 1.0 if last > ABRUPT * top else 0.0)
        if resting:
            facts["resting"] = (*facts.get("resting", ()), *(i for i, t in enumerate(self._trained) if id(t.tensor) in resting))

    def _look_at_birth(self, row_of: RowOf) -> None:
        """Once: the range of a few elements of each matrix whose rows are units that must differ; 0 says that they do not."""
        able = [(i, t.tensor.detach()) for i, t in enumerate(self._trained) if t.kind == "matrix" and t.module in SYMMETRIC and _is_matrix(t.tensor)]
        for device in {p.device for _, p in able}:
            some = [(i, p) for i, p in able if p.device == device][:BORN]
            rows = torch.stack([p.reshape(-1)[:: max(1, p.numel() // BORN_ELEMENTS - 1) | 1][:BORN_ELEMENTS].to(torch.float32) for _, p in some])
            row_of(device).add("weight_range", np.array([i for i, _ in some], dtype=np.intp), rows.amax(dim=1) - rows.amin(dim=1))


def _has_modes(module: nn.Module) -> bool:
    """Whether a module does something else in evaluation, and is in training mode."""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return module.training and (dropout or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats))


def _is_matrix(p: Tensor) -> bool:
    """At least two rows of at least two elements, readable at no cost."""
    plain = p.layout == torch.strided and p.is_floating_point() and not hasattr(p, "_local_tensor") and p.is_contiguous()
    return plain and p.dim() >= 2 and p.shape[0] >= 2 and p.numel() >= max(2 * p.shape[0], BORN_ELEMENTS)


def _readable(p: Tensor) -> bool:
    """Whether a few of its elements can be looked at on this rank."""
    return p.layout == torch.strided and p.numel() > 0 and shards.own(p).numel() > 0


def _first(p: Tensor) -> Tensor:
    """The first elements of a parameter, of a sharded one those of this rank's part."""
    return shards.own(p).detach().reshape(-1)[:FROZEN_ELEMENTS]
