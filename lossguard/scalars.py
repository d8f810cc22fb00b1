"""A few numbers of the newest sample under readable names, for trackers and for a trainer's logger. History flows in, floats flow out; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from lossguard.advice import matrices, newest
from lossguard.findings import Finding, Severity
from lossguard.host.history import Array, History

Reduce = Callable[[Array], float]

_MATRICES = ("grad_rms", "update_ratio")  # judged over matrices: a bias that began at zero has no ratio worth a curve
_REMEMBERED = {"dead_fraction": 64}  # samples for which a number stands; windows of dead units end every 30 samples or later


def _norm(values: Array) -> float:
    return float(np.sqrt(np.sum(np.square(values))))


def _largest(values: Array) -> float:
    return float(np.max(values))


def _smallest(values: Array) -> float:
    return float(np.min(values))


def _quantile(share: float) -> Reduce:
    return lambda values: float(np.quantile(values, share))


# name -> (signal, how its sites become one number); with the loss scale, the findings and, in a plain loop, the loss, 20 at most
SCALARS: dict[str, tuple[str, Reduce]] = {
    "grad_norm": ("grad_norm", _norm),
    "grad_rms_smallest": ("grad_rms", _smallest),
    "grad_rms_largest": ("grad_rms", _largest),
    "weight_norm": ("weight_norm", _norm),
    "update_ratio_smallest": ("update_ratio", _smallest),
    "update_ratio_median": ("update_ratio", _quantile(0.5)),
    "update_ratio_p90": ("update_ratio", _quantile(0.9)),
    "update_ratio_largest": ("update_ratio", _largest),
    "clip_coefficient": ("clip_coefficient", _smallest),
    "activation_rms_smallest": ("activation_rms", _smallest),
    "activation_rms_largest": ("activation_rms", _largest),
    "dead_fraction_largest": ("dead_fraction", _largest),
    "saturated_fraction_largest": ("saturated_fraction", _largest),
    "sample_variance_smallest": ("sample_variance", _smallest),
    "logit_peak": ("logit_peak", _largest),
    "confident_fraction": ("confident_fraction", _largest),
    "confident_wrong": ("confident_wrong", _largest),
}
OF_PARAMETERS = ("grad_norm", "weight_norm", "update_ratio")
OF_UNITS = ("activation_rms", "dead_fraction", "saturated_fraction")


def chosen(history: History, findings: Collection[Finding], *, of_layers: bool = False) -> dict[str, float]:
    """What a tracker gets of the newest sample: SCALARS, how many findings of a warning and above there are, and on demand every layer's own.

    >>> chosen(History(), [])
    {'findings': 0.0}
    """
    numbers = {**scalars(history), "findings": float(sum(f.severity >= Severity.WARNING for f in findings))}
    return {**numbers, **layers(history)} if of_layers else numbers


def scalars(history: History) -> dict[str, float]:
    """What the newest sample has of SCALARS. A number that was measured as NaN stays NaN; one not measured is left out.

    >>> scalars(History())
    {}
    """
    found: dict[str, float] = {}
    with np.errstate(all="ignore"):
        for name, (signal, reduce) in SCALARS.items():
            values, when = newest(history, signal, _REMEMBERED.get(signal, 1))
            there = ~np.isnan(when)
            if signal in _MATRICES and there.size and (there & matrices(history)).any():
                there &= matrices(history)
            if there.any():
                found[name] = reduce(values[there])
    scale = history.facts().get("loss_scale")
    return found if scale is None else {**found, "loss_scale": float(scale)}


def layers(history: History) -> dict[str, float]:
    """Every parameter's and module call's own numbers in the newest sample, as ``signal/name``."""
    found: dict[str, float] = {}
    parameters, units = [p.name for p in history.params], [u.name for u in history.units]
    for signals, names in ((OF_PARAMETERS, parameters), (OF_UNITS, units)):
        for signal in signals:
            found.update(_of_sites(history, signal, names))
    return found


def _of_sites(history: History, signal: str, names: Sequence[str]) -> dict[str, float]:
    values, when = newest(history, signal, _REMEMBERED.get(signal, 1))
    return {f"{signal}/{name}": float(v) for name, v, w in zip(names, values, when, strict=False) if not np.isnan(w)}
