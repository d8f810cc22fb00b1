"""What a loss is before anything was learned. A recorded loss call flows in; numbers flow out. Nothing of the model is run.

The same loss function is called again, on the same targets with the same arguments, with predictions that know nothing:
so label smoothing, class weights, ignored labels and reductions need no formulas of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossguard.preflight.listen import BINARY, CLASSIFIES, REGRESSES, LossCall


def chance(call: LossCall) -> float | None:
    """The loss of predictions that know nothing: equal probabilities, or each target's mean; None for other losses.

    >>> import torch.nn.functional as F
    >>> from lossguard.preflight.listen import LastOp
    >>> given = {"input": torch.randn(4, 10), "target": torch.tensor([1, 2, 3, 4])}
    >>> call = LossCall("cross_entropy", F.cross_entropy, given, LastOp(), value=torch.tensor(2.5))
    >>> f"{chance(call):.4f}"
    '2.3026'
    """
    if call.value is None or call.reduction == "none":
        return None
    if call.family in (*CLASSIFIES, *BINARY):
        even = {"cross_entropy": 0.0, "bce_logits": 0.0, "bce": 0.5, "nll": -math.log(max(call.classes, 1))}[call.family]
        return float(call.again(input=torch.full_like(call.input.float(), even)))
    if call.family in REGRESSES and call.input.shape == call.target.shape and call.target.numel() > 1:
        return float(call.again(input=constant(call.target.float()), target=call.target.float()))
    return None


def constant(targets: Tensor) -> Tensor:
    """The best constant prediction for each output: the mean over samples; over all of a batch with one number a sample.

    >>> constant(torch.tensor([[1.0], [3.0]])).tolist()
    [[2.0], [2.0]]
    """
    return targets.mean(dim=0, keepdim=True).expand_as(targets) if targets.shape[0] > 1 else targets.mean().expand_as(targets)


def floor(call: LossCall, steps: int = 300) -> float:
    """The least value the loss can take on these targets: 0 for most, the targets' own entropy for soft labels and smoothing.

    Found by training the predictions themselves, without a model.
    """
    smooth = float(call.given.get("label_smoothing", 0.0) or 0.0) > 0
    soft = call.target.is_floating_point() and call.family in (*CLASSIFIES, *BINARY)
    if not (smooth or soft) or call.family in ("nll", "bce"):
        target = call.target.clamp(0, 1)
        return float(call.again(input=target)) if call.family == "bce" else 0.0
    logits = torch.zeros_like(call.input.float()).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    value = call.again(input=logits)
    for _ in range(steps):
        optimizer.zero_grad()
        value = call.again(input=logits)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(value.detach())


def right(call: LossCall) -> float:
    """Share of the labels that the predictions get right; NaN where that means nothing."""
    if call.hard:
        valid = call.target != call.given.get("ignore_index", -100)
        best = call.input.argmax(dim=1 if call.input.dim() > 1 else 0)
        return float((best == call.target)[valid].float().mean()) if bool(valid.any()) else math.nan
    if call.family in BINARY and bool(((call.target == 0) | (call.target == 1)).all()):
        edge = 0.0 if call.family == "bce_logits" else 0.5
        return float(((call.input > edge) == (call.target > 0.5)).float().mean())
    return math.nan
