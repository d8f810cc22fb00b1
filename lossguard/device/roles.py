"""Which parameters a run trains, and what each is: names, kinds, owners. Decided once, on the host, from Python objects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device.bank import why_not

MAX_PARTS = 256  # of a list or dict that are looked at: modules stand in short ones
MATRIX_ELEMENTS = 64  # a weight with fewer elements is judged like a vector: its statistics are too noisy


@dataclass
class Trained:
    """One trainable parameter: its name in the model, the tensor, its kind (see ``history.Param``), its optimizer's index."""

    name: str
    tensor: nn.Parameter
    kind: str
    optimizer: int
    module: str


@dataclass
class Roster:
    """All trainable parameters in model order, and what does not fit between model and optimizers."""

    trained: list[Trained] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # trainable, but held by no optimizer
    foreign: int = 0  # held by an optimizer, but not the model's
    unread: dict[str, str] = field(default_factory=dict)  # name -> why it cannot be measured
    unregistered: dict[str, int] = field(default_factory=dict)  # name -> id of those that stand where torch does not see them, and no optimizer holds


def read(model: nn.Module, optimizers: Sequence[Optimizer]) -> Roster:
    """Go through the model's parameters (shared ones once) and the optimizers' groups."""
    owner = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    roster, own = Roster(), set()
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        own.add(id(p))
        if not p.requires_grad:
            continue
        holder = modules.get(name.rpartition(".")[0], model)
        optimizer = owner.get(id(p), -1)
        roster.trained.append(Trained(name, p, _kind(p, holder), optimizer, type(holder).__name__))
        if optimizer < 0:
            roster.missing.append(name)
        reason = why_not(p)
        if reason is not None:
            roster.unread[name] = reason
    roster.foreign = sum(1 for i in owner if i not in own)
    roster.unregistered = {name: id(p) for name, p in _in_containers(modules) if id(p) not in owner and id(p) not in own}
    return roster


def _in_containers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters of modules in plain lists, tuples and dicts: only what an attribute holds itself, or an ``nn.ModuleList``, is registered."""
    for place, module in modules.items():
        for name, held in vars(module).items():
            parts = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, (list, tuple)) else ()
            for key, part in itertools.islice(parts, MAX_PARTS):
                if isinstance(part, nn.Module):
                    where = f"{place}.{name}[{key!r}]" if place else f"{name}[{key!r}]"
                    yield from ((f"{where}.{inner}", p) for inner, p in part.named_parameters() if p.requires_grad)


def signature(optimizers: Sequence[Optimizer]) -> tuple[int, ...]:
    """Changes when a parameter group is added, a parameter is frozen or thawed, or takes another precision."""
    groups = [group for o in optimizers for group in o.param_groups]
    trained = [p for g in groups for p in g["params"] if p.requires_grad]
    which = hash(tuple(map(id, trained)))  # as many may thaw as freeze
    return (*(len(g["params"]) for g in groups), which, sum(p.element_size() for p in trained))


def trainable(model: nn.Module) -> int:
    """How many parameters of the model want a gradient."""
    return sum(p.requires_grad for p in model.parameters())


def settings(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What the groups are set to, as facts: the largest learning rate, momentum and decay that are host numbers. A rate of NaN is the largest.

    Momentum is the part of the mean of gradients that stays from step to step: Adam's first beta too.
    """
    groups = [g for o in optimizers for g in o.param_groups]
    facts: dict[str, Any] = {"optimizer_name": type(optimizers[0]).__name__}
    rates = [g["lr"] for g in groups if "lr" in g and not isinstance(g["lr"], Tensor)]
    if rates:
        facts["lr"] = max((float(r) for r in rates), key=lambda rate: (math.isnan(rate), rate))
    decays = [g["weight_decay"] for g in groups if isinstance(g.get("weight_decay"), (int, float)) and g["weight_decay"] > 0]
    if decays:
        decoupled = any(g.get("decoupled_weight_decay") for g in groups) or type(optimizers[0]).__name__.endswith("W")
        facts.update(weight_decay=max(decays), decay_is_decoupled=1.0 if decoupled else 0.0)
    momenta = [g["momentum"] if "momentum" in g else (g.get("betas") or (0.0,))[0] for g in groups]
    facts["momentum"] = max([m for m in momenta if isinstance(m, (int, float))], default=0.0)
    eps = [g["eps"] for g in groups if isinstance(g.get("eps"), float)]
    if eps:
        facts["adam_eps"] = max(eps)
    return facts


def _kind(p: Tensor, holder: nn.Module) -> str:
    if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if "Norm" in type(holder).__name__:
        return "norm"
    if nn.parameter.is_lazy(p):
        return "matrix"
    return "matrix" if p.dim() >= 2 and p.numel() >= MATRIX_ELEMENTS else "vector"


def unscaled(scaler: Any, optimizer: Optimizer) -> bool:
    """Whether the gradients at the update have their true scale (a fused step under a scaler unscales inside)."""
    if scaler is None:
        return True
    states: Mapping[int, Mapping[str, Any]] = getattr(scaler, "_per_optimizer_states", {})
    stage = states.get(id(optimizer), {}).get("stage")
    return getattr(stage, "name", "") == "UNSCALED" or not getattr(optimizer, "_step_supports_amp_scaling", False)
