"""One step's record on the device: the phases of a step come in, rows of the tape go out. Never reads a value.

The recorder owns banks (parameters), the forward collector and the rows; who calls its phases is not its business
(hooks in a plain loop, a trainer's callbacks elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import graph, roles, shards, signals
from lossguard.device.bank import Bank
from lossguard.device.clearing import Clearing
from lossguard.device.extras import Extras
from lossguard.device.forward import SMALL, Forward, Site
from lossguard.device.functional import GradientRows
from lossguard.device.grouping import banks_of
from lossguard.device.joint import Joint
from lossguard.device.logits import logits_numbers
from lossguard.device.outputs import addresses, first_tensor, float_tensors, watched
from lossguard.device.tape import Layout, Row

MAX_HEADS = 16  # explicit softmax modules watched besides the one at the loss
SOFTMAXES = ("Softmax", "LogSoftmax")
MAX_INPUTS = 4  # float inputs of the first module watched


class Recorder:
    """Everything recorded of one model. ``on`` says whether the current step is a sampled one."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], scaler: Any = None) -> None:
        self.model, self.optimizers, self.scaler = model, optimizers, scaler
        self.roster = roles.Roster()
        self.banks: list[Bank] = []
        self.forward = Forward()
        self.heads: list[str] = ["loss"]
        self.facts: dict[str, Any] = {}
        self.graph: graph.GraphFacts | None = None
        self.targets: Tensor | None = None
        self.on = False
        self.replicated = False  # a wrapper keeps the weights of all ranks equal
        self.printing = False  # whether this step's weights are to be compared over ranks
        self.modules = watched(model)
        self.asked = self.modules
        self._dense = True
        self._few: tuple[int, dict[int, tuple[str, str]]] = (-1, {})  # how many modules were covered, and those that are not
        self._ordinary: dict[int, Site] = {}  # modules of whose outputs nothing but the common signals is taken
        self.fired: set[str] = set()  # modules whose hook ever fired
        self._rows: dict[torch.device, Row] = {}
        self._signature: tuple[int, ...] = ()
        self._producers: dict[Any, str] = {}  # graph node -> module call, in the first recorded step only
        self._head_seen = False
        self._criterion_seen = False  # an nn.CrossEntropyLoss shows logits and targets by itself
        self._first_module = True
        self._batch_rows: int | None = None
        self._kept_before: set[int] = set()  # banks whose weights before the update are kept in this step
        self._updated: set[int] = set()  # optimizers that stepped in this step
        self._missing: dict[int, list[int]] = {}  # bank -> sites without a gradient in the newest backward pass
        self._clearing = Clearing()
        self._carried: dict[str, Any] = {}  # what a step that is not sampled tells of itself: facts of the next sample
        self._functional = GradientRows()
        self.joint = Joint(self.forward.units)
        self.forward.joint = self.joint
        self.looks_inside = False  # whether compiled code is looked into
        self._inside: list[tuple[str, tuple[int, ...]]] = []  # module calls in compiled code, in the first recorded step only, and their shapes
        self._anchors: Mapping[int, Sequence[str]] = {}
        self.extras = Extras(model, optimizers)

    # ---- phases

    def begin(self, sampled: bool, *, every_module: bool = True) -> None:
        """A new step starts. every_module: look at modules too whose output shows in the activation that follows."""
        self.on, self._dense = sampled, every_module
        self.asked = self.modules if every_module else self._needed()
        self.facts = {}
        if sampled:
            self.facts, self._carried = self._carried, {}
        self.targets = None
        self._head_seen, self._first_module = False, True
        self._anchors = {}
        self._inside.clear()
        for held in (self._producers, self._missing, self._kept_before, self._updated):
            held.clear()
        self.forward.begin()
        self.extras.begin()
        self.joint.begin()
        for row in self._rows.values():
            row.discard()

    def module_called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward pass of a module that is ``asked`` ended. Recomputations and evaluation are passed over."""
        if not torch.is_grad_enabled():
            self.extras.ran_without_gradients(module)
        if not module.training or torch._C._current_graph_task_id() != -1:  # an activation checkpoint recomputes: counted already
            return
        site = self._ordinary.get(id(module)) if not self._dense and type(output) is Tensor else None
        if self.extras.may_bootstrap and torch.is_grad_enabled():
            self.extras.ran_with_gradients(module)
        if site is None or not self.forward.keep(site, output):
            self._record_module(module, *self.asked[id(module)], args, output)

    def called_inside(self, name: str, kind: str, given: tuple[Tensor, ...], output: Tensor, graded: bool) -> None:
        """The forward pass of a module ended inside compiled code, whose memory is the compiler's: small outputs are copied."""
        if not self.on or not output.is_floating_point():
            return
        if not graded:
            self.extras.ran_without_gradients(self.model)
        self._record_module(self.model, name, kind, given, output.clone() if output.numel() <= SMALL else output)

    def anchors(self) -> Mapping[int, Sequence[str]]:
        """Address of each watched module's first parameter -> the modules that hold it; looked up once a step."""
        if not self._anchors:
            self._anchors = addresses(self.model, self.modules)
        return self._anchors

    def criterion_called(self, args: tuple[Any, ...]) -> None:
        """A ``nn.CrossEntropyLoss`` was called: its logits, and its targets."""
        if torch.is_grad_enabled() and len(args) == 2 and isinstance(args[0], Tensor) and torch._C._current_graph_task_id() == -1:
            self._criterion_seen = True
            self._logits(args[0], 1 if args[0].dim() > 1 else 0, args[1])

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
                self._head_seen = False
                self._logits(logits, -1, self.targets)
            self.row(self._default_device())
            for k in sorted(self._kept_before):
                self.banks[k].lay(self._row_of(self.banks[k]), closely=self._dense)
                if self.printing and not self.banks[k].sharded:
                    self.banks[k].lay_prints(self.row(self.banks[k].device))
            self.extras.finish(self.facts, self.row)
            self.forward.finish(self.row)
            self.facts.update({"loss_is_safe": graph.safe(losses)} if "forced" in self.facts else {})
            if self.graph is None and any(loss.grad_fn is not None for loss in losses):
                self._read_graph(losses)
        self._producers.clear()
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
        self.modules = watched(self.model)
        self._few = (-1, {})
        self._ordinary.clear()
        self.banks, elements = banks_of(self.roster, self.joint)
        self.forward.fit(elements)
        self._signature = roles.signature(self.optimizers)
        self._kept_before.clear()
        self._functional.forget()
        self.extras.plan(self.roster.trained)
        if self.graph is not None:
            self._functional.plan(self.graph.relu_parameters, self.roster.trained, self.banks, self.forward)

    def unread(self) -> dict[str, str]:
        """What of the model as it is now is not measured, and why."""
        found = dict(self.roster.unread)
        found.update(dict.fromkeys(self.roster.missing, "held by no optimizer"))
        found.update({self.roster.trained[s].name: why for bank in self.banks for s, why in bank.unreadable.items()})
        if self.banks:
            known = {id(t.tensor) for t in self.roster.trained}
            found.update({n: "new since parameters were last listed" for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in known})
        found.update({name: "new since modules were last listed" for i, (name, _) in watched(self.model).items() if i not in self.modules})
        return found

    @property
    def expects_clearing(self) -> bool:
        """Whether the next backward pass shows if gradients were cleared."""
        return self._clearing.pending

    @property
    def outdated(self) -> bool:
        """Whether the optimizers hold other parameters than the banks."""
        return bool(self.banks) and roles.signature(self.optimizers) != self._signature

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(b.nbytes for b in self.banks) + sum(r.nbytes for r in self._rows.values()) + self.forward.nbytes + self._functional.nbytes

    # ---- inside

    def _row_of(self, bank: Bank) -> Any:
        """Where a bank's numbers go: into the row, or to the other ranks first."""
        return self.joint if bank.sharded else self.row(bank.device)

    def _needed(self) -> dict[int, tuple[str, str]]:
        """The modules whose outputs no activation behind them shows."""
        covered = self.forward.covered
        if self._few[0] != len(covered):
            first = self.forward.sites[0].name if self.forward.sites else ""  # what it is given is the input
            always = {name.partition("[")[0] for name in (first, (self.graph.head if self.graph else None) or "")}
            needed = {i: known for i, known in self.modules.items() if known[0] not in covered or known[0] in always}
            self._few = (len(covered), needed)
        return self._few[1]

    def _record_module(self, module: nn.Module, name: str, kind: str, args: tuple[Any, ...], output: Any) -> None:
        self.fired.add(name)
        tensor = output if isinstance(output, Tensor) and output.is_floating_point() else first_tensor(output)
        if tensor is None or tensor.layout != torch.strided or not tensor.numel():
            return
        if shards.is_sharded(tensor):
            self.forward.unwatched.add(f"{name}: its output is sharded across ranks")
            return
        first, self._first_module = self._first_module, False
        if first:
            leaves = [x for _, x in zip(range(MAX_INPUTS), float_tensors(args), strict=False)]
            if leaves:
                self._batch_rows = leaves[0].shape[0] if leaves[0].dim() > 1 else None
                with torch.no_grad():
                    norms = [signals.l2(x) for x in leaves]
                self.row(leaves[0].device).add_scalars("input_rms", np.arange(len(leaves)), norms, np.array([x.numel() ** -0.5 for x in leaves]))
        if self._dense:
            self.forward.follow(name, kind, args[0] if args else None, tensor)
        site = self.forward.add(name, kind, tensor)
        if site is None:
            return
        self.extras.module_called(site.index, site.name, kind, args, tensor, self.row(tensor.device))
        if self.graph is None and tensor.grad_fn is not None:
            self._producers[tensor.grad_fn] = site.name
        elif self.graph is None and module is self.model:
            self._inside.append((site.name, tuple(tensor.shape)))
        elif self.graph is not None and self.graph.head == site.name and not self._criterion_seen:
            self._logits(tensor, self.graph.head_dim if tensor.dim() > 1 else 0, self.targets)
        elif self.graph is not None and not first and kind not in SOFTMAXES and site.name == name and not self.extras.wants(site.index, tensor):
            self._ordinary[id(module)] = site
        if kind in SOFTMAXES and args and isinstance(args[0], Tensor) and args[0].dim():
            self._softmax_module(site.name, args[0], getattr(module, "dim", -1))

    def _softmax_module(self, name: str, logits: Tensor, dim: int | None) -> None:
        if name not in self.heads:
            if len(self.heads) > MAX_HEADS:
                return
            self.heads.append(name)
        with torch.no_grad():
            logits_numbers(self.heads.index(name), logits, -1 if dim is None else dim, None, self.row(logits.device))

    def _logits(self, logits: Any, dim: int, targets: Any) -> None:
        """The softmax at the loss, once a step."""
        if self._head_seen or not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.dim() or not logits.numel():
            return
        self._head_seen = True
        with torch.no_grad():
            logits_numbers(0, logits, dim, targets if isinstance(targets, Tensor) else None, self.row(logits.device))

    def _record_bank(self, k: int, bank: Bank) -> None:
        row = self.row(bank.device)
        if k not in self._kept_before:
            bank.keep_weights()
            self._kept_before.add(k)
        self._missing[k] = bank.keep_gradients()
        missing = sorted(s for sites in self._missing.values() for s in sites)
        self.facts.pop("no_gradient", None)
        self.facts.update({"no_gradient": tuple(missing)} if missing else {})
        self._functional.record(k, bank, self._batch_rows, row)

    def _read_graph(self, losses: Sequence[Tensor]) -> None:
        relus = {s.name for s in self.forward.sites if s.kind in signals.RELU_KINDS}
        self.graph = graph.read(losses, self._producers, {node for node, name in self._producers.items() if name in relus}, self._inside)
        if any(name in relus for name, _ in self._inside):
            self.graph.relu_parameters.clear()  # the graph does not tell its ReLUs from those that were seen inside compiled code
        self._functional.plan(self.graph.relu_parameters, self.roster.trained, self.banks, self.forward)

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
