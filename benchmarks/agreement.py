"""Do ranks stop together? Real gloo processes train one model by DDP, a fault befalls one of them, and all must halt at one step.

    python benchmarks/agreement.py                        # 200 runs on 4 ranks, some minutes
    python benchmarks/agreement.py --runs 20 --ranks 2

Each run has a fault of its own: a poisoned batch, or a loss that is not finite on one rank only, on a random rank at a
random step, with evaluations in between, with logging on rank 0 only, with more data on some ranks than on others (the
short ones leave before the fault). A run is right if every rank that still trains raises ``TrainingHalted`` at the same
step with the same diagnosis, and the accused rank is named; it hangs if it takes longer than a minute. The last lines
tell how many were right, how many steps a halt took, and what a vote costs beside the bare loop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lossguard import Guard, TrainingHalted

STEPS = 120


def train(seed: int, rank: int, world: int) -> dict[str, Any]:
    """One run on this rank: where it ended, and by what."""
    plan = random.Random(seed)  # the same on every rank
    accused, when, kind = plan.randrange(world), plan.randrange(2, STEPS - 30), plan.choice(("batch", "loss"))
    every, dense, short = plan.choice((1, 5, 10)), plan.choice((0, 10)), plan.choice((0, 0, 1))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    own = torch.Generator().manual_seed(1000 * seed + rank)
    ended: dict[str, Any] = {"step": None, "diagnosis": None, "where": None, "accused": accused, "when": when, "every": every}
    guard = Guard(model, optimizer, every=every, dense=dense)
    try:
        with guard:
            for step in range(STEPS):
                if short and step == when - 2:
                    return {**ended, "short": True}  # all leave by an early end of their data: nobody may hang
                x, y = torch.randn(4, 8, generator=own), torch.randint(3, (4,), generator=own)
                if rank == accused and step >= when and kind == "batch":
                    x[0, 0] = float("nan")
                guard.batch(x, y)
                loss = nn.functional.cross_entropy(trained(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                shown = loss.detach() * float("nan") if rank == accused and step >= when else loss
                time.sleep(own_pause(rank, step))
                guard.step(shown)
                if step % 17 == 0:  # an evaluation, which the guard does not see
                    with torch.no_grad():
                        model.eval()
                        model(x)
                        model.train()
                if rank == 0 and step % 10 == 0:
                    print(f"step {step}", file=sys.stderr)
    except TrainingHalted as halt:
        ended.update(step=guard.steps, diagnosis=halt.finding.diagnosis, where=halt.finding.where)
    return ended


def own_pause(rank: int, step: int) -> float:
    """Ranks are never quite in step."""
    return random.Random(rank * 7919 + step).random() * 1e-3


def worker(options: argparse.Namespace) -> None:
    rank, world = options.rank, options.ranks
    store = dist.FileStore(str(options.store), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    found = []
    for seed in range(options.runs):
        mine = train(seed, rank, world)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine)
        found.append(everyone)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def right(everyone: list[dict[str, Any]]) -> bool:
    """All halted at one step by one diagnosis, and the accused rank is named; or all left before the fault."""
    if everyone[0].get("short"):
        return all(one["step"] is None for one in everyone)
    same = len({(one["step"], one["diagnosis"], one["where"]) for one in everyone}) == 1
    return same and everyone[0]["step"] is not None and "on rank" in everyone[0]["where"]


def start(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--runs", str(options.runs), "--ranks", str(options.ranks), "--store", str(Path(folder) / "store")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        several = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
            for rank in range(options.ranks)
        ]
        try:
            told = [process.communicate(timeout=60 + 15 * options.runs)[0] for process in several]
        finally:
            for process in several:
                process.kill()
    assert all(process.returncode == 0 for process in several), [process.returncode for process in several]
    found: list[list[dict[str, Any]]] = json.loads(told[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="do ranks stop together?")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        worker(options)
        return 0
    began = time.perf_counter()
    found = start(options)
    wrong = [k for k, everyone in enumerate(found) if not right(everyone)]
    halted = [everyone[0] for everyone in found if everyone[0]["step"] is not None]
    late = [one["step"] - 1 - one["when"] for one in halted]
    samples = [one["late"] / one["every"] for one in ({**one, "late": steps} for one, steps in zip(halted, late)) if one["every"]]
    print(f"{len(found) - len(wrong)} of {len(found)} runs right on {options.ranks} ranks in {time.perf_counter() - began:.0f} s")
    print(f"{len(halted)} halts, {median(late):g} steps after the fault in the median, {max(late)} at most, {max(samples):.1f} samples at most")
    for k in wrong:
        print(f"run {k}: {found[k]}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
