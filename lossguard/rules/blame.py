"""Who is to blame for a value that is not finite: input, weights, an explosion, the forward pass, or the loss function.

A history and the step of the first such value flow in; ranked causes and remedies flow out. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lossguard.advice import Advice, batch_remedy, clip_remedy, input_is_bad, lr_remedy, matrices, middle, ranked, row_at, slower
from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import Array, History, Mask
from lossguard.rules.suspects import born_out_of_scale, rate

GREW = 10.0  # growth of loss or gradient norm before the fault that is called an explosion (healthy medians stay below)
SOUND_RMS = 1e4  # root mean square of a module's output up to which it did not explode (healthy logits stay below 28)
LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d")  # modules whose output is a sum of products of their input and weights
EARLY = 100  # steps in which what was out of scale from the beginning is the cause: later it would have shown; our own choice
FIRST_SCALE = 65536.0  # the scale that torch's loss scaler begins with
LOSS_WINDOW = 20  # losses before the fault in which growth is looked for
EPS = 1e-6  # added to arguments of logarithms, roots and divisors: 1 - 1e-6 is no longer 1 in float32, 1 - 1e-8 is
GUARD = Remedy(f"guard the loss: log(p + {EPS:g}), a divisor of at least {EPS:g}, labels in range", {"eps": EPS})
HALF_LEAST = 2.0**-25  # a smaller number rounds to 0 in float16


def nonfinite_advice(history: History, step: int) -> Advice:
    """The causes of non-finite values, ranked by what this run shows."""
    pairs: list[tuple[Cause, list[Remedy]]] = []
    broken = rate(history) or scale_too_high(history, step) or lost_epsilon(history)
    if broken is not None:
        return ranked([broken])
    pairs += born_out_of_scale(history) if step < EARLY else []
    pairs += [found for found in (written_to(history, step), unfilled(history, step)) if found is not None]
    if input_is_bad(history, step):
        pairs.append((Cause("bad input", 0.95, f"the batch of step {step} holds NaN or infinite values"), [batch_remedy(history, step)]))
    weights = sick_before(history)
    if weights is not None:
        cause = Cause("bad weights", 0.9, f"{weights} was not finite before this step's update")
        pairs.append((cause, [Remedy(f"go back to a checkpoint before step {step}, then {lr_remedy(history, 0.1)}", {"rewind_before": step})]))
    because, sound = explosion(history, step), sound_outputs(history, step)
    if because:
        confidence = 0.6 if sound and not because.startswith("loss") else 0.9  # a loss that grew step by step is one (C1), a calm one is not (C2)
        pairs.append((Cause("exploding gradient", confidence, because), [slower(history), clip_remedy(history)]))
    if sound and not any(cause.name in ("bad input", "bad weights") for cause, _ in pairs):
        pairs.append((Cause("loss function", 0.8, sound), [GUARD]))
    return ranked(pairs or _without_trace(history, step))


def scale_too_high(history: History, step: int) -> tuple[Cause, list[Remedy]] | None:
    """Under a loss scaler whose scale is above the usual first one, no gradient was ever finite, and the losses are."""
    scale, total, at = history.facts().get("loss_scale"), history.last("grad_total"), row_at(history, step)
    if scale is None or not scale > FIRST_SCALE or np.isfinite(total).any() or at is None or not np.isfinite(history.losses()[at]):
        return None
    because = f"the scale is {number(float(scale))}, no gradient of {len(total)} samples was finite, and the loss is {number(float(history.losses()[at]))}"
    lower = Remedy("begin with a scale of 65536, and halve it at each overflow", {"init_scale": FIRST_SCALE})
    return Cause("loss scale too high", 0.9, because), [lower]


def lost_epsilon(history: History) -> tuple[Cause, list[Remedy]] | None:
    """Updates are not finite though all gradients are: in float16 the optimizer's epsilon is 0, and where a gradient is, too, 0/0 is NaN."""
    eps, halves = history.facts().get("adam_eps"), [p.name for p in history.params if p.dtype == "float16"]
    updates, gradients = history.last("update_norm", 1), history.last("grad_norm", 1)
    if eps is None or not 0 < eps < HALF_LEAST or not halves or not updates.size or not gradients.size:
        return None
    bad = history.seen("update_norm", 1) & ~np.isfinite(updates)
    if not bad.any() or not np.isfinite(gradients[history.seen("grad_norm", 1)]).all():
        return None
    because = f"gradients are finite and updates are not; {number(float(eps))} is 0 in float16, in which {halves[0]} and its moments are kept"
    larger = Remedy(f"eps {number(float(eps))} -> 1e-4, or keep the weights in float32 and compute under autocast", {"eps": 1e-4})
    return Cause("adam epsilon", 0.92, because), [larger]


