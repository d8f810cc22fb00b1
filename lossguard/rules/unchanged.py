"""Weights that never change, and why. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lossguard.advice import converged, fallen, listing, matrices, ranked, reach, stopped_rate, stretch, typical, typically, without_gradient
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask
from lossguard.readings import DONE
from lossguard.rules.precision import HALVES, rounding_advice
from lossguard.rules.routing import passed_over, routes, running
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class UnchangedWeights:
    """unchanged_weights: trainable weights never change (survey, unchanged_weights).

    Law: static: parameters in no optimizer, or an optimizer of another model, or modules in a plain list that the loss depends on.
    Running: exact zeros of the update over 20 applied steps while the weight norm stays the same bit for bit; no step at all for 4 times
    as long as ever before, with gradients that arrive, or ever in 256; steps of which 2 % are left when the iteration ends; steps without
    any gradient; a learning rate of 0 in all groups for as many steps as it was not (100 to 1000). Parts of the model that do not run
    (unused heads, heads of an earlier task, experts that nothing is routed to) are information only; gradients that are tiny beside
    others are left to vanishing_gradient, silent ReLU layers to dead_relu.

    Why: parameters not given to the optimizer, or an optimizer built from a copy; optimizer.step() not called; detach() or no_grad()
    between the layer and the loss; code that writes to the weights after each step; a group's learning rate set to 0; dead units
    behind it; half-precision weights whose updates are rounded away.
    Do: build the optimizer from model.parameters() after any copy or .to(); look for detach() after the layer named; keep float32 master
    weights; set requires_grad_(False) where it is meant.
    False alarm: frozen parameters, resting optimizers, accumulation, unused branches and master weights (an optimizer that holds copies
    which are written back) are told apart. The end of a schedule, and a warm-up's first step, may have a learning rate of 0 for all groups; one
    for a group that began with it, or was led there by a schedule, is information.
    """

    diagnosis: ClassVar[str] = "unchanged_weights"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "weight_norm", "grad_norm", "net_update", "void_update", "outside_update")
    slow: ClassVar[bool] = True
    span: int = 20  # applied steps; survey
    least: int = 4  # samples in the span; the weight norms between them are compared as well
    idle: int = 3  # samples in a row without a step after steps were the rule; our own choice, each waited for one
    gaps: float = 4.0  # times the longest time without a step before, after which steps have stopped; our own choice
    growing: float = 32.0  # the same where gradients grow, as they do when accumulation is lengthened; our own choice
    accumulating: float = 2.0  # growth of the gradient norm over the span by which missing steps are accumulation; sqrt(20) is 4.5
    patient: int = 128  # samples without a step that even accumulation does not explain; our own choice
    longest: int = 256  # steps without any update that accumulation does not explain either; our own choice
    most: float = 0.5  # share of matrices without gradient that warns though it is unknown whether they ran; our own choice
    undone: float = 0.02  # of an update that is left when its step ends; our own choice, Lookahead keeps half of it, Reptile a tenth
    rateless: int = 100  # least steps at a rate of 0, as many as there were with one; our own choice, a schedule's last steps
    lifeless: int = 1000  # steps at a rate of 0 that suffice however long the run was before; our own choice
    spacing: float = 1e-6  # of a weight: lr times gradient below it may round to 0 in float32, whose spacing is 1.2e-7; our own choice
    proof: int = 3  # samples in which parameters in no optimizer stand still, before a strange optimizer is held to be a mistake
    tiny: float = 1e-5  # gradient over the largest; the limit of vanishing_gradient
    floors: tuple[float, ...] = (87.3365, 103.2789)  # -ln of the smallest normal and subnormal float32
    pace: int = 10  # steps; asked at most once in so many, half of the span
    grace: int = 0  # steps; the static test is exact
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if not history.samples:
            return None
        static = self._static(history) or self._unregistered(history) or self._never_stepped(history) or self._stopped(history)
        return static or self._void(history) or self._undone(history) or self._rateless(history) or self._still(history)

    def _static(self, history: History) -> Finding | None:
        missing = tuple(history.notes.get("missing_from_optimizer") or ())
        foreign, trainable = int(history.notes.get("foreign_in_optimizer") or 0), int(history.notes.get("trainable") or 0)
        if not missing and not foreign:
            return None
        if missing and foreign and history.facts().get("outside"):  # master weights: the optimizer moves copies, which are written back
            seen, moved = history.seen("outside_update"), history.last("outside_update")
            if int(seen.any(axis=1).sum()) < self.proof or bool((moved[seen] > 0).any()):
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
        since = int(history.notes.get("missing_since", history.steps()[0]))
        return Finding(self.diagnosis, severity, since, listing(missing) or "optimizer", message, evidence, causes, remedies)

    def _unregistered(self, history: History) -> Finding | None:
        """The loss depends on parameters of modules that the model keeps in a plain list or dict."""
        names = tuple(history.notes.get("unregistered") or ())
        if not names:
            return None
        owner = names[0].partition("[")[0]
        because = f"{len(names)} parameters that the loss depends on stand in the plain container {owner}, which parameters() passes over"
        remedy = Remedy(f"make {owner} an nn.ModuleList or nn.ModuleDict, then build the optimizer", {"optimizer_parameters": True})
        causes, remedies = ranked([(Cause("not given to the optimizer", 0.9, because), [remedy])])
        evidence = (Evidence("parameters in no optimizer that the loss depends on", float(len(names)), 0.0),)
        message = f"{len(names)} trainable parameters stand in a plain list or dict, where no optimizer sees them"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[0]), listing(names), message, evidence, causes, remedies)

    def _never_stepped(self, history: History) -> Finding | None:
        """No optimizer has stepped in any sample held. Accumulation looks like it, but its gradients grow."""
        stepped, n = history.fact("stepped"), history.samples
        if n < self.span or stepped[-1] == 1.0 or np.isnan(stepped).any() or stepped.any() or self._moved(history, n).any():
            return None
        total = history.last("grad_total")
        if history.facts().get("scaler") == 1.0 and total.size and not np.isfinite(total[-1, 0]):
            return None  # skipped by the loss scaler
        ends = [typical(part)[0] for part in (total[:5], total[-5:])] if total.size else [np.nan, np.nan]
        if ends[1] > self.accumulating * ends[0] and n < self.patient and history.step < self.longest:
            return None
        remedy = Remedy("call optimizer.step() once after each loss.backward()", {"optimizer_step": True})
        causes, remedies = ranked([(Cause("optimizer.step() is never called", 0.9, f"no optimizer stepped in {n} samples"), [remedy])])
        evidence = (Evidence("samples without an optimizer step", float(n), float(self.span)),)
        message = f"no weight changed in {n} samples: no optimizer steps"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[0]), "optimizer.step", message, evidence, causes, remedies)

    def _stopped(self, history: History) -> Finding | None:
        """Optimizers stepped, and step no more though backward goes on: for longer than ever before no weight has moved."""
        stepped, steps = history.fact("stepped"), history.steps()
        if stepped[-1] == 1.0:
            return None
        ran = np.flatnonzero(stepped == 1.0)
        idle = stepped.size - 1 - int(ran[-1]) if ran.size else 0
        if ran.size < self.idle or idle < self.idle or np.isnan(stepped).any() or self._moved(history, idle).any() or converged(history):
            return None
        total = history.last("grad_total", idle)
        if not total.size or not (np.isfinite(total) & (total > 0)).all():
            return None  # no backward pass either, or skipped for its gradients
        usual = max(int(np.diff(steps[ran]).max()), int(np.diff(steps[ran[-1] :]).max()))  # samples without a step lie further apart
        silent = history.step - int(steps[ran[-1]])
        grows = bool(total[-1, 0] > self.accumulating * total[0, 0])
        if silent < max(self.span, (self.growing if grows else self.gaps) * usual):
            return None
        remedy = Remedy("look for the condition that keeps optimizer.step() from being called", {"optimizer_step": True})
        because = f"gradients arrive, and the last step seen was {int(steps[ran[-1]])}"
        causes, remedies = ranked([(Cause("optimizer.step() is no longer called", 0.9, because), [remedy])])
        evidence = (Evidence("steps without an update", float(silent), self.gaps * usual), Evidence("longest time without one before", float(usual)))
        message = f"no optimizer has stepped for {silent} steps, and before never for more than {usual}"
        severity = Severity.INFO if history.optimizers > 1 else Severity.WARNING
        return Finding(self.diagnosis, severity, int(steps[ran[-1]]) + 1, "optimizer.step", message, evidence, causes, remedies)

    def _void(self, history: History) -> Finding | None:
        """The optimizer steps, and not one of its parameters has a gradient then."""
        n = stretch(history, self.span, self.least)
        if not n or not bool((history.fact("void", n) == 1.0).all()) or reach(history, "void_update", n)[1] > 0.0:
            return None
        arrive = history.last("grad_total", n)
        if arrive.size and bool((arrive > 0).all()):
            early = Remedy("call zero_grad() before backward() or after step(), not between them", {"zero_grad": True})
            cause, remedy = Cause("gradients are cleared before the step", 0.9, "gradients arrive in backward() and are None when the optimizer steps"), early
        else:
            remedy = Remedy("look for detach(), no_grad(), item() or torch.tensor(loss) between the model and backward()", {"unfreeze": True})
            cause = Cause("detached from the loss", 0.9, "no backward pass reaches a parameter: every gradient is None when the optimizer steps")
        causes, remedies = ranked([(cause, [remedy])])
        over = int(history.steps(1)[0] - history.steps(n)[0]) + 1
        evidence = (Evidence("steps without any gradient", float(over), float(self.span)),)
        severity = Severity.INFO if history.optimizers > 1 else Severity.WARNING
        message = f"the optimizer has stepped for {over} steps without any gradient"
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), "optimizer.step", message, evidence, causes, remedies)

    def _undone(self, history: History) -> Finding | None:
        """Every matrix is back where it was when the step ends: what the optimizer did is written over."""
        n = stretch(history, self.span, self.least)
        if not n or not reach(history, "net_update", n)[0] < np.inf:
            return None
        able = history.held & history.kinds("matrix", "embedding")
        if not able.any():
            return None
        left, made = history.last("net_update", n)[:, able], history.last("update_norm", n)[:, able]
        seen = np.isfinite(left) & (made > 0)
        if not seen.any(axis=0).all() or (seen.sum(axis=0) < self.least).any() or not (left[seen] < self.undone * made[seen]).all():
            return None
        rest = float(np.max(left[seen] / made[seen], initial=0.0))
        look = Remedy("look for what writes to the weights after optimizer.step(): an average, a checkpoint, a copy", {"look_at": 1})
        causes, remedies = ranked([(Cause("weights are overwritten", 0.9, f"at the end of a step {number(rest)} of its update is left"), [look])])
        evidence = (Evidence("share of an update that is left", rest, self.undone),)
        message = f"each step's update is undone before the step ends: at most {number(rest)} of it is left"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(n)[0]), "weights", message, evidence, causes, remedies)

    def _rateless(self, history: History) -> Finding | None:
        """Every learning rate has been 0 for longer than there was any: what runs on computes for nothing."""
        rates, steps = history.fact("lr"), history.steps()
        if not rates.size or rates[-1] != 0.0 or converged(history):
            return None
        able = np.flatnonzero(~(rates == 0.0))
        last = int(steps[able[-1]]) if able.size else int(steps[0]) - 1
        if not bool((history.fact("stepped", rates.size - (int(able[-1]) + 1 if able.size else 0)) == 1.0).any()):
            return None  # no optimizer steps anyway
        over, least = history.step - last, int(np.clip(last + 1, self.rateless, self.lifeless))
        if over < least:
            return None
        peak = history.lr_peak
        look = Remedy(f"look at the schedule, and at its number of steps: epochs are no batches; the learning rate was {number(peak)}", {"lr": peak})
        cause = Cause("learning rate schedule", 0.9, f"it led the learning rate from {number(peak)} to 0 by step {last + 1}")
        if not peak > 0:
            cause, look = Cause("learning rate is zero", 0.9, "it was never above 0"), Remedy("give the optimizer a learning rate above 0", {"lr": 1e-3})
        causes, remedies = ranked([(cause, [look])])
        evidence = (Evidence("steps at a learning rate of 0", float(over), float(least)),)
        message = f"the learning rate of all groups has been 0 for {over} steps"
        return Finding(self.diagnosis, Severity.WARNING, last + 1, "learning rate", message, evidence, causes, remedies)

    def _still(self, history: History) -> Finding | None:
        n = stretch(history, self.span, self.least)
        if reach(history, "update_norm", n)[0] > 0.0:
            return None
        updates, seen = history.last("update_norm", n), history.seen("update_norm", n)
        if not n or not updates.size or not bool(((history.fact("stepped", n) == 1.0) & ~(history.fact("lr", n) <= 0)).all()):
            return None
        zero = seen.all(axis=0) & (updates == 0.0).all(axis=0) & ~self._moved(history, n)
        held = history.held
        able = held & history.kinds("matrix", "embedding")
        if not able.any():
            return None
        if "LBFGS" in str(history.facts().get("optimizer_name")) and self._moved(history, history.samples).any():
            return None  # it returns at once where its own bar for a minimum is met
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
        if not converged(history) and not (history.schedule_tail and fallen(history) < DONE):  # a schedule that ends a run that has learned
            return np.asarray(tiny | ((middle == 0) & dead))
        weights = typical(history.last("weight_norm", n)) / np.sqrt(history.numels)  # a hinge loss that reached 0 has no gradient left, others next to none
        with np.errstate(invalid="ignore"):
            return np.asarray(tiny | ~(history.lr * middle > self.spacing * weights))

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
        """Information where it may be meant: an optimizer that rests, rates that began at 0 or were led there, or modules that never ran."""
        resting = set(history.facts().get("resting") or ())
        if resting and resting.issuperset(np.flatnonzero(still).tolist()):
            return Severity.WARNING if history.fact("rate_cut").max(initial=0.0, where=~np.isnan(history.fact("rate_cut"))) == 1.0 else Severity.INFO
        owner = np.array([p.optimizer for p in history.params])
        if history.optimizers > 1 and all(bool(still[able & (owner == o)].all()) for o in set(owner[still])) and not still[able].all():
            return Severity.INFO
        n = stretch(history, self.span, self.least)
        ran = running(history, n)
        none = without_gradient(history) | ~np.isfinite(self._newest(history))
        passed = [passed_over(history, i, n) for i in np.flatnonzero(still).tolist()]
        unused = [bool(none[i] or self._newest(history)[i] == 0) and (over or history.params[i].name.rpartition(".")[0] not in ran)
                  for i, over in zip(np.flatnonzero(still).tolist(), passed, strict=True)]  # fmt: skip
        sure = sum(passed) if routes(history) else 0
        return Severity.INFO if all(unused) and still.sum() - sure < self.most * able.sum() else Severity.WARNING

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
        if set(sites.tolist()) <= set(history.facts().get("resting") or ()):
            remedy = Remedy(f"give the group of {name} its learning rate back, or set requires_grad_(False)", {"unfreeze": True, "parameter": name})
            return Cause("learning rate is zero", 0.9, f"the learning rate of the group of {name} is 0"), remedy
        if passed_over(history, int(sites[0]), n):
            remedy = Remedy("keep all parts in use: a balancing loss or noise for the router, or drop those that are never chosen", {"add": "balance"})
            return Cause("nothing is routed to it", 0.85, f"the module of {name} has not run in {n} samples, and others like it have"), remedy
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
