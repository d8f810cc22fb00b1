"""What may keep a loss from falling: causes and remedies by the evidence of the other signals. A history flows in, advice flows out; numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lossguard import structure
from lossguard.advice import Advice, born_zero, faster, lr_remedy, matrices, medians, middle, ranked, reach, slower, stopped_rate, typically, without_gradient
from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import Array, History

_ATTACH = Remedy("look for detach(), no_grad() or dead units before the loss", {"unfreeze": True})
Pairs = list[tuple[Cause, Sequence[Remedy]]]
CLASSIFIES = ("cross_entropy", "binary")  # families of losses whose targets are fixed and whose level at the beginning is that of a guess
SAMPLES = 20  # newest samples that speak of the present state
CERTAIN = 0.6  # confidence from which a cause is evidence, and not a guess

# Limits outside of the healthy envelopes (survey), nearer to them than those of the rules of their own.
SLOW = 1e-5  # median update ratio; healthy from 3.3e-5
STIRRED = 0.01  # of the weights, that all updates so far can have changed; healthy from scratch 1.7e-4 a step, so 0.017 in the 100 steps of a plateau
FAST = 3e-2  # median update ratio; healthy up to 1.4e-2
FADED = 1e-4  # rms of a matrix's gradient over the largest; healthy from 6e-4
DEAD = 0.5  # share of a layer's units that are silent for a whole window; healthy up to 0.36
RAILED = 0.5  # share of a layer's units at their rails
ALIKE = 1e-4  # between-sample variance over second moment; healthy from 7e-4
LOUD = 100.0  # largest logit at the loss; healthy up to 28
WRONG = 0.1  # share of rows that are certain and wrong; healthy far below
GREW = 10.0  # times a weight norm has grown since the start; survey, update_ratio_high (b), there within 100 steps
KNOWN = 0.3466  # half of ln 2: a classifier whose first loss is below was trained before; survey, loss_plateau (0.5 ln K)
KNOWING = 0.1  # share of nearly one-hot rows in the first batch of a network that was trained before; our own choice
COARSE = 10.0  # root mean square of the input; survey, unnormalized_input

# Values at which a loss sticks, and what they are: survey, constant_loss.
SPECIAL_LOSSES = (
    (87.3365, "-ln(smallest float32)", "softmax underflow"),
    (103.2789, "-ln(smallest float32 denormal)", "softmax underflow"),
    (9.7041, "-ln(smallest normal float16)", "softmax underflow"),
    (16.6355, "-ln(smallest float16 denormal)", "softmax underflow"),
    (16.1181, "-ln(1e-7)", "probability clamped"),
    (18.4207, "-ln(1e-8)", "probability clamped"),
    (27.6310, "-ln(1e-12)", "probability clamped"),
)


def speed(history: History, samples: int = SAMPLES) -> float:
    """The median update ratio of the median matrix; NaN if unknown."""
    able = matrices(history)
    if not able.any() or not history.last("update_ratio", 1).size:
        return math.nan
    each = typically(history, "update_ratio", samples)[able]
    return middle(each[np.isfinite(each)])


def obstacles(history: History) -> Pairs:
    """What stands in the way of a loss that does not fall, each with its measurement; guesses come with less than CERTAIN."""
    return [*structure.faults(history), *_step_size(history), *_units(history), *_gradients(history), *_scales(history)]


def plateau_advice(history: History) -> Advice:
    """The obstacles found, and what else it may be."""
    found = obstacles(history)
    look = Remedy("look at 20 samples and their labels by eye, and try to overfit one batch", {"look_at": 20})
    found.append(
        (Cause("labels or targets do not belong to the inputs", 0.4, "nothing else speaks against the network" if not found else "it remains possible"), [look])
    )
    if not any(cause.confidence >= CERTAIN for cause, _ in found):
        found.append((Cause("learning rate", 0.3, f"it is {number(history.lr)}"), [lr_remedy(history, 0.1), lr_remedy(history, 10.0)]))
        found.append((Cause("a plateau that ends by itself", 0.2, "updates, gradients and activations are of a healthy size"), []))
    return ranked(found)


def inflated(history: History) -> float:
    """How many times the weight norm of some matrix has grown since it was first seen; NaN if unknown."""
    born, now, able = history.born("weight_norm"), typically(history, "weight_norm", SAMPLES), matrices(history)
    grown = [float(now[i] / born[i]) for i in np.flatnonzero(able[: min(born.size, now.size)]) if born[i] > 0 and np.isfinite(now[i])]
    return max(grown, default=math.nan)


def full_speed_since(history: History, share: float) -> int:
    """The step since which the learning rate has been near its peak at least once, as far back as it is known: the warm-up is over."""
    high = np.flatnonzero(history.fact("lr") >= share * history.lr_peak)
    return int(history.steps()[high[0]]) if high.size and high[0] > 0 else 0


def trained_before(history: History) -> bool:
    """The network knew the task when this run began: a loss below that of two equal classes, or rows that were certain at once."""
    head = history.heads.index("loss") if "loss" in history.heads else -1
    certain = history.born("confident_fraction")
    first = history.first_losses(20)
    first = first[np.isfinite(first)]
    classifier = history.loss_family in CLASSIFIES
    return bool((classifier and first.size and first.mean() < KNOWN) or (0 <= head < certain.size and certain[head] >= KNOWING))


def step_size(history: History, slow: float = SLOW, fast: float = FAST) -> Cause | None:
    """The learning rate, if the size of the updates speaks against it."""
    u, grown = speed(history), inflated(history)
    if u > fast:
        return Cause("learning rate too high", 0.7, f"a step changes {number(u)} of the weights")
    if u < slow and grown > GREW:
        return Cause("learning rate too high", 0.7, f"a step changes only {number(u)} of the weights, which have grown {number(grown)} times")
    return Cause("learning rate too low", 0.8, f"a step changes {number(u)} of the weights") if u < slow else None


def _step_size(history: History) -> Pairs:
    u, stopped = speed(history), stopped_rate(history)
    if u == 0 and stopped is not None:
        return [stopped]
    if u == 0:
        return [(Cause("weights do not move", 0.8, "every update of the last samples is exactly 0"), [lr_remedy(history, 10.0)])]
    cause = None if history.schedule_tail else step_size(history) or unstirred(history)
    return [(cause, [faster(history) if cause.name.endswith("low") else slower(history)])] if cause else []


def unstirred(history: History) -> Cause | None:
    """The learning rate, if the weights are nearly those of the first step: however the updates add up, they cannot have come far."""
    ratio, able, steps = history.last("update_ratio"), matrices(history), history.steps()
    if not ratio.size or not able.any() or steps[0] > 0:
        return None  # the window no longer holds the beginning
    each = medians(ratio, able)
    moved = float(np.dot(each, np.diff(np.append(steps, history.step + 1))))  # NaN where a sample has none
    gradients = history.last("grad_rms", SAMPLES)
    driven = not gradients.size or bool((gradients[:, able] > 0).any())  # else no rate is to blame
    if not 0 < moved < STIRRED or not driven or trained_before(history):
        return None
    return Cause("learning rate too low", 0.7, f"all {history.step + 1} steps together change at most {moved:.1%} of the weights")


def _worst(history: History, signal: str, sign: float = 1.0) -> tuple[float, str]:
    """The largest (smallest for sign -1) typical number of a signal over module calls, and where."""
    values = typically(history, signal, SAMPLES) if history.last(signal, 1).size else np.empty(0)
    if not np.isfinite(values).any():
        return math.nan, ""
    at = int(np.nanargmax(sign * values))
    return float(values[at]), history.units[at].name if at < len(history.units) else f"module call {at}"


def _units(history: History) -> Pairs:
    pairs: Pairs = []
    share, where = _worst(history, "dead_fraction")
    if share > DEAD:
        tries = [Remedy(f"He initialisation before {where}, or LeakyReLU(0.01)", {"init": "he", "activation": "leaky_relu"}), lr_remedy(history, 0.1)]
        pairs.append((Cause("dead units", 0.8, f"{share:.0%} of the units of {where} are silent"), tries))
    share, where = _worst(history, "saturated_fraction")
    if share > RAILED:
        remedy = Remedy(f"Xavier initialisation before {where}, and normalised inputs", {"init": "xavier", "normalize_input": True})
        pairs.append((Cause("saturated units", 0.6, f"{share:.0%} of the units of {where} are at their rails"), [remedy]))
    variance, where = _last_variance(history)
    if variance < ALIKE:
        because = f"samples differ by {number(variance)} of the second moment after {where}"
        remedy = Remedy("initialise the weights at random (He for ReLU, Xavier else)", {"init": "he"})
        pairs.append((Cause("same output for every sample", 0.7, because), [remedy]))
    return pairs


def _last_variance(history: History) -> tuple[float, str]:
    """The between-sample variance of the last module call that was measured, and where."""
    values: Array = typically(history, "sample_variance", SAMPLES) if history.last("sample_variance", 1).size else np.empty(0)
    measured = np.flatnonzero(np.isfinite(values))
    if not measured.size:
        return math.nan, ""
    at = int(measured[-1])
    return float(values[at]), history.units[at].name if at < len(history.units) else f"module call {at}"


def _gradients(history: History) -> Pairs:
    able = matrices(history) & ~without_gradient(history)
    if not able.any() or not history.last("grad_rms", 1).size:
        return []
    rms = typically(history, "grad_rms", SAMPLES)[able]
    rms = rms[np.isfinite(rms)]
    if not rms.size:
        return []
    if rms.max() == 0:
        return [
            (
                Cause("no gradient", 0.9, "the gradient of every matrix is exactly 0"),
                [_ATTACH],
            )
        ]
    least = float(rms[rms > 0].min() / rms.max())
    if rms.size < 2 or least >= FADED:
        return []
    tries = [
        Remedy("add a normalisation or a residual to every layer", {"add": "normalization"}),
        Remedy("use ReLU or GELU with He initialisation", {"activation": "relu", "init": "he"}),
    ]
    return [(Cause("vanishing gradient", 0.7, f"some matrix gets {number(least)} of the largest gradient"), tries)]


def _scales(history: History) -> Pairs:
    pairs: Pairs = []
    head = history.heads.index("loss") if "loss" in history.heads else -1
    peaks, wrong = (typically(history, s, SAMPLES) if history.last(s, 1).size else np.empty(0) for s in ("logit_peak", "confident_wrong"))
    if 0 <= head < peaks.size and peaks[head] > LOUD:
        remedy = Remedy("scale the last layer's initial weights by 0.1", {"head_scale": 0.1})
        pairs.append((Cause("logits out of scale", 0.7, f"the largest logit is {number(float(peaks[head]))}"), [remedy, lr_remedy(history, 0.1)]))
    elif 0 <= head < wrong.size and wrong[head] > WRONG:
        pairs.append((Cause("wrong labels, or too large a step", 0.6, f"{wrong[head]:.0%} of the rows are certain and wrong"), [lr_remedy(history, 0.1)]))
    loud = reach(history, "input_rms", SAMPLES)[1]
    if loud > COARSE:
        pairs.append(
            (
                Cause("input not normalised", 0.5, f"its root mean square reaches {number(loud)}"),
                [Remedy("normalise the input to mean 0, deviation 1", {"normalize_input": True})],
            )
        )
    return pairs


def constant_advice(history: History, value: float) -> Advice:
    """Why a loss sticks at this value."""
    pairs: list[tuple[Cause, Sequence[Remedy]]] = []
    for special, formula, name in SPECIAL_LOSSES:
        if abs(value - special) < 2e-3 * special:
            tries = [lr_remedy(history, 0.1), Remedy("scale the logits down: divide the last layer's initial weights by 10", {"head_scale": 0.1})]
            pairs.append((Cause(name, 0.9, f"{number(value)} is {formula}"), tries))
    classes = round(math.exp(value)) if 0.6 < value < 12 else 0
    if classes >= 2 and abs(value - math.log(classes)) < 1e-3 * min(1.0, 10 / classes):
        what = "both" if classes == 2 else "all"
        pairs.append((Cause("same output for every sample", 0.7, f"{number(value)} is ln {classes}: {what} classes are equally likely"),
                      [Remedy("initialise the weights at random (He for ReLU, Xavier else), not by zeros", {"init": "he"})]))  # fmt: skip
    zero = born_zero(history)
    pairs += [zero] if zero is not None else []
    total = history.last("grad_total", 5)
    if total.size and np.nanmax(np.where(np.isfinite(total), total, 0.0)) == 0.0:
        pairs.append(
            (
                Cause("no gradient", 0.8, "the gradient norm is exactly 0"),
                [_ATTACH],
            )
        )
    updates = history.last("update_norm", 5)
    if updates.size and np.nanmax(np.where(np.isfinite(updates), updates, 0.0)) == 0.0:
        pairs.append((Cause("weights do not move", 0.8, "every update of the last samples is exactly 0"), [lr_remedy(history, 10.0)]))
    if not pairs:
        pairs.append((Cause("gradients do not reach the output", 0.4, "the loss is the same for different batches"), [lr_remedy(history, 0.1)]))
    return ranked(pairs)