def written_to(history: History, step: int) -> tuple[Cause, list[Remedy]] | None:
    """The first layer gave NaN for a finite input: its weights were not finite, though they were in the sample before.

    Finite numbers of moderate size cannot multiply and add up to NaN; only the layer that is given the batch itself has an
    input that was measured. Between two samples an update may have done it, from one step to the next only a write.
    """
    rms, seen = _outputs(history, step)
    bad = np.flatnonzero(seen & ~np.isfinite(rms))
    leaves = history.last("input_rms", 1)
    if not bad.size or bad[0] >= len(history.units) or not leaves.size or not np.isfinite(leaves).all() or leaves.max() > SOUND_RMS:
        return None
    unit, before = history.units[bad[0]], history.last("activation_rms")[:-1, bad[0]]
    inner = [u for u in history.units[: bad[0]] if not unit.name.startswith(f"{u.name}.") and u.name]
    if inner or not np.isnan(rms[bad[0]]) or unit.kind not in LAYERS or not before.size or not np.nanmax(before, initial=0.0) <= SOUND_RMS:
        return None
    if step == 0 or not np.isfinite(_newest_weights(history)).all():
        return None
    near = bool(np.diff(history.steps(2))[0] == 1)
    because = f"{unit.name} ({unit.kind}) gave NaN for a finite input of rms {number(float(leaves.max()))}: its weights were not finite"
    because += ", and at the sample before they were"
    look = Remedy("look for what writes to the weights between steps, and guard its divisors by 1e-8", {"eps": 1e-8})
    return Cause("weights are overwritten" if near else "bad weights", 0.88, because), [look]


def unfilled(history: History, step: int) -> tuple[Cause, list[Remedy]] | None:
    """At the first step of all, a module with parameters of its own gave NaN for finite inputs of moderate size: they were never filled."""
    rms, seen = _outputs(history, step)
    bad, leaves = np.flatnonzero(seen & ~np.isfinite(rms)), history.last("input_rms", 1)
    if step != 0 or not bad.size or bad[0] >= len(history.units) or not leaves.size or not np.isfinite(leaves).all():
        return None
    unit, before = history.units[bad[0]], rms[: bad[0]][seen[: bad[0]]]
    own = [p for p in history.params if p.name.rpartition(".")[0] == unit.name]
    if not own or not np.isnan(rms[bad[0]]) or max(float(leaves.max()), float(before.max(initial=0.0))) > SOUND_RMS:
        return None
    because = f"{unit.name} ({unit.kind}) is the first to give NaN, before any update and for inputs of moderate size, and has parameters of its own"
    look = Remedy(f"initialise {own[0].name}: memory from torch.empty holds anything, NaN too", {"init": "default", "parameter": own[0].name})
    return Cause("bad weights", 0.8, because), [look]


def _newest_weights(history: History) -> Array:
    """Weight norms of the sample before the newest: the newest may have been measured after its update."""
    weights = history.last("weight_norm", 2)
    return weights[0][history.seen("weight_norm", 2)[0]] if len(weights) == 2 else np.empty(0)


def explosion(history: History, step: int) -> str:
    """What speaks for an exploding gradient before the step, in words; empty if nothing does."""
    before, after, over = loss_growth(history, step)
    # where the loss of the step is not finite, the gradient and the update of the step came after it and tell nothing of its cause
    at = row_at(history, step)
    late = int((history.steps() >= step).sum()) if at is not None and not np.isfinite(history.losses()[at]) else 0
    grown, ratio = gradient_growth(history, late), history.last("update_ratio", 3 + late)
    ratio = ratio[: len(ratio) - late]
    words = []
    if after >= GREW * before:
        words.append(f"loss {number(before)} -> {number(after)} in {over} steps")
    if grown >= GREW:
        words.append(f"gradient norm x {number(grown)}")
    largest = float(np.max(ratio, initial=0.0, where=np.isfinite(ratio) & (ratio > 0) & _wide(matrices(history), ratio)))
    if largest >= 1.0:
        words.append(f"an update {number(largest)} times its weights")
    return "; ".join(words)


def sound_outputs(history: History, step: int) -> str:
    """What speaks for the loss function: at this very step every module's output was finite and of moderate size. Empty otherwise."""
    rms, seen = _outputs(history, step)
    rms = rms[seen]
    if not rms.size or not np.isfinite(rms).all() or rms.max() > SOUND_RMS:
        return ""
    return f"all {rms.size} module outputs of this step are finite (largest rms {number(float(rms.max()))})"


def sick_outputs(history: History, step: int) -> str:
    """What speaks for an overflow in the forward pass: at this very step an output was not finite, with sound input and weights."""
    rms, seen = _outputs(history, step)
    bad = np.flatnonzero(seen & ~np.isfinite(rms))
    if not bad.size:
        return ""
    unit = history.units[bad[0]] if bad[0] < len(history.units) else None
    where = f"{unit.name} ({unit.kind})" if unit is not None else f"module call {bad[0]}"
    return f"{where} is the first whose output is not finite, and the loss was calm before"


def _outputs(history: History, step: int) -> tuple[Array, Mask]:
    """What the modules gave at this very step, and which were measured; nothing if it was not sampled."""
    back = int((history.steps() >= step).sum())
    if not back or history.steps(back)[0] != step or not history.last("activation_rms", 1).size:
        return np.empty(0), np.zeros(0, dtype=np.bool_)
    return history.last("activation_rms", back)[0], history.seen("activation_rms", back)[0]


