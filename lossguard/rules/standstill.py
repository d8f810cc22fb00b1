"""A loss that stands still: from the start, at a height, or bit for bit. Losses and evidence of the other signals in, finding or None out; numpy only.

A noise floor, a plateau before generalisation and a converged run stand still in good health: without evidence of a fault in
another signal these rules inform, they do not warn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings, structure
from lossguard.advice import HEALTHY, Advice, converged, finite_losses, informational, lr_remedy, middle, ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.obstacles import CERTAIN, CLASSIFIES, constant_advice, full_speed_since, plateau_advice, speed, step_size, trained_before
from lossguard.readings import Curves
from lossguard.rules.rule import rule
from lossguard.rules.suspects import decay, forgets


@rule
@dataclass(frozen=True)
class LossPlateau:
    """loss_plateau: the loss has not fallen since the start of the run (survey, loss_plateau).

    Law: 100 steps after the learning rate has reached its peak, the mean of the newest losses (50 or more) is below that of the first 20 neither
    by 2 % nor by 4 standard errors, and no 50 losses in a row ever were; or a classifier's losses have settled at those of equally likely
    classes, ln C, wherever they came from, and no 50 in a row were ever 2 % below. A warning where another signal leaves its healthy envelope
    (updates, also all of them together below 1 % of the weights, gradients, units, logits) or the network's make speaks against it (a dropout
    above 0.85, linear layers with no activation between, a layer of one unit), which is then the first cause; or where a classifier that began
    without any knowledge stands for 1500 steps. Else it is information, for some tasks learn nothing for long and then everything.

    Why: a learning rate too low or too high; dead, saturated or identical units from a bad initialisation; gradients that do not
    reach the first layers; labels that do not belong to the inputs; a wrong activation before the loss.
    Do: what the first cause says; without one, overfit a single batch: if that fails, look at the loss, the output activation and
    the optimizer's parameters; if it works, look at 20 samples with their labels, then try 0.1 and 10 times the learning rate.
    False alarm: parity, XOR and modular arithmetic stand at chance for hundreds of steps, a pretrained network has nothing to
    learn at first, a warm-up is slow: all of these have signals of a healthy size and get a line of information at most for 1500
    steps. Adversarial and reinforcement losses never warn, nor do losses that rise and fall in a fixed number of steps: each task begins
    anew. ``LossPlateau(long=10000)`` waits longer.
    """

    diagnosis: ClassVar[str] = "loss_plateau"
    reads: ClassVar[tuple[str, ...]] = (
        "loss",
        "update_norm",
        "weight_norm",
        "grad_norm",
        "dead_fraction",
        "saturated_fraction",
        "sample_variance",
        "logit_peak",
    )
    slow: ClassVar[bool] = True
    fall: float = 0.02  # of the mean of the first losses; survey
    near: float = 0.05  # of the loss of equally likely classes: a loss this near above it has settled there; our own choice
    errors: float = 4.0  # standard errors of the difference of the means; survey
    first: int = 20  # losses of the beginning; survey
    newest: int = 50  # losses of the present, at least; survey
    after: int = 100  # steps at the full learning rate; survey
    full: float = 0.9  # of the peak learning rate: the warm-up is over; our own choice
    long: int = 1500  # steps after which even a classifier without a visible fault warns; our own choice, known plateaus last about 1000
    pace: int = 10  # steps; asked at most once in so many, the law spans more than a hundred
    grace: int = 100  # steps; survey
    patience: int = 3  # samples; our own choice

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        first = history.first_losses(self.first)
        first, losses = first[np.isfinite(first)], finite_losses(history)[0]
        if first.size < self.first // 2 or history.step < self.after or losses.size < self.newest:
            return None
        start, now = float(first.mean()), losses[-max(self.newest, losses.size // 4) :]
        settled = self._at_chance(history, losses)
        if float(now.mean()) < start - self.fall * abs(start) and not settled:
            return None  # below any limit
        error = float(np.hypot(first.std() / np.sqrt(first.size), now.std() / np.sqrt(now.size)))
        limit = start - min(self.fall * abs(start), self.errors * error)
        stands = float(now.mean()) >= limit and not self._ever_fell(losses, start, error)
        if not (stands or settled) or converged(history):
            return None
        since = full_speed_since(history, self.full)
        if history.step < since + self.after:
            return None
        causes, remedies = plateau_advice(history)
        evidence = (Evidence("mean of the newest losses", float(now.mean()), limit), Evidence("mean of the first losses", start))
        message = f"{number(start)} at first, {number(float(now.mean()))} after {history.step - since} steps at the full learning rate"
        return Finding(self.diagnosis, self._severity(history, since, causes), since + self.after, "loss", message, evidence, causes, remedies)

    def _at_chance(self, history: History, losses: Array) -> bool:
        """A classifier's losses have come down to those of equally likely classes, if at all, and never below."""
        chance = structure.chance(history)
        if not float(losses[-self.newest :].mean()) > (1 - self.fall) * chance or losses.size < 2 * self.newest:
            return False  # a chance that is unknown is NaN
        blocks = losses[losses.size % self.newest :].reshape(-1, self.newest).mean(axis=1)
        return bool((blocks > (1 - self.fall) * chance).all() and blocks[-2:].max() < (1 + self.near) * chance)

    def _ever_fell(self, losses: Array, start: float, error: float) -> bool:
        """Some block of the losses held was below the beginning: it fell and came back, which is another diagnosis."""
        blocks = losses[losses.size % self.newest :].reshape(-1, self.newest)
        means, errors = blocks.mean(axis=1), np.hypot(blocks.std(axis=1) / np.sqrt(self.newest), error)
        return bool((means < start - np.maximum(self.fall * abs(start), self.errors * errors)).any())

    def _severity(self, history: History, since: int, causes: tuple[Cause, ...]) -> Severity:
        if informational(history) or readings.rhythm(finite_losses(history)[0][-readings.BEATS :]):
            return Severity.INFO
        if causes[0].confidence >= CERTAIN:
            return Severity.WARNING
        classifier = history.loss_family in CLASSIFIES and not trained_before(history)
        return Severity.WARNING if classifier and history.step - since >= self.long else Severity.INFO


