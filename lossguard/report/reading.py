"""One run as the page shows it. A record, or a guard's own window, flows in; curves and grids of bounded size flow out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lossguard import aftermath, beside, verdict
from lossguard.device.signals import SIGNALS
from lossguard.findings import Finding
from lossguard.host.history import PER_PARAMETER, Array, History, Mask, Param
from lossguard.record import Reader
from lossguard.report import happened
from lossguard.report.downsample import Curve, Grid, envelope
from lossguard.report.happened import Event

LOSS_BUCKETS = 1500  # points of a curve: more than a screen has columns
GRID_BUCKETS = 240  # columns of a heat map, at least half of them used: a cell stays wide enough to be pointed at
WINDOW = 2048  # losses that the verdict is read from, as many as a guard holds


@dataclass(frozen=True)
class Measure:
    """A signal that the heat map can show. scale: ``log``, ``share`` (0 to 1) or ``band`` (diverging, in log, around ``centre``)."""

    signal: str
    title: str
    scale: str = "log"
    centre: float = 0.0
    about: str = ""


BAND = "Around 1e-3 is usual; orange is larger, blue is smaller."
MEASURES = (
    Measure("grad_norm", "Gradient norm", about="L2 norm of each parameter's gradient, before clipping."),
    Measure("update_ratio", "Update ratio", "band", 1e-3, "Norm of the update over norm of the weights, once these are not all zero. " + BAND),
    Measure("dead_fraction", "Dead fraction", "share", about="Share of units that were silent for every sample of a whole window."),
    Measure("activation_rms", "Activation RMS", about="Root mean square of each module's output."),
    Measure("saturated_fraction", "Saturated fraction", "share", about="Share of sigmoid or tanh units at their rails."),
    Measure("weight_norm", "Weight norm", about="L2 norm of each parameter, before the update."),
)


@dataclass
class Run:
    """What is known of one run. marks stand in ``findings``; grids and rows are by signal; curves are by name, the loss first."""

    label: str
    facts: dict[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    validations: Array = field(default_factory=lambda: np.zeros((0, 2)))
    grids: dict[str, Grid] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    samples: int = 0
    steps: int = 0
    state: str = "too early"
    ended: bool = False
    span: tuple[float, float] = (np.nan, np.nan)  # the first and the last finite loss, each a median of a twentieth of the run
    window: str = ""  # what is missing where only the newest part of a run was at hand
    events: list[Event] = field(default_factory=list)
    halts: list[tuple[Path, Mapping[str, Any]]] = field(default_factory=list)  # folders left behind, and their verdicts
    stalls: list[beside.Dump] = field(default_factory=list)
    ranks: dict[int, list[Finding]] = field(default_factory=dict)  # what other ranks found


def measures() -> list[Measure]:
    """Those of the table, and the user's own signals with one number for each layer."""
    known = {m.signal for m in MEASURES}
    own = [s for s in SIGNALS.values() if s.tap != "logits" and s.measure.__module__ != "lossguard.device.signals" and s.name not in known]
    return [*MEASURES, *(Measure(s.name, s.name, "plain", about=s.unit) for s in own)]


def from_record(folder: str | Path, label: str | None = None) -> Run:
    """The last run of a record. Raises ``ValueError`` where there is none."""
    reader = Reader(Path(folder))
    run = Run(label or Path(folder).resolve().name)
    history = History(losses=1, samples=1)
    counts: list[tuple[int, int, int]] = []
    for sample in reader:
        if len(reader.params) != len(history.params):
            history.params = [Param(name, 1, kind) for name, kind in reader.params]
        history.add_sample(sample)
        _take(run, history, 0, sample.step)
        counts += _left_out(history, [sample.step])
    story = reader.story
    run.facts = {**{k: v for k, v in story.header.items() if k not in ("kind", "schema")}, **story.facts}
    run.coverage, run.findings, run.ended = story.coverage, story.findings, story.ended
    run.validations = story.validations
    run.events = [*happened.skips(counts), *happened.of_record(story.events, story.resumed)]
    _look_beside(run, Path(folder))
    _name(run, reader.params, reader.units)
    _draw(run, story.losses[:, 0].astype(np.int64), story.losses[:, 1], story.terms)
    return run


def _look_beside(run: Run, folder: Path) -> None:
    """Folders of halts, dumps of standstills and the records of other ranks."""
    began = float(run.facts.get("time") or 0.0)
    root = folder.resolve().parent if re.fullmatch(r"rank\d+", folder.resolve().name) else folder  # all ranks' halts lie in one place
    run.halts = [(path, known) for path, known in aftermath.verdicts(root) if "finding" in known]
    run.stalls = beside.stalls(folder, began)
    run.ranks = beside.ranks(folder)
    run.events += [Event("stall", d.step, d.step, f"no step ended for long; every thread's stack stands below, and in {d.name}") for d in run.stalls]
    run.events.sort(key=lambda event: event.first)


