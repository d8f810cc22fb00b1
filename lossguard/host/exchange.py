"""What this rank tells the others now and then, beside its votes: its losses, gradient norms and a print of its weights.

A vector of fixed length flows out to a gather on the guard's own group, the vectors of all ranks flow back into ``Peers``,
one round later. Host values only; the device's part, the prints, came through the tape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lossguard.host.columns import Array
from lossguard.host.handover import host_view
from lossguard.host.history import History
from lossguard.host.peers import Exchange, Peers

ROUNDS = 10  # from one exchange to the next: every 100 steps by default, every 10 while sampling is dense; our own choice, 8 bytes a parameter each
PRINTS = 4096  # parameters compared at most, spread over the model: 32 KB a rank
HEAD = 4  # numbers before the prints


class Teller:
    """Writes this rank's vector and reads those of all ranks. parameters: how many may be compared, 0 where ranks train different ones."""

    def __init__(self, history: History, places: Sequence[str], parameters: int) -> None:
        self._history = history
        self._chosen = np.arange(parameters)[:: max(1, -(-parameters // PRINTS))]
        self.length = HEAD + len(self._chosen)
        self._told = -1  # the step up to which losses were told
        self._norms: Array = np.full(len(self._chosen), np.nan)
        self.peers = history.notes["peers"] = Peers(places, [])

    def due(self, round_number: int) -> bool:
        """Whether ranks tell each other something in this round of votes."""
        return round_number % ROUNDS == 0

    def vector(self) -> Tensor:
        """(HEAD + parameters compared,): step, losses, gradients, the step of the prints, the prints."""
        history = self._history
        step, news = history.step, min(history.step - self._told, 512)
        losses = history.losses(news) if news > 0 else np.empty(0)
        totals = history.last("grad_total", ROUNDS)[:, 0] if history.last("grad_total", 1).size else np.empty(0)
        printed, prints = self._prints()
        self._told = step
        return torch.from_numpy(np.concatenate([[step, _middle(losses), _middle(totals), printed], prints]))

    def hear(self, vectors: Sequence[Tensor]) -> None:
        """The vectors of all ranks, in their order."""
        table = np.stack([view for v in vectors if (view := host_view(v)) is not None])  # the group is gloo: all lie in host memory
        printed = int(table[0, 3]) if (table[:, 3] == table[0, 3]).all() else -1
        self.peers.names = [self._history.params[int(k)].name for k in self._chosen if k < len(self._history.params)]
        self._history.memo.clear()
        self.peers.add(Exchange(int(table[:, 0].max()), table[:, 1], table[:, 2], printed, table[:, HEAD:], self._norms))

    def _prints(self) -> tuple[int, Array]:
        """The newest prints that have arrived, of the parameters chosen."""
        none = np.full(len(self._chosen), np.nan)
        seen = self._history.seen("weight_print")
        if not seen.size or not seen.any():
            return -1, none
        row = int(np.flatnonzero(seen.any(axis=1))[-1])
        prints, norms = self._history.last("weight_print")[row], self._history.last("weight_norm")[row]
        there = self._chosen < len(prints)
        none[there] = np.where(seen[row], prints, 0.0)[self._chosen[there]]  # sharded ones have no print, on no rank
        self._norms = np.full(len(self._chosen), np.nan)
        self._norms[there] = norms[self._chosen[there]]
        return int(self._history.steps()[row]), none


def _middle(numbers: Array) -> float:
    """The median of what is finite, NaN if nothing is."""
    numbers = numbers[np.isfinite(numbers)]
    return float(np.median(numbers)) if numbers.size else float("nan")
