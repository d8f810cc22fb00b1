"""Updates against weights: too large, too small. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import (
    converged,
    fallen,
    faster,
    flourishing,
    informational,
    matrices,
    middle,
    ranked,
    reach,
    stretch,
    typical,
    typically,
)
from lossguard.findings import Cause, Evidence, Finding, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.obstacles import trained_before, unstirred
from lossguard.rules.precision import rounded_away
from lossguard.rules.rule import rule
from lossguard.rules.suspects import large_steps


@rule
@dataclass(frozen=True)
class UpdateRatioHigh:
    """update_ratio_high: updates rewrite the weights (survey, update_ratio_high (a) and (b)). Matrices that are not zero-born.

    Law (b): a weight norm grows more than 10 times within 100 steps, at once and without grace (healthy <= 3.97, faulty 20 to 1e15).
    Law (a): the median of u = |dw|/|w| over 20 steps is above 0.1, or over 5 samples above 0.5, in more than a third of the matrices (healthy singles <= 0.19).

    Why: a learning rate 10 to 1000 times too high; no warm-up under Adam; a loss that is summed instead of averaged under SGD; gradients
    that add up.
    Do: learning rate divided by 10, and by 10 again until u is about 1e-3 (3e-5 to 1.4e-2 is healthy); warm-up over 100 steps or more;
    clip the gradient norm.
    False alarm: zero-born tensors are left out, tiny heads may grow, and so may the last matrix of a regression towards large targets.
    Optimizers with updates of a fixed size (Muon) are judged by growth only. While the loss is below half of where it began and near
    its best, large steps do no harm (layers before a batch-norm grow, Rprop strides): information.
    """

    diagnosis: ClassVar[str] = "update_ratio_high"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm")
    ratio: float = 0.1  # median of u over the span; survey (a)
    drastic: float = 0.5  # median of u over few samples; a learning rate 100 times too high shows for 5 to 10 steps only
    few: int = 5  # samples for the drastic ratio; our own choice
    share: float = 1 / 3  # of the matrices, so that one odd layer is no alarm; our own choice
    settle: int = 5  # first steps that the median over the span ignores; survey (u after step 5)
    span: int = 20  # steps; survey (a)
    growth: float = 10.0  # weight norm now over that up to `within` steps ago; survey (b)
    headlong: float = 100.0  # the same for the last matrix of a regression alone; our own choice (raw targets of 152: 10.7)
    within: int = 100  # steps; survey (b)
    scale: float = 1.0  # a grown matrix counts once its rms is above numel^-1/4, the Xavier scale: tiny initial heads may grow
    grace: int = 0  # steps; survey (b)
    patience: int = 1  # samples; survey (b)

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        able = matrices(history)
        if not able.any() or history.last("weight_norm", 1).size == 0:
            return None
        return self._grown(history, able) or self._large(history, able)

    def _grown(self, history: History, able: Mask) -> Finding | None:
        """Law (b). The newest update belongs to the newest weights: |update| - |weight| is the least that they are after it."""
        steps = history.steps()
        steps = steps[np.searchsorted(steps, steps[-1] - self.within) :]
        weights = history.last("weight_norm", steps.size)
        moved = history.last("update_norm", 1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            most = np.fmax.reduce((weights[-1] + (moved[0] if moved.size else 0.0)) / weights[0])
        if most <= self.growth and np.isfinite(weights[0]).all():
            return None
        finite = np.isfinite(weights).any(axis=1) & (np.isfinite(weights) | ~able).all(axis=1)
        rows = np.flatnonzero(finite)
        if not rows.size:
            return None
        first, now = weights[rows[0]], weights[rows[-1]]
        updates = history.last("update_norm", steps.size)
        if updates.size and not history.facts(steps.size - int(rows[-1])).get("forced"):
            now = np.fmax(now, updates[rows[-1]] - now)
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.where(able & (first > 0), now / first, 0.0)
        numel = history.numels
        natural = now / np.sqrt(numel) > self.scale * numel**-0.25
        growth = self._without_head(history, able, np.where(natural & np.isfinite(growth), growth, 0.0))
        worst = int(np.argmax(growth))
        if not growth[worst] > self.growth:
            return None
        many, over = int((growth > self.growth).sum()), int(steps[rows[-1]] - steps[rows[0]]) + 1
        ends = f"{number(float(first[worst]))} to {number(float(now[worst]))}"
        message = f"its weight norm grew from {ends} within {over} steps; {many} of {int(able.sum())} matrices grew so"
        evidence = Evidence(f"growth within {over} steps", float(growth[worst]), self.growth)
        return self._finding(history, int(steps[rows[-1]]), worst, message, evidence)

    def _without_head(self, history: History, able: Mask, growth: Array) -> Array:
        """A regression's last matrix may grow alone towards targets far from 0."""
        head = int(np.flatnonzero(able)[-1])
        alone = not (np.delete(growth, head) > self.growth).any()
        if history.loss_family in ("mse", "l1", "huber") and alone and growth[head] < self.headlong:
            growth[head] = 0.0
        return growth

    def _large(self, history: History, able: Mask) -> Finding | None:
        """Law (a)."""
        u = history.last("update_ratio", self.few)
        if not reach(history, "update_ratio", self.few)[1] > self.ratio:
            return None
        if len(u) >= self.few and "Muon" not in str(history.facts().get("optimizer_name")):
            found = self._median(history, able, self.few, self.drastic)
            if found is not None:
                return found
            n = stretch(history, self.span, self.few)
            if n and history.steps(n)[0] >= self.settle:
                return self._median(history, able, n, self.ratio)
        return None

    def _median(self, history: History, able: Mask, n: int, limit: float) -> Finding | None:
        highest = np.fmax.reduce(history.last("update_ratio", n)[:, able], axis=1)
        if not middle(highest[np.isfinite(highest)]) > limit:
            return None  # a site's median can be above it only if half of the samples have a number above it
        u = np.where(able, typically(history, "update_ratio", n), np.nan)
        with np.errstate(invalid="ignore"):
            high = u > limit
        if not high.sum() > self.share * able.sum():
            return None
        worst = int(np.nanargmax(np.where(high, u, np.nan)))
        evidence = Evidence(f"median update ratio over {n} samples", float(u[worst]), limit)
        message = f"each update changes the weights by {u[worst]:.0%} of their norm; {int(high.sum())} of {int(able.sum())} matrices are above {limit:.0%}"
        return self._finding(history, int(history.steps(n)[0]), worst, message, evidence)

    def _finding(self, history: History, step: int, worst: int, message: str, evidence: Evidence) -> Finding:
        causes, remedies = large_steps(history, str(evidence))
        harmless = flourishing(history) and reach(history, "update_ratio", 1)[1] <= self.drastic
        severity = Severity.INFO if harmless else Severity.WARNING
        return Finding(self.diagnosis, severity, step, history.params[worst].name, message, (evidence,), causes, remedies)