def _left_out(history: History, steps: Sequence[int]) -> list[tuple[int, int, int]]:
    """The counters of left out updates at the newest samples, where a gate counts."""
    rows = len(steps)
    totals, spikes, seen = history.last("total_skips", rows), history.last("spike_skips", rows), history.seen("total_skips", rows)
    if not seen.size:
        return []
    spiked = np.nansum(spikes, axis=1) if spikes.size else np.zeros(rows)
    return [(step, int(np.nansum(totals[k])), int(spiked[k])) for k, step in enumerate(steps) if seen[k].any()]


def from_history(history: History, facts: Mapping[str, Any], label: str) -> Run:
    """The window that a guard holds."""
    run = Run(label, dict(facts), validations=history.validations()[:, :2], ended=True)
    run.events = [*happened.skips(_left_out(history, history.steps().tolist())), *map(happened.cure, facts.get("cures", ()))]
    run.events.sort(key=lambda event: event.first)
    for k, step in enumerate(history.steps().tolist()):
        _take(run, history, k, step)
    _name(run, [(p.name, p.kind) for p in history.params], [(u.name, u.kind) for u in history.units])
    steps = history.loss_steps()
    _draw(run, steps, history.losses(), {name: history.term(name) for name in history.terms})
    if len(steps) and steps[0] > 0:
        run.window = f"This guard keeps no record on disk: the page shows its window, the steps from {steps[0]} on. Guard(record=...) keeps all."
    return run


def _take(run: Run, history: History, k: int, step: int) -> None:
    """Sample k of the history's window into the grids."""
    run.samples += 1
    for measure in measures():
        values, seen = history.last(measure.signal), history.seen(measure.signal)
        if values.shape[0] <= k or not values.shape[1]:
            continue
        there = seen[k] & ~_no_ratio(history, k) if measure.signal == "update_ratio" else seen[k]
        if measure.signal in run.grids or there.any():
            run.grids.setdefault(measure.signal, Grid(GRID_BUCKETS)).add(step, values[k], there)


def _no_ratio(history: History, k: int) -> Mask:
    """Weights that are still all zero, as biases and zero-initialised branches are at first: a sound update has no ratio to them."""
    with np.errstate(invalid="ignore"):
        return np.asarray((history.last("weight_norm")[k] == 0.0) & np.isfinite(history.last("update_norm")[k]), dtype=np.bool_)


def _name(run: Run, params: Sequence[tuple[str, str]], units: Sequence[tuple[str, str]]) -> None:
    for name in list(run.grids):
        if run.grids[name].empty:
            del run.grids[name]
            continue
        tap = SIGNALS[name].tap if name in SIGNALS else ""
        parameters = name in PER_PARAMETER or tap in ("gradient", "weight", "update")
        labels = [p for p, _ in params] if parameters else [f"{n} ({kind})" for n, kind in units]
        width = run.grids[name].low.shape[1]
        run.rows[name] = (labels + [f"site {i}" for i in range(len(labels), width)])[:width]
    run.grids = {m.signal: run.grids[m.signal] for m in measures() if m.signal in run.grids}


def _draw(run: Run, steps: Any, losses: Array, terms: Mapping[str, Array]) -> None:
    run.steps = max(int(run.facts.get("steps", 0)), int(steps[-1]) + 1 if len(steps) else 0)
    run.curves = {name: envelope(steps, values, LOSS_BUCKETS) for name, values in {"loss": losses, **terms}.items() if len(steps)}
    history = History(losses=WINDOW)
    after = dict(run.validations.tolist())  # the step before an evaluation -> its loss, beside the training losses right before it
    for step, loss in zip(steps[-WINDOW:].tolist(), losses[-WINDOW:].tolist()):
        history.add_loss(step, loss)
        if step in after:
            history.add_validation(step, after[step])
    run.state = verdict.read(history)
    finite = losses[np.isfinite(losses)]
    part = max(1, len(finite) // 20)
    if len(finite):
        run.span = float(np.median(finite[:part])), float(np.median(finite[-part:]))


def observed_rows(grid: Grid) -> Mask:
    """Which sites of a grid were ever observed."""
    return np.asarray(np.isfinite(grid.low).any(axis=0) | grid.flags.any(axis=0), dtype=np.bool_)


def labels(folders: Iterable[str | Path]) -> list[str]:
    """Short names that tell the folders apart.

    >>> labels(["runs/7", "runs/8"]), labels(["a/record", "b/record"])
    (['7', '8'], ['a/record', 'b/record'])
    """
    parts = [Path(f).resolve().parts for f in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({k})" for k, p in enumerate(parts, 1)]
