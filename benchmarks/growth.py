"""How the cost grows: with the number of tensors, with the number of parameters, with the interval. Tables and a plot.

    python benchmarks/growth.py                         # some minutes on one CPU thread
    python benchmarks/growth.py --plot benchmarks/growth.svg --readme growth   # needs matplotlib

Each point is measured as `overhead.py` does it: guarded against bare, side by side, in alternating blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import jobs
import overhead
import plots
import torch

DEPTHS = (6, 74, 749)  # residual layers of 16, each of them four tensors
WIDTHS = (64, 256, 1024)  # of 10 residual layers
INTERVALS = (1, 2, 5, 10, 50)  # on mlp


def point(name: str, every: int, rounds: int, device: str) -> overhead.Cost:
    return overhead.measure(name, device, every, rounds)[0]


def curves(rounds: int, device: str) -> dict[str, list[tuple[int, overhead.Cost]]]:
    """What is varied -> (value, cost) of each point."""
    return {
        "parameter tensors": [(4 * depth + 6, point(residual(depth, 16), 10, rounds, device)) for depth in DEPTHS],
        "parameters": [(10 * width**2, point(residual(10, width), 10, rounds, device)) for width in WIDTHS],
        "every": [(every, point("mlp", every, rounds, device)) for every in INTERVALS],
    }


def residual(depth: int, width: int) -> str:
    """The name of a job made here: residual layers, which train well at any depth, so that no finding adds to the cost."""
    name = f"{depth}x{width}"
    jobs.JOBS[name] = (lambda: jobs.Wide(depth, width), lambda: jobs.labelled((64,), 64), jobs.adam, 1e-4)
    return name


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
        plots.growth(found, options.plot)
    if options.readme:
        overhead.write_readme(text, options.readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
