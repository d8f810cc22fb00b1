"""Causes and remedies, ranked by the evidence of the same run, and the readings of a history that several rules share.

A history flows in; numbers, ``Cause`` and ``Remedy`` tuples flow out. Pure functions; only findings and history are known here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import Array, History, Mask

Advice = tuple[tuple[Cause, ...], tuple[Remedy, ...]]
MOST = 3  # causes of one finding; more is a lecture
STOPPED = 1e-5  # learning rate over its peak, below which the schedule took it away; our own choice: a cosine's end is seldom below 1e-4
HEALTHY = 1e-2  # updates over weights up to which a learning rate is healthy (survey: 3e-5 to 1.4e-2)
FURTHEST = 100.0  # times, by which a learning rate is lowered at once; the first updates of RMSprop are 10 times its later ones
YOUNG = 3  # samples at the run's beginning by which the effect of the learning rate is measured: a run that blows up rewrites its weights
TO_A_TARGET = frozenset({"mse", "l1", "huber", "unknown"})  # losses that can be a distance to targets of the network's own making
BOOTSTRAPPED = 20  # newest samples in most of which it must be seen
NEWEST = 5  # losses that tell where a run stands and where it began
FLOURISHES = 0.5  # of the first losses; our own choice, as for a bottleneck
NEAR = 1.5  # times the best: batches differ; our own choice
CONVERGED = 0.05  # of the first losses: below, all is well however low the best was
FAMILIES_WITHOUT_ORDER = frozenset({"adversarial", "reinforcement"})
ACTORS = frozenset({"policy", "actor", "pi", "pg", "surrogate"})  # words in the names of a loss's terms
CRITICS = frozenset({"value", "critic", "vf", "qf", "entropy"})
MAKERS, JUDGES = frozenset({"generator", "gen", "g"}), frozenset({"discriminator", "disc", "d", "critic"})


P = ParamSpec("P")
T = TypeVar("T")


def once(reading: Callable[Concatenate[History, P], T]) -> Callable[Concatenate[History, P], T]:
    """A reading that many rules share is made once for each state of the history."""

    @functools.wraps(reading)
    def remembered(history: History, *args: P.args, **kwargs: P.kwargs) -> T:
        key, memo = (reading, *args, *kwargs.items()), history.memo
        if key not in memo:
            memo[key] = reading(history, *args, **kwargs)
        return memo[key]  # type: ignore[no-any-return]

    return remembered  # type: ignore[return-value]  # the same parameters, named


def lastingly(reading: Callable[[History], T]) -> Callable[[History], T]:
    """A reading that follows from the parameters and their first numbers alone is made again only when these change."""

    @functools.wraps(reading)
    def remembered(history: History) -> T:
        held = history.lasting
        if reading not in held:
            held[reading] = reading(history)
        return held[reading]  # type: ignore[no-any-return]

    return remembered


@once
def stretch(history: History, span: int, least: int) -> int:
    """How many of the newest samples cover ``span`` steps and are at least ``least``; 0 if the history is too short.

    >>> history = History()
    >>> stretch(history, 20, 3)
    0
    """
    steps = history.steps()
    if steps.size < least:
        return 0
    old = np.flatnonzero(steps <= steps[-1] - (span - 1))
    return max(int(steps.size - old[-1]), least) if old.size else 0


def steady(history: History, signal: str, n: int, least: int, sick: Callable[[Array], Mask]) -> Mask:
    """Sites at which every measured number of the last n samples is sick, and at least ``least`` were measured, the newest among them."""
    values, seen = history.last(signal, n), history.seen(signal, n)
    if not values.size or n == 0:
        return np.zeros(values.shape[1], dtype=np.bool_)
    with np.errstate(invalid="ignore"):
        fine = seen & ~sick(values)
    newest = seen[-max(1, len(seen) // least) :].any(axis=0)
    return np.asarray(~fine.any(axis=0) & (seen.sum(axis=0) >= least) & newest)


def middle(values: Array) -> float:
    """The median of finite numbers; NaN of none. One sort: several times as fast as np.median on short arrays.

    >>> middle(np.array([3.0, 1.0, 2.0, 10.0]))
    2.5
    """
    ordered = np.sort(values)
    n = ordered.size
    return float(0.5 * (ordered[(n - 1) // 2] + ordered[n // 2])) if n else math.nan


def typical(values: Array) -> Array:
    """The median per site over finite numbers: (sites,), NaN where there is none. One sort, NaN last, ten times as fast as nanmedian."""
    if not values.size:
        return np.full(values.shape[1], np.nan)
    finite = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)
    count = len(finite) - np.isnan(finite).sum(axis=0)
    columns = np.arange(finite.shape[1])
    return np.asarray(0.5 * (finite[np.maximum(count - 1, 0) // 2, columns] + finite[count // 2, columns]))


@once
def typically(history: History, signal: str, n: int) -> Array:
    """The median of a signal over its last n samples, per site: see :func:`typical`."""
    return typical(history.last(signal, n))


@once
def reach(history: History, signal: str, n: int) -> tuple[float, float]:
    """The least and the greatest measured number of the last n samples, (inf, -inf) if there is none: a rule's first look."""
    return history.extremes(signal, n)


