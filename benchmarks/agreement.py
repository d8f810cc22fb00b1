"""Do ranks stop together, and what does it cost? Real gloo processes train one model, a fault befalls one of them, and all must halt at one step.

    python benchmarks/agreement.py                        # 200 runs on 4 ranks, some minutes
    python benchmarks/agreement.py --runs 20 --ranks 2

Each run has a fault of its own on a random rank at a random step: a poisoned batch, a loss that is not finite on that rank
only, a weight written on that rank only, an error of the script's own, or data that ends early; some with uneven data under
``Join``, all with evaluations in between on rank 0 alone, logging on rank 0 only, and ranks that are never quite in step. A
run is right if every rank that still trains raises ``TrainingHalted`` at the same step with the same diagnosis and the
accused rank is named; after an error of the script's own, or an early end, the others must go on to their end. It hangs if it
takes longer than BOUND seconds. The processes live for SPAWN runs. The last lines tell how many were right, how long a halt
took, and how many operations and collectives the guard adds to a step under DDP and FSDP2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard import Guard, TrainingHalted

STEPS = 120
BOUND = 60.0  # seconds a run may take; one takes one or two on two cores
SPAWN = 50  # runs of one start of the processes: each run's guard makes a group of its own, which lives as long as its process
KINDS = ("batch", "loss", "batch", "loss", "weight", "join", "error", "short")


class ScriptError(Exception):
    """An error of the script's own."""


def plan(seed: int, world: int) -> dict[str, Any]:
    """What befalls a run: the same on every rank."""
    chance = random.Random(seed)
    told = {"kind": KINDS[seed % len(KINDS)], "accused": chance.randrange(world), "when": chance.randrange(2, STEPS - 50)}
    return {**told, "every": chance.choice((1, 5, 10)), "dense": chance.choice((0, 10, 50))}


