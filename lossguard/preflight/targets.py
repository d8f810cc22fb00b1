"""The check that no target can be read off the input that the model sees. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossguard.batches import split
from lossguard.findings import Cause, Evidence, Finding, Remedy
from lossguard.preflight.bench import Bench
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.listen import CLASSIFIES, REGRESSES, LossCall
from lossguard.preflight.take import mapped, tensors

FUTURE, UNSHIFTED, TWICE, COLUMN = "the future is seen", "targets are not shifted", "targets are shifted twice", "a feature is the target"
MIXED = "samples and places are mixed"


@dataclass(frozen=True)
class _Series:
    """A tensor of the batch in which the targets stand. ahead: targets[:, t] == values[:, t + ahead] wherever there is one."""

    name: str
    values: Tensor  # (samples, places)
    column: int | None  # of a tensor with features
    ahead: int


@check
@dataclass(frozen=True)
class TargetLeak:
    """target_leak: the model sees what it is asked for.

    Sequences whose targets are values of the input some places on: single places of every second sample are exchanged, in eval mode and
    without dropout, and the outputs whose target stood there must stay as they are, and so must all of the other samples. Tables: no column
    of the input is the target itself.

    Why: an attention without its causal mask; a bidirectional recurrence that is asked for the next value; targets that are the tokens
        themselves, not the next ones, or that are shifted by the loop and once more by the model; a transpose that takes (batch, places)
        for (places, batch); a target that was left among the features.
    Do: ``is_causal=True`` or a mask; inputs ``tokens[:, :-1]`` and targets ``tokens[:, 1:]``, and labels as they are for a model that shifts
        them itself; drop the column. Such a loss falls fast and to nearly nothing, and what was learned is worth nothing.
    False alarm: an autoencoder of tokens is asked for what it sees, and looks both ways: silent. A model that looks back only and is asked for
        the token of the very place, as in a test of memory: mute it.
    """

    diagnosis: ClassVar[str] = "target_leak"
    leak: float = 1e-4  # change of the outputs over their scale; our own choice, as in cross_sample_leak: float32 rounding is below 1e-5
    ahead: int = 4  # places by which targets are looked for; our own choice
    same: float = 0.99  # share of targets that must be found there; our own choice: tokenizers treat single ones otherwise
    places: int = 4  # least places of a sequence, and least different values; our own choice
    rows: int = 64  # least rows of a table; our own choice: a column agrees with two classes by chance once in 2 ** 64 times
    tried: int = 3  # places that are exchanged; our own choice
    most: int = 4  # tensors, or columns, of a batch in which they are; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if not bench.sound:
            return unknown(bench.why_no_pass)
        call = bench.sound[0].call
        if call is None or not (call.hard or call.family in REGRESSES):
            return unknown("the loss calls no known loss function on single targets, or several")
        column = self._column(bench)
        if column is not None:
            return failed(column)
        reasons = []
        for series in self._series(bench, call):
            seen, both_ways, others = self._exchanged(bench, series)
            if seen is None:
                return unknown("the model is random in eval mode, or its outputs change their shape")
            fault = self._mixed(others) if others > self.leak else self._fault(series, seen, both_ways)
            if fault is not None:
                return failed(fault)
            reasons.append(
                f"targets stand {series.ahead} places on in {series.name or 'the input'}, and exchanging one moves its output by {seen:.1g} of their scale"
            )
        return passed("; ".join(reasons) or "the targets are no part of the input")

    def _fault(self, series: _Series, seen: float, both_ways: bool) -> Finding | None:
        """seen: how far an output moves when the value is exchanged that is its target. both_ways: so do outputs that stand before it."""
        told = f"exchanging a value moves the output that has it for its target by {seen:.1g} of the outputs' scale"
        evidence = [Evidence("change of that output over the outputs' scale", seen, self.leak), Evidence("places from output to target", float(series.ahead))]
        if series.ahead > 0 and seen > self.leak:
            fix = Remedy("is_causal=True, or a mask that hides what comes later", {"mask": "causal"})
            message = "the output at a place depends on the value that comes next, which is its target"
            return finding(self.diagnosis, "model", message, evidence, [(Cause(FUTURE, 0.95, told), [fix])])
        if series.ahead == 0 and seen > self.leak and not both_ways:
            fix = Remedy("inputs tokens[:, :-1], targets tokens[:, 1:]", {"labels": "repair"})
            message = "the target of each place is the very value that the model is given there"
            return finding(self.diagnosis, "targets", message, evidence, [(Cause(UNSHIFTED, 0.9, told), [fix])])
        if series.ahead == 2 and series.column is None:
            fix = Remedy("shift once: give the labels as they are to a model that shifts them itself", {"labels": "repair"})
            because = f"target t is value t + 2 of {series.name or 'the input'}, and the value between is never asked for"
            return finding(self.diagnosis, "targets", "the targets stand two places on, not one", evidence[1:], [(Cause(TWICE, 0.8, because), [fix])])
        return None

    def _mixed(self, others: float) -> Finding:
        """others: how far outputs move of samples in which nothing was exchanged."""
        because = f"exchanging values of every second sample moves outputs of the others by {others:.1g} of their scale"
        fix = Remedy("look for a transpose or a view that takes (batch, places) for (places, batch)", {"batch_first": True})
        evidence = [Evidence("change of other samples' outputs over the outputs' scale", others, self.leak)]
        message = "outputs are held against the targets of other samples, or are made of them"
        return finding(self.diagnosis, "model", message, evidence, [(Cause(MIXED, 0.95, because), [fix])])

    def _column(self, bench: Bench) -> Finding | None:
        """A column of a table that is the target, in all batches that were kept."""
        pairs = [split(batch) for batch in bench.kept]
        tables = [(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == 2 and x.shape[1] > 1]
        if not tables or len(tables) < len(pairs) or any(y.numel() != len(x) for x, y in tables) or len({x.shape[1] for x, _ in tables}) > 1:
            return None
        rows = sum(len(x) for x, _ in tables)
        targets = torch.cat([y.reshape(-1) for _, y in tables])
        same = torch.ones(tables[0][0].shape[1], dtype=torch.bool, device=targets.device)
        for x, y in tables:
            same &= (x == (y.to(x.dtype) if x.is_floating_point() else y).reshape(-1, 1)).all(dim=0)
        if rows < self.rows or bool((targets == targets[0]).all()) or not bool(same.any()):
            return None
        at = int(same.nonzero()[0])
        cause = Cause(COLUMN, 0.95, f"column {at} of the input equals the target in all {rows} rows that were looked at")
        remedy = Remedy(f"drop column {at} of the input", {"drop_column": at})
        return finding(self.diagnosis, f"column {at}", "the input holds the target", [Evidence("rows in which it does", float(rows))], [(cause, [remedy])])

    def _series(self, bench: Bench, call: LossCall) -> list[_Series]:
        """Where in the batch the targets stand; where they could stand at several distances, nothing is claimed."""
        found = []
        for name, tensor in tensors(bench.kept[0]):
            for column, values in _columns(tensor):
                targets = _places(call, len(values))
                if targets is None or min(values.shape[1], targets.shape[1]) < self.places:
                    continue
                valid = targets != call.given.get("ignore_index", -100)
                if len(torch.unique(targets[valid])) < self.places:
                    continue
                fits = [d for d in range(self.ahead + 1) if _share(values, targets, valid, d) >= self.same]
                if len(fits) == 1 and (fits[0] > 0 or not values.is_floating_point()):
                    found.append(_Series(name, values, column, fits[0]))
        return found[: self.most]

    def _exchanged(self, bench: Bench, series: _Series) -> tuple[float | None, bool, float]:
        """How far the outputs move whose target is exchanged, over the scale of all; whether any output moves that stands before; and how far those
        of other samples do. Every second sample is exchanged."""
        with bench.twin() as twin:
            base, again = (_logits(twin.try_run(bench.kept[0], mode="eval", quiet=True).call, len(series.values)) for _ in range(2))
            if base is None or again is None or not torch.equal(base, again) or not bool(torch.isfinite(base).all()):
                return None, False, 0.0
            scale = max(float(base.square().mean().sqrt()), 1e-12)
            last = min(base.shape[1] - 1, series.values.shape[1] - 1 - series.ahead)
            moved, before, others = 0.0, 0.0, 0.0
            for k in range(1, self.tried + 1):
                place = max(1, last * k // (self.tried + 1))  # of the output; its target stands ahead
                changed = _logits(twin.try_run(_other(bench.kept[0], series, place + series.ahead), mode="eval", quiet=True).call, len(base))
                if changed is None or changed.shape != base.shape:
                    return None, False, 0.0
                each = (changed - base).abs().amax(dim=2) / scale
                far = each[::2].median(dim=0).values
                moved, before = max(moved, float(far[place])), max(before, float(far[: place + min(series.ahead, 1)].max()))
                others = max(others, float(each[1::2].max())) if len(each) > 1 else 0.0
        return moved, before > self.leak, others


def _columns(tensor: Tensor) -> Iterator[tuple[int | None, Tensor]]:
    """Series in a tensor: (samples, places) of whole numbers, or the columns of (samples, places, features)."""
    if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        yield None, tensor
    elif tensor.dim() == 3 and tensor.is_floating_point():
        yield from ((k, tensor[:, :, k]) for k in range(min(tensor.shape[2], 16)))


def _places(call: LossCall, samples: int) -> Tensor | None:
    """The targets as (samples, places); None where there is one a sample, or they cannot be told apart."""
    targets = call.target.squeeze(-1) if call.family not in CLASSIFIES and call.target.dim() > 1 else call.target
    if targets.dim() == 2 and len(targets) == samples:
        return targets
    return targets.reshape(samples, -1) if targets.dim() == 1 and samples and len(targets) % samples == 0 else None


def _logits(call: LossCall | None, samples: int) -> Tensor | None:
    """What the loss was given, as (samples, places, values)."""
    if call is None:
        return None
    given = call.input.float()
    if call.family in CLASSIFIES and given.dim() == 3:
        return given.transpose(1, 2)
    if given.dim() == 3 or (given.dim() == 2 and len(given) == samples and call.family not in CLASSIFIES):
        return given if given.dim() == 3 else given.unsqueeze(2)
    rest = given.shape[-1] if call.family in CLASSIFIES else 1
    return given.reshape(samples, -1, rest) if math.prod(given.shape) % (samples * rest) == 0 else None


def _share(values: Tensor, targets: Tensor, valid: Tensor, ahead: int) -> float:
    """Share of the targets that are the value so many places on."""
    many = min(values.shape[1] - ahead, targets.shape[1])
    if many < targets.shape[1] - ahead or many < 1 or not bool(valid[:, :many].any()):
        return 0.0
    return float((values[:, ahead : ahead + many] == targets[:, :many])[valid[:, :many]].double().mean())


def _other(batch: object, series: _Series, place: int) -> object:
    """The batch with another value at one place of every second sample: the next of those that occur, or a number further on."""
    known = torch.unique(series.values)
    old = series.values[::2, place]
    new = known[(torch.searchsorted(known, old.contiguous()) + 1) % len(known)]

    def exchange(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.shape[:2] != series.values.shape:
            return leaf
        column = leaf if series.column is None else leaf[:, :, series.column] if leaf.dim() == 3 and leaf.shape[2] > series.column else None
        if column is None or column.shape != series.values.shape or not torch.equal(column, series.values):
            return leaf
        leaf = leaf.clone()
        (leaf if series.column is None else leaf[:, :, series.column])[::2, place] = new
        return leaf

    return mapped(batch, exchange)
