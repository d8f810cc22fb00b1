"""What the make of a network says of a loss that stands still: dropout that leaves nothing, layers without an activation between, a layer
of one unit. A history's host-known notes flow in; causes with remedies flow out; numpy only.

Each of these is a choice that somebody may have made on purpose. It is a cause only beside a loss that does not fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import History

Pairs = list[tuple[Cause, Sequence[Remedy]]]
STRONG = 0.85  # dropout probability above which a layer is nearly always lost; our own choice: published recipes stay at 0.8 or below
STALE = 0.5  # of batch-norm's running statistics that are still those of the first step: evaluation then uses made-up ones for the most part
USUAL = 0.5  # of Srivastava et al. 2014, for hidden layers
FROZEN = 0.5  # share of the model's parameter tensors, from which on; our own choice
NEAR = 0.9  # of the cross entropy of a guess; our own choice
NARROW = 1  # units of a layer through which three classes or more cannot be told apart by a linear head
HIDDEN = ("Linear", "Conv")  # parts of the names of module classes that make a layer


def classes(history: History) -> int:
    """How many classes a classifier chooses from: the width of what gives its logits; 0 if unknown."""
    if history.loss_family == "binary":
        return 2
    head = history.notes.get("head")
    if history.loss_family != "cross_entropy" or not head:
        return 0
    return next((u.width for u in history.units if u.name == head), 0)


def chance(history: History) -> float:
    """The cross entropy of equally likely classes, ln C; NaN where it is no classifier's loss or C is unknown."""
    many = classes(history)
    return math.log(many) if many >= 2 and not history.notes.get("loss_is_summed") else math.nan


def faults(history: History) -> Pairs:
    """What in the network's make keeps a loss from falling."""
    found = (dropout(history), _frozen(history), _linear(history), _narrow(history))
    return [pair for pair in found if pair is not None]


def stale_statistics(history: History) -> tuple[Cause, Sequence[Remedy]] | None:
    """Batch-norm's running statistics have hardly left those that they began with, and evaluation normalises by them."""
    momentum = history.notes.get("least_norm_momentum")
    if momentum is None or not 0 <= momentum < 1:
        return None
    left = (1.0 - momentum) ** (history.step + 1)
    if not left > STALE:
        return None
    because = f"at momentum {number(momentum)}, {left:.0%} of the running statistics are still the initial ones after {history.step + 1} steps"
    return Cause("batch norm statistics", 0.9, because), [Remedy(f"batch-norm momentum {number(momentum)} -> 0.1", {"norm_momentum": 0.1})]


def dropout(history: History) -> tuple[Cause, Sequence[Remedy]] | None:
    """A dropout that leaves next to nothing of a layer."""
    p = float(history.notes.get("largest_dropout") or 0.0)
    if not p > STRONG:
        return None
    because = f"a dropout of {number(p)} passes {1 - p:.0%} of a layer's units on"
    return Cause("dropout too high", 0.85, because), [Remedy(f"dropout {number(p)} -> {USUAL}", {"dropout": USUAL})]


def _frozen(history: History) -> tuple[Cause, Sequence[Remedy]] | None:
    """Half of the layers or more are declared frozen, and the loss stands no lower than that of a guess: what is frozen was never trained."""
    share, guess, first = float(history.notes.get("frozen_share") or 0.0), chance(history), history.first_losses(1)
    if not share >= FROZEN or not first.size or not first[0] > NEAR * guess:
        return None
    because = f"{share:.0%} of the model's parameter tensors do not require a gradient"
    return Cause("frozen by mistake", 0.7, because), [Remedy("set requires_grad_(True) on what was not trained before", {"unfreeze": True})]


def _linear(history: History) -> tuple[Cause, Sequence[Remedy]] | None:
    first, second = history.notes.get("linear_chain") or ("", "")
    if not first:
        return None
    because = f"{first} and {second} are linear with nothing between them: together they are one linear layer"
    return Cause("no nonlinearity", 0.75, because), [Remedy(f"put a ReLU between {first} and {second}", {"activation": "relu", "parameter": first})]


def _narrow(history: History) -> tuple[Cause, Sequence[Remedy]] | None:
    head = str(history.notes.get("head") or "")
    if classes(history) < 3:
        return None
    thin = [u.name for u in history.units if u.width == NARROW and u.kind.startswith(HIDDEN) and u.name != head]
    if not thin:
        return None
    because = f"{thin[0]} has a single unit, and {classes(history)} classes must pass through it"
    return Cause("too little capacity", 0.75, because), [Remedy(f"widen {thin[0]} to 16 units or more", {"parameter": thin[0]})]
