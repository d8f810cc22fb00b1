"""Where a guarded step spends what it adds: by part of the guard, on plain and on sampled steps.

    python benchmarks/breakdown.py                     # the four jobs and residual stacks of 30, 302, 3,002 tensors, some minutes
    python benchmarks/breakdown.py --jobs mlp --every 1
    python benchmarks/breakdown.py --readme breakdown  # writes its tables into benchmarks/README.md

Run it from the repository root with lossguard installed, or with PYTHONPATH=. before the command.

Method. The entry points of each part are timed by the host's clock while a job trains, bare blocks of the same job between;
time spent in a part that another part calls counts for the inner one only. Figures are medians over steps of one kind, so
they do not add up exactly. `all` is the watched step minus the bare one; `torch's hooks` is what of it lies in no part: what
torch spends on calling hooks and optimizers with hooks, and the timers themselves, some 0.3 us a call.
On a GPU these are launches, not kernels: what the host pays.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import jobs
import overhead
import torch
from contestants import Guarded

from lossguard import Guard
from lossguard.device.bank import Bank
from lossguard.device.extras import Extras
from lossguard.device.forward import Forward
from lossguard.device.passes import Passes
from lossguard.device.recorder import Recorder
from lossguard.device.tape import Row
from lossguard.device.taps import Taps
from lossguard.host.decode import Decoder
from lossguard.host.handover import Handover
from lossguard.host.history import History
from lossguard.host.intake import Intake
from lossguard.phases import Phased
from lossguard.pulses import Pulses
from lossguard.rules.judge import Judge

PARTS: dict[str, tuple[tuple[type[Any], tuple[str, ...]], ...]] = {
    "module calls": ((Taps, ("forward_ended",)), (Passes, ("module_called",))),
    "logits": ((Passes, ("_logits",)),),
    "gradients, weights": ((Bank, ("keep_weights", "keep_gradients", "keep_update", "lay")), (Recorder, ("backward_done", "before_update", "after_update"))),
    "outputs": ((Forward, ("finish",)),),
    "losses": ((Pulses, ("write", "quick", "show", "send")), (Intake, ("_take_losses",))),
    "tape, hand-over": ((Row, ("lay_down",)), (Handover, ("send",)), (Extras, ("finish",))),
    "history": ((Decoder, ("decode",)), (History, ("add_sample",))),
    "judging": ((Judge, ("observe",)),),
    "the guard itself": ((Guard, ("step", "batch")), (Phased, ("after_backward", "before_update", "after_update"))),
}
TENSORS = (30, 302, 3002)  # parameter tensors of residual stacks, layers of 16
STACKS = {f"{n} tensors": (n - 6) // 4 for n in TENSORS}


class Clock:
    """Nanoseconds spent in each part since the last :meth:`take`, without what inner parts took."""

    def __init__(self) -> None:
        self.on = False
        self._spent: dict[str, int] = defaultdict(int)
        self._inner: list[int] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **keywords: Any) -> Any:
            if not self.on:
                return call(*args, **keywords)
            self._inner.append(0)
            start = time.perf_counter_ns()
            try:
                return call(*args, **keywords)
            finally:
                took = time.perf_counter_ns() - start
                self._spent[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    def take(self) -> dict[str, int]:
        spent, self._spent = dict(self._spent), defaultdict(int)
        return spent

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts the parts are timed."""
        before = [(cls, name, vars(cls)[name]) for owners in PARTS.values() for cls, names in owners for name in names]
        part_of = {(cls, name): part for part, owners in PARTS.items() for cls, names in owners for name in names}
        try:
            for cls, name, call in before:
                setattr(cls, name, self.timed(part_of[cls, name], call))
            yield
        finally:
            for cls, name, call in before:
                setattr(cls, name, call)


def one_step(runner: overhead.Runner, device: str) -> int:
    """Nanoseconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    runner.step()
    return time.perf_counter_ns() - start


def measure(name: str, device: str, every: int, cycles: int) -> dict[str, dict[str, float]]:
    """Kind of step -> part -> microseconds. ``bare`` is the step without a guard."""
    clock = Clock()
    with clock.attached():
        bare, job = overhead.Runner(jobs.build(name, device)), jobs.build(name, device)
        watch = Guarded(job, every)
        watched = overhead.Runner(job, watch)
        for runner in (bare, watched):
            overhead.block(runner, overhead.WARM_UP, device)
        parts: dict[str, list[dict[str, int]]] = {"plain": [], "sampled": []}
        wall: dict[str, list[int]] = {"plain": [], "sampled": [], "bare": []}
        for _ in range(cycles):
            clock.on = True
            with watched.turn():
                for _ in range(every):
                    kind = "plain" if watch.guard.steps % every else "sampled"
                    clock.take()  # what lies between turns
                    wall[kind].append(one_step(watched, device))
                    parts[kind].append(clock.take())
            clock.on = False
            wall["bare"] += [one_step(bare, device) for _ in range(every)]
        watch.close()
    found = {"bare": {"all": median(wall["bare"]) / 1e3}}
    for kind in [kind for kind, steps in parts.items() if steps]:
        of = {part: median([step.get(part, 0) for step in parts[kind]]) / 1e3 for part in PARTS}
        whole = median(wall[kind]) / 1e3 - found["bare"]["all"]
        found[kind] = {**of, "torch's hooks": whole - sum(of.values()), "all": whole}
    return found


def table(found: dict[str, dict[str, dict[str, float]]], kind: str) -> str:
    """One row a part, one column a job."""
    names = [name for name, of in found.items() if kind in of]
    lines = [f"| {kind} step, us | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for part in [*PARTS, "torch's hooks", "all"]:
        lines.append(f"| {part} | {' | '.join(f'{found[name][kind][part]:.0f}' for name in names)} |")
    bare = [found[name]["bare"]["all"] for name in names]
    return "\n".join([*lines, f"| bare step | {' | '.join(f'{us:.0f}' for us in bare)} |", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="where a guarded step spends what it adds", epilog="the module's docstring explains the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--every", type=int, default=10, help="the sampling interval")
    parser.add_argument("--cycles", type=int, default=30, help="samples of each job")
    parser.add_argument("--jobs", help=f"comma-separated, of {','.join([*jobs.JOBS, *STACKS])}; on a GPU also {','.join(jobs.LARGE)}")
    parser.add_argument("--readme", metavar="MARK", help="write the tables into benchmarks/README.md, between the marks of this name")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, depth in STACKS.items():
        jobs.JOBS[name] = (functools.partial(jobs.Wide, depth, 16), lambda: jobs.labelled((64,), 64), jobs.adam, 1e-4)
    names = options.jobs.split(",") if options.jobs else list(jobs.JOBS)
    unknown = [name for name in names if name not in jobs.JOBS | jobs.LARGE]
    if unknown:
        parser.error(f"unknown job {unknown[0]!r}; known are {', '.join(jobs.JOBS | jobs.LARGE)}")
    found = {name: measure(name, options.device, options.every, options.cycles) for name in names}
    text = f"torch {torch.__version__}, {options.device}, every={options.every}, {options.cycles} samples\n\n"
    text += "\n".join(table(found, kind) for kind in ("sampled", "plain") if any(kind in of for of in found.values()))
    print(text)
    if options.readme:
        overhead.write_readme(text, options.readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
