"""The guard changes nothing, holds little, and comes off without a trace."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from models import MODELS, criterion, make_batch
from torch import nn

from lossguard import Guard, TrainingHalted

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


def bits(value):
    """Tensors as bytes, so that -0.0 differs from 0.0 and NaN equals itself."""
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.detach().reshape(1).view(torch.uint8).numpy().tobytes()


def run(name, make, guarded, steps=50, clip=True, **options):
    """Everything that training leaves behind, as bytes."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    model = MODELS[name](dropout=0.1) if name == "mlp" else MODELS[name]()
    optimizer = make(model.parameters())
    guard = Guard(model, optimizer, halt=None, dense=20, every=5, **options) if guarded else None
    losses = []
    for i in range(steps):
        x, y = make_batch(name, seed=i)
        if guard:
            guard.batch(x, y)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(bits(loss))
        if guard:
            guard.step(loss)
    grads = {n: bits(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    state = {k: {n: bits(v) if isinstance(v, torch.Tensor) else v for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()}
    if guard:
        guard.close()
    tensors = {n: bits(v) for n, v in model.state_dict().items()}
    return losses, grads, state, tensors, bits(torch.get_rng_state()), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("name", list(MODELS))
def test_bit_identical(name, make):
    """Losses, gradients, weights, buffers, moments and random states are the same bits with and without the guard."""
    assert run(name, make, True) == run(name, make, False)


@pytest.mark.parametrize("name", list(MODELS))
def test_an_armed_gate_that_skips_nothing_changes_nothing(name):
    """Arming a skip on a healthy run leaves it bit-identical."""
    assert run(name, OPTIMIZERS["fused"], True, skip={"nonfinite_gradient"}) == run(name, OPTIMIZERS["fused"], False)


def attachments(model, *optimizers):
    """How many hooks exist on a model, its parameters, its optimizers, and globally."""
    modules = torch.nn.modules.module
    count = sum(len(getattr(m, d)) for m in model.modules() for d in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))
    count += sum(len(getattr(modules, d)) for d in dir(modules) if d.startswith("_global_") and d.endswith("hooks"))
    count += sum(len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters())
    count += sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)
    return count + sum(hasattr(o, "found_inf") for o in optimizers)


def fixture(fused=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)


def steps(model, optimizer, guard, n=3, first=0):
    for i in range(first, first + n):
        torch.manual_seed(i)
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)


@pytest.mark.parametrize("end", ["close", "with", "exception", "halt", "collected", "refused"])
@pytest.mark.parametrize("taken", [0, 1, 60])
def test_everything_comes_off(end, taken):
    """However a guard ends, and whenever, no hook and no flag stays."""
    model, optimizer = fixture()
    options = {"skip": {"nonfinite_gradient"}}
    if end == "close":
        guard = Guard(model, optimizer, **options)
        steps(model, optimizer, guard, taken)
        assert attachments(model, optimizer) > 0
        guard.close()
        guard.close()
    elif end == "with":
        with Guard(model, optimizer, **options) as guard:
            steps(model, optimizer, guard, taken)
    elif end == "exception":
        with pytest.raises(ZeroDivisionError), Guard(model, optimizer, **options) as guard:
            steps(model, optimizer, guard, taken)
            model(torch.randn(8, 4)).sum().backward()
            raise ZeroDivisionError
    elif end == "halt":
        with pytest.raises(TrainingHalted), Guard(model, optimizer, halt={"nonfinite_loss"}, **options) as guard:
            steps(model, optimizer, guard, taken)
            guard.step(math.nan)
    elif end == "collected":
        guard = Guard(model, optimizer, **options)
        steps(model, optimizer, guard, taken)
        gone = weakref.ref(guard)
        del guard
        gc.collect()
        assert gone() is None
    else:
        for wrong in ({"lag": -1}, {"exit_codes": {"loss_spike": 0}}, {"keep_batch": True}, {"rules": [3]}, {"halt": {"x"}}):
            with pytest.raises((ValueError, OSError)):
                Guard(model, optimizer, **options, **wrong)
        with pytest.raises(ValueError, match="fused"):
            Guard(model, [optimizer, torch.optim.AdamW(model.parameters())], **options)
    assert attachments(model, optimizer) == 0


def test_a_forgotten_guard_opens_its_gate():
    """When a guard is collected while its gate is shut, the optimizer trains on."""
    model, optimizer = fixture()
    guard = Guard(model, optimizer, skip={"nonfinite_gradient"}, halt=None)
    (model(torch.randn(8, 4)).sum() * math.nan).backward()
    del guard
    gc.collect()
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict", "averaged"])
@pytest.mark.parametrize("moment", ["between steps", "after backward"])
def test_copies_are_unwatched(how, moment):
    """Copies of a model while it is watched work, carry no hook, and training them tells the guard nothing."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        steps(model, optimizer, guard)
        if moment == "after backward":
            model(torch.randn(8, 4)).square().mean().backward()
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "averaged":
            twin = torch.optim.swa_utils.AveragedModel(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model.state_dict() if how == "state_dict" else model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=how == "state_dict")
            if how == "state_dict":
                fresh, _ = fixture()
                fresh.load_state_dict(twin)
                twin = fresh
        assert all(len(p._post_accumulate_grad_hooks or ()) == 0 for p in twin.parameters())
        optimizer.zero_grad()
        steps(model, optimizer, guard, 2, first=3)
        units, numbers = len(guard.history.units), guard.history.last("activation_rms", 1).copy()
        (twin(torch.full((8, 4), math.nan)).sum()).backward()
        optimizer.zero_grad()
        steps(model, optimizer, guard, 1, first=4)
        assert len(guard.history.units) == units
        np.testing.assert_allclose(guard.history.last("activation_rms", 1), numbers, rtol=0.05)
        assert np.isfinite(guard.history.last("grad_norm", 1)).all()
    copy.deepcopy(optimizer)
    pickle.dumps(optimizer.state_dict())


def test_optimizer_checkpoints_while_armed():
    """Saving and loading an optimizer's state while a gate is armed works and carries nothing of the guard."""
    model, optimizer = fixture()
    with Guard(model, optimizer, skip={"nonfinite_gradient"}) as guard:
        steps(model, optimizer, guard)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        steps(model, optimizer, guard, first=3)
        assert "found_inf" not in str(optimizer.state_dict().keys())
        assert not hasattr(copy.deepcopy(optimizer), "found_inf")


