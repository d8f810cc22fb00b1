"""The check of the first loss: against chance, against the batch size, against the first steps. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch
from torch import nn

from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.preflight.bench import Bench, Pass
from lossguard.preflight.chance import chance
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.listen import CLASSIFIES, REGRESSES, LossCall
from lossguard.preflight.pace import pace
from lossguard.preflight.take import chosen, sizes

QUARTERED = 0.75  # of the outputs' scale that is left when all weights are quartered: a plain head leaves a quarter, a normalised one all
Advice = list[tuple[Cause, list[Remedy]]]


@check
@dataclass(frozen=True)
class InitialLossOff:
    """initial_loss_off: the first loss is not what knowing nothing gives (survey, initial_loss_off).

    With dropout off, the mean of the first batches against chance: ln(classes), ln 2 for yes or no, the targets' variance for squared error,
    made by the same loss function with even predictions. Then the batch is repeated (a mean stays, a sum doubles), and dropout and penalties
    on weights are turned on (the loss may rise a little). A loss below chance is no fault: trained weights begin there. A sum over the batch
    and targets of a large scale are infos, for a learning rate can be chosen for them and a bias learns a mean; they are warnings where a
    copy's first steps at the chosen rate raise the loss, rewrite the weights or would need 100 000 steps to reach the targets.

    Why: an output layer with too large weights, raw targets far from zero, inputs of a large scale, reduction="sum", a penalty that outweighs the loss.
    Do: scale the last layer's initial weights by the factor given, standardise the targets, reduction="mean", a smaller penalty or dropout.
    False alarm: losses of several terms, and losses that are not torch's own, are not judged. Embeddings tied to the head with unit scale do
        begin far above chance; that is a fault of their scale. A head trained on other labels: raise ``high``.
    """

    diagnosis: ClassVar[str] = "initial_loss_off"
    high: float = 2.0  # first loss over chance, an info from there; survey
    trained: float = 3.0  # the same, a warning from there, and nothing below where the weights were trained before; survey
    offset: float = 10.0  # |mean| of regression targets over their standard deviation; our own choice: prices at 3 train well
    large: float = 10.0  # root mean square of regression targets; survey (unnormalized_input)
    bounded: float = 1.05  # magnitude up to which targets are healthy whatever their mean: images in [0, 1]; our own choice
    blown: float = 2.0  # loss in the first steps at the chosen rate over the first loss; our own choice: one batch again and again should fall
    rewrites: float = 0.3  # first update over the weights; our own choice: three times the warning of update_ratio_high, for one step is not many
    far: float = 1e5  # steps to reach the targets at the pace of the first ones; our own choice: long runs have fewer
    penalty: float = 3.0  # penalty on weights over the loss of the data; our own choice: half of 5e-4 times the squares of a He-initialised VGG is near 1
    rise: float = 2.0  # loss with dropout over the loss without; our own choice: dropout of 0.5 adds some per cent at the start
    doubling: float = 0.05  # by how much a sum over twice the batch may miss 2; our own choice: rounding, not chance, is in it
    samples: int = 16  # samples of the batch that is repeated; our own choice
    least: int = 4  # regression targets needed for a variance; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if not bench.sound:
            return unknown(bench.why_no_pass)
        if any(not math.isfinite(p.loss) for p in bench.sound):
            return self._nonfinite(bench)
        for test in (self._sum, self._penalty, self._targets, self._first, self._dropout):
            found = test(bench)
            if found is not None:
                return failed(found)
        first, expected = self._expected(bench)
        if expected is None:
            return unknown("chance is not known for this loss" + ("" if bench.sound[0].calls else ": no loss function of torch was called"))
        return passed(f"first loss {number(first)}, chance {number(expected)}")

    def _nonfinite(self, bench: Bench) -> Answer:
        if bench.has("nonfinite_input"):
            return unknown("the first loss is not finite, and neither is the input")
        first = next(p.loss for p in bench.sound if not math.isfinite(p.loss))
        pair = (
            Cause("loss function or initialisation", 0.6, "the input is finite"),
            [Remedy("scale the last layer's initial weights by 0.1", {"head_scale": 0.1})],
        )
        return failed(finding(self.diagnosis, "first loss", "the first loss is not finite", [Evidence("first loss", first)], [pair]))

    def _expected(self, bench: Bench) -> tuple[float, float | None]:
        """The first loss and chance; the loss of the data alone where a penalty on weights is added to it."""
        known = [(float(call.value), chance(call)) for call in map(data_call, bench.sound) if call is not None and call.value is not None]
        sound = [(value, at) for value, at in known if at is not None and at > 1e-12]
        call = data_call(bench.sound[0])
        if len(sound) < len(bench.sound) or (call is not None and call.family in REGRESSES and call.target.shape[0] < self.least):
            return bench.sound[0].loss, None
        return median(value for value, _ in sound), median(at for _, at in sound)

    def _sum(self, bench: Bench) -> Finding | None:
        """The loss is a sum over the batch."""
        call = bench.sound[0].pure
        said = call is not None and call.reduction == "sum"
        growth = _growth(bench, self.samples, self.doubling)
        if growth is None and not said:
            return None
        steps = pace(bench)
        torn = steps is not None and (not steps.worst <= self.blown or steps.ratio > self.rewrites)
        n = next(iter(sizes(bench.kept[0])), 1)
        evidence = [
            Evidence("loss of the batch twice over the loss of the batch", 2.0 if growth is None else growth, 1.0),
            Evidence("first loss", bench.sound[0].loss),
        ]
        if steps is not None:
            evidence.append(Evidence("largest loss of the first steps at the chosen rate over the first loss", steps.worst, self.blown))
            evidence.append(Evidence("first update over the weights", steps.ratio, self.rewrites))
        advice: Advice = [
            (
                Cause("sum reduction", 0.95, "the same samples twice give twice the loss" if growth else 'the loss function was called with reduction="sum"'),
                [Remedy('reduction="mean"', {"loss_reduction": "mean"}), Remedy(f"or divide the learning rate by the batch size ({n})", {"lr_factor": 1 / n})],
            )
        ]
        severity = Severity.WARNING if torn else Severity.INFO
        return finding(self.diagnosis, "loss", "the loss grows with the batch size", evidence, advice, severity)

    def _penalty(self, bench: Bench) -> Finding | None:
        """A term that does not depend on the batch outweighs the data's loss."""
        extra, value = penalty(bench.sound)
        if extra is None or not extra > self.penalty * value:
            return None
        evidence = [Evidence("penalty over the loss of the data", extra / value, self.penalty), Evidence("loss of the data", value), Evidence("penalty", extra)]
        factor = float(f"{value / (10 * extra):.1g}")
        advice: Advice = [
            (
                Cause("over-regularised", 0.8, "a term that is the same for every batch outweighs the data"),
                [Remedy(f"multiply the penalty's factor by {number(factor)}", {"penalty_factor": factor})],
            )
        ]
        return finding(self.diagnosis, "loss", f"a penalty makes {extra / (extra + value):.0%} of the first loss", evidence, advice)

    def _targets(self, bench: Bench) -> Finding | None:
        """Regression targets of a scale that the chosen learning rate does not bear, or would take for ever to reach."""
        call = data_call(bench.sound[0])
        if call is None or call.family not in REGRESSES or call.input.shape != call.target.shape or call.target.shape[0] < self.least:
            return None
        target = call.target.float()
        mean, std = float(target.mean()), float(target.std())
        rms = math.hypot(mean, std)
        if not rms > self.large or not std > 0:
            return None
        steps = pace(bench)
        if steps is None:
            return None
        needed = rms / steps.moved if steps.moved > 0 else math.nan
        evidence = [
            Evidence("mean of the targets", mean),
            Evidence("standard deviation of the targets", std),
            Evidence("largest loss of the first steps at the chosen rate over the first loss", steps.worst, self.blown),
        ]
        if not steps.worst <= self.blown:
            scaled = pace(bench, lambda given: (given - mean) / std)
            if scaled is None or not scaled.worst <= self.blown:  # then it is not the targets
                return None
            evidence.append(Evidence("the same with standardised targets", scaled.worst, self.blown))
            message, because = "at the chosen rate the loss rises at once, and does not with standardised targets", "gradients are as large as the targets"
        elif needed > self.far:
            evidence.append(Evidence("steps until the outputs reach the targets, at the pace of the first ones", needed, self.far))
            message, because = "the outputs would take for ever to reach the targets", f"a step moves them by {number(steps.moved)}"
        else:
            return None
        pair = (
            Cause("targets not standardised", 0.9, f"they have mean {number(mean)} and standard deviation {number(std)}: {because}"),
            [Remedy(f"train on (targets - {number(mean)}) / {number(std)}", {"standardize_targets": True})],
        )
        return finding(self.diagnosis, "targets", message, evidence, [pair])

    def _first(self, bench: Bench) -> Finding | None:
        """The first loss against chance."""
        first, expected = self._expected(bench)
        limit = self.trained if bench.pretrained else self.high
        call = data_call(bench.sound[0])
        if expected is None or call is None or first <= limit * expected:
            return None
        evidence = [Evidence("first loss", first, limit * expected), Evidence("chance", expected)]
        advice = [] if call.family in CLASSIFIES and _scale_free(bench) else self._scaled(bench, call, evidence, first, limit)
        if not advice:
            return None
        learns = advice[0][0].name == "targets not standardised"  # an output bias learns the mean: worth a line
        if bench.has("unnormalized_input") and not learns:
            advice.append((Cause("inputs out of scale", 0.95, "see unnormalized_input"), [Remedy("normalise the input first", {"normalize_input": True})]))
        severity = Severity.WARNING if first > self.trained * expected and not learns else Severity.INFO
        return finding(
            self.diagnosis, "first loss", f"{number(first)} is {number(first / expected)} times chance ({number(expected)})", evidence, advice, severity
        )

    def _scaled(self, bench: Bench, call: LossCall, evidence: list[Evidence], first: float, limit: float) -> Advice:
        rms = float(call.input.float().square().mean().sqrt())
        evidence.append(Evidence("root mean square of the outputs", rms))
        factor = float(f"{1 / max(rms, 1e-12):.1g}")
        head: tuple[Cause, list[Remedy]] = (
            Cause("output layer too large", 0.8, f"the outputs have a root mean square of {number(rms)} before training"),
            [Remedy(f"scale the last layer's initial weights by {number(factor)}", {"head_scale": factor})],
        )
        if call.family not in REGRESSES:
            wrong = (
                Cause("trained on other labels", 0.3, "trained weights that are certain and wrong look like this"),
                [Remedy("a new last layer, default initialisation", {"init": "default"})],
            )
            return [head, wrong] if rms > 1 else [wrong]
        target = call.target.float()
        zero = float(call.again(input=torch.zeros_like(target), target=target))
        mean, std, peak = float(target.mean()), float(target.std()), float(target.abs().max())
        if first > limit * zero:
            return [head]
        if peak <= self.bounded or not (abs(mean) > self.offset * std or math.hypot(mean, std) > self.large):
            return []
        evidence += [Evidence("mean of the targets", mean), Evidence("standard deviation of the targets", std)]
        return [
            (
                Cause("targets not standardised", 0.9, f"they have mean {number(mean)} and standard deviation {number(std)}, the outputs begin near zero"),
                [
                    Remedy(f"train on (targets - {number(mean)}) / {number(std)}", {"standardize_targets": True}),
                    Remedy(f"or set the last layer's bias to {number(mean)}", {"bias": mean}),
                ],
            )
        ]

    def _dropout(self, bench: Bench) -> Finding | None:
        """Regularisation turned on."""
        with bench.twin() as twin:
            loud = [twin.try_run(bench.kept[0], mode="train").loss for _ in range(3)]
        calm, on = bench.sound[0].loss, median(loud)
        if not (math.isfinite(on) and calm > 0 and on > self.rise * calm and on > self.rise * (self._expected(bench)[1] or math.inf)):
            return None
        rates = {name: m.p for name, m in bench.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
        worst = max(rates, key=lambda name: rates[name], default="")
        evidence = [
            Evidence("loss with dropout over the loss without", on / calm, self.rise),
            Evidence("loss with dropout", on),
            Evidence("loss without", calm),
        ]
        advice: Advice = [
            (
                Cause("over-regularised", 0.8, f"dropout {number(rates[worst])} at {worst!r}" if worst else "random masks in training mode"),
                [
                    Remedy(
                        "halve the dropout rate" if not worst else f"dropout {number(rates[worst])} -> {number(rates[worst] / 2)}",
                        {"dropout": rates[worst] / 2} if worst else {},
                    )
                ],
            )
        ]
        return finding(self.diagnosis, worst or "model", "the loss rises a lot with dropout on", evidence, advice)


def data_call(done: Pass) -> LossCall | None:
    """The one call of a loss function that gave a number: the whole loss, or its part that depends on the data."""
    call = done.call
    return call if call is not None and call.value is not None and not call.value.dim() else None


def penalty(passes: list[Pass]) -> tuple[float | None, float]:
    """The part of the loss that is the same in every batch, and the data's part; None if there is no such part."""
    pairs = [(p.loss, float(p.call.value)) for p in passes if p.call is not None and p.call.value is not None and not p.call.value.dim()]
    extras = [loss - value for loss, value in pairs]
    if len(pairs) < 2 or min(extras) <= 0 or max(extras) - min(extras) > 1e-3 * max(extras):
        return None, math.nan
    return median(extras), median(value for _, value in pairs)


def _scale_free(bench: Bench) -> bool:
    """With all weights at a quarter the outputs are as large as before: the head normalises, and their scale is the one chosen for them."""
    with bench.twin() as twin:
        before = data_call(twin.try_run(bench.kept[0]))
        with torch.no_grad():
            for p in twin.model.parameters():
                if p.numel() > 1 and p.is_floating_point():  # a lone number is a temperature
                    p.mul_(0.25)
        after = data_call(twin.try_run(bench.kept[0]))
    if before is None or after is None:
        return False
    return float(after.input.float().norm()) > QUARTERED * float(before.input.float().norm())


def _growth(bench: Bench, samples: int, within: float) -> float | None:
    """Loss of the batch twice over its loss, where the batch twice gives two and four times gives four; else None."""
    try:
        n = min(samples, *sizes(bench.kept[0]))
        batches = [chosen(bench.kept[0], list(range(n)) * times) for times in (1, 1, 2, 4)]
    except (ValueError, TypeError):
        return None
    with bench.twin() as twin:
        losses = [twin.try_run(batch).loss for batch in batches]
    one, again, two, four = losses
    if not all(math.isfinite(l) for l in losses) or abs(one) < 1e-12 or abs(one - again) > 1e-3 * abs(one):
        return None
    return two / one if abs(two / one - 2) <= 2 * within and abs(four / one - 4) <= 4 * within else None
