"""A loss below zero that cannot be. Losses and labels' likelihoods in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings
from lossguard.advice import Advice, informational, middle, ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import History
from lossguard.rules.rule import rule
from lossguard.rules.suspects import no_floor


@rule
@dataclass(frozen=True)
class NegativeLoss:
    """negative_loss: a loss that cannot be negative is (survey, negative_loss).

    Law: the loss is below -1e-6 of its size, and it is known to be a cross entropy, a binary cross entropy, a squared, absolute or
    Huber error, a CTC loss or a KL divergence and nothing else: declared as ``loss_family``, or read from the graph of the loss. Law
    (negated): the graph shows such losses under a minus sign and nothing else, weighted perhaps, and the last 10 losses are in the mean
    1.5 times as far below 0 as the first 10. Law (mirrored), for any other loss beside labels that were shown: over 10 samples and more
    it is the labels' negative log-likelihood times one and the same negative number. Law (bottomless), beside labels of which some are
    no class (padding) in 10 samples: the loss is further below 0 than it ever was above, and has fallen faster in each third of the run
    than in the one before. Law (endless): it is 100 times as far below 0 as it ever was above, and fell 1.5 times as far in each third of
    the run as in the one before.

    Why: targets out of range (-1 used as padding, 0 to 255 instead of 0 to 1); ``nll_loss`` on probabilities or logits instead of
    log-probabilities; unnormalised distributions in a divergence; a minus sign too many; negative sample weights.
    Do: check that targets lie in [0, 1] (binary) or are class numbers; feed ``log_softmax`` to ``nll_loss``, or logits to
    ``cross_entropy``; normalise both sides of a divergence to sum 1; weights of 0 or more.
    False alarm: unlearning by gradient ascent is the negated and the mirrored law by design: mute it. Gaussian likelihoods, ELBO, policy gradients,
    adversarial, cosine and contrastive losses may be negative: they are not of these families, and none of the other laws holds for
    them, since a likelihood falls ever slower. Rounding stays within the limit.
    """

    diagnosis: ClassVar[str] = "negative_loss"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    slow: ClassVar[bool] = True
    rounding: float = 1e-6  # of max(1, |median of the losses|); survey
    families: tuple[str, ...] = ("cross_entropy", "binary", "mse", "l1", "huber", "ctc", "kl")  # losses that are never negative; survey
    negated: float = 1.5  # times as far below 0 as at first; our own choice: a network that only guesses stays where it is
    mean: int = 10  # losses in such a mean; our own choice
    mirrored: int = 10  # samples in which loss and log-likelihood are compared; our own choice
    same: float = 0.01  # of their ratio: its whole range, about rounding in half precision; our own choice
    varied: float = 0.05  # of the log-likelihood: its range in them is larger, so that a constant loss proves nothing; our own choice
    endless: float = readings.ENDLESS[1]  # times as far below 0 as the loss ever was above, and 1 at least; our own choice
    faster: float = readings.ENDLESS[2]  # times as far a third of the run must have fallen as the one before; our own choice
    third: int = readings.ENDLESS[0]  # losses in a third of the run, at least; our own choice, as for a mean elsewhere and half of it more
    grace: int = 0  # steps; exact test
    patience: int = 1  # answers; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if history.loss_family not in self.families or not history.notes.get("loss_is_nonnegative", False):
            newest = history.losses(1)
            if not newest.size or not newest[0] < 0 or informational(history):
                return None
            return self._negated(history) or self._mirrored(history) or self._bottomless(history) or self._endless(history)
        losses = history.losses()
        fresh = losses[-history.fresh_losses :] if history.fresh_losses else losses[:0]
        if not fresh.size or not np.nanmin(fresh, initial=0.0) < -self.rounding:
            return None
        finite = np.abs(losses[np.isfinite(losses)])
        limit = -self.rounding * max(1.0, middle(finite))
        below = np.flatnonzero((fresh < limit) & np.isfinite(fresh))
        if not below.size:
            return None
        value, step = float(fresh[below[0]]), int(history.loss_steps(fresh.size)[below[0]])
        causes, remedies = self._advice(history, value)
        severity = Severity.INFO if informational(history) else Severity.WARNING
        message = f"it is {number(value)}, and a loss of the family {history.loss_family} cannot be below 0"
        return Finding(self.diagnosis, severity, step, "loss", message, (Evidence("loss", value, limit),), causes, remedies)

    def _negated(self, history: History) -> Finding | None:
        """Law (negated)."""
        first, newest = history.first_losses(self.mean), history.losses(self.mean)
        if not history.notes.get("loss_is_negated") or history.first_step != 0 or history.losses().size < 2 * self.mean or "acts" in history.facts():
            return None
        began, now = float(first.mean()), float(newest.mean())
        if not now < self.negated * min(began, 0.0):
            return None
        cause = Cause("sign of the loss", 0.9, "so says its graph: losses that are never negative, under a minus sign")
        causes, remedies = ranked([(cause, [Remedy("turn the sign of the loss", {"sign": -1.0})])])
        evidence = (Evidence(f"mean of the last {self.mean} losses", now, self.negated * min(began, 0.0)), Evidence(f"of the first {self.mean}", began))
        message = f"it is {number(now)}, below 0 and falling: losses that are to be small are subtracted"
        return Finding(self.diagnosis, Severity.WARNING, int(history.loss_steps()[-1]), "loss", message, evidence, causes, remedies)

    def _mirrored(self, history: History) -> Finding | None:
        """The loss is the labels' log-likelihood itself: the sign that makes a network unlearn."""
        newest = history.losses(1)
        if not history.last("label_nll", 1).size:
            return None
        nll, steps, losses = history.last("label_nll")[:, 0], history.steps(), history.losses()
        rows, at = np.searchsorted(history.loss_steps(), steps), np.isfinite(nll) & (nll > 0)
        at &= (rows < losses.size) & (history.loss_steps()[np.minimum(rows, losses.size - 1)] == steps)
        at[: max(0, int(np.flatnonzero(at)[-2 * self.mirrored :][0]) if at.any() else 0)] = False
        if at.sum() < self.mirrored:
            return None
        nll, ratio = nll[at], losses[rows[at]] / nll[at]
        if not np.ptp(ratio) <= -self.same * ratio.max() or not np.ptp(nll) > self.varied * middle(nll):
            return None
        cause = Cause(
            "sign of the loss", 0.9, f"it is {number(float(ratio[-1]))} times the labels' negative log-likelihood, which is now {number(float(nll[-1]))}"
        )
        causes, remedies = ranked([(cause, [Remedy("turn the sign of the loss: minimise -log p(label)", {"sign": -1.0})])])
        evidence = (Evidence("loss over the labels' negative log-likelihood", float(ratio[-1]), 0.0), Evidence("loss", float(newest[0])))
        message = f"it is {number(float(newest[0]))}: it falls as the labels become less likely"
        return Finding(self.diagnosis, Severity.WARNING, int(steps[at][0]), "loss", message, evidence, causes, remedies)

    def _bottomless(self, history: History) -> Finding | None:
        """Some rows have no label and pull the loss down, without end."""
        counted = history.last("labelled_fraction", self.mirrored)
        if len(counted) < self.mirrored or not ((counted > 0) & (counted < 1)).all():
            return None
        fall = readings.downfall(history, self.third)
        if fall is None or not fall.now < -abs(fall.high):
            return None
        without = 1.0 - float(counted[-1].min())
        labels = Remedy("give padding a weight of 0, and not one made from its label; or cross_entropy(..., ignore_index=-1)", {"labels": "repair"})
        because = f"{without:.0%} of the labels are no class, and the loss falls ever faster"
        causes, remedies = ranked([(Cause("padding value", 0.8, because), [labels])])
        evidence = (Evidence("loss", fall.now, -abs(fall.high)), Evidence("share of labels that are no class", without, 0.0))
        message = f"it is {number(fall.now)} and falls ever faster, and {without:.0%} of the labels are no class"
        return Finding(self.diagnosis, Severity.WARNING, history.step, "loss", message, evidence, causes, remedies)

    def _endless(self, history: History) -> Finding | None:
        """Law (endless)."""
        fall = readings.downfall(history, self.third)
        if fall is None or not fall.depth > self.endless or not fall.faster > self.faster:
            return None
        causes, remedies = ranked(no_floor(history))
        message = f"it is {number(fall.now)} and falls ever faster, though it never was above {number(fall.high)}"
        evidence = (Evidence("times as far below 0 as ever above", fall.depth, self.endless), Evidence("its fall over that before", fall.faster, self.faster))
        return Finding(self.diagnosis, Severity.WARNING, history.step, "loss", message, evidence, causes, remedies)

    @staticmethod
    def _advice(history: History, value: float) -> Advice:
        labels = Remedy("check that every target is in range: 0 to 1, or a class number; -1 only as ignore_index", {"labels": "repair"})
        if history.loss_family == "cross_entropy":
            softmax = Remedy("give the logits to cross_entropy, or log_softmax(logits) to nll_loss", {"output_activation": "log_softmax"})
            missing = Cause("no log-softmax before nll_loss", 0.8, "log-probabilities are never above 0, so that this loss cannot be below it")
            weights = Remedy("use class weights of 0 or more", {"labels": "repair"})
            return ranked([(missing, [softmax]), (Cause("negative class weights", 0.3, f"the loss is {number(value)}"), [weights])])
        if history.loss_family == "kl":
            unit = Remedy("normalise both distributions: log_softmax for the input, softmax for the target", {"output_activation": "log_softmax"})
            return ranked([(Cause("distributions that do not sum to 1", 0.7, f"the divergence is {number(value)}"), [unit])])
        weights = Remedy("use sample and class weights of 0 or more", {"labels": "repair"})
        return ranked(
            [(Cause("targets out of range", 0.7, f"the loss is {number(value)}"), [labels]), (Cause("negative weights", 0.3, "they turn its sign"), [weights])]
        )
