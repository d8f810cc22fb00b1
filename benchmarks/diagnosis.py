"""How right the guard is: runs the gallery of real training runs, and counts what it says of them.

OMP_NUM_THREADS=1 python benchmarks/diagnosis.py --quick
OMP_NUM_THREADS=1 python benchmarks/diagnosis.py --twins --repair --markdown
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
for folder in (HERE.parent, HERE):  # the checkout, and the gallery
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gallery import measure, registry, tables  # noqa: E402

Task = tuple[str, int, str]


def tasks(chosen: list[registry.Program], seeds: int, *, twins: bool, repair: bool) -> list[Task]:
    """Every run to make: a name, a seed, a variant."""
    made: list[Task] = []
    for program in chosen:
        ill = not program.healthy
        variants = ["itself", *(["twin"] if ill and twins else []), *(["repaired"] if ill and repair and program.repairable else [])]
        made += [(program.name, seed, variant) for variant in variants for seed in range(seeds)]
    return made


def choose(args: argparse.Namespace) -> list[registry.Program]:
    """The programs that the command line asks for; the set that is kept apart only where it is named."""
    programs = registry.load().values()
    patterns = args.only or ["*"]
    return [
        p for p in programs
        if (args.only or registry.APART not in p.families)
        and any(fnmatch.fnmatch(p.name, pattern) or pattern in p.families for pattern in patterns)
        and (not args.quick or p.quick) and (args.half is None or p.half == args.half)
        and (args.kind is None or p.healthy == (args.kind == "healthy"))
    ]  # fmt: skip


def start() -> None:
    """In each worker: one thread."""
    import torch

    torch.set_num_threads(1)


def run(made: list[Task], jobs: int) -> list[measure.Outcome]:
    """All outcomes, in the order of the tasks. A worker that dies makes its runs errors, and stops nothing."""
    outcomes: dict[Task, measure.Outcome] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start) as pool:
        waiting = {pool.submit(measure.measure, *task): task for task in made}
        for i, done in enumerate(as_completed(waiting), 1):
            task = waiting[done]
            try:
                outcomes[task] = done.result()
            except Exception as error:  # the worker itself died
                outcomes[task] = measure.Outcome(*task, error=f"the worker died: {type(error).__name__}: {error}")
            told = outcomes[task]
            print(f"\r{i}/{len(made)} {told.program} {told.seconds:.1f} s{' ERROR' if told.error else ''}\033[K", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [outcomes[task] for task in made]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each program")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names with wildcards, or a family; may be given again")
    parser.add_argument("--kind", choices=("healthy", "ill"))
    parser.add_argument("--half", choices=("tune", "held"))
    parser.add_argument("--quick", action="store_true", help="a subset with one seed, under 90 s")
    parser.add_argument("--twins", action="store_true", help="run ill programs with their fault taken out, too")
    parser.add_argument("--repair", action="store_true", help="run ill programs again with the first remedy's change")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome")
    parser.add_argument("--markdown", action="store_true", help="write benchmarks/gallery/RESULTS.md")
    parser.add_argument("--list", action="store_true", help="list programs, run nothing")
    return parser.parse_args(given)


def main() -> int:
    """Run what is asked for; 1 if a program did not do what it claims."""
    args = arguments()
    chosen = choose(args)
    if args.list:
        rows = [[p.name, "healthy" if p.healthy else "ill", p.half, "quick" if p.quick else "", f"{p.bar:g}",
                 ", ".join(sorted(p.expect)), p.cause, ", ".join(p.families)] for p in chosen]  # fmt: skip
        print(tables.grid(["program", "kind", "half", "", "bar", "expected", "planted", "families"], rows))
        return 0
    if not chosen:
        raise SystemExit("no program is chosen; see --list")
    seeds = 1 if args.quick else args.seeds
    begun = time.perf_counter()
    outcomes = run(tasks(chosen, seeds, twins=args.twins, repair=args.repair), args.jobs)
    healthy = sum(p.healthy for p in chosen)
    how = f"{healthy} healthy and {len(chosen) - healthy} ill programs, {seeds} seed{'s' * (seeds > 1)}, one thread each; {time.perf_counter() - begun:.0f} s."
    text = tables.page(outcomes, how)
    print(text)
    if args.json:
        args.json.write_text(json.dumps([o.to_dict() for o in outcomes], indent=1), encoding="utf-8")
    if args.markdown:
        (HERE / "gallery" / "RESULTS.md").write_text(text, encoding="utf-8")
    return int(any(o.error or not tables.usable(o) for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
