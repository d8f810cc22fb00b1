"""The reading of the two loss curves now, in a word. A history flows in, a state flows out; numpy only, no alarm.

Training is read from the medians of the newest and the second newest quarter of the losses, validation from its best.
"""

from __future__ import annotations

import numpy as np

from lossguard.host.history import Array, History

LEAST = 40  # losses before the curve is read: a loss that wobbles is judged only after enough steps
MOVE = 0.01  # of the loss: a smaller difference of medians is no movement
ERRORS = 2.0  # standard errors of the difference of two medians: a smaller difference is noise
RISE = 0.10  # of the best validation loss: above it the curve has turned (gap rules with less alarm on healthy runs)
EVALUATIONS = 3  # before the validation curve is read

# (training, validation) -> what it means. "?" stands for a curve that is not known yet.
STATES = {
    ("falling", "?"): "learning", ("falling", "falling"): "learning", ("flat", "?"): "flat", ("rising", "?"): "diverging",
    ("falling", "flat"): "overfitting begins", ("falling", "rising"): "overfitting", ("flat", "falling"): "validation mismatch",
    ("flat", "flat"): "bottleneck", ("flat", "rising"): "overfitting", ("rising", "rising"): "diverging",
    ("rising", "flat"): "diverging", ("rising", "falling"): "validation mismatch",
}  # fmt: skip


def read(history: History) -> str:
    """One of ``too early``, ``not a number``, ``learning``, ``flat``, ``overfitting begins``, ``overfitting``,
    ``bottleneck``, ``validation mismatch``, ``diverging``.

    >>> history = History()
    >>> read(history)
    'too early'
    >>> for step in range(80):
    ...     history.add_loss(step, 2.0 * 0.99**step)
    >>> read(history)
    'learning'
    """
    losses = history.losses()
    if losses.size and not np.isfinite(losses[-1]):
        return "not a number"
    losses = losses[np.isfinite(losses)]
    if losses.size < LEAST:
        return "too early"
    return STATES[training(losses), validation(history.validations()[:, 1])]


def training(losses: Array) -> str:
    """``falling``, ``flat`` or ``rising``."""
    quarter = losses.size // 4
    new, old = losses[-quarter:], losses[-2 * quarter : -quarter]
    difference = float(np.median(new) - np.median(old))
    spread = 1.4826 * np.hypot(*(np.median(np.abs(part - np.median(part))) for part in (new, old)))
    noise = ERRORS * 1.2533 * float(spread) / quarter**0.5  # the standard error of a median of normal noise is 1.2533 that of a mean
    if abs(difference) <= max(noise, MOVE * abs(float(np.median(old)))):
        return "flat"
    return "falling" if difference < 0 else "rising"


def validation(values: Array) -> str:
    """``falling``, ``flat``, ``rising``, or ``?`` with too few evaluations."""
    values = values[np.isfinite(values)]
    if values.size < EVALUATIONS:
        return "?"
    best = float(values.min())
    if values[-1] > best + RISE * abs(best):
        return "rising"
    half = values.size // 2
    return "falling" if values[half:].min() < values[:half].min() - MOVE * abs(float(values[:half].min())) else "flat"
