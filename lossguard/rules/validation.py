"""The validation curve beside the training curve: overfitting, mismatch, the lower curve. History in, finding or None out; numpy only.

Asked once for each evaluation. The curves are read in ``readings.py``; here are the patience, the severities and the advice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings
from lossguard.advice import Advice, informational, ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.readings import Curves
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class Overfitting:
    """overfitting: training goes on falling and validation does not (survey, overfitting).

    Law (turned): the last 3 evaluations are above the best by 10 %, by 3 standard deviations of a single evaluation and by 3 % of
    what the run has learned, while training is no higher than at the best, and falls or is below validation. The step is that of the
    best evaluation: the checkpoint to keep. Law (drifts), for validation that swings: the same for means of a quarter of all
    evaluations, 4 at least, beside the standard error of such means. Law (stands): validation has not improved for a third of the run,
    training fell on by a tenth of what was learned, and the gap between them is a quarter of it; or training fell to half and the gap
    is half of it. Law (accuracies, if told): the gap is above 0.25 for 3 evaluations; above 0.1, a line of information. Information
    only while the told validation accuracy still rises: then it is the calibration that drifts.

    Why: too few different samples for the capacity; no or weak regularisation; training on after the turning point; noisy labels
    that are learned by heart; a validation set that is drawn differently.
    Do: keep the checkpoint of the step named and stop there; more data or augmentation; weight decay 0.01 to 0.1 (AdamW) or
    dropout 0.1 to 0.5; a smaller network; correct labels.
    False alarm: delayed generalisation (grokking) looks the same until it comes: mute the diagnosis for such studies. Fine-tuned
    classifiers whose loss rises while their accuracy does: tell the accuracy. Fewer than 6
    evaluations are not judged, and the noise of validation is read from its own curve; ``Overfitting(rise=0.2)`` is more patient.
    """

    diagnosis: ClassVar[str] = "overfitting"
    reads: ClassVar[tuple[str, ...]] = ("loss", "validation")
    least: int = 6  # evaluations; survey
    lasting: int = 3  # evaluations above the best, or with the accuracy gap; survey
    rise: float = readings.RISE  # of the best validation loss; survey (0.1; at 0.05 one healthy run of 22 was flagged)
    material: float = readings.MATERIAL  # of what was learned: a smaller rise is the drift of a converged run; our own runs (0.03)
    noise: float = readings.NOISE  # standard deviations of one evaluation; our own choice (3; survey: 2 standard errors)
    drift: int = 4  # evaluations in a mean, so that 16 are needed; our own choice
    stand: float = 1 / 3  # of the evaluations without improvement; our own choice, a standstill is weaker evidence than a rise
    stand_least: int = 5  # evaluations without improvement; our own choice
    fell: float = 0.1  # of what was learned: the fall of training meanwhile; our own choice
    gap: float = readings.GAP  # of what was learned: training below validation; healthy small runs have 0.04 to 0.19 (0.25)
    wide: float = 0.5  # of what was learned: of so large a gap it is enough that training fell on to half; our own choice
    halved: float = 0.5  # of the training loss at the standstill's beginning
    hidden: float = 0.5  # of the fall of training: 2 standard deviations of an evaluation must be less; our own choice
    never: float = 0.05  # of the first losses: validation that was never lower by more learned nothing at all; our own choice
    by_heart: float = 0.5  # of the first losses: training above it has learned slowly; our own choice
    accuracy_gap: float = 0.25  # training above validation accuracy; well trained networks on 100 classes reach 0.23; our own choice
    accuracy_line: float = 0.1  # the same, for information; a published detector has 0.1
    grace: int = 0  # steps; evaluations are counted
    patience: int = 2  # evaluations; `lasting` is the patience, and one more for small validation sets that swing back; our own choice

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        read = readings.curves(history)
        if len(read) < self.least:
            return None
        if read.training.max() < 0 < read.loss.min():  # from the first on: they are no losses of one formula
            return self._accuracies(history, read)
        return self._turned(history, read) or self._drifts(history, read) or self._stands(history, read) or self._accuracies(history, read)

    def _turned(self, history: History, read: Curves) -> Finding | None:
        best = readings.turned(read, self.lasting, self.rise, self.material, self.noise)
        if best is None or readings.risen(read, best) or _stands_above(read, best):
            return None
        now, low = float(read.loss[-1]), float(read.loss[best])
        limit = readings.turning_limit(read, best, self.rise, self.material, self.noise)
        evidence = (Evidence("validation loss", now, limit), Evidence("best validation loss", low),
                    Evidence("training loss then", float(read.training[best])), Evidence("training loss now", float(read.training[-1])))  # fmt: skip
        message = (
            f"validation {number(low)} at step {int(read.steps[best])} -> {number(now)} while training {_went(read, best)}: keep the checkpoint of that step"
        )
        return self._finding(history, read, best, message, evidence)

    def _drifts(self, history: History, read: Curves) -> Finding | None:
        """Law (drifts)."""
        many = len(read) // 4
        if many < self.drift:
            return None
        sums = np.cumsum(np.concatenate([[0.0], read.loss]))
        means = (sums[many:] - sums[:-many]) / many
        best = int(np.argmin(means[:-many]))
        level, now = float(means[best]), float(means[-1])
        limit = level + max(read.share(self.rise, level), self.material * read.learned, self.noise * read.noise * (2 / many) ** 0.5)
        if not now > limit or readings.risen(read, best + many // 2) or _stands_above(read, best + many // 2):
            return None
        evidence = (Evidence(f"mean of the last {many} validation losses", now, limit), Evidence(f"best mean of {many}", level))
        since = best + many // 2
        message = f"validation drifts from {number(level)} about step {int(read.steps[since])} to {number(now)} while training {_went(read, since)}"
        return self._finding(history, read, best + many // 2, message, evidence)

    def _stands(self, history: History, read: Curves) -> Finding | None:
        since = readings.last_improvement(read)
        stood = len(read) - 1 - since
        if stood < max(self.stand_least, self.stand * len(read)):
            return None
        error = readings.NOISE * float(np.hypot(read.error[since], read.error[-1]))
        fell = float(read.training[since] - read.training[-1])
        if not readings.ERRORS * read.noise < self.hidden * fell:
            return None  # validation swings so much that it could have come down as well
        gap = readings.apart(read, self.lasting)
        halved = gap > self.wide and read.positive and float(read.training[-1]) < self.halved * float(read.training[since])
        if not (fell > max(self.fell * read.learned, error) or (halved and fell > error)) or not gap > self.gap:
            return None
        evidence = (Evidence("gap between the curves over what was learned", gap, self.gap),
                    Evidence("fall of training since over what was learned", fell / read.learned, self.fell))  # fmt: skip
        message = f"validation stands at {number(float(read.loss[-1]))} since step {int(read.steps[since])} while training fell on"
        return self._finding(history, read, since, message, evidence)

    def _accuracies(self, history: History, read: Curves) -> Finding | None:
        gaps = (read.train_accuracy - read.accuracy)[-self.lasting :]
        if not (gaps > self.accuracy_line).all():
            return None
        grave = bool((gaps > self.accuracy_gap).all())
        limit = self.accuracy_gap if grave else self.accuracy_line
        evidence = (Evidence("training accuracy above validation accuracy", float(gaps[-1]), limit),)
        message = f"accuracy {number(float(read.train_accuracy[-1]))} on training and {number(float(read.accuracy[-1]))} on validation data"
        return self._finding(history, read, len(read) - self.lasting, message, evidence, Severity.WARNING if grave else Severity.INFO)

    def _finding(self, history: History, read: Curves, at: int, message: str, evidence: tuple[Evidence, ...],
                 severity: Severity = Severity.WARNING) -> Finding:  # fmt: skip
        step = int(read.steps[at])
        stop = Remedy(f"stop at step {step}, or go back to its checkpoint", {"steps": step})
        never = read.positive and not float(read.loss.min()) < (1 - self.never) * read.first
        because = "validation was never below the loss that the run began with"
        alien = Cause("validation data of another kind, or nothing that generalises", 0.8, because)
        if never and float(read.training[-1]) > self.by_heart * read.first:  # what generalises is learned faster than what is learned by heart
            alien = Cause("labels or targets do not belong to the inputs", 0.8, f"{because}, and training falls slowly, as by heart")
        compare = Remedy("evaluate 20 training samples as if they were validation data: labels, preprocessing, mode", {"look_at": 20})
        causes, remedies = ranked([
            *([(alien, [compare])] if never else []),
            (Cause("too few samples for the capacity", 0.7, f"training {number(float(read.training[-1]))}, validation {number(float(read.loss[-1]))}"),
             [stop, Remedy("weight decay 0.05 (AdamW), dropout 0.2, or augmentation", {"weight_decay": 0.05, "dropout": 0.2})]),
            (Cause("labels learned by heart", 0.3, "training falls on where validation cannot follow"),
             [Remedy("look at the 20 training samples whose loss fell last", {"look_at": 20})]),
        ])  # fmt: skip
        if informational(history) or _still_rises(read.accuracy, self.lasting):
            severity = Severity.INFO
        return Finding(self.diagnosis, severity, step, "validation loss", message, evidence, causes, remedies)


def _stands_above(read: Curves, since: int) -> bool:
    """Training does not fall by more than noise, and is above validation: nothing is learned by heart."""
    error = readings.ERRORS * float(np.hypot(read.error[since], read.error[-1]))
    return bool(read.loss[-1] < read.training[-1] and read.training[-1] > read.training[since] - error)


def _went(read: Curves, since: int) -> str:
    """What training did meanwhile, in words."""
    return "fell on" if read.training[-1] < read.training[since] else f"stood at {number(float(read.training[-1]))}"


def _still_rises(accuracy: Array, newest: int) -> bool:
    """The best accuracy told is one of the newest."""
    told = accuracy[np.isfinite(accuracy)]
    return bool(told.size > newest and told[-newest:].max() > told[:-newest].max())


@rule
@dataclass(frozen=True)
class ValidationMismatch:
    """validation_mismatch: the validation data, or how they are evaluated, do not belong to the training (survey).

    Law (falls alone): over 6 evaluations validation falls by 10 % and by more than noise while training, which has something left to
    learn, follows by less than a quarter of that. A warning if training never learned or validation is the lower of the two, else
    information. Law (chance): validation stays within 5 % of the run's first training losses for 6 evaluations while training fell by
    30 %. Law (not finite): two validation losses in a row are NaN or infinite while the training losses are finite. Law (mode): before
    two validation losses modules were seen to run without gradients in training mode only, and the model has dropout or batch norm; or
    after an evaluation three sampled steps were made in evaluation mode only, and the steps before it were not.

    Why: validation samples that are in the training data, or another preprocessing, label order or loss for one of the two;
    batch-norm statistics that do not fit in evaluation mode; a parameter copy (EMA, checkpoint) other than the one that is trained.
    Do: evaluate one training batch in both modes: the two losses must agree but for dropout; compare preprocessing and label maps of
    both data sets; look for samples that are in both; give batch-norm 30 batches before the first evaluation, or momentum 0.1.
    False alarm: averaged weights (EMA) lag behind and then catch up, and so do batch-norm statistics: validation is the higher of
    the two then, and it is information only. Monte Carlo dropout is evaluated in training mode by design: mute it. Delayed
    generalisation happens at a training loss near 0, where the law is silent.
    """

    diagnosis: ClassVar[str] = "validation_mismatch"
    reads: ClassVar[tuple[str, ...]] = ("loss", "validation")
    fall: float = 0.1  # of the validation loss, over 6 evaluations; our own choice, as for a rise
    follow: float = 0.25  # of that fall: training follows by less; our own choice
    never: float = 0.1  # of the first losses: training that came down by less never learned; our own choice
    chance: float = 0.05  # of the first losses: validation this near to them is at chance; our own choice
    fell: float = 0.3  # of the first losses: training came down by more; survey
    least: int = 6  # evaluations; our own choice (survey: 3)
    lasting: int = 2  # evaluations that are not finite; one alone may be an empty batch
    idle: int = 3  # sampled steps in a row in evaluation mode; our own choice, an exact test
    grace: int = 0  # steps; evaluations are counted
    patience: int = 1  # evaluations; `least` is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        told = history.validations()
        newest = told[-self.lasting :]
        if len(newest) == self.lasting and not np.isfinite(newest[:, 1]).any():
            finite = history.losses(readings.LEAST)
            return self._not_finite(history, newest) if finite.size and np.isfinite(finite).all() else None
        if history.notes.get("evaluated_in_training_mode", 0) >= self.lasting and len(told):
            return self._wrong_mode(history, told[-1])
        if self._left_in_evaluation(history):
            return self._not_training(history)
        read = readings.curves(history)
        if len(read) < self.least:
            return None
        return self._chance(history, read) or self._alone(history, read)

    def _wrong_mode(self, history: History, row: Array) -> Finding:
        times = int(history.notes["evaluated_in_training_mode"])
        evidence = (Evidence("evaluations seen in training mode", float(times), float(self.lasting)),)
        remedy = Remedy("call model.eval() before an evaluation and model.train() after it", {"eval_mode": True})
        advice = ranked([(Cause("eval() is not called", 0.9, "modules ran in training mode under no_grad before the validation loss was told"), [remedy])])
        message = f"{times} evaluations ran in training mode: dropout and batch statistics are in the validation loss"
        return self._finding(history, int(row[0]), message, evidence, advice, Severity.WARNING)

    def _left_in_evaluation(self, history: History) -> bool:
        """No module that is watched runs in training mode any more, and before an evaluation they did."""
        modes = float(history.notes.get("largest_dropout") or 0.0) > 0 or history.notes.get("least_norm_momentum") is not None
        if not modes or not len(history.validations()) or not bool((history.fact("in_evaluation", self.idle, 0.0) == 1.0).all()):
            return False
        outputs, stepped = history.seen("activation_rms"), history.fact("stepped", self.idle)
        return bool(len(outputs) > self.idle and not outputs[-self.idle :].any() and outputs.any() and (stepped == 1.0).all())

    def _not_training(self, history: History) -> Finding:
        ran = history.steps()[history.seen("activation_rms").any(axis=1)]
        since = int(history.steps()[history.steps() > ran[-1]][0])
        remedy = Remedy("call model.train() after each evaluation", {"train_mode": True})
        because = f"the last sampled step in training mode was {int(ran[-1])}, and the optimizer steps on"
        advice = ranked([(Cause("train() is not called", 0.95, because), [remedy])])
        evidence = (Evidence("sampled steps in evaluation mode", float((history.steps() >= since).sum()), float(self.idle)),)
        message = f"the model trains in evaluation mode since step {since}: without dropout, and with batch statistics that stand still"
        return self._finding(history, since, message, evidence, advice, Severity.WARNING)

    def _not_finite(self, history: History, rows: Array) -> Finding:
        evidence = (Evidence("validation loss", float(rows[-1, 1])), Evidence("training loss", float(rows[-1, 4])))
        because = f"the training losses are finite ({number(float(rows[-1, 4]))})"
        remedy = Remedy("evaluate one training batch in evaluation mode; then look for empty batches and for log(0)", {"look_at": 1})
        advice = ranked([(Cause("train/eval mismatch or empty validation batches", 0.6, because), [remedy])])
        message = f"the validation loss is {number(float(rows[-1, 1]))} and the training loss is not"
        return self._finding(history, int(rows[0, 0]), message, evidence, advice, Severity.WARNING)

    def _chance(self, history: History, read: Curves) -> Finding | None:
        if not read.positive or not read.first > 0 or not (np.abs(read.loss / read.first - 1) < self.chance).all():
            return None
        fell = 1 - float(read.training[-1]) / read.first
        if not fell > self.fell:
            return None
        evidence = (Evidence("validation loss over the first losses", float(read.loss[-1]) / read.first), Evidence("fall of training", fell, self.fell))
        because = f"training fell by {fell:.0%} and nothing of it shows in {len(read)} evaluations"
        advice = ranked([
            (Cause("other labels or preprocessing in validation", 0.6, because),
             [Remedy("evaluate 20 training samples as if they were validation data", {"look_at": 20})]),
            (Cause("samples learned by heart", 0.4, because), [Remedy("weight decay 0.05, dropout 0.2, or more data", {"weight_decay": 0.05, "dropout": 0.2})]),
        ])  # fmt: skip
        message = f"validation stays at chance ({number(float(read.loss[-1]))}) while training fell to {number(float(read.training[-1]))}"
        return self._finding(history, int(read.steps[0]), message, evidence, advice, Severity.WARNING)

    def _alone(self, history: History, read: Curves) -> Finding | None:
        if not readings.falls_alone(read, self.fall, self.follow):
            return None
        fall, training = readings.drop(read.loss), readings.drop(read.training)
        unlearned = not read.learned > self.never * abs(read.first)
        severity = Severity.WARNING if unlearned or bool((read.loss[-3:] < read.training[-3:]).all()) else Severity.INFO
        evidence = (Evidence("fall of validation", fall), Evidence("fall of training", training, self.follow * fall))
        because = f"validation fell by {number(fall)} while training moved by {number(-training)}"
        advice = ranked([
            (Cause("the data sets are mixed up", 0.6, because), [Remedy("compare 20 samples of each data set, and look for samples in both", {"look_at": 20})]),
            (Cause("train/eval mismatch", 0.4, "evaluation may run other weights or statistics than training"),
             [Remedy("evaluate one training batch in both modes", {"look_at": 1})]),
        ])  # fmt: skip
        message = f"validation falls to {number(float(read.loss[-1]))} while training stands at {number(float(read.training[-1]))}"
        return self._finding(history, int(read.steps[-6]), message, evidence, advice, severity)

    def _finding(self, history: History, step: int, message: str, evidence: tuple[Evidence, ...], advice: Advice, severity: Severity) -> Finding:
        severity = Severity.INFO if informational(history) else severity
        return Finding(self.diagnosis, severity, step, "validation loss", message, evidence, *advice)


@rule
@dataclass(frozen=True)
class ValidationBelowTraining:
    """validation_below_training: validation is the lower curve (survey, validation_below_training).

    Law: validation is below the training loss by 5 %, and by more than noise, in 3 evaluations in a row. Always information.

    Why: dropout, augmentation, mixup, label smoothing or a weighted loss that act in training only; a training loss that is a mean
    over older weights; an easier validation split; if none of these, samples that are in both sets, or too much regularisation.
    Do: evaluate the training data in evaluation mode and compare again; if training is still the higher one, look for shared samples
    and compare the splits; if training is also bad, lower dropout (0.5 -> 0.2) or weight decay (by 10).
    False alarm: most runs with dropout or augmentation: that is why it never warns. The training mean is that of the newest half of
    the steps since the last evaluation, so that the lag of a running mean is small.
    """

    diagnosis: ClassVar[str] = "validation_below_training"
    reads: ClassVar[tuple[str, ...]] = ("loss", "validation")
    lasting: int = 3  # evaluations; survey
    below: float = readings.BELOW  # of the training loss; survey (0.05)
    least: int = 5  # evaluations; the noise of validation is unknown before
    grace: int = 0  # steps; evaluations are counted
    patience: int = 1  # evaluations; `lasting` is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        read = readings.curves(history)
        if len(read) < self.least or not readings.below_training(read, self.lasting, self.below):
            return None
        now, train = float(read.loss[-1]), float(read.training[-1])
        evidence = (Evidence("validation loss", now, train - read.share(self.below, train)), Evidence("training loss", train))
        dropout = float(history.notes.get("largest_dropout") or 0.0)
        acts = f"a dropout of {number(dropout)} acts in training only" if dropout else f"validation {number(now)} is below training {number(train)}"
        causes, remedies = ranked([
            (Cause("regularisation in training only", 0.8 if dropout else 0.6, acts),
             [Remedy("compare again with training measured in evaluation mode", {"look_at": 1})]),
            (Cause("an easier validation split, or shared samples", 0.3, "both would look the same"),
             [Remedy("look for samples in both sets, and compare 20 of each", {"look_at": 20})]),
        ])  # fmt: skip
        message = f"validation {number(now)} is below training {number(train)} for {self.lasting} evaluations"
        return Finding(self.diagnosis, Severity.INFO, int(read.steps[-self.lasting]), "validation loss", message, evidence, causes, remedies)
