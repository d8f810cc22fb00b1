"""Compiled training: the same statistics as eager, the same bits, one more compilation and no graph break."""

from __future__ import annotations

import copy
import gc
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lossguard import Guard

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
INDUCTOR = [pytest.param(way, "inductor", marks=[compiler, pytest.mark.slow]) for way in ("wrapper", "blocks in place", "step function")]
WAYS = ["wrapper", "in place", "blocks in place", "wrapped blocks", "step function"]
CLASSES = 5


@pytest.fixture(autouse=True)
def fresh():
    """Compiled code of other tests is no business of this one, nor are guards that they forgot."""
    gc.collect()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Begins with a module without parameters, so that only what follows tells the blocks apart."""

    def __init__(self):
        super().__init__()
        self.act, self.norm, self.up, self.relu, self.down = nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.relu(self.up(self.norm(self.act(x)))))


class Net(nn.Module):
    def __init__(self, saves, blocks, dropout):
        super().__init__()
        self.stem, self.drop = nn.Linear(4, 6), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, CLASSES)
        self.saves = saves

    def forward(self, x):
        x = self.drop(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.saves == "reentrant") if self.saves else block(x)
        return self.head(x)


def net(saves="", blocks=2, backend="eager"):
    torch.manual_seed(0)
    return Net(saves, blocks, 0.1 if backend != "inductor" else 0.0)  # inductor draws its own numbers


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(8, 4, generator=g), torch.randint(CLASSES, (8,), generator=g)


class Counted:
    """A back-end that counts what it is asked to compile."""

    def __init__(self, backend):
        self.backend, self.graphs = backend, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def compile_as(way, model, backend):
    """The model to call, and the function that gives the loss."""
    options = {"backend": backend, "fullgraph": True}
    if way == "wrapper":
        return torch.compile(model, **options), loss_of
    if way == "in place":
        model.compile(**options)
    elif way == "blocks in place":
        for block in model.blocks:
            block.compile(**options)
    elif way == "wrapped blocks":
        model.blocks = nn.ModuleList(torch.compile(block, **options) for block in model.blocks)
    elif way == "step function":
        return model, torch.compile(loss_of, **options)
    return model, loss_of


def train(model, *, way="eager", backend="eager", guarded=True, steps=14, **options):
    """(closed guard or None, losses, number of graphs)."""
    counted = backend if isinstance(backend, Counted) else Counted(backend)
    called, loss_fn = compile_as(way, model, counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = Guard(model, optimizer, **{"dense": 3, "every": 4, "halt": None, **options}) if guarded else None
    torch.manual_seed(1)
    losses = []
    for i in range(steps):
        loss = loss_fn(called, *batch(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if guard:
            guard.step(loss)
    if guard:
        guard.close()
        assert not guard._faults.silenced, guard._faults.silenced
    return guard, torch.stack(losses), counted.graphs


def by_name(guard, signal):
    """Module call -> all numbers of a signal."""
    history = guard._history
    values = history.last(signal, 100)
    return {u.name.replace("_orig_mod.", ""): values[:, i] for i, u in enumerate(history.units) if i < values.shape[1] and np.isfinite(values[:, i]).any()}


def same(a, b):
    return np.allclose(a[np.isfinite(a)], b[np.isfinite(a)], rtol=2e-5, atol=1e-7)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("way", "backend"), [*((way, "eager") for way in WAYS), ("wrapper", "aot_eager"), ("blocks in place", "aot_eager"), *INDUCTOR])
def test_statistics_are_those_of_eager(way, backend):
    """Every statistic of every module call equals that of eager training; at most one more variant of each graph is compiled, and none breaks."""
    blocks = 10 if "blocks" in way and backend == "eager" else 2  # more than the variants that torch compiles of one function
    bare = train(net(blocks=blocks, backend=backend), way=way, backend=backend, guarded=False)
    torch._dynamo.reset()
    counters.clear()
    expected, _, _ = train(net(blocks=blocks, backend=backend))
    guard, losses, graphs = train(net(blocks=blocks, backend=backend), way=way, backend=backend, compiled=True)
    assert torch.allclose(losses, bare[1], rtol=1e-5) if backend == "inductor" else torch.equal(losses, bare[1])
    assert graphs == 2 * bare[2]
    assert not counters["graph_break"]
    for signal in ("activation_rms", "dead_fraction", "sample_variance", "zero_fraction", "input_rms"):
        if signal in expected.coverage.observed:
            a, b = by_name(expected, signal), by_name(guard, signal)
            assert a.keys() <= b.keys(), (signal, a.keys() - b.keys())
            assert all(same(a[name], b[name]) for name in a), signal
    for signal in ("grad_norm", "update_norm", "weight_norm"):
        assert same(expected._history.last(signal, 100), guard._history.last(signal, 100))
    assert "activations" not in guard.coverage.not_observed
    if way != "step function":  # there the softmax is inside of the graph, behind functional calls
        assert same(expected._history.last("logit_peak", 100), guard._history.last("logit_peak", 100))
    assert guard.findings == expected.findings == []


@pytest.mark.parametrize(("way", "backend"), [("wrapper", "aot_eager"), ("blocks in place", "eager"), ("step function", "eager"), INDUCTOR[0]])
def test_unasked_the_guard_puts_nothing_inside(way, backend):
    """Without compiled=True no bit changes and nothing is compiled again; gradients and updates are measured, the rest is listed with its remedy."""
    _, losses, bare = train(net(backend=backend), way=way, backend=backend, guarded=False)
    torch._dynamo.reset()
    expected, _, _ = train(net(backend=backend))
    guard, guarded, graphs = train(net(backend=backend), way=way, backend=backend)
    assert torch.equal(losses, guarded)
    assert graphs == bare
    assert not counters["graph_break"]
    assert "Guard(compiled=True)" in guard.coverage.not_observed["activations"]
    for signal in ("grad_norm", "update_norm", "weight_norm"):
        assert same(expected._history.last(signal, 100), guard._history.last(signal, 100))
    assert guard.findings == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("saves", ["reentrant", "other"])
def test_checkpoints_are_counted_once(saves, backend):
    """In a compiled model with activation checkpoints no module call is counted twice, and what cannot be seen is listed."""
    expected, _, _ = train(net())
    model = net(saves)
    guard, _, _ = train(model, way="wrapper", backend=backend, compiled=True)
    assert not [u.name for u in guard._history.units if "[" in u.name]
    a, b = by_name(expected, "activation_rms"), by_name(guard, "activation_rms")
    assert all(same(a[name], b[name]) for name in b)
    assert set(a) == set(b) or "activations" in guard.coverage.not_observed


@pytest.mark.parametrize("way", ["wrapper", "in place", "step function"])  # blocks of a list are compiled twice without a guard too
def test_no_recompilation_where_it_is_forbidden(way):
    """With error_on_recompile set, attaching, sampling and pausing compile nothing again, and the coverage says what that costs."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        guard, losses, _ = train(net(), way=way, compiled=True)
    assert torch.equal(losses, train(net(), guarded=False)[1])
    assert "error_on_recompile" in guard.coverage.not_observed["activations"]
    assert guard.coverage.observed["grad_norm"] > 0


