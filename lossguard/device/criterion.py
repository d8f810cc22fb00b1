"""Reads what stands at the loss itself: its family and sign, what it is given. Graph nodes flow in, host-side names and shapes only; facts flow out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lossguard.device.views import VIEWS, Shape, before, behind, below, given_shape, kind, saved, shape

FAMILIES = {
    "NllLossBackward0": "cross_entropy", "NllLoss2DBackward0": "cross_entropy", "NllLossNdBackward0": "cross_entropy",
    "BinaryCrossEntropyBackward0": "binary", "BinaryCrossEntropyWithLogitsBackward0": "binary", "MseLossBackward0": "mse",
    "SmoothL1LossBackward0": "huber", "HuberLossBackward0": "huber", "KlDivBackward0": "kl", "CtcLossBackward0": "ctc",
}  # fmt: skip
SOFTMAXES = ("LogSoftmaxBackward0", "SoftmaxBackward0")
# Nodes that keep the sign of the losses that pass through them; a product does not (policy gradients).
KEEP_SIGN = ("MeanBackward", "SumBackward", "AddBackward", "DivBackward", "ViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward",
             "CloneBackward", "ToCopyBackward", "StackBackward", "CatBackward", "SelectBackward", "UnbindBackward")  # fmt: skip
SAFE = ("cross_entropy", "mse", "huber", "binary")
MINIMISED = (*SAFE, "ctc")  # families that nobody maximises; divergences are, as mutual information
SCALINGS = ("DivBackward", "MulBackward", "MeanBackward", "SumBackward")  # of a loss that was reduced or scaled
DISTANCES = ("MseLossBackward", "SmoothL1LossBackward", "HuberLossBackward", "PowBackward", "AbsBackward", "SquareBackward", "LinalgVectorNormBackward")
LOGIT_LOSSES = {
    "NllLossBackward0": "cross entropy", "NllLoss2DBackward0": "cross entropy", "NllLossNdBackward0": "cross entropy",
    "BinaryCrossEntropyWithLogitsBackward0": "binary cross entropy with logits",
}  # fmt: skip
SQUASHING = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
MOST = 256  # nodes; the loss's own are few


def squashed(node: Any, producers: Mapping[Any, Any]) -> tuple[str, str, str, int]:
    """A loss on logits that is given what a softmax or a sigmoid made, with nothing but views between; empty for any other node."""
    loss, over, size = LOGIT_LOSSES.get(node.name(), ""), node, 0
    if loss == "cross entropy":
        over = behind(node)
        if over is None or over.name() != SOFTMAXES[0]:
            return "", "", "", 0
        size = _softmax_size(over)
    made = behind(over) if loss else None
    name = SQUASHING.get(made.name(), "") if made is not None else ""
    if not name or (name == "softmax" and size and _softmax_size(made) != size):
        return "", "", "", 0
    return str(producers.get(made, "")), name, loss, size


def _softmax_size(softmax: Any) -> int:
    """The size of the dimension that a softmax runs over."""
    sizes = shape(softmax)
    return sizes[saved(softmax, "_saved_dim")] if sizes else 1


def wrong_axis(node: Any) -> tuple[int, int, int]:
    """A negative log likelihood whose softmax does not run over the classes: (its dimension, the size there, the classes); zeros for any other node."""
    sizes = given_shape(node) if node.name().startswith("NllLoss") else ()
    if not sizes:
        return 0, 0, 0
    dim = min(1, len(sizes) - 1)
    classes = sizes[dim]
    for _ in range(8):
        node = below(node)
        if node is None or not (shape(node) and given_shape(node)):
            break
        if node.name() in SOFTMAXES:
            over = saved(node, "_saved_dim") % len(shape(node))
            size = shape(node)[over]
            # over the samples of a square of similarities it is the other direction of a contrastive loss
            return (over, size, classes) if over != dim and size != classes else (0, 0, 0)
        if kind(node) == "LogBackward":
            continue
        viewed = kind(node).startswith(VIEWS) and not kind(node).startswith(SCALINGS)
        moved = before(node, dim, shape(node), given_shape(node)) if viewed else None
        if moved is None:
            break
        dim = moved
    return 0, 0, 0


def paired(root: Any) -> tuple[Shape, int]:
    """A distance in which each of n outputs was broadcast against each of n targets: (shape of the outputs, n); ((), 0) if there is none.

    Between the root and the difference stand only reductions, weighted sums of terms and one power: a matrix of pairs that is weighted, masked or
    chosen from is meant to be one. So is one whose sides were given their dimensions on purpose.
    """
    seen, queue = {root}, deque([(root, False)])
    while queue and len(seen) < MOST:
        node, measured = queue.popleft()
        name = kind(node)
        if measured and name.startswith(("SubBackward", "RsubBackward", "ExpandBackward")):
            for source, output in node.next_functions:
                found = _spread(node, source, output)
                if found[1]:
                    return found
        elif name.startswith(DISTANCES):
            measured = True
        elif measured or not (name.startswith((*KEEP_SIGN, "SqrtBackward", "NegBackward")) or _weighs(node)):
            continue
        children = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(children)
        queue.extend((child, measured) for child in children)
    return (), 0


def _spread(node: Any, source: Any, output: int) -> tuple[Shape, int]:
    """n values that met n others one by one, where a constant stood on the other side."""
    after = shape(node)
    if source is None or not hasattr(source, "_input_metadata") or len(after) != 2 or after[0] != after[1] or after[0] < 2:
        return (), 0
    given, n = tuple(source._input_metadata[output].shape), after[0]
    alone = kind(node).startswith("Expand") or sum(child is not None for child, _ in node.next_functions) == 1
    meant = kind(source).startswith(("UnsqueezeBackward", "IndexBackward", "TransposeBackward", "TBackward", "PermuteBackward"))
    return (given, n) if alone and not meant and given in ((n,), (n, 1)) else ((), 0)


def sign(losses: Sequence[Tensor]) -> int:
    """1: sums, means and quotients of losses of known families and nothing else, so that it is never negative. -1: all of them under a minus sign,
    weighted perhaps. 0: anything else."""
    roots = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    if not roots or len(roots) < len(losses):
        return 0
    if all(_keeps_sign(root) for root in roots):
        return 1
    return -1 if all(_negated(root) for root in roots) else 0


def _keeps_sign(root: Any) -> bool:
    """Only nodes that keep the sign stand between the root and losses of known families."""
    seen, queue = {root}, deque([root])
    while queue and len(seen) < MOST:
        node = queue.popleft()
        if node.name() in FAMILIES:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if not kind(node).startswith(KEEP_SIGN) or not children:
            return False
        queue.extend(child for child in children if child not in seen)
        seen.update(children)
    return not queue


def _negated(root: Any) -> bool:
    """Every loss below is of a family that is minimised, and is subtracted."""
    queue: deque[tuple[Any, int]] = deque([(root, 1)])
    left = MOST
    while queue and left:
        (node, way), left = queue.popleft(), left - 1
        name = kind(node)
        if node.name() in FAMILIES:
            if way > 0 or FAMILIES[node.name()] not in MINIMISED:
                return False
            continue
        if not name.startswith((*KEEP_SIGN, "NegBackward", "RsubBackward", "SubBackward")) and not _weighs(node):
            return False
        way = -way if name.startswith(("NegBackward", "RsubBackward")) else way
        ways = [(child, -way if k and name.startswith("SubBackward") else way) for k, (child, _) in enumerate(node.next_functions) if child is not None]
        if not ways:
            return False
        queue.extend(ways)
    return not queue


def _weighs(node: Any) -> bool:
    """A product of one number that has a gradient and one that has none: the weight of a term. What it is cannot be asked after the backward pass."""
    return kind(node).startswith("MulBackward") and not shape(node) and sum(child is not None for child, _ in node.next_functions) == 1


def safe(losses: Sequence[Tensor]) -> bool:
    """Whether each term is a built-in loss, perhaps reduced or scaled, that is finite for all finite outputs."""
    nodes = [_unscaled(loss.grad_fn) for loss in losses if loss.grad_fn is not None]
    return nodes != [] and all(FAMILIES.get(n.name()) in SAFE and (not n.name().startswith("NllLoss") or _of_softmax(n)) for n in nodes)


def _of_softmax(node: Any) -> bool:
    """Whether it is given log-probabilities by torch's own log_softmax."""
    made = behind(node, VIEWS, 4)
    return made is not None and kind(made).startswith("LogSoftmax")


def _unscaled(node: Any) -> Any:
    """Behind a loss's reduction and scaling."""
    for _ in range(4):
        children = [child for child, _ in node.next_functions if child is not None]
        if not node.name().startswith(SCALINGS) or len(children) != 1:
            break
        node = children[0]
    return node
