"""What a step costs, in counts: operations on the device and reads by the host. Times are the benchmark's business."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import breakdown
import jobs
import judging
import overhead
import plots
from contestants import NAMES, Guarded

import lossguard


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


# added operations of the costliest step of a cycle: what benchmarks/README.md has committed, and up to two for chance
SAMPLED = {"mlp": 32, "deep": 33, "conv": 96, "gpt": 87}


def test_a_plain_step_adds_one_operation(cost):
    """A step that is not sampled adds one operation at most, whatever the model."""
    assert sorted(cost.added_ops)[8] <= 1


def test_a_sampled_step_adds_few_operations(cost):
    """A sampled step adds no more operations than the figures committed with the benchmark, and for 200 layers no more than for 30."""
    assert 5 < max(cost.added_ops) <= SAMPLED[cost.job]


def test_functional_activations_of_many_layers_cost_no_more_than_those_of_a_few(monkeypatch):
    """The units behind F.relu are told from gradients of all layers of one width at once."""
    added = []
    for depth in (4, 40):
        monkeypatch.setitem(jobs.JOBS, "residual", (lambda depth=depth: jobs.Wide(depth, 16), lambda: jobs.labelled((64,), 16), jobs.adam, 1e-4))
        bare, job = overhead.Runner(jobs.build("residual", "cpu")), jobs.build("residual", "cpu")
        watched = overhead.Runner(job, Guarded(job, 10, dense=2))
        for _ in range(31):
            watched.step()
        bare.step()
        found = overhead.Cost("residual", "lossguard", "LGUDS")
        overhead.count_cycle(found, bare, watched, 10, "cpu")
        seen = sum(unit.kind == "gradient rows" for unit in watched.watch.guard.history.units)
        added.append((seen, max(found.added_ops)))
        watched.watch.close()
    assert [seen for seen, _ in added] == [4, 40] and added[1][1] <= added[0][1] + 2, added


def test_the_host_reads_nothing(cost):
    """No step of a cycle reads a value from the device."""
    assert cost.reads == 0


def test_the_benchmark_of_judging_runs(monkeypatch):
    """Made-up calm rows are taken in and judged, every rule is timed, and none finds anything."""
    monkeypatch.setattr(judging, "SAMPLES", 8)
    taken, judged, each, found = judging.measure(30)
    assert taken > 0 and judged > 0 and len(each) > 20 and found == []


def test_a_step_is_broken_down_by_part(monkeypatch):
    """Every part of the guard is timed on a sampled step, next to nothing on a plain one; afterwards nothing is timed any more."""
    monkeypatch.setattr(overhead, "WARM_UP", 55)
    before = vars(breakdown.Guard)["step"]
    found = breakdown.measure("mlp", "cpu", 5, 2)
    assert all(found["sampled"][part] > 0 for part in breakdown.PARTS) and found["bare"]["all"] > 0
    assert found["plain"]["judging"] == found["plain"]["outputs"] == 0 < found["plain"]["losses"]
    assert vars(breakdown.Guard)["step"] is before
    assert "| judging |" in breakdown.table({"mlp": found}, "sampled")


def test_the_charts_are_drawn(tmp_path):
    """Both are SVG, and the same figures give the same file."""
    pytest.importorskip("matplotlib")
    cost = overhead.Cost("mlp", "lossguard", "LGUDS", 4.5, [1.1, 1.2], [1.0, 1.0])
    plots.ledger([cost], tmp_path / "ledger.svg")
    plots.growth({"every": [(1, cost), (10, cost)]}, tmp_path / "growth.svg")
    plots.ledger([cost], tmp_path / "again.svg")
    texts = {name: (tmp_path / f"{name}.svg").read_text() for name in ("ledger", "growth", "again")}
    assert all("</svg>" in text for text in texts.values()) and texts["ledger"] == texts["again"]


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


def test_memory_stands_still_over_ten_thousand_steps():
    """Ten thousand steps hold no byte and no object more than three thousand did."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(16, 4), torch.randint(2, (16,))
    seen = []
    with lossguard.Guard(model, optimizer, halt=None) as guard:
        for step in range(10_001):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
            if step in (3000, 10_000):
                gc.collect()
                seen.append((guard.memory, len(gc.get_objects()), sys.getallocatedblocks()))
    (bytes_then, objects_then, blocks_then), (bytes_now, objects_now, blocks_now) = seen
    assert bytes_now == bytes_then
    assert objects_now - objects_then < 100  # a leak of one object a sample would be 700
    assert blocks_now - blocks_then < 2000  # one a step would be 7000


def test_a_large_model_pays_one_percent():
    """On a model of more than 100 million parameters the guard holds at most 1 % of its size on the device."""
    torch.manual_seed(0)
    model = jobs.Gpt(12, 768, 12, 16000, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(16000, (1, 16))
    with lossguard.Guard(model, optimizer) as guard:
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
        held = guard._recorder.nbytes + guard._pulses.nbytes
    size = sum(p.nbytes for p in model.parameters())
    assert size > 4e8 and 0 < held <= 0.01 * size
