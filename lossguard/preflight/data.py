"""Checks of the inputs: non-finite values, scale. The bench flows in, answers flow out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.survey import Layer, survey
from lossguard.preflight.take import Bad


@check
@dataclass(frozen=True)
class NonfiniteInput:
    """nonfinite_input: a sample holds NaN or Inf (survey, nonfinite_input).

    Every float tensor of every batch looked at is tested. A batch whose loss is finite all the same is one that the model copes
    with (missing values that it masks) and is no finding; where the loss cannot be had, the values are.

    Why: missing values in the source file, a division by a zero standard deviation, the logarithm of zero in preprocessing, a broken file.
    Do: look at the samples named, repair or drop them, and add a small number where preprocessing divides or takes logarithms.
    False alarm: a model that reads NaN as missing gives a finite loss, and the check is silent; where no loss can be made, mute it.
    """

    diagnosis: ClassVar[str] = "nonfinite_input"
    named: int = 8  # samples named at most; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        sample = bench.sample
        if not sample.looked_at:
            return unknown(bench.why_no_pass)
        sick = [bad for bad in sample.bad if not self._harmless(bench, bad)]
        if not sick:
            note = f"; {sample.bad_samples} samples hold NaN or Inf, but their loss is finite" if sample.bad else ""
            return passed(f"{sample.samples} samples in {sample.span} looked at{note}")
        return failed(*(self._finding(bench, bad) for bad in sick[:1]))

    def _harmless(self, bench: Bench, bad: Bad) -> bool:
        with bench.twin() as twin:
            done = twin.try_run(bad.data)
        return not done.error and math.isfinite(done.loss)

    def _finding(self, bench: Bench, bad: Bad) -> Finding:
        named = ", ".join(str(i) for i in bad.samples[: self.named]) + (" ..." if len(bad.samples) > self.named else "")
        where = f"batch {bad.batch}, {bad.part}{f' {bad.tensor!r}' if bad.tensor else ''}"
        evidence = [
            Evidence("values that are NaN or Inf in this batch", bad.values, 0),
            Evidence("samples with such values in all", bench.sample.bad_samples, 0),
        ]
        first = bad.first_sample + bad.samples[0]
        advice = [
            (
                Cause(
                    "missing or corrupt values in the data",
                    0.9,
                    f"{bench.sample.bad_samples} of {bench.sample.samples} samples hold NaN or Inf before any layer",
                ),
                [
                    Remedy(
                        f"look at sample {first} of the loader's order and repair or drop it",
                        {"labels" if bad.part == "targets" else "look_at": "repair" if bad.part == "targets" else 1},
                    ),
                    Remedy(f"drop batch {bad.batch} until it is repaired", {"drop_batch": bad.batch}),
                ],
            ),
            (
                Cause("preprocessing divides by zero or takes the logarithm of zero", 0.3, "whole features are hit where it is"),
                [Remedy("add 1e-8 before dividing", {"eps": 1e-8})],
            ),
        ]
        return finding(self.diagnosis, where, f"of the batch, samples number {named} hold NaN or Inf", evidence, advice)


@dataclass(frozen=True)
class _Scale:
    """Statistics of what a layer gets: over all values, and per feature."""

    mean: float
    std: float
    peak: float
    zeros: float  # share of exact zeros
    worst: int  # feature with the largest spread
    ratio: float  # its standard deviation over the median feature's
    unit_rows: bool
    pixels: bool  # whole numbers from 0 to at most 255
    count: int


@check
@dataclass(frozen=True)
class UnnormalizedInput:
    """unnormalized_input: what reaches the first weights is far from zero mean and unit scale (survey, unnormalized_input).

    Looked at is what enters each layer with weights before which no parameters stand, so that normalising inside the model counts. Ill is
    a standard deviation above or below the bounds, a mean many deviations from zero, or one feature on another scale than the median; and an
    input that is the same for every sample although the targets differ.

    Why: raw pixels from 0 to 255, raw physical units, kilometres beside centimetres, a normalisation done twice, or a
        cast to integers that leaves only zeros.
    Do: subtract the training set's mean and divide by its standard deviation, feature by feature (the finding gives both); pixels: divide by 255.
    False alarm: images in [0, 1], one-hot and sparse counts, token numbers and rows of unit length are known and silent, and so is a model
        that begins with a normalisation layer. Inputs on another scale by design: raise ``high``.
    """

    diagnosis: ClassVar[str] = "unnormalized_input"
    high: float = 10.0  # standard deviation; survey (1e1)
    low: float = 3e-3  # standard deviation; survey has 1e-2, but rows of unit length with 1e4 features are healthy
    offset: float = 3.0  # |mean| over the standard deviation; survey
    uneven: float = 10.0  # the same, from which on raw features are normalised one by one and not by one number; our own choice
    apart: float = 1e3  # largest feature's standard deviation over the median one's; survey
    bounded: float = 1.05  # magnitude up to which values are healthy whatever their mean: images in [0, 1]; our own choice
    sparse: float = 0.5  # share of exact zeros from which inputs are sparse and have no common scale; our own choice
    sparse_peak: float = 100.0  # largest magnitude of sparse inputs; raw pixels reach 255, counts are mostly below; our own choice
    least: int = 64  # values needed; our own choice
    alike: int = 8  # samples that must be equal before the input is called empty; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        done = survey(bench)
        if done.error and not done.roots:
            return unknown(f"the model could not be run: {done.error}")
        raw = [layer for layer in done.layers if layer.raw and layer.inputs]
        if not raw:
            if done.first_norm:
                return passed(f"the model normalises its input first ({done.first_norm})")
            floats = [t.float() for _, t in done.roots if t.is_floating_point()]
            if not floats:
                return passed("the inputs are whole numbers (tokens)") if done.roots else unknown("no tensor enters the model")
            raw = [Layer("the model", "model", True, floats[0].dim() > 3, [t for t in floats if t.shape[1:] == floats[0].shape[1:]])]
        if self._empty(bench, raw, [t for _, t in done.roots]):
            return failed(self._nothing(raw[0]))
        sick = []
        for layer in raw:
            scale = _scale(layer)
            wrong = self._wrong(scale)
            if wrong:
                sick.append(self._finding(layer, scale, *wrong))
        if sick:
            return failed(*sick[:1])
        scale = _scale(raw[0])
        return passed(f"mean {number(scale.mean)}, standard deviation {number(scale.std)} at {raw[0].name}")

    def _empty(self, bench: Bench, raw: list[Layer], given: list[Tensor]) -> bool:
        """Every sample brings the same numbers to every first layer, although their targets differ."""
        call = bench.sound[0].calls[0] if bench.sound and len(bench.sound[0].calls) == 1 else None
        if call is None or not call.target.numel() or bool((call.target == call.target.reshape(-1)[0]).all()):
            return False
        if any(not t.is_floating_point() for t in given):  # tokens, times or indices bring the information
            return False
        joined = [torch.cat([t.reshape(t.shape[0], -1) for t in layer.inputs]) for layer in raw if len({t.shape[1:] for t in layer.inputs}) == 1]
        samples = call.target.shape[0] if call.target.dim() else 0
        return len(joined) == len(raw) and samples >= self.alike and all(len(rows) >= self.alike and bool((rows == rows[:1]).all()) for rows in joined)

    def _nothing(self, layer: Layer) -> Finding:
        value = float(layer.inputs[0].reshape(-1)[0])
        cause = Cause("input carries no information", 0.95, f"all samples are equal where they enter {layer.name}: they begin with {number(value)}")
        remedy = Remedy("look at the preprocessing for a cast to integers, a scale that rounds to 0, or a product with 0; give float features", {"look_at": 2})
        evidence = [Evidence("largest difference between samples", 0.0)]
        return finding(self.diagnosis, f"input of {layer.name}", "all samples are the same where they enter the model", evidence, [(cause, [remedy])])

    def _wrong(self, s: _Scale) -> tuple[str, Evidence] | None:
        if s.count < self.least or not math.isfinite(s.std + s.mean) or s.std == 0:
            return None  # a constant input has no scale; non-finite ones are another check's
        if s.zeros > self.sparse:
            over = s.peak > self.sparse_peak
            return ("sparse inputs with large values", Evidence("largest magnitude", s.peak, self.sparse_peak)) if over else None
        if s.std > self.high:
            return "inputs are far above unit scale", Evidence("standard deviation", s.std, self.high)
        if s.std < self.low and not s.unit_rows:
            return "inputs are far below unit scale", Evidence("standard deviation", s.std, self.low)
        if s.ratio > self.apart:
            return f"feature {s.worst} is on another scale than the others", Evidence("its standard deviation over the median feature's", s.ratio, self.apart)
        if abs(s.mean) > self.offset * s.std and s.peak > self.bounded:
            return "inputs are far from zero mean", Evidence("|mean| over standard deviation", abs(s.mean) / s.std, self.offset)
        return None

    def _finding(self, layer: Layer, s: _Scale, message: str, evidence: Evidence) -> Finding:
        what = [evidence, Evidence("mean", s.mean), Evidence("standard deviation", s.std), Evidence("largest magnitude", s.peak)]
        each = Remedy("divide each feature by its own standard deviation over the training set, after subtracting its mean", {"normalize_input": True})
        if "another scale" in message or (s.ratio > self.uneven and s.std > self.high and not s.pixels):  # one number for all leaves most of them tiny
            cause, remedies = (
                Cause("features in different units", 0.9, f"feature {s.worst} spreads {number(s.ratio)} times as much as the median feature"),
                [each],
            )
        elif s.std < self.low:
            cause = Cause("normalised twice, or in too small a unit", 0.8, f"standard deviation {number(s.std)}")
            remedies = [Remedy(f"multiply the input by {number(1 / s.std)} (divide by its standard deviation {number(s.std)})", {"normalize_input": True})]
        else:
            cause = Cause(
                "raw pixels" if s.pixels else "raw units", 0.9, f"values reach {number(s.peak)}, mean {number(s.mean)}, standard deviation {number(s.std)}"
            )
            remedies = [Remedy(f"subtract {number(s.mean)} and divide by {number(s.std)}", {"normalize_input": True})]
            remedies = [Remedy("divide the input by 255", {"normalize_input": True}), *remedies] if s.pixels else remedies
        return finding(self.diagnosis, f"input of {layer.name}", message, what, [(cause, remedies)], Severity.WARNING)


def _scale(layer: Layer) -> _Scale:
    """Over all batches kept; features are the second dimension of images and series for convolutions, else the last."""
    values = torch.cat([_features(t, layer.channels_second) for t in layer.inputs]).double()
    spread = values.std(dim=0, unbiased=False)
    live = spread[spread > 0]
    middle = float(live.median()) if live.numel() else math.nan
    norms = values.norm(dim=1)
    return _Scale(
        mean=float(values.mean()),
        std=float(values.std(unbiased=False)),
        peak=float(values.abs().max()),
        zeros=float((values == 0).double().mean()),
        worst=int(spread.argmax()),
        ratio=float(spread.max()) / middle if live.numel() > 1 else 1.0,
        unit_rows=bool(((norms - 1).abs() < 1e-3).double().mean() > 0.9),
        pixels=bool((values == values.round()).all()) and float(values.min()) >= 0 and 100 < float(values.max()) <= 255,
        count=values.numel(),
    )


def _features(t: Tensor, channels_second: bool) -> Tensor:
    """(samples and places, features)."""
    if t.dim() < 2:
        return t.reshape(-1, 1)
    if channels_second and t.dim() > 2:
        return t.movedim(1, -1).reshape(-1, t.shape[1])
    return t.reshape(-1, t.shape[-1])
