"""What the guard costs: guarded against bare training, and against what people use today, side by side in one process.

    python benchmarks/overhead.py                                  # the four jobs on one CPU thread, some minutes
    python benchmarks/overhead.py --quick                          # mlp and deep, few rounds: under a minute
    python benchmarks/overhead.py --every 1 --peers --plot peers.svg   # every contestant; --watch lossguard,floor for some
    python benchmarks/overhead.py --device cuda --jobs gpt2,gpt2-compiled,resnet50,billion
    python benchmarks/overhead.py --readme                         # writes its tables into benchmarks/README.md

Run it from the repository root with lossguard installed, or with PYTHONPATH=. before the command. The exit code is 1
where a guarded step read the device.

Method. Copies of a job, from one seed and on the same batches: bare, one for each contestant, and bare again, whose ratio
is the noise of this machine. After a warm-up past the guard's denser early phase they run in alternating short blocks,
each with the same share of sampled steps, so that drift hits all. A ratio is taken within a round; the table gives the
median over rounds with quartiles and extremes. In a pass of its own, not timed, aten operations are counted (views and
bare allocations apart; a foreach call is one) on one whole cycle of steps: `plain` is its median step, `sampled` its
costliest. Host reads: those that pass the dispatcher, watched minus bare (Adam reads its own host-side step counter);
on cuda also the steps in which `torch.cuda.set_sync_debug_mode` complains. `least` is the time in which what must be read
(each gradient once, each watched weight before and after the update) could be copied at the bandwidth measured in the
same run.

`deep` is ill by nature: in a plain stack of 200 layers all samples look alike to the last ones, whose units are then
on or off for all of them. A finding there is right.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import plots
import torch
from contestants import NAMES, Contestant, Guarded
from jobs import BATCHES, JOBS, LARGE, Job, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UP = 60  # steps before anything is measured: the guard looks more often in the first 50
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "repeat_interleave.Tensor")
README = Path(__file__).parent / "README.md"


class Runner:
    """A job being trained, watched or not: then by somebody whose methods are empty, so that calling them is nobody's cost."""

    def __init__(self, job: Job, watch: Contestant | None = None) -> None:
        self.job, self.watch, self.done = job, watch or Contestant(job, 1), 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around steps of this job: outside of it nothing of its watch is in the way of the others."""
        self.watch.wake()
        try:
            yield
        finally:
            self.watch.rest()

    def step(self) -> None:
        x, y = self.job.batches[self.done % BATCHES]
        self.done += 1
        self.watch.shown(x, y)
        loss = self.job.loss(x, y)
        loss.backward()
        self.watch.differentiated()
        self.job.optimizer.step()
        self.job.optimizer.zero_grad()
        self.watch.stepped(loss)


@dataclass
class Cost:
    """The measurements of one contestant on one job."""

    job: str
    name: str
    signals: str
    bare_ms: float = 0.0
    ratios: list[float] = field(default_factory=list)  # watched over bare, one a round
    noise: list[float] = field(default_factory=list)  # bare over bare
    bare_ops: int = 0
    added_ops: list[int] = field(default_factory=list)  # one cycle of steps
    reads: int = 0
    memory: int | None = None
    peak: int | None = None  # bytes on the device at most, beyond the bare job's
    least_us: float = 0.0
    said: list[str] = field(default_factory=list)  # diagnoses

    @property
    def added_us(self) -> float:
        return 1e3 * self.bare_ms * (median(self.ratios) - 1)


class Counting(TorchDispatchMode):
    """Counts operations that touch memory, and reads."""

    ops = 0
    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.ops += not (func.is_view or name in READS or name.startswith(("empty", "new_empty", "profiler")))
        masked = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        masked = masked and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        self.reads += name in READS or masked
        return func(*args, **(kwargs or {}))


def count(runner: Runner) -> Counting:
    with Counting() as counting:
        runner.step()
    return counting


def block(runner: Runner, steps: int, device: str) -> float:
    """Seconds a step; on cuda as the device's own clock has it."""
    with runner.turn():
        return _block(runner, steps, device)


