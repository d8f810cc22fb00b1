"""How a run begins: weights that cannot learn, scales that shrink or grow through the depth. Numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from lossguard import structure
from lossguard.advice import listing, middle, ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.history import Array, History
from lossguard.rules.rule import rule
from lossguard.rules.suspects import LOUD, loud_input

_MATRICES = ("Linear", "Conv", "Bilinear")  # parts of the names of module classes that multiply by a weight


@rule
@dataclass(frozen=True)
class PoorInitialization:
    """poor_initialization: the weights begin so that layers cannot learn (survey, poor_initialization).

    Law, on the first samples of a run only. (a) Two matrices that follow one another have all elements equal, so that their
    units are the same for ever. (b) Half of the matrices, two at least, begin at exactly 0 and get exactly no gradient in 5
    samples, while others do. (c) The scale of the layers' outputs runs away: median and geometric mean of the gain from one layer
    to the next are both below 0.5, or both above 2 (He 0.93, torch's default 0.83, BatchNorm 1.0; He times 3: 2.87), and
    the product over the depth is beyond a factor of 100.

    Why: weights filled with a constant or with zeros; an initialisation for another activation or with a wrong fan; a
    standard deviation set by hand for every layer alike, whatever its width.
    Do: He initialisation for ReLU-like activations, Xavier for tanh and sigmoid, std = sqrt(gain / fan_in); biases 0; or a
    normalisation after each layer.
    False alarm: zero-initialised heads, residual branches and LoRA's B get gradients, or their neighbours are random; one
    constant layer alone is broken up by its neighbours; normalisations between layers begin a new chain; the last layer
    (heads are often small) does not count; embeddings are no layers. Widen ``shrink`` and ``grow`` for odd designs.
    """

    diagnosis: ClassVar[str] = "poor_initialization"
    reads: ClassVar[tuple[str, ...]] = ("activation_rms", "weight_range", "grad_norm")
    shrink: float = 0.5  # gain of a layer; survey (b)
    grow: float = 2.0  # gain of a layer; survey (b)
    factor: float = 100.0  # over the whole depth; our own choice, torch's default convolutions shrink 20 times until their biases carry
    layers: int = 4  # gains in the chain at least; our own choice, few layers are an architecture and no trend
    samples: int = 5  # first samples in which zero matrices stay without gradient; our own choice, two zero layers in a row thaw within 3
    most: float = 0.5  # share of the matrices that are such zeros; our own choice, adapters that no batch has reached yet are fewer
    start: int = 10  # steps; a later sample is no start
    grace: int = 0  # steps; the start is what is judged
    patience: int = 1  # samples; the first batch tells scales exactly enough

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the first data."""
        if not 0 < history.samples <= 2 * self.samples or history.steps()[-1] >= self.start or history.steps()[0] > 0:
            return None
        return self._constant(history) or self._zero(history) or self._runaway(history)

    def _constant(self, history: History) -> Finding | None:
        """Law (a)."""
        ranges, born = history.born("weight_range"), history.born("weight_norm")
        looked = np.flatnonzero(np.isfinite(ranges))
        if looked.size < 2 or born.size <= looked[-1]:
            return None
        flat = (ranges[looked] == 0.0) & (born[looked] > 0.0)
        pairs = flat[1:] & flat[:-1]
        if not pairs.any():
            return None
        names = [history.params[i].name for i in looked[flat]]
        evidence = Evidence("matrices whose elements are all equal", float(len(names)), 1.0)
        message = f"all its elements are equal, and so are those of the next matrix: all units are the same for ever ({listing(names)})"
        return self._finding(history, names[0], message, evidence, "constant weights", "all units of a layer get the same gradient")

    def _zero(self, history: History) -> Finding | None:
        """Law (b)."""
        n, born, matrix = self.samples, history.born("weight_norm"), history.kinds("matrix") & history.held
        if history.samples < n or not born.size or not history.last("grad_norm", n).size:
            return None
        gradients, seen = history.last("grad_norm", n), history.seen("grad_norm", n)
        none = seen.all(axis=0) & (gradients == 0.0).all(axis=0)
        zero = matrix & (born == 0.0) & none & (history.last("weight_norm", 1)[0] == 0.0)
        others = history.fact("stepped", n)
        if zero.sum() < max(2, self.most * matrix.sum()) or not (gradients > 0).any() or not bool((others == 1.0).all()):
            return None
        names = [history.params[i].name for i in np.flatnonzero(zero)]
        evidence = Evidence("matrices at 0 without gradient", float(len(names)), 1.0)
        message = f"it began at 0 and has had no gradient in {n} steps; {len(names)} such ({listing(names)})"
        return self._finding(history, names[0], message, evidence, "weights all zero", "zeros pass neither activations nor gradients on")

    def _runaway(self, history: History) -> Finding | None:
        """Law (c)."""
        gains, first = self._gains(history)
        if gains.size < self.layers:
            return None
        mean, median, total = float(np.exp(np.log(gains).mean())), float(middle(gains)), float(np.exp(np.abs(np.log(gains).sum())))
        small, large = max(mean, median) < self.shrink, min(mean, median) > self.grow
        if not (small or large) or not total > self.factor:
            return None
        word, end = ("shrinks", "small") if small else ("grows", "large")
        evidence = Evidence("gain from layer to layer", mean, self.shrink if small else self.grow)
        message = f"the scale {word} by {number(mean)} from layer to layer, {number(total)} times over {gains.size + 1} layers"
        return self._finding(history, first, message, evidence, f"weights too {end}", f"gain {number(mean)} in {gains.size} steps of depth")

    @staticmethod
    def _gains(history: History) -> tuple[Array, str]:
        """The gains along the longest chain of layers without a normalisation between; the last layer does not count."""
        rms = history.born("activation_rms")
        layers: list[tuple[int, str, float]] = []
        chain = 0
        for unit, value in zip(history.units, rms.tolist(), strict=False):
            chain += "Norm" in unit.kind
            if unit.kind.startswith(_MATRICES) or unit.kind.removeprefix("Lazy").startswith(_MATRICES):
                layers.append((chain, unit.name, value))
        layers = [x for x in layers[:-1] if np.isfinite(x[2]) and x[2] > 0]
        chains = [[x for x in layers if x[0] == number] for number in range(chain + 1)]
        longest = max(chains, key=len)
        return np.array([b[2] / a[2] for a, b in pairwise(longest)]), longest[0][1] if longest else ""

    def _finding(self, history: History, where: str, message: str, evidence: Evidence, cause: str, because: str) -> Finding:
        tanh = any(u.kind in ("Tanh", "Sigmoid") for u in history.units)
        scheme, word = ("xavier", "Xavier") if tanh else ("he", "He")
        remedy = Remedy(f"initialise the weights by {word}'s rule, biases by 0", {"init": scheme})
        norm = Remedy("add a normalisation after each layer", {"add": "normalization"})
        causes, remedies = ranked([(Cause(cause, 0.9, because), [remedy, norm])])
        return Finding(self.diagnosis, Severity.WARNING, int(history.steps()[0]), where, message, (evidence,), causes, remedies)


@rule
@dataclass(frozen=True)
class FirstLossOff:
    """initial_loss_off: the first cross entropy is far above that of equally likely classes (survey, initial_loss_off).

    Law: the loss of step 0, before any update, is torch's own mean cross entropy and above 3 ln C; where the number of classes C cannot be
    seen, above 3 ln 262144, for hardly a softmax has more. Where the input, or what a layer before the last one gives, is far above unit
    scale, it is not the head that makes the loss: other diagnoses tell of that.

    Why: an output layer with too large weights: an embedding that is tied to the head and keeps a deviation of 1, a last layer without an
    initialisation of its own, a temperature near 0.
    Do: a deviation of 0.02 for embeddings that are tied to the head; the last layer's initial weights times 0.1; a temperature of 0.05 or
    above for normalised embeddings.
    False alarm: a network that was trained on other labels may begin so by design: mute it. Sums, and sums of several terms, are not judged.
    """

    diagnosis: ClassVar[str] = "initial_loss_off"
    reads: ClassVar[tuple[str, ...]] = ("loss", "input_rms", "activation_rms")
    times: float = 3.0  # ln C; survey has 2 for a line of information, healthy runs have 0.86 to 1.38
    most: int = 262144  # classes, where they cannot be seen: the largest vocabularies in use
    start: int = 10  # steps; later the first loss is no news
    grace: int = 0  # steps; the start is what is judged
    patience: int = 1  # samples; the first batch tells a factor of 3 exactly enough

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the first data."""
        if history.step >= self.start or history.first_step != 0 or history.loss_family != "cross_entropy" or not history.notes.get("loss_is_mean"):
            return None
        first, chance = float(history.losses()[0]), structure.chance(history)
        limit = self.times * (math.log(self.most) if math.isnan(chance) else chance)
        if not limit < first < np.inf or loud_input(history) is not None:
            return None
        inner = history.born("activation_rms")[:-1]
        return None if inner.size and np.nanmax(inner, initial=0.0) > LOUD else self._finding(first, chance, limit)

    def _finding(self, first: float, chance: float, limit: float) -> Finding:
        over = "above that of any number of classes" if math.isnan(chance) else f"{number(first / chance)} times that of equally likely classes"
        scale = Remedy("initialise the last layer, or the embedding that is tied to it, with a deviation of 0.02; raise a temperature", {"head_scale": 0.1})
        cause = Cause("logits out of scale", 0.8, f"before any update the loss is {number(first)}: the logits are certain, and wrong")
        causes, remedies = ranked([(cause, [scale])])
        return Finding(
            self.diagnosis, Severity.WARNING, 0, "first loss", f"{number(first)} is {over}", (Evidence("first loss", first, limit),), causes, remedies
        )
