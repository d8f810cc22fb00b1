"""Scenarios of several ranks, run as processes of their own by test_agreement.py: ``python agreement_ranks.py SCENARIO RANK WORLD STORE``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lossguard import Guard, TrainingHalted
from lossguard.host import agreement
from lossguard.recovery import Ladder


def train(rank, world, *, steps=60, sick=None, stop=None, every=5, agree=None, fail=None):
    """Ranks that train by themselves, without a collective of their own. Returns where and by what the run ended."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model, optimizer, every=every, dense=0, agree=agree)
    try:
        with guard:
            for step in range(steps):
                if stop is not None and step == stop:
                    break
                if fail is not None and step == fail:
                    raise KeyError("a fault of the script's own")
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss * float("nan") if sick is not None and step >= sick else loss)
    except TrainingHalted as halt:
        return [guard.steps, halt.finding.diagnosis, halt.finding.where]
    except KeyError as error:
        return ["failed", str(error)]
    return [guard.steps, None, None]


def one_sick(rank, world):
    return train(rank, world, sick=12 if rank == 1 else None)


def poisoned_by_another(rank, world):
    """DDP averages the gradients: one rank's bad batch is in every rank's weights. What each rank says of it first."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heard = []
    try:
        with Guard(model, optimizer, every=5, dense=0, sinks=[heard.append]) as guard:
            for step in range(60):
                x = torch.randn(8, 4)
                if rank == 1 and step == 12:
                    x[3, 1] = float("nan")
                guard.batch(x)
                loss = model(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
    except TrainingHalted as halt:
        return [halt.finding.diagnosis, halt.finding.step, heard[0].diagnosis, heard[0].causes[0].name]
    return []


def both_sick(rank, world):
    """The earlier fault is the one all report."""
    return train(rank, world, sick=12 if rank == 1 else 13)


def short_data(rank, world):
    """One rank's data ends early; the others go on to their end."""
    return train(rank, world, stop=22 if rank == 0 else None)


def short_then_sick(rank, world):
    """After a rank has left, the others decide alone."""
    return train(rank, world, stop=12 if rank == 0 else None, sick=30 if rank == 1 else None)


def own_error(rank, world):
    return train(rank, world, fail=17 if rank == 0 else None)


def alone(rank, world):
    return train(rank, world, sick=12 if rank == 1 else None, agree=False)


def other_arguments(rank, world):
    try:
        return train(rank, world, every=5 + rank)
    except ValueError as error:
        return [str(error)]


def no_guard(rank, world):
    if rank:
        return ["no guard here"]
    agreement.GATHER = timedelta(seconds=2)
    agreement.Agreement.__init__.__defaults__ = (agreement.PATIENCE, agreement.GATHER)
    try:
        return train(rank, world)
    except ValueError as error:
        return [str(error)]


def _guarded():
    model = torch.nn.Linear(4, 2)
    return model, Guard(model, torch.optim.SGD(model.parameters(), lr=0.1))


def one_ill_save(rank, world):
    """Each rank writes its own file of a folder; then the weights of rank 1 turn ill."""
    model, guard = _guarded()
    folder = Path(sys.argv[4]).parent / "saves"
    folder.mkdir(exist_ok=True)
    answers = []
    for word in ("good", "bad"):
        if word == "bad" and rank == 1:
            torch.nn.init.constant_(model.weight, float("nan"))
        answers.append(guard.safe_to_save())
        with guard.saving(folder / "state") as target:
            target.mkdir(exist_ok=True)
            (target / str(rank)).write_text(f"{word}-{rank}")
    kept = sorted((folder / name / str(rank)).read_text() for name in ("state", "state-bad"))
    return [bool(answers[0]), str(answers[1]), bool(guard.safe_to_save(together=False)), kept]


def lonely_save(rank, world):
    _, guard = _guarded()
    if rank:
        return ["did not ask"]
    guard._unison._patience = timedelta(seconds=1)
    try:
        return [str(guard.safe_to_save())]
    except ValueError as error:
        return [str(error), bool(guard.safe_to_save(together=False))]


def recovering(rank, world, steps=60):
    """Data-parallel ranks, by hand; the gradient of rank 1 turns NaN behind the reduction, so that only its weights are gone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with Guard(model, optimizer, every=5, dense=0, recover=Ladder(every=10, settle=10)) as guard:
        for step in range(steps):
            loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
            if rank == 1 and step == 40:
                model.bias.grad[0] = float("nan")
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    cures = [[c.step, c.what, c.diagnosis, c.to, c.factor] for c in guard.recovery.cures]
    return [cures, float(sum(p.double().sum() for p in model.parameters())), guard.steps, [f.diagnosis for f in guard.findings]]


def recovering_alone(rank, world):
    told = []
    for options in ({"agree": False, "recover": Ladder()}, {"recover": Ladder(rollbacks=1 + rank)}):
        model = torch.nn.Linear(4, 2)
        try:
            Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
        except ValueError as error:
            told.append(str(error))
    return told


if __name__ == "__main__":
    scenario, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=30))
    print(json.dumps(globals()[scenario](rank, world)), flush=True)
    os._exit(0)  # a rank that waits for none of the others
