"""From numbers and their meaning to a ``Sample``: true scale, clipping, learning rates. Pure numpy; no torch.

Rows of one layout come again and again, so what a layout means is worked out once and kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lossguard.host.history import Param, Sample
from lossguard.host.softmaxes import unpack

Sites = npt.NDArray[np.intp]
Numbers = tuple[Sites, npt.NDArray[np.float64]]
Values = dict[str, Numbers]
KEPT = 16  # layouts whose meaning is kept: sampled steps have two or three


class _Segment(Protocol):
    @property
    def signal(self) -> str: ...
    @property
    def sites(self) -> Sites: ...
    @property
    def scale(self) -> npt.NDArray[np.float64] | None: ...


class _Layout(Protocol):
    @property
    def segments(self) -> Sequence[_Segment]: ...


Parts = Sequence[tuple[npt.NDArray[np.float32], _Layout]]


@dataclass(frozen=True)
class _Plan:
    """How the numbers of a sample's rows, end to end, become signals: taken in ``order`` and scaled, each signal is a run."""

    layouts: tuple[_Layout, ...]  # held, so that their identity stays theirs
    order: npt.NDArray[np.intp]
    scale: npt.NDArray[np.float64]
    runs: tuple[tuple[str, Sites, int, int], ...]  # signal, sites, first, end


class Decoder:
    """Turns the rows of all devices of one sampled step into a sample. Of numbers for the same site the later one counts."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def decode(self, step: int, parts: Parts, facts: Mapping[str, Any], params: Sequence[Param]) -> Sample:
        """Gradient norms are divided by the loss scale; ``clip_coefficient`` is the norm of a few gradients at the update
        over their norm after the backward pass, per optimizer; learning rates that live on the device become the fact ``lr``.
        """
        collected, known = self._collect(parts), dict(facts)
        unpack(collected)
        _unscale(collected, known)
        _clip(collected, known, params)
        rates = collected.pop("lr", None)
        if rates is not None:
            known["lr"] = max(float(rates[1].max()), known.get("lr", -np.inf))
        return Sample(step, collected, known)

    def _collect(self, parts: Parts) -> Values:
        key = tuple(id(layout) for _, layout in parts)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            plan = self._plans[key] = _plan(tuple(layout for _, layout in parts))
        numbers = parts[0][0] if len(parts) == 1 else np.concatenate([n for n, _ in parts])
        numbers = numbers[plan.order] * plan.scale
        return {signal: (sites, numbers[first:end]) for signal, sites, first, end in plan.runs}


def _plan(layouts: tuple[_Layout, ...]) -> _Plan:
    places: dict[str, dict[int, tuple[int, float]]] = {}  # signal -> site -> (where its number stands, scale)
    first = 0
    for segment in (segment for layout in layouts for segment in layout.segments):
        of = places.setdefault(segment.signal, {}) if (segment.sites >= 0).any() else {}
        for k, site in enumerate(segment.sites.tolist()):
            if site >= 0:  # else padding
                of[site] = first + k, 1.0 if segment.scale is None else float(segment.scale[k])
        first += len(segment.sites)
    arrays: dict[bytes, Sites] = {}  # signals of the same sites share one array
    runs: list[tuple[str, Sites, int, int]] = []
    order: list[int] = []
    scale: list[float] = []
    for signal, of in places.items():
        sites = np.array(list(of), dtype=np.intp)
        runs.append((signal, arrays.setdefault(sites.tobytes(), sites), len(order), len(order) + len(of)))
        order += [place for place, _ in of.values()]
        scale += [factor for _, factor in of.values()]
    return _Plan(layouts, np.array(order, dtype=np.intp), np.array(scale, dtype=np.float64), tuple(runs))


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
    found = dict.fromkeys(facts.pop("unclipped", ()), 1.0)
    facts.pop("probes_unscaled", None)
    after, before = collected.pop("clipped_norm", None), collected.get("grad_norm")
    if after is not None and before is not None:
        found.update(_coefficients(after, before, params))
    if found:
        collected["clip_coefficient"] = _sites(tuple(found)), np.array(list(found.values()))


def _coefficients(after: Numbers, before: Numbers, params: Sequence[Param]) -> dict[int, float]:
    """Optimizer -> norm of its probed gradients now over their norm before."""
    norms = dict(zip(before[0].tolist(), before[1].tolist(), strict=True))
    sums: dict[int, tuple[float, float]] = {}
    for site, value in zip(after[0].tolist(), after[1].tolist(), strict=True):
        if site in norms:
            old = sums.get(params[site].optimizer, (0.0, 0.0))
            sums[params[site].optimizer] = old[0] + value**2, old[1] + norms[site] ** 2
    return {o: math.sqrt(a / b) for o, (a, b) in sums.items() if b > 0 and math.isfinite(a / b)}


@functools.lru_cache(maxsize=KEPT)
def _sites(indices: tuple[int, ...]) -> Sites:
    """The same array for the same sites, as for those of a layout: what is known of it is found again."""
    return np.array(indices, dtype=np.intp)
