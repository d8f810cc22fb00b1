"""Values that are not finite: input, activations, gradients, weights, loss. History in, finding or None out; numpy only.

These are exact tests: a NaN or Inf that was measured is a fault, one that was not measured (``seen`` is False) says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import batch_remedy, input_is_bad, listing, ranked, row_at
from lossguard.findings import Cause, Evidence, Finding, Severity, number
from lossguard.host.history import History, Mask
from lossguard.rules.blame import nonfinite_advice, sick_before
from lossguard.rules.rule import rule


def _sick(history: History, signal: str, n: int = 1) -> Mask:
    """Where the last n samples hold measured numbers that are not finite: (n, sites)."""
    return np.asarray(history.seen(signal, n) & ~np.isfinite(history.last(signal, n)))


def _scaler(history: History) -> bool:
    return history.facts().get("scaler") == 1.0


def _loss_is_finite(history: History, step: int) -> bool:
    at = row_at(history, step)
    return at is not None and bool(np.isfinite(history.losses()[at]))


def sick_run(history: History, signal: str) -> int:
    """For how many samples in a row, up to the newest, the signal was not finite somewhere."""
    rows = _sick(history, signal, history.samples)
    if not rows.size:
        return 0
    fine = np.flatnonzero(~rows.any(axis=1))
    return len(rows) - (int(fine[-1]) + 1 if fine.size else 0)


def lasting(history: History, run: int, samples: int, after: int, sparse: int = 4, span: int = 30) -> bool:
    """The run of newest samples is long enough: so many after the first steps, or fewer that cover a span of steps."""
    steps = history.steps(run) if run else np.empty(0, dtype=np.int64)
    late = steps[steps >= after]
    return bool(late.size >= samples or (late.size >= sparse and late[-1] - late[0] >= span))


@rule
@dataclass(frozen=True)
class NonfiniteInput:
    """nonfinite_input: a batch holds NaN or Inf (survey, exact test).

    Law: any non-finite value in the first float tensors of the batch. Halts where the loss of that step is not finite either. A model
    that digests such input (missing-value codes, float masks) keeps a finite loss: then it warns only if batches were finite so far, and
    is a line of information otherwise.

    Why: missing values in the data; a division by a standard deviation of 0 or a log of 0 in preprocessing; a corrupt file; an
    augmentation that overflows fp16.
    Do: repair or drop the batch named; check every sample once with torch.isfinite(x).all(); fill missing values; divide by
    max(std, 1e-8).
    False alarm: NaN as a code for missing values that the model handles: the loss stays finite and it is information.
    """

    diagnosis: ClassVar[str] = "nonfinite_input"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    clean: int = 20  # losses with finite batches before, for a digested bad batch to count as a fault; our own choice
    grace: int = 0  # steps; exact test
    patience: int = 1  # answers; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        step = self._first(history)
        if step is None:
            return None
        sick = _sick(history, "input_rms")
        leaves = [str(i) for i in np.flatnonzero(sick[0])] if sick.size and history.steps(1)[0] == step else []
        where = f"input {listing(leaves)}" if leaves else "input"
        before = history.inputs()[history.loss_steps() < step][-self.clean :]
        severity = Severity.HALT
        if _loss_is_finite(history, step):
            severity = Severity.WARNING if before.size >= self.clean and bool((before == 1).all()) else Severity.INFO
        remedy = batch_remedy(history, step)
        causes, remedies = ranked([(Cause("bad input", 0.95, "the values come from the data loader, before any layer"), [remedy])])
        message = f"batch {remedy.change['drop_batch']} holds NaN or infinite values"
        evidence = (Evidence("finite batches in a row before", float(before.size - (before == 0).sum())),)
        return Finding(self.diagnosis, severity, step, where, message, evidence, causes, remedies)

    def _first(self, history: History) -> int | None:
        """The first bad step among what has not been judged yet."""
        fresh = history.fresh_losses
        unfit = history.inputs(fresh) == 0
        if unfit.any():
            return int(history.loss_steps(fresh)[unfit][0])
        if history.sound:
            return None
        since = history.loss_steps(max(1, fresh))[:1]
        recent = history.samples and (not since.size or history.steps(1)[0] >= since[0])
        return int(history.steps(1)[0]) if recent and _sick(history, "input_rms").any() else None


@rule
@dataclass(frozen=True)
class NonfiniteActivation:
    """nonfinite_activation: a module's output is NaN or Inf though input and weights were finite; names the first in execution order
    (survey, exact test).

    Law: any non-finite value in a module's output or in the logits. Inf with a finite loss is legal (masks before a softmax):
    information. Under a loss scaler one sample may overflow: a warning, and a halt from the second in a row.

    Why: weights that exploded; exp of a large number; a division by 0, a log or a root of 0 or of a negative; fp16 beyond 65504; a
    softmax over a row that is masked altogether.
    Do: look at the module named; learning rate divided by 10, clip the gradient norm; log(p + 1e-8), divisors of at least 1e-8; bf16
    or float32 for that module.
    False alarm: -inf used as a mask is legal while the loss is finite, and is information only.
    """

    diagnosis: ClassVar[str] = "nonfinite_activation"
    reads: ClassVar[tuple[str, ...]] = ("activation_rms", "logit_peak")
    overflows: int = 2  # samples in a row under a loss scaler before it halts; a lower scale does not cure a forward overflow
    grace: int = 0  # steps; exact test
    patience: int = 1  # samples; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if history.sound:
            return None
        units, heads = _sick(history, "activation_rms"), _sick(history, "logit_peak")
        if not units.any() and not heads.any():
            return None
        step = int(history.steps(1)[0])
        if input_is_bad(history, step) or sick_before(history) is not None:
            return None
        signal = "activation_rms" if units.any() else "logit_peak"
        first = int(np.flatnonzero((units if units.any() else heads)[0])[0])
        value = float(history.last(signal, 1)[0, first])
        where = self._name(history, signal, first)
        many = int(units.sum()), int(history.seen("activation_rms", 1).sum())
        causes, remedies = nonfinite_advice(history, step)
        output = number(value) if np.isnan(value) or not units.any() else "infinite, or beyond 1e19, where squares in float32 are"
        message = f"the output is {output}, although the input is finite" + (f"; {many[0]} of {many[1]} modules are not finite" if many[0] else "")
        evidence = (Evidence("root mean square" if units.any() else "largest logit", value),)
        return Finding(self.diagnosis, self._severity(history, step, value, signal), step, where, message, evidence, causes, remedies)

    def _severity(self, history: History, step: int, value: float, signal: str) -> Severity:
        harmless = _loss_is_finite(history, step) and not _sick(history, "grad_norm").any()
        if harmless:
            return Severity.WARNING if np.isnan(value) else Severity.INFO
        if _scaler(history) and sick_run(history, signal) < self.overflows:
            return Severity.WARNING
        return Severity.HALT

    @staticmethod
    def _name(history: History, signal: str, site: int) -> str:
        if signal == "logit_peak":
            return f"logits of {history.heads[site] if site < len(history.heads) else site}"
        if site >= len(history.units):
            return f"module call {site}"
        unit = history.units[site]
        return f"{unit.name} ({unit.kind}, forward)"


@rule
@dataclass(frozen=True)
class NonfiniteGradient:
    """nonfinite_gradient: gradients are NaN or Inf; names the first in backward order (survey, exact test).

    Law: any non-finite gradient, before clipping. A loss scaler meets infinities by design while it searches its scale: then only 8 in a
    row after the first 20 steps are a fault.

    Why: an exploding gradient; a derivative that does not exist (root of 0, norm of a zero vector, 0/0 hidden by torch.where); a
    non-finite activation or input.
    Do: learning rate divided by 10 and clip the gradient norm; sqrt(x + 1e-8); mask the argument and not the result of torch.where; arm
    skip={"nonfinite_gradient"} to leave single updates out.
    False alarm: none without a loss scaler, the test is exact; with one, give it as Guard(scaler=...), so that its search is known.
    """

    diagnosis: ClassVar[str] = "nonfinite_gradient"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)
    skips: int = 8  # samples in a row under a loss scaler; survey
    search: int = 20  # steps in which a loss scaler looks for its scale (65536 halves at most 16 times); survey
    grace: int = 0  # steps; exact test
    patience: int = 1  # samples; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if history.sound:
            return None
        sick = _sick(history, "grad_norm")
        if not sick.any():
            return None
        run = sick_run(history, "grad_norm")
        if _scaler(history) and not lasting(history, run, self.skips, self.search):
            return None
        step, bad = int(history.steps(1)[0]), np.flatnonzero(sick[0])
        first = history.params[int(bad[-1])].name
        measured = int(history.seen("grad_norm", 1).sum())
        causes, remedies = nonfinite_advice(history, step)
        message = f"first in backward order; {bad.size} of {measured} parameters have a non-finite gradient" + (f", {run} samples in a row" if run > 1 else "")
        limit = float(self.skips) if _scaler(history) else 0.0
        evidence = (Evidence("non-finite gradients", float(bad.size), 0.0), Evidence("samples in a row", float(run), limit))
        return Finding(self.diagnosis, Severity.HALT, step, f"{first} (backward)", message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class NonfiniteWeight:
    """nonfinite_weight: parameters, or the updates applied to them, are NaN or Inf (survey, exact test).

    Law: any non-finite value in a trained parameter or in its last update. The run is lost from there on.

    Why: an update with a non-finite gradient; an optimizer whose moments overflowed; a checkpoint that was already broken.
    Do: go back to a checkpoint before the step named; learning rate divided by 10; arm skip={"nonfinite_gradient"}; check a checkpoint
    with torch.isfinite before it is saved.
    False alarm: none known, the test is exact and looks at trained parameters only.
    """

    diagnosis: ClassVar[str] = "nonfinite_weight"
    reads: ClassVar[tuple[str, ...]] = ("weight_norm", "update_norm")
    grace: int = 0  # steps; exact test
    patience: int = 1  # samples; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if history.sound:
            return None
        weights, updates = _sick(history, "weight_norm"), _sick(history, "update_norm")
        if not weights.any() and not updates.any():
            return None
        step = int(history.steps(1)[0])
        signal, sick = ("weight_norm", weights) if weights.any() else ("update_norm", updates)
        bad = np.flatnonzero(sick[0])
        when = "" if weights.any() else " after this step's update"
        causes, remedies = nonfinite_advice(history, step)
        message = f"{bad.size} of {int(history.seen(signal, 1).sum())} parameters are not finite{when}: the run is lost from here on"
        evidence = (Evidence(signal.replace("_", " "), float(history.last(signal, 1)[0, bad[0]])),)
        return Finding(self.diagnosis, Severity.HALT, step, history.params[int(bad[0])].name, message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class NonfiniteLoss:
    """nonfinite_loss: the loss is NaN or Inf; says the exact step and which of four causes (survey, exact test).

    Law: any non-finite loss. Halts if it lasts for two steps, or if gradients (without a loss scaler) or weights are not finite. A single
    one with sound weights warns: a batch whose labels are all ignored, or an overflow that the loss scaler skipped.

    Why: an exploding gradient (the loss grew before); the loss function (log of 0, division by 0, labels out of range); a bad batch; bad
    weights. The measurements of the run tell which, and they rank the causes.
    Do: exploding: learning rate divided by 10, clip the gradient norm; loss function: log(p + 1e-8), divisors of at least 1e-8, labels in
    range; bad batch: repair or drop it; bad weights: an earlier checkpoint.
    False alarm: a batch in which every label is ignored gives 0/0 once: a warning, not a halt.
    """

    diagnosis: ClassVar[str] = "nonfinite_loss"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    lasting: int = 2  # non-finite losses in a row that halt; one alone may be an empty batch
    grace: int = 0  # steps; exact test
    patience: int = 1  # answers; exact test

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        fresh = history.fresh_losses
        losses = history.losses(fresh)
        fine = np.isfinite(losses)
        if fine.all():
            return None
        bad, steps = np.flatnonzero(~fine), history.loss_steps(fresh)
        step, value = int(steps[bad[0]]), float(losses[bad[0]])
        term = self._term(history, step)
        causes, remedies = nonfinite_advice(history, self._since(history, step))
        newest = history.losses(self.lasting)
        lasts = newest.size >= self.lasting and not np.isfinite(newest).any()
        message = f"the loss is {number(value)}" + (f"; its term {term!r} is the first that is not finite" if term else "")
        message += f"; batch {step} is finite" if self._input_known_good(history, step) else ""
        past = history.losses()[history.loss_steps() < step]
        past = past[np.isfinite(past)]
        evidence = (Evidence("loss", value), *((Evidence("last finite loss", float(past[-1])),) if past.size else ()))
        severity = Severity.HALT if lasts or self._ruined(history) else Severity.WARNING
        return Finding(self.diagnosis, severity, step, f"loss term {term}" if term else "loss", message, evidence, causes, remedies)

    @staticmethod
    def _since(history: History, step: int) -> int:
        """Where the run of non-finite losses began that this step belongs to: its cause lies there."""
        steps = history.loss_steps()
        finite = np.isfinite(history.losses()) & (steps < step)
        after = steps[steps > steps[finite].max(initial=-1)]
        return int(after[0]) if after.size else step

    @staticmethod
    def _ruined(history: History) -> bool:
        if not history.samples:
            return False
        weights = _sick(history, "weight_norm").any() or _sick(history, "update_norm").any()
        return bool(weights or (_sick(history, "grad_norm").any() and not _scaler(history)))

    @staticmethod
    def _term(history: History, step: int) -> str:
        at = row_at(history, step)
        bad = [name for name in history.terms if at is not None and np.isinf(history.term(name)[at])]
        bad += [name for name in history.terms if at is not None and np.isnan(history.term(name)[at])]
        return bad[0] if bad and len(history.terms) > 1 else ""

    @staticmethod
    def _input_known_good(history: History, step: int) -> bool:
        at = row_at(history, step)
        return at is not None and history.inputs()[at] == 1 and not input_is_bad(history, step)
