"""Ranks stop together: real gloo processes, two of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lossguard import Guard

HERE = Path(__file__).parent


def ranks(scenario, folder, world=2):
    """What each rank says at its end; a hang is a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "agreement_ranks.py"), scenario]
    several = [
        subprocess.Popen([*command, str(rank), str(world), str(folder / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        for rank in range(world)
    ]
    try:
        told = [process.communicate(timeout=120) for process in several]
    finally:
        for process in several:
            process.kill()
    assert all(process.returncode == 0 for process in several), [error[-2000:] for _, error in told]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in told]


def test_all_halt_for_the_fault_of_one(tmp_path):
    """A fault on one rank halts all of them at the same step, two samples later at most, and the accused rank is named."""
    first, second = ranks("one_sick", tmp_path)
    assert first == second
    step, diagnosis, where = first
    assert 13 <= step <= 12 + 2 * 5 + 1
    assert diagnosis == "nonfinite_loss"
    assert re.search(r"on rank 1 of 2 \(.+\)", where)


def test_a_rank_that_was_poisoned_does_not_accuse_itself(tmp_path):
    """Where gradients are averaged, the rank with finite batches and losses names another rank first, and all halt for the bad batch."""
    first, second = ranks("poisoned_by_another", tmp_path)
    assert first[:2] == second[:2] == ["nonfinite_input", 12]
    assert first[3] == "another rank"
    assert second[2:] == ["nonfinite_input", "bad input"]


def test_the_earlier_fault_is_told(tmp_path):
    """Of equally grave faults all ranks report the earliest."""
    first, second = ranks("both_sick", tmp_path)
    assert first == second
    assert "on rank 1 of 2" in first[2]


def test_a_rank_whose_data_ends_stops_nobody(tmp_path):
    """A rank that leaves early hangs neither itself nor the others."""
    first, second = ranks("short_data", tmp_path)
    assert first == [22, None, None]
    assert second == [60, None, None]


def test_who_is_left_decides_alone(tmp_path):
    """Once a rank has left, a fault still halts the rank that has it."""
    first, second = ranks("short_then_sick", tmp_path)
    assert first == [12, None, None]
    assert second[1] == "nonfinite_loss"
    assert "on rank" not in second[2]


def test_an_error_of_the_script_hangs_nobody(tmp_path):
    """A rank that ends by an error of its own ends with it, and the others go on."""
    first, second = ranks("own_error", tmp_path)
    assert first[0] == "failed"
    assert second == [60, None, None]


def test_agreement_can_be_declined(tmp_path):
    """With agree=False each rank decides alone."""
    first, second = ranks("alone", tmp_path)
    assert first == [60, None, None]
    assert second[1] == "nonfinite_loss"


def test_different_arguments_are_refused(tmp_path):
    """Guards that would vote at different steps say so at the start."""
    for told in ranks("other_arguments", tmp_path):
        assert re.search(r"guards with different arguments; give every rank the same", told[0])


def test_a_rank_without_a_guard_is_named(tmp_path):
    """A guard on some ranks only fails at the start, and says which have none."""
    first, second = ranks("no_guard", tmp_path)
    assert re.search(r"rank\(s\) 1 have no Guard; make one on every rank, or say Guard\(agree=False\)", first[0])
    assert second == ["no guard here"]


def test_agreement_needs_ranks():
    """agree=True without a process group is refused."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"agree=True needs an initialised torch\.distributed process group.*before Guard"):
        Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), agree=True)


def test_the_stress_runs(tmp_path):
    """Some of the runs of benchmarks/agreement.py: faults at random places halt all ranks together, and nobody hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE.parent / "benchmarks" / "agreement.py"), "--runs", "6", "--ranks", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 of 6 runs right" in done.stdout
