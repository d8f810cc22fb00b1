"""The bench on which checks work: copies of model and criterion, kept batches, and shared readings made once.

The user's model, batches, criterion and optimizers flow in; ``Pass`` records flow out. What runs here runs on copies;
where a model cannot be copied it runs on the original, under a keeper that puts everything back when the twin is done.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import graph
from lossguard.findings import Finding
from lossguard.preflight.alone import OutOfTime, groups, unsynchronised
from lossguard.preflight.keep import Keeper
from lossguard.preflight.listen import LabelFault, Listener, LossCall, total_of
from lossguard.preflight.take import Sample, chosen, fresh, mapped, sizes

PASSES = 3  # batches whose first loss is looked at; survey, initial_loss_off
STOCHASTIC = ("DropPath", "StochasticDepth", "DropBlock")  # modules that drop at random without torch's own dropout
SLOW = 1 / 200  # of the time budget for one pass, from which batches are cut: some 200 passes are made
FEW = 8  # samples to which they are cut
SAME = 1e-4  # relative difference up to which two losses are called equal: float32 sums of some thousand terms
Forward = Callable[[Any, Any], tuple[Any, Any]]


def default_forward(model: Any, batch: Any) -> tuple[Any, Any]:
    """``(model(batch[0]), batch[1])``, with the batch on the model's device; ``model(*batch[0])`` where that is a tuple and the model asks for as many."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        raise ValueError(f"a batch is a {type(batch).__name__}, expected (inputs, targets); say how to use it: forward=lambda model, batch: (outputs, targets)")
    inputs, targets = (mapped(part, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf) for part in batch[:2])
    several = isinstance(inputs, (list, tuple)) and 1 < len(inputs) == _asked_for(model)
    return (model(*inputs) if several else model(inputs)), targets


def _asked_for(model: Any) -> int:
    """How many arguments the model cannot do without; 0 if it does not say."""
    try:
        given = inspect.signature(model.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return 0
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given)


@dataclass
class Pass:
    """One forward pass and its loss: values detached, or the error that ended it."""

    outputs: Any = None
    targets: Any = None
    loss: float = float("nan")
    calls: list[LossCall] = field(default_factory=list)
    family: str = "unknown"
    error: str = ""
    value: Tensor | None = None  # the loss with its graph, where it was asked for

    @property
    def call(self) -> LossCall | None:
        """The loss function's call where it was the only one."""
        return self.calls[0] if len(self.calls) == 1 else None

    @property
    def pure(self) -> LossCall | None:
        """The call whose value is the whole loss."""
        call = self.call
        if call is None or call.value is None or call.value.dim():
            return None
        value = float(call.value)
        return call if value != value or abs(value - self.loss) <= SAME * max(abs(value), abs(self.loss), 1e-12) else None


class Twin:
    """A model and its criterion to be run, trained and spoiled."""

    def __init__(self, model: nn.Module, criterion: Any, forward: Forward, end: float = math.inf) -> None:
        self.model, self.criterion, self._forward, self._end = model, criterion, forward, end

    def run(self, batch: Any, *, mode: str = "calm", grad: bool = False, quiet: bool | None = None, into: Pass | None = None) -> Pass:
        """One pass. mode: "train" as training does, "calm" the same without dropout, "eval". Raises what the user's code raises, and ``OutOfTime``."""
        if time.monotonic() > self._end:
            raise OutOfTime
        self.set(mode)
        done = Pass() if into is None else into
        with Listener(quiet=mode == "calm" if quiet is None else quiet) as listener:
            done.calls = listener.calls
            done.outputs, done.targets = self._forward(self.model, fresh(batch))
            value = total_of(self.criterion(done.outputs, done.targets))
        done.loss = float(value.detach())
        if value.requires_grad:
            known = graph.read([value], {}).loss_family
            done.family = done.call.family if done.call is not None else known
        done.outputs, done.targets = (mapped(t, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf) for t in (done.outputs, done.targets))
        done.value = value if grad else None
        return done

    def try_run(self, batch: Any, *, mode: str = "calm", quiet: bool | None = None) -> Pass:
        """The same, with the error in words instead of raised; the calls heard until then are kept."""
        done = Pass()
        try:
            return self.run(batch, mode=mode, quiet=quiet, into=done)
        except Exception as error:
            done.error = told(error)
            return done

    def set(self, mode: str) -> None:
        """Training flags: as they are in the user's model if that is in training mode, else all on."""
        if mode == "eval":
            self.model.eval()
        else:
            for module, flag in self.flags.items():
                module.training = flag
            if mode == "calm":
                for module in self.model.modules():
                    if any(name in type(module).__name__ for name in STOCHASTIC):
                        module.training = False
        if isinstance(self.criterion, nn.Module):
            self.criterion.train(mode != "eval")

    @cached_property
    def flags(self) -> dict[nn.Module, bool]:
        """The training flag of each module as a training loop would have it."""
        if not self.model.training:
            return dict.fromkeys(self.model.modules(), True)
        return {module: module.training for module in self.model.modules()}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that ask for gradients, the criterion's among them."""
        found = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if isinstance(self.criterion, nn.Module):
            held = {id(p) for p in found.values()}
            found.update({f"criterion.{n}": p for n, p in self.criterion.named_parameters() if p.requires_grad and id(p) not in held})
        return found

    def thaw(self) -> None:
        """Let gradients into every parameter, so that the graph shows the whole model."""
        for p in self.model.parameters():
            if p.is_floating_point():
                p.requires_grad_(True)


