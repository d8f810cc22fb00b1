"""Several ranks, real gloo processes: numbers are those of one process on the joined batch, and ranks tell of each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lossguard import Guard, Severity
from lossguard.host.history import History
from lossguard.host.peers import Exchange, Peers
from lossguard.rules.ranks import RankOutlier, ReplicaDivergence
from lossguard.rules.stall import Stall, StalledTraining

HERE = Path(__file__).parent
WORLD = 4
CLOSE = 1e-4  # relative
EVERYONE = ["first.bias", "first.weight", "head.bias", "head.weight", "norm.bias", "norm.weight", "second.bias", "second.weight"]
SCENARIOS = (
    "ddp", "ddp_watched", "fsdp2", "fsdp2_frozen", "mixed", "tensor_parallel", "collectives", "alarm_on_one", "fault_on_one", "fsdp1", "nan_shard",
    "other_layers", "uneven_join", "same_run", "replicas_healthy", "replicas_bypassed", "replicas_one_bit", "replicas_never_wrapped", "replicas_apart",
    "rank_with_other_data",
)  # fmt: skip


def start(folder, names, world):
    """The processes' ends: (code, {scenario: answer}, end of the errors) of each rank; a hang is a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "cluster_ranks.py"), ",".join(names)]
    several = [
        subprocess.Popen([*command, str(rank), str(world), str(folder / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        for rank in range(world)
    ]
    try:
        told = [process.communicate(timeout=400) for process in several]
    finally:
        for process in several:
            process.kill()
    answers = [dict(json.loads(line) for line in out.splitlines() if line.startswith("[")) for out, _ in told]
    return [(process.returncode, answer, error[-2000:]) for process, answer, (_, error) in zip(several, answers, told, strict=True)]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Scenario -> what each rank says."""
    ends = start(tmp_path_factory.mktemp("ranks"), SCENARIOS, WORLD)
    assert [code for code, _, _ in ends] == [0] * WORLD, [(list(answer), error) for _, answer, error in ends]
    return {name: [answer[name] for _, answer, _ in ends] for name in SCENARIOS}


# ---- right numbers


@pytest.mark.parametrize("name", ["ddp", "ddp_watched", "fsdp2", "fsdp2_frozen", "mixed", "tensor_parallel"])
def test_numbers_are_those_of_one_process(told, name):
    """Norms, ratios, clipping and dead units equal one process on the joined batch, on every rank: uneven and empty shards, replicas, frozen parameters."""
    for answer in told[name]:
        assert answer[0] < CLOSE


def test_dead_units_are_those_of_all_ranks(told):
    """A unit that fires on one rank only is alive, under DDP and under FSDP2, although it is dead on all the others."""
    for name in ("ddp", "fsdp2"):
        for answer in told[name]:
            assert answer[-1]["relu"] == pytest.approx(2 / 13)


def test_every_sharded_parameter_is_measured(told):
    """Nothing that is sharded is left out, not even on a rank that holds none of it."""
    for name in ("fsdp2", "mixed", "tensor_parallel"):
        for answer in told[name]:
            assert EVERYONE in answer
    for answer in told["fsdp2_frozen"]:
        assert answer[1] == [name for name in EVERYONE if name not in ("first.weight", "norm.bias")]


def test_one_collective_a_sampled_step(told):
    """The guard adds one collective to a sampled step, and none to the others."""
    for answer in told["collectives"]:
        assert answer == {"ddp": [1, 0, 0, 0, 1, 0, 0, 0], "fsdp2": [1, 0, 0, 0, 1, 0, 0, 0]}


def test_an_alarm_on_one_rank_changes_no_collective(told):
    """A rank that samples more closely than the others joins numbers at their steps only."""
    answers = told["alarm_on_one"]
    assert all(answer[0] < CLOSE for answer in answers)
    assert len(answers[1][1]) > len(answers[0][1]) == len(answers[2][1])


def test_a_fault_on_one_rank_costs_numbers_and_hangs_nobody(told):
    """Where one rank cannot measure its part, no rank reports norms, and each says so."""
    for rank, (samples, norms, unseen) in enumerate(told["fault_on_one"]):
        assert not any(norms.values())
        assert "numbers of all ranks" in unseen or rank == 1
        assert samples or rank == 1


def test_flat_shards_are_named(told):
    """FSDP1's parameters are listed as not observed, and nothing is found in what they seem to be."""
    for answer in told["fsdp1"]:
        for unread, size, findings in answer:
            assert (unread > 0, size, findings) == (True, 0, [])


def test_a_nan_in_one_shard_is_seen_by_all(told):
    """A NaN in one rank's shard is in the parameter's norm on every rank."""
    for names, findings in told["nan_shard"]:
        assert (names, findings) == (["second.weight"], ["nonfinite_gradient"])


def test_what_is_this_ranks_own_is_said(told):
    """Ranks that run different layers, or run out of data under Join, keep their own dead units; coverage says so."""
    for answer in (*told["other_layers"], *told["uneven_join"]):
        assert any("dead units of all ranks" in part for part in answer if isinstance(part, list))


def test_weights_are_the_same_bits(told):
    """A guard changes no bit of a sharded run."""
    assert told["same_run"] == [True] * WORLD


def test_deepspeed_is_named():
    """Parameters that DeepSpeed partitions are listed with what to do, and not taken for parameters without a gradient."""
    model = nn.Linear(4, 2)
    model.weight.ds_id = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer, every=1) as guard:
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        guard.step(1.0)
    assert "safe_get_full_grad" in guard.coverage.not_observed["weight"]
    assert "bias" not in guard.coverage.not_observed


# ---- ranks tell of each other


def test_healthy_replicas_are_silent(told):
    """Batch-norm buffers, dropout and data that differ are no divergence; nor are ranks that train models of their own."""
    assert told["replicas_healthy"] == [[60, []]] * WORLD
    assert told["replicas_apart"] == [[60, []]] * WORLD


@pytest.mark.parametrize(("name", "where"), [("replicas_bypassed", "0.weight"), ("replicas_one_bit", "4.weight on rank 3")])
def test_replicas_that_differ_halt_together(told, name, where):
    """A bypassed wrapper, or one weight written on one rank, halts all ranks at one step and names the first parameter, and the rank if it is one."""
    answers = told[name]
    assert all(answer == answers[0] for answer in answers)
    steps, [[diagnosis, severity, step, place]] = answers[0]
    assert (diagnosis, severity) == ("replica_divergence", "halt")
    assert 25 <= step <= 46 and step < steps <= step + 25
    assert place.startswith(where) and ("rank" in place) == ("rank" in where)


def test_a_model_that_was_never_wrapped_is_a_warning(told):
    """Ranks that began equal and were never averaged are told of, and go on."""
    for steps, [[diagnosis, severity, _, place]] in told["replicas_never_wrapped"]:
        assert (steps, diagnosis, severity, place) == (60, "replica_divergence", "warning", "0.weight")


def test_a_rank_with_other_data_is_named(told):
    """A rank whose loss stays far above that of the others is named on every rank, with its host and device."""
    for steps, found in told["rank_with_other_data"]:
        assert steps == 260
        assert [(d, s) for d, s, _, _ in found] == [("rank_outlier", "warning")]
        assert found[0][3].startswith("rank 1 (") and found[0][3].endswith(", cpu)")


def exchanged(prints, losses=None, steps=None):
    """A history of exchanges: prints (times, ranks, parameters), losses (times, ranks)."""
    history = History()
    ranks = len(prints[0]) if losses is None else len(losses[0])
    peers = history.notes["peers"] = Peers([f"host{k}, cpu" for k in range(ranks)], ["a", "b", "c"])
    for k in range(len(prints) if losses is None else len(losses)):
        table = np.array(prints[k], dtype=float) if losses is None else np.zeros((ranks, 0))
        loss = np.full(ranks, np.nan) if losses is None else np.array(losses[k], dtype=float)
        peers.add(Exchange(10 * k, loss, np.full(ranks, np.nan), 10 * k, table, np.ones(table.shape[1])))
    return history


@pytest.mark.parametrize("sick", [1.1, float("nan"), float("inf")])
def test_the_parameter_and_the_rank_that_differ_are_named(sick):
    """The first parameter of those that differ, and the one rank that stands apart from a majority; NaN and Inf differ too."""
    equal, moved = [[1.0, 2.0, 3.0]] * 3, [[1.5, 2.5, 3.5]] * 3
    ill = [[1.6, 2.6, 3.6], [1.6, sick, 3.9], [1.6, 2.6, 3.6]]
    finding = ReplicaDivergence().check(exchanged([equal, moved, ill]))
    assert finding.severity == Severity.HALT
    assert (finding.step, finding.where) == (20, "b on rank 1 (host1, cpu)")
    assert ReplicaDivergence().check(exchanged([equal, moved, moved])) is None


def test_a_weight_that_is_nan_everywhere_is_no_divergence():
    """What is not finite on all ranks has a diagnosis of its own."""
    sick = [[float("nan"), 2.5, 3.5]] * 3
    assert ReplicaDivergence().check(exchanged([[[1.0, 2.0, 3.0]] * 3, sick, sick])) is None


def test_ranks_of_one_data_set_are_no_outliers():
    """Seeded runs of 3 to 16 ranks whose losses scatter by 10 to 50 % and fall: no rank is named in 600 exchanges each."""
    for ranks in (3, 4, 8, 16):
        for scatter in (0.1, 0.5):
            noise = np.random.default_rng(ranks).lognormal(0, scatter, (600, ranks))
            losses = noise * np.exp(-np.arange(600) / 200)[:, None]
            heard = [RankOutlier().check(exchanged(None, losses[k : k + 4])) for k in range(596)]
            assert sum(f is not None for f in heard) <= 1, (ranks, scatter)


def test_a_high_and_a_low_rank_are_outliers():
    """A rank that lies far above or far below the others four times in a row is named, one that does so three times is not."""
    losses = np.random.default_rng(0).normal(1.0, 0.05, (4, 5))
    for factor in (3.0, 0.2):
        ill = losses.copy()
        ill[:, 3] *= factor
        assert RankOutlier().check(exchanged(None, ill)).where == "rank 3 (host3, cpu)"
        ill[1, 3] = 1.0
        assert RankOutlier().check(exchanged(None, ill)) is None


# ---- a rank that dies


@pytest.mark.parametrize(("name", "end"), [("killed", ["end", 40]), ("killed_ddp", ["RuntimeError", 12])])
def test_a_killed_rank_holds_nobody_up(tmp_path, name, end):
    """After kill -9 of a rank, ranks that train by themselves go on to their end and are told once; under DDP the training's own error ends them soon."""
    ends = start(tmp_path, [name], 3)
    assert ends[2][0] == -9
    for code, answer, error in ends[:2]:
        assert code == 0, error
        ended, steps, soon, warned = answer[name]
        assert [ended, steps] == end and soon
        assert warned == (name == "killed")


# ---- no step for a long time


def stall(tmp_path, sleep, **words):
    """Guarded steps of which the thirtieth sleeps; the guard, and what was left in its record."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, record=tmp_path, **words) as guard:
        for step in range(45):
            loss = model(torch.ones(8, 2)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 30:
                sleep(guard)
            guard.step(loss)
    return guard, sorted(p.name for p in tmp_path.glob("stalled-*"))


def watchdogs():
    return {thread for thread in threading.enumerate() if thread.name == "lossguard watchdog"}


def until(condition, most=20.0):
    end = time.monotonic() + most
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def test_a_stall_is_told_while_it_lasts(tmp_path, caplog):
    """Every thread's stack and the newest losses stand in the record and the log while the main thread hangs, and the finding follows."""
    path = tmp_path / "stalled-29.txt"

    def hang(guard):
        until(path.exists)

    guard, files = stall(tmp_path, hang, stall=0.5)
    until(lambda: "thread MainThread" in caplog.text)  # the file comes first, the log a moment later
    assert path.name in files  # a busy machine may have been slow once more
    text = path.read_text()
    assert "thread MainThread (main)" in text and "in until" in text and "step 29: loss" in text
    assert "no step for" in caplog.text and "thread MainThread" in caplog.text
    [finding] = [f for f in guard.findings if f.diagnosis == "stalled_training"]
    assert (finding.severity, finding.step) == (Severity.WARNING, 29)
    assert finding.evidence[0].value > finding.evidence[0].limit


@pytest.mark.parametrize("words", [{"stall": False}, {"stall": 0.5, "mute": ("stalled_training",)}, {}])
def test_nobody_watches_unless_asked(tmp_path, words):
    """One process has no watchdog by default; False and mute switch it off."""

    def rest(guard):
        time.sleep(0.8)
        assert not watchdogs() - before

    before = watchdogs()
    assert stall(tmp_path, rest, **words)[1] == []
    assert stall(tmp_path, lambda guard: until(lambda: watchdogs() - before), stall=60.0)[1] == []
    until(lambda: not watchdogs() - before)
    assert not watchdogs() - before


def test_a_pause_that_is_meant_is_no_stall(tmp_path):
    """What happens in ``guard.pause()`` takes as long as it takes."""

    def rest(guard):
        with guard.pause():
            time.sleep(1.2)

    assert stall(tmp_path, rest, stall=0.5)[1] == []


def test_the_limit_of_a_pause():
    """The limit is the largest of the least, 50 median steps and 3 times the longest pause; half an hour before there is a median."""
    rule = StalledTraining()
    assert rule.seconds(0, float("nan"), 0.0) == 1800.0
    assert [rule.seconds(64, 1.0, 0.0), rule.seconds(64, 10.0, 0.0), rule.seconds(64, 1.0, 400.0), rule.seconds(64, 1.0, 0.0, 60.0)] == [300, 500, 1200, 60]


@pytest.mark.parametrize(("file", "words"), [("/x/torch/utils/data/dataloader.py", "data loader"), ("/x/torch/distributed/c10d.py", "another rank"),
                                             ("/x/torch/serialization.py", "storage"), ("/x/train.py", "something else")])  # fmt: skip
def test_the_place_of_a_stall_names_its_cause(file, words):
    """Where the main thread stands tells the cause."""
    finding = StalledTraining().finding(Stall(7, 400.0, 300.0, 0.5, (("/x/train.py", "main", 3), (file, "wait", 11))))
    assert words in finding.causes[0].name and finding.where.endswith(":11 in wait")


def test_a_wrong_stall_is_refused():
    """A number of seconds, True or False; else the error says what was given."""
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"stall must be True, False or a number of seconds above 0, got -1; leave it out"):
        Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), stall=-1)