@rule
@dataclass(frozen=True)
class UpdateRatioLow:
    """update_ratio_low: the weights hardly move (survey, update_ratio_low).

    Law: the median of u over 20 steps, and over matrices, lies between 0 and 1e-6 (healthy fine-tuning 3.3e-5, a far too small rate
    3.9e-7). Silent in a schedule's tail, while the learning rate rises in the first 200 steps, and on a converged run. Law (rounding): of
    the elements of weights in halves that have a gradient fewer than 1 % change in a step; or fewer than 25 % over 100 steps in which the
    loss stayed above half of where it began.

    Law (little): after 200 steps at a learning rate that does not rise all updates together cannot have changed 1 % of the weights, and the loss
    has come down by less than 5 %, in a network that was not trained before.

    Why: a learning rate far too low; gradients far too small for plain SGD (a loss divided twice); a schedule that ended early.
    Do: learning rate times 10, and again until u is about 1e-3; Adam instead of SGD where the gradients are tiny; check the schedule's
    number of steps.
    False alarm: warm-up and tails are left out; full fine-tuning at 1e-6 has u of 5e-5 and is silent. Weights of a huge norm hardly move
    in good health: ``UpdateRatioLow(ratio=1e-8)``.
    """

    diagnosis: ClassVar[str] = "update_ratio_low"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm")
    slow: ClassVar[bool] = True
    ratio: float = 1e-6  # median of u; survey
    span: int = 20  # steps; survey
    least: int = 3  # samples in the span; a median over matrices is steady
    moved: float = 0.01  # share of elements of weights in halves that change in a step, though their gradients are not zero; survey
    starved: float = 0.25  # the same share where little was learned for long; our own choice, plain bfloat16 that learns begins with 0.8 to 0.95
    drained: int = 100  # steps in which it is below that
    many: int = 10  # samples in them
    unlearned: float = 0.5  # of the first losses: a loss above has learned little; our own choice
    stuck: float = 0.95  # of the first losses: a loss above has hardly moved; our own choice
    warm: int = 200  # steps: a warm-up that has moved nothing until then is a fault itself; our own choice
    pace: int = 10  # steps; asked at most once in so many, half of the span
    grace: int = 20  # steps; survey, machinery 3
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        if n and reach(history, "grad_norm", n)[1] == 0.0:
            return None  # without any gradient only weight decay moves them, and no rate is to blame
        if n and (little := self._little(history)) is not None:
            return little
        if not n or not (reach(history, "update_ratio", n)[0] < self.ratio or reach(history, "rounded_away", n)[1] > 1.0 - self.moved):
            return None
        u, able = history.last("update_ratio", n), matrices(history)
        if not able.any() or history.schedule_tail or converged(history):
            return None
        lr = history.fact("lr", n)
        if np.isfinite(lr).all() and lr[-1] > lr[0] * (1 + 1e-6) and history.step < self.warm:
            return None
        rounded = rounded_away(self.diagnosis, history, self.span, self.least, self.moved)
        if rounded is None and fallen(history) > self.unlearned and not trained_before(history):
            rounded = rounded_away(self.diagnosis, history, self.drained, self.many, self.starved)
        if rounded is not None:
            return rounded
        if not reach(history, "update_ratio", n)[0] < self.ratio:
            return None
        each = typical(u)[able]
        each = each[np.isfinite(each)]
        median = middle(each) if each.size else float("nan")
        if not 0 < median < self.ratio:
            return None
        slow = int(np.flatnonzero(able)[int(np.nanargmin(np.where(typical(u)[able] > 0, typical(u)[able], np.inf)))])
        evidence = (Evidence(f"median update ratio over {n} samples", median, self.ratio),)
        cause = Cause("learning rate too low", 0.8, f"at learning rate {number(history.lr)} a step changes {number(median)} of the weights")
        causes, remedies = ranked([(cause, [faster(history)])])
        message = f"the median matrix changes by {number(median)} of its norm in a step; this one is the slowest"
        severity = Severity.INFO if informational(history) else Severity.WARNING
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), history.params[slow].name, message, evidence, causes, remedies)

    def _little(self, history: History) -> Finding | None:
        """Law (little)."""
        if history.step < self.warm or not fallen(history) > self.stuck or history.schedule_tail:
            return None
        lr, cause = history.fact("lr"), unstirred(history)
        if cause is None or not history.lr_peak > 0 or (np.isfinite(lr).all() and lr[-1] > lr[len(lr) // 2] * (1 + 1e-6)):
            return None
        causes, remedies = ranked([(cause, [faster(history)])])
        evidence = (Evidence("newest losses over the first", fallen(history), self.stuck),)
        severity = Severity.INFO if informational(history) else Severity.WARNING
        message = f"after {history.step + 1} steps the weights are nearly those of the first, and so is the loss"
        return Finding(self.diagnosis, severity, history.step, "weights", message, evidence, causes, remedies)
