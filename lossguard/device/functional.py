"""Dead units of ReLUs that no hook sees (F.relu, compiled code), read from gradients. Never reads a value.

Gradients of biases flow in, shares of dead units flow out: a bias whose gradient is exactly zero belongs to a unit that
fired for no sample of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossguard.device.bank import Bank
from lossguard.device.forward import Forward, Site
from lossguard.device.roles import Trained
from lossguard.device.tape import Row, Sites
from lossguard.device.units import SilentUnits, window

KIND = "gradient rows"


class _Layers(NamedTuple):
    """Layers of one width: their sites, and where their gradients begin in what is looked at."""

    sites: list[int]
    indices: Sites  # the same
    first: int
    units: int


class GradientRows:
    """The one-dimensional parameters (biases, or a norm's betas) right before such a ReLU, found by reading the graph."""

    def __init__(self) -> None:
        self._units = SilentUnits()
        self._at: dict[int, tuple[Tensor, list[_Layers]]] = {}  # bank -> indices of its gradients, layers of one width side by side

    def plan(self, parameters: Sequence[int], trained: Sequence[Trained], banks: Sequence[Bank], forward: Forward) -> None:
        """Decide where to look. parameters: ids of tensors, the last of the network first."""
        self._at.clear()
        index = {id(t.tensor): i for i, t in enumerate(trained)}
        chosen = [index[i] for i in dict.fromkeys(reversed(parameters)) if i in index]
        for k, bank in enumerate(banks):
            of_width: dict[int, list[int]] = {}
            for i in chosen:
                if not bank.sharded and i in bank.offsets:
                    of_width.setdefault(trained[i].tensor.numel(), []).append(i)
            positions, layers, first = [], [], 0
            for units, those in of_width.items():
                sites = [_site(forward, trained[i].name.rpartition(".")[0] or trained[i].name, units) for i in those]
                layers.append(_Layers(sites, np.array(sites, dtype=np.intp), first, units))
                positions += [np.arange(bank.offsets[i], bank.offsets[i] + units) for i in those]
                first += units * len(those)
            if layers:
                host = torch.from_numpy(np.concatenate(positions).astype(np.int64))
                pinned = host.pin_memory() if bank.device.type == "cuda" else host
                self._at[k] = (pinned.to(bank.device, non_blocking=True), layers)

    def record(self, k: int, bank: Bank, batch_rows: int | None, row: Row) -> None:
        """The gradients of bank ``k`` are gathered: which of its units fired?"""
        if k not in self._at:
            return
        indices, layers = self._at[k]
        fired = bank.gradients.index_select(0, indices).abs()
        for of in layers:
            peaks = fired[of.first : of.first + len(of.sites) * of.units].view(-1, of.units)
            share = self._units.update(of.sites, peaks, window(batch_rows))
            if share is not None:
                row.add("dead_fraction", of.indices, share)

    def forget(self) -> None:
        """The banks changed: look nowhere until planned again."""
        self._at.clear()

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self._units.nbytes


def _site(forward: Forward, name: str, units: int) -> int:
    for site in forward.sites:
        if site.name == name and site.kind == KIND:
            return site.index
    forward.sites.append(Site(len(forward.sites), name, KIND, units, False))
    return len(forward.sites) - 1