@rule
@dataclass(frozen=True)
class LearningBottleneck:
    """learning_bottleneck: neither curve moves any more though the learning rate has not been lowered (survey).

    Law: over the last 30 % of the evaluations (at least 6) and of at least 300 steps both curves stand still within noise, and the
    learning rate is at least half of its peak. A noise floor looks the same: it is information, and a warning only where the loss
    is still above half of its first value and the size of the updates lies outside of the healthy band, or the network's make speaks
    against it (see loss_plateau). Law (held), a warning: training no longer falls, is above 5 % of where it began, and weight decay by itself
    takes 1 % of the weights in a step: what was learned is forgotten within 100. Law (by heart), a warning: in 8 evaluations and 100 steps
    a classifier's validation was never 2 % below the loss of equally likely classes, while training is. Law (guesses), a warning: in as many
    evaluations the accuracy that was told stays at chance, while training falls by 10 %.

    Why: a learning rate too high to settle, or too low to move; batches too small; a network too small for the data; a weight decay that
    outweighs the gradient; labels that do not belong to their inputs, so that all that can be learned are single samples; or the run is
    done: what is left is noise in the data.
    Do: divide the learning rate by 10 (multiply it by 10 where the updates are below 1e-4 of the weights); then change the batch
    size by 2 to 4; then widen the network; if the loss is at its known floor, stop. A lower weight decay; look at 20 samples with labels.
    False alarm: labels with noise and regression on weak inputs settle high in good health: with updates of a healthy size that is
    never more than information. A warm-up that still goes on is not judged. Delayed generalisation begins by heart, and leaves chance later.
    """

    diagnosis: ClassVar[str] = "learning_bottleneck"
    reads: ClassVar[tuple[str, ...]] = ("loss", "validation", "update_norm", "weight_norm")
    share: float = 0.3  # of the evaluations over which nothing moves; survey
    least: int = 6  # evaluations that stand; survey has 5 in all
    span: int = 300  # steps of the run; survey
    lr_share: float = 0.5  # of the peak learning rate; survey
    full: float = 0.9  # of the peak learning rate, reached before the standstill: the warm-up is over; our own choice
    high: float = 0.5  # of the first losses: above it little was learned; survey
    slow: float = 1e-4  # update ratio below which the learning rate is too low for that; survey, target band
    fast: float = 3e-2  # update ratio above which it is too high; survey, target band
    forgets: float = HEALTHY  # of the weights that decay alone takes in a step: all that a healthy update changes; healthy runs have up to 3e-3
    least_losses: int = 100  # in which training stands while weights are held; the time in which they are forgotten
    settled: float = readings.CONVERGED  # of the first losses: a run below it has learned in spite of its decay
    chance: float = 0.02  # of the loss of equally likely classes: validation further below has learned something; as in loss_plateau
    little: float = readings.LEARNED  # the same for training: what fell further is overfitting
    evaluations: int = 8  # that never left chance; our own choice, of healthy runs only delayed generalisation stays so long, and trains to 0 meanwhile
    twice: float = 2.0  # times chance, and
    above: float = 0.05  # over it: a higher accuracy is no guess; our own choices
    exact: float = 0.5  # of chance: a lower accuracy counts something else, such as whole sequences; our own choice
    after: int = 100  # steps; as in loss_plateau
    grace: int = 100  # steps; the laws of both curves wait for `span`, survey
    patience: int = 1  # evaluations; `least` is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        read = readings.curves(history)
        if history.lr < self.lr_share * history.lr_peak:
            return None
        return (
            self._by_heart(history, read)
            or self._guesses(history, read)
            or (self._held(history, read) or self._standing(history, read) if history.step >= self.span else None)
        )

    def _by_heart(self, history: History, read: Curves) -> Finding | None:
        """Law (by heart)."""
        chance = structure.chance(history)
        if math.isnan(chance) or len(read) < self.evaluations or not float(read.loss.min()) > (1 - self.chance) * chance:
            return None
        low = float(read.training[-1]) / chance
        if not 1 - self.little < low < 1 - self.chance or history.step < full_speed_since(history, self.full) + self.after or trained_before(history):
            return None
        evidence = (Evidence("lowest validation loss over that of equally likely classes", float(read.loss.min()) / chance, 1 - self.chance),
                    Evidence("training loss over the same", low))  # fmt: skip
        message = f"in {len(read)} evaluations validation was never below chance ({number(chance)}); it is {number(float(read.loss[-1]))}"
        return self._unpaired(history, read, "validation loss", message, evidence)

    def _guesses(self, history: History, read: readings.Curves) -> Finding | None:
        """Law (guesses)."""
        many, told = structure.classes(history), read.accuracy[np.isfinite(read.accuracy)]
        if many < 2 or told.size < self.evaluations or history.step < full_speed_since(history, self.full) + self.after:
            return None
        limit = min(self.twice, 1 + self.above * many) / many
        low = float(read.training[-1]) / read.first if read.positive and read.first > 0 else math.nan
        if not told.max() <= limit or not middle(told) * many > self.exact or not self.settled < low < 1 - self.little:
            return None
        evidence = (Evidence("highest accuracy told", float(told.max()), limit), Evidence("training loss over the first losses", low))
        message = f"in {told.size} evaluations the accuracy was never above chance ({number(1 / many)}) by more than luck; it is {number(float(told[-1]))}"
        return self._unpaired(history, read, "validation accuracy", message, evidence)

    def _unpaired(self, history: History, read: readings.Curves, where: str, message: str, evidence: tuple[Evidence, ...]) -> Finding:
        because = f"training comes to {number(float(read.training[-1]))} by single samples, of which nothing holds for others"
        look = Remedy("compare 20 samples with their labels, and repair the pairing", {"labels": "repair", "look_at": 20})
        causes, remedies = ranked([(Cause("labels or targets do not belong to the inputs", 0.7, because), [look])])
        severity = Severity.INFO if informational(history) else Severity.WARNING
        return Finding(self.diagnosis, severity, int(read.steps[-1]), where, message, evidence, causes, remedies)

    def _held(self, history: History, read: Curves) -> Finding | None:
        """Law (held)."""
        alone = forgets(history)
        if not alone > self.forgets or informational(history):
            return None
        losses = finite_losses(history)[0]
        newest, why = losses[-max(self.least_losses, int(self.share * losses.size)) :], decay(history)
        height = middle(newest) / read.first if read.positive and read.first > 0 else math.nan
        if why is None or newest.size < self.least_losses or not height > self.settled or readings.change(newest) == "falling":
            return None
        causes, remedies = ranked([why])
        evidence = (Evidence("share of the weights that decay takes in a step", alone, self.forgets),
                    Evidence("training loss over the first losses", height, self.settled))  # fmt: skip
        message = f"training stands at {number(middle(newest))}: what it learns is taken back by weight decay within {math.ceil(1 / alone)} steps"
        return Finding(self.diagnosis, Severity.WARNING, history.step, "training loss", message, evidence, causes, remedies)

    def _standing(self, history: History, read: Curves) -> Finding | None:
        """Both curves."""
        count = readings.standing(history, read, self.share, self.least)
        if not count or read.steps[-1] - read.steps[-count] < self.share * self.span or read.steps[-count] < full_speed_since(history, self.full):
            return None
        height = float(read.training[-1]) / read.first if read.positive and read.first > 0 else float("nan")
        odd = step_size(history, self.slow, self.fast)
        made = structure.faults(history)
        grave = height > self.high and (odd is not None or made != []) and not informational(history) and not trained_before(history)
        known = (Evidence("training loss over the first losses", height, self.high), Evidence("median update ratio", speed(history)))
        evidence = tuple(e for e in known if not math.isnan(e.value))  # a loss that was negative has no height
        causes, remedies = self._advice(history, read, odd, made if grave else [])
        message = f"training stands at {number(float(read.training[-1]))} and validation at {number(float(read.loss[-1]))} for {count} evaluations"
        severity = Severity.WARNING if grave else Severity.INFO
        return Finding(self.diagnosis, severity, max(int(read.steps[-count]), self.span), "both losses", message, evidence, causes, remedies)

    @staticmethod
    def _advice(history: History, read: Curves, odd: Cause | None, made: structure.Pairs) -> Advice:
        fell = f"training has come down from {number(read.first)} to {number(float(read.training[-1]))}"
        done = Cause("nothing left to learn", 0.4, fell + " with updates of a healthy size" * (odd is None))
        rate = odd or Cause("learning rate too high to settle", 0.3, f"it is {number(history.lr)}, still near its peak")
        change = lr_remedy(history, 10.0 if rate.name.endswith("low") else 0.1)
        batch = Remedy("batch size 32, or 2 to 4 times the present one", {"batch_size": 32})
        return ranked([*made, (rate, [change, batch]), (done, [Remedy("stop, or widen the network", {"steps": int(read.steps[-1])})])])


