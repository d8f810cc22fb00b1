"""The first law: recording never reads the device. Whole guarded training steps on devices where a read raises."""

import contextlib

import pytest
import torch
from models import MODELS, criterion, make_batch
from no_read import HostRead, meta_device, no_read_device, reveal

from lossguard import Guard
from lossguard.device import signals
from lossguard.device.spikes import Limit

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
}


def train(device, name, make, *, guarded=True, clip=None, steps=6, lag=None, **keywords):
    """A run with labels shown, clipping and an explicit zero_grad; returns the guard and the weights."""
    model = MODELS[name](device=device)
    batches = [make_batch(name, device, seed=step) for step in range(steps)]
    optimizer = make(model.parameters())
    guard = Guard(model, optimizer, every=2, dense=3, lag=lag, **keywords) if guarded else None
    with no_read_device(uploads=False) if torch.device(device).type == "ghost" else contextlib.nullcontext(), guard or contextlib.nullcontext():
        for x, y in batches:
            if guard:
                guard.batch(x, y)
            loss = criterion(model(x), y)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if guard:
                guard.step(loss)
    return guard, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_guarded_run_reads_nothing_of_a_device_that_forbids_it(name, optimizer, clip):
    """Forward, backward, clipping, update and guard run where every host read raises, and leave the weights of a bare run."""
    with no_read_device() as device:
        guard, weights = train(device, name, OPTIMIZERS[optimizer], clip=clip)
        _, bare = train(device, name, OPTIMIZERS[optimizer], clip=clip, guarded=False)
    assert all(torch.equal(reveal(a), reveal(b)) for a, b in zip(weights, bare, strict=True))
    assert not [f for f in guard.findings if f.severity >= 2]


