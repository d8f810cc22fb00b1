"""What a run did before its steps became too large or its loss rose: the cause that its own measurements show.

A history flows in; causes with their remedies flow out, each with its numbers. Numpy only; nothing is guessed: where
nothing is measured, nothing is named.
"""

from __future__ import annotations

import math

import numpy as np

from lossguard import readings
from lossguard.advice import HEALTHY, Advice, clip_remedy, informational, matrices, medians, middle, ranked, slower
from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import History

Suspects = list[tuple[Cause, list[Remedy]]]

FALLING = 8  # losses in a third of a run that falls ever faster; our own choice
ROSE = 2.0  # a learning rate over the one of a sample before that is a rise and no schedule's slope; our own choice
RECENT = 200  # steps in which a change is looked for; the horizon of a cascade
CHANGED = 3.0  # an input's scale over or under its median that is a change; our own choice: batches of one loader differ by per cents
LOUD = 10.0  # root mean square of an input that is not normalised; survey (unnormalized_input: 1e-2 to 1e1)
BORN_LOUD = 100.0  # first cross entropy that comes from weights of a wrong scale: healthy logits stay below 28 (survey), ln of a million is 14
HALF = 0.5  # of an update that weight decay makes alone: it is then the larger part
HEAVY = 0.99  # momentum above which gradients act for more than 100 steps; our own choice, published recipes (nnU-Net's) go up to it
HELD = 4  # samples in which weights stand still bit for bit although they are updated; our own choice, chance has no part in it
MOVES = 1e-6  # updates over weights, above which float32 weights must change; its spacing is 6e-8
FAR = 10.0  # targets over what a fresh head gives, by the first loss; our own choice
DISTANCES = ("mse", "l1", "huber")  # losses that measure the distance to a target
PART = 0.5  # of the rise of a loss that one of its terms makes
MOST = 0.5  # of the first loss that one term makes, so that it leads the first steps
SOLVED = 0.01  # of that term's first value: it is met, and the others
UNSOLVED = 0.5  # of their first value have not come below this; our own choices
LEAPT = 0.5  # of the whole rise within one step, by which it is a leap and no climb
LEVEL = 2.0  # times the first losses, up to which a loss that leapt stands where it began: what was learned no longer helps
CALM = 3.0  # updates just before a leap over their median, up to which it came from no instability; our own choice, as for a spike


def large_steps(history: History, because: str, confidence: float = 0.9) -> Advice:
    """Why steps are too large: what the run shows, else the learning rate."""
    pairs = suspects(history)
    pairs.append((Cause("learning rate too high", confidence, because), [slower(history), clip_remedy(history)]))
    return ranked(pairs)


def suspects(history: History, until: float = math.inf) -> Suspects:
    """All causes of too large steps that this run shows. until: the step of what they may have caused; what changed later did not."""
    if not history.samples:
        return []
    below = readings.downfall(history, FALLING)
    if below is not None and below.now < -abs(below.high) and below.faster > readings.ENDLESS[2] and not informational(history):
        return no_floor(history)
    looks = (rate, overwritten, momentum, decay, loud_input, summed, far_targets, loud_weights, term)
    changes = (rise(history, until), change(history, until))
    return [found for found in (*changes, *(look(history) for look in looks)) if found is not None]


def no_floor(history: History) -> Suspects:
    """Why a loss falls below 0 without end: a sign, or targets that its formula is not made for. Of several terms the lowest is named."""
    name = min(history.terms, key=lambda term: float(np.nanmin(history.term(term), initial=np.inf)), default=None)
    what = "the loss" if name is None else f"the term {name!r}"
    because = f"{what} falls below 0, and ever faster: it has no floor"
    turn = Remedy(f"turn the sign of {what}, if it is to be minimised", {"sign": -1.0})
    labels = Remedy("check that every target is in range: 0 to 1 for a binary cross entropy", {"labels": "repair"})
    inputs = history.last("input_rms", 1)
    beyond = history.loss_family == "binary" and bool(np.isfinite(inputs).any()) and np.nanmax(inputs) > 1.0  # as the targets of an autoencoder are
    return [(Cause("sign of the loss", 0.92, because), [turn]), (Cause("targets out of range", 0.94 if beyond else 0.4, because), [labels])]


def born_out_of_scale(history: History) -> Suspects:
    """What was too large before the first step: input, targets, weights."""
    return [found for found in (loud_input(history), far_targets(history), loud_weights(history)) if found is not None]


