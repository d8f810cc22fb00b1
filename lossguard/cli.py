"""``python -m lossguard``: demo, explain, findings of a record, watch, report, config, run, launch, replay. Arguments flow in, text flows out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lossguard import __version__, explain, painting, replay, report, sinks, watch
from lossguard.config import sample
from lossguard.guard import Guard
from lossguard.launch import run, wrap

WATCH = (
    "Follows the record of a running job: the loss, a few signals, speed, verdict, and findings as they come, of all ranks. It reads "
    "only what is new, waits for a record that is not there yet, and ends with the run. NaN is drawn as N. On a terminal it redraws the screen; "
    "into a pipe or a file it writes plain lines. NO_COLOR is respected."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 wrong use)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"]:
        return run.main(given[1:])
    if given[:1] == ["launch"]:
        return wrap.main(given[1:])
    parser = argparse.ArgumentParser(prog="lossguard", description="The guard for PyTorch training runs.")
    parser.add_argument("--version", action="version", version=f"lossguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train healthy and ill models on real data and show what the guard says (needs scikit-learn)")
    demo.add_argument("--folder", type=Path, default=Path("lossguard-demo"), help="where the records go (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=150, help="steps of each run (default: %(default)s)")
    page = commands.add_parser("explain", help="what a diagnosis means, its limits and their sources")
    page.add_argument("name", nargs="?", help="a diagnosis; without one, the list")
    page.add_argument("--markdown", action="store_true", help="all pages as one Markdown document")
    show = commands.add_parser("findings", help="the findings in a run's record")
    show.add_argument("folder", type=Path, help="the folder given as Guard(record=...)")
    live = commands.add_parser("watch", help="a running job's record, live: curves, findings, speed (needs rich); Ctrl-C ends it", description=WATCH)
    live.add_argument("folder", type=Path, help="the folder given as Guard(record=...); it may not be there yet")
    live.add_argument("--once", action="store_true", help="show the present state and end")
    live.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: %(default)s)")
    html = commands.add_parser("report", help="the post-mortem page of a run's record, as one HTML file (needs plotly)")
    html.add_argument("folder", type=Path, help="the folder given as Guard(record=...)")
    html.add_argument("--compare", type=Path, metavar="OTHER", help="the record of a second run, to stand beside the first")
    html.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the page goes (default: report.html in the folder)")
    again = commands.add_parser("replay", help="run the step that halted twice: the same result, or a fault of the hardware?")
    again.add_argument("folder", type=Path, help="the record, or a folder halt-STEP or rankN in it")
    again.add_argument("--step", required=True, metavar="MODULE:FUNCTION", help="called with the Bundle; gives the loss, or a dict of tensors")
    again.add_argument("--locate", action="store_true", help="name the operation that made the first non-finite value, in the forward or the backward pass")
    again.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options_ = commands.add_parser("config", help="print a TOML file of all options with their defaults, to start from")
    options_.add_argument("name", nargs="?", help="a diagnosis, for the fields of its rule, or recover, for those of the ladder")
    commands.add_parser("run", help="run a script so that a halt ends it with its exit code: run [--module] TARGET ...")
    commands.add_parser("launch", help="run a launcher and end with the code that its workers halted with: launch -- torchrun ...")
    options = parser.parse_args(given)
    try:
        if options.command == "demo":
            return _demo(options.folder, options.steps)
        if options.command == "replay":
            if options.once:
                return replay.once(options.folder, options.step, options.once, locate=options.locate)
            return replay.main(options.folder, options.step, locate=options.locate)
        if options.command == "config":
            print(sample.page(Guard) if options.name is None else sample.table(Guard, options.name))
            return 0
        if options.command == "watch":
            return watch.main(options.folder, once=options.once, interval=options.interval)
        if options.command == "report":
            print(f"wrote {report.of_folders(options.folder, options.compare, options.output)}")
            return 0
        print(_explain(options.name, options.markdown) if options.command == "explain" else _findings(options.folder))
    except ValueError as error:
        print(f"lossguard: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _explain(name: str | None, markdown: bool) -> str:
    if markdown:
        return explain.markdown().rstrip()
    return explain.listing() if name is None else explain.wrapped(explain.page(name))


def _findings(folder: Path) -> str:
    text = painting.painted if painting.welcome(sys.stdout) else str
    lines = [text(finding) for finding in sinks.findings(folder)]
    return "\n".join(lines) if lines else f"no findings in {folder}"


def _demo(folder: Path, steps: int) -> int:
    try:
        from lossguard import demo
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}; install it with: pip install scikit-learn") from error
    if steps < demo.LEAST:
        raise ValueError(f"--steps must be at least {demo.LEAST}, so that every fault has come to show, got {steps}")
    return demo.main(folder, steps)
