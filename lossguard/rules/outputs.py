"""What stands between the last layer and the loss. History in, finding or None out; numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lossguard.advice import ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.host.history import History
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class SquashedLogits:
    """wrong_output_activation: a loss that takes logits is given what a softmax or a sigmoid made (survey, wrong_output_activation).

    Law: in the graph behind the first recorded loss a softmax or a sigmoid feeds ``cross_entropy`` or
    ``binary_cross_entropy_with_logits``, with nothing but views between. Exact; no number decides. The loss squashes once more, so that
    it cannot fall below ln(1 + (C - 1) / e) for C classes, and its gradients are those of outputs between 0 and 1.

    Why: a last activation that the loss already holds; a head copied from code whose loss took probabilities.
    Do: remove the activation and apply it at evaluation only, which lets the loss fall to 0 again; or take the loss on probabilities (``nll_loss`` of a
    log-softmax, ``binary_cross_entropy``).
    False alarm: none known. Probabilities that are scaled or passed through a logarithm first do not count; compiled code is not
    read. The check before the first step knows more kinds: ``lossguard.preflight``.
    """

    diagnosis: ClassVar[str] = "wrong_output_activation"
    reads: ClassVar[tuple[str, ...]] = ("squashed",)
    grace: int = 0  # steps; the graph is exact
    patience: int = 1  # samples; the same

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        where, activation, loss, classes = history.facts().get("squashed", ("", "", "", 0))
        if not activation:
            return None
        evidence = [Evidence("least loss that such outputs reach", math.log1p((classes - 1) / math.e))] if classes > 1 else []
        short = "cross entropy" if classes else "BCE with logits"
        remedy = Remedy(f"remove the {activation}: the loss holds {'a softmax' if classes else 'a sigmoid'} of its own", {"output_activation": "none"})
        causes, remedies = ranked([(Cause(f"{activation} before {short}", 0.9, "so says the graph of the loss"), [remedy])])
        message = f"the {loss} takes logits and is given what a {activation} made"
        step = int(history.steps(1)[0])
        return Finding(self.diagnosis, Severity.WARNING, step, where or "output", message, tuple(evidence), causes, remedies)
