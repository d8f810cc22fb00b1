"""What the guard costs: guarded against bare training, side by side in one process.

    python benchmarks/overhead.py                                  # the four jobs on one CPU thread, some minutes
    python benchmarks/overhead.py --quick                          # mlp and deep, few rounds: under a minute
    python benchmarks/overhead.py --device cuda --every 1 --jobs mlp,gpt --markdown cost.md

Run it from the repository root with lossguard installed, or with PYTHONPATH=. before the command. The exit code is 1
where a guarded step read the device.

Method. Three copies of a job, from one seed and on the same batches: bare, guarded, and bare again, whose ratio is the
noise of this machine. After a warm-up past the guard's denser early phase they run in alternating short blocks, each
with the same share of sampled steps, so that drift hits all. A ratio is taken within a round; the table gives the
median over rounds with quartiles and extremes. In a pass of its own, not timed, aten operations are counted (views and
bare allocations apart; a foreach call is one) on one whole cycle of steps: `plain` is its median step, `sampled` its
costliest. Host reads: those that pass the dispatcher, guarded minus bare (Adam reads its own host-side step counter);
on cuda also the steps in which `torch.cuda.set_sync_debug_mode` complains.

`deep` is ill by nature: in a plain stack of 200 layers all samples look alike to the last ones, whose units are then
on or off for all of them. A finding there is right.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard import Guard

WARM_UP = 60  # steps before anything is measured: the guard looks more often in the first 50
BATCHES = 32  # distinct batches of a job, made before the clock runs
CLASSES = 10
VOCABULARY, CONTEXT = 2000, 128
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "repeat_interleave.Tensor")

Batch = tuple[Tensor, Tensor]


@dataclass
class Job:
    """One training job: what it trains, with what, on what."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]


@dataclass
class Runner:
    """A job being trained, with or without a guard."""

    job: Job
    guard: Guard | None = None
    done: int = 0

    def step(self) -> None:
        x, y = self.job.batches[self.done % BATCHES]
        self.done += 1
        if self.guard is not None:
            self.guard.batch(x, y)
        loss = F.cross_entropy(self.job.model(x).flatten(0, -2), y.flatten())
        loss.backward()
        self.job.optimizer.step()
        self.job.optimizer.zero_grad()
        if self.guard is not None:
            self.guard.step(loss)


