"""The ledger's charts: SVG, on white, the same file for the same figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overhead import Cost

OURS, OTHERS, NOISE = "#0b6e4f", "#5f6b7a", "#b7bfc9"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "lossguard", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def ledger(costs: Sequence[Cost], path: Path) -> None:
    """One panel a job: the step time of each contestant over the bare one, median and quartiles; bare over bare as a band."""
    pyplot = _pyplot()
    by_job: dict[str, list[Cost]] = {}
    for cost in costs:
        by_job.setdefault(cost.job, []).append(cost)
    rows = max(len(of) for of in by_job.values())
    figure, axes = pyplot.subplots(1, len(by_job), figsize=(1.6 + 2.4 * len(by_job), 1.1 + 0.26 * rows), sharey=True, constrained_layout=True, squeeze=False)
    names = [cost.name for cost in next(iter(by_job.values()))]
    for axis, (job, of) in zip(axes[0], by_job.items(), strict=True):
        low, _, high = _quartiles(of[0].noise)
        axis.axvspan(low, high, color=NOISE, alpha=0.4, linewidth=0)
        axis.axvline(1.0, color="black", linewidth=0.8)
        for cost in of:
            first, middle, third = _quartiles(cost.ratios)
            at, color = names.index(cost.name), OURS if cost.name == "lossguard" else OTHERS
            axis.plot([first, third], [at, at], color=color, linewidth=2, alpha=0.6)
            axis.plot([middle], [at], "o", color=color, markersize=5)
        axis.set_xscale("log")
        axis.set_title(f"{job}, {of[0].bare_ms:.0f} ms", fontsize=9)
        most = max(max(cost.ratios) for cost in of)
        ticks = [tick for tick in ((1, 2, 5, 10, 25) if most > 3 else (1, 1.2, 1.5, 2)) if tick <= 1.2 * most]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(axis="x", alpha=0.25)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("step time over the bare step; grey: bare over bare", fontsize=9)
    _save(figure, path)


def growth(found: Mapping[str, Sequence[tuple[int, Cost]]], path: Path) -> None:
    """One panel for each thing that is varied: guarded over bare, and bare over bare."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 2.6), constrained_layout=True, squeeze=False)
    for axis, (what, points) in zip(axes[0], found.items(), strict=True):
        values = [value for value, _ in points]
        for part, color, mark, label in (("noise", OTHERS, "x:", "bare / bare"), ("ratios", OURS, "o-", "guarded / bare")):
            low, middle, high = zip(*(_quartiles(getattr(cost, part)) for _, cost in points), strict=True)
            axis.fill_between(values, low, high, color=color, alpha=0.12, linewidth=0)
            axis.plot(values, middle, mark, color=color, label=label)
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(what)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("step time over bare")
    axes[0][0].legend(frameon=False)
    _save(figure, path)
