"""The training loss over time: spikes, divergence. Losses in, finding or None out; numpy only.

Every fresh loss is judged against its own past. Runs whose losses have no order (several optimizers, adversarial or
reinforcement losses) get information only. Losses are compared by ratios only while they have one sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import clip_remedy, finite_losses, informational, lr_remedy, matrices, middle, ranked, slower, typical
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.obstacles import CLASSIFIES, speed
from lossguard.rules import levels
from lossguard.rules.rule import rule
from lossguard.rules.suspects import leap, overwritten, rise, suspects, term

_NORMAL = 1.4826  # standard deviation over MAD of a normal distribution


def robust_z(value: float, past: Array) -> float:
    """How many robust deviations the value is above the median of its past; a MAD of 0 is taken as rounding of float32."""
    median = float(middle(past))
    spread = _NORMAL * float(middle(np.abs(past - median)))
    return (value - median) / max(spread, 1e-6 * abs(median), 1e-300)


@rule
@dataclass(frozen=True)
class LossSpike:
    """loss_spike: one loss stands far above its recent past (survey, loss_spike).

    Law: robust z > 8 over the 128 losses before (healthy <= 6.7), L > 1.5 median, and three times as far above the median as the
    second largest of them; where signs mix, z > 12. The mean over a batch of fewer samples than usual scatters more: its z is multiplied by
    the root of their ratio. Positive losses must also stand out by z > 5 on a logarithmic scale without its trend:
    small batches near convergence have heavy tails. Judged once three later losses are known, which tell a spike from a new level. A new
    level is judged later, after twice the steps in which the run learned at first: if it is learned anew by then, it is information.

    Why: an odd or corrupt batch; a learning rate near the edge of stability; second moments of Adam that lag behind (beta2 0.999).
    Do: look at the batch of that step; clip the gradient norm at its healthy median; learning rate divided by 10, or a longer warm-up;
    beta2 0.95; in long runs go back about 100 steps and skip 200 batches.
    False alarm: heavy tails and spikes below 20 % of the first losses do not count, below 50 % they are information; so are those
    of a loss below 0, the likelihood of a density, which has no bound for single samples, if it is as before at once; and other
    data or another task, which are learned as the first were. Batches of very different length do count: average the
    loss per token, or ``LossSpike(sigmas=12)``.
    """

    diagnosis: ClassVar[str] = "loss_spike"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    sigmas: float = 8.0  # robust deviations above the median; survey
    mixed: float = 12.0  # the same where the past has both signs; survey
    logarithmic: float = 5.0  # robust deviations of ln L about its trend; our own choice
    rise: float = 0.5  # of |median| above the median; survey
    floor: float = 0.2  # of the largest of the run's first losses: spikes below it harm nobody; our own choice, healthy runs near convergence reach 0.12
    beyond: float = 3.0  # times the second largest earlier distance from the median; our own choice: last batches of one sample come every epoch
    slight: float = 0.5  # of the same: a spike below it, after which the loss is as before, is information; a batch of garbage owes more
    tied: float = 0.25  # of the past losses that are the same bit for bit, from which they say nothing of how losses scatter; our own choice
    settle: int = 3  # later losses to wait for; our own choice
    raised: float = 1.5  # a learning rate or an input's scale over its past median, and
    jumped: float = 3.0  # an update ratio over its own, that speak for a cause; our own choice
    window: int = 128  # losses of the past; survey
    least: int = 64  # losses of the past; survey
    grace: int = 64  # steps; survey
    patience: int = 1  # answers; a spike is an event

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        fresh = history.fresh_losses
        losses = history.losses()
        end = len(losses) - self.settle
        if fresh == 0 or end <= self.least:
            return None
        for at in self._candidates(losses[:end], min(fresh, end)):
            z, past = self._z(losses, at, history.batch_sizes())
            if z > 0 and not levels.new_level(losses, at, float(middle(past))):
                return self._finding(history, at, int(history.loss_steps()[at]), past, z)
        return self._stood(history, losses, fresh)

    def _stood(self, history: History, losses: Array, fresh: int) -> Finding | None:
        """A loss that leapt to a new level as long ago as the run took to learn at first, judged by whether it was learned anew."""
        held = losses[-(levels.WAIT[1] + fresh + self.settle) :]
        if held.min() > 0 and not held.max() > (1 + self.rise) * held.min():
            return None  # nothing has leapt for as long as is waited
        wait = levels.patience(history, losses)
        end = len(losses) - wait
        if end <= self.least:
            return None
        for at in self._candidates(losses[:end], min(fresh, end)):
            z, past = self._z(losses, at, history.batch_sizes())
            if z > 0 and levels.new_level(losses, at, float(middle(past))):
                anew = levels.learned_anew(history, losses[at : at + wait], float(middle(past)))
                return self._finding(history, at, int(history.loss_steps()[at]), past, z, anew=anew)
        return None

    def _candidates(self, losses: Array, fresh: int) -> list[int]:
        """The fresh losses that can be spikes at all: above half the limit of the past that all of them share."""
        first = len(losses) - fresh
        past = losses[max(0, first - 2 * self.window) : first]
        if past.size >= self.least:
            second, most = np.partition(past[-self.window :], -2)[-2:]
            if most < np.inf and losses[first:].max() <= second:
                return []  # all finite, and not above what two of its past reached
        past = past[np.isfinite(past)]
        if past.size < self.least:
            return list(range(first, len(losses)))
        if not np.nanmax(losses[first:], initial=-np.inf) > np.partition(past[-self.window :], -2)[-2]:
            return []
        median = float(middle(past))
        spread = _NORMAL * float(middle(np.abs(past - median)))
        limit = median + 0.5 * self.sigmas * min(spread, abs(median))
        return [int(at) for at in np.flatnonzero(losses[first:] > limit) + first]

    def _z(self, losses: Array, at: int, sizes: Array) -> tuple[float, Array]:
        """The robust z of a loss if it is a spike, else 0; and the past that judged it: finite losses without earlier spikes."""
        now, past = losses[at], losses[max(0, at - 2 * self.window) : at]
        everything = past = past[np.isfinite(past)]
        if past.size < self.least or not np.isfinite(now):
            return 0.0, past
        median = float(middle(past))
        differs = past != median
        if differs.mean() < 1 - self.tied:  # many batches owe exactly the same, such as nothing: a loss is held against the others
            past, median = past[differs], float(middle(past[differs]))
        spread = max(_NORMAL * float(middle(np.abs(past - median))), 1e-6 * abs(median))
        past = past[np.abs(past - median) <= self.sigmas * spread][-self.window :]
        if past.size < self.least:
            return 0.0, past
        small = self._scatter(sizes, at)
        z, median = small * robust_z(float(now), past), float(middle(past))
        if now - median <= self.beyond * float(np.sort(everything[-self.window :])[-2] - median):
            return 0.0, past
        first = np.abs(losses[np.isfinite(losses)][:5])
        if past.min() >= 0 and now < self.floor * float(first.max()):
            return 0.0, past
        if past.min() <= 0 <= past.max():
            return (z if z > self.mixed else 0.0), past
        if z <= self.sigmas or now <= median + self.rise * abs(median):
            return 0.0, past
        if past.min() > 0 and small * self._log_z(float(now), past) <= self.logarithmic:
            return 0.0, past
        return z, past

    def _scatter(self, sizes: Array, at: int) -> float:
        """The standard deviation of a usual batch's mean over that of this one's, at most 1; 1 where sizes are not known."""
        past, this = sizes[max(0, at - self.window) : at], float(sizes[at])
        usual = middle(past[np.isfinite(past)])
        return min(1.0, float(np.sqrt(this / usual))) if usual > 0 and this > 0 else 1.0

    @staticmethod
    def _log_z(now: float, past: Array) -> float:
        """The robust z of ln L about the straight line through ln of the past."""
        x = np.arange(past.size, dtype=np.float64) - past.size
        logs = np.log(past)
        slope = float(np.dot(x - x.mean(), logs) / np.dot(x - x.mean(), x - x.mean()))
        residual = logs - slope * (x - x.mean())
        return robust_z(float(np.log(now)) + slope * float(x.mean()), residual)

    def _finding(self, history: History, at: int, step: int, past: Array, z: float, *, anew: bool = False) -> Finding:
        losses, median = history.losses(), float(middle(past))
        now, after = float(losses[at]), float(middle(losses[at + 1 :]))
        stays = after > median + 0.5 * (now - median)
        pairs = self._suspects(history, step)
        if anew:
            look = Remedy(f"look at 20 samples from step {step} on, and shuffle the sources if they should not come in turn", {"look_at": 20, "shuffle": True})
            pairs.append((Cause("other data or another task", 0.7, "the loss leapt, and was learned anew as at the beginning"), [look]))
        calm = f"the losses before were calm (median {number(median)}), and so are those after"
        odd = Cause("odd batch", 0.2 if stays else 0.5, f"the losses after it stay near {number(after)}" if stays else calm)
        pairs.append((odd, [Remedy(f"look at the batch of step {step}", {"batch_of_step": step}), clip_remedy(history)]))
        pairs.append((Cause("learning rate too high", 0.4, f"at learning rate {number(history.lr)}"), [lr_remedy(history, 0.1)]))
        causes, remedies = ranked(pairs)
        slight = not stays and np.isfinite(now) and ((past.min() > 0 and now < self.slight * levels.start(history)) or past.max() < 0)
        severity = Severity.INFO if informational(history) or slight or anew else Severity.WARNING
        evidence = (Evidence("loss", now), Evidence("median of its past", median), Evidence("robust deviations above it", z, self.sigmas))
        message = f"{number(median)} -> {number(now)} in one step" + (f", and it stays near {number(after)}" if stays else "")
        message += "; since then it is learned anew, as from other data" if anew else ""
        return Finding(self.diagnosis, severity, step, "loss", message, evidence, causes, remedies)

    def _suspects(self, history: History, step: int) -> list[tuple[Cause, list[Remedy]]]:
        """What else changed at this step: the learning rate, the size of updates, the scale of the input."""
        steps = history.steps()
        before, since = steps < step, steps >= step
        raised = rise(history)
        found: list[tuple[Cause, list[Remedy]]] = [] if raised is None else [raised]
        if before.sum() < self.settle or not since.any():
            return found
        lr = history.fact("lr")
        old, new = middle(lr[before]), float(np.nanmax(lr[since], initial=0.0))
        if new > self.raised * old > 0:
            back = Remedy(f"learning rate {number(new)} -> {number(old)}, as before", {"lr": old})
            found.append((Cause("learning rate too high", 0.8, f"it rose from {number(old)} to {number(new)}"), [back]))
        ratio = history.last("update_ratio")
        if ratio.size and matrices(history).any() and not found:
            each = typical(ratio[:, matrices(history)].T)  # the median over matrices of each sample
            old, new = middle(each[before & np.isfinite(each)]), float(np.nanmax(each[since], initial=0.0))
            if new > self.jumped * old > 0:
                grown = f"updates grew from {number(old)} to {number(new)} of the weights"
                found.append((Cause("learning rate too high", 0.6, grown), [lr_remedy(history, 0.1)]))
        others = [overwritten(history), term(history), leap(history, step)]
        found += [pair for pair in others if pair is not None]
        rms = history.last("input_rms")
        if rms.size:
            old, new = middle(rms[before, 0][np.isfinite(rms[before, 0])]), middle(rms[since, 0][np.isfinite(rms[since, 0])])
            if old > 0 and not old / self.raised < new < old * self.raised:
                look = Remedy(f"look at the batch of step {step}: its scale is {number(new)}, before it was {number(old)}", {"batch_of_step": step})
                found.append((Cause("input changed", 0.75, f"the input's root mean square went from {number(old)} to {number(new)}"), [look]))
        return found


@rule
@dataclass(frozen=True)
class DivergingLoss:
    """diverging_loss: the loss rises and stays above where it was (survey, diverging_loss).

    Law: for 20 steps the mean of 20 losses is above the best such mean so far by max(4 sd, 10 % of it), and above the mean of
    the first 20 (by 25 % where half of it was never reached), and the median of the newest 20 with it. Halts if that
    goes on for 300 steps in a classifier; in others if updates change more than 3 % of the weights, too, or the loss is 100 times what it
    began with: targets of a regression may grow by design.

    Why: a learning rate too high; a flipped sign of the loss or of the gradient; dirty labels; batches too small; an unsuitable
    initialisation or structure.
    Do: divide the learning rate by 10 and warm up over 100 steps or more; clip the gradient norm; check the sign of the loss; look at 20
    samples with their labels; batches of 32 or more.
    False alarm: losses without order (several optimizers, adversarial, reinforcement, declared or by the names of the loss's terms: a
    policy and its critic, a generator and its discriminator) are information only; so is a curriculum whose samples are larger than any was
    when the loss was at its best. One that grows harder at the same size, or a term whose weight grows (KL annealing), rises by
    design: ``DivergingLoss(rise=1.0)`` or mute it.
    """

    diagnosis: ClassVar[str] = "diverging_loss"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    width: int = 20  # losses in a mean; survey
    deviations: float = 4.0  # standard deviations of single losses, at the best and at the first; survey
    rise: float = 0.1  # of the |best mean|; survey
    learned: float = 0.5  # of the first mean: a run whose best is above it has to rise above its start by more than losses that
    hover: float = 0.25  # of the first mean; our own choice: undeclared adversarial losses wander by 0.12 of it
    sustained: int = 20  # steps; survey
    halt_after: int = 300  # steps above, after which the run is lost; our own choice
    fast: float = 3e-2  # median update ratio; survey, target band
    far: float = 100.0  # times the first losses; our own choice
    samples: int = 3  # newest sampled steps whose samples are compared with those at the best; our own choice
    grace: int = 40  # steps; survey
    patience: int = 1  # answers; `sustained` is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        losses, steps = finite_losses(history)
        if losses.size < 2 * self.width + self.sustained - 1:
            return None
        if losses[-self.width :].mean() <= losses[: self.width].mean():
            return None  # not above where it began
        scale = float(np.abs(losses).max()) or 1.0
        windows = np.lib.stride_tricks.sliding_window_view(losses / scale, self.width)
        means, sds = windows.mean(axis=1), windows.std(axis=1)
        best_at = int(np.argmin(means[: -self.sustained]))
        best, first = float(means[best_at]), float(means[0])
        margin = self.hover * abs(first) if best > self.learned * first else 0.0
        limit = max(best + max(self.deviations * max(float(sds[best_at]), float(sds[0])), self.rise * abs(best)), first + margin)
        above = means > limit
        if not above[-self.sustained :].all() or not middle(losses[-self.width :]) > limit * scale:
            return None  # a few spikes raise a mean for as long as it holds them
        below = np.flatnonzero(~above)
        run = above.size - (int(below[-1]) + 1 if below.size else 0)
        best_step = int(steps[best_at + self.width - 1])
        return self._finding(history, int(steps[-run]), run, float(means[-1]) * scale, best * scale, limit * scale, best_step)

    def _finding(self, history: History, step: int, run: int, now: float, best: float, limit: float, best_step: int) -> Finding:
        severity = Severity.HALT if run >= self.halt_after and self._lost(history, now) else Severity.WARNING
        leapt = leap(history, step)
        causes, remedies = ranked([
            *suspects(history, until=step + 2 * self.width), *([leapt] if leapt else []),
            (Cause("learning rate too high", 0.6, f"the loss has been above its start for {run} steps at learning rate {number(history.lr)}"),
             [slower(history), clip_remedy(history)]),
            (Cause("labels or sign of the loss", 0.3, f"it climbs away from its best, {number(best)}"),
             [Remedy("check the loss's sign and 20 labels by eye", {"look_at": 20})]),
        ])  # fmt: skip
        lasts = Evidence("steps above its start", float(run), float(self.sustained))
        evidence = (Evidence("mean of the last losses", now, limit), Evidence("best mean so far", best), lasts)
        severity = Severity.INFO if informational(history) or self._harder(history, best_step) else severity
        return Finding(self.diagnosis, severity, step, "loss", f"{number(best)} -> {number(now)}, above its start for {run} steps", evidence, causes, remedies)

    def _harder(self, history: History, best_step: int) -> bool:
        """A curriculum: each sample has become larger than any was until the loss was at its best."""
        size, steps = history.fact("sample_elements"), history.steps()
        before, after = size[steps <= best_step], size[-self.samples :]
        return bool(before.size and after.size and after.min() > before.max())

    def _lost(self, history: History, now: float) -> bool:
        """Nobody could want this: a classifier below its start, updates that rewrite the weights, or a loss of another magnitude."""
        first = abs(levels.start(history))
        return history.loss_family in CLASSIFIES or speed(history) > self.fast or not now < self.far * first
