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
    _model, guard = _guarded()
    if rank:
        return ["did not ask"]
    guard._unison._patience = timedelta(seconds=1)
    try:
        return [str(guard.safe_to_save())]
    except ValueError as error:
        return [str(error), bool(guard.safe_to_save(together=False))]


if __name__ == "__main__":
    scenario, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=30))
    print(json.dumps(globals()[scenario](rank, world)), flush=True)
    os._exit(0)  # a rank that waits for none of the others