def sick_before(history: History) -> str | None:
    """The name of the first parameter that was not finite before the newest sample's update, if any."""
    if not history.samples or history.facts().get("forced"):
        return None
    bad = history.seen("weight_norm", 1) & ~np.isfinite(history.last("weight_norm", 1))
    return history.params[int(np.flatnonzero(bad[0])[0])].name if bad.any() else None


def loss_growth(history: History, step: int) -> tuple[float, float, int]:
    """Before, after, over how many steps: the older half of the last finite losses before the step, and the newest of them."""
    held, steps = history.losses(), history.loss_steps()
    past = np.isfinite(held) & (steps < step)
    losses, when = held[past][-LOSS_WINDOW:], steps[past][-LOSS_WINDOW:]
    if losses.size < 2 or losses.min() <= 0:
        return float("nan"), float("nan"), 0
    half = losses.size // 2
    return float(middle(losses[:half])), float(losses[half:].max()), int(when[-1] - when[0])


def gradient_growth(history: History, late: int = 0) -> float:
    """The largest of the last 5 finite gradient norms over the median of those before; NaN if unknown. The newest ``late`` do not count."""
    total = history.last("grad_total")[:, 0] if history.last("grad_total").size else np.empty(0)
    total = total[: total.size - late]
    total = total[np.isfinite(total) & (total > 0)]
    cut = max(1, total.size - 5)
    return float(total[cut:].max() / middle(total[:cut])) if total.size >= 2 else math.nan


def _without_trace(history: History, step: int) -> list[tuple[Cause, list[Remedy]]]:
    """Nothing was measured that tells: what is left, by what can produce such a value out of calm."""
    before, after, over = loss_growth(history, step)
    calm = f"the loss was calm ({number(before)} -> {number(after)} in {over} steps)" if over else "the first values are already not finite"
    at = row_at(history, step)
    looked = at is not None and bool(np.isfinite(history.inputs()[at]))
    lower = Remedy("subtract the maximum before exp, use log_softmax, or clamp what is given to exp", {"activation": "log_softmax"})
    safe = bool(history.facts().get("loss_is_safe", history.notes.get("loss_is_safe")))  # it is finite for all finite outputs
    forward = sick_outputs(history, step) or (f"{calm}, and this loss is finite for all finite outputs" if safe else "")
    confidence = 0.8 if over and looked else 0.45
    masked = masked_row(history, step)
    pairs = [(Cause("loss function", 0.3 if forward else confidence, f"{calm} and the weights are finite"), [GUARD])]
    if masked is not None:
        pairs.append(masked)
    if forward:
        pairs.append((Cause("overflow in forward", min(0.7, confidence), forward), [lower, lr_remedy(history, 0.1)]))
    if not looked:
        show = Remedy("show the guard the batches: for x, y in guard.batches(loader)", {"look_at": step})
        pairs.append((Cause("bad input", 0.5 if safe else 0.4, "the batch of this step was not shown to the guard"), [show]))
    pairs.append((Cause("exploding gradient", 0.3, "growth within a single step leaves no trace"), [lr_remedy(history, 0.1)]))
    return _or_another_rank(history, step, pairs) if looked else pairs


def _or_another_rank(history: History, step: int, pairs: list[tuple[Cause, list[Remedy]]]) -> list[tuple[Cause, list[Remedy]]]:
    """Where gradients are averaged over ranks, nothing that was seen on this one speaks for it rather than for another."""
    peers = history.notes.get("peers")
    ranks = len(peers.places) if peers is not None and history.notes.get("replicated") else 1
    if ranks == 1:
        return pairs
    because = f"inputs and losses of this rank were finite before, and its gradients are averaged with those of {ranks - 1} other{'s' * (ranks > 2)}"
    look = Remedy("read what the rank found that the halt names", {"look_at": step})
    shared = [(replace(cause, confidence=cause.confidence / ranks), remedies) for cause, remedies in pairs]
    return [(Cause("another rank", 1.0 - 1.0 / ranks, because), [look]), *shared]


def masked_row(history: History, step: int) -> tuple[Cause, list[Remedy]] | None:
    """NaN (not Inf) out of calm, behind a softmax that is given masked scores: a row of -inf only is 0/0."""
    rms, seen = _outputs(history, step)
    bad = np.flatnonzero(seen & ~np.isfinite(rms))
    if not history.notes.get("softmax_is_masked") or not bad.size or not np.isnan(rms[bad]).all():
        return None
    sound = rms[seen & np.isfinite(rms)]
    if sound.size and sound.max() > SOUND_RMS:
        return None
    because = f"a softmax is given masked scores; {history.units[bad[0]].name} is NaN and not infinite, and what came before it is of moderate size"
    look = Remedy("leave one position of each row unmasked, or fill with a large finite number: -1e4", {"eps": 1e-8})
    return Cause("fully masked attention", 0.85, because), [look]


def _wide(mask: Mask, values: Array) -> Mask:
    """The mask of sites, cut or filled to the width of the values."""
    wide = np.zeros(values.shape[1] if values.ndim == 2 else 0, dtype=np.bool_)
    n = min(len(mask), len(wide))
    wide[:n] = mask[:n]
    return wide
