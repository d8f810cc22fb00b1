"""What all ranks told each other, exchange by exchange: a bounded window, read by rules. Numpy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lossguard.host.columns import Array

KEPT = 16  # exchanges


@dataclass(frozen=True)
class Exchange:
    """One exchange. step: of the newest step. losses, gradients: (ranks,), medians since the exchange before, NaN where there
    is none. printed: the step whose weights are compared, the same on all ranks, or -1. prints: (ranks, parameters), a
    projection of each tensor. norms: (parameters,), of this rank's tensors."""

    step: int
    losses: Array
    gradients: Array
    printed: int
    prints: Array
    norms: Array


class Peers:
    """The ranks of a run. places: what each is called, host and device. names: of the parameters compared."""

    def __init__(self, places: Sequence[str], names: Sequence[str]) -> None:
        self.places, self.names = list(places), list(names)
        self.first: Exchange | None = None  # with weights to compare
        self.window: deque[Exchange] = deque(maxlen=KEPT)

    def add(self, exchange: Exchange) -> None:
        """What was heard last."""
        if self.first is None and exchange.printed >= 0:
            self.first = exchange
        self.window.append(exchange)

    def name(self, rank: int) -> str:
        """A rank as people look for it.

        >>> Peers(["node7, cuda:0"], []).name(0)
        'rank 0 (node7, cuda:0)'
        """
        return f"rank {rank} ({self.places[rank]})"
