"""Attention logits that a fused kernel hides: from its own query and key, a sample of them. Never reads a value.

Module calls flow in; the largest |q.k| of sampled rows of each head flows into a row, at the site of the module that was given
what the attention gave (its output projection, or ``nn.MultiheadAttention`` as a whole). Masks are not looked at: a product
that a mask hides counts too. Query and key are those that autograd
keeps for the backward pass: nothing is patched, recomputed or held, and the kernel stays the one that was chosen.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossguard.device.tape import Row, Sites
from lossguard.device.tape import Scale as Scales
from lossguard.device.views import VIEWS

ROWS = 64  # queries, and keys, of one sequence that are looked at
LOOKS = 2  # sampled steps without an attention after which none is looked for
WATCHED = 4  # attentions watched, spread over the depth; in each sampled step one of them, in turn
NEAR = 24  # nodes between an attention and the module that takes its output
HEADS = 256  # heads of one attention looked at; site * HEADS + head is where a head's number goes
UNTOLD = 8  # products of query and key looked at where the graph does not tell how many of them are heads
KINDS = ("Linear", "MultiheadAttention", "NonDynamicallyQuantizableLinear")
SOFTMAXES = ("SoftmaxBackward", "SafeSoftmaxBackward")
DROPOUTS = ("MulBackward", "NativeDropoutBackward")
MASKS = ("AddBackward", "MaskedFillBackward", "WhereBackward")  # between the scores and their softmax
SCALINGS = ("MulBackward", "DivBackward")

Scale = float | Tensor | None  # what a product of query and key is multiplied with; None: 1/sqrt(d)


class AttentionLogits:
    """Finds the attentions during the first sampled step, and measures one of them in each later one."""

    def __init__(self) -> None:
        self.sites: list[int] = []  # where an attention was found, in order of execution
        self.hidden: set[str] = set()  # modules behind an attention whose query and key are not to be had, and why
        self._settled = False  # all attentions are known, or there are none
        self._blank = 0  # sampled steps that showed none
        self._turn = 0
        self._known: dict[tuple[int, int], Sites] = {}
        self._called = self._measured = False

    def begin(self) -> None:
        """A new step."""
        self._blank += self._called and not self._measured
        self._settled = self._settled or self._measured or self._blank >= LOOKS
        self._turn += self._measured
        self._called = self._measured = False

    def module_called(self, site: int, name: str, kind: str, args: tuple[Any, ...], output: Tensor, row: Row) -> None:
        """A module ended; if it was given the output of an attention, that one is measured when its turn comes."""
        if kind not in KINDS or (self._settled and site != self._due()) or output.grad_fn is None:
            return
        self._called = True
        given = output if kind == "MultiheadAttention" else args[0] if args else None
        try:
            found = None if not isinstance(given, Tensor) or given.grad_fn is None else _attention(given.grad_fn)
        except RuntimeError:  # what was saved is gone already, or was overwritten: no business of ours
            return
        if found is None:
            return
        if not self._settled and site not in self.sites:
            self.sites.append(site)
        if self._measured and not self._settled:
            return
        if hooked():
            self.hidden.add(f"{name}: its query and key are packed by saved-tensor hooks (a checkpoint, or offloading)")
            return
        self._measured = True
        with torch.no_grad():
            peaks, factor = _peaks(*found)
            row.add("attention_heads", self._places(site, len(peaks)), peaks, _scales(len(peaks), factor))

    def _places(self, site: int, heads: int) -> Sites:
        """Where the heads' numbers go: the same array for the same site, so that the row's layout is known again."""
        if (site, heads) not in self._known:
            self._known[site, heads] = site * HEADS + np.arange(heads)
        return self._known[site, heads]

    def _due(self) -> int:
        """The site whose turn it is; -1 where there is none."""
        if not self.sites:
            return -1
        spread = self.sites[:: max(1, -(-len(self.sites) // WATCHED))]
        return spread[self._turn % len(spread)]


def hooked() -> bool:
    """Whether what autograd keeps is packed by somebody's hooks just now: asking for it would unpack, and recompute."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(False) is not None


