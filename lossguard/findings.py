"""What the guard says: findings, their parts, and the table of diagnoses. Standard library only.

Numbers flow in from rules; text and dictionaries flow out to people, records and exceptions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from lossguard import notebook


class Severity(IntEnum):
    """How grave a finding is; members compare in this order.

    >>> Severity.INFO < Severity.WARNING < Severity.ERROR < Severity.HALT
    True
    >>> Severity.parse("warning")
    <Severity.WARNING: 1>
    """

    INFO = 0
    WARNING = 1
    ERROR = 2
    HALT = 3

    @property
    def label(self) -> str:
        """The lower-case name that people read."""
        return self.name.lower()

    @classmethod
    def parse(cls, value: str | Severity) -> Severity:
        """The severity of that name; ``ValueError`` with the known names otherwise."""
        if isinstance(value, Severity):
            return value
        try:
            return cls[value.upper()]
        except KeyError:
            known = ", ".join(s.label for s in cls)
            raise ValueError(f"unknown severity {value!r}; expected one of: {known}") from None


# diagnosis -> (severity unless the evidence says otherwise, one sentence). One name everywhere.
DIAGNOSES: dict[str, tuple[Severity, str]] = {
    "nonfinite_loss": (Severity.HALT, "the loss is NaN or infinite"),
    "nonfinite_input": (Severity.HALT, "a batch holds NaN or infinite values"),
    "nonfinite_activation": (Severity.HALT, "a module's output is NaN or infinite although its input is finite"),
    "nonfinite_gradient": (Severity.HALT, "gradients are NaN or infinite"),
    "nonfinite_weight": (Severity.HALT, "weights are NaN or infinite"),
    "exploding_gradient": (Severity.WARNING, "the gradient norm has grown far beyond its own past"),
    "vanishing_gradient": (Severity.WARNING, "gradients all but disappear on their way to some layers"),
    "update_ratio_high": (Severity.WARNING, "updates are so large that they rewrite the weights"),
    "update_ratio_low": (Severity.WARNING, "updates are so small that the weights hardly move"),
    "unchanged_weights": (Severity.WARNING, "trainable weights do not change at all"),
    "missing_zero_grad": (Severity.WARNING, "gradients are never cleared and add up over steps"),
    "clipping_dominates": (Severity.WARNING, "gradient clipping, not the learning rate, sets the step size"),
    "dead_relu": (Severity.WARNING, "ReLU units are silent for every sample of a whole window"),
    "saturated_activation": (Severity.WARNING, "sigmoid or tanh units sit at their rails"),
    "collapsed_activation": (Severity.WARNING, "a layer gives the same output for every sample"),
    "saturated_softmax": (Severity.WARNING, "the softmax is one-hot and wrong, or its logits are out of scale"),
    "loss_spike": (Severity.WARNING, "the loss jumped far above its recent past"),
    "diverging_loss": (Severity.WARNING, "the loss rises and stays above where it was"),
    "constant_loss": (Severity.WARNING, "the loss does not change from batch to batch"),
    "loss_plateau": (Severity.WARNING, "the loss has not fallen since the start"),
    "oscillating_loss": (Severity.WARNING, "the loss fell and then bounces at a height"),
    "negative_loss": (Severity.WARNING, "the loss is negative though it cannot be"),
    "overfitting": (Severity.WARNING, "training goes on falling and validation does not"),
    "validation_mismatch": (Severity.WARNING, "validation does not behave as data of the same kind would"),
    "learning_bottleneck": (Severity.WARNING, "neither curve moves any more at the full learning rate"),
    "validation_below_training": (Severity.INFO, "validation is the lower of the two curves"),
    "oscillating_validation": (Severity.WARNING, "validation swings up and down"),
    "skipped_steps": (Severity.WARNING, "optimizer steps are silently not applied"),
    "duplicate_batches": (Severity.WARNING, "the loader hands out each batch several times in a row"),
    "frozen_weights_changed": (Severity.WARNING, "the optimizer moves parameters that are declared frozen"),
    "overflow_risk": (Severity.WARNING, "activations or gradients come near the largest number of float16"),
    "poor_initialization": (Severity.WARNING, "the weights begin so that layers cannot learn"),
    "attention_logit_growth": (Severity.WARNING, "attention logits grow out of scale"),
    "initial_loss_off": (Severity.WARNING, "the first loss is far from what chance gives"),
    "cannot_overfit_batch": (Severity.WARNING, "the model cannot learn a few samples by heart"),
    "unnormalized_input": (Severity.WARNING, "inputs are far from zero mean and unit scale"),
    "invalid_labels": (Severity.WARNING, "the loss cannot take the labels as they are"),
    "class_imbalance": (Severity.WARNING, "some classes are starved"),
    "unshuffled_data": (Severity.WARNING, "samples come sorted by label"),
    "wrong_output_activation": (Severity.WARNING, "the last operation does not fit the loss"),
    "cross_sample_leak": (Severity.WARNING, "the output for one sample depends on the others of its batch"),
    "target_leak": (Severity.WARNING, "the model sees what it is asked for"),
    "replica_divergence": (Severity.HALT, "weights that are equal on all ranks of a data-parallel run are not"),
    "rank_outlier": (Severity.WARNING, "one rank's loss or gradient norm lies far from those of all others"),
    "stalled_training": (Severity.WARNING, "no step has ended for far longer than steps take"),
    "learning_rate_range": (Severity.INFO, "the learning rate lies at an edge of the range that works"),
}
OURS = frozenset(DIAGNOSES)  # those with a page in ``explain``; custom rules join the table later


def check_names(names: Iterable[str], argument: str, known: Iterable[str] | None = None) -> frozenset[str]:
    """The names as a set; ``ValueError`` with a suggestion for the first unknown one.

    >>> check_names({"loss_spike"}, "halt")
    frozenset({'loss_spike'})
    """
    known = sorted(DIAGNOSES if known is None else known)
    chosen = frozenset([names] if isinstance(names, str) else names)
    for name in sorted(chosen, key=str):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown diagnosis {name!r} in {argument}=; {hint}known: {', '.join(known)}")
    return chosen


@dataclass(frozen=True)
class Evidence:
    """One measured number behind a finding and, where there is one, the limit it is held against.

    >>> print(Evidence("gradient norm", 1878.0, limit=356.2))
    gradient norm 1878 (limit 356.2)
    """

    what: str
    value: float
    limit: float | None = None

    def __str__(self) -> str:
        text = f"{self.what} {number(self.value)}"
        return text if self.limit is None else f"{text} (limit {number(self.limit)})"


@dataclass(frozen=True)
class Cause:
    """A possible reason, the measurement that supports it, and a confidence in [0, 1].

    >>> print(Cause("learning rate too high", 0.8, "updates are 3 % of the weights"))
    learning rate too high (0.8): updates are 3 % of the weights
    """

    name: str
    confidence: float
    because: str

    def __str__(self) -> str:
        return f"{self.name} ({self.confidence:.1f}): {self.because}"


# What a remedy may change: the keys of ``Remedy.change`` and what their values are. Numbers and short words only.
CHANGES: dict[str, str] = {
    "lr": "the new learning rate",
    "lr_factor": "factor on a learning rate that is not known or on a schedule, and on all of the schedule",
    "momentum": "of the optimizer: SGD's momentum, Adam's first beta",
    "norm_momentum": "of batch-norm's running statistics",
    "max_norm": "value to clip the gradient norm at",
    "head_scale": "factor on the last layer's initial weights",
    "init": "initialisation: he, xavier, default",
    "bias": "initial bias",
    "activation": "relu, leaky_relu, gelu",
    "output_activation": "what stands before the loss: none, log_softmax",
    "add": "a part to add: normalization, residual, balance",
    "normalize_input": "True",
    "standardize_targets": "True",
    "zero_grad": "True: clear before each backward",
    "optimizer_parameters": "True: give all parameters to the optimizer",
    "optimizer_step": "True: call it after each backward",
    "batch_size": "samples",
    "shuffle": "True",
    "loss_reduction": "mean",
    "labels": "repair",
    "drop_column": "index of the input's column",
    "mask": "causal",
    "drop_batch": "index of the batch, or its step",
    "batch_of_step": "step whose batch to look at",
    "look_at": "how many samples to look at by eye",
    "eps": "the small number of an optimizer, of a guarded loss, or added to an operation's argument",
    "clamp": "bound of an operation's argument",
    "init_scale": "first scale of a loss scaler",
    "weight_decay": "value",
    "dropout": "probability",
    "epochs": "how many in all",
    "steps": "how many in all",
    "rewind_before": "step of the checkpoint to go back to",
    "master_weights": "True: float32 copies",
    "seed_workers": "True",
    "num_workers": "of the data loader",
    "dtype": "bfloat16, float32",
    "unfreeze": "True: let the gradient reach the weights",
    "freeze": "True",
    "temperature": "divisor of logits",
    "parameter": "name of the parameter or module meant",
    "train_mode": "True: call train() after each evaluation",
}


@dataclass(frozen=True)
class Remedy:
    """One thing to change. ``change`` holds the same advice for programs, in the keys of ``CHANGES``.

    >>> Remedy("learning rate 0.03 -> 0.003", {"lr": 0.003}).change["lr"]
    0.003
    """

    text: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Finding:
    """One event: what is ill, since when, where, by which numbers, why, and what to do.

    ``step`` is the guard step (0 for the first ``guard.step``) at which the fault shows in the data, -1 where it was found before the first step; ``count`` and
    ``last_step`` grow while the episode lasts. ``consequences`` are later findings that follow from this one.

    >>> print(Finding("loss_spike", Severity.WARNING, 12, "loss", "9 times its recent median"))
    lossguard: warning loss_spike at step 12
      seen in    loss: 9 times its recent median
      more       python -m lossguard explain loss_spike      silence: Guard(mute={"loss_spike"})
    """

    diagnosis: str
    severity: Severity
    step: int
    where: str
    message: str
    evidence: tuple[Evidence, ...] = ()
    causes: tuple[Cause, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    consequences: tuple[Finding, ...] = ()
    count: int = 1
    last_step: int | None = None
    note: str = ""

    def __str__(self) -> str:
        rows = [("seen in", f"{self.where}: {self.message}")]
        rows += [("measured", "; ".join(str(e) for e in self.evidence))] if self.evidence else []
        rows += [("cause" if i == 0 else "", str(c)) for i, c in enumerate(self.causes)]
        rows += [("try" if i == 0 else "", str(r)) for i, r in enumerate(self.remedies)]
        rows += [("then", "; ".join(f"{f.diagnosis} {f.when} ({f.where})" for f in self.consequences))] if self.consequences else []
        rows += [("kept", self.note)] if self.note else []
        call = "preflight(..., " if self.step < 0 else "Guard("
        silence = f'{call}mute={{"{self.diagnosis}"}})'
        rows += [("more", f"python -m lossguard explain {self.diagnosis}      silence: {silence}") if self.diagnosis in OURS else ("silence", silence)]
        again = f", {self.count} times until step {self.last_step}" if self.count > 1 and (self.last_step or 0) > self.step else ""
        head = f"lossguard: {self.severity.label} {self.diagnosis} {self.when}{again}"
        return "\n".join([head] + [f"  {label:<10} {text}" for label, text in rows])

    def _repr_html_(self) -> str:
        return notebook.of_finding(self)

    @property
    def when(self) -> str:
        """The step in words."""
        return "before the first step" if self.step < 0 else f"at step {self.step}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; non-finite numbers become the strings ``NaN``, ``Infinity``, ``-Infinity``."""
        return {
            "diagnosis": self.diagnosis, "severity": self.severity.label, "step": self.step, "where": self.where,
            "message": self.message, "count": self.count, "last_step": self.last_step, "note": self.note,
            "evidence": [{"what": e.what, "value": plain(e.value), "limit": plain(e.limit)} for e in self.evidence],
            "causes": [{"name": c.name, "confidence": c.confidence, "because": c.because} for c in self.causes],
            "remedies": [{"text": r.text, "change": {k: plain(v) for k, v in r.change.items()}} for r in self.remedies],
            "consequences": [f.to_dict() for f in self.consequences],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of :meth:`to_dict`."""
        return cls(
            diagnosis=data["diagnosis"], severity=Severity.parse(data["severity"]), step=data["step"],
            where=data["where"], message=data["message"], count=data["count"], last_step=data["last_step"], note=data["note"],
            evidence=tuple(Evidence(e["what"], float(e["value"]), None if e["limit"] is None else float(e["limit"])) for e in data["evidence"]),
            causes=tuple(Cause(**c) for c in data["causes"]),
            remedies=tuple(Remedy(**r) for r in data["remedies"]),
            consequences=tuple(cls.from_dict(f) for f in data["consequences"]),
        )  # fmt: skip


def number(value: float) -> str:
    """A number as people read it: at most 4 significant digits.

    >>> number(0.0000123456), number(2.30258), number(float("nan"))
    ('1.235e-05', '2.303', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}"


def plain(value: Any) -> Any:
    """The value for JSON, which knows neither NaN nor infinity.

    >>> plain(float("inf")), plain(1.5), plain("a")
    ('Infinity', 1.5, 'a')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
