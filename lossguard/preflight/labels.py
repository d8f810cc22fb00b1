"""The check of the labels: range, type and shape. The bench flows in, an answer flows out.

Labels are those that the loss function really gets, in the first batches; the loader's own targets, from many more batches,
are used where they are the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossguard.batches import split
from lossguard.findings import Cause, Evidence, Finding, Remedy, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.listen import BINARY, CLASSIFIES, REGRESSES, LossCall, total_of
from lossguard.rules.outputs import broadcast

Advice = list[tuple[Cause, list[Remedy]]]
PIXEL = 255.0  # the largest value of an 8-bit pixel


def calls(bench: Bench) -> list[LossCall]:
    """The calls of the loss function in the first batches, whether it took the labels or not."""
    return [p.calls[0] for p in bench.passes if len(p.calls) == 1]


def same_labels(bench: Bench) -> bool:
    """The loader's targets are the numbers that the loss function got."""
    heard = calls(bench)
    targets = split(bench.kept[0])[1] if bench.kept else None
    if not heard or not isinstance(targets, Tensor) or targets.numel() != heard[0].target.numel():
        return False
    return bool((heard[0].target.reshape(-1).to("cpu", torch.float64) == targets.reshape(-1).to("cpu", torch.float64)).all())


def in_order(bench: Bench) -> list[Tensor]:
    """One class number per sample, batch by batch; empty where the targets are something else."""
    heard = calls(bench)
    if bench.sample.dense or not bench.sample.labels or not same_labels(bench):
        return []
    return bench.sample.labels if heard[0].hard or heard[0].family in BINARY else []


