"""Softmaxes that are one-hot and wrong, or out of scale. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import fallen, lr_remedy, ranked, reach, steady, stretch, typical
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import History, Mask
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class SaturatedSoftmax:
    """saturated_softmax: confident and wrong, or logits out of scale (survey, saturated_softmax).

    Law: for 20 steps more than 20 % of the rows have p > 0.99 for another class than their label, or the labels' mean negative
    log-likelihood is at the float32 floor, or a logit is beyond 1e3, or |mean log Z| beyond 50. Confidence alone is no fault (healthy:
    p_max > 0.999 on up to 75 % of the samples). Logit sizes (healthy <= 28) count at the loss while it has not been halved, and elsewhere
    (attention) once they grew 10 times; a peak that stays the same bit for bit is a mask.

    Why: a learning rate too high; last layer's initial weights too large; batch-norm that is frozen or in evaluation mode; odd samples or
    wrong labels.
    Do: learning rate divided by 10; last layer's initial weights times 0.1; keep batch-norm in training mode; look at the 20 samples with
    the largest loss.
    False alarm: share of wrong labels: a run that knows its data is confidently wrong on as many; ``SaturatedSoftmax(wrong=0.4)`` for
    noisy labels. Cosine heads with a scale of 64 stay below the limits.
    """

    diagnosis: ClassVar[str] = "saturated_softmax"
    reads: ClassVar[tuple[str, ...]] = ("logit_peak", "confident_wrong", "label_nll", "log_normalizer")
    slow: ClassVar[bool] = True
    wrong: float = 0.2  # share of rows with p_max > 0.99 and another label; survey
    nll: float = 87.0  # mean negative log likelihood of the labels; the float32 floor is 87.3365; survey
    peak: float = 1e3  # magnitude of a logit; survey, faulty from 5e3
    normalizer: float = 50.0  # |mean log Z|; survey
    growth: float = 10.0  # of a logit peak away from the loss, over its first; our own choice
    learned: float = 0.5  # loss over the first loss below which a large logit is no fault; our own choice
    span: int = 20  # steps; survey (20 batches)
    least: int = 3  # samples in the span
    apart: float = 0.5  # of the larger: label NLL and loss further apart are of different labels (a sample of rows is within a few per cent)
    grace: int = 0  # steps; the span is the grace
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        if not n:
            return None
        tests = (
            ("confident_wrong", self.wrong, "confident and wrong"),
            ("label_nll", self.nll, "negative log likelihood of the labels"),
            ("logit_peak", self.peak, "largest logit"),
            ("log_normalizer", self.normalizer, "mean log normaliser"),
        )
        for signal, limit, what in tests:
            if not reach(history, signal, n)[1] > limit or (signal in ("confident_wrong", "label_nll") and self._misaligned(history)):
                continue
            sick = steady(history, signal, n, self.least, lambda v, limit=limit: np.isfinite(v) & (v > limit))  # type: ignore[misc]
            if sick.any() and signal in ("logit_peak", "log_normalizer"):
                sick &= self._out_of_scale(history, signal, n, fallen(history) < self.learned)
            if sick.any():
                return self._finding(history, n, int(np.flatnonzero(sick)[0]), signal, limit, what)
        return None

    def _misaligned(self, history: History) -> bool:
        """The labels shown are not those of the loss: a model that shifts them inside would read as confident and wrong."""
        nll, loss = history.last("label_nll", 1), history.losses(1)
        if history.loss_family != "cross_entropy" or not nll.size or not np.isfinite(nll[0, 0]) or not loss.size or not np.isfinite(loss[0]):
            return False
        return bool(abs(nll[0, 0] - loss[0]) > self.apart * max(abs(loss[0]), abs(nll[0, 0]), 1e-6))

    def _out_of_scale(self, history: History, signal: str, n: int, learned: bool) -> Mask:
        """Heads at which a large value is a fault: at the loss unless it learns, elsewhere if the value grew; never a mask's constant."""
        values = history.last(signal, n)
        finite = np.where(np.isfinite(values), values, np.nan)
        constant = np.array([np.unique(column[~np.isnan(column)]).size <= 1 for column in finite.T])
        at_loss = np.array([i < len(history.heads) and history.heads[i] == "loss" for i in range(values.shape[1])], dtype=np.bool_)
        with np.errstate(invalid="ignore"):
            grown = typical(values) > self.growth * history.born(signal)[: values.shape[1]]
        return np.asarray(~constant & np.where(at_loss, not learned, grown & (signal == "logit_peak")))

    def _finding(self, history: History, n: int, site: int, signal: str, limit: float, what: str) -> Finding:
        value = float(typical(history.last(signal, n))[site])
        head = history.heads[site] if site < len(history.heads) else f"softmax {site}"
        evidence = [Evidence(what, value, limit)]
        evidence += [Evidence(extra.replace("_", " "), float(typical(history.last(extra, n))[site])) for extra in ("logit_peak", "confident_fraction")
                     if extra != signal and site < history.last(extra, n).shape[1]]  # fmt: skip
        pairs = [(Cause("logits out of scale", 0.7, f"{what} {number(value)} for {n} samples"),
                  [lr_remedy(history, 0.1), Remedy("scale the last layer's initial weights by 0.1", {"head_scale": 0.1})])]  # fmt: skip
        if signal == "confident_wrong":
            remedy = Remedy("look at the 20 samples with the largest loss by eye", {"look_at": 20})
            pairs.append((Cause("wrong labels", 0.4, f"{value:.0%} of the labels contradict a certain prediction"), [remedy]))
        causes, remedies = ranked(pairs)
        message = f"{value:.0%} of the rows are certain (p > 0.99) and wrong" if signal == "confident_wrong" else f"{what} is {number(value)}"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(n)[0]), f"softmax {head!r}", message, tuple(evidence), causes, remedies)
