"""A preflight keeps to its time and to its own process, and leaves loaders with workers as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lossguard import preflight


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(n=12, size=16):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=generator), torch.randint(3, (size,), generator=generator)) for _ in range(n)]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Torch loads parts of itself, which takes seconds, at the first optimizer's first step."""
    preflight(mlp(), batches(1), nn.CrossEntropyLoss())


class Clock:
    """Time that passes only where a test says so: what is late here does not depend on what else the machine does."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    time = Clock()
    monkeypatch.setattr("time.monotonic", time)
    return time


@pytest.mark.parametrize("pause", [0.02, 0.05, 0.2])
def test_a_slow_model_ends_within_its_time(clock, pause):
    """Whatever a pass takes, the budget is overrun by no more than half; what was not done is answered in words."""

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            clock.now += pause
            return self.body(x)

    model = Slow()
    result = preflight(model, batches(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), seconds=2.0)
    assert 1.0 < clock.now < 3.0 and list(result) == []
    assert any("the time was over" in r or "the time budget of 2 s was used up" in r for r in result.reasons.values())


def test_a_slow_loader_ends_within_its_time(clock):
    """A loader that takes its time for each batch is left early, with the batches that came."""

    class Late:
        def __iter__(self):
            for batch in batches():
                clock.now += 0.3
                yield batch

    result = preflight(mlp(), Late(), nn.CrossEntropyLoss(), seconds=2.0)
    assert 0.5 < clock.now < 3.0 and result.answers["initial_loss_off"] == "pass"


class Numbered(Dataset):
    """Samples drawn in the worker: what a worker's random state gives is seen in the batch."""

    def __len__(self):
        return 96

    def __getitem__(self, i):
        return torch.cat([torch.tensor([float(i)]), torch.rand(7)]), i % 3


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_what_they_would_have_given(persistent):
    """A loader with two workers gives the same batches after a preflight as without one, over two epochs, also where it is half read.

    In a process of its own: workers are forked, and a fork does not get on with the threads that other tests have begun.
    """
    code = f"import test_preflight_bounds as bounds; bounds.with_workers({persistent})"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def with_workers(persistent):
    taken, model = [], mlp()
    for fly in (False, True):
        torch.manual_seed(3)
        data = DataLoader(Numbered(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=persistent)
        under_way = iter(data)
        first = next(under_way)[0]
        if fly:
            preflight(model, data, nn.CrossEntropyLoss())
        rest = [x for x, _ in under_way]
        taken.append(torch.cat([first, *rest, *(x for x, _ in data)]))
    assert taken[0].shape == (192, 8) and torch.equal(*taken)


@pytest.fixture
def joined():
    """Two processes as far as torch knows; the other one does not exist, so that whatever waits for it fails."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_a_collective_operation_is_refused(joined):
    """A model that asks the other processes is not run: each check that would need it says so."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            out = self.body(x)
            dist.all_reduce(out.detach().mean())
            reached.append(1)
            return out

    reached = []
    model = Asks()
    before = [p.clone() for p in model.parameters()]
    result = preflight(model, batches(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert not reached and list(result) == []
    assert result.answers["initial_loss_off"] == "cannot tell" and "waits for other processes" in result.reasons["initial_loss_off"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model(batches()[0][0])
    assert reached  # and afterwards it is as free as before


def test_synchronised_batch_norm_uses_its_own_statistics(joined):
    """SyncBatchNorm asks no other process during a preflight, and is what it was afterwards."""
    model = nn.Sequential(nn.Linear(8, 16), nn.SyncBatchNorm(16, process_group=dist.group.WORLD), nn.ReLU(), nn.Linear(16, 3))
    result = preflight(model, batches(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert result.answers["cannot_overfit_batch"] == "pass" and list(result) == [], str(result)
    assert type(model[1]) is nn.SyncBatchNorm and model[1].process_group is dist.group.WORLD and int(model[1].num_batches_tracked) == 0


def test_a_plain_model_among_processes_is_judged(joined):
    """Where processes are joined a model that asks none gets all its answers."""
    model = mlp()
    result = preflight(model, batches(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert result.answers["cannot_overfit_batch"] == "pass" and list(result) == [], str(result)
