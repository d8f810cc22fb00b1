"""Collects what the modules of one forward pass gave, and reduces it to a few numbers each. Never reads a value.

Module outputs flow in one by one, vectors (one number per module call) flow into rows of the tape. Small outputs of one
shape are kept until the end of the forward pass and reduced together, at most ``room`` bytes in all; of large ones the norm,
a small sample and the peaks of ReLU units are taken at once. An output that was overwritten in place meanwhile is left
out and read at once from then on.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossguard.device import outputs, signals
from lossguard.device.joint import Joint
from lossguard.device.tape import Row, Scale, Sites
from lossguard.device.units import SilentUnits, window

SMALL = 16384  # elements of an output that is kept rather than reduced at once
KEEP = 8 * 2**20  # bytes of outputs kept at most ...
LARGE_MODEL = 10**8  # ... elements of a model above which the guard holds at most 1 % of its size, and
KEEP_LITTLE = 2**19  # bytes of outputs that are then kept at most
LARGE_SAMPLES = 16  # large outputs of other than activation modules that are sampled, spread over the depth
MAX_CALLS = 8  # calls of one module told apart in a step
KNOWN = 256  # sets of sites whose indices are kept as arrays
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
class _Taken:
    """What was taken of K outputs of one family and shape: samples (K, r, f), and for ReLUs the peak of each unit (K, units)."""

    family: int
    sites: list[Site]
    samples: Tensor | None
    peaks: Tensor | None = None
    positions: int = 0


class Forward:
    """What one forward pass of a sampled step left behind, on one guard. ``sites`` grows as calls are first seen."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.units = SilentUnits()
        self.joint: Joint | None = None  # with whom the batch is shared, where its units are to be those of all ranks
        self.unwatched: set[str] = set()  # calls that could not be measured, and why
        self._by_call: dict[tuple[str, int], Site] = {}
        self._calls: dict[str, int] = {}
        self._kept: list[tuple[Site, Tensor, int]] = []  # small outputs, and the version each had
        self._taken: list[_Taken] = []
        self._norms: list[tuple[Site, int, Tensor]] = []  # site, elements, norm of each large output
        self.room = KEEP
        self._bytes = 0
        self._at_once: set[int] = set()  # sites whose output is overwritten in place
        self._arrays: dict[tuple[int, ...], Sites] = {}
        self._plans: dict[tuple[int, ...], tuple[int, list[tuple[signals.Signal, slice | list[int], Sites]]]] = {}
        self._large: list[int] = []  # sites with large outputs that are no activations, as first seen
        self._spread: frozenset[int] = frozenset()  # those of them that are sampled
        self.covered: set[str] = set()  # modules whose every output went straight into one that shows it
        self._last: tuple[str, str, weakref.ref[Tensor]] | None = None  # the module before, its class and output, while steps are dense
        self._uncovered: set[str] = set()
        self._conv1d = False  # whether the last shaping module of three dimensions put channels first

    def fit(self, elements: int) -> None:
        """A model of so many elements is watched."""
        self.room = KEEP if elements < LARGE_MODEL else KEEP_LITTLE

    def begin(self) -> None:
        """A new step: forget calls that led to no update."""
        self._calls.clear()
        self._clear()

    def add(self, name: str, kind: str, output: Tensor) -> Site | None:
        """One module call's output. Returns its site, None if it is not watched."""
        site = self._site(name, kind, output)
        if site is None:
            return None
        self._look(site, output)
        return site

    def again(self, site: Site, output: Tensor) -> bool:
        """A shortcut of :meth:`add` for a module known to be called once a step; False if that does not serve."""
        if output.layout is not torch.strided or output.is_nested or output.is_inference() or site.name in self._calls or not output.numel():
            return False
        self._look(site, output)
        self._calls[site.name] = 1
        return True

    def follow(self, name: str, kind: str, given: object, output: Tensor) -> None:
        """Learn which modules need no look of their own: what follows shows what it was given."""
        if self._last is not None:
            before, its_kind, its_output = self._last
            shown = given is its_output() and isinstance(given, Tensor) and outputs.shown_by(its_kind, given, kind)
            (self.covered if shown else self._uncovered).add(before)
            self.covered -= self._uncovered
        self._last = name, kind, weakref.ref(output)

    def finish(self, row_of: Callable[[torch.device], Row]) -> None:
        """The forward pass is over: reduce what was kept, outputs of one shape together."""
        groups: dict[Hashable, list[tuple[Site, Tensor]]] = {}
        for site, output, version in self._kept:
            if output._version != version:
                self._at_once.add(site.index)  # overwritten in place: too late for this step
                continue
            key = (output.shape, site.channels_first and outputs.in_rows(output), site.channels_first, output.dtype, output.device)
            if key in groups:
                groups[key].append((site, output))
            else:
                groups[key] = [(site, output)]
        for group in groups.values():
            self._take_together(group, row_of(group[0][1].device))
        self._lay_norms(row_of)
        self._lay_samples(row_of)
        self._lay_silence(row_of)
        self._clear()

    @property
    def nbytes(self) -> int:
        """Device bytes held between steps, and at most kept during a forward pass."""
        return self.units.nbytes + self.room * bool(self.sites)

    # ---- inside

    def _clear(self) -> None:
        self._kept.clear()
        self._taken.clear()
        self._norms.clear()
        self._last = None
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
                self._spread = frozenset(self._large[:: -(-len(self._large) // LARGE_SAMPLES)])
        return site

    def _look(self, site: Site, output: Tensor) -> None:
        """Keep a small output, measure a large one."""
        nbytes = output.numel() * output.element_size()
        if output.numel() <= SMALL and self._bytes + nbytes <= self.room and site.index not in self._at_once:
            self._kept.append((site, output, output._version))
            self._bytes += nbytes
        else:
            self._take(site, output.detach())

    def _take(self, site: Site, output: Tensor) -> None:
        """A large output: one operation for its norm, one for a sample, one for the peaks of its units."""
        self._norms.append((site, output.numel(), signals.l2(output)))
        family = _family(site.kind)
        taken = _Taken(family, [site], None)
        if family or site.index in self._spread or output.numel() <= SMALL:
            taken.samples = outputs.few(output, site.channels_first).to(torch.float32, copy=True)
        if family == RELU:
            unit = 1 if site.channels_first else output.dim() - 1
            taken.peaks = output.amax(dim=tuple(d for d in range(output.dim()) if d != unit)).reshape(1, -1)
            taken.positions = output.numel() // max(1, site.width)
        self._taken.append(taken)

    def _take_together(self, group: list[tuple[Site, Tensor]], row: Row) -> None:
        """Small outputs of one shape: stacked once, their norms and peaks are one operation each."""
        if len(group) > 1:
            group.sort(key=_family_of)
        first, output = group[0]
        sites = [site for site, _ in group]
        plain = output.dim() == 2  # samples by features already
        rows = [o if plain else outputs.matrix(o, first.channels_first) for _, o in group]
        stacked = torch.stack(rows) if len(rows) > 1 else rows[0].detach().unsqueeze(0)  # (K, R, F)
        stacked = stacked.to(torch.float32) if stacked.dtype == torch.float64 else stacked
        elements = stacked.shape[1] * stacked.shape[2]
        norms = torch.linalg.vector_norm(stacked, dim=(1, 2), dtype=torch.float32)
        row.add("activation_rms", self._indices(sites), norms, _scales(len(group), elements**-0.5))
        samples = outputs.sample(stacked)
        start = 0
        for family, members in itertools.groupby(sites, key=_family_of_site):
            part = slice(start, start := start + len(list(members)))
            taken = _Taken(family, sites[part], samples[part])
            if family == RELU:
                taken.peaks = self._peaks(stacked[part], first.width)
                taken.positions = elements // max(1, first.width)
            self._taken.append(taken)

    def _indices(self, sites: Sequence[Site]) -> Sites:
        """The indices of these sites: the same array for the same sites, so that the row's layout is known again."""
        key = tuple([site.index for site in sites])
        known = self._arrays.get(key)
        if known is None:
            if len(self._arrays) >= KNOWN:
                self._arrays.clear()
            known = self._arrays[key] = np.array(key, dtype=np.intp)
        return known

    @staticmethod
    def _peaks(stacked: Tensor, width: int) -> Tensor:
        """The largest value of each unit over samples and positions: (K, R, F) -> (K, width)."""
        peaks = stacked.amax(dim=1)
        if peaks.shape[1] != width:  # channels first: F is channels x positions
            peaks = peaks.view(len(stacked), width, -1).amax(dim=2)
        return peaks

    def _lay_norms(self, row_of: Callable[[torch.device], Row]) -> None:
        for device in {norm.device for _, _, norm in self._norms}:
            large = [n for n in self._norms if n[2].device == device]
            sites = np.array([site.index for site, _, _ in large], dtype=np.intp)
            row_of(device).add_scalars("activation_rms", sites, [norm for _, _, norm in large], np.array([n**-0.5 for _, n, _ in large]))

    def _lay_samples(self, row_of: Callable[[torch.device], Row]) -> None:
        """Samples of one shape, of small and large outputs alike: joined once, each signal is measured on all of its kinds."""
        groups: dict[Hashable, list[tuple[_Taken, Tensor]]] = {}
        for t in sorted(self._taken, key=lambda t: t.family):
            if t.samples is not None:
                groups.setdefault((t.samples.shape[1:], t.samples.device), []).append((t, t.samples))
        for group in groups.values():
            samples = group[0][1] if len(group) == 1 else torch.cat([s for _, s in group])
            samples = samples.to(torch.float32)
            sites = [site for t, _ in group for site in t.sites]
            for chosen, part, indices in self._measured(sites):
                if chosen.name in signals.SPREAD and samples.shape[1] < outputs.MIN_SAMPLES:
                    continue
                those = samples[part] if isinstance(part, slice) else torch.stack([samples[i] for i in part])
                row_of(samples.device).add(chosen.name.removesuffix("_tanh"), indices, chosen.measure(those))

    def _measured(self, sites: Sequence[Site]) -> list[tuple[signals.Signal, slice | list[int], Sites]]:
        """Which signal is measured on which of these sites, side by side as those of the built-in families are."""
        key = tuple([site.index for site in sites])
        known = self._plans.get(key)
        if known is None or known[0] != len(signals.SIGNALS):
            plan: list[tuple[signals.Signal, slice | list[int], Sites]] = []
            for chosen in signals.of("activation"):
                part = [i for i, site in enumerate(sites) if not chosen.kinds or site.kind in chosen.kinds]
                if part:
                    together = part[-1] - part[0] + 1 == len(part)
                    plan.append((chosen, slice(part[0], part[-1] + 1) if together else part, self._indices([sites[i] for i in part])))
            if len(self._plans) >= KNOWN:
                self._plans.clear()
            known = self._plans[key] = len(signals.SIGNALS), plan
        return known[1]

    def _lay_silence(self, row_of: Callable[[torch.device], Row]) -> None:
        """Peaks of layers of one width: one set of counters for all of them."""
        groups: dict[tuple[int, torch.device, int], list[tuple[_Taken, Tensor]]] = {}
        for t in self._taken:
            if t.peaks is not None and self.joint is not None and self.joint.takes([site.index for site in t.sites], t.peaks):
                self.joint.fired([site.index for site in t.sites], t.peaks, t.positions)
            elif t.peaks is not None:
                groups.setdefault((t.peaks.shape[1], t.peaks.device, window(t.positions)), []).append((t, t.peaks))
        for (_, device, batches), group in groups.items():
            sites = [site for t, _ in group for site in t.sites]
            peaks = group[0][1] if len(group) == 1 else torch.cat([p for _, p in group])
            share = self.units.update([site.index for site in sites], peaks, batches)
            if share is not None:
                row_of(device).add("dead_fraction", self._indices(sites), share)


RELU = 1
# The groups of module classes that share their signals, numbered, so that they can be put side by side; 0: none of their own.
_FAMILIES = dict.fromkeys(signals.RELU_KINDS, RELU) | {
    kind: number for number, chosen in enumerate(signals.of("activation"), 2) if chosen.kinds != signals.RELU_KINDS for kind in chosen.kinds
}


def _family(kind: str) -> int:
    """The number of the group of module classes that share their signals."""
    return _FAMILIES.get(kind, 0)


def _family_of_site(site: Site) -> int:
    return _FAMILIES.get(site.kind, 0)


def _family_of(pair: tuple[Site, Tensor]) -> int:
    return _FAMILIES.get(pair[0].kind, 0)


@functools.lru_cache(maxsize=KNOWN)
def _scales(n: int, scale: float) -> Scale:
    """n times the same scale: the same array for the same numbers, so that the row's layout is known again."""
    return np.full(n, scale)
