"""Nodes of an autograd graph that only re-shape, select or re-type: where a dimension lies before them. Host-side names and shapes only."""

from __future__ import annotations

import math
from typing import Any

Shape = tuple[int, ...]
VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "TransposeBackward", "PermuteBackward", "SliceBackward", "SelectBackward",
         "SqueezeBackward", "UnsqueezeBackward", "CloneBackward", "ToCopyBackward", "AsStridedBackward", "TBackward", "IndexBackward", "ExpandBackward",
         "ContiguousBackward", "DivBackward", "MulBackward")  # fmt: skip
RESHAPES = (*VIEWS[:7], "ToCopyBackward")  # and casts, as autocast puts them between a softmax and the loss


def kind(node: Any) -> str:
    """A node's name without torch's number behind it."""
    name: str = node.name()
    return name.rstrip("0123456789")


def below(node: Any) -> Any:
    """What a node was given first; None if it is a constant."""
    return node.next_functions[0][0] if node.next_functions else None


def behind(node: Any, through: tuple[str, ...] = RESHAPES, most: int = 5) -> Any:
    """What feeds a node, through what only re-shapes; None if there is nothing, or too much between."""
    for _ in range(most):
        node = below(node)
        if node is None or not kind(node).startswith(through):
            return node
    return None


def shape(node: Any) -> Shape:
    """The shape of what a node gave; empty where this torch does not tell."""
    return tuple(node._input_metadata[0].shape) if hasattr(node, "_input_metadata") else ()


def given_shape(node: Any) -> Shape:
    """The shape of what a node was given first; empty where that is a constant, or this torch does not tell."""
    source, output = node.next_functions[0] if node.next_functions else (None, 0)
    return tuple(source._input_metadata[output].shape) if source is not None and hasattr(source, "_input_metadata") else ()


def before(node: Any, dim: int, after: Shape, source: Shape) -> int | None:
    """Where a dimension of a view's result lies in the view's source; None if it has no one place there."""
    name = kind(node)
    dim %= len(after)
    if name.startswith("Transpose"):
        swap = (saved(node, "_saved_dim0") % len(after), saved(node, "_saved_dim1") % len(after))
        return swap[1 - swap.index(dim)] if dim in swap else dim
    if name.startswith("TBackward"):
        return len(after) - 1 - dim
    if name.startswith("Permute"):
        return _signed(node._saved_dims[dim]) % len(after)
    if len(after) == len(source) and not name.startswith(("View", "UnsafeView", "ReshapeAlias")):
        return dim if source[dim] == after[dim] else None
    inner = math.prod(after[dim + 1 :])
    return next((d for d, size in enumerate(source) if size == after[dim] and math.prod(source[d + 1 :]) == inner), None)


def saved(node: Any, name: str) -> int:
    """A dimension that a node keeps, negative where it was given so."""
    return _signed(getattr(node, name))


def _signed(dim: int) -> int:
    return dim - 2**64 if dim > 2**63 else dim
