"""Skipping on several ranks: all leave the same updates out, wherever the poison is. Two real gloo processes, one start for all laws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from skip_ranks import BAD, SCENARIOS, STEPS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank says at its end; a hang is a failure."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    several = [
        subprocess.Popen(
            [sys.executable, str(HERE / "skip_ranks.py"), str(rank), "2", str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=150) for process in several]
    finally:
        for process in several:
            process.kill()
    assert all(process.returncode == 0 for process in several), [error[-3000:] for _, error in told]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in told]


@pytest.mark.parametrize("title", SCENARIOS)
def test_all_ranks_leave_the_same_updates_out(ranks, title):
    """Poison on one rank, or in one rank's shard only, leaves the update out on all: weights and state are those of a run without those batches."""
    for told in (rank[title] for rank in ranks):
        ours, reference = told["with"], told["without"]
        assert ours["unseen"] == ""
        assert ours["own"] == reference["own"]
        for i in STEPS:
            assert (i in BAD) == (ours["digests"][i] == ours["digests"][i - 1]) or i == 0
        assert ours["skipped"] == len(BAD)


def test_data_parallel_ranks_stay_the_same(ranks):
    """Under DDP both ranks hold the same weights and moments after every step."""
    for title, (kind, *_) in SCENARIOS.items():
        if kind == "ddp":
            assert ranks[0][title]["with"]["digests"] == ranks[1][title]["with"]["digests"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_halt_leaves_the_last_good_weights_on_all_ranks(ranks, kind):
    """Skips without an end halt both ranks at one step, and each holds what the last good step left it."""
    ends = [rank[f"{kind} halts"] for rank in ranks]
    assert ends[0]["halted"] == ends[1]["halted"]
    assert ends[0]["halted"][1] == "skipped_steps" and ends[0]["halted"][0] <= 12 + 20 + 3 * 5
    for end in ends:
        assert end["own"] == end["digests"][11] != end["digests"][10]
