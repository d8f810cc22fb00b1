"""One step's record on the device: the phases of a step come in, rows of the tape go out. Never reads a value.

The recorder owns banks (parameters), the forward collector and the rows; who calls its phases is not its business
(hooks in a plain loop, a trainer's callbacks elsewhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import criterion, roles
from lossguard.device.bank import Bank
from lossguard.device.clearing import Clearing
from lossguard.device.extras import Extras
from lossguard.device.functional import GradientRows
from lossguard.device.grouping import banks_of
from lossguard.device.joint import Joint
from lossguard.device.passes import Passes
from lossguard.device.tape import Layout, Row

RECOUNT = 8  # sampled steps after which it is asked again how many of the model's parameters are trainable


class Recorder:
    """Everything recorded of one model. ``on`` says whether the current step is a sampled one."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], scaler: Any = None) -> None:
        self.model, self.optimizers, self.scaler = model, optimizers, scaler
        self.roster = roles.Roster()
        self.banks: list[Bank] = []
        self.extras = Extras(model, optimizers)
        self.passes = Passes(model, self.extras, self.row)
        self.facts: dict[str, Any] = {}
        self.on = False
        self.replicated = False  # a wrapper keeps the weights of all ranks equal
        self.printing = False  # whether this step's weights are to be compared over ranks
        self._dense = True
        self._rows: dict[torch.device, Row] = {}
        self._signature: tuple[int, ...] = ()
        self._trainable = self._asked = 0
        self._kept_before: set[int] = set()  # banks whose weights before the update are kept in this step
        self._updated: set[int] = set()  # optimizers that stepped in this step
        self._missing: dict[int, list[int]] = {}  # bank -> sites without a gradient in the newest backward pass
        self._clearing = Clearing()
        self._carried: dict[str, Any] = {}  # what a step that is not sampled tells of itself: facts of the next sample
        self._functional = GradientRows()
        self.joint = Joint(self.passes.forward.units)
        self.passes.forward.joint = self.joint

    # ---- phases

    def begin(self, sampled: bool, *, every_module: bool = True) -> None:
        """A new step starts. every_module: look at modules too whose output shows in the activation that follows."""
        self.on, self._dense = sampled, every_module
        self.facts = {}
        if sampled:
            self.facts, self._carried = self._carried, {}
        for held in (self._missing, self._kept_before, self._updated):
            held.clear()
        self.passes.begin(every_module=every_module)
        self.extras.begin()
        self.joint.begin()
        for row in self._rows.values():
            row.discard()

    def drop(self) -> None:
        """This step is not recorded after all."""
        if self.on:
            self.begin(False, every_module=self._dense)

    def backward_done(self, *, unscaled: bool = False) -> None:
        """All gradients of a backward pass are there, unclipped. Later passes before an update overwrite earlier ones."""
        if not self.banks:
            self.build()
        if self._clearing.pending:
            self._clearing.backward_done(self.banks)
        if not self.on:
            return
        with torch.no_grad():
            if self.scaler is not None and not unscaled and getattr(self.scaler, "_scale", None) is not None:
                self.row(self.scaler._scale.device).add_scalars("loss_scale", np.zeros(1, dtype=np.intp), [self.scaler._scale.clone()])
            for k, bank in enumerate(self.banks):
                if bank.optimizer in self._updated:
                    continue  # already stepped: what arrives now is not its own
                self._record_bank(k, bank)
            self.extras.backward_done(self.row, scaled=self.scaler is not None)

    def before_update(self, index: int) -> None:
        """Optimizer ``index`` is about to step: see what clipping did since the backward pass."""
        if self._clearing.pending:
            self._tell_of_clearing(index)
        if not self.on:
            return
        with torch.no_grad():
            self.extras.before_update(index)
            for k, bank in enumerate(self.banks):
                if bank.optimizer == index and k in self._kept_before and index not in self._updated:
                    if bank.untouched:
                        self.facts["unclipped"] = (*self.facts.get("unclipped", ()), index)
                        continue
                    bank.lay_probes(self._row_of(bank))
                    if bank.probes and all(p.grad is None for _, p in bank.probes):
                        self.facts["cleared"] = 1.0  # after the backward pass, before the step
                    self.facts["probes_unscaled"] = roles.unscaled(self.scaler, self.optimizers[index])

    def after_update(self, index: int) -> None:
        """Optimizer ``index`` stepped. From a sampled step's on it shows whether gradients are cleared."""
        if not self.on:
            return
        for bank in self.banks:
            if bank.optimizer == index:
                self._clearing.updated(bank)
        with torch.no_grad():
            for k, bank in enumerate(self.banks):
                if bank.optimizer == index and k in self._kept_before and index not in self._updated:
                    bank.keep_update()
            self.extras.after_update(index, self.facts, self.row)
        self._updated.add(index)
        self.facts["stepped"] = 1.0
        self._read_rates()

    def finish(self, losses: Sequence[Tensor], logits: Tensor | None) -> list[tuple[Tensor, Layout]]:
        """The step is over: lay every device's numbers down."""
        if not self.banks:
            self.build()
        with torch.no_grad():
            if logits is not None:
                self.passes.handed(logits)
            self.row(self._default_device())
            if not self._kept_before:  # no backward pass was seen: a CUDA graph is replayed, or there was none
                self._keep_weights_alone()
            for k in sorted(self._kept_before):
                self.banks[k].lay(self._row_of(self.banks[k]), closely=self._dense)
                if self.printing and not self.banks[k].sharded:
                    self.banks[k].lay_prints(self.row(self.banks[k].device))
            self.extras.finish(self.facts, self.row)
            if self.passes.elements:
                self.facts["sample_elements"] = self.passes.elements
            if self.passes.acts:
                self.facts["acts"] = 1.0
            if self.passes.in_parts:
                self.facts["input_in_parts"] = 1.0
            if self.passes.finish(losses):
                self._plan()
            if self.passes.graph is not None:
                self.facts.update(self.passes.graph.faults())
            self.facts.update({"loss_is_safe": criterion.safe(losses)} if "forced" in self.facts else {})
        self.facts.setdefault("stepped", 0.0)
        return [row.lay_down() for row in self._rows.values()]

    def join(self, *, measured: bool) -> list[tuple[Tensor, Layout]]:
        """What all ranks measured in this step; to be called at the same steps on every rank, whatever went wrong on this one."""
        with torch.no_grad():
            joined = self.joint.close(self.facts.get("no_gradient", ()), measured=measured)
        return [] if joined is None else [joined]

    def wrapper_called(self, module: nn.parallel.DistributedDataParallel) -> None:
        """A data-parallel wrapper ran: if it is this model's, ranks are in step, unless some may run out of data before others."""
        if not self.joint.on and torch.is_grad_enabled() and not module._join_config.enable:
            first = next(self.model.parameters(), None)
            if first is not None and any(p is first for p in module.parameters()):
                self.joint.follow(module.process_group, first.device)
                self.replicated = module.process_group.size() == torch.distributed.get_world_size()

    def post_mortem(self) -> None:
        """A non-finite number was seen: add the exact norms of all weights as they are now to the row."""
        with torch.no_grad():
            for bank in self.banks:
                if not bank.sharded:  # of which the others would have to tell their parts, and they have no reason to
                    bank.lay_exact_weights(self.row(bank.device))
        self.facts["forced"] = 1.0

    # ---- what is known

    def row(self, device: torch.device) -> Row:
        """The row of a device, made at first sight."""
        row = self._rows.get(device)
        if row is None:
            row = self._rows[device] = Row(device)
        return row

    def build(self) -> None:
        """Group the parameters into banks; again when parameter groups or frozen parameters changed."""
        old, self.roster = self.roster.trained, roles.read(self.model, self.optimizers)
        now = {t.name: t for t in self.roster.trained}
        # a parameter keeps its index for good: one that was frozen meanwhile stays in the list, held by no optimizer
        kept = [now.pop(t.name, replace(t, optimizer=-1)) for t in old]
        self.roster.trained = [*kept, *now.values()]
        self.passes.rebuild()
        self.banks, elements = banks_of(self.roster, self.joint)
        self.passes.forward.fit(elements)
        self._signature, self._trainable = roles.signature(self.optimizers), roles.trainable(self.model)
        self._kept_before.clear()
        self._functional.forget()
        self.extras.plan(self.roster.trained)
        self._plan()

    def unread(self) -> dict[str, str]:
        """What of the model as it is now is not measured, and why."""
        found = dict(self.roster.unread)
        found.update(dict.fromkeys(self.roster.missing, "held by no optimizer"))
        found.update({self.roster.trained[s].name: why for bank in self.banks for s, why in bank.unreadable.items()})
        if self.banks:
            known = {id(t.tensor) for t in self.roster.trained}
            found.update({n: "new since parameters were last listed" for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in known})
        found.update(self.passes.new_modules())
        return found

    @property
    def expects_clearing(self) -> bool:
        """Whether the next backward pass shows if gradients were cleared."""
        return self._clearing.pending

    @property
    def outdated(self) -> bool:
        """Whether the optimizers hold other parameters than the banks, or others of the model's are trainable."""
        self._asked += 1
        if self.banks and self._asked % RECOUNT == 0 and roles.trainable(self.model) != self._trainable:
            return True
        return bool(self.banks) and roles.signature(self.optimizers) != self._signature

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(b.nbytes for b in self.banks) + sum(r.nbytes for r in self._rows.values()) + self.passes.forward.nbytes + self._functional.nbytes

    # ---- inside

    def _row_of(self, bank: Bank) -> Any:
        """Where a bank's numbers go: into the row, or to the other ranks first."""
        return self.joint if bank.sharded else self.row(bank.device)

    def _record_bank(self, k: int, bank: Bank) -> None:
        row = self.row(bank.device)
        if k not in self._kept_before:
            bank.keep_weights()
            self._kept_before.add(k)
        self._missing[k] = bank.keep_gradients()
        missing = sorted(s for sites in self._missing.values() for s in sites)
        self.facts.pop("no_gradient", None)
        self.facts.update({"no_gradient": tuple(missing)} if missing else {})
        self._functional.record(k, bank, self.passes.batch_rows, row)

    def _keep_weights_alone(self) -> None:
        """Weights without gradients or updates: whether they move at all. Not of parts, which only all ranks together can measure."""
        for k, bank in enumerate(self.banks):
            if not bank.sharded:
                bank.keep_weights(alone=True)
                self._kept_before.add(k)

    def _plan(self) -> None:
        if self.passes.graph is not None:
            self._functional.plan(self.passes.graph.relu_parameters, self.roster.trained, self.banks, self.passes.forward)

    def _tell_of_clearing(self, index: int) -> None:
        share = self._clearing.before_update(self.banks, index)
        if share is not None:
            facts = self.facts if self.on else self._carried
            facts["not_cleared"] = max(share, facts.get("not_cleared", 0.0))

    def _read_rates(self) -> None:
        """Learning rates: host numbers become facts, device numbers go through the tape."""
        self.facts.update(roles.settings(self.optimizers))
        device = [g["lr"] for o in self.optimizers for g in o.param_groups if isinstance(g.get("lr"), Tensor)]
        if device and "lr_on_tape" not in self.facts:
            self.facts["lr_on_tape"] = 1.0
            self.row(device[0].device).add_scalars("lr", np.arange(len(device)), [r.detach().clone() for r in device])

    def _default_device(self) -> torch.device:
        return next((b.device for b in self.banks), torch.device("cpu"))
