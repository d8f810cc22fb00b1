"""The recovery ladder: what is put back, when, how often at most, and that a run without trouble is the run it would be."""

from __future__ import annotations

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from models import convnet, criterion, make_batch, mlp
from no_read import no_read_device
from test_agreement import ranks
from torch import nn

from lossguard import Finding, Guard, Severity, TrainingHalted
from lossguard.recovery import Cure, Ladder
from lossguard.sinks import read

OPTIMIZERS = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "lr tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=False, foreach=False),
}


class Run:
    """A run with everything that a snapshot must hold: running statistics, dropout, moments, scaler, schedule."""

    def __init__(self, make=OPTIMIZERS["adamw fused"], ladder=None, *, guarded=True, scaled=True, **options):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        self.model = nn.Sequential(convnet(seed=1), nn.Dropout(0.2))
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.02, total_steps=2000)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=20) if scaled else None
        self.guard = None
        if guarded:
            ladder = ladder or Ladder(every=20, also=[self.scheduler, self.average])
            self.guard = Guard(self.model, self.optimizer, scaler=self.scaler, recover=ladder, **options)

    def step(self, i, ill=False, factor=None):
        """factor: on the learning rate of this step alone, by hand."""
        x, y = make_batch("convnet", seed=i)
        self.optimizer.zero_grad()
        loss = criterion(self.model(x), y)
        loss = loss * math.nan if ill else loss
        group = self.optimizer.param_groups[0]
        rate = group["lr"]
        if factor is not None:
            group["lr"] = rate * factor
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        group["lr"] = rate
        if ill:
            with torch.no_grad():
                self.model[0].head.weight[0, 0] = math.nan  # weights are gone, also where the scaler has skipped the update
        self.scheduler.step()
        self.average.update_parameters(self.model)
        if self.guard is not None:
            self.guard.step(loss)

    def state(self):
        """All of it, by value."""
        moments = {f"{i}.{k}": v for i, s in self.optimizer.state_dict()["state"].items() for k, v in s.items()}
        groups = {f"group {k}": v for k, v in self.optimizer.state_dict()["param_groups"][0].items()}
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        rest = {"schedule": self.scheduler.state_dict(), "torch": torch.get_rng_state(), "python": random.getstate(), "numpy": repr(np.random.get_state())}
        averages = {f"average {k}": v for k, v in self.average.state_dict().items()}
        return copy.deepcopy({**self.model.state_dict(), **moments, **groups, **scaler, **averages, **rest})


def differs(a, b):
    return sorted(k for k in {**a, **b} if k not in a or k not in b or not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k]))


# ---- what is put back


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rollback_is_exact(name, place, scaled):
    """After a rollback weights, buffers, moments, rates, scaler, schedule, averages and random states are those of the snapshot, bit
    for bit, in the same objects; gradients are zero; and the run goes on as one from that state with the rate cut."""
    run = Run(OPTIMIZERS[name], scaled=scaled)
    run.guard.recovery.ladder = Ladder(every=20, place=place, also=[run.scheduler, run.average])
    objects = [id(t) for s in run.optimizer.state.values() for t in s.values()]
    states = {}
    for i in range(70):
        random.random()
        run.step(i, ill=i == 64)
        states[i + 1] = run.state()
        objects = objects or [id(t) for s in run.optimizer.state.values() for t in s.values()]
        if i == 64:
            assert [(c.what, c.diagnosis[:9], c.factor) for c in run.guard.recovery.cures] == [("rollback", "nonfinite", 0.5)]
            to = run.guard.recovery.cures[0].to
            assert 20 <= to < 64
            assert differs(run.state(), states[to]) == []
            assert objects == [id(t) for s in run.optimizer.state.values() for t in s.values()]
            assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())
    twin = Run(OPTIMIZERS[name], guarded=False, scaled=scaled)
    for i in range(to):
        random.random()
        twin.step(i)
    assert differs(twin.state(), states[to]) == []
    for i in range(65, 70):
        random.random()
        twin.step(i, factor=0.5)
    assert differs(twin.state(), states[70]) == []
    run.guard.close()
    assert run.guard.findings[0].severity == Severity.WARNING
    assert f"the state is that after {to} steps" in run.guard.findings[0].note


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_trouble_nothing_changes(name):
    """A run with a ladder that is never climbed ends with the bits and random states of a bare one, and nothing stays attached."""
    ends = []
    for guarded in (False, True):
        run = Run(OPTIMIZERS[name], guarded=guarded)
        for i in range(50):
            run.step(i)
        ends.append(run.state())
    assert differs(*ends) == []
    assert run.guard.memory > 3 * sum(t.numel() * t.element_size() for t in run.model.state_dict().values())
    run.guard.close()
    assert run.guard.recovery.nbytes == 0
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_what_the_guard_knows_goes_back_too():
    """After a rollback the history ends with the snapshot, steps go on, and a healthy rest brings no further finding."""
    run = Run(OPTIMIZERS["momentum"], scaled=False)
    for i in range(61):
        run.step(i, ill=i == 60)
    to = run.guard.recovery.cures[0].to
    assert run.guard.steps == 61
    assert run.guard.history.loss_steps().tolist() == list(range(to - 1)) or run.guard.history.loss_steps().tolist() == list(range(to))
    assert np.isfinite(run.guard.history.losses()).all()
    for i in range(61, 120):
        run.step(i)
    run.guard.close()
    assert run.guard.history.loss_steps()[-59:].tolist() == list(range(61, 120))
    assert [f.step for f in run.guard.findings if f.severity >= Severity.WARNING] == [60]