@once
def finite_losses(history: History) -> tuple[Array, npt.NDArray[np.int64]]:
    """The losses that are finite, oldest first, and their steps."""
    losses, steps = history.losses(), history.loss_steps()
    finite = np.isfinite(losses)
    return (losses, steps) if finite.all() else (losses[finite], steps[finite])


def newest(history: History, signal: str, within: int) -> tuple[Array, Array]:
    """Per site the newest measured number within so many samples, and its step; NaN where there is none."""
    values, seen, steps = history.last(signal, within), history.seen(signal, within), history.steps(within)
    if not values.size:
        return np.empty(0), np.empty(0)
    row = len(values) - 1 - np.argmax(seen[::-1], axis=0)
    there = seen.any(axis=0)
    return np.where(there, values[row, np.arange(values.shape[1])], np.nan), np.where(there, steps[row], np.nan)


@lastingly
def matrices(history: History) -> Mask:
    """Parameters on which ratio rules may run: matrices that an optimizer holds, neither zero-born nor cancelled by a norm."""
    sound = history.held
    return np.asarray(history.kinds("matrix") & sound & ~history.zero_born)


@once
def without_gradient(history: History) -> Mask:
    """Parameters whose gradient is None in the newest sample."""
    listed = set(history.facts().get("no_gradient") or ())
    if not listed:
        return np.zeros(len(history.params), dtype=np.bool_)
    return np.array([i in listed or p.name in listed for i, p in enumerate(history.params)], dtype=np.bool_)


def listing(names: Iterable[str], most: int = 3) -> str:
    """Names as people list them.

    >>> listing("abcde")
    'a, b, c and 2 more'
    """
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def informational(history: History) -> bool:
    """Loss curves of this run have no order: several optimizers, an adversarial or reinforcement loss (survey, machinery 4),
    a loss that other trainable networks make as well, such as a judge of its own optimizer, terms named after a policy and its
    critic or after a generator and its discriminator, or moving targets."""
    others = history.optimizers > 1 or bool(history.notes.get("loss_of_others"))
    return others or history.loss_family in FAMILIES_WITHOUT_ORDER or opposed(history) or moving_targets(history)


@once
def opposed(history: History) -> bool:
    """The loss's terms are named after both sides of a game, as good as a declaration: what one side owes depends on the other.
    A policy's term must have been negative: one that learns from given moves owes a likelihood, which has an order."""

    def named(after: frozenset[str]) -> set[str]:
        return {name for name in history.terms if after & set(re.findall("[a-z]+", name.lower()))}

    makers, judges, actors, critics = (named(after) for after in (MAKERS, JUDGES, ACTORS, CRITICS))
    if len(makers | judges) > 1 and makers and judges:
        return True
    return len(actors | critics) > 1 and bool(critics) and any(bool((history.term(name) < 0).any()) for name in actors)