def test_a_cell_run_twice():
    """A second guard on a model closes the first, with a warning, and leaves one set of hooks."""
    model, optimizer = fixture()
    first = Guard(model, optimizer, skip={"nonfinite_gradient"})
    alone = attachments(model, optimizer)
    with pytest.warns(UserWarning, match="watched by another Guard"):
        second = Guard(model, optimizer, skip={"nonfinite_gradient"})
    assert first.closed
    assert attachments(model, optimizer) == alone
    steps(model, optimizer, second)
    with pytest.raises(ValueError, match="closed"):
        first.step(0.0)
    second.close()
    assert attachments(model, optimizer) == 0


def test_a_broken_sink_is_one_warning():
    """A sink that raises is told once and then left alone; the others hear on."""
    model, optimizer = fixture()
    heard = []

    def broken(finding):
        raise OSError("disk full")

    with pytest.warns(RuntimeWarning, match="disk full") as caught, Guard(model, optimizer, halt=None, sinks=[broken, heard.append]) as guard:
        for i in range(60):
            torch.manual_seed(i)
            loss = model(torch.randn(8, 4)).square().mean()
            guard.step(loss * math.nan if i in (10, 55) else loss)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert heard
    assert any("broken" in part for part in guard.coverage.not_observed)


def test_a_broken_rule_is_one_warning():
    """A rule that raises rests; the others go on."""

    class Broken:
        diagnosis, reads, grace, patience = "broken_rule", ("loss",), 0, 1

        def check(self, history):
            raise KeyError("oops")

    model, optimizer = fixture()
    with pytest.warns(RuntimeWarning, match="broken_rule") as caught, Guard(model, optimizer, rules=[Broken()]) as guard:
        steps(model, optimizer, guard, 12)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("part", ["module_called", "backward_done", "before_update", "after_update", "finish", "build"])
def test_our_own_faults_never_end_a_run(part, monkeypatch):
    """Whatever of the recorder raises, training goes on to the same weights, and the coverage lists the fault."""
    plain, optimizer = fixture()
    with Guard(plain, optimizer) as guard:
        steps(plain, optimizer, guard, 5)

    def fail(self, *args, **keywords):
        raise RuntimeError("our own fault")

    owner = "passes.Passes" if part == "module_called" else "recorder.Recorder"
    monkeypatch.setattr(f"lossguard.device.{owner}.{part}", fail)
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        steps(model, optimizer, guard, 5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert any("failed once" in why for why in guard.coverage.not_observed.values())


@pytest.mark.parametrize("name", list(MODELS))
def test_memory_is_bounded(name):
    """The guard's memory stands still after the first full window, and so does the number of live tensors."""
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    with Guard(model, optimizer, dense=50, every=2, halt=None) as guard:
        for i in range(300):
            x, y = make_batch(name, seed=i % 7)
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
            if i in (100, 299):
                gc.collect()
                seen.append((guard.memory, sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())))
    assert seen[0][0] == seen[1][0]
    assert abs(seen[0][1] - seen[1][1]) <= 2
    assert guard.memory < 40 * 2**20


@pytest.mark.parametrize("small", [0, 16384])
@pytest.mark.parametrize("ending", ["step", "no step", "no backward"])
def test_no_activation_outlives_its_step(small, ending, monkeypatch):
    """Once the step is over no output, no graph and no batch is held by the guard; large outputs not even within the step."""
    monkeypatch.setattr("lossguard.device.forward.SMALL", small)
    model, optimizer = fixture()
    held = []
    hook = model[0].register_forward_hook(lambda m, a, y: held.append((weakref.ref(a[0]), weakref.ref(y))))
    guard = Guard(model, optimizer, accumulate=None if ending == "step" else 4)
    for i in range(3):
        x, y = torch.randn(8, 4), torch.zeros(8, 3)
        held.append((weakref.ref(y), weakref.ref(x)))
        guard.batch(x, y)
        loss = (model(x) - y).square().mean()
        if ending != "no backward":
            loss.backward()
        if ending == "step":
            optimizer.step()
            optimizer.zero_grad()
        guard.step(loss)
        del x, y, loss
        gc.collect()
        assert [r() for pair in held for r in pair] == [None] * len(held) * 2, i
    hook.remove()
    guard.close()


def test_large_activations_are_freed_at_once(monkeypatch):
    """A large output is reduced in its hook: the guard keeps neither it nor its storage until the step's end."""
    monkeypatch.setattr("lossguard.device.forward.SMALL", 8)
    model, optimizer = fixture()
    storages = []
    model[0].register_forward_hook(lambda m, a, y: storages.append(weakref.ref(y)))
    with Guard(model, optimizer) as guard, torch.no_grad():
        guard.step(model(torch.randn(8, 4)).sum())
        output = model(torch.randn(8, 4))
        assert output.numel()
        gc.collect()
        assert storages[-1]() is None
