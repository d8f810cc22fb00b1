"""The same laws on a real GPU: run with `pytest -m gpu` on a machine that has one."""

import contextlib

import pytest
import torch
from models import MODELS, criterion, make_batch

from lossguard import Guard, TrainingHalted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
}


@contextlib.contextmanager
def syncs_raise():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(device, name, optimizer, *, steps=40, guarded=True, strict=False, **keywords):
    model = MODELS[name](device=device)
    opt = OPTIMIZERS[optimizer](model.parameters())
    batches = [make_batch(name, device, seed=s) for s in range(steps)]
    guard = Guard(model, opt, every=4, dense=10, **keywords) if guarded else None
    with syncs_raise() if strict else contextlib.nullcontext():
        for x, y in batches:
            if guard:
                guard.batch(x, y)
            loss = criterion(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            if guard:
                guard.step(loss)
    if guard:
        guard.close()
    return guard, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name, optimizer):
    """A guarded run goes through with every synchronisation forbidden, sampled steps included."""
    train("cuda", name, optimizer, guarded=True)  # first calls of libraries may wait by themselves
    guard, _ = train("cuda", name, optimizer, strict=True)
    assert guard.steps == 40


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_bit_identical(name, optimizer):
    """The guard changes nothing of a run on a GPU either."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = True
    _, guarded = train("cuda", name, optimizer)
    _, bare = train("cuda", name, optimizer, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(guarded, bare, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_signals_equal_those_of_the_cpu(name):
    """Every signal of the first samples is the same on CPU and GPU up to rounding."""
    there, _ = train("cuda", name, "sgd", steps=3)
    here, _ = train("cpu", name, "sgd", steps=3)
    assert set(there.coverage.observed) == set(here.coverage.observed)
    for signal in here.coverage.observed:
        if signal != "loss":
            a, b = torch.tensor(there.history.last(signal)), torch.tensor(here.history.last(signal))
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4, equal_nan=True)


def test_a_nan_is_found_at_its_step():
    """The halt comes at most lag and a hand-over late, and names the step of the fault."""
    model = MODELS["mlp"](device="cuda")
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(TrainingHalted) as halt, Guard(model, opt) as guard:
        for step in range(100):
            x, y = make_batch("mlp", "cuda", seed=step)
            loss = criterion(model(x), y) * (float("nan") if step == 63 else 1.0)
            loss.backward()
            opt.step()
            opt.zero_grad()
            guard.step(loss)
    assert halt.value.finding.step == 63
    assert guard.steps <= 63 + 10 + 8 + 1


def test_a_poisoned_update_is_left_out():
    """With skip= a NaN gradient leaves weights, moments and step counters as they were."""
    model = MODELS["mlp"](device="cuda")
    opt = OPTIMIZERS["fused"](model.parameters())
    x, y = make_batch("mlp", "cuda")
    with Guard(model, opt, skip={"nonfinite_gradient"}, halt=None) as guard:
        for step in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            moments = [opt.state[p]["exp_avg"].clone() for p in model.parameters() if p in opt.state]
            loss = criterion(model(x), y) * (float("nan") if step == 2 else 1.0)
            loss.backward()
            opt.step()
            opt.zero_grad()
            guard.step(loss)
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert same == (step == 2)
            if step == 2:
                assert all(torch.equal(m, opt.state[p]["exp_avg"]) for m, p in zip(moments, model.parameters(), strict=True))


def test_a_loss_scaler_keeps_true_gradient_norms():
    """Under fp16 autocast and a GradScaler the recorded norms are unscaled."""
    torch.manual_seed(0)
    model = MODELS["mlp"](device="cuda")
    opt = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x, y = make_batch("mlp", "cuda")
    with Guard(model, opt, scaler=scaler) as guard:
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        true = [p.grad.norm().item() / 1024.0 for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        guard.step(loss)
        guard.flush()
        torch.testing.assert_close(torch.tensor(guard.history.last("grad_norm")[-1]).float(), torch.tensor(true), rtol=1e-2, atol=1e-6)


def test_memory_on_the_device_is_bounded():
    """What the guard holds on the device does not grow from step to step."""
    model = MODELS["mlp"](device="cuda")
    opt = OPTIMIZERS["sgd"](model.parameters())
    held = []
    with Guard(model, opt, every=5) as guard:
        for step in range(300):
            x, y = make_batch("mlp", "cuda", seed=step % 4)
            loss = criterion(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            guard.step(loss)
            if step in (150, 299):
                del loss, x, y
                torch.cuda.synchronize()
                held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0] + 4096


def captured(guarded, *, warm=3, steps=120):
    """A run whose update is captured after some warm-up and replayed from then on; the guard and the weights at its end."""
    model = MODELS["mlp"](device="cuda")
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = Guard(model, opt, every=4, dense=10) if guarded else None
    x, y = make_batch("mlp", "cuda", seed=0)

    def update():
        opt.zero_grad(set_to_none=True)
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            loss = update()
            if guard:
                guard.step(loss)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = update()
    for step in range(steps):
        new_x, new_y = make_batch("mlp", "cuda", seed=step)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        if guard:
            guard.step(loss)
    if guard:
        guard.close()
    return guard, [p.detach().cpu() for p in model.parameters()]


def test_a_captured_step_is_as_without_a_guard():
    """The capture goes through with the guard's hooks in place, the replays train bit for bit as without it, and nothing is taken for a fault."""
    guard, weights = captured(True)
    _, plain = captured(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert guard.findings == [] and guard.history.losses().size == 123
    assert "a CUDA graph that is replayed" in guard.coverage.not_observed["gradients"]
