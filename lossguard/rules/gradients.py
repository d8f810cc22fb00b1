"""Gradients that explode, vanish, add up, are clipped, or are not applied. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import (
    clip_remedy,
    converged,
    informational,
    listing,
    lr_remedy,
    matrices,
    middle,
    ranked,
    reach,
    steady,
    step_size_advice,
    stretch,
    typical,
    typically,
    without_gradient,
)
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.rules.numeric import lasting
from lossguard.rules.precision import collapsing_scale, silent_skips
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class ExplodingGradient:
    """exploding_gradient: the gradient norm G has left its own past (detectors A, exploding_gradient (a) and (c); SYMPTOMS D4).

    Law: median of the newest G > 10 times the median of the 128 before, or G > 1000 times it twice within 20 samples; in both
    cases G is also above its first value, for a converged run has tiny gradients to compare with. Healthy single steps reach 31.7.
    """

    diagnosis: ClassVar[str] = "exploding_gradient"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    times: float = 10.0  # newest median over the past median; detectors A (a)
    catastrophe: float = 1e3  # single samples over the past median; detectors A (c)
    recent: int = 10  # steps covered by the newest median; detectors A (a)
    least: int = 5  # samples in the newest median; healthy single steps reach 31.7, so that one or two may not decide
    window: int = 20  # samples in which two catastrophes count; detectors A (c)
    past: int = 128  # samples of the past; detectors A
    short: int = 10  # samples of the past that a catastrophe needs; our own choice, a factor 1000 needs no fine median
    grace: int = 20  # steps; detectors A, machinery 3
    patience: int = 1  # samples; the medians are the patience
    fall: float = 0.02  # of the median loss: growing gradients of a loss that falls by more are those of learning; our own benchmark's plateau
    enough: int = 40  # samples of the past that the median law needs (history of 50 with the newest 10); detectors A

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if reach(history, "grad_total", self.window)[1] <= self.times * reach(history, "grad_total", history.samples)[0]:
            return None
        total = history.last("grad_total")[:, 0] if history.last("grad_total").size else np.empty(0)
        steps = history.steps()[np.isfinite(total)]
        total = total[np.isfinite(total)]
        born = history.born("grad_total")
        if total.size < self.short + 2 or not born.size:
            return None
        twice = self._twice(total, float(born[0]))
        if twice is not None:
            at, past = twice
            return self._finding(history, int(steps[at]), float(total[at]), past, self.catastrophe, Severity.ERROR)
        n = max(stretch(history, self.recent, self.least), self.least)
        before = total[:-n][-self.past :]
        if before.size < self.enough:
            return None
        now, past = float(middle(total[-n:])), float(middle(before))
        if now <= self.times * past or now <= float(born[0]) or past == 0 or self._learning(history):
            return None
        first = int(np.flatnonzero(total[-n:] > self.times * past)[0])
        return self._finding(history, int(steps[-n:][first]), now, past, self.times, Severity.WARNING)

    def _learning(self, history: History) -> bool:
        """The loss comes down meanwhile: a network that leaves a plateau has growing gradients."""
        losses = history.losses(self.past)
        losses = losses[np.isfinite(losses)]
        half = losses.size // 2
        return half > 0 and middle(losses[half:]) < (1 - self.fall) * float(middle(losses[:half]))

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
        causes, remedies = step_size_advice(history, f"gradient norm {number(past)} -> {number(now)} at learning rate {number(history.lr)}", 0.7)
        evidence = (Evidence("gradient norm", now, limit * past), Evidence("times its past median", now / past, limit))
        message = f"the gradient norm is {number(now / past)} times the median of its past; this parameter grew most"
        return Finding(self.diagnosis, severity, step, where, message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class VanishingGradient:
    """vanishing_gradient: some layers get less than 1e-5 of the largest gradient, or all fall below Adam's epsilon
    (detectors A, vanishing_gradient; SYMPTOMS D3, F7). Healthy minimum over matrices 6e-4, deep sigmoid 2e-9.

    An exact zero counts only beside tiny gradients (underflow): by itself it belongs to dead_relu or unchanged_weights.
    """

    diagnosis: ClassVar[str] = "vanishing_gradient"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    share: float = 1e-5  # rms of a matrix's gradient over the largest; detectors A
    epsilons: float = 10.0  # rms of a gradient over Adam's epsilon; detectors A (adam_epsilon_floor)
    most: float = 0.5  # share of matrices below Adam's epsilon; detectors A
    dying: float = 1e-5  # update ratio below which an epsilon counts as a fault and not as a choice; healthy from 3.3e-5
    span: int = 20  # steps the fault lasts; detectors A (20 in a row)
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
            remedy = Remedy(f"use ReLU or GELU for {name} and its like, with He initialisation", {"activation": "ReLU"})
            return Cause("saturating activations", 0.8, because), [remedy]
        deep = int(matrices(history).sum())
        remedy = Remedy(f"add a normalisation or a residual after each of the {deep} layers", {"add": "normalisation"})
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


@rule
@dataclass(frozen=True)
class MissingZeroGrad:
    """missing_zero_grad: most gradients are carried over an update without being cleared, three times in a row (detectors A; SYMPTOMS D11)."""

    diagnosis: ClassVar[str] = "missing_zero_grad"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    share: float = 0.5  # share of gradients not cleared; detectors A
    times: int = 3  # consecutive looks; detectors A
    grace: int = 0  # steps; exact test
    patience: int = 1  # samples; the consecutive looks are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        looks = history.fact("not_cleared")
        at = np.flatnonzero(~np.isnan(looks))[-self.times :]
        if at.size < self.times or at[-1] < looks.size - self.times or not bool((looks[at] >= self.share).all()):
            return None
        total = history.last("grad_total")
        norms = total[np.isfinite(total[:, 0]), 0] if total.size else np.empty(0)
        evidence = [Evidence("share of gradients not cleared", float(looks[at[-1]]), self.share)]
        if norms.size >= 2 and norms[0] > 0:
            evidence.append(Evidence("gradient norm over its first", float(norms[-1] / norms[0])))
        cause = Cause("zero_grad() is not called", 0.9, f"{looks[at[-1]]:.0%} of the gradients still hold those of the last update")
        causes, remedies = ranked([(cause, [Remedy("call optimizer.zero_grad() once after each optimizer.step()", {"zero_grad_every": 1})])])
        message = f"gradients add up: {self.times} updates in a row began with those of the update before"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[at[0]]), "optimizer.zero_grad", message, tuple(evidence), causes, remedies)


@rule
@dataclass(frozen=True)
class ClippingDominates:
    """clipping_dominates: nearly every step is clipped, and by much (detectors A; SYMPTOMS D9).

    Law: > 90 % of steps clipped and median G/c >= 2 over 200 steps. A median G/c >= 10 needs 30 steps only. Healthy transformers
    clip 45 to 61 % at G/c 1.03; a share above half alone is no finding.
    """

    diagnosis: ClassVar[str] = "clipping_dominates"
    reads: ClassVar[tuple[str, ...]] = ("clip_coefficient",)
    share: float = 0.9  # share of clipped samples; detectors A
    excess: float = 2.0  # median G/c; detectors A
    strong: float = 10.0  # median G/c that is heard early; detectors A (there at a share of 0.5 over 200 steps)
    span: int = 200  # steps; detectors A
    early: int = 30  # steps for a strong excess; our own choice for short runs
    least: int = 15  # samples in either span; our own choice
    grace: int = 20  # steps of warm-up that do not count; detectors A, machinery 3
    patience: int = 1  # samples; the window is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if reach(history, "clip_coefficient", self.least)[0] >= 1 - 1e-6:
            return None  # nothing was clipped of late
        found = self._over(history, self.early, self.strong)
        return found if found is not None else self._over(history, self.span, self.excess)

    def _over(self, history: History, span: int, excess: float) -> Finding | None:
        n = stretch(history, span, self.least)
        if not n or history.steps(n)[0] < self.grace:
            return None
        kept = history.last("clip_coefficient", n)
        for site in range(kept.shape[1]):
            c = kept[:, site][np.isfinite(kept[:, site]) & (kept[:, site] > 0)]
            if c.size < self.least:
                continue
            share, median = float((c < 1 - 1e-6).mean()), float(middle(1 / c))
            if share > self.share and median >= excess:
                return self._finding(history, n, site, share, median, excess)
        return None

    def _finding(self, history: History, n: int, site: int, share: float, median: float, excess: float) -> Finding:
        causes, remedies = ranked([
            (Cause("clip value too low", 0.6, f"the median gradient norm is {number(median)} times the clip value"), [clip_remedy(history)]),
            (Cause("learning rate too high", 0.4, f"clipping divides it by {number(median)}"), [lr_remedy(history, 0.1)]),
        ])  # fmt: skip
        severity = Severity.INFO if informational(history) else Severity.WARNING
        evidence = (Evidence("share of steps clipped", share, self.share), Evidence("median gradient norm over clip value", median, excess))
        message = f"{share:.0%} of the steps are clipped, by a median factor of {number(median)}"
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), f"gradient clipping of optimizer {site}", message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class SkippedSteps:
    """skipped_steps: updates are not applied again and again, by a loss scaler or by our own gate (detectors A, nonfinite_gradient; SYMPTOMS F1).

    A few skips at the start of fp16, and one at each growth of the scale, are normal.
    """

    diagnosis: ClassVar[str] = "skipped_steps"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "consecutive_skips")
    skips: int = 8  # samples in a row under a loss scaler; detectors A
    search: int = 20  # steps in which a loss scaler looks for its scale; detectors A
    share: float = 0.1  # share of samples after the search; detectors A (10 % of 200)
    window: int = 50  # samples for the share; our own choice, 200 steps at the default intervals
    gate: int = 3  # updates in a row skipped by our own gate; our own choice
    halvings: int = 8  # of the loss scale, net, within `spanned` steps; detectors A (8 skips in a row)
    spanned: int = 200  # steps; detectors A
    halt_after: int = 20  # updates in a row skipped by our own gate after which the run halts; our own choice
    grace: int = 0  # steps; the search is excluded above
    patience: int = 1  # samples; the run of skips is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        gates = history.last("consecutive_skips", 1)
        if not gates.size and not history.facts().get("scaler"):
            return silent_skips(self.diagnosis, history, self.window, self.share, self.skips)  # by the optimizer itself
        gated = float(np.max(gates, initial=0.0, where=np.isfinite(gates)))
        if gated >= self.gate:
            severity = Severity.HALT if gated >= self.halt_after else Severity.WARNING
            return self._finding(history, "the guard's gate", int(history.steps(1)[0] - gated + 1), gated, float(self.gate), severity)
        collapsed = collapsing_scale(self.diagnosis, history, self.search, self.halvings, self.spanned)
        if collapsed is not None:
            return collapsed
        skipped = self._skipped(history)
        if not skipped.size or not skipped[-1]:
            return None
        applied = np.flatnonzero(~skipped)
        run = skipped.size - (int(applied[-1]) + 1 if applied.size else 0)
        if lasting(history, run, self.skips, self.search):
            return self._finding(history, "the loss scaler", int(history.steps(run)[0]), float(run), float(self.skips), Severity.WARNING)
        late = skipped[history.steps() >= self.search][-self.window :]
        if late.size < self.window or late.mean() <= self.share:
            return None
        since = int(history.steps(self.window)[np.argmax(late)])
        return self._finding(history, "the loss scaler", since, float(late.sum()), self.share * self.window, Severity.WARNING)

    @staticmethod
    def _skipped(history: History) -> Mask:
        """Samples whose update was not applied under a loss scaler: stepped without a change, or not stepped and not finite."""
        updates, seen = history.last("update_norm"), history.seen("update_norm")
        scaler, stepped, lr = history.fact("scaler", default=0.0), history.fact("stepped"), history.fact("lr")
        gradients = history.seen("grad_norm") & ~np.isfinite(history.last("grad_norm"))
        overflow = gradients.any(axis=1) if gradients.size else np.zeros(history.samples, dtype=np.bool_)
        still = (seen.any(axis=1) & ~(seen & (updates != 0.0)).any(axis=1)) if seen.size else np.zeros(history.samples, dtype=np.bool_)
        return np.asarray((scaler == 1.0) & ((still & (stepped == 1.0) & ~(lr <= 0)) | (overflow & ~(stepped == 1.0))))

    def _finding(self, history: History, who: str, step: int, many: float, limit: float, severity: Severity) -> Finding:
        cause = Cause("non-finite gradients", 0.7, f"{who} skips what is not finite; {number(many)} updates were not applied")
        by_hand = Remedy("set the loss scale by hand: 1024, growth_interval 2000", {"init_scale": 1024.0})
        causes, remedies = ranked([(cause, [lr_remedy(history, 0.1), by_hand])])
        message = f"{number(many)} updates were skipped by {who}: the run looks alive and learns nothing"
        return Finding(self.diagnosis, severity, max(step, 0), "optimizer.step", message, (Evidence("skipped updates", many, limit),), causes, remedies)
