"""The two loss curves, read. A history flows in; trends, turning points and levels flow out. Pure functions, numpy only.

Rules and the verdict share these: the rules add patience and advice, the verdict adds a word. Losses are compared by
ratios only while they have one sign; else with what the run has learned (``Curves.learned``), so that a scale changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lossguard import structure
from lossguard.advice import middle, once
from lossguard.host.history import Array, History

LEAST = 40  # losses before the training curve is read: a loss that wobbles is judged only after enough steps
MOVE = 0.01  # of the loss: a smaller difference of medians is no movement
ERRORS = 2.0  # standard errors of the difference of two medians: a smaller difference is noise
RISE = 0.10  # of the best validation loss: above it the curve has turned; survey (5 % had a false alarm)
MATERIAL = 0.03  # of what was learned: healthy converged runs drift by up to 0.019, digits of 60 to 100 samples rise by 0.04; our own runs
NOISE = 3.0  # standard deviations of one evaluation; survey has 2 standard errors of the mean, which we do not know
EVALUATIONS = 3  # before the validation curve is read
GAP = 0.25  # of what was learned: training below validation by more; healthy digits and small language models have 0.04 to 0.19
LEARNED = 0.1  # of the first losses: a run that came down by less has learned nothing that it could overfit; our own choice
CONVERGED = 0.05  # of the first losses: a training loss below has nothing left to learn (delayed generalisation follows there)
DONE = 0.5  # of the first losses: a run that settles below has learned; survey, learning_bottleneck
SWING = 0.10  # of the validation loss: a smaller change from one evaluation to the next is no swing; survey
SWING_MATERIAL = 0.05  # of what was learned: the same; our own choice
SWINGS = (4, 6)  # so many of so many changes alternate; survey
BELOW = 0.05  # of the training loss: validation is below it by more; survey
RESOLVED = 0.05  # of the loss: a curve stands still only if a movement by this would show above the noise; our own choice
RHYTHMS = range(3, 33)  # steps in which a loop may repeat itself: inner steps of a task, sources in turn; two are oscillating_loss's own law
DOUBLE = math.log(2.0)  # between the highest and the lowest step of a rhythm: batches in a fixed order, no task, differ by less; our own choice
BEATS = 256  # losses in which a rhythm is looked for
TURNS = 6  # times that a rhythm has to be seen; our own choice
BEAT = 10.0  # variance ratio above which a rhythm is no chance: 1e-4 for the shortest, over 30 lengths; our own choice
ENDLESS = (30, 100.0, 1.5)  # losses in a third of a run; depth below 0; growth of the fall: a likelihood falls ever slower; our own choices
NORMAL = 1.4826  # standard deviation over MAD of a normal distribution


@dataclass(frozen=True)
class Curves:
    """The evaluations so far (finite ones), and the training losses beside each.

    noise: the standard deviation of one validation loss about its own trend; 0 where too few are known. first: the
    training loss at the run's beginning. learned: how far the training loss has come down since, at its best. chance: the loss of
    equally likely classes, NaN where it is unknown.
    """

    steps: Array
    loss: Array
    training: Array
    error: Array  # standard error of ``training``
    accuracy: Array
    train_accuracy: Array
    noise: float
    first: float
    learned: float
    chance: float = math.nan

    def __len__(self) -> int:
        return int(self.loss.size)

    @property
    def positive(self) -> bool:
        """Neither curve has a value of 0 or below: ratios have a meaning."""
        return bool(len(self) and self.loss.min() > 0 and not (self.training <= 0).any())

    def share(self, part: float, of: float) -> float:
        """A part of a loss as a difference: of the loss where losses are positive, of what was learned else."""
        return part * (abs(of) if self.positive else self.learned)


@once
def curves(history: History) -> Curves:
    """The curves of a history, read once for each of its states."""
    rows = history.validations()
    rows = rows[np.isfinite(rows[:, 1])]
    steps, loss, accuracy, train_accuracy, training, error = rows.T
    first = beginning(history)
    known = training[np.isfinite(training)]
    learned = first - float(known.min()) if known.size and np.isfinite(first) else math.nan
    learned = 0.0 if math.isnan(learned) else max(learned, 0.0)
    return Curves(steps, loss, training, error, accuracy, train_accuracy, spread(loss), first, learned, structure.chance(history))


@once
def beginning(history: History) -> float:
    """The typical loss of the run's first steps; NaN if unknown."""
    first = history.first_losses(5)
    return middle(first[np.isfinite(first)])


