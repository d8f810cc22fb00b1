"""Attention logits that grow without bound. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import fallen, listing, ranked, reach, slower, stretch, typical
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class AttentionLogitGrowth:
    """attention_logit_growth: the largest attention logit S grows out of scale (survey, attention_logit_growth).

    Law: in each of the last samples of 20 steps S > 50, and S has at least doubled since the start: a warning, above 100
    an error. S is max |q.k| / sqrt(d): of softmax modules over all of a sample of rows, of attentions over at most 64 queries and
    keys of the first sequence, in each head, masked or not: a sample, which can only be too small. Once the loss has been halved only
    S > 1000 counts, where the literature finds losses to worsen (beyond 1e4 every run diverged). Healthy runs stay below 9.

    Why: a learning rate too high for query and key weights; a missing or too short warm-up; no normalisation of query and
    key at large scale; weight decay 0 on them.
    Do: normalise query and key (QK norm: LayerNorm or RMSNorm on each head's q and k); divide the learning rate by 3 to
    10, or warm it up for longer; cap the logits, c tanh(S / c) with c = 50.
    False alarm: pretrained attentions whose logits are large from the start (they do not double), additive masks (a
    number that stays the same bit for bit does not count), sharp heads of a model that learns (the loss was halved).
    Raise ``level`` where a learned temperature multiplies the logits by design.
    """

    diagnosis: ClassVar[str] = "attention_logit_growth"
    reads: ClassVar[tuple[str, ...]] = ("attention_logit", "logit_peak", "attention_head")
    slow: ClassVar[bool] = True
    level: float = 50.0  # |q.k| / sqrt(d), warns; survey, healthy <= 9
    grave: float = 100.0  # |q.k| / sqrt(d), error; survey
    certain: float = 1e3  # |q.k| / sqrt(d) that counts though the loss was halved; survey (the loss worsens near 1e3, beyond 1e4 all diverged)
    growth: float = 2.0  # times the first value; our own choice, pretrained attentions may begin large
    doublings: float = 8.0  # times the first value, for information although the loss was halved; survey (S doubling 3 times)
    learned: float = 0.5  # loss over the first loss below which sharp heads are what was learned; our own choice
    span: int = 20  # steps; survey (10 in a row)
    least: int = 3  # samples in the span
    turns: int = 2  # measured values of a fused attention, which are looked at in turn; our own choice
    round: int = 4  # fused attentions among which the turn goes; as many as the device side watches
    grace: int = 5  # steps; the first values are the measure
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        signals = [s for s in self.reads[:2] if n and reach(history, s, n)[1] > self.level]
        if not signals:
            return None
        learned = fallen(history) < self.learned
        for limit, growth, severity in (
            ((self.certain, self.growth, Severity.ERROR), (self.grave, self.doublings, Severity.INFO))
            if learned
            else ((self.grave, self.growth, Severity.ERROR), (self.level, self.growth, Severity.WARNING))
        ):
            for signal in signals:
                values = self._sick(history, signal, max(n, self.turns * self.round) if signal == "attention_logit" else n, limit, growth)
                if np.isfinite(values).any():
                    return self._finding(history, signal, n, values, limit, severity)
        return None

    def _sick(self, history: History, signal: str, n: int, limit: float, growth: float) -> Array:
        """The typical value of each site that is out of scale, NaN elsewhere."""
        values = history.last(signal, n)
        values = np.where(np.isfinite(values), values, np.nan)
        low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
        enough = (~np.isnan(values)).sum(axis=0) >= (self.turns if signal == "attention_logit" else self.least)
        born = history.born(signal)[: values.shape[1]]
        with np.errstate(invalid="ignore"):
            sick = enough & (low > limit) & (low < high) & (low > growth * born)
        if signal == "logit_peak":
            sick &= np.array([i < len(history.heads) and history.heads[i] != "loss" for i in range(sick.size)], dtype=np.bool_)
        return np.where(sick, typical(values), np.nan)

    def _finding(self, history: History, signal: str, n: int, values: Array, limit: float, severity: Severity) -> Finding:
        worst = int(np.nanargmax(values))
        peak, born = float(values[worst]), float(history.born(signal)[worst])
        names = [self._name(history, signal, int(i)) for i in np.flatnonzero(np.isfinite(values))]
        name = self._name(history, signal, worst)
        normalise = Remedy("normalise query and key of each head (QK norm)", {"add": "normalization"})
        unscaled = Cause("attention logits without scale", 0.8, f"they were {number(born)} at the start, before anything was learned")
        divide = Remedy("multiply query times key by 1 over the root of the head's width", {"attention_scale": "default"})
        causes, remedies = ranked([
            *([(unscaled, [divide])] if born > self.level else []),
            (Cause("learning rate too high", 0.7, f"{number(born)} -> {number(peak)} at learning rate {number(history.lr)}"),
             [slower(history), normalise]),
            (Cause("query and key are not normalised", 0.4, "their product has no bound of its own"), [normalise]),
        ])  # fmt: skip
        evidence = (
            Evidence("largest attention logit (of a sample)", peak, limit),
            Evidence("times its first value", peak / born if born else peak, self.growth),
        )
        message = f"its logits reach {number(peak)}, they began at {number(born)}: the attention becomes one-hot ({listing(names)})"
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), name, message, evidence, causes, remedies)

    @staticmethod
    def _name(history: History, signal: str, site: int) -> str:
        if signal == "logit_peak":
            return f"softmax {history.heads[site]!r}"
        where = f"attention before {history.units[site].name}" if site < len(history.units) else f"attention at module call {site}"
        heads = history.last("attention_head")
        known = heads[np.isfinite(heads[:, site]), site] if heads.ndim == 2 and site < heads.shape[1] else np.empty(0)
        return f"{where}, head {int(known[-1])}" if known.size and len(np.unique(heads[np.isfinite(heads)])) > 1 else where
