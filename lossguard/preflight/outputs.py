"""The check of the activation before the loss. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lossguard.findings import Cause, Evidence, Remedy, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.labels import calls
from lossguard.preflight.listen import CLASSIFIES, REGRESSES, LossCall
from lossguard.rules.outputs import WRONG_AXIS

# What an activation lets through: its autograd name -> (lowest, highest) value.
RANGES = {
    "Relu": (0.0, math.inf),
    "Sigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Softplus": (0.0, math.inf),
    "LogSoftmax": (-math.inf, 0.0),
    "LogSigmoid": (-math.inf, 0.0),
    "Exp": (0.0, math.inf),
    "Hardsigmoid": (0.0, 1.0),
}
SAYS = {"Relu": "ReLU", "LogSoftmax": "log-softmax", "Hardtanh": "hardtanh"}


@check
@dataclass(frozen=True)
class WrongOutputActivation:
    """wrong_output_activation: the last operation does not fit the loss (survey, wrong_output_activation).

    Read from the graph behind what the loss function got, through views: softmax, sigmoid, tanh or ReLU before cross entropy; sigmoid or
    softmax before a binary cross entropy with logits; no log-softmax before the negative log likelihood, or one over another dimension than
    the classes; no sigmoid before the binary cross entropy of probabilities; a bounded activation before a regression whose targets lie
    outside; a softmax over one value.

    Why: a loss that already holds the activation, a softmax over the batch or the places (dim=0), a head copied from another task, a
        regression with the last activation of a classifier.
    Do: remove the last activation, or take the loss that goes with it.
    False alarm: log-softmax before cross entropy changes nothing and is silent. Bounded outputs that are scaled afterwards are not last. Targets
        that lie inside the range are fine. A ReLU before cross entropy that is meant: mute it.
    """

    diagnosis: ClassVar[str] = "wrong_output_activation"
    outside: float = 0.05  # share of targets out of reach; survey
    sum_off: float = 1e-3  # by how much probabilities may miss a sum of 1; survey
    values: int = 100  # outputs needed before their values count as evidence; survey

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        heard = calls(bench)
        if not heard:
            return unknown(bench.why_no_pass if not bench.sound else "the loss calls no known loss function, or several")
        call = heard[0]
        last = call.last.name
        pair = self._classes(heard) if call.family in CLASSIFIES else self._binary(call) if call.family in ("bce", "bce_logits") else None
        if call.family in REGRESSES:
            pair = self._regression(heard)
        if call.last.size == 1:
            pair = (
                "a softmax over one value is always 1",
                "softmax over one value",
                "use a sigmoid, or two outputs",
                "none",
                [Evidence("size of the softmax's dimension", 1.0, 2.0)],
            )
        if pair is None:
            return passed(f"{SAYS.get(last, last.lower()) or 'no activation'} before {call.family.replace('_', ' ')}")
        message, name, remedy, output, evidence = pair
        advice = [
            (
                Cause(name, 0.9, f"the last operation before the loss is {SAYS.get(last, last.lower()) or 'not read'}"),
                [Remedy(remedy, {"output_activation": output})],
            )
        ]
        return failed(finding(self.diagnosis, "output", message, evidence, advice))

    def _classes(self, heard: list[LossCall]) -> tuple[str, str, str, str, list[Evidence]] | None:
        call = heard[0]
        last = call.last.name
        sums = torch.cat([c.input.float().exp().sum(1 if c.input.dim() > 1 else 0).reshape(-1) for c in heard])
        if call.family == "nll":
            worst = float((sums - 1).abs().max())
            if worst <= self.sum_off * 10:
                return None
            if last == "LogSoftmax":  # it is there, and its probabilities sum to one over another dimension
                return (
                    "the log-softmax does not run over the classes",
                    WRONG_AXIS,
                    "log_softmax(dim=1): the dimension of the classes",
                    "log_softmax",
                    [
                        Evidence("largest distance from 1 of the probabilities summed over the classes", worst, self.sum_off * 10),
                        Evidence("size of the softmax's dimension", float(call.last.size), float(call.classes)),
                    ],
                )
            name = "softmax before the negative log likelihood" if last == "Softmax" else "log_softmax missing"
            return (
                "the negative log likelihood needs log-probabilities",
                name,
                "use log_softmax, or nn.CrossEntropyLoss on the logits",
                "log_softmax",
                [Evidence("largest distance from 1 of the summed probabilities", worst, self.sum_off * 10)],
            )
        if call.classes == 1:
            return (
                "cross entropy of a single output is always 0",
                "single output",
                "use two outputs, or BCEWithLogitsLoss",
                "none",
                [Evidence("outputs", 1.0, 2.0)],
            )
        words = {"Softmax": "softmax", "Sigmoid": "sigmoid", "Relu": "ReLU", "Tanh": "tanh", "Hardsigmoid": "sigmoid", "Hardtanh": "hardtanh"}
        name = words.get(last, "")
        if not name and not last and self._probabilities(heard):
            name = "softmax"
        if not name:
            return None
        low, high = float(call.input.min()), float(call.input.max())
        return (
            f"{name} before cross entropy, which takes logits",
            f"{name} before cross entropy",
            f"remove the {name}: cross entropy holds a softmax of its own",
            "none",
            [Evidence("smallest output", low), Evidence("largest output", high), Evidence("least loss it can reach", _least(call))],
        )

    def _probabilities(self, heard: list[LossCall]) -> bool:
        """By value, where the graph cannot be read: rows that are not negative and sum to one in every batch."""
        rows = [c.input.float() for c in heard if c.input.dim() > 1]
        return (
            len(rows) == len(heard)
            and sum(r.numel() for r in rows) > self.values
            and all(bool((r >= 0).all()) and float((r.sum(1) - 1).abs().max()) <= self.sum_off for r in rows)
        )

    def _binary(self, call: LossCall) -> tuple[str, str, str, str, list[Evidence]] | None:
        low, high = float(call.input.min()), float(call.input.max())
        evidence = [Evidence("smallest output", low), Evidence("largest output", high)]
        if call.family == "bce":
            if low >= 0 and high <= 1:
                return None
            return (
                "binary cross entropy takes probabilities, the outputs are none",
                "sigmoid missing",
                "use BCEWithLogitsLoss on the outputs",
                "sigmoid",
                evidence,
            )
        name = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Hardsigmoid": "sigmoid", "Relu": "ReLU"}.get(call.last.name, "")
        if not name:
            return None
        return (
            f"{name} before a binary cross entropy with logits",
            f"{name} before BCE with logits",
            f"remove the {name}: the loss holds a sigmoid of its own",
            "none",
            evidence,
        )

    def _regression(self, heard: list[LossCall]) -> tuple[str, str, str, str, list[Evidence]] | None:
        call = heard[0]
        bounds = call.last.bounds if call.last.name == "Hardtanh" else RANGES.get(call.last.name)
        if bounds is None:
            return None
        targets = torch.cat([c.target.reshape(-1).float() for c in heard])
        slack = 1e-3  # targets scaled to the bound may miss it by rounding
        outside = float(((targets < bounds[0] - slack) | (targets > bounds[1] + slack)).float().mean())
        if outside <= self.outside:
            return None
        name = SAYS.get(call.last.name, call.last.name.lower())
        evidence = [
            Evidence("share of targets out of reach", outside, self.outside),
            Evidence("smallest target", float(targets.min())),
            Evidence("largest target", float(targets.max())),
        ]
        return (
            f"a {name} gives {number(bounds[0])} to {number(bounds[1])}, {outside:.0%} of the targets lie outside",
            f"{name} before a regression",
            f"remove the {name} from the last layer",
            "none",
            evidence,
        )


def _least(call: LossCall) -> float:
    """The loss of a perfect prediction within the bounds of the activation: cross entropy of logits in [low, high]."""
    low, high = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}.get(call.last.name, (0.0, math.inf))
    return math.log1p((call.classes - 1) * math.exp(low - high)) if math.isfinite(high) else 0.0