def train(seed: int, rank: int, world: int) -> dict[str, Any]:
    """One run on this rank: where it ended, and by what."""
    told = plan(seed, world)
    kind, when, mine = told["kind"], told["when"], told["accused"] == rank
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    wrapped = model if kind in ("error", "short") else DistributedDataParallel(model)  # torch's own collectives would wait for who leaves
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ended: dict[str, Any] = {**told, "step": None, "diagnosis": None, "where": None, "end": None}
    guard = Guard(model, optimizer, every=told["every"], dense=told["dense"], mute=("rank_outlier",))
    # weights are compared every tenth round of votes, and the halt takes three rounds more
    steps = STEPS + {"join": 20 + 3 * rank, "weight": 14 * told["every"]}.get(kind, 0)
    began = time.perf_counter()
    try:
        with guard, Join([wrapped]) if kind == "join" else contextlib.nullcontext():
            for step, (x, y) in enumerate(batches(seed, rank, steps)):
                if mine and kind == "error" and step == when:
                    raise ScriptError
                if mine and kind == "short" and step == when:
                    break
                if mine and step >= when and kind in ("batch", "join"):
                    x[0, 0] = float("nan")
                guard.batch(x, y)
                loss = nn.functional.cross_entropy(wrapped(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if mine and kind == "weight" and step == when:
                    with torch.no_grad():
                        model[2].weight[0, 0] += 1.0
                time.sleep(random.Random(rank * 7919 + step).random() * 1e-3)  # never quite in step
                guard.step(loss.detach() * float("nan") if mine and step >= when and kind == "loss" else loss)
                evaluate(model, x, rank, step)
    except TrainingHalted as halt:
        ended.update(step=guard.steps, diagnosis=halt.finding.diagnosis, where=halt.finding.where)
    except ScriptError:
        ended.update(end="error")
    return {**ended, "end": ended["end"] or guard.steps, "seconds": time.perf_counter() - began}


def batches(seed: int, rank: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    own = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(steps):
        yield torch.randn(4, 8, generator=own), torch.randint(3, (4,), generator=own)


def evaluate(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> None:
    """On rank 0 only, while the others go on; and a line of its log."""
    if rank == 0 and step % 17 == 0:
        with torch.no_grad():
            model.eval()
            model(x)
            model.train()
        print(f"step {step}", file=sys.stderr)


def right(everyone: list[dict[str, Any]]) -> bool:
    """All halted at one step by one diagnosis, and the accused rank is named; or the others went on where one left."""
    first = everyone[0]
    if any(one["seconds"] > BOUND for one in everyone):
        return False
    if first["kind"] in ("error", "short"):
        ends = [first["when"] if first["kind"] == "short" else "error" if rank == first["accused"] else STEPS for rank in range(len(everyone))]
        ends = [end if rank == first["accused"] else STEPS for rank, end in enumerate(ends)]
        return [one["end"] for one in everyone] == ends and all(one["step"] is None for one in everyone)
    same = len({(one["step"], one["diagnosis"], one["where"]) for one in everyone}) == 1 and first["step"] is not None
    named = first["kind"] == "weight" and len(everyone) < 3  # of two, neither is the odd one
    return same and (named or f"rank {first['accused']}" in first["where"])


# ---- what it costs


class Calls(TorchDispatchMode):
    """Counts operations, and collectives among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = "c10d" in function.namespace
        self.collectives += collective and "wait" not in function.__name__
        self.operations += not collective
        return function(*args, **(kwargs or {}))


def cost(rank: int, world: int) -> dict[str, dict[str, list[int]]]:
    """Operations and collectives of a plain step, of a sampled one, and of a sampled one in which ranks tell each other something."""
    from torch.distributed.fsdp import fully_shard

    told: dict[str, dict[str, list[int]]] = {}
    for engine in ("ddp", "fsdp2"):
        for guarded in ("bare", "alone", "agreed"):
            torch.manual_seed(0)
            model = nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 3))
            wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
            optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
            guard = None if guarded == "bare" else Guard(model, optimizer, every=4, dense=0, agree=guarded == "agreed")
            steps: dict[str, list[int]] = {}
            for step in range(43):
                x, y = torch.randn(8, 64), torch.randint(3, (8,))
                with Calls() as calls:
                    loss = nn.functional.cross_entropy(wrapped(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if guard is not None:
                        guard.step(loss)
                if step in (37, 36, 40):  # plain, sampled, sampled and told: the tenth round of votes
                    steps[{37: "plain", 36: "sampled", 40: "told"}[step]] = [calls.operations, calls.collectives]
            if guard is not None:
                guard.close()
            told[f"{engine} {guarded}"] = steps
    return told


# ---- processes


def worker(options: argparse.Namespace) -> None:
    rank, world = options.rank, options.ranks
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(str(options.store), world), rank=rank, world_size=world, timeout=timedelta(seconds=BOUND))
    torch.set_num_threads(1)
    found = []
    for seed in range(options.first, options.first + options.runs):
        mine = train(seed, rank, world)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine)
        found.append(everyone)
    costs = cost(rank, world) if options.cost else {}
    if rank == 0:
        print(json.dumps([found, costs]), flush=True)
    dist.barrier()
    os._exit(0)  # the groups of hundreds of guards are not taken down one by one


def start(options: argparse.Namespace, first: int, runs: int, *, costs: bool) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--runs", str(runs), "--first", str(first), "--ranks", str(options.ranks), "--store", str(Path(folder) / "store")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += ["--cost"] if costs else []
        logs = [(Path(folder) / f"log{rank}").open("w+") for rank in range(options.ranks)]
        several = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=log, env=environment, text=True) for rank, log in enumerate(logs)
        ]
        try:
            told = [process.communicate(timeout=BOUND * 2 + 15 * runs)[0] for process in several]
        finally:
            for process in several:
                process.kill()
        for process, log in zip(several, logs, strict=True):
            log.seek(0)
            assert process.returncode == 0, log.read()[-3000:]
            log.close()
    found, cost_of = json.loads(told[0].strip().splitlines()[-1])
    return found, cost_of


def main() -> int:
    parser = argparse.ArgumentParser(description="do ranks stop together, and what does it cost?")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="the first run's seed")
    parser.add_argument("--cost", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        worker(options)
        return 0
    began = time.perf_counter()
    found: list[list[dict[str, Any]]] = []
    costs: dict[str, Any] = {}
    for first in range(options.first, options.first + options.runs, SPAWN):
        runs = min(SPAWN, options.first + options.runs - first)
        some, costs = start(options, first, runs, costs=first + runs == options.first + options.runs)
        found += some
    return tell(found, costs, options, time.perf_counter() - began)


def tell(found: list[list[dict[str, Any]]], costs: dict[str, Any], options: argparse.Namespace, seconds: float) -> int:
    wrong = [k for k, everyone in enumerate(found) if not right(everyone)]
    halted = [everyone[0] for everyone in found if everyone[0]["step"] is not None and everyone[0]["kind"] != "weight"]
    late = [one["step"] - 1 - one["when"] for one in halted]
    samples = [steps / one["every"] for one, steps in zip(halted, late, strict=True)]
    kinds = Counter(everyone[0]["kind"] for everyone in found)
    longest = max(one["seconds"] for everyone in found for one in everyone)
    print(f"{len(found) - len(wrong)} of {len(found)} runs right on {options.ranks} ranks in {seconds:.0f} s, the longest took {longest:.1f} s")
    print(", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))
    if halted:
        print(f"{len(halted)} halts by numbers, {median(late):g} steps after the fault in the median, {max(late)} at most, {max(samples):.1f} samples at most")
    for k in wrong:
        print(f"run {k}: {json.dumps(found[k])}")
    print("operations and collectives of a step (torch's own fused ones inside FSDP2 and DDP included)")
    for name, steps in costs.items():
        print(f"  {name:13}" + "  ".join(f"{what} {operations:4} + {collectives:2}" for what, (operations, collectives) in steps.items()))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