@rule
@dataclass(frozen=True)
class ConstantLoss:
    """constant_loss: the loss is the same for 20 different batches; says what a special value means (survey, constant_loss).

    Law: the range of 20 losses is at most 1e-6 of their mean. Silent at exactly 0, on a converged run, and while the learning rate is 0.
    A loss that came down and settled smoothly (full-batch descent) is information only. Values that speak are named: 87.3365 and others
    are the floor of a softmax that underflows, ln C is that of C equally likely classes.

    Why: the network gives the same output for every sample; logits so large that the softmax underflows; gradients that do not reach
    the weights; the same number logged again and again.
    Do: at 87.3365: learning rate divided by 10, last layer's initial weights times 0.1; at ln C: random initialisation instead of zeros,
    and look for dead units; else look for detach() and no_grad() before the loss.
    False alarm: one batch used for every step settles smoothly, which is information; a margin loss that is satisfied is exactly 0 and
    silent.
    """

    diagnosis: ClassVar[str] = "constant_loss"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    slow: ClassVar[bool] = True
    range: float = 1e-6  # of |mean|; survey
    window: int = 20  # losses; survey
    near: float = 0.01  # of the value: the losses before the standstill lie within it if the run settled; our own choice
    solved: float = 0.5  # the same below which it has, however it got there: a second-order method takes a few steps; our own choice
    fell: float = 0.9  # value over the first loss below which a settled run has learned something; our own choice
    grace: int = 0  # steps; the window is the grace
    patience: int = 1  # answers; the window is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        losses = history.losses(self.window)
        if losses.size < self.window or not np.isfinite(losses).all():
            return None
        value, spread = float(losses.mean()), float(losses.max() - losses.min())
        if value == 0.0 or not spread <= self.range * abs(value) or history.lr == 0.0 or converged(history):
            return None
        everything = history.losses()
        apart = np.flatnonzero(~(np.abs(everything - value) <= self.range * abs(value)))
        since = int(apart[-1]) + 1 if apart.size else 0
        since = min(since, everything.size - self.window)
        causes, remedies = constant_advice(history, value)
        severity = Severity.INFO if informational(history) or self._settled(everything, since, value) else Severity.WARNING
        lasts = Evidence("losses in a row", float(everything.size - since), float(self.window))
        evidence = (Evidence("range over mean", spread / abs(value), self.range), lasts)
        return Finding(self.diagnosis, severity, int(history.loss_steps()[since]), "loss", f"it is {number(value)} for every batch", evidence, causes, remedies)

    def _settled(self, losses: Array, since: int, value: float) -> bool:
        """The loss came down by half, or came down and approached the value smoothly."""
        before, first = losses[max(0, since - self.window) : since], losses[np.isfinite(losses)][0]
        if 0 < value < self.solved * first:
            return True
        smooth = before.size >= 3 and (np.abs(before - value) <= self.near * abs(value))[-3:].all()
        return bool(smooth and value < first - (1 - self.fell) * abs(first))
