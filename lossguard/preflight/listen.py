"""Listens to one forward pass and its loss: which loss function got which tensors, and what stood last before it.

A torch function mode flows around the user's code; out flow records of the calls of ``torch.nn.functional``'s losses.
While it is quiet, dropout is the identity. Labels that would kill a device kernel are caught before the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lossguard.device.views import VIEWS

LOSSES: dict[Any, str] = {
    F.cross_entropy: "cross_entropy", F.nll_loss: "nll", F.binary_cross_entropy: "bce", F.binary_cross_entropy_with_logits: "bce_logits",
    F.mse_loss: "mse", F.l1_loss: "l1", F.smooth_l1_loss: "huber", F.huber_loss: "huber", F.gaussian_nll_loss: "gaussian_nll",
    F.poisson_nll_loss: "poisson_nll", F.kl_div: "kl", F.ctc_loss: "ctc",
}  # fmt: skip
CLASSIFIES = ("cross_entropy", "nll")
BINARY = ("bce", "bce_logits")
REGRESSES = ("mse", "l1", "huber")
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "dropout_")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
LOOSE = ("DivBackward", "MulBackward")  # among the graph's views, but they change values
NAMES = {name: inspect.signature(name) for name in LOSSES}
ATTENTION = inspect.signature(F.multi_head_attention_forward)


class LabelFault(ValueError):
    """Labels that the loss function cannot take, found before it was called."""


@dataclass
class LastOp:
    """The operation that made a tensor, seen through views: its autograd name without ``Backward0``, and where it acted."""

    name: str = ""
    size: int = -1  # of the dimension that a softmax ran over
    bounds: tuple[float, float] = (float("-inf"), float("inf"))  # what a hardtanh lets pass


@dataclass
class LossCall:
    """One call of a loss function: its arguments by name (detached), its value, and what made its input."""

    family: str
    function: Callable[..., Tensor]
    given: dict[str, Any]
    last: LastOp
    value: Tensor | None = None
    fault: str = ""

    @property
    def input(self) -> Tensor:
        """What the loss function got as predictions."""
        tensor: Tensor = self.given["input"] if "input" in self.given else self.given["log_probs"]
        return tensor

    @property
    def target(self) -> Tensor:
        """What it got as targets."""
        tensor: Tensor = self.given["target"] if "target" in self.given else self.given["targets"]
        return tensor

    @property
    def reduction(self) -> str:
        """mean, sum or none."""
        return str(self.given.get("reduction", "mean"))

    @property
    def classes(self) -> int:
        """Size of the class dimension."""
        return int(self.input.shape[1] if self.input.dim() > 1 else self.input.shape[0])

    @property
    def hard(self) -> bool:
        """Class numbers, not probabilities, are the targets."""
        return self.family in CLASSIFIES and not self.target.is_floating_point()

    def again(self, **changed: Any) -> Tensor:
        """The same call with other arguments."""
        return self.function(**{**self.given, **changed})


class Listener(TorchFunctionMode):
    """Records loss calls; quiet: dropout does nothing."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.quiet = quiet
        self.calls: list[LossCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Called by torch in the place of every function of its own."""
        kwargs = kwargs or {}
        if func in LOSSES:
            return self._loss(func, args, kwargs)
        if self.quiet:
            name = getattr(func, "__name__", "")
            if name in DROPOUTS and (args or "input" in kwargs):
                return args[0] if args else kwargs["input"]
            if name in RECURRENT:
                args = _without_dropout(args)
            elif func is F.scaled_dot_product_attention:
                args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {**kwargs, "dropout_p": 0.0} if len(args) <= 4 else kwargs
            elif func is F.multi_head_attention_forward:
                bound = ATTENTION.bind(*args, **kwargs)
                bound.arguments["dropout_p"] = 0.0
                args, kwargs = bound.args, bound.kwargs
        return func(*args, **kwargs)

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(NAMES[func].bind(*args, **kwargs).arguments)
        old = ("size_average", "reduce")
        if any(given.get(name) is not None for name in old):
            given["reduction"] = nn._reduction.legacy_get_string(given.get("size_average"), given.get("reduce"), emit_warning=False)
        first = given.get("input", given.get("log_probs"))
        kept = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items() if k not in old}
        call = LossCall(LOSSES[func], func, kept, last_op(first) if isinstance(first, Tensor) else LastOp())
        self.calls.append(call)
        if isinstance(first, Tensor):
            call.fault = why_not(call)
        if call.fault:
            raise LabelFault(call.fault)
        try:
            value = func(*args, **kwargs)
        except Exception as error:
            call.fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise
        call.value = value.detach()
        return value


def why_not(call: LossCall) -> str:
    """Why the loss function would refuse these labels or these predictions, or die of them on an accelerator; empty if it would not."""
    if call.hard and call.target.numel():
        valid = call.target[call.target != call.given.get("ignore_index", -100)]
        if valid.numel():
            least, most = int(valid.min()), int(valid.max())
            if least < 0 or most >= call.classes:
                return f"labels reach from {least} to {most}, but the output has {call.classes} classes"
    if call.family in CLASSIFIES and call.target.is_floating_point() and call.target.dim() == call.input.dim() - 1:
        return f"class labels are {str(call.target.dtype).removeprefix('torch.')}, expected int64"
    if call.family == "bce":
        low, high = float(call.input.min()), float(call.input.max())
        if not (low >= 0 and high <= 1):
            return f"predictions reach from {low:g} to {high:g}, but binary cross entropy takes probabilities"
        low, high = float(call.target.min()), float(call.target.max())
        if low < 0 or high > 1:
            return f"targets reach from {low:g} to {high:g}, but binary cross entropy takes them in [0, 1]"
    return ""


def last_op(tensor: Tensor) -> LastOp:
    """What made a tensor, seen through views."""
    node: Any = tensor.grad_fn
    for _ in range(16):
        if node is None:
            break
        name = node.name()
        if not name.rstrip("0123456789").startswith(VIEWS) or name.startswith(LOOSE) or not node.next_functions:
            found = LastOp(name.rstrip("0123456789").removesuffix("Backward"))
            if "Softmax" in name and hasattr(node, "_input_metadata"):
                shape, dim = tuple(node._input_metadata[0].shape), int(node._saved_dim)
                found.size = shape[dim - 2**64 if dim > 2**63 else dim] if shape else 1
            if name.startswith("Hardtanh"):
                found.bounds = (float(node._saved_min_val), float(node._saved_max_val))
            return found
        node = node.next_functions[0][0]
    return LastOp()


def _without_dropout(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a recurrent layer with its dropout at 0; packed sequences have one argument more before it."""
    place = 5 if len(args) > 3 and isinstance(args[3], bool) else 6
    return (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place and isinstance(args[place], float) else args


def total_of(loss: Any) -> Tensor:
    """The number that is minimised: a tensor, or the sum of the terms of a dict or a tuple (or its term "loss")."""
    if isinstance(loss, dict):
        return total_of(loss["loss"]) if "loss" in loss else total_of(list(loss.values()))
    if isinstance(loss, (list, tuple)):
        return torch.stack([term.sum() for term in loss if isinstance(term, Tensor) and term.requires_grad]).sum()
    if not isinstance(loss, Tensor):
        raise ValueError(f"the criterion gave a {type(loss).__name__}, expected a tensor")
    return loss if loss.dim() == 0 else loss.mean()
