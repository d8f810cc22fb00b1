"""Never overwritten: what is fit to be saved, what is diverted, and which checkpoint was the last good one."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import criterion, make_batch, mlp
from test_agreement import ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard import Guard, TrainingHalted
from lossguard.safekeeping import Checkpoints
from lossguard.sinks import read
from lossguard.soundness import born_finite, nonfinite

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
BAD = [math.nan, math.inf, -math.inf]


def step(model, optimizer, guard, i, factor=1.0):
    x, y = make_batch("mlp", seed=i)
    optimizer.zero_grad()
    loss = criterion(model(x), y) * factor
    loss.backward()
    optimizer.step()
    guard.step(loss)


def fixture(**options):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, Guard(model, optimizer, **options)


def plant(tensor, value):
    with torch.no_grad():
        tensor.view(-1)[tensor.numel() // 2] = value


# ---- what is finite


@pytest.mark.parametrize("value", BAD)
def test_every_part_of_a_state_is_looked_at(value):
    """One bad element in a weight, in a running statistic or in a moment is named, and nothing else."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    born = born_finite(model)
    assert nonfinite(model, [optimizer], born) == []
    places = {
        "1 of 6 weights are not finite (2.weight)": model[2].weight,
        "1 of 2 buffers are not finite (1.running_var)": model[1].running_var,
        "1 of 18 optimizer tensors are not finite (exp_avg_sq of 0.weight)": optimizer.state[model[0].weight]["exp_avg_sq"],
    }
    for words, tensor in places.items():
        kept = tensor.detach().clone()
        plant(tensor, value)
        assert [r.replace("of 3 buffers", "of 2 buffers") for r in nonfinite(model, [optimizer], born)] == [words]
        tensor.data.copy_(kept)
    assert nonfinite(model, [optimizer], born) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_every_dtype_is_looked_at(dtype):
    """The largest finite numbers of a dtype are finite, and a NaN among them is not."""
    model = nn.Linear(3, 3).to(dtype)
    top = torch.finfo(dtype).max
    with torch.no_grad():
        model.weight.fill_(top)
    assert nonfinite(model, []) == []
    plant(model.weight, math.nan)
    assert nonfinite(model, []) == ["1 of 2 weights are not finite (weight)"]