def rate(history: History) -> tuple[Cause, list[Remedy]] | None:
    """A learning rate that is not a number."""
    value = history.facts().get("lr")
    if not isinstance(value, float) or math.isfinite(value):
        return None
    fix = Remedy("give the warm-up at least one step, 10 for a beginning: one of 0 steps divides by 0", {"warm_up": 10})
    return Cause("learning rate is not finite", 0.98, f"the learning rate is {number(value)}"), [fix]


def rise(history: History, until: float = math.inf) -> tuple[Cause, list[Remedy]] | None:
    """The learning rate rose at once, or step by step, and is far above where it was when the run was well."""
    lr = history.fact("lr")
    at = np.flatnonzero(np.isfinite(lr) & (lr > 0))
    if at.size < 2:
        return None
    lr, steps = lr[at], history.steps()[at]
    leaps = np.flatnonzero((lr[1:] > ROSE * lr[:-1]) & (steps[1:] > steps[-1] - RECENT) & (steps[1:] <= until))
    if leaps.size:
        old, new = float(lr[leaps[-1]]), float(lr[leaps[-1] + 1])
        back = Remedy(f"learning rate {number(new)} -> {number(old)}, as before", {"lr": old})
        return Cause("learning rate too high", 0.97, f"it rose from {number(old)} to {number(new)} before step {steps[leaps[-1] + 1]}"), [back]
    lowest, now = float(lr.min()), float(lr[-1])
    if now > LOUD * lowest and lr[-1] >= lr.max() and int(np.argmin(lr)) < lr.size - 1:
        return Cause("learning rate too high", 0.95, f"the schedule raised it from {number(lowest)} to {number(now)}"), [slower(history)]
    return None


def change(history: History, until: float = math.inf) -> tuple[Cause, list[Remedy]] | None:
    """The input's scale left its own past: for one batch, or from some step on."""
    rms = history.last("input_rms")
    if len(rms) < HELD or history.facts().get("input_in_parts"):
        return None
    for leaf in range(rms.shape[1]):
        there = np.isfinite(rms[:, leaf])
        values, steps = rms[there, leaf], history.steps()[there]
        if values.size < HELD:
            continue
        usual = middle(values)
        odd = np.flatnonzero(~((values < CHANGED * usual) & (values > usual / CHANGED)))
        odd = odd[(steps[odd] > steps[-1] - RECENT) & (steps[odd] <= until)]
        if not odd.size or usual <= 0 or 2 * odd.size > values.size:
            continue
        step, now = int(steps[odd[0]]), float(values[odd[0]])
        look = Remedy(f"look at the batch of step {step}: its scale is {number(now)}, the median is {number(usual)}", {"batch_of_step": step})
        lasts = odd.size > 1 and odd[-1] == values.size - 1 and bool((np.diff(odd) == 1).all())
        because = f"the input's root mean square went from {number(usual)} to {number(now)} at step {step}"
        if lasts:
            return Cause("input changed", 0.96, f"{because} and stays there"), [look]
        return Cause("odd batch", 0.96, because), [look, clip_remedy(history)]
    return None


def overwritten(history: History) -> tuple[Cause, list[Remedy]] | None:
    """Weights that are updated, and stand still bit for bit between the updates: somebody writes them back."""
    weights, ratio = history.last("weight_norm", HELD), history.last("update_ratio", HELD)
    able = matrices(history)
    if len(weights) < HELD or len(ratio) < HELD or not able.any():
        return None
    with np.errstate(invalid="ignore"):
        back = (weights == weights[-1]).all(axis=0) & (ratio > MOVES).all(axis=0) & able
    if not 2 * int(back.sum()) > int(able.sum()):
        return None
    name, u = history.params[int(np.flatnonzero(back)[0])].name, float(middle(ratio[-1][back]))
    because = f"{int(back.sum())} matrices are the same bit for bit in {HELD} samples, though each update changes {number(u)} of them"
    look = Remedy(f"find what writes to {name} between steps: a checkpoint that is loaded again, an average that is copied back", {"parameter": name})
    return Cause("weights are overwritten", 0.97, because), [look]


def momentum(history: History) -> tuple[Cause, list[Remedy]] | None:
    """A mean of gradients that forgets so slowly that steps go where the loss no longer falls."""
    value = float(history.facts().get("momentum") or 0.0)
    if not HEAVY < value < 1:
        return None
    lasts = f"a momentum of {number(value)}: each gradient acts for some {round(1 / (1 - value))} steps"
    sums = history.facts().get("optimizer_name") == "SGD"
    because = f"{lasts}, and steps grow to as many times the learning rate" if sums else lasts
    return Cause("momentum too high", 0.95, because), [Remedy(f"momentum {number(value)} -> 0.9", {"momentum": 0.9})]


