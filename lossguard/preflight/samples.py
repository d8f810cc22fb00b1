"""The check that samples do not reach into each other. The bench flows in, an answer flows out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossguard.findings import Cause, Evidence, Remedy
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.take import chosen, sizes, tensors
from lossguard.rules.outputs import WRONG_AXIS

LEAST = 3  # samples: one that is exchanged, one in its place, one that is watched


@check
@dataclass(frozen=True)
class CrossSampleLeak:
    """cross_sample_leak: the output for one sample depends on the other samples of its batch (survey).

    In eval mode and without dropout, one sample of a batch is exchanged for a copy of another: the outputs of the rest must stay as they are.

    Why: batch_first=False with batches first, a softmax, mean or attention over dimension 0, a reshape or view that mixes the batch with
        another dimension.
    Do: give the right order of dimensions, reduce over features or places instead of dimension 0, transpose before a view.
    False alarm: it is tested only where each sample has its own input and label and there is more than one batch, so that graphs of nodes
        and losses over whole batches are silent; so are models that are random in eval mode. Retrieval within the batch by design: mute it.
    """

    diagnosis: ClassVar[str] = "cross_sample_leak"
    leak: float = 1e-4  # change of the other samples' outputs over the outputs' scale; our own choice: float32 rounding is below 1e-5
    samples: int = 8  # samples of the batch in which one is exchanged; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if bench.has("wrong_output_activation", WRONG_AXIS):
            return unknown("a softmax over the samples ties them together: repair it first")
        call = bench.sound[0].calls[0] if bench.sound and len(bench.sound[0].calls) == 1 else None
        n = next(iter(sizes(bench.kept[0])), 0) if len(sizes(bench.kept[0])) == 1 else 0
        if call is None or n < LEAST or call.target.numel() != n:
            return unknown("samples cannot be told apart: not one input and one target each, or fewer than three" if bench.sound else bench.why_no_pass)
        if bench.sample.complete and bench.sample.looked_at == 1:
            return unknown("one batch is all there is: its rows may be nodes of a graph")
        m = min(n, self.samples)
        with bench.twin() as twin:
            plain = [
                _output(twin.try_run(chosen(bench.kept[0], order), mode="eval", quiet=True).outputs, m)
                for order in (list(range(m)), list(range(m)), [m - 1, *range(1, m)])
            ]
        base, again, changed = plain
        if base is None or again is None or changed is None or not torch.equal(base, again) or not bool(torch.isfinite(base).all()):
            return unknown("the model is random, its outputs are not finite, or not one row a sample")
        scale = float(base.square().mean().sqrt())
        moved = float((changed[1:] - base[1:]).abs().max()) / max(scale, 1e-12)
        if moved <= self.leak:
            return passed(f"exchanging one sample moves the others' outputs by {moved:.1g} of their scale")
        wrong = [name for name, module in bench.model.named_modules() if getattr(module, "batch_first", None) is False]
        evidence = [Evidence("change of the other samples' outputs over the outputs' scale", moved, self.leak)]
        if wrong:
            cause = Cause("samples leak into each other", 0.9, f"{wrong[0]!r} has batch_first=False, and the batch is the first dimension here")
            remedies = [Remedy(f"batch_first=True in {wrong[0]!r}", {"batch_first": True, "parameter": wrong[0]})]
        else:
            cause = Cause(
                "samples leak into each other", 0.7, "an operation runs over the batch dimension (softmax, mean, reshape or attention over dimension 0)"
            )
            remedies = [Remedy("look for dim=0, and for views that mix the batch with another dimension", {})]
        message = "exchanging one sample changes the outputs of the others"
        return failed(finding(self.diagnosis, wrong[0] if wrong else "model", message, evidence, [(cause, remedies)]))


def _output(outputs: Any, n: int) -> Tensor | None:
    """The first tensor of the outputs if it has one row a sample."""
    found = next((t for _, t in tensors(outputs)), None)
    return found.float() if found is not None and found.dim() > 0 and found.shape[0] == n else None
