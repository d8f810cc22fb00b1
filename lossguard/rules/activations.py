"""Units that are dead, at their rails, or the same for every sample. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings, structure
from lossguard.advice import (
    TO_A_TARGET,
    converged,
    fallen,
    listing,
    lr_remedy,
    matrices,
    medians,
    newest,
    ranked,
    reach,
    slower,
    steady,
    stretch,
    typically,
)
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History, Mask, Unit
from lossguard.obstacles import FAST
from lossguard.rules.latents import posterior
from lossguard.rules.rule import rule
from lossguard.rules.suspects import decay, outweighed

_GATES = ("gate", "attn", "attention", "glu", "excite", "lstm", "gru")  # parts of a module's name that say: rails are its working points
UNLEARNED = 0.9  # loss over the first loss, above which next to nothing was learned
_RAILS = ("Sigmoid", "Tanh", "Softmax", "Hardsigmoid", "Hardtanh", "Softsign", "LogSigmoid")


def unit_at(history: History, site: int) -> Unit:
    """The unit of a site; a nameless one if it was not registered."""
    return history.units[site] if site < len(history.units) else Unit(f"module call {site}", "Module")


@rule
@dataclass(frozen=True)
class DeadRelu:
    """dead_relu: more than half of a layer's units are silent for every sample of a whole window (survey, dead_relu).

    Law: a unit is silent if it gave 0 for every sample and position of a window of at least 30 samples; a layer is ill if more than
    0.5 of its units are (0.75 below 32 units, all below 8), an error above 0.9. Up to 0.75 it is information while the loss comes
    down, as long as the share has not grown since step 100 or the loss has gone on falling since. Element-wise sparsity (healthy up to 0.97) never
    counts; shares of silent units reach 0.17 in health, and 0.36 in a narrow bottleneck.

    Why: a learning rate too high pushed the units below zero for every input; a bias far below 0 or weights of a wrong scale at the
    start; inputs that are not centred.
    Do: units dead from the first batch: bias 0 and He initialisation; units that died: divide the learning rate by 10; in both cases
    LeakyReLU(0.01) or GELU keeps a gradient; a normalisation before the activation.
    False alarm: bottlenecks, rare classes and mixtures of experts have units that rest for long: the share, and the window of samples,
    keep silent there; ``DeadRelu(share=0.8)`` for networks that are sparse by design. A loss of 0 has no gradient anywhere and is left out.
    """

    diagnosis: ClassVar[str] = "dead_relu"
    reads: ClassVar[tuple[str, ...]] = ("dead_fraction",)
    slow: ClassVar[bool] = True
    share: float = 0.5  # share of units, warns; survey
    grave: float = 0.9  # share of units, error; survey
    few: int = 8  # units; a narrower layer must be dead altogether; survey
    narrow: int = 32  # units; below it chance is large (bottleneck of 16: 0.36), and the share must exceed `narrow_share`; our own choice
    narrow_share: float = 0.75  # share of units in a narrow layer; our own choice
    memory: int = 64  # samples for which a window's verdict stands; windows end at every 30 samples or more
    bearable: float = 0.75  # share of units up to which a run that learns is only told, unless the share grew; our own choice
    learned: float = 0.9  # loss over the first loss: below it the run learns; our own choice, other rules ask for more before they are silent
    trial: int = 200  # steps before it is asked whether the run learns; our own choice
    errors: float = 3.0  # standard errors of a share of so many units, beyond which it grew; our own choice
    born: float = 0.95  # of the zeros that dead units alone would give: seen in the first batch, they were born dead; our own choice
    grace: int = 0  # steps; the window of at least 30 samples is the grace
    patience: int = 1  # samples; the window is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        if not reach(history, "dead_fraction", self.memory)[1] > self.share:
            return None
        dead, when = newest(history, "dead_fraction", self.memory)
        dead = np.where((dead >= 0) & (dead <= 1), dead, np.nan)  # what is no share was not measured
        units = [unit_at(history, i) for i in range(dead.size)]
        limits = np.array([self._limit(u.width) for u in units])
        with np.errstate(invalid="ignore"):
            sick = np.where(limits >= 1.0, dead >= 1.0, dead > limits)
        rows = np.array([u.kind == "gradient rows" for u in units])
        if converged(history) or (history.losses(1).size and history.losses(1)[0] == 0.0):
            sick &= ~rows  # a loss of 0 has no gradient anywhere
        if not sick.any():
            return None
        return self._finding(history, units, dead, self._root(dead, sick, rows), sick, when)

    def _grows(self, history: History, root: int, dead: Array) -> bool:
        """Units died after the beginning, more than then by 3 standard errors of so many units, and the loss has not fallen since."""
        values = history.last("dead_fraction")[:, root]
        known = values[np.isfinite(values) & (history.steps() >= self.trial // 2)]
        if not known.size:
            return False
        before, width = float(known[0]), max(unit_at(history, root).width, 1)
        error = float(np.sqrt(max(before * (1 - before), dead[root] * (1 - dead[root])) / width))
        if not dead[root] - before > self.errors * error:
            return False
        losses = history.losses()[history.loss_steps() >= self.trial // 2]
        return losses.size < readings.LEAST or readings.change(losses[np.isfinite(losses)]) != "falling"

    def _limit(self, width: int) -> float:
        return 1.0 if 0 < width < self.few else self.narrow_share if 0 < width < self.narrow else self.share

    def _root(self, dead: Array, sick: Mask, rows: Mask) -> int:
        """Where it begins: the first sick layer; of gradient rows that are all dead the last, for everything before it reads as dead."""
        whole = np.flatnonzero(sick & rows & (dead >= 1.0))
        if whole.size and not (sick & ~rows).any():
            return int(whole[-1])
        forward = np.flatnonzero(sick & ~rows)
        all_dead = forward[dead[forward] > self.grave]
        return int((all_dead if all_dead.size else forward if forward.size else np.flatnonzero(sick))[0])

    def _finding(self, history: History, units: list[Unit], dead: Array, root: int, sick: Mask, when: Array) -> Finding:
        unit, share = units[root], float(dead[root])
        many = f"{round(share * unit.width)} of {unit.width} units" if unit.width else f"{share:.0%} of the units"
        first = history.born("zero_fraction")[root] if root < history.born("zero_fraction").size else np.nan
        known = [found for found in (outweighed(history), decay(history), structure.dropout(history)) if found is not None]
        ratio = history.last("update_ratio")
        each = medians(ratio, matrices(history)) if ratio.size and matrices(history).any() else np.empty(0)
        fast = float(np.max(each, initial=0.0, where=np.isfinite(each)))
        rate = f"updates changed up to {number(fast)} of the weights" if fast > 0 else f"{many} of {unit.name} were pushed below zero"
        unlearned = self._unlearned(history)
        born = bool(first >= self.born * (share + 0.5 * (1 - share)))  # units that live are silent half of the time
        began = f"{first:.0%} of its outputs were 0 in the first batch" if np.isfinite(first) else "its first outputs were not seen"
        causes, remedies = ranked([
            *known,
            (Cause("bias or initialisation", 0.8 if born else 0.3, began),
             [Remedy(f"set the bias before {unit.name} to 0 and initialise its weights by He", {"bias": 0.0, "init": "he"})]),
            (Cause("learning rate too high", 0.2 if born else 0.6 if fast > FAST else 0.4, rate),
             [lr_remedy(history, 0.1), Remedy(f"use LeakyReLU(0.01) for {unit.name}", {"activation": "leaky_relu"})]),
            *([] if born or not unlearned else [unlearned]),
        ])  # fmt: skip
        others = listing(units[i].name for i in np.flatnonzero(sick) if i != root)
        message = f"{many} are silent for every sample of the last window" + (f"; also {others}" if others else "")
        severity = Severity.ERROR if share > self.grave else Severity.WARNING
        learns = history.step < self.trial or fallen(history) < self.learned
        if learns and float(dead[sick].max()) <= self.bearable and not self._grows(history, root, dead):
            severity = Severity.INFO
        evidence = (Evidence("share of silent units", share, self._limit(unit.width)),)
        return Finding(self.diagnosis, severity, int(when[root]), f"{unit.name} ({unit.kind})", message, evidence, causes, remedies)

    @staticmethod
    def _unlearned(history: History) -> tuple[Cause, list[Remedy]] | None:
        """Nothing was learned though the weights move: units that tell nothing of the targets are let go."""
        fell = fallen(history)
        if not fell > UNLEARNED or history.step < DeadRelu.trial // 2:
            return None
        look = Remedy("look at 20 samples and their labels by eye, and try to overfit one batch", {"look_at": 20})
        return Cause("labels or targets do not belong to the inputs", 0.5, f"the loss is {fell:.0%} of what it was at first"), [look]


@rule
@dataclass(frozen=True)
class SaturatedActivation:
    """saturated_activation: more than half of a hidden layer's sigmoid or tanh units sit at their rails (survey, saturated_activation).

    Law: a unit is at its rails if its normalised derivative is below 0.02 on more than 95 % of the positions; a hidden layer is ill if
    more than half of its units are, in every sample of 20 steps. The output that feeds the loss and gates are excluded.

    Why: initial weights too large for the width; inputs of a large scale; a learning rate that blew the weights up.
    Do: Xavier initialisation before the layer; inputs with mean 0 and deviation 1; learning rate divided by 10; ReLU or GELU instead.
    False alarm: gates and outputs learn to sit at their rails: modules named or typed as gates, attention or recurrent cells, and the
    last activation are not judged. A hidden layer that is meant to be binary: mute it, or ``SaturatedActivation(share=0.95)``.
    """

    diagnosis: ClassVar[str] = "saturated_activation"
    reads: ClassVar[tuple[str, ...]] = ("saturated_fraction",)
    slow: ClassVar[bool] = True
    share: float = 0.5  # share of units whose normalised derivative is below 0.02 on more than 95 % of positions; survey
    span: int = 20  # steps (survey: 100 batches; a share over a whole batch is steady, and short runs must hear it)
    least: int = 3  # samples in the span
    grace: int = 0  # steps; the span is the grace
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        if not n or not reach(history, "saturated_fraction", n)[1] > self.share:
            return None
        sick = steady(history, "saturated_fraction", n, self.least, lambda v: v > self.share)
        output = self._output(history)
        sick &= np.array([i != output and not self._gate(unit_at(history, i)) for i in range(sick.size)], dtype=np.bool_)
        if not sick.any():
            return None
        first = int(np.flatnonzero(sick)[0])
        unit, share = unit_at(history, first), float(typically(history, "saturated_fraction", n)[first])
        rms = typically(history, "input_rms", n) if history.last("input_rms", n).size else np.empty(0)
        loud = float(np.nanmax(rms)) if np.isfinite(rms).any() else 1.0
        pairs = [(Cause("weights or learning rate too large", 0.5, f"{share:.0%} of the units of {unit.name} are at their rails"),
                  [Remedy(f"initialise the layer before {unit.name} by Xavier", {"init": "xavier"}), lr_remedy(history, 0.1)])]  # fmt: skip
        if loud > 10:  # survey, unnormalized_input: std outside [1e-2, 1e1]
            remedy = Remedy(f"normalise the input: divide it by {number(loud)}", {"normalize_input": True})
            pairs.append((Cause("input not normalised", 0.8, f"its root mean square is {number(loud)}"), [remedy]))
        causes, remedies = ranked(pairs)
        message = f"{share:.0%} of its units are at their rails on more than 95 % of the positions; layers like it: {int(sick.sum()) - 1}"
        evidence = (Evidence("share of saturated units", share, self.share),)
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(n)[0]), f"{unit.name} ({unit.kind})", message, evidence, causes, remedies)

    @staticmethod
    def _output(history: History) -> int:
        """The site that feeds the loss: the last module call that contains no other, if it has rails; else -1."""
        names = [u.name for u in history.units]
        leaves = [i for i, name in enumerate(names) if name and not any(other.startswith(f"{name}.") for other in names)]
        return leaves[-1] if leaves and history.units[leaves[-1]].kind in _RAILS else -1

    @staticmethod
    def _gate(unit: Unit) -> bool:
        return any(word in unit.name.lower() or word in unit.kind.lower() for word in _GATES)


@rule
@dataclass(frozen=True)
class CollapsedActivation:
    """collapsed_activation: a layer, and all that follow it, give the same output for every sample (survey, collapsed_activation).

    Law: between-sample variance over second moment < 1e-6 (error), or < 1e-5 after step 100 (warning), for 20 steps. Healthy >= 7e-4.
    Layers that are followed by one that tells samples apart (positional streams, residual branches) do not count. Law (agreed), a
    warning: the last module runs more than once in a step, the loss is a distance and has come down to 1 %, its outputs are no larger than
    at first, and their variance is below 7e-4 and 1 % of the first one: two views were brought together by making all samples the same. Law
    (posterior), a warning: of terms told by name the divergence ("kl") is, in the mean of 50 losses and of the 50 before, below 5e-3 of
    the reconstruction ("rec...") and below a tenth of its own largest such mean, and does not rise: the code of all samples is the prior.

    Why: dead, saturated or constant weights in or before the layer; a learning rate that drove the network there; identical inputs.
    Do: look at one batch; initialise at random (He for ReLU, Xavier else), never by zeros or a constant; divide the learning rate by
    10; a normalisation between the layers; a term that holds samples apart, where views are only drawn together; a smaller weight of the divergence.
    False alarm: a head born at zero gives one output at first: 20 steps of grace. A regression towards targets far from 0 has a small
    variance beside its mean: two layers must agree there. A run whose loss has halved is judged by the last law only.
    """

    diagnosis: ClassVar[str] = "collapsed_activation"
    reads: ClassVar[tuple[str, ...]] = ("sample_variance",)
    slow: ClassVar[bool] = True
    variance: float = 1e-6  # of the second moment, error; survey
    mild: float = 1e-5  # of the second moment, warning; survey
    mild_after: int = 100  # steps; survey
    span: int = 20  # steps; survey (20 in a row)
    least: int = 3  # samples in the span; two decades of margin
    alike: float = 7e-4  # of the second moment: outputs that are compared with one another, after they were different; survey, the healthy end
    kept: float = 0.01  # of their first such variance; our own choice, healthy runs keep 0.025 and more
    agreed: float = 0.01  # of the first losses: the loss that is solved so; our own choice
    code: float = 5e-3  # divergence over reconstruction: a code that tells nothing; our own choice, healthy ones keep 0.02 and more
    emptied: float = 0.1  # of the divergence's largest mean: it was there and went; our own choice
    mean: int = 50  # losses in such a mean; our own choice
    learning: float = 0.5  # loss over the first loss below which the network evidently tells samples apart; our own choice
    grace: int = 20  # steps; zero-initialised heads give identical outputs at first
    patience: int = 1  # samples; the span is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        n = stretch(history, self.span, self.least)
        found = self._posterior(history)
        if found is not None or not n or not reach(history, "sample_variance", n)[0] < self.alike:
            return found
        if fallen(history) < self.learning:
            return self._agreed(history, n)
        if not reach(history, "sample_variance", n)[0] < self.mild:
            return None
        found = self._collapsed(history, n, self.variance, Severity.ERROR)
        if found is None and history.step >= self.mild_after:
            found = self._collapsed(history, n, self.mild, Severity.WARNING)
        return found

    def _collapsed(self, history: History, n: int, limit: float, severity: Severity) -> Finding | None:
        sick = steady(history, "sample_variance", n, self.least, lambda v: v < limit) | self._silent(history, n)
        measured = np.flatnonzero(history.seen("sample_variance", n).any(axis=0))
        varied = measured[~sick[measured]]
        tail = measured[measured > varied[-1]] if varied.size else measured
        offset = history.loss_family in ("mse", "l1", "huber", "unknown")  # a target far from 0 makes the output's own variance small beside it
        if tail.size < (2 if offset and measured.size > 1 else 1):
            return None
        first = int(tail[0])
        unit, value = unit_at(history, first), float(typically(history, "sample_variance", n)[first])
        pairs = [(Cause("dead, saturated or constant weights", 0.6, f"samples differ before {unit.name} and not after"),
                  [Remedy(f"initialise {unit.name} at random (He for ReLU, Xavier else)", {"init": "he"}), lr_remedy(history, 0.1)])]  # fmt: skip
        pairs += [why for why in (self._since(history, n, first), decay(history)) if why is not None]
        if not varied.size:
            pairs = [(Cause("constant weights or identical inputs", 0.6, "no measured layer tells samples apart"),
                      [Remedy(f"look at one batch, and initialise {unit.name} at random", {"init": "he"})])]  # fmt: skip
        causes, remedies = ranked(pairs)
        after = {0: "", 1: ", and so is that of the layer after it"}.get(tail.size - 1, f", and so is that of the {tail.size - 1} layers after it")
        message = f"its output is the same for every sample{after}"
        evidence = (Evidence("between-sample variance over second moment", value, limit),)
        return Finding(self.diagnosis, severity, int(history.steps(n)[0]), f"{unit.name} ({unit.kind})", message, evidence, causes, remedies)

    def _since(self, history: History, n: int, first: int) -> tuple[Cause, list[Remedy]] | None:
        """What its first outputs tell of a layer that has one output now: it began so, or large steps made it so."""
        unit, size, born = unit_at(history, first), history.born("activation_rms"), history.born("sample_variance")
        if unit.kind == "ReLU" and first < size.size and size[first] == 0.0:
            fix = Remedy(f"set the bias before {unit.name} to 0 and initialise its weights by He", {"bias": 0.0, "init": "he"})
            return Cause("bias or initialisation", 0.8, f"{unit.name} gave 0 for every sample from the first batch on"), [fix]
        began, steps, ratio = int(history.steps(n)[0]), history.steps(), history.last("update_ratio")
        if not ratio.size or not (first < born.size and born[first] >= self.alike):
            return None
        before = medians(ratio[(steps > began - self.span) & (steps <= began)], matrices(history))
        fastest = float(np.max(before, initial=0.0, where=np.isfinite(before)))
        if not fastest > FAST:
            return None
        because = f"its first outputs were different ({number(float(born[first]))}), and the steps before changed up to {number(fastest)} of the weights"
        return Cause("learning rate too high", 0.7, because), [slower(history)]

    def _posterior(self, history: History) -> Finding | None:
        """Law (posterior)."""
        read = posterior(history, self.mean)
        if read is None or not read.now < min(self.code * read.beside, self.emptied * read.most):
            return None
        causes, remedies = ranked([read.cause])
        evidence = (Evidence("divergence over reconstruction", read.now / read.beside, self.code), Evidence("divergence", read.now, self.emptied * read.most))
        message = "the latent code is the prior for every sample: what is decoded does not depend on what was encoded"
        return Finding(self.diagnosis, Severity.WARNING, history.step, f"term {read.divergence!r}", message, evidence, causes, remedies)

    def _agreed(self, history: History, n: int) -> Finding | None:
        """Law (agreed)."""
        if history.loss_family not in TO_A_TARGET or not fallen(history) < self.agreed:
            return None
        measured = np.flatnonzero(history.seen("sample_variance", n).any(axis=0))
        last = int(measured[-1])
        unit, born, rms = unit_at(history, last), history.born("sample_variance"), typically(history, "activation_rms", n)
        again = unit.name.partition("[")[0]
        if again == unit.name or not any(u.name == again for u in history.units[:last]):
            return None  # it runs once in a step
        value = float(typically(history, "sample_variance", n)[last])
        if not value < min(self.alike, self.kept * float(born[last])) or not rms[last] <= history.born("activation_rms")[last]:
            return None
        because = f"{again} runs more than once in a step, its outputs are compared with one another, and nothing holds those of different samples apart"
        apart = Remedy("add a term that holds samples apart: negatives, a variance term, or a predictor and a stopped gradient", {"parameter": again})
        causes, remedies = ranked([(Cause("same output for every sample", 0.8, because), [apart])])
        evidence = (Evidence("between-sample variance over second moment", value, self.kept * float(born[last])),)
        message = "its outputs have become the same for every sample, which is how the loss fell to nothing"
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps(n)[0]), f"{again} ({unit.kind})", message, evidence, causes, remedies)

    def _silent(self, history: History, n: int) -> Mask:
        """Sites whose output is 0 throughout, so that the variance over the second moment is 0/0."""
        width = history.last("sample_variance", n).shape[1]
        silent = np.zeros(width, dtype=np.bool_)
        zero = steady(history, "activation_rms", n, self.least, lambda v: v == 0.0)[:width]
        silent[: zero.size] = zero
        return silent & np.isnan(history.last("sample_variance", n)).all(axis=0) & history.seen("sample_variance", n).any(axis=0)