@once
def moving_targets(history: History) -> bool:
    """The network makes its own targets, or acts to get its data: in most samples it ran without gradients before it ran for the
    loss, or on single states besides batches, and that is none of a classifier. Its level tells little: what it owes depends on what was learned."""
    if history.loss_family not in TO_A_TARGET:
        return False
    before = np.fmax(history.fact("bootstraps", BOOTSTRAPPED, 0.0), history.fact("acts", BOOTSTRAPPED, 0.0))
    return bool(before.size and before.mean() > 0.5)


@once
def flourishing(history: History) -> bool:
    """The run learns well now: its loss is below half of where it began, and near its best. What looks wild about its steps
    has done no harm: layers before a normalisation may grow, and methods with step sizes of their own may stride."""
    losses, first = finite_losses(history)[0], history.first_losses(NEWEST)
    first = first[np.isfinite(first)]
    if losses.size < 2 * NEWEST or not np.isfinite(history.losses(NEWEST)).all() or losses.min() < 0 or not middle(first) > 0:
        return False
    blocks = losses[losses.size % NEWEST :].reshape(-1, NEWEST)
    now, best = middle(losses[-NEWEST:]), float(np.median(blocks, axis=1).min())
    return now < FLOURISHES * middle(first) and now < max(NEAR * best, CONVERGED * middle(first))


@once
def fallen(history: History) -> float:
    """The typical newest loss over the typical first loss; NaN where the loss is not positive throughout or too short."""
    losses, first = finite_losses(history)[0], history.first_losses(5)
    first = first[np.isfinite(first)]
    if losses.size < 10 or losses.min() < 0 or not middle(first) > 0:
        return float("nan")
    return float(middle(losses[-10:]) / middle(first))


def converged(history: History, share: float = 0.01) -> bool:
    """The loss is below this share of where it began: small gradients and constant losses are a success there."""
    return fallen(history) < share


