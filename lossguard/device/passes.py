"""What the forward passes of a sampled step show: outputs of modules, inputs, softmax logits. Never reads a value.

Module calls flow in, from hooks or from compiled code; numbers go to the row of their device, and the graph behind the
first recorded loss tells which module is the head, which activations need no look and which parameters stand behind a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossguard.device import graph, shards, signals
from lossguard.device.extras import Extras
from lossguard.device.forward import SMALL, Forward, Site
from lossguard.device.logits import logits_numbers
from lossguard.device.outputs import addresses, first_tensor, float_tensors, watched
from lossguard.device.tape import Row

MAX_HEADS = 16  # explicit softmax modules watched besides the one at the loss
SOFTMAXES = ("Softmax", "LogSoftmax")
MAX_INPUTS = 4  # float inputs of the first module watched

_task = torch._C._current_graph_task_id  # -1 outside of backward passes


class Passes:
    """The forward passes of one model. row: the row of a device, made at first sight."""

    def __init__(self, model: nn.Module, extras: Extras, row: Callable[[torch.device], Row]) -> None:
        self.model, self.extras, self.row = model, extras, row
        self.forward = Forward()
        self.heads: list[str] = ["loss"]
        self.graph: graph.GraphFacts | None = None
        self.targets: Tensor | None = None
        self.batch_rows: int | None = None
        self.fired: set[str] = set()  # modules whose hook ever fired
        self.looks_inside = False  # whether compiled code is looked into
        self.modules = watched(model)
        self.asked = self.modules
        self._dense = True
        self._few: tuple[int, dict[int, tuple[str, str]]] = (-1, {})  # how many modules were covered, and those that are not
        self._ordinary: dict[int, Site] = {}  # modules of whose outputs nothing but the common signals is taken
        self._producers: dict[Any, str] = {}  # graph node -> module call, in the first recorded step only
        self._inside: list[tuple[str, tuple[int, ...]]] = []  # module calls in compiled code, in the first recorded step only, and their shapes
        self._anchors: Mapping[int, Sequence[str]] = {}
        self._head_seen = False
        self._criterion_seen = False  # an nn.CrossEntropyLoss shows logits and targets by itself
        self._first_module = True
        self._opening = ""  # the module that is called first in a step
        self._shown: Any = None  # the inputs of this step's batch, as they were shown
        self._rows: list[int] = []  # how many samples each of its calls was given in this step

    def show(self, inputs: Any, targets: Any) -> None:
        """The batch of the step that is being recorded."""
        self._shown, self.targets = inputs, targets if isinstance(targets, Tensor) else None

    def begin(self, *, every_module: bool) -> None:
        """A new step starts. every_module: look at modules too whose output shows in the activation that follows."""
        self._dense = every_module
        self.asked = self.modules if every_module else self._needed()
        self.targets = self._shown = None
        self._head_seen, self._first_module = False, True
        self._rows.clear()
        self.elements = 0
        self._anchors = {}
        self._inside.clear()
        self._producers.clear()
        self.forward.begin()

    def rebuild(self) -> None:
        """Modules may have come or gone."""
        self.modules = watched(self.model)
        self._few = (-1, {})
        self._ordinary.clear()

    def again(self, module: nn.Module, output: Any) -> bool:
        """Whether this was an ordinary module's call, whose output is looked at now: what :meth:`module_called` would do, at a fifth of its price."""
        site = None if self._dense else self._ordinary.get(id(module))
        if site is None or type(output) is not Tensor or not module.training or self.extras.may_bootstrap:
            return False
        return torch.is_grad_enabled() and _task() == -1 and self.forward.again(site, output)

    def module_called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward pass of a module that is ``asked`` ended. Recomputations and evaluation are passed over."""
        if not torch.is_grad_enabled():
            self.extras.ran_without_gradients(module)
        if not module.training or _task() != -1:  # an activation checkpoint recomputes: counted already
            self.extras.in_evaluation = self.extras.in_evaluation or (not module.training and torch.is_grad_enabled())
            return
        if self.extras.may_bootstrap and torch.is_grad_enabled():
            self.extras.ran_with_gradients(module)
        self._record_module(module, *self.asked[id(module)], args, output)

    def called_inside(self, name: str, kind: str, given: tuple[Tensor, ...], output: Tensor, graded: bool) -> None:
        """The forward pass of a module ended inside compiled code, whose memory is the compiler's: small outputs are copied."""
        if not output.is_floating_point():
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
        if torch.is_grad_enabled() and len(args) == 2 and isinstance(args[0], Tensor) and _task() == -1:
            self._criterion_seen = True
            self._logits(args[0], 1 if args[0].dim() > 1 else 0, args[1])

    def handed(self, logits: Tensor) -> None:
        """The softmax's input as the loop gives it; it counts more than what was found."""
        self._head_seen = False
        self._logits(logits, -1, self.targets)

    def finish(self, losses: Sequence[Tensor]) -> bool:
        """The step is over. Whether the graph was read, which happens once."""
        self.forward.finish(self.row)
        read = self.graph is None and any(loss.grad_fn is not None for loss in losses)
        if read:
            self._read_graph(losses)
        self._producers.clear()
        return read

    def new_modules(self) -> dict[str, str]:
        """Modules that came since they were last listed."""
        return {name: "new since modules were last listed" for i, (name, _) in watched(self.model).items() if i not in self.modules}

    # ---- inside

    def _needed(self) -> dict[int, tuple[str, str]]:
        """The modules whose outputs no module behind them shows."""
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
            self._opening = name
        if name == self._opening:
            self.elements += tensor.numel() // max(1, tensor.shape[0] if tensor.dim() else 1)
            self._see_input(args)
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

    def _see_input(self, args: tuple[Any, ...]) -> None:
        """The module that is called first is given something: the batch, a part of it, or a state to act on. Of several the one of most samples counts."""
        leaves = [x for _, x in zip(range(MAX_INPUTS), float_tensors(args), strict=False)]
        if not leaves:
            return
        rows = leaves[0].shape[0] if leaves[0].dim() > 1 else 1
        more = not self._rows or rows > max(self._rows)
        self._rows.append(rows)
        if not more:
            return
        shown = [x for _, x in zip(range(MAX_INPUTS), float_tensors(self._shown), strict=False) if x.device == leaves[0].device]
        if shown and shown[0].numel() > leaves[0].numel() and (leaves[0].dim() < shown[0].dim() or rows == 1):
            leaves = shown  # the network sees one place of a sequence at a time, or acts on single states first
        self.batch_rows = leaves[0].shape[0] if leaves[0].dim() > 1 else None
        with torch.no_grad():
            norms = [signals.l2(x) for x in leaves]
        self.row(leaves[0].device).add_scalars("input_rms", np.arange(len(leaves)), norms, np.array([x.numel() ** -0.5 for x in leaves]))

    @property
    def acts(self) -> bool:
        """The network was given single samples besides batches: it acts to get its data."""
        return 1 in self._rows and max(self._rows) > 1

    @property
    def in_parts(self) -> bool:
        """No batch was shown, and the network was given as many samples three times: places of a sequence, perhaps."""
        return self._shown is None and len(self._rows) > len(set(self._rows)) + 1

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

    def _read_graph(self, losses: Sequence[Tensor]) -> None:
        relus = {s.name for s in self.forward.sites if s.kind in signals.RELU_KINDS}
        self.graph = graph.read(losses, self._producers, {node for node, name in self._producers.items() if name in relus}, self._inside)
        if any(name in relus for name, _ in self._inside):
            self.graph.relu_parameters.clear()  # the graph does not tell its ReLUs from those that were seen inside compiled code
