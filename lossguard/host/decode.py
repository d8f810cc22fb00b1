"""From numbers and their meaning to a ``Sample``: true scale, clipping, learning rates. Pure numpy; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lossguard.host.history import Param, Sample

Values = dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]]


class Meaning(Protocol):
    """What a run of numbers means (the tape's ``Segment``)."""

    signal: str
    sites: npt.NDArray[np.intp]
    scale: npt.NDArray[np.float64] | None


def decode(step: int, parts: Iterable[tuple[npt.NDArray[np.float32], Sequence[Any]]], facts: Mapping[str, Any], params: Sequence[Param]) -> Sample:
    """One sampled step from the rows of all its devices. Of numbers for the same site the later one counts.

    Gradient norms are divided by the loss scale; ``clip_coefficient`` is the norm of a few gradients at the update over
    their norm after the backward pass, per optimizer; learning rates that live on the device become the fact ``lr``.
    """
    collected: dict[str, dict[int, float]] = {}
    for numbers, segments in parts:
        first = 0
        for segment in segments:
            count = len(segment.sites)
            part = numbers[first : first + count].astype(np.float64)
            first += count
            if segment.scale is not None:
                part = part * segment.scale
            collected.setdefault(segment.signal, {}).update(zip(segment.sites.tolist(), part.tolist(), strict=True))
    for numbers_of in collected.values():
        numbers_of.pop(-1, None)  # padding
    known = dict(facts)
    _unscale(collected, known)
    _clip(collected, known, params)
    rates = collected.pop("lr", None)
    if rates:
        known["lr"] = max([*rates.values(), *([known["lr"]] if "lr" in known else [])])
    values: Values = {
        name: (np.fromiter(of, dtype=np.intp, count=len(of)), np.fromiter(of.values(), dtype=np.float64, count=len(of)).astype(np.float32))
        for name, of in collected.items()
        if of
    }
    return Sample(step, values, known)


def _unscale(collected: dict[str, dict[int, float]], facts: dict[str, Any]) -> None:
    scale = collected.pop("loss_scale", {}).get(0)
    if scale is None:
        return
    facts["loss_scale"], facts["scaler"] = scale, 1.0
    for name in ("grad_norm", *(() if facts.get("probes_unscaled", True) else ("clipped_norm",))):
        for site, value in collected.get(name, {}).items():
            collected[name][site] = value / scale if scale > 0 else float("nan")


def _clip(collected: dict[str, dict[int, float]], facts: dict[str, Any], params: Sequence[Param]) -> None:
    after, before = collected.pop("clipped_norm", {}), collected.get("grad_norm", {})
    facts.pop("probes_unscaled", None)
    sums: dict[int, tuple[float, float]] = {}
    for site, value in after.items():
        if site in before:
            old = sums.get(params[site].optimizer, (0.0, 0.0))
            sums[params[site].optimizer] = old[0] + value**2, old[1] + before[site] ** 2
    found = {o: float(np.sqrt(a / b)) for o, (a, b) in sums.items() if b > 0 and np.isfinite(a / b)}
    if found:
        collected["clip_coefficient"] = found
