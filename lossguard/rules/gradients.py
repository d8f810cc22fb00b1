"""Gradients that explode or vanish. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings
from lossguard.advice import (
    converged,
    informational,
    listing,
    matrices,
    medians,
    middle,
    ranked,
    reach,
    steady,
    stretch,
    typical,
    typically,
    without_gradient,
)
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.rules.rule import rule
from lossguard.rules.suspects import large_steps


@rule
@dataclass(frozen=True)
class ExplodingGradient:
    """exploding_gradient: the gradient norm G has left its own past (survey, exploding_gradient (a) and (c)).

    Law: median of the newest G > 10 times the median of the 128 before, or G > 1000 times it twice within 20 samples; in both
    cases G is also above its first value, for a converged run has tiny gradients to compare with. Healthy single steps reach 31.7.

    Why: a learning rate too high; recurrence or depth without normalisation; a loss term that grows without bound; a bad batch.
    Do: learning rate divided by 10; clip the gradient norm at its healthy median (the remedy names it); warm-up; in recurrent networks
    clip in any case; a bound on the weights' norm.
    False alarm: single large steps, the rise of a one-cycle schedule, and a network that leaves a plateau (its gradients grow while its
    loss falls) do not count. Where the run has learned, its loss does not rise, and its updates have not grown with its gradients,
    it is information: metric and density losses sharpen so. Losses summed over varying lengths do: average them.
    """

    diagnosis: ClassVar[str] = "exploding_gradient"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    times: float = 10.0  # newest median over the past median; survey (a)
    catastrophe: float = 1e3  # single samples over the past median; survey (c)
    recent: int = 10  # steps covered by the newest median; survey (a)
    least: int = 5  # samples in the newest median; healthy single steps reach 31.7, so that one or two may not decide
    window: int = 20  # samples in which two catastrophes count; survey (c)
    past: int = 128  # samples of the past; survey
    short: int = 10  # samples of the past that a catastrophe needs; our own choice, a factor 1000 needs no fine median
    grace: int = 20  # steps; survey, machinery 3
    patience: int = 1  # samples; the medians are the patience
    harm: float = 0.1  # of the median loss: a smaller rise is noise; our own choice, as in diverging_loss
    stride: float = 3.0  # times their past median, from which updates have grown as well; our own choice, as for a spike
    fall: float = 0.02  # of the median loss: growing gradients of a loss that falls by more are those of learning; our own benchmark's plateau
    rounding: float = 1e-6  # of the loss, below which it has not fallen: ten times the spacing of float32
    enough: int = 40  # samples of the past that the median law needs (history of 50 with the newest 10); survey

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        born, highest = history.born("grad_total"), reach(history, "grad_total", self.window)[1]
        lowest = reach(history, "grad_total", history.samples)[0]
        if not born.size or highest <= born[0] or highest <= self.times * lowest:
            return None
        total = history.last("grad_total")[:, 0]
        finite = np.isfinite(total)
        steps, total = history.steps()[finite], total[finite]
        if total.size < self.short + 2:
            return None
        twice = self._twice(total, float(born[0])) if highest > self.catastrophe * lowest else None
        if twice is not None:
            at, past = twice
            return self._finding(history, int(steps[at]), float(total[at]), past, self.catastrophe, Severity.ERROR)
        n = max(stretch(history, self.recent, self.least), self.least)
        before = total[:-n][-self.past :]
        if before.size < self.enough:
            return None
        now, past = float(middle(total[-n:])), float(middle(before))
        if now <= self.times * past or now <= float(born[0]) or past == 0:
            return None
        since = int(steps[-n:][total[-n:] > self.times * past][0])
        if self._learning(history, since):
            return None
        severity = Severity.INFO if self._harmless(history) else Severity.WARNING
        return self._finding(history, since, now, past, self.times, severity)

    def _learning(self, history: History, since: int) -> bool:
        """The loss comes down meanwhile: a network that leaves a plateau has growing gradients. So has a density that sharpens:
        where losses are negative it is enough that they do not rise. Looked for over half of the past, and since the gradients are large."""
        losses = history.losses(self.past)
        losses = losses[np.isfinite(losses)]
        half, recent = losses.size // 2, history.step - since + 1
        if half == 0:
            return False
        old = float(middle(losses[:half]))
        need = self.fall * abs(old) * (-1.0 if middle(losses) < 0 else 1.0)
        if middle(losses[half:]) < old - need:
            return True
        noise = readings.ERRORS * float(losses[:half].std()) * recent**-0.5
        return recent < half and middle(losses[-recent:]) < old - max(noise, self.rounding * abs(old))

    def _harmless(self, history: History) -> bool:
        """The run has learned, its loss does not rise by much, and its updates have not grown: the optimizer scales the gradients."""
        losses, first = history.losses(self.past), history.first_losses(self.least)
        ratio, able = history.last("update_ratio", self.past), matrices(history)
        if not ratio.size or not able.any() or not np.isfinite(losses).all() or not np.isfinite(first).all():
            return False
        old, new, start = (float(middle(part)) for part in (losses[: losses.size // 2], losses[losses.size // 2 :], first))
        if not new <= min(old + self.harm * abs(old), start - self.harm * abs(start)):
            return False
        speeds = medians(ratio, able)
        speeds = speeds[np.isfinite(speeds)]
        return bool(speeds.size >= 2 * self.least and middle(speeds[-self.least :]) <= self.stride * middle(speeds[: -self.least]))

    def _twice(self, total: Array, born: float) -> tuple[int, float] | None:
        """Where in the totals the first of two catastrophes stands, and the past median; the newest sample must be one."""
        cut = max(self.short, total.size - self.window)
        past = float(middle(total[:cut][-self.past :]))
        high = np.flatnonzero((total[cut:] > self.catastrophe * past) & (total[cut:] > born)) + cut
        return (int(high[0]), past) if past > 0 and high.size >= 2 and high[-1] == total.size - 1 else None

    def _finding(self, history: History, step: int, now: float, past: float, limit: float, severity: Severity) -> Finding:
        own = history.last("grad_norm")
        grown = typical(own[-5:]) / np.maximum(typical(own[:-5]), 1e-300)
        where = history.params[int(np.nanargmax(grown))].name if np.isfinite(grown).any() else "gradient norm"
        severity = Severity.INFO if informational(history) else severity
        causes, remedies = large_steps(history, f"gradient norm {number(past)} -> {number(now)} at learning rate {number(history.lr)}", 0.7)
        evidence = (Evidence("gradient norm", now, limit * past), Evidence("times its past median", now / past, limit))
        message = f"the gradient norm is {number(now / past)} times the median of its past; this parameter grew most"
        return Finding(self.diagnosis, severity, step, where, message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class VanishingGradient:
    """vanishing_gradient: some layers get less than 1e-5 of the largest gradient, or all fall below Adam's epsilon
    (survey, vanishing_gradient).

    Law: the rms of a matrix's gradient is below 1e-5 of the largest one in every sample of 20 steps (healthy minimum over matrices 6e-4,
    deep sigmoid 2e-9); or more than half of the matrices are below 10 times Adam's epsilon while their updates die. An exact zero counts
    only beside tiny gradients (underflow): by itself it belongs to dead_relu or unchanged_weights.

    Why: sigmoid or tanh in a deep chain; no normalisation and no residuals; a too small initialisation; a loss scaled so small that
    Adam's epsilon swallows it.
    Do: ReLU or GELU with He initialisation; layer or batch normalisation, residual connections; fewer layers; for the epsilon: eps 1e-3
    of the gradients, or the loss times 1000.
    False alarm: branches born at zero, biases before a batch-norm, embeddings and parts without a gradient are not judged, nor is a
    converged run.
    """

    diagnosis: ClassVar[str] = "vanishing_gradient"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    slow: ClassVar[bool] = True
    share: float = 1e-5  # rms of a matrix's gradient over the largest; survey
    epsilons: float = 10.0  # rms of a gradient over Adam's epsilon; survey (adam_epsilon_floor)
    most: float = 0.5  # share of matrices below Adam's epsilon; survey
    dying: float = 1e-5  # update ratio below which an epsilon counts as a fault and not as a choice; healthy from 3.3e-5
    span: int = 20  # steps the fault lasts; survey (20 in a row)
    least: int = 3  # samples in the span; two decades of margin on either side
    grace: int = 20  # steps; LoRA A while B is 0
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        low, high = reach(history, "grad_rms", n)
        if low >= self.share * high and low >= self.epsilons * float(history.facts().get("adam_eps") or 0.0):
            return None
        rms = history.last("grad_rms", n) if n else np.empty((0, 0))
        able = matrices(history) & ~without_gradient(history)
        if not rms.size or able.sum() < 2 or converged(history):
            return None
        masked = np.where(np.isfinite(rms) & able, rms, 0.0)
        top = masked.max(axis=1, keepdims=True)
        tiny = steady(history, "grad_rms", n, self.least, lambda v: np.isfinite(v) & (v < self.share * top)) & able
        zero = steady(history, "grad_rms", n, self.least, lambda v: v == 0.0)
        if (tiny & ~zero).any() and bool((top > 0).all()):
            return self._finding(history, n, tiny, float(top[-1, 0]))
        return self._epsilon(history, n, able)

    def _finding(self, history: History, n: int, tiny: Mask, top: float) -> Finding:
        sites = np.flatnonzero(tiny)
        least = float(np.min(history.last("grad_rms", 1)[0, sites]))
        names = [history.params[i].name for i in sites]
        causes, remedies = ranked([self._cause(history)])
        severity = Severity.INFO if informational(history) else Severity.WARNING
        evidence = (Evidence("gradient rms over the largest", least / top if top > 0 else float("nan"), self.share), Evidence("matrices", float(sites.size)))
        message = f"{sites.size} of {int(matrices(history).sum())} matrices get less than {number(self.share)} of the largest gradient ({listing(names)})"
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), names[0], message, evidence, causes, remedies)

    @staticmethod
    def _cause(history: History) -> tuple[Cause, list[Remedy]]:
        squash = [u for u in history.units if u.kind in ("Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh", "Softsign")]
        if squash:
            name, kind = squash[0].name, squash[0].kind
            because = f"{len(squash)} {kind} modules, the first is {name}; each multiplies the gradient by at most {0.25 if kind == 'Sigmoid' else 1}"
            remedy = Remedy(f"use ReLU or GELU for {name} and its like, with He initialisation", {"activation": "relu", "init": "he"})
            return Cause("saturating activations", 0.8, because), [remedy]
        deep = int(matrices(history).sum())
        remedy = Remedy(f"add a normalisation or a residual after each of the {deep} layers", {"add": "normalization"})
        return Cause("depth without normalisation or residuals", 0.5, f"{deep} matrices in a chain"), [remedy]

    def _epsilon(self, history: History, n: int, able: Mask) -> Finding | None:
        epsilon = history.facts().get("adam_eps")
        ratio = typically(history, "update_ratio", n) if history.last("update_ratio", n).size else np.full(len(able), np.nan)
        if not epsilon or not able.any() or history.schedule_tail or not np.nanmax(np.where(able, ratio, -1.0)) >= 0:
            return None
        low = steady(history, "grad_rms", n, self.least, lambda v: (v > 0) & (v < self.epsilons * float(epsilon))) & able
        speed = float(np.nanmedian(ratio[able]))
        if low.sum() <= self.most * able.sum() or not 0 < speed < self.dying:
            return None
        name, worst = history.params[int(np.flatnonzero(low)[0])].name, float(middle(history.last("grad_rms", 1)[0, low]))
        remedy = Remedy(f"Adam's eps {number(float(epsilon))} -> {number(worst * 1e-3)}, or multiply the loss by 1000", {"eps": worst * 1e-3})
        causes, remedies = ranked([(Cause("adam epsilon", 0.8, f"gradients of {number(worst)} against eps {number(float(epsilon))}"), [remedy])])
        evidence = (Evidence("gradient rms", worst, self.epsilons * float(epsilon)), Evidence("update ratio", speed, self.dying))
        message = f"{int(low.sum())} of {int(able.sum())} matrices have gradients below {number(self.epsilons)} times Adam's epsilon"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(n)[0]), name, message, evidence, causes, remedies)
