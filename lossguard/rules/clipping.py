"""Between the gradient and the update: gradients that add up, are clipped, or are not applied. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import clip_remedy, informational, lr_remedy, matrices, middle, ranked, reach, sound_gradient, stretch, typically
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import History, Mask
from lossguard.rules.numeric import lasting
from lossguard.rules.precision import collapsing_scale, silent_skips
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class MissingZeroGrad:
    """missing_zero_grad: most gradients are carried over an update without being cleared (survey, missing_zero_grad).

    Law: an exact test, read from the gradient tensors' versions: at least half of them still held those of the last update when the next
    backward pass began, three looks in a row.

    Why: optimizer.zero_grad() is not called, or called on another optimizer, or after backward and before step.
    Do: call optimizer.zero_grad() once after each optimizer.step(), or before each backward pass; where gradients are accumulated, once
    after the last of the micro-batches.
    False alarm: gradient accumulation is told apart, since only the first backward after an update is looked at. A deliberate memory of
    gradients across steps: mute it.
    """

    diagnosis: ClassVar[str] = "missing_zero_grad"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    slow: ClassVar[bool] = True
    share: float = 0.5  # share of gradients not cleared; survey
    times: int = 3  # consecutive looks; survey
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
        causes, remedies = ranked([(cause, [Remedy("call optimizer.zero_grad() once after each optimizer.step()", {"zero_grad": True})])])
        message = f"gradients add up: {self.times} updates in a row began with those of the update before"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[at[0]]), "optimizer.zero_grad", message, tuple(evidence), causes, remedies)


@rule
@dataclass(frozen=True)
class ClippingDominates:
    """clipping_dominates: nearly every step is clipped, and by much (survey, clipping_dominates).

    Law: > 90 % of steps clipped and median G/c >= 2 over 200 steps. A median G/c >= 10 needs 30 steps only. Healthy transformers
    clip 45 to 61 % at G/c 1.03; a share above half alone is no finding.

    Why: a clip value far below the usual gradient norm; a learning rate that is too high and that clipping hides; a loss that is summed
    instead of averaged.
    Do: clip at the median gradient norm that the remedy names (or at its 90th percentile); learning rate divided by 10; average the loss.
    False alarm: private training and some reinforcement recipes clip every step by design: mute it there. Optimizers that divide by
    the size of gradients (Adam, RMSprop, Adagrad) undo the scale of a clip that always binds: information only, unless what is left
    nears their epsilon.
    """

    diagnosis: ClassVar[str] = "clipping_dominates"
    reads: ClassVar[tuple[str, ...]] = ("clip_coefficient",)
    slow: ClassVar[bool] = True
    share: float = 0.9  # share of clipped samples; survey
    excess: float = 2.0  # median G/c; survey
    strong: float = 10.0  # median G/c that is heard early; survey (there at a share of 0.5 over 200 steps)
    span: int = 200  # steps; survey
    epsilons: float = 10.0  # what is left of the gradients over the optimizer's epsilon; survey (adam_epsilon_floor)
    early: int = 30  # steps for a strong excess; our own choice for short runs
    least: int = 15  # samples in either span; our own choice
    grace: int = 20  # steps of warm-up that do not count; survey, machinery 3
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

    def _rescaled(self, history: History, n: int) -> bool:
        """The optimizer divides gradients by their own size, and what clipping leaves of them is still far above its epsilon."""
        epsilon, rms, kept = history.facts().get("adam_eps"), typically(history, "grad_rms", n), typically(history, "clip_coefficient", n)
        able = matrices(history)[: rms.size]
        if epsilon is None or not able.any() or not np.isfinite(kept).any():
            return False
        left = middle(rms[: able.size][able & np.isfinite(rms)]) * float(np.nanmin(kept))
        return bool(left > self.epsilons * float(epsilon))

    @staticmethod
    def _wider(history: History, n: int, site: int, median: float) -> Remedy:
        """A clip value above the one that binds: about the median gradient norm of a calm run, that of now where the run was never calm."""
        total, kept = history.last("grad_total", n), history.last("clip_coefficient", n)[:, site]
        norms = total[:, 0] if total.size else np.full(len(kept), np.nan)
        seen = np.isfinite(norms) & np.isfinite(kept)
        if not seen.any() or history.optimizers > 1 or sound_gradient(history) > float(middle((norms * kept)[seen])):
            return clip_remedy(history)
        value = float(f"{float(middle(norms[seen])):.1g}")
        return Remedy(f"clip the gradient norm at {number(value)}, its median now: {number(median)} times the clip value", {"max_norm": value})

    def _finding(self, history: History, n: int, site: int, share: float, median: float, excess: float) -> Finding:
        causes, remedies = ranked([
            (Cause("clip value too low", 0.6, f"the median gradient norm is {number(median)} times the clip value"), [self._wider(history, n, site, median)]),
            (Cause("learning rate too high", 0.4, f"clipping divides it by {number(median)}"), [lr_remedy(history, 0.1)]),
        ])  # fmt: skip
        severity = Severity.INFO if informational(history) or self._rescaled(history, n) else Severity.WARNING
        evidence = (Evidence("share of steps clipped", share, self.share), Evidence("median gradient norm over clip value", median, excess))
        message = f"{share:.0%} of the steps are clipped, by a median factor of {number(median)}"
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), f"gradient clipping of optimizer {site}", message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class SkippedSteps:
    """skipped_steps: updates are not applied again and again, by a loss scaler or by our own gate (survey, nonfinite_gradient).

    Law: 8 samples in a row without an update under a loss scaler after the first 20 steps, or more than 10 % of the last 50; or 3 updates
    in a row left out by the guard's own gate (skip=), a halt at 20; or more than 10 % of 200 updates left out by it, a halt from one half
    up; or a loss scale that halves 8 times, net, within 200 steps; or an optimizer that steps without moving any weight. A few skips at
    the start of fp16, and one at each growth of the scale, are normal. What the scaler leaves out is never counted as the gate's, nor the
    other way round.

    Why: gradients that overflow fp16 at every scale; a loss or an activation that is not finite; an initial scale far too large; a
    gradient norm that has left its own level, where skip= names exploding_gradient.
    Do: learning rate divided by 10; bf16 instead of fp16; GradScaler(init_scale=1024, growth_interval=2000); find the module named by
    nonfinite_activation or overflow; Limit(times=100) where the gate finds spikes in a healthy run.
    False alarm: the search for the scale at the start and single skips do not count.
    """

    diagnosis: ClassVar[str] = "skipped_steps"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "consecutive_skips", "total_skips")
    skips: int = 8  # samples in a row under a loss scaler; survey
    search: int = 20  # steps in which a loss scaler looks for its scale; survey
    share: float = 0.1  # share of samples after the search; survey (10 % of 200)
    window: int = 50  # samples for the share; our own choice, 200 steps at the default intervals
    gate: int = 3  # updates in a row skipped by our own gate; our own choice
    halvings: int = 8  # of the loss scale, net, within `spanned` steps; survey (8 skips in a row)
    spanned: int = 200  # steps; survey
    halt_after: int = 20  # updates in a row skipped by our own gate after which the run halts; our own choice
    updates: int = 200  # over which the share left out by our own gate is taken; survey
    most: float = 0.5  # share of them at which the run halts; our own choice, because such a run learns from what it is not meant to
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
        many = self._many(history)
        if many is not None:
            return many
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

    def _many(self, history: History) -> Finding | None:
        """Too large a share of the newest updates was left out by the gate, though few of them in a row."""
        left, tried = history.last("total_skips"), history.last("tried_updates")
        for site in range(tried.shape[1] if tried.shape == left.shape and len(tried) else 0):
            before = np.flatnonzero(tried[-1, site] - tried[:, site] >= self.updates)
            if not before.size:
                continue
            since = int(before[-1])
            skips, of = float(left[-1, site] - left[since, site]), float(tried[-1, site] - tried[since, site])
            if skips > self.share * of:
                severity = Severity.HALT if skips >= self.most * of else Severity.WARNING
                return self._finding(history, "the guard's gate", int(history.steps()[since]), skips, self.share * of, severity)
        return None

    @staticmethod
    def _skipped(history: History) -> Mask:
        """Samples whose update was not applied under a loss scaler: stepped without a change, or not stepped and not finite."""
        gates = history.last("consecutive_skips")
        ours = (gates > 0).any(axis=1) if gates.size else np.zeros(history.samples, dtype=np.bool_)
        updates, seen = history.last("update_norm"), history.seen("update_norm")
        scaler, stepped, lr = history.fact("scaler", default=0.0), history.fact("stepped"), history.fact("lr")
        gradients = history.seen("grad_norm") & ~np.isfinite(history.last("grad_norm"))
        overflow = gradients.any(axis=1) if gradients.size else np.zeros(history.samples, dtype=np.bool_)
        still = (seen.any(axis=1) & ~(seen & (updates != 0.0)).any(axis=1)) if seen.size else np.zeros(history.samples, dtype=np.bool_)
        return np.asarray(~ours & (scaler == 1.0) & ((still & (stepped == 1.0) & ~(lr <= 0)) | (overflow & ~(stepped == 1.0))))

    def _finding(self, history: History, who: str, step: int, many: float, limit: float, severity: Severity) -> Finding:
        spikes, left = history.last("spike_skips", 1), history.last("total_skips", 1)
        cause = Cause("non-finite gradients", 0.7, f"{who} skips what is not finite; {number(many)} updates were not applied")
        remedies = [lr_remedy(history, 0.1)]
        if spikes.size and 2 * np.nansum(spikes) > np.nansum(left):
            cause = Cause("exploding gradient", 0.6, f"{number(float(np.nansum(spikes)))} of all updates left out had a gradient norm far above the run's own")
            remedies.append(clip_remedy(history))
        elif history.facts().get("scaler"):
            remedies.append(Remedy("set the loss scale by hand: 1024, growth_interval 2000", {"init_scale": 1024.0}))
        causes, advice = ranked([(cause, remedies)])
        message = f"{number(many)} updates were skipped by {who}: the run looks alive and learns nothing"
        return Finding(self.diagnosis, severity, max(step, 0), "optimizer.step", message, (Evidence("skipped updates", many, limit),), causes, advice)
