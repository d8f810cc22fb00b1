"""Losses that bounce: in training and from one evaluation to the next. Losses and the size of the updates in, finding or None out; numpy only."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lossguard import readings, structure
from lossguard.advice import clip_remedy, finite_losses, informational, lr_remedy, middle, ranked, slower
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.obstacles import speed
from lossguard.rules.rule import rule
from lossguard.rules.suspects import momentum


@rule
@dataclass(frozen=True)
class OscillatingLoss:
    """oscillating_loss: the loss fell and then bounces at a height (survey, oscillating_loss).

    Law (alternates): in 3 windows of 64 losses in a row, without their quadratic trend, neighbours are opposite (autocorrelation
    below -0.6), the deviation is above 10 % of the median, and the windows do not fall; a warning if updates change more than 3 % of the
    weights, else information. Law (bounces): the mean of 64 losses has been
    above its best by 25 % and 4 standard errors for 3 windows, though the learning rate was not raised since, and updates change
    more than 3 % of the weights. Law (restless): over these windows the loss does not fall, though it is above 5 % of where it began, it
    swings by 20 %, and updates change more than 3 % of the weights; not where it rises and falls in a fixed number of steps, as in a loop
    that begins a task anew every few steps.

    Why: a learning rate too high for this stage of the run; batches too small; momentum too high for the learning rate.
    Do: divide the learning rate by 10, or let it decay (cosine, step); clip the gradient norm at its healthy median; batch size
    times 2 to 4; momentum 0.9 -> 0.8.
    False alarm: noise of small batches has an autocorrelation of 0 and does not count. Two data sources in turn alternate for
    good: that is never more than information while updates have a healthy size. Warm restarts raise the learning rate.
    The limits saw no positive example in the evidence: ``OscillatingLoss(correlation=-0.8)`` is stricter.
    """

    diagnosis: ClassVar[str] = "oscillating_loss"
    reads: ClassVar[tuple[str, ...]] = ("loss", "update_norm", "weight_norm")
    window: int = 64  # losses; survey
    windows: int = 3  # in a row; survey
    correlation: float = -0.6  # lag-1 autocorrelation; survey (healthy from -0.44)
    deviation: float = 0.1  # standard deviation over |median|; survey
    height: float = 0.25  # of the best mean: above it the loss bounces; our own choice
    errors: float = 4.0  # standard errors of a mean; as in diverging_loss
    learned: float = 0.05  # of the first losses: a run that stands below has converged; as in readings.CONVERGED
    swing: float = 0.2  # standard deviation over median of losses that are restless; our own choice, twice that of those that alternate
    fast: float = 3e-2  # median update ratio; survey, target band
    pace: int = 32  # steps; asked at most once in so many, half of a window
    grace: int = 192  # steps; three windows
    patience: int = 1  # samples; the windows are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        losses, steps = finite_losses(history)
        span = self.window * self.windows
        if losses.size < span:
            return None
        size = float(np.abs(losses).max()) or 1.0
        newest = (losses[-span:] / size).reshape(self.windows, self.window)
        found = self._alternates(history, newest, size, int(steps[-span])) or self._bounces(history, losses / size, size, steps)
        return found or self._restless(history, newest, size, int(steps[-span]))

    def _alternates(self, history: History, newest: Array, size: float, step: int) -> Finding | None:
        if not all(self._opposite(part) for part in newest[::-1]):
            return None
        means, error = newest.mean(axis=1), float(newest.std(axis=1).mean()) / np.sqrt(self.window)
        if means[-1] < means[0] - 2 * error:
            return None
        u = speed(history)
        evidence = (Evidence("autocorrelation of neighbours", max(self._rho(part) for part in newest), self.correlation),
                    Evidence("deviation over median", float(newest[-1].std() / abs(middle(newest[-1]))), self.deviation))  # fmt: skip
        severity = Severity.WARNING if u > self.fast else Severity.INFO
        message = f"up and down at every step about {number(float(means[-1]) * size)}"
        because = f"neighbouring losses are opposite, a step changes {number(u)} of the weights"
        return self._finding(history, step, message, evidence, because, severity)

    def _opposite(self, part: Array) -> bool:
        return bool(self._rho(part) < self.correlation and part.std() > self.deviation * abs(middle(part)))

    @staticmethod
    def _rho(part: Array) -> float:
        """The lag-1 autocorrelation about a quadratic trend; 0 for a constant."""
        bends = _quadratics(part.size)
        rest = part - bends @ (bends.T @ part)
        power = float(np.dot(rest, rest))
        return float(np.dot(rest[1:], rest[:-1])) / power if power > 1e-24 * part.size else 0.0

    def _bounces(self, history: History, losses: Array, size: float, steps: npt.NDArray[np.int64]) -> Finding | None:
        span = self.window * self.windows
        if losses.size < span + self.window or losses.min() <= 0:
            return None
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        means = (sums[self.window :] - sums[: -self.window]) / self.window
        best = int(np.argmin(means[: -span + 1]))
        held = losses[best : best + self.window]
        limit = float(means[best]) + max(self.height * float(means[best]), self.errors * float(held.std()) / np.sqrt(self.window))
        newest = losses[-span:].reshape(self.windows, self.window)
        error = self.errors * newest.std(axis=1) / np.sqrt(self.window)
        if not (newest.mean(axis=1) - error > limit).all() or self._raised(history, int(steps[best])):
            return None
        u = speed(history)
        if not u > self.fast:
            return None
        low, now = float(means[best]) * size, float(newest[-1].mean()) * size
        evidence = (Evidence("mean of the newest losses", now, limit * size), Evidence("best mean so far", low), Evidence("median update ratio", u, self.fast))
        return self._finding(history, int(steps[-span]), f"fell to {number(low)}, then bounces about {number(now)}", evidence,
                             f"a step changes {number(u)} of the weights")  # fmt: skip

    def _restless(self, history: History, newest: Array, size: float, step: int) -> Finding | None:
        """Law (restless)."""
        first = readings.beginning(history) / size
        parts = [middle(part) for part in newest]
        if newest.min() <= 0 or not first > 0 or not min(parts) > self.learned * first or readings.change(newest.ravel()) == "falling":
            return None
        u = speed(history, int((history.steps() >= step).sum()))
        spread = float(np.std(newest[-1])) / parts[-1]
        if not u > self.fast or not spread > self.swing or readings.change(newest[1:].ravel()) == "falling" or self._raised(history, step):
            return None
        if readings.rhythm(newest.ravel()):
            return None
        evidence = (Evidence("median update ratio", u, self.fast), Evidence("deviation over median", spread, self.swing))
        return self._finding(history, step, f"stands about {number(parts[-1] * size)} and swings by {spread:.0%}", evidence,
                             f"a step changes {number(u)} of the weights, and the loss no longer falls")  # fmt: skip

    @staticmethod
    def _raised(history: History, step: int) -> bool:
        """The learning rate is higher now than it was at that step."""
        lr = history.fact("lr")
        after = np.flatnonzero(history.steps() >= step)
        return bool(after.size and lr[-1] > lr[after[0]] * (1 + 1e-6))

    def _finding(self, history: History, step: int, message: str, evidence: tuple[Evidence, ...], because: str,
                 severity: Severity = Severity.WARNING) -> Finding:  # fmt: skip
        heavy = momentum(history)
        causes, remedies = ranked([
            *([] if heavy is None else [heavy]),
            (Cause("learning rate too high", 0.7, because), [slower(history), clip_remedy(history)]),
            (Cause("batches too small", 0.3, "each batch pulls elsewhere"), [Remedy("2 to 4 times the batch size, 32 at least", {"batch_size": 32})]),
        ])  # fmt: skip
        severity = Severity.INFO if informational(history) else severity
        return Finding(self.diagnosis, severity, step, "loss", message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class OscillatingValidation:
    """oscillating_validation: validation swings up and down (survey, oscillating_validation).

    Law: of the last 6 changes from one evaluation to the next, 4 are opposite to the one before, both larger than 10 % of the loss
    and than 5 % of what the run has learned. Information while the newest 3 evaluations have a best that is 10 % below all before them,
    unless batch-norm's statistics are known to be stale.

    Why: a validation set that is small or drawn anew each time; a learning rate too high; batches too small, above all under
    batch-norm, whose momentum may also be so small that evaluation runs on the statistics it began with; a loss that a few samples dominate.
    Do: evaluate on one fixed set of at least 1000 samples; divide the learning rate by 10, or average the weights (EMA 0.99);
    batches of 32 or more under batch-norm; look at the samples with the largest validation loss.
    False alarm: validation noisier than training is normal: swings of a converged run are small beside what it has learned and do
    not count. A large learning rate on its way down makes validation swing and still reach one best after the other, which no remedy
    would better. Cyclic learning rates swing by design: evaluate at the end of a cycle.
    """

    diagnosis: ClassVar[str] = "oscillating_validation"
    reads: ClassVar[tuple[str, ...]] = ("loss", "validation")
    times: int = readings.SWINGS[0]  # of the last 6 changes are large and opposite; survey (4)
    swing: float = readings.SWING  # of the validation loss: a smaller change is no swing; survey (0.1)
    material: float = readings.SWING_MATERIAL  # of what was learned: the same; our own choice (0.05)
    calm: float = 0.1  # sd over mean of the training losses, about their trend, above which training swings as well; survey, oscillating_loss
    newest: int = 3  # evaluations, half of the 6: a best among them that is clearly below all before says that validation still falls
    least: int = 8  # evaluations; our own choice (survey: 6), the first changes are those of learning
    grace: int = 0  # steps; evaluations are counted
    patience: int = 1  # evaluations; the changes are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        read = readings.curves(history)
        count = readings.swings(read, self.swing, self.material)
        if len(read) < self.least or count < self.times:
            return None
        newest = read.loss[-readings.SWINGS[1] :]
        low, high = float(newest.min()), float(newest.max())
        train = read.training[-readings.SWINGS[1] - 2 :]
        restless = bool(readings.spread(train) > self.calm * abs(np.mean(train)))
        stale = structure.stale_statistics(history)
        noisy = f"training {'swings as well' if restless else 'is calm beside it'} ({number(float(train.min()))} to {number(float(train.max()))})"
        causes, remedies = ranked([
            *([] if stale is None else [stale]),
            (Cause("validation set too small or drawn anew", 0.3 if restless else 0.6, noisy),
             [Remedy("evaluate on one fixed set of at least 1000 samples", {"look_at": 1000})]),
            (Cause("learning rate too high", 0.6 if restless else 0.4, noisy), [lr_remedy(history, 0.1)]),
            (Cause("batches too small", 0.3, "batch-norm statistics of few samples swing"), [Remedy("batch size 32 or more", {"batch_size": 32})]),
        ])  # fmt: skip
        before = float(read.loss[: -self.newest].min())
        better = float(newest[-self.newest :].min()) < before - read.share(self.swing, before)
        severity = Severity.INFO if informational(history) or (better and stale is None) else Severity.WARNING
        evidence = (Evidence("opposite large changes of the last 6", float(count), float(self.times)), Evidence("lowest", low), Evidence("highest", high))
        message = f"validation swings between {number(low)} and {number(high)}"
        return Finding(self.diagnosis, severity, int(read.steps[-readings.SWINGS[1]]), "validation loss", message, evidence, causes, remedies)


@functools.cache
def _quadratics(size: int) -> Array:
    """An orthonormal basis of the quadratic curves over so many points: (size, 3)."""
    basis: Array = np.linalg.qr(np.vander(np.linspace(-1.0, 1.0, size), 3))[0]
    return basis