def _attention(node: Any) -> tuple[Tensor, Tensor, Scale] | None:
    """Query and key (sequences and heads in front), and what their product is multiplied with (None: 1/sqrt(d)); None if none is near."""
    softmax, heads = False, 0
    scale: Scale = 1.0
    for _ in range(NEAR):
        if node is None or hasattr(node, "variable"):
            return None
        name = node.name()
        if name.startswith("ScaledDotProduct"):
            factor = getattr(node, "_saved_scale", None)  # a host number, where the call named one
            return (node._saved_query, node._saved_key, factor) if not hooked() else (_NOTHING, _NOTHING, None)
        if name.startswith(SOFTMAXES):
            softmax = True
            shape = tuple(node._input_metadata[0].shape) if hasattr(node, "_input_metadata") else ()
            heads = shape[-3] if len(shape) > 3 else 0  # (sequences, heads, queries, keys); else sequences and heads in one
        elif softmax and name.startswith(SCALINGS):
            one = _factor(node, name)
            scale = None if scale is None or one is None else scale * one
        elif name.startswith(("BmmBackward", "BaddbmmBackward")):
            if softmax:
                return _scores(node, name, scale, heads or UNTOLD)
        elif name.startswith("AddmmBackward") and not softmax:
            node = node.next_functions[1][0]
            continue
        elif not name.rstrip("0123456789").startswith((*VIEWS, *DROPOUTS, *(MASKS if softmax else ()))):
            return None
        node = _main(node)
    return None


_NOTHING = torch.empty(0)


def _factor(node: Any, name: str) -> Tensor | None:
    """The number that a product of scores is multiplied with; None if it is no single number, which is taken for 1/sqrt(d)."""
    if hooked():
        return None
    saved = [getattr(node, side, None) for side in ("_saved_other", "_saved_self")]
    number = next((t for t in saved if isinstance(t, Tensor) and not t.dim()), None)
    return None if number is None else number.detach().reciprocal() if name.startswith("Div") else number.detach()


def _main(node: Any) -> Any:
    """The first of a node's sources that is no leaf."""
    return next((n for n, _ in node.next_functions if n is not None and not hasattr(n, "variable")), None)


def _scores(node: Any, name: str, scale: Scale, heads: int) -> tuple[Tensor, Tensor, Scale] | None:
    """Query and key of the product that an explicit softmax was taken of."""
    if hooked():
        return _NOTHING, _NOTHING, scale
    first, second = ("_saved_batch1", "_saved_batch2") if name.startswith("Baddbmm") else ("_saved_self", "_saved_mat2")
    query, key = getattr(node, first, None), getattr(node, second, None)
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    return query[:heads].unsqueeze(0), key[:heads].transpose(-2, -1).unsqueeze(0), scale


def _peaks(query: Tensor, key: Tensor, scale: Scale) -> tuple[Tensor, float]:
    """The largest magnitude of query times key over sampled rows of the first sequence, for each head: (heads,), and what it is
    to be multiplied with. (sequences, heads, queries, d), (sequences, heads of the keys, keys, d); heads may be missing."""
    q, k = (x.detach()[0, ..., :: max(1, -(-x.shape[-2] // ROWS)), :] for x in (query, key))
    q, k = (x if x.dim() > 2 else x.unsqueeze(0) for x in (q, k))
    heads, rows, width = q.shape
    if heads != k.shape[0]:  # groups of query heads share a key
        q = q.reshape(k.shape[0], -1, width)
    scores = torch.matmul(q, k.transpose(-2, -1)).view(heads, rows, -1)[:HEADS]
    if scores.dtype == torch.float64:
        scores = scores.to(torch.float32)
    peaks = torch.linalg.vector_norm(scores, math.inf, dim=(1, 2), dtype=torch.float32)
    if isinstance(scale, Tensor):
        return (peaks * scale.abs()).to(torch.float32), 1.0
    return peaks, width**-0.5 if scale is None else abs(scale)


@functools.lru_cache(maxsize=64)
def _scales(n: int, scale: float) -> Scales:
    return np.full(n, scale)