@check
@dataclass(frozen=True)
class InvalidLabels:
    """invalid_labels: the loss function cannot take the labels, or takes them for something else (survey, invalid_labels).

    Class numbers must lie in [0, classes) or be the ignored index, and be integers; probabilities must lie in [0, 1] and sum to one;
    outputs and targets of a regression must have one shape (else they are broadcast against each other, also in a loss written by hand);
    not all labels may be ignored, nor all be of one class.

    Why: labels that start at 1; a padding value such as -1 or 255 that the loss does not know; a head with too few outputs; a missing squeeze.
    Do: subtract the smallest label, or say ignore_index= to the loss, or give the head max(label) + 1 outputs; bring both to one shape.
    False alarm: ignored indices, soft labels, multi-label targets and regression targets of any range are known. A data set that has one
        class only by design (one-class learning): mute it.
    """

    diagnosis: ClassVar[str] = "invalid_labels"
    off: float = 1e-3  # by how much soft labels may miss a sum of 1; survey
    one_class: int = 100  # labels seen before one class only is a fault; our own choice: by chance at 9:1 once in 4e4 times
    gray: float = 100.0  # targets up to 255 and above this are pixels; our own choice, as in unnormalized_input
    blind: float = 1e-5  # relative change of a loss by exchanging all targets, below which it pairs all with all; rounding stays below
    padding: tuple[int, ...] = (-100, -1, 255)  # values that mean "no label" in common data sets; survey

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        heard = calls(bench)
        if not heard:
            found = self._paired(bench)
            if found is not None:
                return failed(found)
            return unknown(bench.why_no_pass if not bench.sound else "the loss calls no known loss function, or several")
        tests = (self._range, self._type, self._soft, self._binary, self._shapes, self._ignored, self._single)
        for test in tests:
            found = test(bench, heard)
            if found is not None:
                return failed(found)
        return passed(f"fit for {heard[0].family.replace('_', ' ')} in {bench.sample.span if same_labels(bench) else 'the first batches'}")

    def _range(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """Class numbers outside of the classes."""
        call = heard[0]
        if not call.hard:
            return None
        counts: Counter[int] = Counter()
        for one in heard:
            counts.update(one.target.reshape(-1).tolist())
        if bench.sample.counts and same_labels(bench):
            counts = bench.sample.counts
        ignored = call.given.get("ignore_index", -100)
        bad = {value: n for value, n in counts.items() if value != ignored and not 0 <= value < call.classes}
        if not bad:
            return None
        fine = [value for value in counts if value != ignored and value not in bad]
        share = sum(bad.values()) / counts.total()
        evidence = [
            Evidence("labels outside", float(sum(bad.values())), 0.0),
            Evidence("smallest label", min(bad | dict.fromkeys(fine, 0))),
            Evidence("largest label", max(bad | dict.fromkeys(fine, 0)), call.classes - 1),
        ]
        where = self._where(bench, bad, heard)
        message = f"{share:.2%} of the labels lie outside 0 .. {call.classes - 1}: {', '.join(map(str, sorted(bad)[:4]))}"
        return finding(self.diagnosis, where, message, evidence, self._range_advice(bad, fine, call.classes))

    def _range_advice(self, bad: dict[int, int], fine: list[int], classes: int) -> Advice:
        advice: Advice = []
        low, high = min([*bad, *fine]), max([*bad, *fine])
        if low == 1 and high == classes:
            advice.append(
                (Cause("labels start at 1", 0.9, f"they are 1 to {high}, and 0 never occurs"), [Remedy("subtract 1 from the labels", {"labels": "repair"})])
            )
        only = next(iter(bad)) if len(bad) == 1 else None
        if only in self.padding and not (low == 1 and high == classes):
            advice.append(
                (
                    Cause("padding value", 0.9, f"{only} is the only label outside, and it marks missing labels in many data sets"),
                    [Remedy(f"say ignore_index={only} to the loss function", {"labels": "repair", "ignore_index": only})],
                )
            )
        if high >= classes:
            advice.append(
                (
                    Cause("too few outputs", 0.5, f"the head has {classes} outputs, the largest label is {high}"),
                    [Remedy(f"give the last layer {high + 1} outputs", {"classes": high + 1})],
                )
            )
        if low < 0 and not advice:
            advice.append((Cause("negative labels", 0.7, f"the smallest label is {low}"), [Remedy("map the labels to 0 .. classes - 1", {"labels": "repair"})]))
        return advice

    def _where(self, bench: Bench, bad: dict[int, int], heard: list[LossCall]) -> str:
        """The first sample that has such a label."""
        place = 0
        for labels in in_order(bench) or [call.target.reshape(-1) for call in heard]:
            hits = [i for i, value in enumerate(labels.tolist()) if value in bad]
            if hits:
                return f"targets, first at sample {place + hits[0]}"
            place += len(labels)
        return "targets"

    def _type(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """Labels that the loss function refused: a wrong type or a wrong shape."""
        call = heard[0]
        if not call.fault or call.family == "bce":
            return None
        shapes = f"targets {tuple(call.target.shape)} of {str(call.target.dtype).removeprefix('torch.')}, outputs {tuple(call.input.shape)}"
        wrong_type = call.family in CLASSIFIES and call.target.is_floating_point()
        cause = Cause("wrong dtype" if wrong_type else "wrong shape or dtype", 0.9, shapes)
        text = "give the labels as int64: targets.long()" if wrong_type else "give one class number per sample: targets.squeeze(-1).long()"
        if call.family not in CLASSIFIES:
            text = "bring targets to the shape and dtype of the outputs"
        return finding(self.diagnosis, "targets", call.fault, [], [(cause, [Remedy(text, {"labels": "repair"})])])

    def _soft(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """Class probabilities that do not sum to one."""
        for call in heard:
            if call.family != "cross_entropy" or call.hard or call.target.dim() != call.input.dim():
                continue
            sums = call.target.sum(dim=1 if call.target.dim() > 1 else 0)
            worst = float((sums - 1).abs().max())
            if not worst <= self.off or float(call.target.min()) < 0:
                cause = Cause("not probabilities", 0.8, f"rows sum to between {number(float(sums.min()))} and {number(float(sums.max()))}")
                remedy = Remedy("divide each row of the targets by its sum", {"labels": "repair"})
                return finding(
                    self.diagnosis,
                    "targets",
                    "soft labels do not sum to 1",
                    [Evidence("largest distance of a sum from 1", worst, self.off)],
                    [(cause, [remedy])],
                )
        return None

    def _binary(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """Targets of a binary cross entropy outside [0, 1]."""
        for call in heard:
            if call.family not in BINARY:
                continue
            low, high = float(call.target.min()), float(call.target.max())
            if low >= 0 and high <= 1:
                continue
            evidence = [Evidence("smallest target", low, 0.0), Evidence("largest target", high, 1.0)]
            values = sorted(set(call.target.reshape(-1).tolist()))
            if values == [-1.0, 1.0]:
                pair = (Cause("labels are -1 and 1", 0.9, "no other value occurs"), [Remedy("use (labels + 1) / 2", {"labels": "repair"})])
            elif values == [1.0, 2.0]:
                pair = (Cause("labels start at 1", 0.9, "they are 1 and 2"), [Remedy("subtract 1 from the labels", {"labels": "repair"})])
            elif low >= 0 and ((low == 0 and len(values) == 2) or (self.gray < high <= PIXEL and high == int(high))):
                pair = (
                    Cause(
                        "targets are no probabilities", 0.9, f"they reach from {number(low)} to {number(high)}, as masks and pixels do that were not divided"
                    ),
                    [Remedy(f"divide the targets by {number(PIXEL if high > self.gray else high)}", {"labels": "repair"})],
                )
            elif all(v == int(v) for v in values):
                pair = (
                    Cause("class numbers where yes or no is expected", 0.8, f"{len(values)} whole numbers occur, from {number(low)} to {number(high)}"),
                    [Remedy("use cross entropy with one output a class, or one-hot targets", {"labels": "repair"})],
                )
            else:
                pair = (
                    Cause("targets are no probabilities", 0.8, f"they reach from {number(low)} to {number(high)}"),
                    [Remedy(f"scale them to [0, 1]: (targets - {number(low)}) / {number(high - low)}", {"labels": "repair"})],
                )
            return finding(self.diagnosis, "targets", "targets of a binary cross entropy lie outside [0, 1]", evidence, [pair])
        return None

    def _shapes(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """A regression that compares every output with every target."""
        call = heard[0]
        if call.family not in REGRESSES or call.input.shape == call.target.shape or call.target.numel() == 1:
            return None
        return self._broadcast(call.input, call.target)

    def _paired(self, bench: Bench) -> Finding | None:
        """The same of a loss written by hand: outputs (N, 1) and targets (N,), and no order of the targets makes a difference."""
        outputs, targets = (bench.sound[0].outputs, bench.sound[0].targets) if bench.sound else (None, None)
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not targets.is_floating_point():
            return None
        n = targets.numel()
        if n < 3 or sorted([tuple(outputs.shape), tuple(targets.shape)]) != [(n,), (n, 1)] or bool((targets == targets.reshape(-1)[0]).all()):
            return None
        with bench.twin() as twin:
            order = torch.arange(n, device=targets.device).roll(1)
            losses = [float(total_of(twin.criterion(outputs.clone(), t.clone())).detach()) for t in (targets, targets[order], targets.flip(0))]
            each = [float(total_of(twin.criterion(outputs.reshape(-1).clone(), t.clone())).detach()) for t in (targets.reshape(-1), targets.reshape(-1)[order])]
        if max(losses) - min(losses) > self.blind * abs(losses[0]) or abs(each[0] - each[1]) <= 10 * self.blind * abs(each[0]):
            return None
        return self._broadcast(outputs, targets)

    def _broadcast(self, outputs: Tensor, targets: Tensor) -> Finding:
        wide = math.prod(torch.broadcast_shapes(outputs.shape, targets.shape))  # type: ignore[no-untyped-call]
        evidence = [Evidence("pairs compared", wide, max(outputs.numel(), targets.numel()))]
        message = "outputs and targets have different shapes"
        return finding(self.diagnosis, "targets", message, evidence, [broadcast(tuple(outputs.shape), tuple(targets.shape))])

    def _ignored(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """Nothing left to learn from."""
        if not all(call.hard and call.target.numel() and bool((call.target == call.given.get("ignore_index", -100)).all()) for call in heard):
            return None
        index = heard[0].given.get("ignore_index", -100)
        cause = Cause("ignore_index is a real class, or labels are masked by mistake", 0.8, f"every label of {len(heard)} batches is {index}")
        remedy = Remedy("look at the labels of the first batch, and at ignore_index", {"look_at": 1})
        return finding(self.diagnosis, "targets", "all labels are ignored", [Evidence("labels that count", 0.0)], [(cause, [remedy])])

    def _single(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """One class only, over a whole pass or over shuffled batches."""
        labels = in_order(bench)
        seen = torch.cat(labels) if labels else torch.empty(0)
        if len(seen) < self.one_class or int(seen.min()) != int(seen.max()) or not (bench.sample.complete or bench.sample.order == "random"):
            return None
        cause = Cause("labels lost on the way", 0.7, f"all {len(seen)} labels are {int(seen[0])}")
        remedy = Remedy("look at 20 samples and their labels by eye", {"look_at": 20})
        return finding(self.diagnosis, "targets", "all labels are of one class", [Evidence("classes that occur", 1.0, 2.0)], [(cause, [remedy])])
