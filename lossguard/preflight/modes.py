"""The check of train and eval mode on the same batch. The bench flows in, an answer flows out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from torch import nn

from lossguard.findings import Cause, Evidence, Remedy, number
from lossguard.preflight.bench import Bench, Twin
from lossguard.preflight.chance import chance
from lossguard.preflight.check import Answer, check, failed, finding, passed, unknown
from lossguard.preflight.loss import data_call


@check
@dataclass(frozen=True)
class TrainEvalMismatch:
    """validation_mismatch: the same batch has another loss in eval mode (survey, validation_mismatch).

    Dropout is off on both sides. Batch-norm layers that have seen nothing yet first learn their statistics from the kept batches, on a copy.
    Apart from that, eval mode is run twice: a loss that changes between the two only while dropout is let through is dropout left on.

    Why: batch-norm statistics of other data, dropout called without training=self.training, preprocessing that only one mode does.
    Do: let batch-norm see the new data in training mode, F.dropout(x, p, training=self.training), the same preprocessing in both modes.
    False alarm: models that are random by design (sampling, noise) are not judged; a difference below a tenth of chance is none.
    """

    diagnosis: ClassVar[str] = "validation_mismatch"
    apart: float = 0.5  # difference of the two losses over the larger; survey
    floor: float = 0.1  # of chance: smaller differences are none; our own choice
    random: float = 1e-5  # relative difference of two equal passes from which a model is random; rounding stays below

    def look(self, bench: Bench) -> Answer:
        """The law of the class docstring."""
        if not bench.sound or any(not math.isfinite(p.loss) for p in bench.sound):
            return unknown(bench.why_no_pass if not bench.sound else "the first loss is not finite")
        with bench.twin() as twin:
            loud = self._moves(twin, bench, quiet=False)
            calm = self._moves(twin, bench, quiet=True)
        if calm is None or loud is None:
            return unknown("the model cannot be run in eval mode")
        if calm:
            return unknown("the model is random by design: two equal passes differ")
        if loud:
            pair = (
                Cause("train/eval mismatch", 0.9, "dropout drops in eval mode: two equal passes differ, and do not with dropout taken out"),
                [Remedy("F.dropout(x, p, training=self.training), or nn.Dropout", {"dropout": "eval off"})],
            )
            return failed(finding(self.diagnosis, "eval mode", "dropout is active in eval mode", [], [pair]))
        return self._compare(bench)

    def _moves(self, twin: Twin, bench: Bench, *, quiet: bool) -> bool | None:
        one, two = (twin.try_run(bench.kept[0], mode="eval", quiet=quiet) for _ in range(2))
        if one.error or two.error:
            return None
        return not abs(one.loss - two.loss) <= self.random * max(abs(one.loss), abs(two.loss))

    def _compare(self, bench: Bench) -> Answer:
        batches = bench.kept[: len(bench.passes)]
        with bench.twin() as twin:
            drifts = learn_statistics(twin, bench)
            evals = [twin.try_run(batch, mode="eval").loss for batch in batches]
        trains = [p.loss for p in bench.passes]
        pairs = [(a, b) for a, b in zip(trains, evals) if math.isfinite(a)]
        gap = median(abs(a - b) / max(abs(a), abs(b), 1e-12) if math.isfinite(b) else math.inf for a, b in pairs)
        call = data_call(bench.sound[0])
        scale = chance(call) if call is not None else None
        small = scale is not None and median(abs(a - b) for a, b in pairs) <= self.floor * scale
        if gap <= self.apart or small:
            return passed(f"train and eval mode differ by {gap:.1%}")
        layer, drift = max(drifts.items(), key=lambda item: item[1], default=("", 0.0))
        evidence = [
            Evidence("difference of the losses over the larger", gap, self.apart),
            Evidence("loss in training mode", trains[0]),
            Evidence("loss in eval mode", evals[0]),
        ]
        if layer:
            evidence.append(Evidence(f"drift of {layer!r}, in standard deviations of the batch", drift))
            because = f"statistics of {layer!r} are {number(drift)} standard deviations from the batch's"
            remedies = [Remedy("run 100 batches in training mode before evaluating, or reset_running_stats()", {"steps": 100})]
        else:
            because, remedies = (
                "no batch-norm layer and no dropout explains it: the model branches on self.training",
                [Remedy("do the same preprocessing in both modes", {})],
            )
        pair = (Cause("train/eval mismatch", 0.8, because), remedies)
        return failed(finding(self.diagnosis, layer or "model", "the same batch has another loss in eval mode", evidence, [pair]))


def learn_statistics(twin: Twin, bench: Bench) -> dict[str, float]:
    """Let batch-norm layers that have seen nothing learn from the kept batches; for the others, how far theirs are off."""
    norms = {n: m for n, m in twin.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and twin.flags[m]}
    stored = {
        n: m.running_mean.clone()
        for n, m in norms.items()
        if m.running_mean is not None and m.num_batches_tracked is not None and int(m.num_batches_tracked) > 0
    }
    state = {n: {k: v.clone() for k, v in norms[n].state_dict().items()} for n in stored}
    if not norms:
        return {}
    momenta = {n: m.momentum for n, m in norms.items()}
    for m in norms.values():
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
    for batch in bench.kept:
        twin.try_run(batch)
    drifts = {}
    for n, m in norms.items():
        m.momentum = momenta[n]
        if n in stored and m.running_mean is not None and m.running_var is not None:
            drifts[n] = float(((stored[n] - m.running_mean).abs() / (m.running_var + m.eps).sqrt()).max())
            m.load_state_dict(state[n])
    return drifts