def test_no_read_while_snapshots_are_taken():
    """On a device where every read raises, a run with a ladder goes through, and its snapshots lie on the host."""
    with no_read_device() as device:
        model = mlp(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        guard = Guard(model, optimizer, recover=Ladder(every=10, settle=5), lag=2, every=5, dense=0)
        batches = [make_batch("mlp", device, seed=i) for i in range(31)]
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
        assert [s.step for s in guard.recovery._good] == [21]  # that of 31 is not judged yet
        assert all(t.device.type == "cpu" for t in guard.recovery._good[0]._copies())
    guard.close()


# ---- when, and how often at most


def plain(ladder, factor_at=None, steps=200, lr=0.05, **options):
    """A small run whose loss is multiplied at some steps; returns the guard, the halt or None, and the learning rates that were applied."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    guard, rates = Guard(model, optimizer, recover=ladder, **options), []
    optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
    halt = None
    try:
        with guard:
            for i in range(steps):
                x, y = make_batch("mlp", seed=i)
                optimizer.zero_grad()
                loss = criterion(model(x), y) * (factor_at or {}).get(i, 1.0)
                loss.backward()
                optimizer.step()
                assert optimizer.param_groups[0]["lr"] == lr
                guard.step(loss)
    except TrainingHalted as raised:
        halt = raised
    guard.weights_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return guard, halt, rates


@pytest.mark.parametrize("rollbacks", [0, 1, 3])
def test_it_ends(rollbacks):
    """A run that is always ill halts after as many rollbacks as were allowed, and says so; nothing is endless."""
    ladder = Ladder(rollbacks=rollbacks, every=20)
    guard, halt, rates = plain(ladder, dict.fromkeys(range(60, 200), math.nan))
    assert [c.what for c in guard.recovery.cures] == ["rollback"] * rollbacks
    assert halt.finding.step == 60 + rollbacks
    assert "nothing is left to try" in str(halt)
    assert (f"{rollbacks} rollbacks" in str(halt)) == (rollbacks > 0)
    assert rates[-1] == pytest.approx(0.05 * 0.5**rollbacks)


def test_a_bad_batch_leaves_the_rate_alone(tmp_path):
    """A batch that is not finite is cured by going back alone; the record says what was done."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer, recover=Ladder(every=20), record=tmp_path) as guard:
        for i in range(80):
            x, y = make_batch("mlp", seed=i)
            x = x * (math.nan if i == 70 else 1.0)
            guard.batch(x, y)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert [(c.what, c.diagnosis, c.factor) for c in guard.recovery.cures] == [("rollback", "nonfinite_input", 1.0)]
    assert all(p.isfinite().all() for p in model.parameters())
    told = [line["what"] for line in read(tmp_path) if line["kind"] == "event"]
    assert len(told) == 1
    assert "nonfinite_input at step 70 cured by a rollback after 71 steps" in told[0]


def test_an_early_fault_goes_back_to_the_start():
    """Before any snapshot was judged there is the state before the first update."""
    guard, halt, _ = plain(Ladder(), {3: math.nan}, steps=20)
    assert halt is None
    assert [(c.step, c.to) for c in guard.recovery.cures] == [(4, 0)]
    assert guard.weights_finite


def test_a_rate_that_is_too_high_is_found():
    """A run that diverges at its rate is cured by cuts: it ends at a lower loss than it began with, where the same run without halts."""
    halting = {"diverging_loss", "loss_spike", "update_ratio_high", "exploding_gradient", "nonfinite_loss", "nonfinite_gradient", "nonfinite_weight"}
    _, bare, _ = plain(None, lr=20.0, halt=halting)
    assert bare is not None
    guard, halt, rates = plain(Ladder(factor=0.1, cooldown=20), lr=20.0, halt=halting, steps=300)
    assert halt is None
    assert guard.recovery.cures
    assert rates[-1] == pytest.approx(20.0 * guard.recovery.rates.factor)
    assert rates[-1] <= 2.0
    assert guard.history.losses(20).mean() < guard.history.first_losses(1)[0]


def finding(name, step):
    return Finding(name, Severity.ERROR, step, "loss", "planted")


def test_the_rungs_in_order():
    """Over finite numbers: a cut, silence in the cool-down, a rollback, then the halt; each is counted once."""
    run = Run(ladder=Ladder(cuts=1, rollbacks=1, cooldown=10, every=20), scaled=False)
    for i in range(65):
        run.step(i)
    recovery, state = run.guard.recovery, run.state()
    assert recovery.cure(finding("loss_spike", 64), 65) is None
    assert recovery.cures[-1] == Cure(65, "cut", "loss_spike", None, 0.5)
    assert differs(run.state(), state) == []
    assert recovery.cure(finding("loss_spike", 70), 71) is None  # in the cool-down
    assert len(recovery.cures) == 1
    assert recovery.cure(finding("diverging_loss", 76), 76) is None
    assert (recovery.cures[-1].what, recovery.cures[-1].factor) == ("rollback", 0.25)
    last = recovery.cure(finding("loss_spike", 90), 90)
    assert "1 cuts of the learning rate, 1 rollbacks" in last.note
    assert recovery.cure(finding("overfitting", 91), 91).note == ""  # no business of the ladder
    assert [(f.diagnosis, f.count) for f in recovery.past] == [("loss_spike", 1), ("loss_spike", 1), ("diverging_loss", 1)]


def test_a_snapshot_from_after_the_fault_is_not_good():
    """A finding that says that the trouble began before the snapshot gets no rollback to it."""
    run = Run(scaled=False)
    for i in range(65):
        run.step(i)
    good = run.guard.recovery._good[-1].step
    before = run.state()
    assert "no good snapshot is from before it" in run.guard.recovery.cure(finding("nonfinite_weight", good - 1), 65).note
    assert differs(run.state(), before) == []
    assert run.guard.recovery.cure(finding("nonfinite_weight", good), 65) is None


def test_an_ill_snapshot_never_counts_as_good():
    """Weights that turn NaN where no loss shows it are in no good snapshot: the good one stays."""
    run = Run(scaled=False, halt=None)
    for i in range(100):
        run.step(i)
        if i == 45:
            run.optimizer.state[run.model[0].head.weight]["extra"] = torch.tensor(math.inf)
    assert run.guard.recovery._good[-1].step <= 46


# ---- from disk, over a restart, several ranks


def test_the_state_on_disk(tmp_path):
    """Without snapshots the user's function loads the last good checkpoint; one that fails ends the run by its finding."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    given = []

    def load(checkpoint):
        given.append(checkpoint)
        if len(given) == 2:
            raise OSError("the disk is gone")
        model.load_state_dict(torch.load(checkpoint.path))

    with pytest.raises(TrainingHalted) as caught, Guard(model, optimizer, recover=Ladder(place=None, load=load)) as guard:
        for i in range(60):
            x, y = make_batch("mlp", seed=i)
            optimizer.zero_grad()
            loss = criterion(model(x), y) * (math.nan if i in (25, 50) else 1.0)
            loss.backward()
            optimizer.step()
            guard.step(loss)
            if i == 25:
                kept = torch.load(tmp_path / "20.pt")
                assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
            if i % 10 == 9:
                with guard.saving(tmp_path / f"{i + 1}.pt") as target:
                    torch.save(model.state_dict(), target)
    assert [(c.what, c.to) for c in guard.recovery.cures] == [("load", 20)]
    assert [c.after_steps for c in given] == [20, 50]
    assert caught.value.finding.step == 50
    assert "could not be loaded (OSError: the disk is gone)" in caught.value.finding.note


def test_the_bound_survives_a_restart():
    """Counters, the cut rate and what was found are part of the guard's state: a resumed run has no more tries than an unbroken one."""
    guard, _, _ = plain(Ladder(rollbacks=1, every=20), {60: math.nan}, steps=80)
    state = json.loads(json.dumps(guard.recovery.state_dict()))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer, recover=Ladder(rollbacks=1, every=20)) as fresh:
        fresh.recovery.load_state_dict(state)
        assert fresh.recovery.rates.factor == 0.5
        assert fresh.recovery.cures == guard.recovery.cures
        assert [f.to_dict() for f in fresh.findings] == [f.to_dict() for f in guard.recovery.past]
        loss = criterion(model(make_batch("mlp")[0]), make_batch("mlp")[1]) * math.nan
        loss.backward()
        optimizer.step()
        with pytest.raises(TrainingHalted, match="nothing is left to try"):
            guard_step_twice(fresh, loss)


