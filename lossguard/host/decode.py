"""From numbers and their meaning to a ``Sample``: true scale, clipping, learning rates. Pure numpy; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lossguard.host.history import Param, Sample

Values = dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]]


def decode(step: int, parts: Iterable[tuple[npt.NDArray[np.float32], Sequence[Any]]], facts: Mapping[str, Any], params: Sequence[Param]) -> Sample:
    """One sampled step from the rows of all its devices. Of numbers for the same site the later one counts.

    Gradient norms are divided by the loss scale; ``clip_coefficient`` is the norm of a few gradients at the update over
    their norm after the backward pass, per optimizer; learning rates that live on the device become the fact ``lr``.
    """
    collected = _collect(parts)
    known = dict(facts)
    _unscale(collected, known)
    _clip(collected, known, params)
    rates = collected.pop("lr", None)
    if rates is not None:
        known["lr"] = max(float(rates[1].max()), known.get("lr", -np.inf))
    return Sample(step, collected, known)


def _collect(parts: Iterable[tuple[npt.NDArray[np.float32], Sequence[Any]]]) -> Values:
    """Sites and numbers of each signal, in true units, without padding; where a site comes twice the later number stays."""
    pieces: dict[str, dict[bytes, tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]]] = {}
    for numbers, segments in parts:
        first = 0
        for segment in segments:
            sites = segment.sites
            part = numbers[first : first + len(sites)].astype(np.float64)
            first += len(sites)
            if segment.scale is not None:
                part *= segment.scale
            if len(sites) and sites.min() < 0:
                sites, part = sites[sites >= 0], part[sites >= 0]
            if len(sites):
                of = pieces.setdefault(segment.signal, {})
                of.pop(sites.tobytes(), None)  # a later row of the same sites: dictionaries keep the order of insertion
                of[sites.tobytes()] = sites, part
    collected: Values = {}
    for name, of in pieces.items():
        sites, part = np.concatenate([s for s, _ in of.values()]), np.concatenate([v for _, v in of.values()])
        if len(of) > 1 and np.unique(sites).size < sites.size:
            last = {int(site): k for k, site in enumerate(sites)}
            sites, part = sites[list(last.values())], part[list(last.values())]
        collected[name] = sites, part
    return collected


def _unscale(collected: Values, facts: dict[str, Any]) -> None:
    scaled = collected.pop("loss_scale", None)
    if scaled is None:
        return
    scale = float(scaled[1][-1])
    facts["loss_scale"], facts["scaler"] = scale, 1.0
    for name in ("grad_norm", *(() if facts.get("probes_unscaled", True) else ("clipped_norm",))):
        if name in collected:
            sites, norms = collected[name]
            collected[name] = sites, norms / scale if scale > 0 else np.full_like(norms, np.nan)


def _clip(collected: Values, facts: dict[str, Any], params: Sequence[Param]) -> None:
    after, before = collected.pop("clipped_norm", None), collected.get("grad_norm")
    facts.pop("probes_unscaled", None)
    if after is None or before is None:
        return
    norms = dict(zip(before[0].tolist(), before[1].tolist(), strict=True))
    sums: dict[int, tuple[float, float]] = {}
    for site, value in zip(after[0].tolist(), after[1].tolist(), strict=True):
        if site in norms:
            old = sums.get(params[site].optimizer, (0.0, 0.0))
            sums[params[site].optimizer] = old[0] + value**2, old[1] + norms[site] ** 2
    found = {o: math.sqrt(a / b) for o, (a, b) in sums.items() if b > 0 and math.isfinite(a / b)}
    if found:
        collected["clip_coefficient"] = np.array(list(found), dtype=np.intp), np.array(list(found.values()))