def test_odd_tensors_are_passed_over():
    """Empty, integer, lazy and unsaved tensors, and nested states, are no obstacle."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(0, 2))
    model.register_buffer("mask", torch.full((3, 3), -math.inf), persistent=False)
    model.register_buffer("count", torch.zeros(2, dtype=torch.long))
    model.register_buffer("nothing", None)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"history": [torch.ones(2), {"deep": (torch.tensor(math.nan),)}], "n": 3}
    assert nonfinite(model, [optimizer]) == ["1 of 2 optimizer tensors are not finite (history.1.deep.0 of parameter 0 of optimizer 0)"]


def test_a_buffer_that_was_born_infinite_may_stay_so():
    """A mask of -inf, frozen weight or buffer, and an observer's first range are no illness; a statistic that turns infinite is one."""
    model = nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    model.frozen_mask = nn.Parameter(torch.full((2, 2), -math.inf), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        assert guard.safe_to_save()
        plant(model.running_mean, math.inf)
        assert "running_mean" in str(guard.safe_to_save())
        assert "mask" not in str(guard.safe_to_save())


def test_a_sound_state_costs_one_read_a_group():
    """However many tensors: one flag is read for each dtype."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)], nn.Linear(4, 4).double())
    reads = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "local_scalar_dense" in str(func):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    with Counts():
        assert nonfinite(model, []) == []
    assert len(reads) == 2


# ---- fit to be saved


def test_asking_changes_nothing():
    """A run that asks in every step ends with the same bits as one that never asks, and its answers are yes."""
    ends = []
    for asks in (False, True):
        torch.manual_seed(3)
        model, optimizer, guard = fixture()
        with guard:
            for i in range(12):
                step(model, optimizer, guard, i)
                assert not asks or guard.safe_to_save()
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_weights_turn_ill_while_the_loss_stays_finite():
    """What no loss shows is seen at the save: a weight outside the loss's reach turns NaN."""
    model, optimizer, guard = fixture(halt=None)
    with guard:
        step(model, optimizer, guard, 0)
        plant(model[0].weight, math.inf)
        answer = guard.safe_to_save()
    assert not answer
    assert str(answer) == "not fit to be saved after 1 steps: 1 of 8 weights are not finite (0.weight)"


@pytest.mark.parametrize("lag", [0, 8])
def test_a_known_end_is_not_saved(lag):
    """A finding that ends the run, raised already or still on its way, forbids the save though every weight is finite."""
    model, optimizer, guard = fixture(lag=lag, halt={"nonfinite_loss"})
    with guard:
        step(model, optimizer, guard, 0)
        guard.saved("first.pt")
        if lag:
            guard.step(math.nan)
        else:
            with pytest.raises(TrainingHalted):
                guard.step(math.nan)
        assert nonfinite(model, [optimizer]) == []
        answer = guard.safe_to_save()
        assert answer.reasons == ("nonfinite_loss at step 1 ends the run",)
        guard.saved("second.pt")  # a save that nobody asked about
        assert guard.last_good == (1, "first.pt")


def test_a_loss_that_is_harmlessly_nan_forbids_nothing():
    """Where findings do not halt, only the state counts: it is sound, so it is saved."""
    model, optimizer, guard = fixture(halt=None)
    with guard:
        step(model, optimizer, guard, 0)
        guard.step(math.nan)
        assert guard.safe_to_save()


# ---- writing


def test_the_good_file_survives_an_ill_state(tmp_path):
    """Saved every step under one name: after the weights turn NaN the file is the newest good one and the ill one lies beside it."""
    model, optimizer, guard = fixture(halt=None, record=tmp_path / "record")
    with guard:
        for i in range(8):
            step(model, optimizer, guard, i, math.nan if i == 5 else 1.0)
            with guard.saving(tmp_path / "last.pt") as target:
                assert target != tmp_path / "last.pt"
                torch.save({"step": i, "model": model.state_dict()}, target)
        assert guard.last_good == (5, str(tmp_path / "last.pt"))
    kept, ill = torch.load(tmp_path / "last.pt"), torch.load(tmp_path / "last-bad.pt")
    assert (kept["step"], ill["step"]) == (4, 7)
    assert all(t.isfinite().all() for t in kept["model"].values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-bad.pt", "last.pt", "record"]
    told = [line["what"] for line in read(tmp_path / "record") if line["kind"] == "event"]
    assert sum("last-bad.pt" in line and "weights are not finite" in line for line in told) == 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """An exception in the block leaves the old file, no half-written one, and the exception."""
    _, _, guard = fixture()
    with guard:
        for text in ("old", "new"):
            try:
                with guard.saving(tmp_path / "last.pt") as target:
                    target.write_text(text)
                    if text == "new":
                        raise OSError("disk full")
            except OSError as error:
                assert str(error) == "disk full"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    """A checkpoint that is a folder takes the place of the old folder, and nothing of the old one stays in it."""
    _, _, guard = fixture()
    with guard:
        for names in (["a", "b"], ["c"]):
            with guard.saving(tmp_path / "checkpoint-1") as target:
                target.mkdir()
                for name in names:
                    (target / name).write_text(name)
        with guard.saving(tmp_path / "nothing"):
            pass
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["checkpoint-1", "checkpoint-1/c"]


KILLED = """
import os, resource, signal, sys
from pathlib import Path
import torch
from test_safekeeping import fixture, step
path, how = Path(sys.argv[1]), sys.argv[2]
model, optimizer, guard = fixture()
for i in range(2):
    step(model, optimizer, guard, i)
    if i and how == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        with guard.saving(path) as target:
            torch.save({"step": i, "model": model.state_dict()}, target)
            if i and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    except (OSError, RuntimeError) as error:
        print("failed")
"""


@pytest.mark.parametrize("how", ["kill", "full"])
def test_the_good_file_survives_a_kill_and_a_full_disk(tmp_path, how):
    """kill -9 in the middle of a save, and a disk that fills up in it, leave the old checkpoint whole."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "last.pt"), how]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0), done.stderr
    assert torch.load(tmp_path / "last.pt")["step"] == 0
    if how == "full":
        assert done.stdout == "failed\n"
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    else:  # what the killed process left is cleared by the next save
        _, _, guard = fixture()
        with guard, guard.saving(tmp_path / "last.pt") as target:
            torch.save({"step": 9}, target)
        assert torch.load(tmp_path / "last.pt")["step"] == 9
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


# ---- which was the last good one


def test_the_last_good_one_survives_rotation(tmp_path):
    """Of checkpoints of which the newest three are kept, the one told is there, and from before the finding."""
    known, kept = Checkpoints(), []
    for i in range(10):
        path = tmp_path / f"{i}.pt"
        path.write_text("")
        known.saved(i, path)
        kept = [*kept, path]
        while len(kept) > 3:
            kept.pop(0).unlink()
    assert known.last_good() == (9, str(tmp_path / "9.pt"))
    assert known.last_good(8) == (8, str(tmp_path / "8.pt"))
    assert known.last_good(5) == (5, str(tmp_path / "5.pt"))  # none is left: the newest that was there is told
    (tmp_path / "9.pt").unlink()
    assert known.last_good() == (8, str(tmp_path / "8.pt"))


def test_a_name_that_is_written_again_counts_as_of_then(tmp_path):
    """last.pt of step 9 is not the last.pt of step 3 any more."""
    known = Checkpoints()
    known.saved(3, "last.pt")
    known.saved(9, "last.pt")
    assert known.last_good(5) is None
    again = Checkpoints()
    again.load_state_dict(known.state_dict())
    assert again.last_good() == (9, "last.pt")


def test_a_resumed_run_knows_it():
    """The last good checkpoint is part of the guard's state; what ended the run before it was resumed forbids no save."""
    model, optimizer, guard = fixture(halt={"nonfinite_loss"})
    with guard:
        step(model, optimizer, guard, 0)
        guard.saved("first.pt")
        with pytest.raises(TrainingHalted):
            guard.step(math.nan)
        state = guard.state_dict()
        assert not guard.safe_to_save()
    _, optimizer, fresh = fixture()
    with fresh:
        fresh.load_state_dict(state)
        assert fresh.last_good == (1, "first.pt")
        assert fresh.safe_to_save()


# ---- ranks


def test_ranks_answer_alike(tmp_path):
    """Weights that are ill on one rank forbid the save on all; the file of the good state stays; every rank says who it is."""
    for rank, told in enumerate(ranks("one_ill_save", tmp_path)):
        good, ill, alone, name = told
        assert good is True
        assert ("weights are not finite" in ill) == (rank == 1)
        assert ("so says rank 1" in ill) == (rank == 0)
        assert alone is (rank == 0)
        assert name == (["bad-0", "good-0"] if rank == 0 else ["bad-1", "good-1"])


def test_a_rank_that_does_not_ask_is_named(tmp_path):
    """Asked on one rank only, the question ends in an error that says so, and can be put to that rank alone."""
    told = ranks("lonely_save", tmp_path)
    assert told[0][0].startswith("rank(s) 1 did not ask; ask on all ranks at the same place, or say together=False")
    assert told[0][1] is True


def test_together_needs_ranks():
    """together=True without a process group is refused."""
    _, _, guard = fixture()
    with guard, pytest.raises(ValueError, match=r"together=True needs an initialised torch\.distributed process group.*before Guard"):
        guard.safe_to_save(together=True)