def stack(depth: int, width: int) -> nn.Module:
    """`depth` linear layers with ReLU between them, He initialisation: healthy at 200 layers too."""
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(64 if i == 0 else width, CLASSES if i == depth - 1 else width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.stride, self.more = width // fan_in, width - fan_in
        self.conv1 = nn.Conv2d(fan_in, width, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return self.act2(short + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))


def resnet() -> nn.Module:
    """13 convolutions with batch-norm: a stem and three stages of two residual blocks."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [Residual(a, b) for a, b in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Any:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, dim), nn.Parameter(0.02 * torch.randn(CONTEXT, dim))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places)))


def labelled(shape: tuple[int, ...], n: int) -> list[Batch]:
    """Noisy copies of ten prototypes in [0, 1], as the images of digits are."""
    prototypes = torch.rand(CLASSES, *shape)
    targets = [torch.randint(CLASSES, (n,)) for _ in range(BATCHES)]
    return [((prototypes[y] + 0.3 * torch.randn(n, *shape)).clamp(0, 1), y) for y in targets]


def sequences(n: int) -> list[Batch]:
    """Sequences that count upward in a stride of their own."""
    made = []
    for _ in range(BATCHES):
        start, stride = torch.randint(VOCABULARY, (n, 1)), torch.randint(1, 8, (n, 1))
        tokens = (start + stride * torch.arange(CONTEXT + 1)) % VOCABULARY
        made.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return made


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)


Recipe = tuple[Callable[[], nn.Module], Callable[[], list[Batch]], Callable[[nn.Module, float], torch.optim.Optimizer], float]
JOBS: dict[str, Recipe] = {
    "mlp": (lambda: stack(30, 64), lambda: labelled((64,), 64), adam, 1e-4),
    "deep": (lambda: stack(200, 32), lambda: labelled((64,), 64), adam, 1e-4),
    "conv": (resnet, lambda: labelled((3, 32, 32), 16), sgd, 0.02),
    "gpt": (lambda: Gpt(6, 256, 8), lambda: sequences(2), adam, 3e-4),
}


def build(name: str, device: str) -> Job:
    """A fresh copy of a job: the same weights and batches at every call."""
    make_model, make_batches, make_optimizer, lr = JOBS[name]
    torch.manual_seed(0)
    model = make_model().to(device)
    batches = [(x.to(device), y.to(device)) for x, y in make_batches()]
    return Job(model, make_optimizer(model, lr), batches)


@dataclass
class Cost:
    """The measurements of one job."""

    job: str
    bare_ms: float = 0.0
    ratios: list[float] = field(default_factory=list)  # guarded over bare, one a round
    noise: list[float] = field(default_factory=list)  # bare over bare
    bare_ops: int = 0
    added_ops: list[int] = field(default_factory=list)  # one cycle of steps
    reads: int = 0
    memory: int | None = None
    said: list[str] = field(default_factory=list)  # diagnoses


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
    """Seconds a step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        runner.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure(name: str, device: str, every: int, rounds: int) -> Cost:
    cost = Cost(name)
    guarded_job = build(name, device)
    with Guard(guarded_job.model, guarded_job.optimizer, every=every) as guard:
        bare, guarded, again = Runner(build(name, device)), Runner(guarded_job, guard), Runner(build(name, device))
        for runner in (bare, guarded, again):
            block(runner, WARM_UP, device)
        time_rounds(cost, [bare, guarded, again], device, every, rounds)
        count_cycle(cost, bare, guarded, every)
        if device == "cuda":
            cost.reads += prove(guarded, every)
        memory = getattr(guard, "memory", None)
        cost.memory = memory if isinstance(memory, int) else None
    cost.said = sorted({finding.diagnosis for finding in guard.findings})
    return cost


def time_rounds(cost: Cost, runners: list[Runner], device: str, every: int, rounds: int) -> None:
    steps = every * max(1, round(10 / every))  # whole cycles, about ten steps
    bare_times = []
    for i in range(rounds):
        order = [0, 1, 2] if i % 2 == 0 else [2, 1, 0]
        took = {k: block(runners[k], steps, device) for k in order}
        bare_times.append(took[0])
        cost.ratios.append(2 * took[1] / (took[0] + took[2]))  # the bare blocks before and after it
        cost.noise.append(took[2] / took[0])
    cost.bare_ms = 1e3 * median(bare_times)


def count_cycle(cost: Cost, bare: Runner, guarded: Runner, every: int) -> None:
    for _ in range(every):
        plain, watched = count(bare), count(guarded)
        cost.bare_ops = plain.ops
        cost.added_ops.append(watched.ops - plain.ops)
        cost.reads += watched.reads - plain.reads


def prove(guarded: Runner, every: int) -> int:
    """The number of guarded steps, of a cycle in each mode, in which CUDA says that the host waited."""
    waited = 0
    for mode in ["warn"] * every + ["error"] * every:  # warn too: a guard that survives its own errors would hide the other
        complaints: list[str] = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            try:
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


def spread(values: list[float]) -> str:
    """median (quartiles) [extremes]"""
    low, mid, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{mid:.3f} ({low:.3f}-{high:.3f}) [{min(values):.2f}-{max(values):.2f}]"


def size(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:.2f} MB" if n >= 1e5 else f"{n / 1e3:.1f} KB"


def table(costs: list[Cost], device: str, every: int, rounds: int) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    lines = [
        f"torch {torch.__version__}, {where}, every={every}, {rounds} rounds: median (quartiles) [extremes]",
        "",
        "| job | bare step, ms | guarded / bare | bare / bare | added, us a step | operations bare | added, plain | added, sampled | host reads | bytes held |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in costs:
        added_us = 1e3 * c.bare_ms * (median(c.ratios) - 1)
        plain = f"{median(c.added_ops):g}" if every > 1 else "-"
        numbers = f"{added_us:.0f} | {c.bare_ops} | {plain} | {max(c.added_ops)} | {c.reads} | {size(c.memory)}"
        lines.append(f"| {c.job} | {c.bare_ms:.2f} | {spread(c.ratios)} | {spread(c.noise)} | {numbers} |")
    said = [f"{c.job}: {', '.join(c.said)}" for c in costs if c.said]
    return "\n".join([*lines, "", f"findings meanwhile: {'; '.join(said) or 'none'}", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="guarded against bare training steps", epilog="the module's docstring explains the columns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--every", type=int, default=10, help="the guard's sampling interval")
    parser.add_argument("--rounds", type=int, help="rounds of three blocks (default 30, quick 10)")
    parser.add_argument("--jobs", help=f"comma-separated, of {','.join(JOBS)}")
    parser.add_argument("--quick", action="store_true", help="mlp and deep, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    names = (options.jobs or ("mlp,deep" if options.quick else ",".join(JOBS))).split(",")
    unknown = [name for name in names if name not in JOBS]
    if unknown or options.every < 1:
        parser.error(f"unknown job {unknown[0]!r}; the jobs are {', '.join(JOBS)}" if unknown else "--every must be at least 1")
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (10 if options.quick else 30)
    costs = []
    for name in names:
        costs.append(measure(name, options.device, options.every, rounds))
        print(table(costs[-1:], options.device, options.every, rounds).splitlines()[4], file=sys.stderr, flush=True)
    text = table(costs, options.device, options.every, rounds)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return int(any(c.reads for c in costs))


if __name__ == "__main__":
    sys.exit(main())
