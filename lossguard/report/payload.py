"""What the page's script draws: runs flow in, JSON and compressed blocks of numbers flow out. Plain text only, safe inside HTML."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lossguard.findings import Finding
from lossguard.host.history import Array
from lossguard.report import accounts
from lossguard.report.downsample import Curve, Grid
from lossguard.report.happened import Event
from lossguard.report.reading import Run, measures, observed_rows
from lossguard.rules import RULES

DRAWN = ("skip", "cut", "rollback", "load", "saved", "resumed", "stall")  # events that stand on the curve
CHECKPOINTS = 100  # of a run that are drawn; our own choice, more would touch each other
ROUNDING = 12  # bits of a float32's mantissa that are rounded away in heat maps: 11 stay, a relative error of 1 / 4096


@dataclass
class Payload:
    """data: for JSON. blocks: name -> base64 of gzip, to be unpacked by the page when it needs them."""

    data: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)

    def json(self) -> str:
        """The data as text that cannot end a script element."""
        return json.dumps(self.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def key(run: int, several: bool, number: int) -> str:
    """The name of a finding on the page.

    >>> key(0, False, 2), key(1, True, 2)
    ('2', 'B2')
    """
    return f"{'AB'[run] if several else ''}{number}"


def make(runs: Sequence[Run]) -> Payload:
    """Everything that is drawn, of one run or two."""
    payload = Payload()
    payload.data["signs"] = {kind: accounts.SIGNS[kind] for kind in DRAWN}
    payload.data["runs"] = [_run(run, k, len(runs) > 1, payload.blocks) for k, run in enumerate(runs)]
    return payload


def _run(run: Run, k: int, several: bool, blocks: dict[str, str]) -> dict[str, Any]:
    grids = []
    for measure in measures():
        grid = run.grids.get(measure.signal)
        if grid is not None:
            name = f"block-{k}-{measure.signal}"
            grids.append({**vars(measure), **_grid(grid, run.rows[measure.signal], name, blocks)})
    return {
        "label": run.label,
        "steps": run.steps,
        "curves": [{"name": name, **_curve(curve)} for name, curve in run.curves.items()],
        "validation": {"steps": [int(s) for s in run.validations[:, 0]], "values": _floats(run.validations[:, 1])},
        "marks": [_mark(f, key(k, several, n), run) for n, f in enumerate(run.findings, 1)],
        "events": [{"kind": e.kind, "first": e.first, "last": e.last, "when": e.when, "text": e.text, "to": e.to} for e in _drawn(run.events)],
        "grids": grids,
    }


def _drawn(events: Sequence[Event]) -> list[Event]:
    """Those that stand on the curve; of very many checkpoints evenly spread ones and the newest, as all are listed below."""
    saved = [e for e in events if e.kind == "saved"]
    kept = {id(e) for e in saved[:: max(1, -(-len(saved) // CHECKPOINTS))] + saved[-1:]}
    return [e for e in events if e.kind in DRAWN and (e.kind != "saved" or id(e) in kept)]


def _curve(curve: Curve) -> dict[str, Any]:
    exact = bool(np.array_equal(curve.first, curve.last))
    data: dict[str, Any] = {"first": curve.first.tolist(), "middle": _floats(curve.middle), "flags": curve.flags.tolist(), "exact": exact}
    if not exact:
        data.update(last=curve.last.tolist(), low=_floats(curve.low), high=_floats(curve.high))
    return data


def _grid(grid: Grid, names: Sequence[str], name: str, blocks: dict[str, str]) -> dict[str, Any]:
    kept = np.flatnonzero(observed_rows(grid)).tolist()
    low, high, flags = grid.low[:, kept].T, grid.high[:, kept].T, grid.flags[:, kept].T  # (sites, buckets)
    same = bool(np.array_equal(low, high, equal_nan=True))
    blocks[name] = pack(*([rounded(low)] if same else [rounded(low), rounded(high)]), *([flags] if flags.any() else []))
    return {
        "rows": [names[i] for i in kept],
        "first": grid.first.tolist(),
        "last": grid.last.tolist(),
        "most": int(grid.samples.max()),
        "block": name,
        "same": same,
        "flagged": bool(flags.any()),
    }


def _mark(finding: Finding, name: str, run: Run) -> dict[str, Any]:
    signal, row = place(finding, run)
    mark = {"id": name, "step": finding.step, "last": finding.last_step, "severity": finding.severity.label, "diagnosis": finding.diagnosis}
    return {**mark, "text": f"{finding.where}: {finding.message}", "signal": signal, "row": row}


def place(finding: Finding, run: Run) -> tuple[str | None, str | None]:
    """Where the heat map shows a finding: its signal and the name of the row; None where it has none.

    The site of a finding is named as its row is, or by the module alone.
    """
    rule = RULES.get(finding.diagnosis)
    reads = getattr(rule, "reads", ())
    named = [s for s in run.grids if finding.diagnosis.startswith(s)]  # update_ratio_high reads weights, too, and is about update_ratio
    order = list(dict.fromkeys([*named, *(s for s in reads if s in run.grids), *run.grids]))
    site = finding.where.partition(" (")[0].partition(",")[0].strip()
    for signal in order:
        kept = observed_rows(run.grids[signal])
        names = [n for n, there in zip(run.rows[signal], kept) if there]
        for name in names:
            if site and (name == finding.where or name.partition(" (")[0] == site):
                return signal, name
    return next((s for s in order if s in (*reads, "grad_norm")), None), None


def rounded(values: Array) -> npt.NDArray[np.float32]:
    """The numbers with half a float32's mantissa, which packs well. Finite ones stay finite, 0, 1 and NaN exact.

    >>> rounded(np.array([1.0, 0.0, np.nan])).tolist(), bool(np.isfinite(rounded(np.array([1e300]))[0]))
    ([1.0, 0.0, nan], True)
    """
    greatest = 3.4e38  # below the largest float32, so that rounding cannot reach infinity
    bits = np.clip(values, -greatest, greatest).astype(np.float32).view(np.int32)
    kept = (bits + (1 << (ROUNDING - 1))) & ~((1 << ROUNDING) - 1)
    return np.where(np.isnan(values), np.float32(np.nan), kept.astype(np.int32).view(np.float32)).astype(np.float32)


def pack(*parts: npt.NDArray[Any]) -> str:
    """Arrays end to end, little-endian, as base64 of gzip."""
    raw = b"".join(p.astype(p.dtype.newbyteorder("<")).tobytes() for p in parts)
    return compressed(raw)


def compressed(raw: bytes) -> str:
    """Base64 of gzip; the same for the same bytes."""
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")


def _floats(values: Array) -> list[float | None]:
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]
