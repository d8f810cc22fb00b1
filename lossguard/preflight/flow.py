"""Checks of the gradient's way: from the loss to every parameter, into an optimizer, and not between samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lossguard.device import roles
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.survey import WEIGHTED
from lossguard.preflight.trial import STEPS, Trial, trial


@check
@dataclass(frozen=True)
class UnreachedWeights:
    """unchanged_weights: a trainable parameter would not be trained (survey, unchanged_weights).

    A copy is trained for a few steps. Parameters that get a gradient must belong to an optimizer; layers that run must get a gradient,
    and one that is not zero at every step.

    Why: parameters added after the optimizer was made, an optimizer made for another copy, a detach or an argmax on the way, dead units.
    Do: give all parameters to the optimizer, remove the detach.
    False alarm: frozen parameters, modules that are not called, LoRA's zero half, zero heads and teachers are known and silent; a few unused
        weights are an info.
    """

    diagnosis: ClassVar[str] = "unchanged_weights"
    share: float = 0.1  # of the trainable elements that must be hit for a warning; our own choice: unused poolers are below 0.01

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        done = trial(bench)
        if done.cut:
            return failed(self._cut())
        missing = self._missing(bench, done)
        if missing is not None:
            return failed(missing)
        if done.error:
            return unknown(f"the model could not be trained for a few steps: {done.error}")
        found = self._unreached(bench, done)
        if found is not None:
            return failed(found)
        unused = f"; {len(done.absent)} are not used" if done.absent else ""
        return passed(f"{len(done.arrived)} of {len(done.elements)} trainable parameters get a gradient{unused}")

    def _cut(self) -> Finding:
        pair = (
            Cause("detached graph", 0.95, "the loss needs no gradient although parameters do"),
            [Remedy("look for detach(), .data, argmax, torch.no_grad or a new tensor made from the outputs on the way to the loss", {})],
        )
        return finding(self.diagnosis, "loss", "the loss depends on no trainable parameter", [Evidence("parameters reached", 0.0)], [pair])

    def _missing(self, bench: Bench, done: Trial) -> Finding | None:
        """Trainable, reached by the gradient, and held by no optimizer."""
        if not bench.optimizers:
            return None
        roster = roles.read(bench.model, bench.optimizers)
        names = [n for n in roster.missing if done.error or n in done.arrived]
        if isinstance(bench.criterion, nn.Module):
            held = {id(p) for o in bench.optimizers for g in o.param_groups for p in g["params"]}
            own = {id(p) for p in bench.model.parameters()}
            names += [
                f"criterion.{n}"
                for n, p in bench.criterion.named_parameters()
                if p.requires_grad and id(p) not in held | own and f"criterion.{n}" in done.arrived
            ]
        if not names:
            return None
        evidence = [
            Evidence("trainable parameters in no optimizer", len(names), 0),
            Evidence("parameters in the optimizer that are not the model's", roster.foreign),
        ]
        remedy = Remedy("give model.parameters() to the optimizer, after the model is complete and on its device", {"optimizer_parameters": True})
        if roster.foreign and len(roster.missing) == len(roster.trained):
            cause = Cause("the optimizer holds another model's parameters", 0.9, f"none of its {roster.foreign} parameters belong to this model")
        else:
            cause = Cause("not given to the optimizer", 0.95, f"{len(names)} parameters get a gradient, and no optimizer holds them")
        freeze = (Cause("meant to be frozen", 0.2, "they still ask for gradients"), [Remedy("requires_grad_(False) for them", {"freeze": True})])
        message = f"{len(names)} trainable parameters belong to no optimizer: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        return finding(self.diagnosis, names[0], message, evidence, [(cause, [remedy]), freeze])

    def _unreached(self, bench: Bench, done: Trial) -> Finding | None:
        """Layers that run and get no gradient, or a zero one."""
        layers = {n for n, m in bench.model.named_modules() if isinstance(m, WEIGHTED) and n in done.called}
        absent = [n for n in done.absent if n.rpartition(".")[0] in layers]
        # The recurrent weights of sequences of one step, and vectors such as a bias before a batch-norm, are zero by nature.
        zero = [n for n in done.zero if n.rpartition(".")[0] in layers and "weight_hh" not in n and "bias" not in n]
        roots = ("poor_initialization", "wrong_output_activation", "unnormalized_input")
        names = absent or ([] if any(bench.has(root) for root in roots) else zero)  # a zero gradient follows from these
        if not names:
            return None
        share = sum(done.elements[n] for n in names) / sum(done.elements.values())
        evidence = [Evidence("share of the trainable elements", share, self.share), Evidence("parameters without a gradient", len(names), 0)]
        if absent:
            message = f"no gradient reaches {len(names)} parameters of layers that run"
            advice = [
                (
                    Cause("detached graph", 0.8, "the layers run, but nothing leads back from the loss to them"),
                    [Remedy(f"look for detach(), .data or torch.no_grad after {absent[-1].rpartition('.')[0]!r}", {"parameter": absent[-1]})],
                ),
                (
                    Cause("output not used", 0.4, "their output may not enter the loss"),
                    [Remedy("requires_grad_(False) for them, or leave them out", {"freeze": True})],
                ),
            ]
        else:
            message = f"the gradient of {len(names)} weights is exactly zero for {STEPS} steps"
            advice = [
                (Cause("dead units", 0.8, "no sample passes through these layers"), [Remedy("initialise weights by He and biases by zero", {"init": "he"})])
            ]
        return finding(self.diagnosis, names[0], message, evidence, advice, Severity.WARNING if share > self.share else Severity.INFO)
