"""Whether gradients are cleared between updates, from the memory and the version counter of a few of them. Never reads a value.

Banks flow in after each update, backward pass and before the next update; out flows the share of an optimizer's probed
gradients that were added to and never cleared.
"""

from __future__ import annotations

from collections.abc import Sequence

from lossguard.device.bank import Bank, version


class Clearing:
    """What the probes' gradients were like after the last update, and what has happened to them since."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[int, int]] = {}  # probe -> (memory, version) of its gradient since the last update
        self._added: dict[int, bool] = {}  # probe -> whether all that arrived since then was added to what was left of it

    @property
    def expected(self) -> bool:
        """Whether the next backward pass shows something."""
        return bool(self._versions)

    def remember(self, banks: Sequence[Bank], index: int) -> None:
        """Optimizer ``index`` stepped."""
        for bank in banks:
            if bank.optimizer == index:
                self._versions.update({s: v for s, p in bank.probes if (v := version(p)) is not None})

    def look(self, banks: Sequence[Bank]) -> None:
        """A backward pass ended: did it add to what the last update left there?

        Every pass until the next update is looked at: what a pass for another purpose left (a generator's, an attack's) may
        be cleared before the own one.
        """
        for site, p in (probe for bank in banks for probe in bank.probes):
            before, now = self._versions.get(site), version(p)
            if before is None or now is None or now == before:
                continue
            added = now == (before[0], before[1] + 1)
            self._added[site] = added and self._added.get(site, True)
            self._versions[site] = now if added else before

    def told(self, banks: Sequence[Bank], index: int) -> float | None:
        """Optimizer ``index`` is about to step: the share of its gradients that were added to and never cleared; None if unknown."""
        sites = [site for bank in banks if bank.optimizer == index for site, _ in bank.probes]
        added = [self._added.pop(site) for site in sites if site in self._added]
        for site in sites:
            self._versions.pop(site, None)
        return sum(added) / len(added) if added else None
