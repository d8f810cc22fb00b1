"""A loss that leapt: is it a blow-up, a single odd batch, or a new level that is learned anew as the first was? Losses in, answers out; numpy only."""

from __future__ import annotations

import numpy as np

from lossguard.advice import middle
from lossguard.host.history import Array, History

AFTER = 3  # losses after a leap that tell where it leads; our own choice
RETURNED = 0.05  # of the leap that these losses may keep; else the loss stands on a new level; our own choice
RELEARNED = 0.7  # of the first losses: a new level that comes down below it is learned anew, as the first was; our own choice
LEFT = 0.3  # of the leap that may be left then; our own choice
WAIT = (40, 200)  # least and most steps in which that is awaited: twice what the run itself took at its beginning


def start(history: History) -> float:
    """The largest of the run's first losses: what is owed without any knowledge."""
    first = history.first_losses(5)
    return float(np.max(first, initial=-np.inf, where=np.isfinite(first)))


def new_level(losses: Array, at: int, median: float) -> bool:
    """The losses after a leap have not come back, though none is above it: what the batches ask for may have changed."""
    after = losses[at + 1 : at + 1 + AFTER]
    rise = float(losses[at]) - median
    return bool(np.isfinite(after).all()) and RETURNED * rise < middle(after) - median <= rise


def patience(history: History, losses: Array) -> int:
    """Steps to wait for a new level to be learned: twice those in which the first losses came down to the share that counts as learned."""
    if not losses.size or history.first_step != 0:
        return WAIT[1]  # the beginning is no longer held
    low = np.flatnonzero(losses[: WAIT[1] // 2 + AFTER + 1] < RELEARNED * start(history))  # what comes later asks for the longest wait
    return int(np.clip(2 * low[AFTER], *WAIT)) if low.size > AFTER else WAIT[1]


def learned_anew(history: History, since: Array, median: float) -> bool:
    """The newest losses of this stretch, from the leap on, are below what was owed at first, and far below the leap."""
    now, peak = middle(since[-2 * AFTER :]), middle(since[:AFTER])
    return now < min(RELEARNED * start(history), median + LEFT * (peak - median))
