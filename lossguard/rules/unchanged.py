"""Weights that never change, and why. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lossguard.advice import converged, listing, matrices, ranked, reach, stopped_rate, stretch, typical, typically, without_gradient
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.rules.precision import HALVES, rounding_advice
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class UnchangedWeights:
    """unchanged_weights: trainable weights never change (detectors A, unchanged_weights; SYMPTOMS D10, E12, F6).

    Law: static: parameters in no optimizer, or an optimizer of another model. Running: exact zeros of the update over 20 applied steps
    while the weight norm stays the same bit for bit. Parts of the model that never ran (unused heads, experts) are information only;
    gradients that are tiny beside others are left to vanishing_gradient, silent ReLU layers to dead_relu.

    Why: parameters not given to the optimizer, or an optimizer built from a copy; optimizer.step() not called; detach() or no_grad()
    between the layer and the loss; dead units behind it; half-precision weights whose updates are rounded away.
    Do: build the optimizer from model.parameters() after any copy or .to(); look for detach() after the layer named; keep float32 master
    weights; set requires_grad_(False) where it is meant.
    False alarm: frozen parameters, resting optimizers, accumulation and unused branches are told apart; a learning rate of 0 is not
    judged.
    """

    diagnosis: ClassVar[str] = "unchanged_weights"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm", "grad_norm")
    span: int = 20  # applied steps; detectors A
    least: int = 4  # samples in the span; the weight norms between them are compared as well
    accumulating: float = 2.0  # growth of the gradient norm over the span by which missing steps are accumulation; sqrt(20) is 4.5
    patient: int = 128  # samples without a step that even accumulation does not explain; our own choice
    most: float = 0.5  # share of matrices without gradient that warns though it is unknown whether they ran; our own choice
    tiny: float = 1e-5  # gradient over the largest; the limit of vanishing_gradient
    floors: tuple[float, ...] = (87.3365, 103.2789)  # -ln of the smallest normal and subnormal float32
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
            other = Remedy("build the optimizer from this model's parameters(), after any copy, wrapping or .to()", {"optimizer_parameters": True})
            pairs.append((Cause("the optimizer holds another model's parameters", 0.9, f"{foreign} of its parameters are not this model's"), [other]))
        if missing:
            add = Remedy(f"add {listing(missing)} to the optimizer, or set requires_grad_(False)", {"optimizer_parameters": True})
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
        remedy = Remedy("call optimizer.step() once after each loss.backward()", {"optimizer_step": True})
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

    @staticmethod
    def _clipped_away(history: History) -> bool:
        """The gradients are not 0 after the backward pass and exactly 0 at the update."""
        kept = history.last("clip_coefficient", 1)
        return bool(kept.size and (kept == 0.0).any())

    def _floor(self, history: History) -> float | None:
        """The loss of a probability that underflowed, if the newest loss is one."""
        now = history.losses(1)
        return next((floor for floor in self.floors if now.size and abs(now[0] - floor) < 1e-3), None)

    def _cause(self, history: History, n: int, sites: Any) -> tuple[Cause, Remedy]:
        name, first = history.params[int(sites[0])].name, history.params[int(sites[0])]
        gradient = typically(history, "grad_rms", n)[sites[0]] if history.last("grad_rms", n).size else np.nan
        if without_gradient(history)[sites[0]]:
            remedy = Remedy(f"look for detach(), no_grad() or an unused branch after {name}", {"unfreeze": True, "parameter": name})
            return Cause("detached from the loss", 0.8, f"the gradient of {name} is None"), remedy
        if history.facts().get("cleared") == 1.0 or self._clipped_away(history):
            remedy = Remedy("call optimizer.step() right after loss.backward(), and zero_grad() after it", {"zero_grad": True})
            because = f"{name} has a gradient of {number(float(gradient))} after backward(), and none when the optimizer steps"
            return Cause("gradients are cleared before the step", 0.9, because), remedy
        stopped = stopped_rate(history)
        if stopped is not None:
            return stopped[0], stopped[1][0]
        if gradient == 0 and (floor := self._floor(history)) is not None:
            remedy = Remedy("give the logits to cross_entropy instead of the logarithm of a softmax", {"output_activation": "log_softmax", "bias": 0.0})
            return Cause("softmax underflow", 0.9, f"the loss stays at {floor:.4f}, the logarithm of the smallest float32"), remedy
        if gradient == 0:
            remedy = Remedy(f"look for dead units or a multiplication by 0 after {name}", {"unfreeze": True, "parameter": name})
            return Cause("zero gradient", 0.7, f"the gradient of {name} is exactly 0"), remedy
        if first.dtype in HALVES or history.lr < 1e-8:
            share = f"lr {number(history.lr)} times a gradient of {number(float(gradient))} is below the spacing of {first.dtype}"
            cause, tries = rounding_advice(history, share)
            return cause, tries[0]
        remedy = Remedy(f"check the optimizer's group of {name}: its lr, and who restores its weights", {"unfreeze": True, "parameter": name})
        return Cause("frozen by mistake", 0.5, f"{name} has a gradient of {number(float(gradient))} and no update"), remedy
