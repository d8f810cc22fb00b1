"""How the cost grows: with the number of tensors, with the number of parameters, with the interval. Tables and a plot.

    python benchmarks/growth.py                         # some minutes on one CPU thread
    python benchmarks/growth.py --plot benchmarks/growth.svg --readme growth   # needs matplotlib

Each point is measured as `overhead.py` does it: guarded against bare, side by side, in alternating blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import jobs
import overhead
import torch

DEPTHS = (15, 150, 1500)  # layers of 16: twice as many tensors
WIDTHS = (64, 256, 1024)  # of 10 layers
INTERVALS = (1, 2, 5, 10, 50)  # on mlp


def point(depth: int, width: int, every: int, rounds: int, device: str) -> overhead.Cost:
    name = f"{depth}x{width}"
    jobs.JOBS[name] = (lambda: jobs.stack(depth, width), lambda: jobs.labelled((64,), 64), jobs.adam, 1e-4)
    return overhead.measure(name, device, every, rounds)[0]


def curves(rounds: int, device: str) -> dict[str, list[tuple[int, overhead.Cost]]]:
    """What is varied -> (value, cost) of each point."""
    return {
        "parameter tensors": [(2 * depth, point(depth, 16, 10, rounds, device)) for depth in DEPTHS],
        "parameters": [(10 * width**2, point(10, width, 10, rounds, device)) for width in WIDTHS],
        "every": [(every, point(30, 64, every, rounds, device)) for every in INTERVALS],
    }


def sampled_us(cost: overhead.Cost, every: int) -> float:
    """Added by a sampled step, if plain steps add nothing."""
    return cost.added_us * every


def tables(found: dict[str, list[tuple[int, overhead.Cost]]]) -> str:
    lines = []
    for what, points in found.items():
        lines += [f"| {what} | bare step, ms | over bare | added, us a step | added operations, sampled | bytes held |", "|---" * 6 + "|"]
        for value, c in points:
            ratio = f"{median(c.ratios):.3f} (bare/bare {median(c.noise):.3f})"
            lines.append(f"| {value:,} | {c.bare_ms:.2f} | {ratio} | {c.added_us:.0f} | {max(c.added_ops)} | {overhead.size(c.memory)} |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, list[tuple[int, overhead.Cost]]], path: Path) -> None:
    """Three small charts side by side."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lossguard"  # the same file for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3), constrained_layout=True)
    for axis, (what, points) in zip(axes, found.items(), strict=True):
        axis: Any
        axis.plot([value for value, _ in points], [median(c.ratios) for _, c in points], "o-", label="guarded / bare")
        axis.plot([value for value, _ in points], [median(c.noise) for _, c in points], "x:", color="0.5", label="bare / bare")
        axis.set_xscale("log")
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("step time over bare")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the cost against tensors, parameters, interval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="write the charts here, as SVG")
    parser.add_argument("--readme", metavar="MARK", help="write the tables into benchmarks/README.md, between the marks of this name")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = curves(options.rounds, options.device)
    text = f"torch {torch.__version__}, {options.device}, {options.rounds} rounds\n\n{tables(found)}"
    print(text)
    if options.plot:
        plot(found, options.plot)
    if options.readme:
        overhead.write_readme(text, options.readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
