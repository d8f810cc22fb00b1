"""Ranks answer a question together: each says yes or no, and all hear who said yes. Host values only, through the store.

No collective: a rank that never comes is named after a while, and nothing of the training is in its way. Every rank asks
the same questions in the same order.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=5)  # that ranks wait for each other; our own choice: they come to a save together, but one may evaluate first
PAUSE = 0.002, 0.05  # seconds between looks, at first and at most; our own choice: a look is one small message to the store

_made = 0  # of this process: the same number on every rank


class Unison:
    """The questions of one guard. Made on all ranks."""

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        global _made
        _made += 1
        self.rank, self.world, self._patience = dist.get_rank(), dist.get_world_size(), patience
        self._store = dist.distributed_c10d._get_default_store()
        self._name = f"lossguard/unison/{_made}"
        self._asked = 0

    def ask(self, mine: bool) -> list[int]:
        """The ranks that say yes. Waits for all. ``ValueError`` names those that did not come."""
        self.tell(mine)
        number = self._asked
        keys = [self._key(number, rank) for rank in range(self.world)]
        end, pause = time.monotonic() + self._patience.total_seconds(), PAUSE[0]
        while not self._store.check(keys):
            if time.monotonic() > end:
                missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self._store.check([key]))
                raise ValueError(f"rank(s) {missing} did not ask; ask on all ranks at the same place, or say together=False where one rank saves alone")
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])
        return [rank for rank, key in enumerate(keys) if self._store.get(key) == b"1"]

    def tell(self, mine: bool) -> None:
        """Answer the next question without hearing the others."""
        self._asked += 1
        self._store.set(self._key(self._asked, self.rank), "1" if mine else "0")
        with contextlib.suppress(RuntimeError):  # a store that cannot delete keeps a few bytes
            self._store.delete_key(self._key(self._asked - 2, self.rank))  # all have read it: they came to the question after

    def _key(self, number: int, rank: int) -> str:
        return f"{self._name}/{number}/{rank}"