def forgets(history: History) -> float:
    """The share of the weights that weight decay by itself takes in a step; 0 without it, or where a step's size is not that of the gradient."""
    facts = history.facts()
    share, momentum = float(facts.get("weight_decay") or 0.0), float(facts.get("momentum") or 0.0)
    if not share > 0 or not history.lr > 0 or not 0 <= momentum < 1:
        return 0.0
    if facts.get("decay_is_decoupled") == 1.0:
        return history.lr * share
    return history.lr * share / (1 - momentum) if facts.get("optimizer_name") == "SGD" else 0.0


def decay(history: History) -> tuple[Cause, list[Remedy]] | None:
    """Weight decay makes the larger part of the updates, or by itself as large ones as are healthy in all."""
    facts, able = history.facts(), matrices(history)
    share, lr = float(facts.get("weight_decay") or 0.0), history.lr
    ratio, gradient, weight = history.last("update_ratio", 1), history.last("grad_norm", 1), history.last("weight_norm", 1)
    if share <= 0 or not lr > 0 or not able.any() or not ratio.size or not gradient.size or not weight.size:
        return None
    decoupled = facts.get("decay_is_decoupled") == 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        of_update = lr * share / ratio[0] if decoupled else share * weight[0] / (share * weight[0] + gradient[0])
    known = of_update[able & np.isfinite(of_update)]
    part, alone, speed = middle(known), forgets(history), middle(ratio[0][able & np.isfinite(ratio[0])])
    if not known.size or not (part > HALF or (alone > HEALTHY and alone > HALF * speed)):
        return None
    usual = 0.01 if decoupled else 1e-4  # the defaults of AdamW, and of common recipes
    because = f"a decay of {number(share)} at learning rate {number(lr)} makes {min(part, 1.0):.0%} of the update"
    if not part > HALF:
        because = f"a decay of {number(share)} at learning rate {number(lr)} takes {alone:.1%} of the weights in each step"
    return Cause("weight decay too high", 0.95, because), [Remedy(f"weight decay {number(share)} -> {number(usual)}", {"weight_decay": usual})]


def loud_input(history: History) -> tuple[Cause, list[Remedy]] | None:
    """Inputs far above unit scale from the beginning: every gradient of the first layer is as large."""
    born = history.born("input_rms")
    loud = float(np.nanmax(born, initial=0.0)) if born.size else 0.0
    if not loud > LOUD:
        return None
    because = f"the root mean square of the first input is {number(loud)}"
    return Cause("input not normalised", 0.93, because), [
        Remedy("normalise the input, each feature by itself, to mean 0 and deviation 1", {"normalize_input": True})
    ]


def far_targets(history: History) -> tuple[Cause, list[Remedy]] | None:
    """A regression whose first loss is far above what outputs of unit scale can owe."""
    first, size = history.first_losses(1), history.born("activation_rms")
    if history.loss_family not in DISTANCES or history.notes.get("loss_is_summed") or not first.size or not first[0] > 0:
        return None
    distance = math.sqrt(first[0]) if history.loss_family == "mse" else float(first[0])
    output = float(size[-1]) if size.size and np.isfinite(size[-1]) else 1.0
    if not distance > FAR * max(1.0, output):
        return None
    because = f"the first loss is {number(float(first[0]))}: targets lie about {number(distance)} from outputs of {number(output)}"
    fix = Remedy("standardise the targets: subtract their mean, divide by their standard deviation", {"standardize_targets": True})
    return Cause("targets not standardised", 0.92, because), [fix]


def summed(history: History) -> tuple[Cause, list[Remedy]] | None:
    """The loss adds its samples up: the learning rate is multiplied by the batch size."""
    if not history.notes.get("loss_is_summed"):
        return None
    because = 'the loss function was called with reduction="sum", so that each step is as many times larger as the batch has samples'
    return Cause("sum reduction", 0.94, because), [Remedy('average the loss: reduction="mean"', {"loss_reduction": "mean"})]


