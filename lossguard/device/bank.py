"""Gathers the parameters of one optimizer on one device into rows, so that a few operations measure all of them.

Parameters flow in, vectors of numbers (one per parameter) flow into a ``Row``. Small tensors are read whole; large ones
are read through a spread sample for weights and updates, whole for gradient norms. Memory is bounded at attach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lossguard.device import signals
from lossguard.device.tape import Row, Scale, Sites

SMALL = 16384  # elements; tensors up to this size are read whole
RUN = 16  # elements of one run of a sample: a cache line of float32
RUNS = 1024  # runs of a large tensor's sample: within 1 to 4 % of the exact update ratio on dense updates
SHARE = 0.0025  # of a model's elements that samples may take once RUNS for each would exceed it ...
MIN_RUNS = 64  # ... but never fewer runs than this
BUCKETS = tuple(4**k for k in range(2, 8))  # small tensors are zero-padded to these sizes: 16 ... 16384

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def why_not(parameter: Tensor) -> str | None:
    """The reason why a parameter cannot be measured here, or None if it can."""
    if nn.parameter.is_lazy(parameter):
        return "lazy: not initialised yet"
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "_local_tensor"):
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
    """The parameters of one optimizer on one device, ordered by size.

    sites: the index of each parameter in the whole model's list, in the order of the bank.
    """

    def __init__(self, parameters: Sequence[tuple[int, Tensor]], optimizer: int, model_elements: int) -> None:
        by_size = sorted(parameters, key=lambda ip: (_bucket(ip[1]) or 10**12, ip[0]))
        self.optimizer = optimizer
        self.device = by_size[0][1].device
        self._small = [p for _, p in by_size if _bucket(p)]
        self._large = [p for _, p in by_size if not _bucket(p)]
        self._small_sites = np.array([i for i, p in by_size if _bucket(p)], dtype=np.intp)
        self._large_sites = np.array([i for i, p in by_size if not _bucket(p)], dtype=np.intp)
        self._parameter = dict(parameters)
        self._runs = _runs(len(self._large), model_elements)
        self._zeros = torch.zeros(SMALL if self._small else 0, device=self.device)
        self._layout: list[tuple[int, int, int]] = []  # (first element, tensors, padded size) of each bucket
        self.offsets: dict[int, int] = {}  # site -> first element in the gathered small gradients
        self._pads: list[Tensor] = []
        self._lay_out()
        self._before = torch.zeros(self._total, device=self.device)
        self._after = torch.zeros(self._total, device=self.device)
        self.gradients = torch.zeros(self._small_total, device=self.device)
        self._views: list[Tensor] = []
        self._pointers: list[int] = []
        self.probes = self._choose_probes()
        self.sparse: set[int] = set()  # sites whose gradient was sparse: reading it would wait

    @property
    def parameters(self) -> list[Tensor]:
        """In the order of the bank: small ones by size, then large ones."""
        return [*self._small, *self._large]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return 4 * (2 * self._total + self._small_total + self._zeros.numel())

    def record_gradients(self, row: Row) -> list[int]:
        """Norms of all gradients as they are now. Returns the sites that had none; ``sparse`` gathers those not readable."""
        missing: list[int] = []
        if self._small:
            self._gather_gradients(missing)
            drop = set(missing)
            sites = np.array([-1 if s in drop else s for s in self._small_sites], dtype=np.intp) if drop else self._small_sites
            for chosen in signals.of("gradient"):
                for vector, part in self._by_bucket(self.gradients, sites, chosen.measure):
                    row.add(chosen.name, part, vector)
        if self._large:
            self._record_large_gradients(row, missing)
        self.sparse.update(s for s in missing if self._parameter[s].grad is not None)
        return [s for s in missing if s not in self.sparse]

    def record_before(self, row: Row) -> None:
        """Keep the weights as they are, and record their norms."""
        self._gather_weights(self._before)
        self._record("weight", self._before, row)

    def record_after(self, row: Row) -> None:
        """Record the difference to the weights kept by :meth:`record_before`."""
        self._gather_weights(self._after)
        torch.sub(self._after, self._before, out=self._after)
        self._record("update", self._after, row)

    def record_exact_weights(self, row: Row) -> None:
        """Norms of all weights as they are, every element read: for the post-mortem of a non-finite loss."""
        for sites, parameters in ((self._small_sites, self._small), (self._large_sites, self._large)):
            if parameters:
                row.add_scalars("weight_norm", sites, signals.l2_of_each([p.detach() for p in parameters]))

    def record_probes(self, row: Row) -> None:
        """Norms of a few gradients as they are now: held against the earlier ones they give what clipping did."""
        there = [(s, g) for s, p in self.probes if (g := _gradient(p)) is not None]
        if there:
            row.add_scalars("clipped_norm", np.array([s for s, _ in there], dtype=np.intp), signals.l2_of_each([g for _, g in there]))

    # ---- inside

    def _lay_out(self) -> None:
        first = 0
        sizes = [_bucket(p) for p in self._small]
        for size in sorted(set(sizes)):
            chosen = [(int(s), p) for s, p, b in zip(self._small_sites, self._small, sizes, strict=True) if b == size]
            self._layout.append((first, len(chosen), size))
            for k, (site, _) in enumerate(chosen):
                self.offsets[site] = first + k * size
            first += len(chosen) * size
        self._small_total = first
        self._total = first + len(self._large) * self._runs * RUN
        # what a gather joins: zeros in the place of each gradient, and the padding behind it; and where each gradient goes
        self._template: list[Tensor] = []
        self._slots: list[tuple[int, int, Tensor]] = []
        for site, p, size in zip(self._small_sites, self._small, sizes, strict=True):
            self._slots.append((len(self._template), int(site), p))
            self._template.append(self._zeros[: _elements(p)])
            self._template += [self._zeros[: size - _elements(p)]] if size > _elements(p) else []
        self._pads = [self._zeros[: size - _elements(p)] for p, size in zip(self._small, sizes, strict=True)]

    def _gather_gradients(self, missing: list[int]) -> None:
        pieces = self._template.copy()
        for k, site, p in self._slots:
            g = p.grad
            if g is not None and g.layout == torch.strided:
                pieces[k] = (_plain(g) if g.requires_grad or g.is_complex() else g).reshape(-1)
            else:
                missing.append(site)
        torch.cat(pieces, out=self.gradients)

    def _record_large_gradients(self, row: Row, missing: list[int]) -> None:
        there = [(int(s), g) for s, p in zip(self._large_sites, self._large, strict=True) if (g := _gradient(p)) is not None]
        missing += [int(s) for s, p in zip(self._large_sites, self._large, strict=True) if _gradient(p) is None]
        if not there:
            return
        sites = np.array([s for s, _ in there], dtype=np.intp)
        row.add_scalars("grad_norm", sites, signals.l2_of_each([g for _, g in there]))
        others = [s for s in signals.of("gradient") if s.name != "grad_norm"]
        if others:
            rows = torch.stack([_spread(g.contiguous(), self._runs).reshape(-1) for _, g in there]).to(torch.float32)
            for chosen in others:
                row.add(chosen.name, sites, chosen.measure(rows))

    def _gather_weights(self, out: Tensor) -> None:
        if not self._views or self._pointers != _pointers(self.parameters):
            self._views = self._make_views()
            self._pointers = _pointers(self.parameters)
        count = len(self._views) - len(self._large)
        if count:
            torch.cat(self._views[:count], out=out[: self._small_total])
        if self._large:
            torch.cat(self._views[count:], out=out[self._small_total :].view(-1, RUN))

    def _make_views(self) -> list[Tensor]:
        views: list[Tensor] = []
        for p, pad in zip(self._small, self._pads, strict=True):
            views.append(_dense(_plain(p)).view(-1))
            views += [pad] if pad.numel() else []
        return views + [_spread(p, self._runs) for p in self._large]

    def _record(self, tap: str, flat: Tensor, row: Row) -> None:
        for chosen in signals.of(tap):
            for vector, sites in self._by_bucket(flat, self._small_sites, chosen.measure):
                row.add(chosen.name, sites, vector)
            if self._large:
                rows = flat[self._small_total :].view(len(self._large), -1)
                row.add(chosen.name, self._large_sites, chosen.measure(rows), self._sample_scale())

    def _by_bucket(self, flat: Tensor, sites: Sites, measure: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Sites]]:
        found, k = [], 0
        for first, count, size in self._layout:
            found.append((measure(flat[first : first + count * size].view(count, size)), sites[k : k + count]))
            k += count
        return found

    def _sample_scale(self) -> Scale:
        """A norm over a sample times sqrt(all / sampled) estimates the norm over all elements."""
        return np.sqrt(np.array([_elements(p) for p in self._large], dtype=np.float64) / (self._runs * RUN))

    def _choose_probes(self) -> list[tuple[int, Tensor]]:
        """Up to 8 tensors spread over the bank, the small first: reading them again is cheap."""
        pairs = list(zip([*self._small_sites, *self._large_sites], self.parameters, strict=True))
        stride = max(1, len(pairs) // 8)
        return [(int(s), p) for s, p in pairs[::stride][:8]]


def _elements(p: Tensor) -> int:
    return p.numel() * (2 if p.is_complex() else 1)


def _bucket(p: Tensor) -> int:
    """The padded size of a small tensor, 0 for a large one."""
    n = _elements(p)
    return next((b for b in BUCKETS if n <= b), 0)


def _runs(tensors: int, model_elements: int) -> int:
    """Runs of each large tensor's sample, bounded by SHARE of the model."""
    if not tensors:
        return 0
    affordable = int(SHARE * model_elements / (tensors * RUN))
    return max(MIN_RUNS, min(RUNS, max(affordable, RUNS if model_elements < 10**7 else 0)))


def _plain(t: Tensor) -> Tensor:
    """The tensor without autograd, complex numbers as pairs."""
    t = t.detach()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _dense(t: Tensor) -> Tensor:
    """The same memory as a contiguous tensor, dimensions reordered where needed (channels-last weights)."""
    if t.is_contiguous():
        return t
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def _gradient(p: Tensor) -> Tensor | None:
    """The gradient, or None where there is none to read (none at all, or sparse: coalescing it would wait)."""
    g = p.grad
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


def _pointers(parameters: Sequence[Tensor]) -> list[int]:
    """Where the parameters' memory is; views of it must be made anew when it moved (0 for tensors without memory)."""
    try:
        return [p.data_ptr() for p in parameters]
    except RuntimeError:  # a wrapper without storage of its own
        return [id(p) for p in parameters]