class Bench:
    """What the checks share. ``found`` holds the findings of the checks before."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        optimizers: Sequence[Optimizer],
        forward: Forward | None,
        sample: Sample,
        seconds: float,
        roots: Sequence[Any],
        started: float,
    ) -> None:
        self.model, self.criterion, self.optimizers, self.sample = model, criterion, list(optimizers), sample
        self.forward = default_forward if forward is None else forward
        self.seconds, self._started, self._roots = seconds, started, roots
        self.found: list[Finding] = []
        self._copies = True
        self._prepare()

    @property
    def kept(self) -> list[Any]:
        """The first batches."""
        return self.sample.kept

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.seconds - (time.monotonic() - self._started)

    def _prepare(self) -> None:
        """Find out whether copies can be made and are used by ``forward``; cut the batches of a slow model."""
        try:
            copy.deepcopy((self.model, self.criterion), self._shared)
        except Exception:
            self._copies = False
        if not self.kept or self.left <= 0:
            return
        called: list[str] = []
        with self.twin() as twin:
            handles = [m.register_forward_pre_hook(lambda *_: called.append("")) for m in twin.model.modules()]
            began = time.monotonic()
            done = twin.try_run(self.kept[0])
            took = time.monotonic() - began
            for handle in handles:
                handle.remove()
        self._copies &= bool(called) or bool(done.error)
        if took > SLOW * self.seconds:
            self.sample.kept = [_cut(batch) for batch in self.kept]

    def deadline(self, share: float) -> float:
        """When a check must stop that may use this share of the budget, on the monotonic clock."""
        return time.monotonic() + min(share * self.seconds, max(self.left, 0.0))

    @contextmanager
    def twin(self, *, thawed: bool = False, flush: bool = True) -> Iterator[Twin]:
        """A copy of model and criterion; or the originals, put back afterwards, where they cannot be copied."""
        model, criterion, keeper = self.model, self.criterion, None
        if self._copies:
            model, criterion = copy.deepcopy((self.model, self.criterion), self._shared)
        else:
            keeper = Keeper(self._roots)
        twin = Twin(model, criterion, self.forward, self._started + self.seconds)
        _seed()
        with unsynchronised(model), unsynchronised(criterion), self._restored(keeper):
            if any(nn.parameter.is_lazy(p) for p in model.parameters()):
                self._materialise(twin)
            if flush:
                for p in model.parameters():
                    p.grad = None
            if thawed:
                twin.thaw()
            yield twin

    @property
    def _shared(self) -> dict[int, Any]:
        """What copies share with the originals."""
        return {**groups(self.model), **groups(self.criterion)}

    @staticmethod
    @contextmanager
    def _restored(keeper: Keeper | None) -> Iterator[None]:
        try:
            yield
        finally:
            if keeper is not None:
                keeper.restore()

    def _materialise(self, twin: Twin) -> None:
        """Lazy layers learn their sizes from a first pass; only a copy can take that."""
        if not self._copies:
            raise ValueError("the model cannot be copied, and its lazy layers have no sizes yet")
        twin.run(self.kept[0])

    @cached_property
    def passes(self) -> list[Pass]:
        """The first batches through an untrained copy, without dropout, with every parameter thawed."""
        done = []
        for batch in self.kept[:PASSES]:
            with self.twin(thawed=True) as twin:
                done.append(twin.try_run(batch))
        return done

    @property
    def sound(self) -> list[Pass]:
        """Those passes that ended well."""
        return [p for p in self.passes if not p.error]

    @property
    def why_no_pass(self) -> str:
        """Why there is no first loss."""
        if not self.kept:
            return self.sample.stopped or "there were no batches"
        hint = "; say how to use a batch: forward=lambda model, batch: (outputs, targets)" if self.forward is default_forward else ""
        return f"the first batch could not be run: {self.passes[0].error}{hint}"

    @property
    def pretrained(self) -> bool:
        """Batch-norm layers have seen batches, or optimizers hold state: training did not begin here."""
        tracked = [b for n, b in self.model.named_buffers() if n.endswith("num_batches_tracked")]
        return any(int(b) > 0 for b in tracked) or any(len(o.state) > 0 for o in self.optimizers)

    def has(self, diagnosis: str, cause: str = "") -> bool:
        """Whether an earlier check found this."""
        return any(f.diagnosis == diagnosis and (not cause or any(cause in c.name for c in f.causes)) for f in self.found)


def _cut(batch: Any) -> Any:
    """The first few samples of a batch, the whole where samples cannot be told apart."""
    found = sizes(batch)
    return chosen(batch, list(range(min(FEW, *found)))) if len(found) == 1 and min(found) > FEW else batch


def _seed() -> None:
    """The same answer whatever came before; the user's random state is put back at the end.

    Not torch.manual_seed: on a CUDA that is not awake yet it leaves a seed behind that comes into force later.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, LabelFault):
        return str(error)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
