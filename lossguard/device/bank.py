"""Gathers the parameters of one optimizer on one device into rows, so that a few operations measure all of them.

Parameters flow in, vectors of numbers (one per parameter) flow into a ``Row``. Small tensors are read whole; large ones
are read through a spread sample for weights and updates, whole for gradient norms. Memory is bounded at attach.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lossguard.device import shards, signals
from lossguard.device.tape import Row, Sites

SMALL = 16384  # elements; tensors up to this size are read whole
RUN = 16  # elements of one run of a sample: a cache line of float32
RUNS = 1024  # runs of a large tensor's sample: within 1 to 4 % of the exact update ratio on dense updates
SHARE = 0.0015  # of a model's elements that samples may take once RUNS for each would exceed it ...
MIN_RUNS = 64  # ... but never fewer runs than this
WASTE = 0.1  # of the small tensors' elements that may be padding beyond their own bucket
BUCKETS = tuple(4**k for k in range(2, 8))  # small tensors are zero-padded to these sizes: 16 ... 16384

TAPS = ("gradient", "weight", "update")
NORMS = ("grad_norm", "weight_norm", "update_norm")  # one of each tap

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def why_not(parameter: Tensor) -> str | None:
    """The reason why a parameter cannot be measured here, or None if it can."""
    if nn.parameter.is_lazy(parameter):
        return "lazy: not initialised yet"
    hidden = shards.engine(parameter)
    if hidden is not None:
        return hidden
    if shards.is_sharded(parameter):
        return shards.why_not(parameter) or (why_not(shards.own(parameter)) if shards.own(parameter).numel() else None)
    if hasattr(parameter, "_local_tensor"):
        return "sharded across ranks"
    if parameter.is_quantized or parameter.dtype not in READABLE:
        return f"dtype {parameter.dtype} holds no plain floating-point numbers"
    if parameter.layout != torch.strided:
        return f"layout {parameter.layout}"
    if parameter.numel() == 0:
        return "empty"
    if not _dense(parameter.detach()).is_contiguous():
        return "its memory has gaps"
    return None


class Bank:
    """The parameters of one optimizer on one device, ordered by size; of sharded ones, this rank's parts, all in one bank.

    probed: the parameters whose gradients are read again before the update; chosen here where it is None.
    Gradients, weights and updates are only kept when they are seen; ``lay`` measures all three at once when the step is over.
    """

    def __init__(self, parameters: Sequence[tuple[int, Tensor]], optimizer: int, model_elements: int, probed: Sequence[int] | None = None) -> None:
        self.sharded = shards.is_sharded(parameters[0][1])
        sizes = _padded_sizes([_elements(p) for _, p in parameters])
        by_size = sorted(zip(parameters, sizes, strict=True), key=lambda pair: (pair[1] or 10**12, pair[0][0]))
        self.optimizer = optimizer
        self.device = parameters[0][1].device
        self._small = [p for (_, p), size in by_size if size]
        self._large = [p for (_, p), size in by_size if not size]
        self._small_sites = np.array([i for (i, _), size in by_size if size], dtype=np.intp)
        self._large_sites = np.array([i for (i, _), size in by_size if not size], dtype=np.intp)
        self._parameter = dict(parameters)
        self._layout: list[tuple[int, int, int, Sites]] = []  # (first element, tensors, padded size, sites) of each size
        self.offsets: dict[int, int] = {}  # site -> first element in the gathered small gradients
        self._lay_out([size for _, size in by_size if size])
        self._runs = _runs(len(self._large), model_elements)
        self._kept = torch.zeros(3, self._total, device=self.device)  # small tensors: gradients, weights before, weights after and then updates
        self._sampled = torch.zeros(2, len(self._large) * self._runs * RUN, device=self.device)  # large ones: weights before, after
        self.gradients = self._kept[0]
        self._slots = self._make_slots()
        self._scale = np.sqrt(np.array([_elements(p) for p in self._large], dtype=np.float64) / (self._runs * RUN)) if self._large else None
        self._views: list[Tensor] = []
        self._pointers: list[int] = []
        self._missing: set[int] = set()
        self._norms: tuple[Sites, list[Tensor]] | None = None  # of the large gradients
        self._seen: list[tuple[int, int] | None] = []
        self._signs: Tensor | None = None  # for prints, made where they are asked for
        self._moved = False
        self.probes = self._choose_probes() if probed is None else [(s, p) for s, p in parameters if s in probed]
        self.sparse: set[int] = set()  # sites whose gradient was sparse: reading it would wait

    @property
    def parameters(self) -> list[Tensor]:
        """In the order of the bank: small ones by size, then large ones."""
        return [*self._small, *self._large]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return 4 * (self._kept.numel() + self._sampled.numel())

    def keep_gradients(self) -> list[int]:
        """Gradients as they are now, in the place of earlier ones. Returns the sites that had none; ``sparse`` gathers those not readable."""
        missing: list[int] = []
        if self._small:
            self._gather_gradients(missing)
        if self._large:
            self._measure_large_gradients(missing)
        self._missing = set(missing)
        self._seen = [shards.version(p) for _, p in self.probes]
        self.sparse.update(s for s in missing if self._parameter[s].grad is not None)
        return [s for s in missing if s not in self.sparse]

    @property
    def unreadable(self) -> dict[int, str]:
        """Sites whose gradient was there and could not be read, and why."""
        why = "its gradient lies on the ranks in another way than its weights" if self.sharded else "its gradient is sparse: reading it would wait"
        return dict.fromkeys(sorted(self.sparse), why)

    def keep_weights(self, *, alone: bool = False) -> None:
        """Weights as they are before the update. alone: no gradients will be kept beside them."""
        self._moved = False
        if alone:
            self._missing, self._norms = set(self._parameter), None
        self._gather_weights(self._kept[1], self._sampled[0])

    def keep_update(self) -> None:
        """The difference of the weights to those before."""
        self._moved = True
        self._gather_weights(self._kept[2], self._sampled[1])
        if self._small:
            torch.sub(self._kept[2], self._kept[1], out=self._kept[2])
        if self._large:
            torch.sub(self._sampled[1], self._sampled[0], out=self._sampled[1])

    def lay(self, row: Row, *, closely: bool = True) -> None:
        """Measure what was kept: norms of all three of one size are one operation. closely: look, too, what is left of the update."""
        taps = TAPS if self._moved else TAPS[:2]
        for first, count, size, sites in self._layout:
            kept = self._kept[: len(taps), first : first + count * size].view(len(taps), count, size)
            own = np.array([-1 if s in self._missing else s for s in sites], dtype=np.intp) if self._missing else sites
            row.add_block(NORMS[: len(taps)], [own, sites, sites], signals.norms(kept))
            for tap, numbers, those in zip(taps, kept, [own, sites, sites], strict=False):
                for chosen in _others(tap):
                    row.add(chosen.name, those, chosen.measure(numbers))
        if self._large:
            self._lay_large(row, taps)
        if self._moved and closely:
            self._lay_net_update(row)

    def _lay_net_update(self, row: Row) -> None:
        """How far the weights are now from those before the update: what is left of it, should somebody have written to them since."""
        self.keep_update()
        for first, count, size, sites in self._layout:
            row.add("net_update", sites, signals.norms(self._kept[2, first : first + count * size].view(1, count, size))[0])
        if self._large:
            row.add("net_update", self._large_sites, signals.norms(self._sampled[1].view(1, len(self._large), -1))[0], self._scale)

    def lay_exact_weights(self, row: Row) -> None:
        """Norms of all weights as they are, every element read: for the post-mortem of a non-finite loss."""
        for sites, parameters in ((self._small_sites, self._small), (self._large_sites, self._large)):
            if parameters:
                row.add_scalars("weight_norm", sites, signals.l2_of_each([shards.own(p).detach() for p in parameters]))

    def lay_prints(self, row: Row) -> None:
        """A projection of each tensor before the update on fixed random signs: equal where the weights are, on every rank."""
        if self._signs is None:
            width = max([SMALL if self._small else 0, self._runs * RUN if self._large else 0])
            draw = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
            self._signs = (torch.randint(2, (width,), generator=draw, dtype=torch.float32) * 2 - 1).to(self.device)
        for first, count, size, sites in self._layout:
            row.add("weight_print", sites, torch.mv(self._kept[1, first : first + count * size].view(count, size), self._signs[:size]))
        if self._large:
            samples = self._sampled[0].view(len(self._large), -1)
            row.add("weight_print", self._large_sites, torch.mv(samples, self._signs[: samples.shape[1]]), self._scale)

    @property
    def untouched(self) -> bool:
        """Whether the gradients of the probes are those that were kept: nobody clipped or unscaled them since. Sharded ones do
        not count what is written to all of them at once, so they are read again."""
        return not self.sharded and self._seen == [shards.version(p) for _, p in self.probes]

    def lay_probes(self, row: Row) -> None:
        """Norms of a few gradients as they are now: held against the earlier ones they give what clipping did."""
        there = [(s, g) for s, p in self.probes if (g := _gradient(p)) is not None]
        if there:
            row.add_scalars("clipped_norm", np.array([s for s, _ in there], dtype=np.intp), signals.l2_of_each([g for _, g in there]))

    # ---- inside

    def _lay_out(self, sizes: list[int]) -> None:
        first = k = 0
        for size in sorted(set(sizes)):
            sites = self._small_sites[k : k + sizes.count(size)]
            self._layout.append((first, len(sites), size, sites))
            self.offsets.update({int(site): first + j * size for j, site in enumerate(sites)})
            k, first = k + len(sites), first + len(sites) * size
        self._total = first
        self._pads = [torch.zeros(size - _elements(p), device=self.device) for p, size in zip(self._small, sizes, strict=True)]

    def _make_slots(self) -> list[Tensor]:
        """Where each small gradient goes: views of the kept ones, of the gradients' shapes."""
        places = [self.offsets[int(s)] for s in self._small_sites]
        shapes = [(*p.shape, 2) if p.is_complex() else shards.own(p).shape for p in self._small]
        return [self.gradients[at : at + _elements(p)].view(shape) for at, p, shape in zip(places, self._small, shapes, strict=True)]

    def _gather_gradients(self, missing: list[int]) -> None:
        found = [shards.gradient(p) for p in self._small] if self.sharded else [p.grad for p in self._small]
        there = [g for g in found if g is not None and g.layout == torch.strided]
        if len(there) == len(found):
            torch._foreach_copy_(self._slots, [_plain(g) if g.is_complex() else g for g in there])
            return
        self.gradients.zero_()
        readable = [k for k, g in enumerate(found) if g is not None and g.layout == torch.strided]
        missing += [int(s) for k, s in enumerate(self._small_sites) if k not in set(readable)]
        if readable:
            torch._foreach_copy_([self._slots[k] for k in readable], [_plain(g) if g.is_complex() else g for g in there])

    def _measure_large_gradients(self, missing: list[int]) -> None:
        there = [(int(s), g) for s, p in zip(self._large_sites, self._large, strict=True) if (g := _gradient(p)) is not None]
        found = [s for s, _ in there]
        missing += [int(s) for s in self._large_sites if s not in found]
        sites = self._large_sites if len(found) == len(self._large_sites) else np.array(found, dtype=np.intp)
        self._norms = (sites, signals.l2_of_each([g for _, g in there])) if there else None

    def _lay_large(self, row: Row, taps: Sequence[str]) -> None:
        if self._norms is not None:
            row.add_scalars("grad_norm", *self._norms)
            others = _others("gradient")
            if others:
                there = [g for s in self._norms[0] if (g := _gradient(self._parameter[int(s)])) is not None]
                rows = torch.stack([_spread(g.contiguous(), self._runs).reshape(-1) for g in there]).to(torch.float32)
                for chosen in others:
                    row.add(chosen.name, self._norms[0], chosen.measure(rows))
        samples = self._sampled[: len(taps) - 1].view(len(taps) - 1, len(self._large), -1)
        row.add_block(NORMS[1 : len(taps)], [self._large_sites] * 2, signals.norms(samples), self._scale)
        for tap, rows in zip(taps[1:], samples, strict=True):
            for chosen in _others(tap):
                row.add(chosen.name, self._large_sites, chosen.measure(rows), self._scale)

    def _gather_weights(self, small: Tensor, sampled: Tensor) -> None:
        parameters = self.parameters
        if not self._views or self._pointers != _pointers(parameters, self.sharded):
            self._views = self._make_views()
            self._pointers = _pointers(parameters, self.sharded)
        count = len(self._views) - len(self._large)
        if count:
            torch.cat(self._views[:count], out=small)
        if self._large:
            torch.cat(self._views[count:], out=sampled.view(-1, RUN))

    def _make_views(self) -> list[Tensor]:
        views: list[Tensor] = []
        for p, pad in zip(self._small, self._pads, strict=True):
            views.append(_dense(_plain(p)).view(-1))
            views += [pad] if pad.numel() else []
        return views + [_spread(p, self._runs) for p in self._large]

    def _choose_probes(self) -> list[tuple[int, Tensor]]:
        """Up to 8 tensors spread over the bank, the small first: reading them again is cheap."""
        pairs = list(zip([*self._small_sites, *self._large_sites], self.parameters, strict=True))
        stride = max(1, len(pairs) // 8)
        return [(int(s), p) for s, p in pairs[::stride][:8]]


def _others(tap: str) -> list[signals.Signal]:
    """The signals of a tap that are not its norm."""
    return [s for s in signals.of(tap) if s.name not in NORMS]


def _elements(p: Tensor) -> int:
    return shards.own(p).numel() * (2 if p.is_complex() else 1)


def _padded_sizes(elements: Sequence[int]) -> list[int]:
    """The size that each small tensor is padded to, 0 for a large one: one of BUCKETS, or the next larger one in use
    where few tensors of little weight move there, so that fewer operations measure them all."""
    sizes = [next((b for b in BUCKETS if n <= b), 0) for n in elements]
    allowed = WASTE * sum(sizes)
    for small, large in itertools.pairwise(sorted(set(sizes) - {0})):
        waste = (large - small) * sizes.count(small)
        if waste <= allowed:
            allowed -= waste
            sizes = [large if size == small else size for size in sizes]
    return sizes


def _runs(tensors: int, model_elements: int) -> int:
    """Runs of each large tensor's sample, bounded by SHARE of the model."""
    if not tensors:
        return 0
    affordable = int(SHARE * model_elements / (tensors * RUN))
    return max(MIN_RUNS, min(RUNS, max(affordable, RUNS if model_elements < 10**7 else 0)))


def _plain(t: Tensor) -> Tensor:
    """The tensor without autograd, of a sharded one this rank's part, complex numbers as pairs."""
    t = shards.own(t).detach()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _dense(t: Tensor) -> Tensor:
    """The same memory as a contiguous tensor, dimensions reordered where needed (channels-last weights)."""
    if t.is_contiguous():
        return t
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def _gradient(p: Tensor) -> Tensor | None:
    """The gradient, or None where there is none to read (none at all, or sparse: coalescing it would wait)."""
    g = shards.gradient(p) if shards.is_sharded(p) else p.grad
    if g is None or g.layout != torch.strided:
        return None
    return _plain(g) if g.is_complex() or g.requires_grad else g


def _spread(t: Tensor, runs: int) -> Tensor:
    """``runs`` runs of RUN neighbouring elements, spread over the whole memory of a large tensor: (runs, RUN), a view.

    The distance between runs is coprime with the last dimension, so that no column is favoured.
    """
    t = _dense(_plain(t))
    stride = (t.numel() - RUN) // max(1, runs - 1)
    while stride > RUN and math.gcd(stride, t.shape[-1]) != 1:
        stride -= 1
    return torch.as_strided(t, (runs, RUN), (stride, 1), t.storage_offset())


def _pointers(parameters: Sequence[Tensor], sharded: bool) -> list[int]:
    """Where the parameters' memory is; views of it must be made anew when it moved (0 for tensors without memory)."""
    try:
        return [shards.own(p).data_ptr() for p in parameters] if sharded else [p.data_ptr() for p in parameters]
    except RuntimeError:  # a wrapper without storage of its own
        return [id(p) for p in parameters]
