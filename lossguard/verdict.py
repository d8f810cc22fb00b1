"""The reading of the two loss curves now, in a word. A history flows in, a verdict flows out; numpy only, no alarm.

The readings are those of the rules (``readings.py``), without the rules' patience: a word may change its mind, an alarm may not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossguard import readings
from lossguard.advice import informational
from lossguard.host.history import History
from lossguard.obstacles import trained_before

# (training, validation) -> what it means. "?" stands for a curve that is not known yet.
STATES = {
    ("falling", "?"): "learning", ("falling", "falling"): "learning", ("flat", "?"): "flat", ("rising", "?"): "diverging",
    ("falling", "flat"): "overfitting begins", ("falling", "rising"): "overfitting", ("flat", "falling"): "validation mismatch",
    ("flat", "flat"): "bottleneck", ("flat", "rising"): "overfitting", ("rising", "rising"): "diverging",
    ("rising", "flat"): "diverging", ("rising", "falling"): "validation mismatch",
}  # fmt: skip


class Verdict(str):
    """A word that also says where it comes from.

    It is a plain string for comparing and printing. training, validation: ``falling``, ``flat``, ``rising`` or ``?``.
    best_step: the step of the best evaluation, which is the turning point where the word is ``overfitting`` and the
    checkpoint to keep in any case; None without evaluations. also: what is true besides, such as ``validation below training``.

    >>> word = Verdict("learning", training="falling")
    >>> word == "learning", word.training, word.best_step
    (True, 'falling', None)
    """

    training: str
    validation: str
    best_step: int | None
    also: tuple[str, ...]

    def __new__(cls, word: str, *, training: str = "?", validation: str = "?", best_step: int | None = None, also: tuple[str, ...] = ()) -> Verdict:
        """The word with what it knows."""
        self = super().__new__(cls, word)
        self.training, self.validation, self.best_step, self.also = training, validation, best_step, also
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:  # copies and pickles keep what it knows
        return (str(self),), dict(self.__dict__)


def read(history: History) -> Verdict:
    """One of ``too early``, ``not a number``, ``learning``, ``flat``, ``overfitting begins``, ``overfitting``, ``bottleneck``,
    ``done``, ``oscillating validation``, ``validation mismatch``, ``diverging``, ``no order`` (it rises, as
    losses of several players or of moving targets may); ``validation below training`` stands in ``also``.

    >>> history = History()
    >>> read(history)
    'too early'
    >>> for step in range(80):
    ...     history.add_loss(step, 2.0 * 0.99**step)
    >>> read(history)
    'learning'
    """
    losses, told = history.losses(), history.validations()[:, 1]
    curves = readings.curves(history)
    best = int(curves.steps[np.argmin(curves.loss)]) if len(curves) else None
    if (losses.size and not np.isfinite(losses[-1])) or (told.size and not np.isfinite(told[-1])):
        return Verdict("not a number", best_step=best)
    losses = losses[np.isfinite(losses)]
    if losses.size < readings.LEAST:
        return Verdict("too early", best_step=best)
    training, validation = readings.trend(losses), readings.direction(curves)
    also = ("validation below training",) if readings.below_training(curves) else ()
    now = float(losses[-readings.LEAST // 2 :].mean())
    endless = readings.endless(history)
    word = "diverging" if endless else _word(curves, training, validation, now, trained_before(history))
    if word == "diverging" and informational(history) and not endless:
        word = "no order"
    return Verdict(word, training=training, validation=validation, best_step=best, also=also)


def _word(curves: readings.Curves, training: str, validation: str, now: float, known: bool) -> str:
    if training != "rising" and readings.swings(curves) >= readings.SWINGS[0]:
        return "oscillating validation"
    word = STATES[training, validation]
    if word == "validation mismatch":
        return word if readings.falls_alone(curves) else "learning"
    trained = curves.positive and (known or curves.training[-1] < readings.DONE * curves.first)
    if word == "bottleneck" and trained:
        return "done"
    if word == "overfitting begins" and readings.apart(curves, training=now) < readings.GAP:
        return "learning"
    return word