@once
def sound_gradient(history: History) -> float:
    """The median gradient norm while the run was healthy: over the older two thirds of the window, NaN if unknown."""
    total = history.last("grad_total")
    return float(typical(total[: max(1, 2 * len(total) // 3), :1])[0]) if total.size else float("nan")


def row_at(history: History, step: int) -> int | None:
    """The index into ``history.losses()`` of a step, None if it is not held."""
    at = np.flatnonzero(history.loss_steps() == step)
    return int(at[-1]) if at.size else None


def input_is_bad(history: History, step: int) -> bool:
    """The batch of that step held NaN or infinite values."""
    at = row_at(history, step)
    if at is not None and history.inputs()[at] == 0:
        return True
    if not history.samples or history.steps(1)[0] != step:
        return False
    return bool((history.seen("input_rms", 1) & ~np.isfinite(history.last("input_rms", 1))).any())


# Remedies


def lr_remedy(history: History, factor: float) -> Remedy:
    """The learning rate now and the one to try."""
    now, rates = history.lr, history.fact("lr")
    rates = rates[np.isfinite(rates)]
    scheduled = rates.size > 1 and float(rates.min()) < float(rates.max()) * (1 - 1e-6)
    if not math.isfinite(now) or now <= 0 or scheduled:
        word = f"divide the learning rate by {1 / factor:.3g}" if factor < 1 else f"multiply the learning rate by {factor:.3g}"
        word += f", and with it the whole schedule (now {number(now)})" if scheduled else ""
        return Remedy(word, {"lr_factor": factor})
    return Remedy(f"learning rate {number(now)} -> {number(now * factor)}", {"lr": now * factor})


def slower(history: History) -> Remedy:
    """A lower learning rate, a tenth at most: the one at which updates are a healthy share of the weights."""
    return lr_remedy(history, min(0.1, max(_to_speed(history, 0.1), 1.0 / FURTHEST)))


def faster(history: History) -> Remedy:
    """A higher learning rate, ten times at least: the one at which updates are a healthy share of the weights."""
    return lr_remedy(history, max(10.0, _to_speed(history, 10.0)))


def _to_speed(history: History, unknown: float) -> float:
    """The factor of the learning rate that brings updates to a healthy share of the weights, by its gentlest effect at the beginning.

    The new rate is 1, 2 or 5 times a power of ten.
    """
    lr, ratio, able = history.fact("lr"), history.last("update_ratio"), matrices(history)
    if not ratio.size or not able.any() or not history.lr > 0:
        return unknown
    speeds = medians(ratio, able)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = (speeds / lr)[np.isfinite(speeds) & np.isfinite(lr) & (lr > 0) & (speeds > 0)][:YOUNG]
    if not effect.size:
        return unknown
    target = HEALTHY / float(effect.min())
    ten = 10.0 ** math.floor(math.log10(target))
    return ten * max(step for step in (1.0, 2.0, 5.0) if step <= max(1.0, target / ten)) / history.lr


def medians(ratio: Array, able: Mask) -> Array:
    """The median over matrices in each sample: (samples,)."""
    return typical(np.where(able, ratio, np.nan).T)


def clip_remedy(history: History) -> Remedy:
    """A clip value: about the median gradient norm while the run was healthy."""
    median = sound_gradient(history)
    if not math.isfinite(median) or median <= 0:
        return Remedy("clip the gradient norm at 1.0", {"max_norm": 1.0})
    value = float(f"{median:.1g}")
    return Remedy(f"clip the gradient norm at {number(value)} (its healthy median was {number(median)})", {"max_norm": value})


def ranked(pairs: Sequence[tuple[Cause, Sequence[Remedy]]]) -> Advice:
    """The most likely causes and, in their order, what to do about each; nothing twice."""
    ordered = sorted(pairs, key=lambda pair: -pair[0].confidence)
    names = [cause.name for cause, _ in ordered]
    best = [pair for i, pair in enumerate(ordered) if names[i] not in names[:i]][:MOST]
    remedies: list[Remedy] = []
    for _, tries in best:
        remedies += [r for r in tries if r not in remedies]
    return tuple(cause for cause, _ in best), tuple(remedies[:MOST])


# Causes


def batch_remedy(history: History, step: int) -> Remedy:
    """Which batch to look at."""
    at_step = history.samples and history.steps(1)[0] == step
    batch = history.facts().get("batch") if at_step else None
    which = int(batch) if batch is not None else step
    return Remedy(f"repair or drop batch {which}: torch.isfinite(x).all() is false for it", {"drop_batch": which})


def stopped_rate(history: History) -> tuple[Cause, list[Remedy]] | None:
    """The schedule took the learning rate away."""
    now, peak = history.lr, history.lr_peak
    if not now < STOPPED * peak:
        return None
    fix = Remedy(f"look at the schedule, and at its number of steps: the learning rate was {number(peak)}", {"lr": peak})
    return Cause("learning rate schedule", 0.9, f"the learning rate fell from {number(peak)} to {number(now)}"), [fix]


def born_zero(history: History) -> tuple[Cause, list[Remedy]] | None:
    """All matrices began at exactly 0: behind zeros nothing has a gradient."""
    norms, able = history.born("weight_norm"), history.kinds("matrix") & history.held
    if not able.any() or norms.size < able.size or not bool((norms[able] == 0.0).all()):
        return None
    fix = Remedy("initialise the weights at random: He for ReLU, Xavier else", {"init": "he"})
    return Cause("weights all zero", 0.95, f"the norm of all {int(able.sum())} weight matrices was exactly 0 at the first step"), [fix]
