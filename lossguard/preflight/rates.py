"""The check of the learning rate: a sweep over copies. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from lossguard.findings import Cause, Evidence, Remedy, Severity, number
from lossguard.preflight.bench import Bench, Twin, told
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown

ROOTS = ("invalid_labels", "unnormalized_input", "wrong_output_activation", "poor_initialization", "unchanged_weights", "initial_loss_off")
FALL = 1e-3  # of the first loss: a smaller fall in some steps is none


@check
@dataclass(frozen=True)
class LearningRateRange:
    """learning_rate_range: the learning rate lies at an edge of the range that works, or outside (survey, update_ratio).

    A short sweep in the log domain: copies are trained for a few steps by a fresh optimizer of the same kind at half decades around the
    chosen rate, all groups by the same factor. The good range is where the loss falls by a good part of the best fall. It is an info: few
    steps say little about the end of a long run, but a rate at which the loss rises at once is too high without a warm-up.

    Why: a rate copied from another model, optimizer or batch size; SGD's rate given to Adam.
    Do: take the rate given, a third of the one with the fastest fall; search further in the log domain.
    False alarm: with warm-up the run does not begin at this rate; then the upper edge is not reached. Schedules are not simulated.
    """

    diagnosis: ClassVar[str] = "learning_rate_range"
    steps: int = 12  # of each rate; our own choice: a rate far too high shows within 10 (survey, update_ratio_high)
    decades: float = 2.0  # searched on either side of the chosen rate, in half decades; our own choice
    further: float = 5.0  # decades searched where no rate within the first ones works; our own choice
    works: float = 0.05  # of the first loss: a smaller fall at every rate sends the sweep further; our own choice
    good: float = 0.2  # of the best fall of the loss; our own choice
    low: float = 90.0  # the chosen rate is too low if only rates this many times higher are good; our own choice: a few steps favour high rates
    blown: float = 1.5  # loss over the first loss that counts as diverged; our own choice: plain noise stays below
    share: float = 0.25  # of the time budget

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if not bench.optimizers:
            return unknown("no optimizer was given")
        if not bench.sound or any(not math.isfinite(p.loss) for p in bench.sound):
            return unknown(bench.why_no_pass if not bench.sound else "the first loss is not finite")
        roots = [f.diagnosis for f in bench.found if f.severity > Severity.INFO and f.diagnosis in ROOTS]
        if roots:
            return unknown(f"repair first what was found: {roots[0]}")
        chosen_rate = max(_rate(g) for o in bench.optimizers for g in o.param_groups)
        if not chosen_rate > 0:
            return unknown("the learning rate is 0")
        end = bench.deadline(self.share)
        after: dict[float, float] = {}
        first = math.nan
        for factor in self._factors():
            if abs(math.log10(factor)) > self.decades + 0.1 and not self._lost(first, after, factor):
                continue
            if time.monotonic() > end:
                return unknown("the time was over before the sweep was done")
            try:
                first, after[factor] = self._run(bench, factor)
            except Exception as error:
                return unknown(f"the optimizer could not be tried on a copy: {told(error)}")
        return self._judge(chosen_rate, first, after, bounded=bench.sound[0].call is not None)

    def _factors(self) -> Iterator[float]:
        n = round(2 * self.decades)
        for k in sorted(range(-n, n + 1), key=abs):
            yield 10 ** (k / 2)
        for k in range(round(self.decades) + 1, round(self.further) + 1):
            yield from (10.0**-k, 10.0**k)

    def _lost(self, first: float, after: dict[float, float], factor: float) -> bool:
        """No rate works yet, and this one lies on the side that may."""
        if any(first - loss > self.works * abs(first) for loss in after.values()):
            return False
        blown = any(loss > first + (self.blown - 1) * abs(first) for f, loss in after.items() if f <= 1)
        return blown if factor < 1 else not blown

    def _run(self, bench: Bench, factor: float) -> tuple[float, float]:
        """The loss of the first batches before and after some steps at this rate."""
        with bench.twin() as twin:
            names = {id(p): n for n, p in Twin(bench.model, bench.criterion, bench.forward).trainable.items()}
            optimizers = [rebuilt(o, names, twin.trainable, factor) for o in bench.optimizers]
            batches = bench.kept[:2]
            before = sum(twin.run(batch).loss for batch in batches) / len(batches)
            for step in range(self.steps):
                done = twin.run(bench.kept[step % len(bench.kept)], mode="train", grad=True)
                if done.value is None or not math.isfinite(done.loss):
                    return before, math.inf
                for optimizer in optimizers:
                    optimizer.zero_grad()
                done.value.backward()  # type: ignore[no-untyped-call]
                for optimizer in optimizers:
                    optimizer.step()
            last = sum(twin.run(batch).loss for batch in batches) / len(batches)
        return before, last if math.isfinite(last) else math.inf

    def _judge(self, rate: float, first: float, after: dict[float, float], *, bounded: bool) -> Answer:
        falls = {f: first - loss for f, loss in after.items()}
        best = max(falls, key=lambda f: falls[f])
        if not falls[best] > FALL * abs(first):
            return unknown(f"no rate from {number(rate * min(after))} to {number(rate * max(after))} lowers the loss in {self.steps} steps")
        good = sorted(f for f, fall in falls.items() if fall >= self.good * falls[best])
        span = f"{number(rate * good[0])} to {number(rate * good[-1])}"
        up = min(f for f in after if f > 1)
        limit = first + (self.blown - 1) * abs(first)
        message = ""
        if after[1.0] > limit:
            message, name = f"at the chosen rate {number(rate)} the loss rises at once; the good range is {span}", "learning rate too high"
        elif after[up] > limit:
            message, name = (
                f"the chosen rate {number(rate)} is at the upper edge: {number(rate * up)} diverges; the good range is {span}",
                "learning rate at the upper edge",
            )
        elif good[0] > self.low and bounded:  # a loss without a floor falls fastest where it is torn apart
            message, name = f"the chosen rate {number(rate)} is below the good range, {span}", "learning rate too low"
        if not message:
            within = good[0] <= 1.0 <= good[-1]
            return passed(f"{number(rate)} lies within the good range, {span}" if within else f"{number(rate)} works; in {self.steps} steps {span} is faster")
        new = float(f"{rate * best / 3:.1g}")
        evidence = [
            Evidence("loss after the sweep's steps at the chosen rate", after[1.0], limit),
            Evidence("first loss", first),
            Evidence("rate with the fastest fall", rate * best),
        ]
        pair = (
            Cause(name, 0.6, f"loss {number(first)} -> {number(after[1.0])} in {self.steps} steps; at {number(rate * best)} -> {number(after[best])}"),
            [Remedy(f"learning rate {number(rate)} -> {number(new)}", {"lr": new})],
        )
        return failed(finding(self.diagnosis, "learning rate", message, evidence, [pair]))


def _rate(group: dict[str, Any]) -> float:
    """A group's learning rate, before a scheduler's warm-up if one is at work."""
    return float(group.get("initial_lr", group.get("lr", 0.0)))


def rebuilt(optimizer: Optimizer, names: dict[int, str], parameters: dict[str, Any], factor: float) -> Optimizer:
    """A fresh optimizer of the same kind over the copy's parameters, its rates times a factor."""
    groups = []
    for group in optimizer.param_groups:
        held = [parameters[names[id(p)]] for p in group["params"] if names.get(id(p)) in parameters]
        if held:
            settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({**settings, "params": held, "lr": _rate(group) * factor})
    if not groups:
        raise ValueError("it holds no parameter of the model")
    accepted = type(optimizer).__init__.__code__.co_varnames
    fresh: Optimizer = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in accepted and k != "lr"}, lr=max(g["lr"] for g in groups))  # type: ignore[call-arg]
    return fresh
