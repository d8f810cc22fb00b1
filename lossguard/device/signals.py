"""What is measured: one pure function per signal, and their registry. Torch only; never reads a value.

Tensors flow in on their device, float32 vectors flow out on the same device. NaN and Inf pass through to the numbers,
so that a non-finite value anywhere in what was read is seen later on the host. Legend of shapes: K sites measured
together, N padded elements of a site, R samples (rows of a batch), F features, C classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAPS = ("gradient", "weight", "update", "activation", "logits")

# Normalised derivative below which a sigmoid or tanh position is at its rail, and the share of positions that makes a
# unit saturated (evidence: 100-batch windows of hidden units of healthy sigmoid and tanh networks stay below both).
RAIL_DERIVATIVE = 0.02
RAIL_SHARE = 0.95
CONFIDENT = 0.99  # softmax probability above which a row counts as one-hot


@dataclass(frozen=True)
class Signal:
    """One named family of numbers. kinds: module classes it applies to (activation tap only), empty for all."""

    name: str
    tap: str
    unit: str
    measure: Callable[[Tensor], Tensor]
    kinds: tuple[str, ...] = ()


SIGNALS: dict[str, Signal] = {}
BROKEN: dict[str, str] = {}  # signals that failed on a tensor, and how: they read NaN from then on


def signal(tap: str, *, unit: str, kinds: tuple[str, ...] = ()) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Register a signal; the function's name is the signal's name.

    tap ``gradient``, ``weight``, ``update``: (K, N) rows, zero-padded, a spread sample for large tensors -> (K,).
    tap ``activation``: (K, R, F) samples of module outputs -> (K,). tap ``logits``: (R, C) -> 0-dim.

    >>> @signal("gradient", unit="max |g|")
    ... def grad_peak(rows):
    ...     return rows.abs().amax(dim=1)
    >>> SIGNALS.pop("grad_peak").unit
    'max |g|'
    """
    if tap not in TAPS:
        raise ValueError(f"unknown tap {tap!r}; expected one of: {', '.join(TAPS)}")

    def register(measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        name = str(getattr(measure, "__name__", ""))
        if measure.__module__ != __name__:  # ours are tested; the first operation on meta imports half a second of torch
            _check(name, tap, measure)
        BROKEN.pop(name, None)
        SIGNALS[name] = Signal(name, tap, unit, _sound(name, tap, measure), kinds)
        return measure

    return register


def _sound(name: str, tap: str, measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, but a failure is one warning and NaN from then on: one signal's fault costs no other its numbers."""

    @functools.wraps(measure)
    def measured(x: Tensor) -> Tensor:
        if name not in BROKEN:
            try:
                return measure(x)
            except Exception as error:
                BROKEN[name] = f"{type(error).__name__}: {error}"
                warnings.warn(f"lossguard: the signal {name} failed and reads NaN from now on ({BROKEN[name]})", RuntimeWarning, stacklevel=2)
        return torch.full((() if tap == "logits" else (x.shape[0],)), float("nan"), device=x.device)

    return measured


def _check(name: str, tap: str, measure: Callable[[Tensor], Tensor]) -> None:
    """Run it once where no values exist: a read raises there, and the shape of the answer shows."""
    shape = {"activation": (3, 16, 5), "logits": (16, 5)}.get(tap, (3, 64))
    try:
        given = measure(torch.empty(shape, device="meta"))
    except NameError:
        return  # it uses a helper that stands further down in its file
    except Exception as error:
        raise ValueError(f"the signal {name!r} reads a value, which would wait for the device, or cannot run on {shape}: {error}") from error
    wanted = () if tap == "logits" else (3,)
    if not isinstance(given, Tensor) or given.shape != wanted:
        got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"the signal {name!r} must give one number per site, {shape} -> {wanted}, got {got}")


def of(tap: str) -> list[Signal]:
    """The registered signals of one tap, in order of registration."""
    return [s for s in SIGNALS.values() if s.tap == tap]


_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # untyped in torch


def l2(tensor: Tensor) -> Tensor:
    """The L2 norm in float32 without overflow of halves; torch refuses to narrow doubles by itself. Any shape -> ()"""
    if tensor.dtype == torch.float64:
        return _norm(tensor).to(torch.float32)
    return _norm(tensor, dtype=torch.float32)


def l2_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`l2` of each tensor, in few operations; complex ones count as pairs of numbers."""
    plain = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    if any(t.dtype == torch.float64 for t in plain):
        return [l2(t) for t in plain]
    return list(torch._foreach_norm(plain, 2, dtype=torch.float32))


def where(compare: Callable[..., Tensor], x: Tensor, limit: float) -> Tensor:
    """1.0 where the comparison holds and 0.0 elsewhere, in float32: a mean of booleans takes five times as long on a CPU. Any shape -> the same"""
    return compare(x, limit, out=torch.empty(x.shape, dtype=torch.float32, device=x.device))


def norms(rows: Tensor) -> Tensor:
    """L2 norms of the last dimension; padding adds nothing. (..., K, N) -> (..., K)"""
    return _norm(rows, dim=-1, dtype=torch.float32)


def largest(tensor: Tensor) -> Tensor:
    """The largest magnitude in float32, NaN and Inf passing through, in one operation. Any shape -> ()"""
    return _norm(tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor, float("inf"), dtype=torch.float32)


@signal("gradient", unit="L2 norm, true scale, before clipping")
def grad_norm(rows: Tensor) -> Tensor:
    """L2 norm of each row; padding adds nothing. (K, N) -> (K,)"""
    return norms(rows)


@signal("weight", unit="L2 norm before the update")
def weight_norm(rows: Tensor) -> Tensor:
    """L2 norm of each row. (K, N) -> (K,)"""
    return norms(rows)


@signal("update", unit="L2 norm of the real weight difference")
def update_norm(rows: Tensor) -> Tensor:
    """L2 norm of each row of weights after minus before. (K, N) -> (K,)"""
    return norms(rows)


# sample_variance, the variance over samples, averaged over features, over the mean square, is the squared ratio of these two:
# 0 where every sample gives the same. Both are norms, since torch.var over a middle dimension costs twenty times as much on a CPU.
SPREAD = ("sample_spread", "sample_size")


@signal("activation", unit="L2 norm of a sample of the output, centred over the batch")
def sample_spread(samples: Tensor) -> Tensor:
    """How far the samples of a batch are from their mean. (K, R, F) -> (K,)"""
    return _norm(samples - samples.mean(dim=1, keepdim=True), dim=(1, 2))


@signal("activation", unit="L2 norm of the same sample")
def sample_size(samples: Tensor) -> Tensor:
    """The norm that ``sample_spread`` is held against. (K, R, F) -> (K,)"""
    return _norm(samples, dim=(1, 2))


RELU_KINDS = ("ReLU", "ReLU6", "Threshold")


@signal("activation", unit="share of zero elements in the batch", kinds=RELU_KINDS)
def zero_fraction(samples: Tensor) -> Tensor:
    """Share of exactly zero elements; up to 0.97 is healthy sparsity. (K, R, F) -> (K,)"""
    return where(torch.eq, samples, 0.0).mean(dim=(1, 2))


@signal("activation", unit="share of units at their rails", kinds=("Sigmoid", "Hardsigmoid"))
def saturated_fraction(samples: Tensor) -> Tensor:
    """Share of units whose normalised derivative 4 s (1 - s) is below RAIL_DERIVATIVE on most positions. (K, R, F) -> (K,)"""
    return _at_rails(4.0 * samples * (1.0 - samples))


@signal("activation", unit="share of units at their rails", kinds=("Tanh", "Hardtanh"))
def saturated_fraction_tanh(samples: Tensor) -> Tensor:
    """As :func:`saturated_fraction`, derivative 1 - y^2. Reported under the same name. (K, R, F) -> (K,)"""
    return _at_rails(1.0 - samples.square())


def _at_rails(derivative: Tensor) -> Tensor:
    railed = where(torch.lt, derivative, RAIL_DERIVATIVE).mean(dim=1)  # (K, F)
    return where(torch.gt, railed, RAIL_SHARE).mean(dim=1)


@signal("logits", unit="largest finite magnitude")
def logit_peak(logits: Tensor) -> Tensor:
    """Largest magnitude; -inf is a legal mask and counts as 0, NaN and +inf pass through. (R, C) -> ()"""
    return torch.nan_to_num(logits, nan=float("nan"), posinf=float("inf"), neginf=0.0).abs().amax()


@signal("logits", unit="share of rows with a probability above CONFIDENT")
def confident_fraction(logits: Tensor) -> Tensor:
    """Share of nearly one-hot rows. (R, C) -> ()"""
    return (torch.softmax(logits, dim=1).amax(dim=1) > CONFIDENT).to(torch.float32).mean()


@signal("logits", unit="|mean log Z|")
def log_normalizer(logits: Tensor) -> Tensor:
    """Magnitude of the mean log-normaliser of the softmax. (R, C) -> ()"""
    return torch.logsumexp(logits, dim=1).mean().abs()
