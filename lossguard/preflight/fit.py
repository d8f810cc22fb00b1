"""The check that trains a copy on one tiny batch to the end. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.findings import Cause, Evidence, Finding, Remedy, number
from lossguard.preflight.bench import Bench, Twin
from lossguard.preflight.chance import chance, constant, floor, right
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.listen import BINARY, CLASSIFIES, REGRESSES, LossCall
from lossguard.preflight.loss import data_call
from lossguard.preflight.take import chosen, joined, sizes, tensors
from lossguard.preflight.trial import trial


@check
@dataclass(frozen=True)
class CannotOverfitBatch:
    """cannot_overfit_batch: the model cannot learn even a few samples by heart (survey, cannot_overfit_batch).

    A copy is trained by Adam on a few samples of the first batch, dropout off, without weight decay, at several learning rates in turn until one
    brings the loss near the least it can reach on these targets, or the labels right. The yardstick is the best constant answer: a model
    that gives all samples the same output stays there.

    Why: gradients that do not reach the weights, dead or symmetric units, a wrong output activation, inputs or targets out of scale,
        labels that do not belong to their inputs, a model too small.
    Do: first what the other checks found; else follow the gradient from the loss to the first layer; look at the samples and their labels.
    False alarm: the number of samples follows the number of weights, equal inputs are left out, soft labels have their own floor. Losses whose
        least value is not known, random losses and models too slow for the time budget are not judged.
    """

    diagnosis: ClassVar[str] = "cannot_overfit_batch"
    near: float = 0.05  # of the best constant answer's loss above the floor: learned; survey
    right: float = 0.95  # share of right labels: learned; survey
    far: float = 0.3  # of the best constant answer's loss above the floor: not learned; our own choice, between is "cannot tell"
    steps: int = 300  # for each learning rate; survey
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1e-4)  # of Adam; survey has 1e-3 with a retry
    samples: int = 8  # at most; survey has 16 to 32, fewer are easier for a healthy model and as hard for a broken one
    dense_samples: int = 2  # where a sample has many targets: sequences with equal beginnings contradict each other; our own choice
    alike: float = 0.1  # of chance: a constant answer this good leaves nothing to learn by heart; our own choice
    weights: int = 50  # trainable elements per sample; our own choice
    share: float = 0.45  # of the time budget

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if not bench.sound:
            return unknown(bench.why_no_pass)
        call = data_call(bench.sound[0])
        if call is None or call.family not in (*CLASSIFIES, *BINARY, *REGRESSES) or (call.input.shape != call.target.shape and call.family in REGRESSES):
            return unknown("the least value of this loss is not known")
        if any(not math.isfinite(p.loss) for p in bench.sound):
            return unknown("the first loss is not finite")
        batch = self._tiny(bench, call)
        end = bench.deadline(self.share)
        best, said = math.inf, ""
        reference = base = math.nan
        for rate in self.rates:
            with bench.twin() as twin:
                first = [twin.try_run(batch), twin.try_run(batch)]
                tiny = data_call(first[0])
                if tiny is None or abs(first[0].loss - first[1].loss) > 1e-3 * abs(first[0].loss):
                    return unknown(first[0].error or "the loss is random: two equal passes differ")
                base, reference = floor(tiny), _constant_answer(tiny)
                if reference - base <= max(1e-6, self.alike * (chance(call) or 0.0)):
                    return unknown("these samples all have about the same target")
                excess, said = self._train(twin, batch, rate, end, base, reference)
            best = min(best, excess)
            if excess <= self.near:
                return passed(said)
            if time.monotonic() > end:
                return unknown(f"the time was over with {best:.0%} of the best constant answer's loss left")
        if best <= self.far:
            return unknown(f"{best:.0%} of the best constant answer's loss are left after {self.steps} steps")
        return failed(self._finding(bench, batch, best, base, reference))

    def _tiny(self, bench: Bench, call: LossCall) -> Any:
        """A few samples with different inputs, of as many classes as there are; the whole batch where it cannot be divided."""
        batch = bench.kept[0]
        alike = call.target.numel() < 2 or bool((call.target == call.target.reshape(-1)[0]).all())
        if (alike or call.family in REGRESSES) and len(bench.kept) > 1:
            try:
                batch = joined(bench.kept)
            except (ValueError, KeyError, IndexError):
                return batch
            call = self._call(bench, batch) or call
        found = sizes(batch)
        elements = sum(trial(bench).elements.values())
        if len(found) != 1:
            return batch
        n = next(iter(found))
        dense = call.target.numel() > n and call.family in CLASSIFIES
        most = self.dense_samples if dense else max(2, min(self.samples, elements // self.weights))
        inputs = [t for _, t in tensors(batch if not isinstance(batch, (list, tuple)) else batch[0]) if t.dim() and t.shape[0] == n]
        order = list(range(n))
        if call.target.numel() == n and call.family in (*CLASSIFIES, *BINARY):
            labels = call.target.reshape(-1).tolist()
            turn: dict[Any, int] = {}
            rank = [_next(turn, label) for label in labels]
            order = sorted(order, key=lambda i: (rank[i], i))
        elif call.family in REGRESSES and call.target.shape[0] == n and n > most:  # neighbours in time have equal targets: take them far apart
            ranked = call.target.reshape(n, -1).float().mean(1).argsort().tolist()
            order = [ranked[round(k * (n - 1) / (most - 1))] for k in range(most)]
        picked: list[int] = []
        for i in order:
            if len(picked) < most and not any(all(torch.equal(t[i], t[j]) for t in inputs) for j in picked if inputs):
                picked.append(i)
        return chosen(batch, picked)

    def _call(self, bench: Bench, batch: Any) -> LossCall | None:
        with bench.twin() as twin:
            return data_call(twin.try_run(batch))

    def _train(self, twin: Twin, batch: Any, rate: float, end: float, base: float, reference: float) -> tuple[float, str]:
        """The least share of the constant answer's loss that was left, and in words what was reached."""
        parameters = list(twin.trainable.values())
        optimizer = torch.optim.Adam(parameters, lr=rate)
        best = math.inf
        for step in range(self.steps):
            done = twin.run(batch, grad=True)
            call = data_call(done)
            if call is None or done.value is None or not math.isfinite(done.loss) or not done.value.requires_grad:
                return best, "the loss is not finite"
            excess = (float(call.value) - base) / (reference - base) if call.value is not None else math.inf
            best = min(best, excess)
            share = right(call)
            if excess <= self.near or (share >= self.right and excess <= 1.0):
                how = f"loss {number(done.loss)}" if excess <= self.near else f"{share:.0%} of the samples right"
                return min(excess, self.near), f"learned by heart in {step} steps of Adam at {rate:g}: {how}"
            if time.monotonic() > end:
                break
            _step(optimizer, done.value)
        return best, ""

    def _finding(self, bench: Bench, batch: Any, best: float, base: float, reference: float) -> Finding:
        n = next(iter(sizes(batch)), 1)
        evidence = [
            Evidence("share of the best constant answer's loss that is left", best, self.near),
            Evidence("best constant answer's loss", reference),
            Evidence("samples", n),
            Evidence("learning rates tried", len(self.rates)),
        ]
        advice = []
        for root in bench.found:
            if root.diagnosis != self.diagnosis and root.severity > 0 and root.diagnosis not in ("class_imbalance", "unshuffled_data", "validation_mismatch"):
                name = root.causes[0].name if root.causes else root.diagnosis
                advice.append((Cause(name, 0.9, f"see {root.diagnosis}: {root.message}"), list(root.remedies[:1])))
        if not advice:
            if best > 0.9:
                because = f"{best:.0%} of the constant answer's loss are left: the output hardly depends on the input"
                advice.append(
                    (
                        Cause("the same output for every sample", 0.7, because),
                        [Remedy("initialise by He, and look for units that are dead for all samples", {"init": "he"})],
                    )
                )
            else:
                advice.append(
                    (
                        Cause("too small a model, or gradients cut on the way", 0.5, f"{best:.0%} of the constant answer's loss are left"),
                        [Remedy("look for detach() and for layers without a gradient; else twice the width", {"width_factor": 2})],
                    )
                )
            advice.append(
                (
                    Cause("labels that do not belong to their inputs", 0.3, "inputs that differ little have different targets"),
                    [Remedy(f"look at the {n} samples by eye", {"look_at": n})],
                )
            )
        return finding(self.diagnosis, f"{n} samples of the first batch", "a copy could not learn them by heart", evidence, advice)


def _next(turn: dict[Any, int], label: Any) -> int:
    """How many samples of this label came before."""
    turn[label] = turn.get(label, -1) + 1
    return turn[label]


def _step(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()
    optimizer.step()


def _constant_answer(call: LossCall) -> float:
    """The loss of the best answer that is the same for every sample; chance where that is not known."""
    even = chance(call)
    known = math.inf if even is None else even
    if call.hard and call.reduction == "mean" and call.given.get("weight") is None:
        valid = call.target[call.target != call.given.get("ignore_index", -100)]
        p = torch.unique(valid, return_counts=True)[1].double() / max(valid.numel(), 1)
        return min(known, max(float(-(p * p.log()).sum()), floor(call)))
    if call.family in BINARY:
        mean = constant(call.target.float()).clamp(1e-4, 1 - 1e-4)
        return float(call.again(input=torch.logit(mean) if call.family == "bce_logits" else mean))
    return known
