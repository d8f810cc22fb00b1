"""What a step costs, in counts: operations on the device and reads by the host. Times are the benchmark's business."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import jobs
import overhead
from contestants import NAMES, Guarded


@pytest.fixture(scope="module", params=["mlp", "deep", "conv", "gpt"])
def cost(request):
    """One job of the benchmark, counted over a whole cycle of steps past the dense beginning."""
    torch.manual_seed(0)
    bare, job = overhead.Runner(jobs.build(request.param, "cpu")), jobs.build(request.param, "cpu")
    watched = overhead.Runner(job, Guarded(job, 10, dense=2))
    for k in range(31):  # three samples after the dense beginning, so that each step of the cycle to come is an ordinary one
        bare.step() if k < 2 else None
        watched.step()
    found = overhead.Cost(request.param, "lossguard", "LGUDS")
    overhead.count_cycle(found, bare, watched, 10, "cpu")
    watched.watch.close()
    return found


# added operations of the costliest step of a cycle: what benchmarks/README.md has committed, and two for chance
SAMPLED = {"mlp": 52, "deep": 53, "conv": 140, "gpt": 106}


def test_a_plain_step_adds_one_operation(cost):
    """A step that is not sampled adds one operation, whatever the model."""
    assert sorted(cost.added_ops)[:9] == [1] * 9


def test_a_sampled_step_adds_few_operations(cost):
    """A sampled step adds no more operations than the figures committed with the benchmark, and for 200 layers no more than for 30."""
    assert 5 < max(cost.added_ops) <= SAMPLED[cost.job]


def test_the_host_reads_nothing(cost):
    """No step of a cycle reads a value from the device."""
    assert cost.reads == 0


def test_every_contestant_trains_the_same():
    """What watches a job in the benchmark leaves its losses as they are, so that all of them time the same work."""
    losses = {}
    for name in ("lossguard", "item_loop", "all_by_hand", "total_norm", "lightning_grad_norm", "floor"):
        job = jobs.build("mlp", "cpu")
        watch = NAMES[name](job, 2)
        runner = overhead.Runner(job, watch)
        for _ in range(5):
            runner.step()
        watch.close()
        losses[name] = job.loss(*job.batches[0]).item()
    assert len(set(losses.values())) == 1