def guard_step_twice(guard, loss):
    for _ in range(3):
        guard.step(loss)


def test_ranks_go_back_together(tmp_path):
    """A fault on one rank takes both back at the same step to the same snapshot; both train on and end with equal weights."""
    first, second = ranks("recovering", tmp_path)
    assert first[:3] == second[:3]
    cures, weights, steps = first[:3]
    assert [c[1] for c in cures] == ["rollback"]
    assert steps == 60
    assert math.isfinite(weights)


def test_ranks_need_to_agree(tmp_path):
    """A ladder on ranks that decide alone, or one that differs from rank to rank, is refused."""
    for told in ranks("recovering_alone", tmp_path):
        assert "recover= needs ranks that go back together" in told[0]
        assert "give every rank the same" in told[1]


# ---- wrong use


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"cures": {"nonfinit_loss"}}, "did you mean 'nonfinite_loss'"),
        ({"rollbacks": -1}, r"rollbacks=\) must be an integer of at least 0, got -1"),
        ({"every": 1.5}, r"every=\) must be an integer of at least 1, got 1.5"),
        ({"factor": 0.0}, r"factor=\) must be above 0 and at most 1, got 0.0"),
        ({"place": "disk"}, "must be 'host', 'device' or None, got 'disk'"),
        ({"place": None}, "give load= as well, or rollbacks=0"),
        ({"also": [object()]}, "object, which has no state_dict"),
    ],
)
def test_wrong_use(keywords, words):
    """What cannot work is refused in words."""
    with pytest.raises(ValueError, match=words):
        Ladder(**keywords)


def test_a_ladder_is_a_ladder():
    """recover=True is refused with an example."""
    model = mlp()
    with pytest.raises(ValueError, match=r"recover= must be a lossguard\.recovery\.Ladder, got True; for instance"):
        Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), recover=True)


def test_a_forgotten_scheduler_is_told(caplog):
    """A scheduler that is no part of the snapshots is one line in the log."""
    caplog.set_level("WARNING", "lossguard")
    run = Run(ladder=Ladder(every=20), scaled=False)
    for i in range(3):
        run.step(i)
    assert sum("give Ladder(also=[scheduler])" in line.message for line in caplog.records) == 1