def loud_weights(history: History) -> tuple[Cause, list[Remedy]] | None:
    """A cross entropy that begins far above the logarithm of any number of classes: the weights were born too large."""
    first = history.first_losses(1)
    if history.loss_family != "cross_entropy" or history.notes.get("loss_is_summed") or loud_input(history) is not None:
        return None
    if not first.size or not first[0] > BORN_LOUD:
        return None
    because = f"the first loss is {number(float(first[0]))}, before any update, from inputs of moderate size"
    recurrent = [p.name for p in history.params if p.module in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")]
    if recurrent:
        return Cause("weights too large", 0.92, because), [Remedy("initialise recurrent matrices orthogonally, with a gain of 1", {"init_scale": 1.0})]
    return Cause("weights too large", 0.92, because), [Remedy("initialise by He (ReLU) or Xavier", {"init": "he"})]


def term(history: History) -> tuple[Cause, list[Remedy]] | None:
    """One named term makes the rise of the loss."""
    losses, names = history.losses(), history.terms
    if len(names) < 2 or losses.size < 2 * 20:
        return None
    old, new = middle(losses[:20]), float(losses[-1])
    low = min(old, middle(losses[-losses.size // 2 :]))
    grown = {}
    for name in names:
        values = history.term(name)
        best = float(np.nanmin(values, initial=np.inf))
        if np.isfinite(values[-1]) and math.isfinite(new) and new > low and values[-1] - best > PART * (new - low) and values[-1] > LOUD * max(best, 1e-12):
            grown[name] = best, float(values[-1])
    if len(grown) != 1:
        return None
    (name, (least, now)) = next(iter(grown.items()))
    because = f"the term {name!r} grew from {number(least)} to {number(now)}, and makes most of the loss"
    return Cause("a loss term grows", 0.95, because), [Remedy(f"look at the weight of the term {name!r}, and bound it", {"look_at": 20})]


def outweighed(history: History) -> tuple[Cause, list[Remedy]] | None:
    """One named term led at first and has been brought to nothing, and the others have not: its weight is too large."""
    names, first = history.terms, history.first_losses(1)
    if len(names) < 2 or history.first_step != 0 or not first.size or not math.isfinite(first[0]):
        return None
    values = {name: history.term(name) for name in names}
    began, now = {name: float(v[0]) for name, v in values.items()}, {name: float(middle(v[-20:])) for name, v in values.items()}
    name = max(began, key=lambda n: began[n])
    rest, left = sum(began.values()) - began[name], sum(now.values()) - now[name]
    if not began[name] > MOST * first[0] > 0 or not abs(now[name]) < SOLVED * began[name] or not 0 < UNSOLVED * rest < left:
        return None
    because = (
        f"the term {name!r} made {began[name] / first[0]:.0%} of the first loss and fell to {number(now[name])}; the others are at {left / rest:.0%} of theirs"
    )
    return Cause("a loss term outweighs the others", 0.85, because), [
        Remedy(f"divide the weight of the term {name!r} by 10, then by 10 again", {"parameter": name})
    ]


def leap(history: History, step: int, before: int = 40) -> tuple[Cause, list[Remedy]] | None:
    """The loss leapt, within one step and out of calm, to where the run began: inputs and targets no longer belong together."""
    losses, steps = history.losses(), history.loss_steps()
    first = middle(history.first_losses(5)[np.isfinite(history.first_losses(5))])
    near = (steps >= step - before) & np.isfinite(losses)
    values, when = losses[near], steps[near]
    if values.size < 20 or not first > 0:
        return None
    old, new = middle(values[:10]), middle(values[-10:])
    if not new > 1.5 * old or not first / LEVEL < new < LEVEL * first:
        return None
    k = int(np.argmax(values > 0.5 * (old + new)))
    if not values[k] - max(values[k - 1], old) > LEAPT * (new - old) or not middle(values[k:]) > 0.5 * (old + new):
        return None
    at = int(when[k])
    if change(history) is not None or rise(history) is not None:
        return None
    ratio, samples = history.last("update_ratio"), history.steps()
    able, past = matrices(history), samples < at
    if not ratio.size or not able.any() or past.sum() < HELD:
        return None
    speeds = medians(ratio[past], able)
    if not speeds[-1] <= CALM * middle(speeds[np.isfinite(speeds)]):
        return None
    because = f"the loss went from {number(old)} to {number(new)} at step {at}, about where it began, out of calm; neither the rate nor the input changed"
    look = Remedy("look at 20 samples with their labels, from that step on", {"look_at": 20})
    return Cause("labels or targets do not belong to the inputs", 0.75, because), [look]
