"""The check of the initial weights: symmetry, and the signal's way through the depth. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from lossguard.findings import Cause, Evidence, Finding, Remedy, number
from lossguard.preflight.bench import Bench
from lossguard.preflight.chance import chance
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.loss import data_call
from lossguard.preflight.survey import Layer, Survey, survey
from lossguard.preflight.trial import Trial, trial


@check
@dataclass(frozen=True)
class PoorInitialization:
    """poor_initialization: the initial weights keep the network from learning (survey, poor_initialization).

    A weight matrix is symmetric if all its rows are equal and still are after some training steps of a copy: zero ends of branches, zero heads
    and LoRA's B break their symmetry at the first step. Two layers in a row whose weights are all one number other than zero are as good as
    that. Units of tanh or sigmoid must not begin at their ends. In networks without normalisation layers the signal must not die or blow up through
    the depth: the spread between samples of each layer's outputs, over that of the input, as mean gain per layer and in all.

    Why: weights all zero or all equal, a normal initialisation without 1/sqrt(inputs), sigmoid in deep networks, biases that silence ReLUs.
    Do: He initialisation for ReLU, Xavier for tanh and sigmoid; LayerNorm or BatchNorm; residual connections.
    False alarm: trained weights are at any scale and healthy as long as the signal passes. Networks with normalisation are only tested for
        symmetry. torch's default initialisation loses a factor of 0.4 a ReLU layer, which the limits allow for a dozen layers.
    """

    diagnosis: ClassVar[str] = "poor_initialization"
    grows: float = 2.0  # mean gain per layer, above; survey
    grown: float = 100.0  # gain in all, above; our own choice: He x 3 over four layers
    shrinks: float = 0.25  # mean gain per layer, below; survey has 0.5, torch's default with ReLU is 0.41
    shrunk: float = 1e-3  # gain in all, below; our own choice: three layers at a tenth
    lost: float = 1e-5  # gain in all below which the mean gain does not matter; our own choice: 13 default ReLU layers
    rails: float = 0.25  # share of a layer's inputs at each end of a tanh or sigmoid, above; our own choice: Xavier with gain 5/3 has 0.1 in all
    layers: int = 3  # layers needed for a gain; our own choice

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        done, seen = trial(bench), survey(bench, 1)
        if done.error or seen.error:
            return unknown(f"the model could not be trained for a few steps: {done.error or seen.error}")
        if done.symmetric:
            return failed(self._symmetry(done))
        for found in (self._constant(bench, seen), self._saturated(bench, seen)):
            if found is not None:
                return failed(found)
        if seen.norms:
            return passed("no weights are equal; the model normalises its activations")
        found = self._gain(bench, seen)
        if found is not None:
            return failed(found)
        return passed("no weights are equal, and the signal passes")

    def _symmetry(self, done: Trial) -> Finding:
        name, value = done.symmetric[0]
        what = "zero" if value == 0 else f"{number(value)}" if not math.isnan(value) else "equal in all rows"
        evidence = [Evidence("weight tensors with equal rows", len(done.symmetric), 0), Evidence("steps after which they still are", done.steps)]
        kind = "weights all zero" if value == 0 else "weights all equal"
        advice = [
            (
                Cause(kind, 0.95, f"the entries of {name!r} are {what}, and training gives all its units the same gradient"),
                [Remedy("initialise it by He (ReLU) or Xavier (tanh, sigmoid)", {"init": "he", "parameter": name})],
            )
        ]
        return finding(self.diagnosis, name, f"all units of {len(done.symmetric)} weight tensors are equal and stay so", evidence, advice)

    def _constant(self, bench: Bench, seen: Survey) -> Finding | None:
        """Two layers in a row whose trainable weights are all one number: random biases alone tell their units apart."""
        value = {layer.name: _only_value(bench.model, layer.name) for layer in seen.layers}
        for a, b in pairwise(seen.layers):
            if value[a.name] and value[b.name]:
                evidence = [Evidence("layers whose weights are all equal", sum(bool(v) for v in value.values()), 1)]
                because = f"all weights of {a.name!r} are {number(value[a.name])}, and so are those of {b.name!r}: units differ by biases only"
                remedy = Remedy("initialise by He (ReLU) or Xavier (tanh, sigmoid)", {"init": "he", "parameter": f"{a.name}.weight"})
                message = "the weights of layers that follow one another are all equal"
                return finding(self.diagnosis, a.name, message, evidence, [(Cause("weights all equal", 0.9, because), [remedy])])
        return None

    def _saturated(self, bench: Bench, seen: Survey) -> Finding | None:
        """Layers behind a tanh or a sigmoid that get hardly anything but its two ends, in a model that was not trained before."""
        full = [layer for layer in seen.layers if not layer.raw and min(layer.rails) > self.rails]
        call = data_call(bench.sound[0]) if bench.sound else None
        even = chance(call) if call is not None else None
        untrained = even is not None and bench.sound[0].loss > even and not bench.pretrained
        if len(full) < self.layers - 1 or not untrained or bench.has("unnormalized_input"):
            return None
        worst = max(full, key=lambda layer: sum(layer.rails))
        evidence = [
            Evidence(f"share of inputs of {worst.name!r} within 1 % of either end", sum(worst.rails), 2 * self.rails),
            Evidence("layers that get hardly anything else", len(full), self.layers - 1),
        ]
        cause = Cause("weights too large", 0.85, f"the units before {worst.name!r} are saturated before training, where their gradient is almost zero")
        remedy = Remedy("initialise by Xavier (tanh, sigmoid)", {"init": "xavier"})
        return finding(self.diagnosis, worst.name, "saturating units begin at their ends", evidence, [(cause, [remedy])])

    def _gain(self, bench: Bench, seen: Survey) -> Finding | None:
        hidden = [layer for layer in seen.layers[:-1] if not layer.zero and not math.isnan(layer.spread)]
        if len(hidden) < self.layers - 1 or not hidden[0].input_spread > 0 or bench.has("nonfinite_input"):
            return None
        end = seen.layers[-1]
        if end.spread == 0 and not end.zero and trial(bench).zero:
            return self._uneven([*hidden, end], 0.0, 0.0, "shrink", self.shrinks, "units dead at the start")
        last = hidden[-1]
        total = last.spread / hidden[0].input_spread
        mean = total ** (1 / len(hidden)) if total > 0 else 0.0
        if (mean > self.grows and total > self.grown) or not math.isfinite(total):
            return self._uneven(hidden, total, mean, "grow", self.grows, "weights too large")
        if total < self.lost or (mean < self.shrinks and total < self.shrunk):
            return self._uneven(hidden, total, mean, "shrink", self.shrinks, "units dead at the start" if total == 0 else "weights too small")
        return None

    def _uneven(self, hidden: list[Layer], total: float, mean: float, way: str, limit: float, cause: str) -> Finding:
        gains = [b / a if a > 0 else 0.0 for a, b in zip([hidden[0].input_spread, *(layer.spread for layer in hidden)], (layer.spread for layer in hidden))]
        worst = max(range(len(gains)), key=gains.__getitem__) if way == "grow" else min(range(len(gains)), key=gains.__getitem__)
        evidence = [
            Evidence("mean gain per layer of the spread between samples", mean, limit),
            Evidence(f"gain over {len(hidden)} layers", total),
            Evidence(f"gain at {hidden[worst].name!r}", gains[worst]),
        ]
        advice = [
            (
                Cause(cause, 0.8, f"differences between samples {way} {number(total)} times until {hidden[-1].name!r}, {number(mean)} times a layer"),
                [Remedy("initialise by He (ReLU) or Xavier (tanh, sigmoid)", {"init": "he"})],
            ),
            (
                Cause("depth without normalisation", 0.4, f"{len(hidden)} layers and no normalisation layer"),
                [Remedy("add LayerNorm or BatchNorm", {"add": "normalization"})],
            ),
        ]
        return finding(self.diagnosis, hidden[worst].name, f"activations {way} through the depth", evidence, advice)


def _only_value(model: nn.Module, name: str) -> float:
    """The one number that all trainable weights of a layer are; 0 where they differ, are zero or are frozen."""
    weight = getattr(model.get_submodule(name), "weight", None) if name in dict(model.named_modules()) else None
    if not isinstance(weight, Tensor) or not weight.requires_grad or weight.dim() < 2 or weight.shape[0] < 2 or nn.parameter.is_lazy(weight):
        return 0.0
    first = weight.detach().reshape(-1)[0]
    return float(first) if bool((weight.detach() == first).all()) else 0.0
