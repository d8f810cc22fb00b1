"""Reads what stands at the loss itself: its family and sign, what it is given. Graph nodes flow in, host-side names and shapes only; facts flow out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lossguard.device.views import RESHAPES, VIEWS, Shape, before, behind, below, given_shape, kind, saved, shape

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
NOT_SQUASHED = ("", "", "", 0)
DIVERGENCE = "KL divergence"
MOST = 256  # nodes; the loss's own are few


def squashed(node: Any, producers: Mapping[Any, Any]) -> tuple[str, str, str, int]:
    """A loss on logits that is given what a softmax or a sigmoid made, with nothing but views between; empty for any other node."""
    loss, over, size = LOGIT_LOSSES.get(node.name(), ""), node, 0
    if loss == "cross entropy":
        over = behind(node)
        if over is None or over.name() != SOFTMAXES[0]:
            return NOT_SQUASHED
        size = _softmax_size(over)
    made = behind(over) if loss else None
    name = SQUASHING.get(made.name(), "") if made is not None else ""
    if not name or (name == "softmax" and size and _softmax_size(made) != size):
        return NOT_SQUASHED
    return str(producers.get(made, "")), name, loss, size


def diverging(root: Any, producers: Mapping[Any, Any]) -> tuple[str, str, str, int]:
    """The same of a divergence, which takes log-probabilities: between the root and it only sums, means and weights stand."""
    seen, queue = {root}, deque([root])
    while queue and len(seen) < MOST:
        node = queue.popleft()
        if kind(node).startswith("SubBackward"):
            made = _softmax_of(node)
            if made is not None:
                return str(producers.get(made, "")), "softmax", DIVERGENCE, _softmax_size(made)
        elif kind(node).startswith(KEEP_SIGN) or _weighs(node):
            children = [child for child, _ in node.next_functions if child is not None and child not in seen]
            seen.update(children)
            queue.extend(children)
    return NOT_SQUASHED


def _softmax_of(node: Any) -> Any:
    """The softmax behind a constant less the product of a constant and it: t log t - t * input, as torch writes a divergence out; else None."""
    product = node.next_functions[1][0] if len(node.next_functions) == 2 and node.next_functions[0][0] is None else None
    if product is None or not kind(product).startswith("MulBackward"):
        return None
    given = [child for child, _ in product.next_functions if child is not None]
    made = given[0] if len(given) == 1 else None
    made = behind(made) if made is not None and kind(made).startswith(RESHAPES) else made
    return made if made is not None and made.name() == SOFTMAXES[1] else None


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
    """A distance, or a product, in which each of n outputs was broadcast against each of n targets: (shape of the outputs, n); ((), 0) if there is none.

    Between the root and it stand only reductions, weighted sums of terms and one power: a matrix of pairs that is weighted, masked or
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
        elif not measured and name.startswith("MulBackward") and shape(node):  # n log-likelihoods by n targets, or by n advantages
            found = next((_spread(node, source, output) for source, output in node.next_functions if source is not None), ((), 0))
            if found[1]:
                return found
            continue
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
    """1: sums, means and quotients of losses of known families and nothing else, so that it is never negative. -1: all of them under a
    minus sign, weighted perhaps. 0: anything else."""
    read = [_terms(loss.grad_fn) for loss in losses]
    known = [terms for terms in read if terms is not None]
    if not known or len(known) < len(read):
        return 0
    signs, families = {way for terms in known for _, way in terms.losses}, {family for terms in known for family, _ in terms.losses}
    if signs == {1} and not any(terms.shifted or terms.weighted for terms in known):
        return 1
    return -1 if signs == {-1} and families <= set(MINIMISED) else 0


@dataclass
class _Terms:
    """The losses that a root adds up: (family, 1 or -1 where it is subtracted); whether numbers weigh them, and whether they are parts of a difference."""

    losses: set[tuple[str, int]] = field(default_factory=set)
    weighted: bool = False
    shifted: bool = False


def _terms(root: Any) -> _Terms | None:
    """Down to losses of known families; None where anything else stands between."""
    found, queue, left = _Terms(), deque([(root, 1)]), MOST
    while queue and left:
        (node, way), left = queue.popleft(), left - 1
        if node is None:
            return None
        if node.name() in FAMILIES:
            found.losses.add((FAMILIES[node.name()], way))
            continue
        name = kind(node)
        if _weighs(node):
            found.weighted = True
        elif name.startswith(("SubBackward", "RsubBackward")):
            found.shifted = True
        elif not name.startswith((*KEEP_SIGN, "NegBackward")):
            return None
        way = -way if name.startswith(("NegBackward", "RsubBackward")) else way
        ways = [(child, -way if k and name.startswith("SubBackward") else way) for k, (child, _) in enumerate(node.next_functions) if child is not None]
        if not ways:
            return None
        queue.extend(ways)
    return None if queue else found


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
