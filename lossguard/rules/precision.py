"""What half precision and frozen parameters add: overflow ahead, rounding, skips, a loss scale that collapses, weights
that must not move. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import converged, informational, listing, lr_remedy, middle, ranked, reach, steady, stretch, typical, typically
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import History, Mask
from lossguard.rules.rule import rule

HALVES = ("float16", "bfloat16")


@rule
@dataclass(frozen=True)
class OverflowRisk:
    """overflow_risk: activations or gradients in float16 come near 65504, its largest number (survey).

    Law: in each of the last 3 samples the largest finite magnitude of a module's output, or of a parameter's gradient where
    no loss scaler is at work, is above half of 65504, and it is not the same bit for bit; or it is above a tenth, has risen
    without a break in 4 samples, and the same rise once more would overflow. What has overflowed already is the business of
    nonfinite_activation and nonfinite_gradient. bfloat16 reaches as far as float32 and is not looked at.

    Why: activations that grow with depth in a residual stream without normalisation; a learning rate that is too high;
    sums or products over many elements in half precision; a loss that is a sum over the batch.
    Do: use bfloat16; or run the named module in float32 (torch.autocast(device_type, enabled=False)); divide the learning
    rate by 10; normalise before the module.
    False alarm: additive masks of -65504 or -1e4 (a constant does not count); gradients under a loss scaler, which seeks the
    limit by design (not looked at). Raise ``share`` for a model that is known to live near the limit.
    """

    diagnosis: ClassVar[str] = "overflow_risk"
    reads: ClassVar[tuple[str, ...]] = ("activation_reach", "gradient_reach")
    share: float = 0.5  # of the dtype's largest number; our own choice, one doubling before the overflow
    least: int = 3  # samples in a row; our own choice, one batch may be odd
    early: float = 0.1  # of the dtype's largest number, from which a rise counts; our own choice, a few doublings before the overflow
    rising: int = 4  # samples without a break in the rise; our own choice
    climb: float = 1.2  # over the sample before, in each of them; our own choice, noise of 10 % reaches it once in 600 samples
    grace: int = 0  # steps; the samples in a row are the grace
    patience: int = 1  # samples; the samples in a row are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        for signal in self.reads:
            if history.samples < self.least or not reach(history, signal, self.least)[1] > self.early:
                continue
            near = steady(history, signal, self.least, self.least, lambda v: np.isfinite(v) & (v > self.share))
            values = history.last(signal, self.rising)
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                near &= np.asarray((values[-self.least :] != values[-1:]).any(axis=0))
                if len(values) == self.rising and history.seen(signal, self.rising).any():
                    steep = (values[-1] * (values[-1] / values[0]) > 1.0) & (values[-1] > self.early) & (values[-1] <= 1.0)
                    near |= steep & (values[1:] > self.climb * values[:-1]).all(axis=0)
            if near.any():
                return self._finding(history, signal, np.flatnonzero(near))
        return None

    def _finding(self, history: History, signal: str, sites: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Finding:
        values, forward = history.last(signal, 1)[0], signal == "activation_reach"
        known = [u.name for u in history.units] if forward else [p.name for p in history.params]
        names = [known[i] if i < len(known) else f"site {i}" for i in sites]
        worst = float(values[sites].max())
        exempt = Remedy(f"use bfloat16, or run {names[0]} in float32: torch.autocast(device_type, enabled=False)", {"dtype": "bfloat16", "parameter": names[0]})
        what = "output" if forward else "gradient"
        cause = Cause("range of float16 too small", 0.7, f"the largest {what} is {number(worst * 65504)} of 65504")
        causes, remedies = ranked([(cause, [exempt, lr_remedy(history, 0.1)])])
        evidence = (Evidence("largest magnitude over 65504", worst, self.share),)
        message = f"its {what} reaches {worst:.0%} of what float16 can hold; {sites.size} such ({listing(names)})"
        where = f"{names[0]} ({'forward' if forward else 'backward'})"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(self.least)[0]), where, message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class FrozenWeightsChanged:
    """frozen_weights_changed: the optimizer's own step moves parameters whose requires_grad is False (survey).

    Law: an exact test over 3 samples in a row: a parameter that was frozen when the step began is not what it was when the
    step ended. What other code does between the steps (a teacher's moving average, a target network, load_state_dict, the
    statistics of a batch-norm) does not count, and neither does a parameter that is trained again.

    Why: a parameter frozen after it had a gradient, and gradients cleared with zero_grad(set_to_none=False): the gradient
    stays 0 and not None, so that momentum and weight decay go on; a gradient written by hand or left from before.
    Do: set p.grad = None when it is frozen (zero_grad does so by default), or take it out of the optimizer's groups.
    False alarm: code that computes gradients by hand for parameters without requires_grad. Where all parameters of an
    optimizer are so, that is taken as meant; else mute the diagnosis.
    """

    diagnosis: ClassVar[str] = "frozen_weights_changed"
    reads: ClassVar[tuple[str, ...]] = ("frozen_update",)
    times: int = 3  # samples in a row; our own choice, a parameter may be frozen between its backward pass and the step
    grace: int = 0  # steps; exact test
    patience: int = 1  # samples; the samples in a row are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        names = tuple(history.facts().get("frozen") or ())
        if not names or history.samples < self.times or any(history.facts(k).get("frozen") != names for k in range(2, self.times + 1)):
            return None
        moved = steady(history, "frozen_update", self.times, self.times, lambda v: ~(v == 0.0))[: len(names)]
        sites = np.flatnonzero(moved)
        if not sites.size:
            return None
        sick, update = [names[i] for i in sites], float(history.last("frozen_update", 1)[0, sites[0]])
        drop = Remedy(f"set the grad of {sick[0]} to None when it is frozen, or take it out of the optimizer", {"freeze": True, "parameter": sick[0]})
        left = "it still has a gradient (not None), so momentum and weight decay go on"
        causes, remedies = ranked([(Cause("a gradient is left from before it was frozen", 0.8, left), [drop])])
        evidence = (Evidence("norm of the update of a frozen parameter", update, 0.0),)
        message = f"requires_grad is False, and the optimizer moves it all the same; {len(sick)} such ({listing(sick)})"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(self.times)[0]), sick[0], message, evidence, causes, remedies)


# Readings for rules that stand elsewhere.


def rounded_away(diagnosis: str, history: History, span: int, least: int, moved: float) -> Finding | None:
    """Half-precision weights of which fewer than ``moved`` change in a step although their gradients are not zero."""
    n = stretch(history, span, least)
    if not n or not reach(history, "rounded_away", n)[1] > 1.0 - moved:
        return None
    applied = history.last("update_norm", n)
    if not applied.size or not bool((np.nan_to_num(applied) > 0).any(axis=1).all()):
        return None  # a step that moved nothing at all was skipped
    share = typically(history, "rounded_away", n)
    known = np.isfinite(share)
    if not known.any() or not middle(share[known]) > 1.0 - moved:
        return None
    worst = int(np.nanargmax(share))
    changed, name = 1.0 - middle(share[known]), history.params[worst].name
    because = f"at learning rate {number(history.lr)} {1 - changed:.1%} of the elements with a gradient are as they were"
    causes, remedies = ranked([rounding_advice(history, because)])
    evidence = (Evidence(f"share of elements that change, over {n} samples", changed, moved),)
    message = f"updates are smaller than the spacing of its dtype: {1 - changed:.1%} of the elements are rounded back"
    severity = Severity.INFO if informational(history) else Severity.WARNING
    return Finding(diagnosis, severity, int(history.steps(n)[0]), name, message, evidence, causes, remedies)


def rounding_advice(history: History, because: str) -> tuple[Cause, list[Remedy]]:
    """Updates that are smaller than the spacing of the dtype."""
    master = Remedy("keep float32 master weights (train under autocast with float32 parameters), or round stochastically", {"master_weights": True})
    return Cause("rounding", 0.9, because), [master, lr_remedy(history, 10.0)]


def collapsing_scale(diagnosis: str, history: History, after: int, halvings: int, span: int) -> Finding | None:
    """A loss scale below 1, or one that was halved so often, net, within so many steps."""
    scale, steps = history.fact("loss_scale"), history.steps()
    late = np.isfinite(scale) & (steps >= after)
    if not late.any() or not late[-1]:
        return None
    scale, steps = scale[late], steps[late]
    near = steps >= steps[-1] - span
    top = scale.size - 1 - int(np.argmax(np.where(near, scale, -np.inf)[::-1]))  # the last time that it was that high
    if not (scale[-1] < 1.0 or scale[top] >= scale[-1] * 2.0**halvings):
        return None
    cause = Cause("non-finite gradients", 0.8, "a scale this small should overflow nowhere: the gradients themselves are not finite")
    bfloat = Remedy("train in bfloat16, which needs no loss scale", {"dtype": "bfloat16"})
    causes, remedies = ranked([(cause, [lr_remedy(history, 0.1), bfloat])])
    message = f"the loss scale fell from {number(float(scale[top]))} to {number(float(scale[-1]))}: gradients overflow at every scale"
    evidence = (Evidence("loss scale", float(scale[-1]), 1.0),)
    return Finding(diagnosis, Severity.WARNING, int(steps[top]), "loss scaler", message, evidence, causes, remedies)


def silent_skips(diagnosis: str, history: History, window: int, share: float, least: int) -> Finding | None:
    """Updates that an optimizer leaves out by itself: it stepped with a gradient as large as ever and moved nothing.

    Parameters in halves (rounding), converged runs and line searches do not count, nor does a fixed rhythm, which is
    accumulation inside of the optimizer.
    """
    if not (history.row_extremes("update_norm", least)[1] == 0.0).any():
        return None
    updates, seen, total = history.last("update_norm", window), history.seen("update_norm", window), history.last("grad_total", window)
    if len(updates) < least + least or not updates.size or not total.size or any(p.dtype in HALVES for p in history.params) or converged(history):
        return None
    if "LBFGS" in str(history.facts().get("optimizer_name")):
        return None
    still = seen.any(axis=1) & ~(seen & (updates != 0.0)).any(axis=1)
    fact = history.fact("stepped", window), history.fact("lr", window)
    still &= (fact[0] == 1.0) & ~(fact[1] <= 0)
    moved = seen.any(axis=1) & ~still
    if still.sum() < max(least, share * window) or not moved.any() or not still[-least:].any():
        return None
    usual = typical(total[moved, :1])[0]
    with np.errstate(invalid="ignore"):
        still &= total[:, 0] > 0.1 * usual
    steps = history.steps(window)
    if still.sum() < max(least, share * window) or _rhythm(steps, moved, still):
        return None
    many, name = int(still.sum()), str(history.facts().get("optimizer_name") or "the optimizer")
    look = Remedy(f"look at what {name}, or the engine around it, skips on (overflow, gradient norm)", {"look_at": many})
    causes, remedies = ranked([(Cause("an engine skips updates", 0.7, f"{many} of {len(steps)} sampled steps moved no weight at all"), [look])])
    message = f"{many} of {len(steps)} updates changed nothing although {name} stepped on gradients as large as ever"
    evidence = (Evidence("updates left out", float(many), float(least)),)
    return Finding(diagnosis, Severity.WARNING, int(steps[np.argmax(still)]), "optimizer.step", message, evidence, causes, remedies)


def _rhythm(steps: np.ndarray[tuple[int], np.dtype[np.int64]], moved: Mask, still: Mask) -> bool:
    """Whether all moves are at the same place of some period, and nothing else is."""
    for period in range(2, 65):
        places = set((steps[moved] % period).tolist())
        if len(places) == 1 and not places & set((steps[still] % period).tolist()):
            return True
    return False
