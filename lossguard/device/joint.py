"""Numbers of which every rank measures a part: joined by one collective a sampled step. Never reads a value.

Norms of this rank's shards and the units that fired in its batch flow in, as into a ``Row``; one packed vector of sums goes
round on the training's own group; true norms of whole parameters and dead units of the joined batch flow out. The vector has
the same length on every rank, which is compared once, and its first number counts the ranks that could measure: where one
could not, the host drops the step's joined numbers. So a fault on one rank costs numbers, and hangs nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lossguard.device import shards
from lossguard.device.tape import JOINED, Layout, Row, Sites
from lossguard.device.units import SilentUnits, window

SQUARED = ("grad_norm", "weight_norm", "update_norm", "net_update", "clipped_norm")  # squares of parts add up to that of the whole
MAX_UNITS = 65536  # ReLU units joined: half a megabyte of the packed vector; our own choice, layers beyond are each rank's own
PROBES = 8  # parameters whose gradients are read again before the update


@dataclass
class _Fired:
    """The peaks of K layers' units in this rank's batch: (K, U), and how many positions each has."""

    sites: list[int]
    peaks: Tensor
    positions: int


class Joint:
    """What all ranks measure together. ``on`` where there is something to be joined: sharded parameters, or a model that
    ``DistributedDataParallel`` keeps in step. Takes the place of a ``Row`` for the banks of sharded parameters."""

    def __init__(self, units: SilentUnits) -> None:
        self.groups: list[Any] = []
        self.faults: list[str] = []  # why numbers of some step were not joined on this rank
        self.over: str | None = None  # why nothing is joined any more
        self._units = units
        self._sites: list[int] = []  # sharded parameters, as all ranks list them
        self._empty: frozenset[int] = frozenset()  # those of which this rank holds no element, and never a gradient
        self._weights: dict[int, float] = {}
        self._probed: list[int] = []
        self._names: list[str] = []
        self._device = torch.device("cpu")
        self._row = Row(self._device)
        self._out = Row(self._device)
        self._fired: list[_Fired] = []
        self._places: dict[int, tuple[int, int]] | None = None  # layer -> first unit, units; None until compared
        self._plans: dict[int, tuple[Layout, Tensor, Tensor]] = {}
        self._arrays: dict[tuple[int, ...], Sites] = {}

    @property
    def on(self) -> bool:
        """Whether this step's numbers may be joined."""
        return len(self.groups) > 0 and self.over is None

    @property
    def ranks(self) -> int:
        """How many ranks' batches a joined batch has; 1 where nothing is joined."""
        return dist.get_world_size(self.groups[0]) if self.on and len(self.groups) == 1 else 1

    def plan(self, sites: Sequence[int], parameters: Sequence[Tensor], names: Sequence[str]) -> list[int] | None:
        """The sharded parameters. Returns those of which this rank holds something; None if their parts cannot be joined."""
        if not parameters:
            self._sites = []
            return []
        found = shards.common(parameters)
        if found is None:
            return None
        self.groups, weights = found
        self._sites, self._names = list(sites), [f"{name} {tuple(p.shape)}" for name, p in zip(names, parameters, strict=True)]
        self._weights = dict(zip(sites, weights, strict=True))
        parts = [shards.own(p) for p in parameters]
        self._empty = frozenset(s for s, part in zip(sites, parts, strict=True) if not part.numel())
        self._probed = self._sites[:: max(1, len(self._sites) // PROBES)][:PROBES]
        self._use(parts[0].device)
        return [s for s in sites if s not in self._empty]

    @property
    def probed(self) -> list[int]:
        """The parameters whose gradients are read again: the same on every rank."""
        return self._probed

    def follow(self, group: Any, device: torch.device) -> None:
        """The model's gradients are averaged over this group at each step: units of its batches can be joined."""
        if not self.groups:
            self.groups = [group]
            self._use(device)

    # ---- what a step measures: the methods of a row

    def begin(self) -> None:
        """A new step: forget what was not joined."""
        self._fired = []
        self._row.discard()

    def add(self, signal: str, sites: Sites, numbers: Tensor, scale: Any = None) -> None:
        """As :meth:`Row.add`; a signal of the user's own is no norm and is left out."""
        if signal in SQUARED:
            self._row.add(signal, sites, numbers, scale)

    def add_block(self, names: Sequence[str], sites: Sequence[Sites], numbers: Tensor, scale: Any = None) -> None:
        """Norms, as :meth:`Row.add_block`."""
        self._row.add_block(names, sites, numbers, scale)

    def add_scalars(self, signal: str, sites: Sites, numbers: list[Tensor], scale: Any = None) -> None:
        """As :meth:`Row.add_scalars`."""
        self._row.add_scalars(signal, sites, numbers, scale)

    def takes(self, sites: Sequence[int], peaks: Tensor) -> bool:
        """Whether the units of these layers are joined. Before ranks have compared what they have, all are."""
        if not self.on or len(self.groups) > 1 or peaks.device != self._device:
            return False
        return self._places is None or all(self._places.get(s, (0, -1))[1] == peaks.shape[1] for s in sites)

    def fired(self, sites: Sequence[int], peaks: Tensor, positions: int) -> None:
        """The peaks of these layers' units, (K, U): positive or NaN where a unit fired."""
        self._fired.append(_Fired(list(sites), peaks, positions))

    def apart(self, sites: Sequence[int]) -> str | None:
        """Why the units of these layers are those of this rank's batches alone; None if all are joined, or this is the only rank."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1) or not sites:
            return None
        if not self.on:
            return self.over or "no wrapper was seen that keeps ranks in step at every batch"
        if len(self.groups) > 1:
            return "parameters are sharded over several dimensions of a part of the world"
        return None if self._places is None or all(s in self._places for s in sites) else f"ranks run different layers, or more than {MAX_UNITS} units"

    # ---- the collective

    def close(self, gradients_missing: Sequence[int], *, measured: bool) -> tuple[Tensor, Layout] | None:
        """Join what all ranks measured in this step; called on every rank at the same steps. Returns the joined numbers and their
        meaning. measured: this rank could measure; if not, it says so to the others."""
        if not self.on:
            return None
        try:
            if self._places is None:
                self._compare()
                if self.over is not None:
                    return None
            packed, told = self._pack(measured)
            for group in self.groups:
                dist.all_reduce(packed, group=group)
        except RuntimeError as error:  # the connection is gone, and with it the training's own collectives
            self.over = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            return None
        return self._unpack(packed, told, gradients_missing)

    def _compare(self) -> None:
        """Once: do all ranks have the same sharded parameters and the same layers? Waits for the slowest."""
        mine = [(site, fired.peaks.shape[1]) for fired in self._fired for site in fired.sites]
        told = (self._names, sorted(mine))
        for group in self.groups:
            everyone: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, told, group=group)
            if any(theirs[0] != self._names for theirs in everyone):
                self.over = "ranks hold different parameters"
            if any(theirs[1] != told[1] for theirs in everyone):
                told = (self._names, [])  # ranks run different layers: each keeps its own
        self._places, first = {}, 0
        for site, units in told[1]:
            if first + units <= MAX_UNITS:
                self._places[site] = first, units
                first += units

    def _pack(self, measured: bool) -> tuple[Tensor, set[str]]:
        """(1 + 5 sharded parameters + units,) in double precision, so that squares neither overflow nor vanish; and which norms were measured."""
        first = 1 + len(SQUARED) * len(self._sites)
        packed = torch.zeros(first + self._width, dtype=torch.float64, device=self._device)
        try:
            if not measured:
                return packed, set()
            numbers, layout = self._row.lay_down()
            told = {segment.signal for segment in layout.segments}
            if told:
                places, factors = self._plan_of(layout)
                packed.index_add_(0, places, (numbers.to(torch.float64) * factors).square())
            for fired in self._fired:
                for k, site in enumerate(fired.sites):
                    at, units = (self._places or {}).get(site, (0, 0))
                    if units == fired.peaks.shape[1]:
                        packed[first + at : first + at + units].copy_(~(fired.peaks[k] <= 0))
            packed[:1].fill_(1.0)
            return packed, told
        except Exception as error:  # a fault of our own: the others must not wait for this rank
            self.faults.append(f"{type(error).__name__}: {error}")
            return packed.zero_(), set()

    def _unpack(self, packed: Tensor, told: set[str], gradients_missing: Sequence[int]) -> tuple[Tensor, Layout]:
        whole = packed[0] == self._members
        self._out.add(JOINED, self._array((0,)), whole.reshape(1))
        count = len(self._sites)
        norms = packed[1 : 1 + len(SQUARED) * count].sqrt().to(torch.float32).view(len(SQUARED), count)
        told = told or ({"grad_norm", "weight_norm"} if self._empty else set())
        for k, signal in enumerate(SQUARED):
            if signal in told and count:
                self._out.add(signal, self._array(tuple(self._shown(signal, gradients_missing))), norms[k])
        joined = torch.where(whole, packed[1 + len(SQUARED) * count :], 1.0)
        for fired in self._fired:
            known = [site for site in fired.sites if (self._places or {}).get(site, (0, -1))[1] == fired.peaks.shape[1]]
            if len(known) == len(fired.sites):
                places = [(self._places or {})[site] for site in known]
                peaks = torch.stack([joined[at : at + units] for at, units in places]).to(torch.float32)
                share = self._units.update(known, peaks, window(fired.positions * self._members))
                if share is not None:
                    self._out.add("dead_fraction", self._array(tuple(known)), share)
        return self._out.lay_down()

    # ---- inside

    @property
    def _width(self) -> int:
        return max((at + units for at, units in (self._places or {}).values()), default=0)

    @property
    def _members(self) -> int:
        """How many ranks the sum goes over."""
        count = 1
        for group in self.groups:
            count *= dist.get_world_size(group)
        return count

    def _shown(self, signal: str, gradients_missing: Sequence[int]) -> list[int]:
        """The sites of a signal's numbers, -1 where there is none."""
        if signal == "clipped_norm":
            return [s if s in self._probed else -1 for s in self._sites]
        if signal == "grad_norm":
            return [-1 if s in gradients_missing else s for s in self._sites]
        return self._sites

    def _plan_of(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Where the numbers of a layout stand in the packed vector, and what they are multiplied by before they are squared."""
        known = self._plans.get(id(layout))
        if known is None:
            index = {site: k for k, site in enumerate(self._sites)}
            places: list[int] = []
            factors: list[float] = []
            for segment in layout.segments:
                sites = segment.sites
                for k, site in enumerate(sites.tolist()):
                    there = site in index
                    places.append(1 + SQUARED.index(segment.signal) * len(index) + index[site] if there else 0)
                    scale = 1.0 if segment.scale is None else segment.scale[k]
                    factors.append(scale * self._weights[site] ** 0.5 if there else 0.0)
            if len(self._plans) >= 16:
                self._plans.clear()
            held = torch.tensor(places, device=self._device), torch.tensor(factors, dtype=torch.float64, device=self._device)
            known = self._plans[id(layout)] = layout, *held
        return known[1], known[2]

    def _array(self, sites: tuple[int, ...]) -> Sites:
        """The same array for the same sites, so that the row's layout is known again."""
        if sites not in self._arrays:
            if len(self._arrays) >= 64:
                self._arrays.clear()
            self._arrays[sites] = np.array(sites, dtype=np.intp)
        return self._arrays[sites]

    def _use(self, device: torch.device) -> None:
        self._device, self._places = device, None
        self._row, self._out = Row(device), Row(device)
        self._plans.clear()

    @property
    def nbytes(self) -> int:
        """Device bytes held between steps."""
        return self._row.nbytes + self._out.nbytes