def _block(runner: Runner, steps: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            runner.step()
        return (time.perf_counter() - start) / steps
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(steps):
        runner.step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / steps


def measure(name: str, device: str, every: int, rounds: int, watches: Iterable[str] = ("lossguard",)) -> list[Cost]:
    bare, again = Runner(build(name, device)), Runner(build(name, device))
    runners, costs = [bare], []
    for watch in watches:
        job = build(name, device)
        try:
            runners.append(Runner(job, NAMES[watch](job, every)))
        except ImportError as error:
            print(f"{watch} is left out: {error}", file=sys.stderr)
            continue
        costs.append(Cost(name, watch, NAMES[watch].signals))
    runners.append(again)
    try:
        for runner in runners:
            block(runner, WARM_UP, device)
        time_rounds(costs, runners, device, every, rounds)
        for cost, runner in zip(costs, runners[1:-1], strict=True):
            count_cycle(cost, bare, runner, every, device)
            if device == "cuda":
                cost.peak = peak(runner, every) - peak(bare, every)
            if isinstance(runner.watch, Guarded):
                if device == "cuda":
                    cost.reads += prove(runner, every)
                guard = runner.watch.guard
                cost.memory, cost.said = guard.memory, sorted({finding.diagnosis for finding in guard.findings})
            cost.least_us = 1e6 * must_read(bare.job) / bandwidth(device)
    finally:
        for runner in runners[1:-1]:
            runner.watch.close()
    return costs


def time_rounds(costs: list[Cost], runners: list[Runner], device: str, every: int, rounds: int) -> None:
    steps = every * max(1, round(10 / every))  # whole cycles, about ten steps
    bare_times = []
    for _ in range(rounds):
        took = [block(runner, steps, device) for runner in runners]  # always in turn: nobody finds the caches as it left them
        first, last = took[0], took[len(runners) - 1]
        bare_times.append(first)
        for k, cost in enumerate(costs, 1):
            cost.ratios.append(2 * took[k] / (first + last))  # the bare blocks before and after them
            cost.noise.append(last / first)
    for cost in costs:
        cost.bare_ms = 1e3 * median(bare_times)


def count_cycle(cost: Cost, bare: Runner, watched: Runner, every: int, device: str) -> None:
    if device == "cuda" and "compiled" in cost.job:
        return  # compiled code is not counted: a dispatch mode would break its graph
    for _ in range(every):
        plain = count(bare)
        with watched.turn():
            seen = count(watched)
        cost.bare_ops = plain.ops
        cost.added_ops.append(seen.ops - plain.ops)
        cost.reads += seen.reads - plain.reads


def peak(runner: Runner, every: int) -> int:
    """Bytes of device memory that a cycle of steps needs beyond what is held before it, and those the watch holds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with runner.turn():
        for _ in range(every):
            runner.step()
    torch.cuda.synchronize()
    held = runner.watch.guard.memory if isinstance(runner.watch, Guarded) else 0
    return torch.cuda.max_memory_allocated() - before + held


def prove(guarded: Runner, every: int) -> int:
    """The number of guarded steps, of a cycle in each mode, in which CUDA says that the host waited."""
    waited = 0
    for mode in ["warn"] * every + ["error"] * every:  # warn too: a guard that survives its own errors would hide the other
        complaints: list[str] = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            try:
                with guarded.turn():
                    guarded.step()
            except RuntimeError as error:
                complaints.append(str(error))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        complaints += [str(w.message) for w in warned]
        waited += any("synchroniz" in text for text in complaints)
        for text in complaints:
            print(f"in a guarded step: {text}", file=sys.stderr)
    return waited


def must_read(job: Job) -> int:
    """Bytes of all gradients once, and of the weights twice, sampled where a tensor is large (16384 elements of it)."""
    parameters = list(job.model.parameters())
    return sum(p.numel() * p.element_size() + 2 * min(p.numel(), 16384) * p.element_size() for p in parameters)


_bandwidth: dict[str, float] = {}


def bandwidth(device: str) -> float:
    """Bytes a second that one copy of 64 MiB reads, the best of ten."""
    if device not in _bandwidth:
        source = torch.ones(2**24, device=device)
        target, times = torch.empty_like(source), []
        for _ in range(10):
            start = time.perf_counter()
            target.copy_(source)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        _bandwidth[device] = source.nbytes / min(times)
    return _bandwidth[device]


# ---- tables


def spread(values: list[float]) -> str:
    """median (quartiles) [extremes]"""
    low, mid, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{mid:.3f} ({low:.3f}-{high:.3f}) [{min(values):.2f}-{max(values):.2f}]"


def size(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:.2f} MB" if abs(n) >= 1e5 else f"{n / 1e3:.1f} KB"


HEAD = (
    "| job | watched by | signals | bare step, ms | over bare | bare / bare | added, us a step | least, us | operations bare "
    "| added, plain | added, sampled | host reads | bytes held | peak bytes |"
)


def row(c: Cost, every: int) -> str:
    plain = f"{median(c.added_ops):g}" if every > 1 and c.added_ops else "-"
    least = f"{c.least_us / every:.0f}"
    counted = f"{c.bare_ops or '-'} | {plain} | {max(c.added_ops, default=0) or '-'} | {c.reads}"
    times = f"{c.bare_ms:.2f} | {spread(c.ratios)} | {spread(c.noise)} | {c.added_us:.0f} | {least}"
    return f"| {c.job} | {c.name} | `{c.signals}` | {times} | {counted} | {size(c.memory)} | {size(c.peak)} |"


def table(costs: list[Cost], device: str, every: int, rounds: int) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    lines = [f"torch {torch.__version__}, {where}, every={every}, {rounds} rounds: median (quartiles) [extremes]", "", HEAD, "|---" * 14 + "|"]
    lines += [row(c, every) for c in costs]
    said = [f"{c.job}: {', '.join(c.said)}" for c in costs if c.said]
    return "\n".join([*lines, "", f"findings meanwhile: {'; '.join(said) or 'none'}", ""])


def write_readme(text: str, mark: str) -> None:
    """Put the text between its marks in benchmarks/README.md."""
    page = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    if begin not in page or end not in page:
        raise SystemExit(f"{README} has no place for {mark!r}; add the lines {begin.strip()!r} and {end!r}")
    before, rest = page.split(begin, 1)
    README.write_text(before + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="guarded against bare training steps", epilog="the module's docstring explains the columns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--every", type=int, default=10, help="the sampling interval")
    parser.add_argument("--rounds", type=int, help="rounds of blocks (default 30, quick 10)")
    parser.add_argument("--jobs", help=f"comma-separated, of {','.join(JOBS)}; on a GPU also {','.join(LARGE)}")
    parser.add_argument("--watch", default="lossguard", help=f"comma-separated, of {','.join(NAMES)}")
    parser.add_argument("--peers", action="store_true", help="every contestant")
    parser.add_argument("--quick", action="store_true", help="mlp and deep, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as SVG; needs matplotlib")
    parser.add_argument("--readme", metavar="MARK", help="write the table into benchmarks/README.md, between the marks of this name")
    options = parser.parse_args(argv)
    options.names = (options.jobs or ("mlp,deep" if options.quick else ",".join(JOBS))).split(",")
    options.watches = list(NAMES) if options.peers else options.watch.split(",")
    for given, known, what in ((options.names, [*JOBS, *LARGE], "job"), (options.watches, list(NAMES), "contestant")):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {what} {unknown[0]!r}; known are {', '.join(known)}")
    if options.every < 1:
        parser.error("--every must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (10 if options.quick else 30)
    costs: list[Cost] = []
    for name in options.names:
        costs += measure(name, options.device, options.every, rounds, options.watches)
        print("\n".join(row(c, options.every) for c in costs if c.job == name), file=sys.stderr, flush=True)
    text = table(costs, options.device, options.every, rounds)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.readme:
        write_readme(text, options.readme)
    if options.plot:
        plots.ledger(costs, options.plot)
    return 1 if any(c.reads > 0 for c in costs if c.name == "lossguard") else 0


if __name__ == "__main__":
    raise SystemExit(main())
