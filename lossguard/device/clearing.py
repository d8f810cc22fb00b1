"""Whether gradients are cleared between updates: seen from memory and version counter of a few of them. Never reads a value.

Banks flow in, the share of gradients that were added to and never cleared flows out.
"""

from __future__ import annotations

from collections.abc import Sequence

from lossguard.device.bank import Bank
from lossguard.device.shards import version


class Clearing:
    """From a sampled step's update until the next one: every backward pass in between is looked at, for what a pass for another
    purpose left (a generator's, an attack's) may be cleared before the own one."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[int, int]] = {}  # probe -> (memory, version) of its gradient since the last update
        self._added: dict[int, bool] = {}  # probe -> whether all that arrived since then was added to what was left of it

    @property
    def pending(self) -> bool:
        """Whether the next backward pass is to be looked at."""
        return len(self._versions) > 0

    def updated(self, bank: Bank) -> None:
        """The bank's optimizer stepped. Sharded gradients do not count what is written to all of them at once: nothing is told of them."""
        if bank.sharded:
            return
        self._versions.update({s: v for s, p in bank.probes if (v := version(p)) is not None})

    def backward_done(self, banks: Sequence[Bank]) -> None:
        """Did a backward pass add to what the last update left there?"""
        for site, p in (probe for bank in banks for probe in bank.probes):
            before, now = self._versions.get(site), version(p)
            if before is None or now is None or now == before:
                continue
            added = now == (before[0], before[1] + 1)
            self._added[site] = added and self._added.get(site, True)
            self._versions[site] = now if added else before

    def before_update(self, banks: Sequence[Bank], index: int) -> float | None:
        """Optimizer ``index`` is about to step: the share of its gradients that were added to and never cleared, None if unknown."""
        sites = [site for bank in banks if bank.optimizer == index for site, _ in bank.probes]
        added = [self._added.pop(site) for site in sites if site in self._added]
        for site in sites:
            self._versions.pop(site, None)
        return sum(added) / len(added) if added else None
