"""What stands between the last layer and the loss. History in, finding or None out; numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lossguard.advice import ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.host.history import History
from lossguard.rules.rule import rule

WRONG_AXIS = "softmax over the wrong axis"


def broadcast(outputs: tuple[int, ...], targets: tuple[int, ...]) -> tuple[Cause, list[Remedy]]:
    """What shapes are to blame where outputs and targets were broadcast into each other, and what makes them one."""
    cause = Cause("shapes are broadcast", 0.95, f"outputs {outputs}, targets {targets}: each output is compared with other samples' targets")
    return cause, [Remedy("use targets.view_as(outputs)", {"labels": "repair"})]


@rule
@dataclass(frozen=True)
class SquashedLogits:
    """wrong_output_activation: a loss that takes logits is given what a softmax or a sigmoid made (survey, wrong_output_activation).

    Law: in the graph behind the first recorded loss a softmax or a sigmoid feeds ``cross_entropy`` or
    ``binary_cross_entropy_with_logits``, with nothing but views between. Exact; no number decides. The loss squashes once more, so that
    it cannot fall below ln(1 + (C - 1) / e) for C classes, and its gradients are those of outputs between 0 and 1. Law (axis): the
    softmax before ``nll_loss`` runs over another dimension than the classes, of another size. Law (divergence): ``kl_div``, which takes
    log-probabilities for its input, is given what a softmax made: such a loss is below 0 and has its least value elsewhere.

    Why: a last activation that the loss already holds; a head copied from code whose loss took probabilities; ``softmax`` without a
        ``dim``, which takes the first dimension of three.
    Do: remove the activation and apply it at evaluation only, which lets the loss fall to 0 again; or take the loss on probabilities (``nll_loss`` of a
    log-softmax, ``binary_cross_entropy``). Let the softmax run over the classes: ``dim=-1`` or ``dim=1``.
    False alarm: none known. Probabilities that are scaled or passed through a logarithm first do not count; compiled code is not
    read. The check before the first step knows more kinds: ``lossguard.preflight``.
    """

    diagnosis: ClassVar[str] = "wrong_output_activation"
    reads: ClassVar[tuple[str, ...]] = ("squashed", "axis")
    grace: int = 0  # steps; the graph is exact
    patience: int = 1  # samples; the same

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        where, activation, loss, classes = history.facts().get("squashed", ("", "", "", 0))
        if not activation:
            return self._axis(history)
        if loss == "KL divergence":
            return self._divergence(history, where)
        evidence = [Evidence("least loss that such outputs reach", math.log1p((classes - 1) / math.e))] if classes > 1 else []
        short = "cross entropy" if classes else "BCE with logits"
        remedy = Remedy(f"remove the {activation}: the loss holds {'a softmax' if classes else 'a sigmoid'} of its own", {"output_activation": "none"})
        causes, remedies = ranked([(Cause(f"{activation} before {short}", 0.9, "so says the graph of the loss"), [remedy])])
        message = f"the {loss} takes logits and is given what a {activation} made"
        step = int(history.steps(1)[0])
        return Finding(self.diagnosis, Severity.WARNING, step, where or "output", message, tuple(evidence), causes, remedies)

    def _divergence(self, history: History, where: str) -> Finding:
        """Law (divergence)."""
        remedy = Remedy("log_softmax in the place of the softmax", {"output_activation": "log_softmax"})
        causes, remedies = ranked([(Cause("softmax before a KL divergence", 0.9, "so says the graph of the loss"), [remedy])])
        message = "the KL divergence takes log-probabilities and is given what a softmax made"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(1)[0]), where or "output", message, (), causes, remedies)

    def _axis(self, history: History) -> Finding | None:
        """Law (axis)."""
        dim, size, classes = history.facts().get("axis", (0, 0, 0))
        if not size:
            return None
        because = f"it runs over dimension {dim} of size {size}, and the loss takes {classes} classes"
        causes, remedies = ranked([(Cause(WRONG_AXIS, 0.95, because), [Remedy("softmax over the classes: dim=-1", {"output_activation": "log_softmax"})])])
        message = "the softmax before the loss does not run over the classes"
        evidence = (Evidence("size of the softmax's dimension", float(size), float(classes)),)
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(1)[0]), "output", message, evidence, causes, remedies)


@rule
@dataclass(frozen=True)
class PairedTargets:
    """invalid_labels: each output is compared with the targets of all samples (survey, invalid_labels).

    Law: in the graph behind the first recorded loss a squared, absolute or Huber error, or a mean or a sum, is taken of n x n
    differences or products, which n outputs of shape (n,) or (n, 1) and n constant targets of the other shape gave when they were
    broadcast. Exact; no number decides. Such a loss is least where every output answers to the mean of all targets.

    Why: a head with one output gives (n, 1), and the targets of a loader are (n,); a missing squeeze.
    Do: bring both to one shape: ``outputs.squeeze(-1)``, or ``targets.view_as(outputs)``.
    False alarm: a mean distance over all pairs that is meant, and written as (n, 1) less (1, n) with nothing beside it: mute it. Pairs in an energy
        distance, optimal transport, ranking or kernels stand in differences, are weighted, masked or given their dimensions by an
        ``unsqueeze``, and are not counted; compiled losses are not read. The check before the first step knows more faults of labels.
    """

    diagnosis: ClassVar[str] = "invalid_labels"
    reads: ClassVar[tuple[str, ...]] = ("paired",)
    grace: int = 0  # steps; the graph is exact
    patience: int = 1  # samples; the same

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        given, n = history.facts().get("paired", ((), 0))
        if not n:
            return None
        targets = (n,) if len(given) > 1 else (n, 1)
        causes, remedies = ranked([broadcast(tuple(given), targets)])
        evidence = (Evidence("pairs compared", float(n * n), float(n)),)
        message = "outputs and targets have different shapes"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(1)[0]), "targets", message, evidence, causes, remedies)
