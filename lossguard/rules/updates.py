"""Updates against weights: too large, too small, none. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lossguard.advice import (
    converged,
    informational,
    listing,
    lr_remedy,
    matrices,
    middle,
    ranked,
    reach,
    step_size_advice,
    stretch,
    typical,
    typically,
    without_gradient,
)
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.rules.precision import HALVES, rounded_away, rounding_advice
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class UpdateRatioHigh:
    """update_ratio_high: updates rewrite the weights (detectors A, update_ratio_high (a) and (b); SYMPTOMS D1). Matrices that are not zero-born.

    Law (b): a weight norm grows more than 10 times within 100 steps, at once and without grace (healthy <= 3.97, faulty 20 to 1e15).
    Law (a): the median of u = |dw|/|w| over 20 steps is above 0.1, or over 5 samples above 0.5, in a third of the matrices (healthy singles <= 0.19).
    """

    diagnosis: ClassVar[str] = "update_ratio_high"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm")
    ratio: float = 0.1  # median of u over the span; detectors A (a)
    drastic: float = 0.5  # median of u over few samples; a learning rate 100 times too high shows for 5 to 10 steps only
    few: int = 5  # samples for the drastic ratio; our own choice
    share: float = 1 / 3  # of the matrices, so that one odd layer is no alarm; our own choice
    settle: int = 5  # first steps that the median over the span ignores; detectors 0.2 (u after step 5)
    span: int = 20  # steps; detectors A (a)
    growth: float = 10.0  # weight norm now over that up to `within` steps ago; detectors A (b)
    headlong: float = 100.0  # the same for the last matrix of a regression alone; our own choice (raw targets of 152: 10.7)
    within: int = 100  # steps; detectors A (b)
    scale: float = 1.0  # a grown matrix counts once its rms is above numel^-1/4, the Xavier scale: tiny initial heads may grow
    grace: int = 0  # steps; detectors A (b)
    patience: int = 1  # samples; detectors A (b)

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
        u = np.where(able, typically(history, "update_ratio", n), np.nan)
        with np.errstate(invalid="ignore"):
            high = u > limit
        if high.sum() < max(1.0, self.share * able.sum()):
            return None
        worst = int(np.nanargmax(np.where(high, u, np.nan)))
        evidence = Evidence(f"median update ratio over {n} samples", float(u[worst]), limit)
        message = f"each update changes the weights by {u[worst]:.0%} of their norm; {int(high.sum())} of {int(able.sum())} matrices are above {limit:.0%}"
        return self._finding(history, int(history.steps(n)[0]), worst, message, evidence)

    def _finding(self, history: History, step: int, worst: int, message: str, evidence: Evidence) -> Finding:
        causes, remedies = step_size_advice(history, str(evidence))
        return Finding(self.diagnosis, Severity.WARNING, step, history.params[worst].name, message, (evidence,), causes, remedies)


@rule
@dataclass(frozen=True)
class UpdateRatioLow:
    """update_ratio_low: the weights hardly move (detectors A, update_ratio_low; SYMPTOMS D2, B2).

    Law: the median of u over 20 steps, and over matrices, lies between 0 and 1e-6 (healthy fine-tuning 3.3e-5, a far too small rate 3.9e-7).
    Silent in a schedule's tail, while the learning rate rises, and on a converged run.
    """

    diagnosis: ClassVar[str] = "update_ratio_low"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm")
    ratio: float = 1e-6  # median of u; detectors A
    span: int = 20  # steps; detectors A
    least: int = 3  # samples in the span; a median over matrices is steady
    moved: float = 0.01  # share of elements of weights in halves that change in a step, though their gradients are not zero; detectors A
    grace: int = 20  # steps; detectors A, machinery 3
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n, able = stretch(history, self.span, self.least), matrices(history)
        u = history.last("update_ratio", n) if n else np.empty((0, 0))
        if not u.size or not able.any() or history.schedule_tail or converged(history):
            return None
        lr = history.fact("lr", n)
        if np.isfinite(lr).all() and lr[-1] > lr[0] * (1 + 1e-6):
            return None
        rounded = rounded_away(self.diagnosis, history, self.span, self.least, self.moved)
        if rounded is not None:
            return rounded
        each = typical(u)[able]
        each = each[np.isfinite(each)]
        median = middle(each) if each.size else float("nan")
        if not 0 < median < self.ratio:
            return None
        slow = int(np.flatnonzero(able)[int(np.nanargmin(np.where(typical(u)[able] > 0, typical(u)[able], np.inf)))])
        evidence = (Evidence(f"median update ratio over {n} samples", median, self.ratio),)
        cause = Cause("learning rate too low", 0.8, f"at learning rate {number(history.lr)} a step changes {number(median)} of the weights")
        causes, remedies = ranked([(cause, [lr_remedy(history, 10.0)])])
        message = f"the median matrix changes by {number(median)} of its norm in a step; this one is the slowest"
        severity = Severity.INFO if informational(history) else Severity.WARNING
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), history.params[slow].name, message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class UnchangedWeights:
    """unchanged_weights: trainable weights never change (detectors A, unchanged_weights; SYMPTOMS D10, E12, F6).

    Static: parameters in no optimizer, or an optimizer of another model. Running: exact zeros of the update over 20 applied steps
    while the weight norm stays the same bit for bit. Parts of the model that never ran (unused heads, experts) are information only;
    gradients that are tiny beside others are left to vanishing_gradient, silent ReLU layers to dead_relu.
    """

    diagnosis: ClassVar[str] = "unchanged_weights"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm", "grad_norm")
    span: int = 20  # applied steps; detectors A
    least: int = 4  # samples in the span; the weight norms between them are compared as well
    accumulating: float = 2.0  # growth of the gradient norm over the span by which missing steps are accumulation; sqrt(20) is 4.5
    patient: int = 128  # samples without a step that even accumulation does not explain; our own choice
    most: float = 0.5  # share of matrices without gradient that warns though it is unknown whether they ran; our own choice
    tiny: float = 1e-5  # gradient over the largest; the limit of vanishing_gradient
    grace: int = 0  # steps; the static test is exact
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if not history.samples:
            return None
        return self._static(history) or self._never_stepped(history) or self._still(history)

    def _static(self, history: History) -> Finding | None:
        missing = tuple(history.notes.get("missing_from_optimizer") or ())
        foreign, trainable = int(history.notes.get("foreign_in_optimizer") or 0), int(history.notes.get("trainable") or 0)
        if not missing and not foreign:
            return None
        every = bool(missing) and len(missing) >= trainable
        severity = Severity.ERROR if every else Severity.WARNING if missing else Severity.INFO
        pairs: list[tuple[Cause, list[Remedy]]] = []
        if foreign:
            other = Remedy("build the optimizer from this model's parameters(), after any copy, wrapping or .to()", {"parameters": "model.parameters()"})
            pairs.append((Cause("the optimizer holds another model's parameters", 0.9, f"{foreign} of its parameters are not this model's"), [other]))
        if missing:
            add = Remedy(f"add {listing(missing)} to the optimizer, or set requires_grad_(False)", {"add": list(missing)})
            pairs.append((Cause("not given to the optimizer", 0.8, f"{len(missing)} trainable parameters are in no optimizer"), [add]))
        causes, remedies = ranked(pairs)
        strange = Evidence("foreign parameters in the optimizer", float(foreign), 0.0)
        evidence = (Evidence("trainable parameters in no optimizer", float(len(missing)), 0.0), strange)
        message = f"{foreign} parameters of the optimizer are not the model's"
        if missing:
            message = f"{len(missing)} of {trainable} trainable parameters are in no optimizer"
        return Finding(self.diagnosis, severity, int(history.steps()[0]), listing(missing) or "optimizer", message, evidence, causes, remedies)

    def _never_stepped(self, history: History) -> Finding | None:
        """No optimizer has stepped in any sample held. Accumulation looks like it, but its gradients grow."""
        stepped, n = history.fact("stepped"), history.samples
        if n < self.span or stepped[-1] == 1.0 or np.isnan(stepped).any() or stepped.any() or self._moved(history, n).any():
            return None
        total = history.last("grad_total")
        if history.facts().get("scaler") == 1.0 and total.size and not np.isfinite(total[-1, 0]):
            return None  # skipped by the loss scaler
        ends = [typical(part)[0] for part in (total[:5], total[-5:])] if total.size else [np.nan, np.nan]
        if ends[1] > self.accumulating * ends[0] and n < self.patient:
            return None
        remedy = Remedy("call optimizer.step() once after each loss.backward()", {"step_every": 1})
        causes, remedies = ranked([(Cause("optimizer.step() is never called", 0.9, f"no optimizer stepped in {n} samples"), [remedy])])
        evidence = (Evidence("samples without an optimizer step", float(n), float(self.span)),)
        message = f"no weight changed in {n} samples: no optimizer steps"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[0]), "optimizer.step", message, evidence, causes, remedies)

    def _still(self, history: History) -> Finding | None:
        n = stretch(history, self.span, self.least)
        if reach(history, "update_norm", n)[0] > 0.0 or converged(history):  # a hinge loss that reached 0 has no gradient left
            return None
        updates, seen = history.last("update_norm", n), history.seen("update_norm", n)
        if not n or not updates.size or not bool(((history.fact("stepped", n) == 1.0) & ~(history.fact("lr", n) <= 0)).all()):
            return None
        zero = seen.all(axis=0) & (updates == 0.0).all(axis=0) & ~self._moved(history, n)
        held = history.held
        able = held & history.kinds("matrix", "embedding")
        if not able.any():
            return None
        still = zero & able & ~self._others_business(history, n)
        if not still.any() or (history.facts().get("scaler") == 1.0 and bool(zero[held].all())):
            return None
        return self._finding(history, n, still, able)

    @staticmethod
    def _moved(history: History, n: int) -> Mask:
        """Parameters whose weight norm differs within the last n samples."""
        weights = history.last("weight_norm", n)
        if not weights.size:
            return np.zeros(len(history.params), dtype=np.bool_)
        low, high = np.where(np.isnan(weights), np.inf, weights).min(axis=0), np.where(np.isnan(weights), -np.inf, weights).max(axis=0)
        return np.asarray(low < high)

    def _others_business(self, history: History, n: int) -> Mask:
        """Zero updates that another diagnosis explains: gradients tiny beside others, or exactly zero behind a silent ReLU layer."""
        rms = history.last("grad_rms", n)
        if not rms.size:
            return np.zeros(len(history.params), dtype=np.bool_)
        middle, ratio_ok = typical(rms), matrices(history)
        top = float(np.max(middle, initial=0.0, where=np.isfinite(middle) & ratio_ok))
        with np.errstate(invalid="ignore"):
            fading = (middle > 0) & (middle < self.tiny * top)
            tiny = fading | ((middle == 0) & bool((fading & ratio_ok).any()))
        silent = history.last("zero_fraction", 1)
        dead = bool(silent.size and (silent >= 1.0).any())
        return np.asarray(tiny | ((middle == 0) & dead))

    def _finding(self, history: History, n: int, still: Mask, able: Mask) -> Finding:
        sites = np.flatnonzero(still)
        names = [history.params[i].name for i in sites]
        cause, remedy = self._cause(history, n, sites)
        causes, remedies = ranked([(cause, [remedy])])
        over = int(history.steps(1)[0] - history.steps(n)[0]) + 1
        evidence = (Evidence("steps without any change", float(over), float(self.span)), Evidence("matrices that do not change", float(sites.size), 0.0))
        message = f"{sites.size} of {int(able.sum())} weight matrices have not changed in {over} steps ({listing(names)})"
        return Finding(self.diagnosis, self._severity(history, still, able), int(history.steps(n)[0]), names[0], message, evidence, causes, remedies)

    def _severity(self, history: History, still: Mask, able: Mask) -> Severity:
        """Information where it may be meant: an optimizer that rests, or modules that never ran."""
        owner = np.array([p.optimizer for p in history.params])
        if history.optimizers > 1 and all(bool(still[able & (owner == o)].all()) for o in set(owner[still])) and not still[able].all():
            return Severity.INFO
        ran = {u.name for u in history.units}
        none = without_gradient(history) | ~np.isfinite(self._newest(history))
        unused = [bool(none[i] or self._newest(history)[i] == 0) and history.params[i].name.rpartition(".")[0] not in ran for i in np.flatnonzero(still)]
        return Severity.INFO if all(unused) and still.sum() < self.most * able.sum() else Severity.WARNING

    @staticmethod
    def _newest(history: History) -> Array:
        rms = history.last("grad_rms", 1)
        return rms[0] if rms.size else np.full(len(history.params), np.nan)

    def _cause(self, history: History, n: int, sites: Any) -> tuple[Cause, Remedy]:
        name, first = history.params[int(sites[0])].name, history.params[int(sites[0])]
        gradient = typically(history, "grad_rms", n)[sites[0]] if history.last("grad_rms", n).size else np.nan
        if without_gradient(history)[sites[0]]:
            remedy = Remedy(f"look for detach(), no_grad() or an unused branch after {name}", {"parameter": name})
            return Cause("detached from the loss", 0.8, f"the gradient of {name} is None"), remedy
        if gradient == 0:
            remedy = Remedy(f"look for dead units or a multiplication by 0 after {name}", {"parameter": name})
            return Cause("zero gradient", 0.7, f"the gradient of {name} is exactly 0"), remedy
        if first.dtype in HALVES or history.lr < 1e-8:
            share = f"lr {number(history.lr)} times a gradient of {number(float(gradient))} is below the spacing of {first.dtype}"
            cause, tries = rounding_advice(history, share)
            return cause, tries[0]
        remedy = Remedy(f"check the optimizer's group of {name}: its lr, and who restores its weights", {"parameter": name})
        return Cause("frozen by mistake", 0.5, f"{name} has a gradient of {number(float(gradient))} and no update"), remedy
