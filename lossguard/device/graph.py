"""Reads the shape of the autograd graph behind a loss: host-side node names only, never a tensor's values.

A graph flows in (once, at the first recorded step); out flow facts that hooks cannot see: the loss's family, which
module gave the softmax its logits, which parameters feed a functional ReLU, which biases a batch-norm cancels.
Nodes are read, none is kept: activations stay free to go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lossguard.device import criterion
from lossguard.device.criterion import FAMILIES, SOFTMAXES
from lossguard.device.views import RESHAPES, VIEWS, Shape, before, below, given_shape, kind, saved, shape

MAX_NODES = 50_000  # nodes walked at most, once: about 2 us each

NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0", "NativeLayerNormBackward0", "NativeGroupNormBackward0")
BATCH_NORMS = NORMS[:3]
LINEAR = ("AddmmBackward0", "ConvolutionBackward0", "LinearBackward0")
MEAN, SUM = 1, 2  # torch's numbers for reduction="mean" and "sum"
RELUS = ("ReluBackward0", "ThresholdBackward0", "HardtanhBackward0")
OPAQUE = {"CompiledFunctionBackward": "compiled", "CheckpointFunctionBackward": "reentrant checkpoint"}


@dataclass
class GraphFacts:
    """What the graph says. Producers are named by the keys of the mapping given to :func:`read`."""

    loss_family: str = "unknown"
    sign: int = 0  # 1: the loss is a mean or a sum of losses of these families and nothing else, so that it cannot be negative; -1: it is minus such losses
    head: Any = None  # the producer of the logits, None if it was not found
    head_dim: int = -1  # the class dimension there
    relu_parameters: list[int] = field(default_factory=list)  # ids of the 1-d parameters right before a ReLU that no hook saw
    cancelled: set[int] = field(default_factory=set)  # ids of biases that only feed a batch-norm
    safe: bool = False  # the loss itself, or all of its terms, is a built-in loss that is finite for all finite outputs
    squashed: tuple[str, str, str, int] = criterion.NOT_SQUASHED  # module, activation, loss that holds one itself, size of the softmax's dimension
    axis: tuple[int, int, int] = (0, 0, 0)  # a log-softmax that does not run over the classes: its dimension, the size there, the classes
    paired: tuple[Shape, int] = ((), 0)  # shape of outputs that a distance broadcasts against all targets, and how many there are
    attentions: int = 0  # fused attentions
    summed: bool = False  # a built-in loss adds its samples up, and nothing behind it divides the sum (by a count of tokens, say)
    averaged: bool = False  # the loss is the mean of one built-in loss and nothing else
    masked: bool = False  # a softmax is given what a mask was written into
    linear_chain: tuple[str, str] = ("", "")  # two linear layers, by their modules, with nothing but a view between them
    leaves: set[int] = field(default_factory=set)  # ids of the parameters that the loss depends on
    opaque: set[str] = field(default_factory=set)  # regions that cannot be read, such as "compiled"

    def faults(self) -> dict[str, Any]:
        """What is wrong at the loss itself, for the samples' facts: nothing, in nearly every run."""
        found = {"squashed": (self.squashed, self.squashed[1]), "axis": (self.axis, self.axis[1]), "paired": (self.paired, self.paired[1])}
        return {name: fact for name, (fact, there) in found.items() if there}


def read(losses: Sequence[Tensor], producers: Mapping[Any, Any], hooked: Collection[Any] = (), inside: Sequence[tuple[Any, Shape]] = ()) -> GraphFacts:
    """Walk the graph behind the loss, or behind its terms. producers: graph node of a module's output -> that module's
    key. hooked: the nodes among them that a ReLU module made. inside: keys and output shapes of module calls in compiled
    code, in order, which have no node of their own."""
    facts = GraphFacts()
    roots = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    for root in roots:
        if facts.head is None:
            _read_head(root, producers, facts, inside)
    facts.sign = criterion.sign(losses)
    facts.safe = criterion.safe(losses)
    facts.squashed = next((found for found in (criterion.diverging(root, producers) for root in roots) if found[1]), facts.squashed)
    facts.paired = next((found for found in map(criterion.paired, roots) if found[1]), facts.paired)
    facts.averaged = len(roots) == len(losses) == 1 and roots[0].name() in FAMILIES and getattr(roots[0], "_saved_reduction", None) == MEAN
    seen, queue, divided = set(roots), deque(roots), False
    while queue and len(seen) < MAX_NODES:
        node = queue.popleft()
        name = node.name()
        divided = divided or name.startswith("DivBackward")
        for prefix, what in OPAQUE.items():
            if name.startswith(prefix):
                facts.opaque.add(what)
        if facts.loss_family == "unknown" and name in FAMILIES:
            facts.loss_family = FAMILIES[name]
            facts.summed = getattr(node, "_saved_reduction", None) == SUM and not divided
        if not facts.squashed[1]:
            facts.squashed = criterion.squashed(node, producers)
        if not facts.axis[1]:
            facts.axis = criterion.wrong_axis(node)
        facts.masked = facts.masked or (name == SOFTMAXES[1] and _is_masked(node))
        facts.attentions += name.startswith("ScaledDotProduct")
        if name in LINEAR and not facts.linear_chain[0]:
            facts.linear_chain = _fed_by_linear(node, producers)
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
            facts.leaves.add(id(leaf))
        if name in RELUS and node not in hooked:
            _read_relu(node, facts)
        if name in BATCH_NORMS:
            _read_norm(node, facts)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)
    return facts