def spread(values: Array, newest: int = 16) -> float:
    """The standard deviation of single values about their own curve, from second differences of the newest; 0 for fewer than 5.

    >>> spread(np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))
    0.0
    """
    values = values[-newest:]
    if values.size < 5:
        return 0.0
    size = float(np.abs(values).max()) or 1.0
    bend = (values[1:-1] - 0.5 * (values[:-2] + values[2:])) / size
    return size * NORMAL * middle(np.abs(bend)) / math.sqrt(1.5)  # the variance of such a bend is 1.5 times that of a value


# ---- the training curve


def trend(losses: Array) -> str:
    """``falling``, ``flat`` or ``rising``: the newest quarter of the losses against the quarter before it."""
    return change(losses[-2 * (losses.size // 4) :])


def change(losses: Array, resolution: float | None = None) -> str:
    """``falling``, ``flat`` or ``rising``: the newer half of the losses against the older, by their medians.

    ``?`` if nothing is seen to move, but noise above this share of the loss would hide it.
    """
    part = losses.size // 2
    new, old = losses[-part:], losses[-2 * part : -part]
    size = float(np.abs(losses).max()) or 1.0
    difference = middle(new / size) - middle(old / size)
    wide = NORMAL * math.hypot(*(middle(np.abs(part / size - middle(part / size))) for part in (new, old)))
    noise = ERRORS * 1.2533 * wide / part**0.5  # the standard error of a median of normal noise is 1.2533 that of a mean
    if abs(difference) <= max(noise, MOVE * abs(middle(old / size))):
        return "flat" if resolution is None or noise <= resolution * abs(middle(old / size)) else "?"
    return "falling" if difference < 0 else "rising"


def rhythm(losses: Array) -> int:
    """The number of steps in which losses rise to the double and fall again and again, or 0: that is the loop's doing, not the noise of a run.

    For each length the logarithms are laid in rows; a rhythm is an effect of the column (analysis of variance with the rows' own means
    taken out) by which they double. Of several lengths the clearest. Losses that are not positive have none.

    >>> rhythm(np.tile([3.0, 2.0, 1.5, 1.2, 1.1], 40) * (1 + 0.1 * np.sin(np.arange(200) ** 2)))
    5
    """
    if not losses.size or losses.min() <= 0:
        return 0
    values, best, clearest = np.log(losses), 0, BEAT
    for length in RHYTHMS:
        rows = values.size // length
        if rows < TURNS:
            continue
        table = values[values.size - rows * length :].reshape(rows, length)
        table = table - table.mean(axis=1, keepdims=True)
        phase = table.mean(axis=0)
        rest = float(np.square(table - phase).sum()) / ((rows - 1) * (length - 1))
        ratio = rows * float(np.square(phase).sum()) / (length - 1) / max(rest, 1e-24)
        if ratio > clearest and float(phase.max() - phase.min()) > DOUBLE:
            best, clearest = length, ratio
    return best


# ---- the validation curve


def direction(read: Curves) -> str:
    """``falling``, ``flat`` or ``rising`` now, or ``?`` with too few evaluations."""
    if len(read) < EVALUATIONS:
        return "?"
    if turned(read, 1) is not None:
        return "rising"
    half = len(read) // 2
    old, new = float(read.loss[:half].min()), float(read.loss[half:].min())
    return "falling" if new < old - max(read.share(MOVE, old), MOVE * read.learned, ERRORS * read.noise) else "flat"


def apart(read: Curves, newest: int = 3, training: float | None = None) -> float:
    """How far training (beside each evaluation, if not given) lies below the newest ones, over what was learned; 0 if nothing was learned yet.

    What a classifier owes beyond chance comes from its first weights, and to lose it is not to learn.
    """
    start = float(np.fmin(abs(read.first), read.chance))  # a chance that is unknown is NaN
    if not read.learned - (abs(read.first) - start) > (LEARNED * start if read.positive else 0.0):
        return 0.0
    now = read.training[-newest:] if training is None else training
    return float((read.loss[-newest:] - now).min()) / read.learned


def turned(read: Curves, patience: int, rise: float = RISE, material: float = MATERIAL, noise: float = NOISE) -> int | None:
    """The index of the best evaluation if the last ``patience`` ones are all clearly above it; else None."""
    if len(read) < EVALUATIONS:
        return None
    best = int(np.argmin(read.loss))
    if best >= len(read) - patience:
        return None
    return best if bool((read.loss[-patience:] > turning_limit(read, best, rise, material, noise)).all()) else None


def turning_limit(read: Curves, best: int, rise: float = RISE, material: float = MATERIAL, noise: float = NOISE) -> float:
    """The validation loss above which the curve has turned: above its level around the best by a share, what matters, and noise."""
    level = middle(read.loss[max(0, best - 1) : best + 2])
    return level + max(read.share(rise, level), material * read.learned, noise * read.noise)


def risen(read: Curves, since: int) -> bool:
    """The training loss now is above what it was at an evaluation by more than noise: both curves rise, which is no overfitting."""
    margin = max(read.share(MOVE, read.training[since]), ERRORS * float(np.hypot(read.error[since], read.error[-1])))
    return bool(read.training[-1] > read.training[since] + margin)


@dataclass(frozen=True)
class Downfall:
    """A loss that falls ever faster: where it is now, the highest it was, and its fall in the last third of the run over that before."""

    now: float
    high: float
    faster: float

    @property
    def depth(self) -> float:
        """How many times as far below 0 it is as it ever was above, and 1 at least."""
        return -self.now / max(abs(self.high), 1.0)


def downfall(history: History, least: int) -> Downfall | None:
    """Whether the loss falls ever faster, from the first step on, by means over thirds of ``least`` losses or more."""
    losses = history.losses()
    losses = losses[np.isfinite(losses)]
    many = losses.size // 3
    if many < least or history.first_step != 0:
        return None
    thirds = [float(part.mean()) for part in np.split(losses[losses.size - 3 * many :], 3)]
    falls = thirds[0] - thirds[1], thirds[1] - thirds[2]
    if not falls[1] > falls[0] > 0:
        return None
    return Downfall(float(middle(losses[-least:])), float(losses.max()), falls[1] / falls[0])


def endless(history: History) -> bool:
    """The loss has no floor: far below 0 and falling ever faster."""
    found = downfall(history, ENDLESS[0])
    return found is not None and found.depth > ENDLESS[1]


def last_improvement(read: Curves) -> int:
    """The first evaluation after which validation became no better by more than noise."""
    best = float(read.loss.min())
    margin = max(read.share(MOVE, best), MOVE * read.learned, ERRORS * read.noise)
    return int(np.flatnonzero(read.loss <= best + margin)[0])


def drop(values: Array, count: int = 3) -> float:
    """How far the mean of the newest values lies below that of as many before them."""
    return float(values[-2 * count : -count].mean() - values[-count:].mean())


def falls_alone(read: Curves, share: float = 0.1, follow: float = 0.25) -> bool:
    """Validation falls over the last 6 evaluations, and training, which has something left to learn, does not follow."""
    count = min(3, len(read) // 2)
    if len(read) < 5 or not read.training[-3:].mean() > CONVERGED * abs(read.first):
        return False
    fall, training = drop(read.loss, count), drop(read.training, count)
    error = float(np.sqrt(np.square(read.error[-2 * count :]).sum())) / count
    old = float(read.loss[-2 * count : -count].mean())
    material = fall > max(read.share(share, old), SWING_MATERIAL * read.learned, NOISE * read.noise)
    return bool(material and training + NOISE * error < follow * fall)


def below_training(read: Curves, count: int = 3, below: float = BELOW) -> bool:
    """The last evaluations are all below the training loss by more than noise."""
    if len(read) < count:
        return False
    gap = read.training[-count:] - read.loss[-count:]
    limit = np.array([read.share(below, t) for t in read.training[-count:]])
    return bool((gap > np.maximum(limit, ERRORS * np.hypot(read.error[-count:], read.noise))).all())


def swings(read: Curves, swing: float = SWING, material: float = SWING_MATERIAL) -> int:
    """How many of the last changes are large and opposite to the one before."""
    changes = np.diff(read.loss)[-SWINGS[1] - 1 :]
    if changes.size < 2:
        return 0
    large = np.abs(changes) > max(read.share(swing, middle(read.loss[-SWINGS[1] :])), material * read.learned)
    return int((large[1:] & large[:-1] & (changes[1:] * changes[:-1] < 0)).sum())


def standing(history: History, read: Curves, share: float, least: int) -> int:
    """How many of the newest evaluations (this share of them, at least so many) neither curve moved over by more than noise; 0: one did."""
    count = max(least, math.ceil(share * len(read)))
    if len(read) < count + 1:
        return 0
    half = count // 2
    moved = abs(float(read.loss[-half:].mean() - read.loss[-count : half - count].mean()))
    level, noise = middle(read.loss[-count:]), ERRORS * read.noise * math.sqrt(2 / half)
    if not moved <= max(read.share(MOVE, level), noise) or noise > read.share(RESOLVED, level):
        return 0
    losses = history.losses()[history.loss_steps() > read.steps[-count]]
    losses = losses[np.isfinite(losses)]
    return count if losses.size >= LEAST and change(losses, RESOLVED) == "flat" else 0
