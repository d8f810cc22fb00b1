"""Collects what the modules of one forward pass gave, and reduces it to a few numbers each. Never reads a value.

Module outputs flow in one by one, vectors (one number per module call) flow into rows of the tape. Small outputs of one
shape are kept until the end of the forward pass and reduced together, at most KEEP bytes in all; of large ones the norm,
a small sample and the peaks of ReLU units are taken at once. An output that was overwritten in place meanwhile is left
out and read at once from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossguard.device import outputs, signals
from lossguard.device.tape import Row
from lossguard.device.units import SilentUnits, window

SMALL = 16384  # elements of an output that is kept rather than reduced at once
KEEP = 8 * 2**20  # bytes of outputs kept at most
MIN_SAMPLES = 8  # rows below which samples say nothing about their spread
LARGE_SAMPLES = 16  # large outputs of other than activation modules that are sampled, spread over the depth
MAX_CALLS = 8  # calls of one module told apart in a step
MAX_SITES = 2048  # module calls watched at most


@dataclass(frozen=True)
class Site:
    """One module call: its place in execution order, its name (``relu``, ``relu[1]`` for a second call), its class,
    how many units it has, and whether these stand in dimension 1 (convolutions) or in the last."""

    index: int
    name: str
    kind: str
    width: int
    channels_first: bool


@dataclass
class _Kept:
    """A small output, and the version it had."""

    site: Site
    output: Tensor
    version: int


@dataclass
class _Taken:
    """What was taken of one output: its norm (large ones), a sample (r, f), the peak of each ReLU unit (units,)."""

    site: Site
    elements: int
    norm: Tensor | None = None
    sample: Tensor | None = None
    peaks: Tensor | None = None
    positions: int = 0


class Forward:
    """What one forward pass of a sampled step left behind, on one guard. ``sites`` grows as calls are first seen."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.units = SilentUnits()
        self.unwatched: set[str] = set()  # calls that could not be measured, and why
        self._by_call: dict[tuple[str, int], Site] = {}
        self._calls: dict[str, int] = {}
        self._kept: list[_Kept] = []
        self._taken: list[_Taken] = []
        self._bytes = 0
        self._at_once: set[int] = set()  # sites whose output is overwritten in place
        self._large: list[int] = []  # sites with large outputs that are no activations, as first seen
        self._conv1d = False  # whether the last shaping module of three dimensions put channels first

    def begin(self) -> None:
        """A new step: forget calls that led to no update."""
        self._calls.clear()
        self._clear()

    def add(self, name: str, kind: str, output: Tensor) -> Site | None:
        """One module call's output. Returns its site, None if it is not watched."""
        site = self._site(name, kind, output)
        if site is None:
            return None
        nbytes = output.numel() * output.element_size()
        if output.numel() <= SMALL and self._bytes + nbytes <= KEEP and site.index not in self._at_once:
            self._kept.append(_Kept(site, output, output._version))
            self._bytes += nbytes
        else:
            with torch.no_grad():
                self._take(site, output)
        return site

    def finish(self, row_of: Callable[[torch.device], Row]) -> None:
        """The forward pass is over: reduce what was kept, outputs of one shape together."""
        groups: dict[Hashable, list[_Kept]] = {}
        for kept in self._kept:
            if kept.output._version != kept.version:
                self._at_once.add(kept.site.index)  # overwritten in place: too late for this step
                continue
            groups.setdefault((kept.output.shape, kept.site.channels_first, kept.output.dtype, kept.output.device), []).append(kept)
        for group in groups.values():
            self._take_together(group, row_of(group[0].output.device))
        self._lay_norms(row_of)
        self._lay_samples(row_of)
        self._lay_silence(row_of)
        self._clear()

    @property
    def nbytes(self) -> int:
        """Device bytes held between steps, and at most kept during a forward pass."""
        return self.units.nbytes + KEEP * bool(self.sites)

    # ---- inside

    def _clear(self) -> None:
        self._kept.clear()
        self._taken.clear()
        self._bytes = 0

    def _site(self, name: str, kind: str, output: Tensor) -> Site | None:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        site = self._by_call.get((name, call))
        if site is None:
            if call >= MAX_CALLS or len(self.sites) >= MAX_SITES:
                self.unwatched.add(f"{name}: more than {MAX_CALLS} calls a step" if call >= MAX_CALLS else f"{name}: more than {MAX_SITES} module calls")
                return None
            if kind in outputs.SHAPING:
                self._conv1d = kind in outputs.CHANNELS_FIRST
            first = output.dim() >= 4 or (output.dim() == 3 and self._conv1d)
            width = output.shape[1] if first else output.shape[-1] if output.dim() > 1 else 1
            site = Site(len(self.sites), name if call == 0 else f"{name}[{call}]", kind, width, first)
            self.sites.append(site)
            self._by_call[name, call] = site
            if output.numel() > SMALL and not _family(kind):
                self._large.append(site.index)
        return site

    def _take(self, site: Site, output: Tensor) -> None:
        """A large output: one operation for its norm, one for a sample, one for the peaks of its units."""
        taken = _Taken(site, output.numel(), signals.l2(output))
        if _family(site.kind) or site.index in self._large[:: -(-len(self._large) // LARGE_SAMPLES)]:
            taken.sample = outputs.sample(outputs.matrix(output, site.channels_first)).to(torch.float32, copy=True)
        if site.kind in signals.RELU_KINDS:
            unit = 1 if site.channels_first else output.dim() - 1
            taken.peaks = output.amax(dim=tuple(d for d in range(output.dim()) if d != unit)).reshape(-1)
            taken.positions = output.numel() // max(1, site.width)
        self._taken.append(taken)

    def _take_together(self, group: list[_Kept], row: Row) -> None:
        """Small outputs of one shape: stacked once, their norms and peaks are one operation each."""
        group.sort(key=lambda k: _family(k.site.kind))
        rows = [outputs.matrix(k.output, k.site.channels_first) for k in group]
        stacked = torch.stack(rows)  # (K, R, F)
        sites = np.array([k.site.index for k in group], dtype=np.intp)
        norms = torch.linalg.vector_norm(stacked, dim=(1, 2), dtype=None if stacked.dtype == torch.float64 else torch.float32)
        row.add("activation_rms", sites, norms, np.full(len(group), stacked[0].numel() ** -0.5))
        part = _slice_of([k.site for k in group], signals.RELU_KINDS)
        peaks = None if part is None else self._peaks(stacked[part], group[0].site.width)
        for k, (kept, matrix) in enumerate(zip(group, rows, strict=True)):
            taken = _Taken(kept.site, kept.output.numel(), sample=outputs.sample(matrix))
            if peaks is not None and part is not None and part.start <= k < part.stop:
                taken.peaks = peaks[k - part.start]
                taken.positions = kept.output.numel() // max(1, kept.site.width)
            self._taken.append(taken)

    @staticmethod
    def _peaks(stacked: Tensor, width: int) -> Tensor:
        """The largest value of each unit over samples and positions: (K, R, F) -> (K, width)."""
        peaks = stacked.amax(dim=1)
        if peaks.shape[1] != width:  # channels first: F is channels x positions
            peaks = peaks.view(len(stacked), width, -1).amax(dim=2)
        return peaks

    def _lay_norms(self, row_of: Callable[[torch.device], Row]) -> None:
        for device in {t.norm.device for t in self._taken if t.norm is not None}:
            large = [(t, t.norm) for t in self._taken if t.norm is not None and t.norm.device == device]
            sites = np.array([t.site.index for t, _ in large], dtype=np.intp)
            row_of(device).add_scalars("activation_rms", sites, [norm for _, norm in large], np.array([t.elements**-0.5 for t, _ in large]))

    def _lay_samples(self, row_of: Callable[[torch.device], Row]) -> None:
        """Samples of one shape, of small and large outputs alike: stacked once, each signal is measured on all of its kinds."""
        groups: dict[Hashable, list[tuple[Site, Tensor]]] = {}
        for t in self._taken:
            if t.sample is not None:
                groups.setdefault((t.sample.shape, t.sample.device), []).append((t.site, t.sample))
        for group in groups.values():
            group.sort(key=lambda pair: _family(pair[0].kind))
            sites = [site for site, _ in group]
            indices = np.array([site.index for site in sites], dtype=np.intp)
            samples = torch.stack([s if s.dtype == torch.float32 else s.to(torch.float32) for _, s in group])
            for chosen in signals.of("activation"):
                part = [i for i, site in enumerate(sites) if not chosen.kinds or site.kind in chosen.kinds]
                if not part or (chosen.name == "sample_variance" and samples.shape[1] < MIN_SAMPLES):
                    continue
                together = part[-1] - part[0] + 1 == len(part)
                those = samples[part[0] : part[-1] + 1] if together else torch.stack([samples[i] for i in part])
                row_of(samples.device).add(chosen.name.removesuffix("_tanh"), indices[part], chosen.measure(those))

    def _lay_silence(self, row_of: Callable[[torch.device], Row]) -> None:
        """Peaks of layers of one width: one set of counters for all of them."""
        groups: dict[Hashable, list[tuple[_Taken, Tensor]]] = {}
        for t in self._taken:
            if t.peaks is not None:
                groups.setdefault((t.peaks.shape, t.peaks.device, window(t.positions)), []).append((t, t.peaks))
        for (_, device, batches), group in groups.items():  # type: ignore[misc]
            indices = tuple(t.site.index for t, _ in group)
            share = self.units.update(indices, torch.stack([p for _, p in group]), batches)
            if share is not None:
                row_of(device).add("dead_fraction", np.array(indices, dtype=np.intp), share)


_FAMILIES = (signals.RELU_KINDS, *(s.kinds for s in signals.of("activation") if s.kinds and s.kinds != signals.RELU_KINDS))


def _family(kind: str) -> int:
    """The number of the group of module classes that share their signals; 0 for those without any of their own."""
    return next((i for i, kinds in enumerate(_FAMILIES, 1) if kind in kinds), 0)


def _slice_of(sites: list[Site], kinds: tuple[str, ...]) -> slice | None:
    """The slice of sites of these kinds; they stand side by side because sites are sorted by family."""
    chosen = [i for i, s in enumerate(sites) if s.kind in kinds]
    return slice(chosen[0], chosen[-1] + 1) if chosen else None