def _is_masked(node: Any) -> bool:
    """Right before it, but for views and a scale, something was filled or chosen by a mask, or added."""
    for _ in range(4):
        node = below(node)
        if node is None or node.name().startswith(("MaskedFill", "Where")):
            return node is not None
        if not kind(node).startswith(VIEWS):
            return False
    return False


def _read_head(root: Any, producers: Mapping[Any, Any], facts: GraphFacts, inside: Sequence[tuple[Any, Shape]]) -> None:
    """The softmax nearest to the loss that no parameter stands before, and the module output that feeds it."""
    seen, queue = {root}, deque([root])
    while queue and len(seen) < 256:  # the loss's own nodes are few
        node = queue.popleft()
        if node.name() in SOFTMAXES and node.next_functions:
            found = _through_views(node, producers, inside)
            if found is not None:
                facts.head, facts.head_dim = found
                return
        if node in producers or _parameters(node):
            continue  # the model begins here
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)


def _through_views(softmax: Any, producers: Mapping[Any, Any], inside: Sequence[tuple[Any, Shape]]) -> tuple[Any, int] | None:
    """The producer of a softmax's logits, and which dimension of its output the softmax runs over."""
    dim, node = saved(softmax, "_saved_dim"), softmax
    for _ in range(32):
        source, sizes = below(node), given_shape(node)
        if source is None or not (node is softmax or hasattr(node, "_input_metadata")):
            return None  # nothing behind it, or a torch that does not tell the shapes of views
        moved = dim if node is softmax else before(node, dim, shape(node), sizes)
        if moved is None:
            return None
        node, dim = source, moved
        if node in producers:
            return producers[node], dim
        if not kind(node).startswith(VIEWS):
            return next(((key, dim) for key, given in reversed(inside) if given == sizes), None)  # what compiled code gave
    return None


def _parameters(node: Any) -> list[Tensor]:
    """The leaf tensors that feed a node directly."""
    return [c.variable for c, _ in node.next_functions if c is not None and hasattr(c, "variable")]


def _read_relu(node: Any, facts: GraphFacts) -> None:
    """The 1-d parameter (bias, or a norm's beta) of the layer that feeds a functional ReLU."""
    feeder = node.next_functions[0][0] if node.next_functions else None
    for _ in range(4):
        if feeder is None:
            return
        name = feeder.name()
        vectors = [p for p in _parameters(feeder) if p.dim() == 1]
        if name in LINEAR or name in NORMS:
            if vectors:
                facts.relu_parameters.append(id(vectors[-1]))  # the norm's beta comes after its gain
            return
        if not name.rstrip("0123456789").startswith((*VIEWS, "AddBackward")) or not feeder.next_functions:
            return
        if vectors:  # matmul + bias
            facts.relu_parameters.append(id(vectors[-1]))
            return
        feeder = feeder.next_functions[0][0]


def _fed_by_linear(node: Any, producers: Mapping[Any, Any]) -> tuple[str, str]:
    """The linear layer right before this one and this one, where both are modules' outputs; empty where something stands between."""
    inner = 1 if node.name() == "AddmmBackward0" else 0
    before = node.next_functions[inner][0] if len(node.next_functions) > inner else None
    for _ in range(4):
        if before is None or before.name() in LINEAR:
            break
        if not before.name().rstrip("0123456789").startswith(RESHAPES) or not before.next_functions:
            return "", ""
        before = before.next_functions[0][0]
    known = before in producers and node in producers and before is not None and before.name() == node.name()
    return (str(producers[before]), str(producers[node])) if known else ("", "")


def _read_norm(node: Any, facts: GraphFacts) -> None:
    """A bias of the linear or convolution right before a batch-norm: the norm subtracts it, its true gradient is zero."""
    feeder = node.next_functions[0][0] if node.next_functions else None
    if feeder is not None and feeder.name() in LINEAR:
        facts.cancelled.update(id(p) for p in _parameters(feeder) if p.dim() == 1)
