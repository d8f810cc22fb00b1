"""Checks of the classes: their balance, and the order in which they come. The bench flows in, answers flow out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossguard.batches import split
from lossguard.findings import Cause, Evidence, Remedy, Severity, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.labels import calls, in_order
from lossguard.preflight.take import tensors


@check
@dataclass(frozen=True)
class ClassImbalance:
    """class_imbalance: some classes are starved (survey, class_imbalance).

    The largest class over the smallest that occurs, over the labels looked at. Moderate imbalance is an info: 20:1 was measured to be
    learned all the same. It is a warning where a class is starved: fewer than ten samples in the whole data set, which is less than is
    needed to learn it or to measure that it was learned; or so rare that always answering the largest class would be right on more than
    99 % while most batches hold no sample of it.

    Why: rare events (fraud, defects, diseases), a class lost in preprocessing, a filter that removed most of a class.
    Do: weight the loss by inverse class frequency (the finding gives the weight), or draw with a WeightedRandomSampler; judge by recall, not accuracy.
    False alarm: vocabularies, pixel labels, class-weighted losses and weighted samplers are known and silent; a long tail of classes is
        an info. Imbalance that is meant: raise ``ratio``.
    """

    diagnosis: ClassVar[str] = "class_imbalance"
    ratio: float = 20.0  # largest class over smallest, an info above; survey
    few: int = 10  # samples of a class in the whole data set, a warning below; our own choice: three in ten right is then a standard error of 15 %
    tail: int = 20  # classes, above which a long tail is the nature of the data; our own choice: letters, species, words
    starved: float = 100.0  # largest class over smallest, one half of a warning; our own choice: one answer is then right on over 99 %
    seldom: float = 0.2  # samples of the class per batch, the other half below; our own choice: four batches in five push the other way
    labels: int = 200  # labels needed; survey has 2000 for a stream, a whole pass of a small data set is exact
    most_classes: int = 1000  # above, the labels are a vocabulary; survey

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
        evidence = [
            Evidence("largest class over smallest", most / least, self.ratio),
            Evidence("share of the largest class", most / len(seen)),
            Evidence(f"samples of class {rare}", least),
        ]
        weight = len(seen) / (len(values) * least)
        advice = [
            (
                Cause("rare class", 0.8, f"class {rare} has {least} of {len(seen)} samples, class {common} has {most}"),
                [
                    Remedy(f"weight class {rare} by {number(weight)} in the loss (all: samples / (classes x samples of the class))", {"class_weight": weight}),
                    Remedy("draw with torch.utils.data.WeightedRandomSampler", {"sampler": "weighted"}),
                ],
            )
        ]
        per_batch = least / max(bench.sample.looked_at, 1)
        evidence.append(Evidence(f"samples of class {rare} per batch", per_batch, self.seldom))
        seldom = most >= self.starved * least and per_batch < self.seldom
        few = bench.sample.complete and least < self.few
        severity = Severity.WARNING if (few or seldom) and len(values) <= self.tail and not _tokens(bench) else Severity.INFO
        return failed(
            finding(self.diagnosis, f"class {rare}", f"class {rare} is {most / least:.0f} times rarer than class {common}", evidence, advice, severity)
        )


@check
@dataclass(frozen=True)
class UnshuffledData:
    """unshuffled_data: samples come sorted by label, so that batches hold few classes (survey, unshuffled_data).

    The entropy of each batch's labels, over what batches of that size drawn at random would have, and the share of neighbours with equal
    labels, over what chance gives. Sorted data has about as many runs of equal labels as classes. Continuous targets, one a sample, are
    sorted where none is below the one before it, or none above, in at least 50 that have at least 25 different values.

    Why: a loader without shuffle=True over data stored class by class, or a shuffle buffer smaller than a class.
    Do: shuffle=True, or shuffle the file once before training.
    False alarm: time series and grouped recordings have neighbours alike by design, but each class comes again and again: the check then
        cannot tell. Samplers of your own are believed, and so are vocabularies and pixel labels. A grid of a rising function is sorted indeed.
    """

    diagnosis: ClassVar[str] = "unshuffled_data"
    entropy: float = 0.7  # of a batch's labels, over a random batch's; survey; shuffled 1.00 (least 0.97), sorted 0.11
    sigmas: float = 6.0  # of the share of equal neighbours above chance; survey
    runs: float = 3.0  # runs of equal labels per class up to which the data is sorted; our own choice: sorted data has 1, two files in a row 2
    labels: int = 50  # labels needed; our own choice: continuous ones in order by chance have odds of 1 to 50!
    distinct: int = 25  # different values among continuous targets, so that grades and constants are no order; our own choice: odds of 1 to 25!
    batches: int = 4  # batches needed; our own choice
    most_classes: int = 1000  # above, the labels are a vocabulary; survey

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if bench.sample.order in ("random", "weighted"):
            return passed("the sampler draws at random")
        if bench.sample.order == "own":
            return unknown("the sampler is your own")
        if bench.sample.values:
            return self._continuous(bench.sample.values)
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
        evidence = [
            Evidence("label entropy of a batch over a random batch's", ratio, self.entropy),
            Evidence("equal neighbours, sigmas above chance", sigmas, self.sigmas),
            Evidence("batches of one class", single),
        ]
        advice = [
            (
                Cause(
                    "data sorted by label",
                    0.9,
                    f"{len(seen) - equal} runs of equal labels over {len(values)} classes; {single} of {len(labels)} batches hold one class",
                ),
                [Remedy("DataLoader(..., shuffle=True)", {"shuffle": True})],
            )
        ]
        return failed(finding(self.diagnosis, "order of samples", "neighbouring samples have the same label", evidence, advice))

    def _continuous(self, values: list[Tensor]) -> Answer:
        """Targets of a regression, by their own order."""
        seen = torch.cat(values)
        if len(values) < self.batches or len(seen) < self.labels or not bool(seen.isfinite().all()):
            return unknown("too few batches or targets")
        step, different = seen.diff(), len(torch.unique(seen))
        rises, falls = bool((step >= 0).all()), bool((step <= 0).all())
        if not (rises or falls) or different < self.distinct:
            return passed("the targets are in no order")
        word = "rise" if rises else "fall"
        evidence = [Evidence("neighbours out of order", 0.0), Evidence("samples in a row", len(seen), self.labels)]
        because = f"the {len(seen)} targets {word} from sample to sample, from {number(float(seen[0]))} to {number(float(seen[-1]))}"
        advice = [(Cause("data sorted by label", 0.9, because), [Remedy("DataLoader(..., shuffle=True)", {"shuffle": True})])]
        return failed(finding(self.diagnosis, "order of samples", "samples come in the order of their targets", evidence, advice))


def _tokens(bench: Bench) -> bool:
    """What enters is whole numbers: then the classes may be words too, and rare words are the nature of language."""
    given = [t for _, t in tensors(split(bench.kept[0])[0])]
    return bool(given) and not any(t.is_floating_point() or t.is_complex() for t in given)


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
