"""Skipping on two ranks, run as processes by test_skip_ranks.py: ``python skip_ranks.py RANK WORLD STORE``. Prints what each scenario ended in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from skip_runs import FUSED, OTHERS, QUICK, loss_of, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lossguard import Guard, TrainingHalted
from lossguard.device.means import held

STEPS = range(12)
BAD = (5, 8, 9)


def build(kind, by, name):
    model = network()
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    return trained, (FUSED if by == "found_inf" else OTHERS)[name](list(trained.parameters()))


def digest(optimizer):
    """This rank's weights and state, as a few letters."""
    found, _ = held(optimizer)
    whole = b"".join(bytes((t + 0.0).contiguous().reshape(-1).view(torch.uint8).tolist()) for t in found.values())
    return hashlib.sha256(whole).hexdigest()[:16]


def poison(model, rank, sick, how):
    """NaN in this rank's own part of the gradients, as they are complete; in the others' parts there is none."""
    p = next(iter(model.parameters()))

    def plant(p):
        if sick() and rank == 1:
            part = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            part.view(-1)[:1].fill_(math.nan)

    return p.register_post_accumulate_grad_hook(plant) if how == "shard" else None


def run(rank, kind, by, name, how, batches, bad, *, guarded=True, clip=None, halts=False):
    model, optimizer = build(kind, by, name)
    skip = {"exploding_gradient": QUICK} if how == "spike" else {"nonfinite_gradient"}
    now = [0]
    hook = poison(model, rank, lambda: now[0] in bad, how)
    guard = Guard(model, optimizer, skip=skip, skip_by=by, every=5, dense=0, halt={"skipped_steps"} if halts else None) if guarded else None
    digests, told = [], {}
    try:
        for i in batches:
            now[0] = i
            optimizer.zero_grad()
            factor = 1.0 if how == "shard" or i not in bad or rank == 0 else 1e5 if how == "spike" else math.nan
            loss = loss_of(model, 2 * i + rank, factor)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            digests.append(digest(optimizer))
            if guard:
                guard.step(1.0)
    except TrainingHalted as halt:
        told["halted"] = [guard.steps, halt.finding.diagnosis]
    finally:
        if hook is not None:
            hook.remove()
        if guard:
            guard.close()
            told["skipped"] = sum(guard.skipped.values())
            told["unseen"] = guard.coverage.not_observed.get("skip", "")
    return {"digests": digests, "own": digest(optimizer), **told}


SCENARIOS = {
    f"{kind} {by} {name} {how}": (kind, by, name, how)
    for kind, by, name, how in [
        ("ddp", "found_inf", "adamw", "loss"),
        ("ddp", "found_inf", "nesterov", "spike"),
        ("ddp", "restore", "adagrad", "loss"),
        ("fsdp2", "found_inf", "adamw", "loss"),
        ("fsdp2", "found_inf", "adamw", "shard"),
        ("fsdp2", "restore", "momentum", "shard"),  # torch has no fused SGD for sharded weights
        ("fsdp2", "found_inf", "adamw", "spike"),
        ("fsdp2", "restore", "rmsprop", "shard"),
        ("fsdp2", "restore", "lion", "spike"),
    ]
}


def main(rank):
    told = {}
    good = [i for i in STEPS if i not in BAD]
    for title, case in SCENARIOS.items():
        told[title] = {"with": run(rank, *case, STEPS, BAD, clip=0.5), "without": run(rank, *case, good, (), guarded=False, clip=0.5)}
    for kind in ("ddp", "fsdp2"):
        how = "shard" if kind == "fsdp2" else "loss"
        told[f"{kind} halts"] = run(rank, kind, "found_inf", "adamw", how, range(80), range(12, 80), halts=True)
    return told


if __name__ == "__main__":
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60))
    print(json.dumps(main(rank)), flush=True)
    os._exit(0)
