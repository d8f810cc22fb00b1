"""Scenarios of several ranks, all run by one start of the processes: ``python cluster_ranks.py NAMES RANK WORLD STORE FOLDER``.

Each scenario is a function (rank, world) that returns what test_cluster.py is to see.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lossguard import Guard, TrainingHalted

ROWS = 13  # of each rank's batch
SIGNALS = ("grad_norm", "weight_norm", "update_norm", "update_ratio", "dead_fraction", "clip_coefficient")


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some ranks hold nothing of some parameters; units that are dead, or dead on one rank only."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 13)
        self.relu = nn.ReLU()
        self.norm = nn.LayerNorm(13)
        self.second = nn.Linear(13, 20)
        self.act = nn.ReLU()
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.act(self.second(self.norm(self.relu(self.first(x))))))


def net(frozen=()):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.first.weight[:3] = 0.0
        model.first.bias[:2] = -50.0  # dead for every rank
        model.first.weight[2, 0], model.first.bias[2] = 10.0, -50.0  # fires where the first feature is large: on the last rank only
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def data(step, rank, world):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(ROWS, 6, generator=generator)
    x[:, 0] = 20.0 if rank == world - 1 else 0.0
    return x, torch.randint(3, (ROWS,), generator=generator)


def numbers(guard):
    """Signal -> site name -> newest number."""
    history, found = guard.history, {}
    for name in SIGNALS:
        values = history.last(name, 1)
        names = [u.name for u in history.units] if name == "dead_fraction" else [p.name.removeprefix("module.") for p in history.params]
        row = values[0].tolist() if values.size else []
        found[name] = {n: v for n, v in zip(names, row, strict=False) if not math.isnan(v)}
    return found


def train(model, wrapped, batches, *, steps=40, optimizer=None, clip=None, accumulate=1, every=4, dense=3, before=None, watched=None):
    """The guard's numbers after each sampled step: {step: numbers}."""
    optimizer = optimizer or torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    told = {}
    with Guard(watched or model, optimizer, every=every, dense=dense, agree=False) as guard:
        for step in range(steps):
            for _ in range(accumulate):
                x, y = batches(step)
                loss = F.cross_entropy(wrapped(x), y) / accumulate
                loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(wrapped.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if before is not None:
                before(step, guard)
            guard.step(loss * accumulate)
            if guard.history.samples and guard.history.steps(1)[0] == step:
                told[step] = numbers(guard)
        coverage = guard.coverage.not_observed
    return told, coverage


def compare(mine, alone):
    """The largest relative difference of any number, after checking that the same numbers are there."""
    worst = 0.0
    assert mine.keys() == alone.keys(), (sorted(mine), sorted(alone))
    for step, signals in alone.items():
        for name, sites in signals.items():
            assert mine[step][name].keys() == sites.keys(), (step, name, sorted(mine[step][name]), sorted(sites))
            for site, value in sites.items():
                off = abs(mine[step][name][site] - value) / max(abs(value), 1e-6)
                if off > 1e-4 and "DEBUG" in os.environ:
                    print(step, name, site, mine[step][name][site], value, file=sys.stderr)
                worst = max(worst, off)
    return worst


def joined(world):
    """The batches of all ranks in one."""

    def batches(step):
        parts = [data(step, rank, world) for rank in range(world)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    return batches


def fsdp(model, parts=("first", "second"), **words):
    from torch.distributed.fsdp import fully_shard

    for part in parts:
        fully_shard(model.get_submodule(part), **words)
    return fully_shard(model, **words)


def ddp(rank, world):
    """DDP against one process on the joined batch."""
    model = net()
    told, coverage = train(model, DistributedDataParallel(model), lambda step: data(step, rank, world), every=1, steps=61)
    alone, _ = train(whole := net(), whole, joined(world), every=1, steps=61)
    return [compare(told, alone), sorted(coverage), told[max(told)]["dead_fraction"]]


def ddp_watched(rank, world):
    """The same, where the guard is given the wrapper."""
    wrapped = DistributedDataParallel(net())
    told, coverage = train(wrapped, wrapped, lambda step: data(step, rank, world))
    alone, _ = train(whole := net(), whole, joined(world))
    for signals in told.values():
        signals["dead_fraction"] = {n.removeprefix("module."): v for n, v in signals["dead_fraction"].items()}
    return [compare(told, alone), sorted(coverage)]


def fsdp2(rank, world):
    """FSDP2 with uneven shards, clipped, against one process on the joined batch."""
    model = fsdp(net())
    told, coverage = train(model, model, lambda step: data(step, rank, world), clip=0.5, every=1, steps=61)
    alone, _ = train(whole := net(), whole, joined(world), clip=0.5, every=1, steps=61)
    return [compare(told, alone), sorted(coverage), sorted(told[max(told)]["grad_norm"]), told[max(told)]["dead_fraction"]]


def fsdp2_frozen(rank, world):
    """Frozen parameters, gradient accumulation, SGD with momentum."""
    model = fsdp(net(("first.weight", "norm.bias")))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    told, _ = train(model, model, lambda step: data(step, rank, world), optimizer=optimizer, accumulate=2)
    whole = net(("first.weight", "norm.bias"))
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    alone, _ = train(whole, whole, joined(world), optimizer=optimizer, accumulate=2)
    return [compare(told, alone), sorted(told[max(told)]["grad_norm"])]


def mixed(rank, world):
    """Part of the model sharded, the rest plain and averaged by hand."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.second)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)

    def average(step):
        return data(step, rank, world)

    def hook(p):
        if p.grad is not None and type(p.grad) is torch.Tensor:
            dist.all_reduce(p.grad)
            p.grad /= world

    for p in model.parameters():
        if type(p) is nn.Parameter:
            p.register_post_accumulate_grad_hook(hook)
    told, _ = train(model, model, average, optimizer=optimizer)
    alone, _ = train(whole := net(), whole, joined(world))
    return [compare(told, alone), sorted(told[max(told)]["grad_norm"])]


def tensor_parallel(rank, world):
    """DTensor parameters, some replicated and some cut over a mesh of two by two, on one batch for all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2, world // 2))
    model, whole = net(), net()
    optimizer = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in model.parameters()], lr=0.1)
    cut = {"first.weight": [Shard(0), Shard(1)], "second.weight": [Replicate(), Shard(0)], "head.weight": [Shard(1), Replicate()]}
    for name, p in list(model.named_parameters()):
        holder, _, leaf = name.rpartition(".")
        placed = distribute_tensor(p.detach(), mesh, cut.get(name, [Replicate(), Replicate()]))
        model.get_submodule(holder).register_parameter(leaf, nn.Parameter(placed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = torch.optim.SGD(whole.parameters(), lr=0.1)
    found = []
    with Guard(model, optimizer, agree=False, every=2, dense=0, phases="explicit") as guard, Guard(whole, expected, agree=False, every=2, dense=0) as single:
        for step in range(6):
            loss = F.cross_entropy(whole(data(step, 0, world)[0]), data(step, 0, world)[1])
            loss.backward()
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                p.grad = distribute_tensor(q.grad.detach().clone(), mesh, p.placements)
            guard.after_backward()
            optimizer.step()
            expected.step()
            optimizer.zero_grad()
            expected.zero_grad()
            guard.step(loss.detach())
            single.step(loss)
            if step % 2 == 0:
                found.append([{s: numbers(g)[s] for s in ("grad_norm", "weight_norm", "update_norm", "update_ratio")} for g in (guard, single)])
    return [max(compare({0: mine}, {0: theirs}) for mine, theirs in found), sorted(found[-1][0]["grad_norm"])]


def collectives(rank, world):
    """How many collectives the guard adds to sampled and to other steps, under DDP and under FSDP2."""
    from torch.distributed.tensor.debug import CommDebugMode

    told = {}
    for kind in ("ddp", "fsdp2"):
        counts = {}
        for guarded in (False, True):
            model = net()
            wrapped = DistributedDataParallel(model) if kind == "ddp" else fsdp(model)
            optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
            guard = Guard(model, optimizer, every=4, dense=0, agree=False) if guarded else None
            for step in range(12):
                x, y = data(step, rank, world)
                with CommDebugMode() as comms:
                    F.cross_entropy(wrapped(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if guard is not None:
                        guard.step(torch.zeros(()))
                counts.setdefault(guarded, []).append(sum(comms.get_comm_counts().values()))
            if guard is not None:
                guard.close()
        told[kind] = [b - a for a, b in zip(counts[False], counts[True], strict=True)][4:]
    return told


def alarm_on_one(rank, world):
    """A rank whose loss alone is not finite samples at the same steps as the others where numbers are joined: nobody hangs."""
    model = fsdp(net())

    def ill(step, guard):
        if rank == 1 and 9 <= step < 12:
            guard._schedule.alarm(step)

    told, _ = train(model, model, lambda step: data(step, rank, world), before=ill, steps=24)
    alone, _ = train(whole := net(), whole, joined(world), steps=24)
    common = {step: signals for step, signals in told.items() if step in alone}
    return [compare(common, alone), sorted(told)]


def fault_on_one(rank, world):
    """A fault of the guard's own on one rank costs the numbers of all of them, and hangs nobody."""
    model = fsdp(net())
    if rank == 1:
        from lossguard.device.forward import Forward

        def broken(self, row_of):
            raise RuntimeError("a fault of our own")

        Forward.finish, kept = broken, Forward.finish
    try:
        told, coverage = train(model, model, lambda step: data(step, rank, world), steps=9)
    finally:
        if rank == 1:
            Forward.finish = kept
    return [len(told), {step: len(signals["grad_norm"]) for step, signals in told.items()}, sorted(coverage)]


def fsdp1(rank, world):
    """What FSDP1 keeps in flat shards is named, and not measured wrong."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    told = []
    for original in (False, True):
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Guard(model, optimizer, every=1, agree=False) as guard:
            for step in range(2):
                x, y = data(step, rank, world)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
            unread = [why for why in guard.coverage.not_observed.values() if "FSDP1" in why]
            told.append([len(unread), guard.history.last("grad_norm").size, [f.diagnosis for f in guard.findings]])
    return told


def nan_shard(rank, world):
    """A NaN in the part of one rank is in the norm that all ranks see."""
    model = fsdp(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Guard(model, optimizer, every=1, agree=False, halt=None) as guard:
        F.cross_entropy(model(data(0, rank, world)[0]), data(0, rank, world)[1]).backward()
        local = model.second.weight.grad.to_local()
        if rank == 1:
            local[0, 0] = math.nan
        guard.after_backward()
        optimizer.step()
        guard.step(torch.zeros(()))
        norms = guard.history.last("grad_norm", 1)[0]
        names = [p.name for p in guard.history.params]
    return [names[k] for k, norm in enumerate(norms) if not math.isfinite(norm)], [f.diagnosis for f in guard.findings]


def other_layers(rank, world):
    """Ranks that run different layers keep their own units, and say so; norms are whole all the same."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    model.extra = nn.ReLU()
    with Guard(model, optimizer, every=1, agree=False) as guard:
        for step in range(3):
            x, y = data(step, rank, world)
            loss = F.cross_entropy(wrapped(model.extra(x) if rank == 0 else x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
        coverage = guard.coverage.not_observed
    return [sorted(coverage), guard.steps]


def uneven_join(rank, world):
    """Ranks with more data than others, held together by Join: no collective of the guard's own, and no hang."""
    from torch.distributed.algorithms.join import Join

    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer, every=2, dense=2, agree=False) as guard, Join([wrapped]):
        for step in range(6 + rank):
            x, y = data(step, rank, world)
            loss = F.cross_entropy(wrapped(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    return [guard.steps, sorted(guard.coverage.not_observed)]


def same_run(rank, world):
    """FSDP2 weights with and without the guard are the same bits."""
    ends = []
    for guarded in (False, True):
        model = fsdp(net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        guard = Guard(model, optimizer, every=2, dense=2, agree=False) if guarded else None
        for step in range(8):
            x, y = data(step, rank, world)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if guard is not None:
                guard.step(loss)
        if guard is not None:
            guard.close()
        ends.append([p.to_local().detach().clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def guarded(rank, world, *, steps=60, bypass=None, break_at=None, breaker=None, odd=None, wrap=True, every=2, seed=0, halt="halt"):
    """A data-parallel run with the guard's ranks agreeing: what was found, and where it ended. bypass: a step from which one rank calls
    the model without its wrapper; breaker: writes to the model at break_at; odd: the rank whose loss lies high."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if wrap else model
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(1000 + rank)  # dropout differs between ranks
    guard = Guard(model, optimizer, every=every, dense=10, halt=halt)
    try:
        with guard:
            for step in range(steps):
                x, y = data(step, rank, world)
                x[:, 0] = 0.0
                if odd == rank:
                    y = (y + 1 + (step % 2)) % 3 if step % 3 else y
                forward = model if bypass is not None and step >= bypass else wrapped
                loss = F.cross_entropy(forward(x), y if odd is None else x[:, 1:4].argmax(dim=1) if odd != rank else y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if breaker is not None and step == break_at:
                    breaker(model)
                guard.step(loss)
    except TrainingHalted as halted:
        return [guard.steps, [[f.diagnosis, f.severity.label, f.step, f.where] for f in [halted.finding]]]
    return [guard.steps, [[f.diagnosis, f.severity.label, f.step, f.where] for f in guard.findings if f.diagnosis in ("replica_divergence", "rank_outlier")]]


def replicas_healthy(rank, world):
    """Batch-norm buffers, dropout and data differ; weights do not."""
    return guarded(rank, world)


def replicas_bypassed(rank, world):
    """From step 25 on the wrapper is not called any more."""
    return guarded(rank, world, bypass=25)


def replicas_one_bit(rank, world):
    """One weight of one rank is written to."""

    def breaker(model):
        if rank == world - 1:
            with torch.no_grad():
                model[4].weight[1, 2] += 1.0

    return guarded(rank, world, break_at=25, breaker=breaker)


def replicas_never_wrapped(rank, world):
    """Equal at the start, never averaged."""
    return guarded(rank, world, wrap=False)


def replicas_apart(rank, world):
    """Ranks that train models of their own."""
    return guarded(rank, world, wrap=False, seed=rank)


def alone_for_a_while(rank, world, wrap, steps=40):
    """A run in which the last rank is killed at step 12."""
    model = net()
    wrapped = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard, began, ended = Guard(model, optimizer, every=2, dense=0), time.monotonic(), "end"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            with guard:
                for step in range(steps):
                    if rank == world - 1 and step == 12:
                        os.kill(os.getpid(), signal.SIGKILL)
                    x, y = data(step, rank, world)
                    loss = F.cross_entropy(wrapped(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    guard.step(loss)
        except RuntimeError as error:
            ended = type(error).__name__
    return [ended, guard.steps, time.monotonic() - began < 30, sum("no longer agree" in str(w.message) for w in heard)]


def killed(rank, world):
    """Ranks that train by themselves go on when one is killed."""
    return alone_for_a_while(rank, world, wrap=False)


def killed_ddp(rank, world):
    """Under DDP the training's own collective fails, and the guard holds nobody up."""
    return alone_for_a_while(rank, world, wrap=True)


def rank_with_other_data(rank, world):
    """One rank's labels are noise, those of the others can be learned."""
    return guarded(rank, world, odd=1, steps=260, every=4)


if __name__ == "__main__":
    names, rank, world, store = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=40))
    for name in names:
        print(json.dumps([name, globals()[name](rank, world)]), flush=True)
        if name != names[-1]:
            dist.barrier()
    os._exit(0)