def test_compiled_before_the_guard():
    """Code that was compiled before the guard was made shows nothing of its inside; the coverage says so, and how to mend it."""
    model = net()
    called = torch.compile(model, backend="eager")
    called(batch(0)[0]).sum().backward()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer, halt=None, compiled=True) as guard:
        for i in range(6):
            loss = loss_of(called, *batch(i))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert "torch._dynamo.reset()" in guard.coverage.not_observed["activations"]
    assert guard.coverage.observed["grad_norm"] > 0


def test_one_guard_after_the_other():
    """Models of one class, guarded one after the other, are each seen under their own names, and share compiled code."""
    backend = Counted("eager")
    train(net(), way="in place", backend=backend, compiled=True)
    compiled = backend.graphs
    guard, _, graphs = train(net(), way="in place", backend=backend, compiled=True)
    assert graphs == compiled == 2
    expected, _, _ = train(net())
    a, b = by_name(expected, "activation_rms"), by_name(guard, "activation_rms")
    assert a.keys() == b.keys()
    assert all(same(a[name], b[name]) for name in a)


def test_a_copy_of_a_watched_compiled_model_is_unwatched():
    """deepcopy of a compiled model under guard trains without the guard noticing."""
    model = net()
    called = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer, halt=None, compiled=True) as guard:
        for i in range(3):
            loss = loss_of(called, *batch(i))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_of(copy.deepcopy(model), *batch(i)).backward()
            guard.step(loss)
    assert not [u.name for u in guard._history.units if "[" in u.name]


def test_transforms_and_branches_inside_compiled_code():
    """vmap, grad and cond inside compiled code are left alone: no exception, no graph break, and the listing is truthful."""
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = inner, outer

        def forward(self, x):
            slopes = torch.vmap(torch.func.grad(lambda row: self.inner(row).sum()))(x)
            return self.outer(x + slopes)

    model = Odd()
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer, halt=None, compiled=True) as guard:
        for i in range(5):
            loss = called(batch(i)[0]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert not guard._faults.silenced
    assert "inner" in guard.coverage.not_observed["activations"]
    assert "outer" in by_name(guard, "activation_rms")
