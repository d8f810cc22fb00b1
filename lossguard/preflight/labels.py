"""Checks of the labels: range and type, balance, order. The bench flows in, answers flow out.

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
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.listen import BINARY, CLASSIFIES, REGRESSES, LossCall

Advice = list[tuple[Cause, list[Remedy]]]


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
    """invalid_labels: the loss function cannot take the labels, or takes them for something else (detectors A, invalid_labels; SYMPTOMS E5).

    Class numbers must lie in [0, classes) or be the ignored index, and be integers; probabilities must lie in [0, 1] and sum to one;
    outputs and targets of a regression must have one shape (else they are broadcast against each other); not all labels may be ignored,
    nor all be of one class.

    Why: labels that start at 1; a padding value such as -1 or 255 that the loss does not know; a head with too few outputs; a missing squeeze.
    Do: subtract the smallest label, or say ignore_index= to the loss, or give the head max(label) + 1 outputs; bring both to one shape.
    False alarm: ignored indices, soft labels, multi-label targets and regression targets of any range are known. A data set that has one
        class only by design (one-class learning): mute it.
    """

    diagnosis: ClassVar[str] = "invalid_labels"
    off: float = 1e-3  # by how much soft labels may miss a sum of 1; detectors A
    one_class: int = 100  # labels seen before one class only is a fault; our own choice: by chance at 9:1 once in 4e4 times
    padding: tuple[int, ...] = (-100, -1, 255)  # values that mean "no label" in common data sets; detectors A

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        heard = calls(bench)
        if not heard:
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
        evidence = [Evidence("labels outside", float(sum(bad.values())), 0.0), Evidence("smallest label", min(bad | dict.fromkeys(fine, 0))),
                    Evidence("largest label", max(bad | dict.fromkeys(fine, 0)), call.classes - 1)]  # fmt: skip
        where = self._where(bench, bad, heard)
        message = f"{share:.2%} of the labels lie outside 0 .. {call.classes - 1}: {', '.join(map(str, sorted(bad)[:4]))}"
        return finding(self.diagnosis, where, message, evidence, self._range_advice(bad, fine, call.classes))

    def _range_advice(self, bad: dict[int, int], fine: list[int], classes: int) -> Advice:
        advice: Advice = []
        low, high = min([*bad, *fine]), max([*bad, *fine])
        if low == 1 and high == classes:
            advice.append((Cause("labels start at 1", 0.9, f"they are 1 to {high}, and 0 never occurs"), [Remedy("subtract 1 from the labels", {"labels": "repair"})]))
        only = next(iter(bad)) if len(bad) == 1 else None
        if only in self.padding and not (low == 1 and high == classes):
            advice.append((Cause("padding value", 0.9, f"{only} is the only label outside, and it marks missing labels in many data sets"),
                           [Remedy(f"say ignore_index={only} to the loss function", {"labels": "repair", "ignore_index": only})]))  # fmt: skip
        if high >= classes:
            advice.append((Cause("too few outputs", 0.5, f"the head has {classes} outputs, the largest label is {high}"),
                           [Remedy(f"give the last layer {high + 1} outputs", {"classes": high + 1})]))  # fmt: skip
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
                return finding(self.diagnosis, "targets", "soft labels do not sum to 1", [Evidence("largest distance of a sum from 1", worst, self.off)], [(cause, [remedy])])
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
            elif all(v == int(v) for v in values):
                pair = (Cause("class numbers where yes or no is expected", 0.8, f"{len(values)} whole numbers occur, from {number(low)} to {number(high)}"),
                        [Remedy("use cross entropy with one output a class, or one-hot targets", {"labels": "repair"})])  # fmt: skip
            else:
                pair = (Cause("targets are no probabilities", 0.8, f"they reach from {number(low)} to {number(high)}"),
                        [Remedy(f"scale them to [0, 1]: (targets - {number(low)}) / {number(high - low)}", {"labels": "repair"})])  # fmt: skip
            return finding(self.diagnosis, "targets", "targets of a binary cross entropy lie outside [0, 1]", evidence, [pair])
        return None

    def _shapes(self, bench: Bench, heard: list[LossCall]) -> Finding | None:
        """A regression that compares every output with every target."""
        call = heard[0]
        if call.family not in REGRESSES or call.input.shape == call.target.shape or call.target.numel() == 1:
            return None
        shapes = f"outputs {tuple(call.input.shape)}, targets {tuple(call.target.shape)}"
        wide = math.prod(torch.broadcast_shapes(call.input.shape, call.target.shape))
        evidence = [Evidence("pairs compared", wide, max(call.input.numel(), call.target.numel()))]
        cause = Cause("shapes are broadcast", 0.95, f"{shapes}: each output is compared with other samples' targets")
        message = "outputs and targets have different shapes"
        return finding(self.diagnosis, "targets", message, evidence, [(cause, [Remedy("use targets.view_as(outputs)", {"labels": "repair"})])])

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


@check
@dataclass(frozen=True)
class ClassImbalance:
    """class_imbalance: some classes are starved (detectors A, class_imbalance; SYMPTOMS E6).

    The largest class over the smallest that occurs, over the labels looked at. Moderate imbalance is an info: 20:1 was measured to be
    learned all the same. It is a warning where always answering the largest class would be right on more than 99 %.

    Why: rare events (fraud, defects, diseases), a class lost in preprocessing, a filter that removed most of a class.
    Do: weight the loss by inverse class frequency (the finding gives the weight), or draw with a WeightedRandomSampler; judge by recall, not accuracy.
    False alarm: vocabularies, pixel labels, class-weighted losses and weighted samplers are known and silent. Imbalance that is meant: raise ``ratio``.
    """

    diagnosis: ClassVar[str] = "class_imbalance"
    ratio: float = 20.0  # largest class over smallest, an info above; detectors A
    starved: float = 100.0  # the same, a warning from there on; our own choice: one answer is then right on over 99 %
    labels: int = 200  # labels needed; detectors A has 2000 for a stream, a whole pass of a small data set is exact
    most_classes: int = 1000  # above, the labels are a vocabulary; detectors A

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        labels = in_order(bench)
        seen = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
        if not len(seen):
            return unknown("the targets are not one class per sample")
        call = calls(bench)[0]
        if call.given.get("weight") is not None or call.given.get("pos_weight") is not None or bench.sample.order == "weighted":
            return passed("the loss or the sampler weighs the classes")
        seen = seen[seen != call.given.get("ignore_index", -100)] if call.hard else seen
        values, counts = torch.unique(seen, return_counts=True)
        if len(seen) < self.labels or not 1 < len(values) <= self.most_classes:
            return unknown(f"{len(seen)} labels of {len(values)} classes are too few, or no classes")
        if not bench.sample.complete and bench.sample.order in ("sequential", "unknown", "own") and bench.sample.looked_at < 20:
            return unknown(f"only {bench.sample.span} were looked at")
        most, least = int(counts.max()), int(counts.min())
        if most <= self.ratio * least:
            return passed(f"largest class over smallest {number(most / least)} in {len(seen)} labels")
        rare, common = int(values[counts.argmin()]), int(values[counts.argmax()])
        evidence = [Evidence("largest class over smallest", most / least, self.ratio), Evidence("share of the largest class", most / len(seen)),
                    Evidence(f"samples of class {rare}", least)]  # fmt: skip
        weight = len(seen) / (len(values) * least)
        advice = [(Cause("rare class", 0.8, f"class {rare} has {least} of {len(seen)} samples, class {common} has {most}"),
                   [Remedy(f"weight class {rare} by {number(weight)} in the loss (all: samples / (classes x samples of the class))", {"class_weight": weight}),
                    Remedy("draw with torch.utils.data.WeightedRandomSampler", {"sampler": "weighted"})])]  # fmt: skip
        severity = Severity.WARNING if most >= self.starved * least else Severity.INFO
        return failed(finding(self.diagnosis, f"class {rare}", f"class {rare} is {most / least:.0f} times rarer than class {common}", evidence, advice, severity))


@check
@dataclass(frozen=True)
class UnshuffledData:
    """unshuffled_data: samples come sorted by label, so that batches hold few classes (detectors A, unshuffled_data; SYMPTOMS E7).

    The entropy of each batch's labels, over what batches of that size drawn at random would have, and the share of neighbours with equal
    labels, over what chance gives. Sorted data has about as many runs of equal labels as classes.

    Why: a loader without shuffle=True over data stored class by class, or a shuffle buffer smaller than a class.
    Do: shuffle=True, or shuffle the file once before training.
    False alarm: time series and grouped recordings have neighbours alike by design, but each class comes again and again: the check then
        cannot tell. Samplers of your own are believed, and so are vocabularies and pixel labels. Continuous targets are not judged.
    """

    diagnosis: ClassVar[str] = "unshuffled_data"
    entropy: float = 0.7  # of a batch's labels, over a random batch's; detectors A; shuffled 1.00 (least 0.97), sorted 0.11
    sigmas: float = 6.0  # of the share of equal neighbours above chance; detectors A
    runs: float = 3.0  # runs of equal labels per class up to which the data is sorted; our own choice: sorted data has 1, two files in a row 2
    labels: int = 50  # labels needed; our own choice
    batches: int = 4  # batches needed; our own choice
    most_classes: int = 1000  # above, the labels are a vocabulary; detectors A

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if bench.sample.order in ("random", "weighted"):
            return passed("the sampler draws at random")
        if bench.sample.order == "own":
            return unknown("the sampler is your own")
        labels = [batch for batch in in_order(bench) if len(batch) > 1]
        if len(labels) < self.batches or sum(map(len, labels)) < self.labels:
            return unknown("the targets are not one class per sample, or too few batches of more than one")
        seen = torch.cat(labels)
        values, counts = torch.unique(seen, return_counts=True)
        if not 1 < len(values) <= self.most_classes:
            return unknown(f"{len(values)} classes occur in {bench.sample.span}")
        p = counts.double() / len(seen)
        chance = float(p.square().sum())
        equal = int((seen[1:] == seen[:-1]).sum())
        sigmas = (equal - (len(seen) - 1) * chance) / math.sqrt(max((len(seen) - 1) * chance * (1 - chance), 1e-12))
        ratio = _entropy_ratio(labels, p)
        runs = (len(seen) - equal) / len(values)
        if sigmas <= self.sigmas or ratio >= self.entropy:
            return passed(f"batches hold {ratio:.0%} of a random batch's label entropy")
        if runs > self.runs:
            return unknown(f"neighbours have equal labels ({number(sigmas)} sigmas above chance), but classes come again and again: by design in time series")
        single = sum(int(batch.min()) == int(batch.max()) for batch in labels)
        evidence = [Evidence("label entropy of a batch over a random batch's", ratio, self.entropy), Evidence("equal neighbours, sigmas above chance", sigmas, self.sigmas),
                    Evidence("batches of one class", single)]  # fmt: skip
        advice = [(Cause("data sorted by label", 0.9, f"{len(seen) - equal} runs of equal labels over {len(values)} classes; {single} of {len(labels)} batches hold one class"),
                   [Remedy("DataLoader(..., shuffle=True)", {"shuffle": True})])]  # fmt: skip
        return failed(finding(self.diagnosis, "order of samples", "neighbouring samples have the same label", evidence, advice))


def _entropy_ratio(labels: list[Tensor], p: Tensor) -> float:
    """Mean entropy of the batches' labels over the mean entropy of batches of these sizes drawn at random (seeded)."""
    generator = torch.Generator().manual_seed(0)
    own = drawn = 0.0
    for batch in labels:
        own += _entropy(torch.unique(batch, return_counts=True)[1])
        drawn += _entropy(torch.bincount(torch.multinomial(p, len(batch), replacement=True, generator=generator)))
    return own / drawn if drawn > 0 else 1.0


def _entropy(counts: Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log()).sum())