@pytest.mark.parametrize("name", MODELS)
def test_the_tape_of_a_forbidding_device_is_that_of_the_cpu(name):
    """Every signal recorded where reads raise equals the one recorded on the CPU."""
    with no_read_device() as device:
        there, _ = train(device, name, OPTIMIZERS["adamw"], clip=0.5)
    here, _ = train("cpu", name, OPTIMIZERS["adamw"], clip=0.5, lag=8)
    assert set(there.coverage.observed) == set(here.coverage.observed)
    for signal in here.coverage.observed:
        if signal != "loss":
            torch.testing.assert_close(torch.tensor(there.history.last(signal)), torch.tensor(here.history.last(signal)), rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(torch.tensor(there.history.losses()), torch.tensor(here.history.losses()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_guarded_run_works_on_meta(name, optimizer):
    """On meta, where no value exists, a guarded run goes through and reports that nothing arrived."""
    with meta_device() as device:
        guard, _ = train(device, name, OPTIMIZERS[optimizer], clip=0.5)
    assert guard.findings == [] and guard.steps == 6
    assert not guard.coverage.observed


@pytest.mark.parametrize("where", [no_read_device, meta_device])
def test_what_a_search_will_need_is_kept_without_a_read(where):
    """With locate= the batches and the weights from before the newest sound step are kept where every host read raises."""
    with where() as device:
        guard, weights = train(device, "mlp", OPTIMIZERS["adamw"], locate=lambda x, y: None)
        keepsake = guard._locator._keepsake
        assert not guard._faults.silenced
        if where is no_read_device:
            assert [reveal(at).item() for at in keepsake.at] == [6]
            assert all(torch.equal(reveal(a), reveal(b)) for a, b in zip(weights, keepsake._copies, strict=False))


@pytest.mark.parametrize("where", [no_read_device, meta_device])
def test_a_signal_that_reads_is_caught(where, monkeypatch):
    """A signal that calls item() fails these tests: they can fail."""

    def reading(rows):
        rows.sum().item()
        return torch.linalg.vector_norm(rows, dim=1)

    monkeypatch.setitem(signals.SIGNALS, "reading", signals.Signal("reading", "gradient", "L2 norm", reading))
    with pytest.raises(HostRead), where() as device:
        train(device, "mlp", OPTIMIZERS["sgd"])


def test_a_skip_is_decided_without_a_read():
    """With skip= armed every step's gradients are judged, and still nothing is read."""
    with no_read_device() as device:
        model = MODELS["mlp"](device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        with Guard(model, optimizer, every=2, dense=2, skip={"nonfinite_gradient"}, halt=None) as guard:
            for step in range(6):
                x, y = make_batch("mlp", device, seed=step)
                loss = criterion(model(x), y) * (float("nan") if step == 3 else 1.0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
    assert all(torch.isfinite(reveal(p.detach())).all() for p in model.parameters())


class Sign(torch.optim.Optimizer):
    """A custom optimizer: the sign of a momentum."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                moment.mul_(0.9).add_(p.grad)
                p.sub_(torch.sign(moment), alpha=group["lr"])


class Counting(Sign):
    """Keeps a counter on the host."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["age"] = state.get("age", torch.zeros((), device="cpu")) + 1


LIMIT = {"exploding_gradient": Limit(times=20.0, warmup=3), "nonfinite_gradient": None}
GATED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "restored custom": lambda p: Sign(p, {"lr": 1e-3}),
    "restored momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", GATED)
def test_every_gate_decides_without_a_read(name, clip):
    """NaN, spike, clipping, the first step, counters and copies: nothing of it reads the device, and the bad updates are left out."""
    with no_read_device() as device:
        model = MODELS["mlp"](device=device)
        optimizer = GATED[name](model.parameters())
        with Guard(model, optimizer, every=2, dense=2, skip=LIMIT, skip_by="restore", halt=None) as guard:
            for step in range(10):
                x, y = make_batch("mlp", device, seed=step)
                loss = criterion(model(x), y) * {0: float("nan"), 5: 1e4, 8: float("inf")}.get(step, 1.0)
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                before = [reveal(p.detach()).clone() for p in model.parameters()]
                optimizer.step()
                same = all(torch.equal(a, reveal(b.detach())) for a, b in zip(before, model.parameters(), strict=True))
                assert same == (step in (0, 5, 8))
                optimizer.zero_grad()
                guard.step(loss)
    assert guard.skipped == {"nonfinite_gradient": 2, "exploding_gradient": 1}
    assert "skip" not in guard.coverage.not_observed


@pytest.mark.parametrize("name", [name for name in GATED if "restored" in name])  # torch has no fused optimizer on meta
def test_gates_work_on_meta(name):
    """On meta, where no value exists, armed gates go through."""
    with meta_device() as device:
        model = MODELS["mlp"](device=device)
        optimizer = GATED[name](model.parameters())
        with Guard(model, optimizer, skip=LIMIT, skip_by="restore", halt=None) as guard:
            for step in range(3):
                x, y = make_batch("mlp", device, seed=step)
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
            assert "skip" not in guard.coverage.not_observed


HOST_COUNTERS = {
    "rmsprop": (lambda p: torch.optim.RMSprop(p), r"RMSprop keeps 'step' on the host.*build it with capturable=True"),
    "adafactor": (lambda p: torch.optim.Adafactor(p), r"Adafactor keeps 'step' on the host.*no setting of it changes that"),
    "custom": (lambda p: Counting(p, {"lr": 1e-3}), r"Counting keeps 'age' on the host"),
}


@pytest.mark.parametrize("name", HOST_COUNTERS)
def test_state_on_the_host_is_refused_on_a_device(name):
    """A step counter on the host, of parameters on a device, cannot be put back without a read: refused at once, without a read."""
    make, words = HOST_COUNTERS[name]
    with no_read_device() as device:
        model = MODELS["mlp"](device=device)
        with pytest.raises(ValueError, match=words):
            Guard(model, make(model.parameters()), skip={"nonfinite_gradient"}, skip_by="restore")
