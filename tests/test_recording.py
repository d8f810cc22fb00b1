"""What the guard records, end to end, against references written for reading in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard

pytestmark = pytest.mark.filterwarnings("error")


def batch(i, n=32, features=6, classes=3):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(n, features, generator=generator), torch.randint(classes, (n,), generator=generator)


def mlp(width=12, features=6, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, classes))


def last(guard, signal, n=1):
    """Parameter name -> newest number."""
    return {p.name: float(v) for p, v in zip(guard.history.params, guard.history.last(signal, n)[-1], strict=False)}


def unit(guard, signal):
    """Module call -> newest number."""
    values = guard.history.last(signal, 1)
    return {u.name: float(v) for u, v in zip(guard.history.units, values[0], strict=False) if not math.isnan(v)} if values.size else {}


def norms(tensors):
    """Name -> L2 norm in float64."""
    return {n: float(torch.linalg.vector_norm(t.detach().double())) for n, t in tensors.items() if t is not None}


def gradients(model):
    return norms({n: p.grad for n, p in model.named_parameters()})


def weights(model):
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


# ---- gradients


@pytest.mark.parametrize("clip", [None, 0.01, 1e9])
def test_gradient_norms_are_those_before_clipping(clip):
    """Norms per parameter and in total are those before clipping; the clip coefficient is what clipping multiplied by."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for i in range(5):
            x, y = batch(i)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            expected = gradients(model)
            total = math.sqrt(sum(v * v for v in expected.values()))
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            guard.step(loss)
            assert last(guard, "grad_norm") == pytest.approx(expected, rel=1e-5)
            assert guard.history.last("grad_total", 1)[0, 0] == pytest.approx(total, rel=1e-5)
            assert guard.history.last("clip_coefficient", 1)[0, 0] == pytest.approx(min(1.0, (clip or math.inf) / total), rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_loss_scaling(fused, unscale):
    """Under an enabled GradScaler and autocast the norms have their true scale, unscaled early, late, or inside a fused step."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    with Guard(model, optimizer, scaler=scaler) as guard:
        for i in range(5):
            x, y = batch(i)
            before = weights(model)
            twin = copy.deepcopy(model)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
                reference = F.cross_entropy(twin(x), y)
            reference.backward()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            guard.step(loss)
            expected = gradients(twin)
            total = math.sqrt(sum(v * v for v in expected.values()))
            assert last(guard, "grad_norm") == pytest.approx(expected, rel=0.02)
            assert guard.history.last("clip_coefficient", 1)[0, 0] == pytest.approx(min(1.0, 0.05 / total) if unscale else 1.0, rel=0.02)
            assert guard.history.facts()["loss_scale"] == 1024.0
            moved = norms({n: p.detach().double() - before[n] for n, p in model.named_parameters()})
            assert last(guard, "update_norm") == pytest.approx(moved, rel=1e-3)


def test_skipped_by_the_scaler():
    """A step that the scaler leaves out has an update of exactly zero and says that gradients were infinite."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    with Guard(model, optimizer, scaler=scaler, halt=None) as guard:
        for i in range(3):
            x, y = batch(i)
            loss = F.cross_entropy(model(x), y) * (torch.inf if i == 2 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(0.0)
    steps, grads = guard.history.steps().tolist(), guard.history.last("grad_norm")
    assert steps == [0, 1, 2]
    assert not np.isfinite(grads[2]).any()
    assert np.isfinite(grads[:2]).all()


@pytest.mark.parametrize("stepped", ["every micro-batch", "every update"])
def test_accumulation(stepped):
    """Four micro-batches give the norms of the one large batch they add up to."""
    small, large = mlp(), mlp()
    found = {}
    for model, parts in ((small, 4), (large, 1)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        micro = parts > 1 and stepped == "every micro-batch"
        with Guard(model, optimizer, accumulate=parts if micro else None) as guard:
            for i in range(8):
                x, y = batch(i)
                losses = []
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    loss = F.cross_entropy(model(a), b) / parts
                    loss.backward()
                    losses.append(loss)
                    if len(losses) == parts:
                        optimizer.step()
                        optimizer.zero_grad()
                    if micro:
                        guard.step(loss * parts)
                if not micro:
                    guard.step(sum(losses))
        found[parts] = guard.history
    assert found[4].samples == found[1].samples == 8
    for signal in ("grad_norm", "update_norm", "weight_norm"):
        np.testing.assert_allclose(found[4].last(signal), found[1].last(signal), rtol=1e-4)
    assert np.nanmax(found[4].fact("not_cleared")) == 0.0 if np.isfinite(found[4].fact("not_cleared")).any() else True


def test_gradients_never_cleared():
    """Gradients that are added to over updates show as not cleared; cleared ones, to None or to zero, do not."""

    def share(clear):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        with Guard(model, optimizer) as guard:
            for i in range(10):
                x, y = batch(i)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                clear(optimizer)
                guard.step(loss)
        return guard.history.fact("not_cleared", default=0.0)[1:]

    assert (share(lambda o: None) == 1.0).all()
    assert (share(lambda o: o.zero_grad()) == 0.0).all()
    assert (share(lambda o: o.zero_grad(set_to_none=False)) == 0.0).all()


# ---- updates


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    ],
)
def test_update_ratio_is_that_of_the_real_difference(make):
    """The update ratio is the norm of the weights' real difference over their norm before, whatever the optimizer does."""
    model = mlp()
    optimizer = make(model.parameters())
    with Guard(model, optimizer) as guard:
        for i in range(6):
            x, y = batch(i)
            before = weights(model)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
            moved = norms({n: p.detach().double() - before[n] for n, p in model.named_parameters()})
            assert last(guard, "weight_norm") == pytest.approx(norms(before), rel=1e-5)
            assert last(guard, "update_norm") == pytest.approx(moved, rel=1e-3)
            assert last(guard, "update_ratio") == pytest.approx({n: moved[n] / v for n, v in norms(before).items()}, rel=1e-3)


@pytest.mark.parametrize("layer", ["wide", "tall", "prime", "channels last", "double"])
def test_large_tensors_are_sampled_well(layer):
    """The ratio of a large tensor comes from a sample and is within 5 % of the whole on a dense update; gradient norms are whole."""
    torch.manual_seed(0)
    model, x = {
        "wide": (nn.Linear(2048, 64), torch.randn(16, 2048)),
        "tall": (nn.Linear(64, 2048), torch.randn(16, 64)),
        "prime": (nn.Linear(499, 503), torch.randn(16, 499)),
        "channels last": (nn.Conv2d(64, 128, 3).to(memory_format=torch.channels_last), torch.randn(4, 64, 5, 5)),
        "double": (nn.Linear(256, 512).double(), torch.randn(16, 256).double()),
    }[layer]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(4):
            before = weights(model)
            loss = (model(x + i) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            expected = gradients(model)
            optimizer.step()
            guard.step(loss)
            moved = norms({n: p.detach().double() - before[n] for n, p in model.named_parameters()})
            assert last(guard, "grad_norm") == pytest.approx(expected, rel=1e-4)
            assert last(guard, "weight_norm") == pytest.approx(norms(before), rel=0.05)
            assert last(guard, "update_ratio") == pytest.approx({n: moved[n] / v for n, v in norms(before).items()}, rel=0.05)


def test_a_sample_favours_no_column():
    """Where a few input columns carry all of the update, the sample sees them in proportion, also for widths that are powers of two."""
    torch.manual_seed(0)
    model = nn.Linear(1024, 512, bias=False)
    scale = torch.where(torch.arange(1024) % 512 < 16, 30.0, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for _ in range(3):
            before = model.weight.detach().double().clone()
            loss = (model(torch.randn(16, 1024) * scale) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
            moved = float((model.weight.detach().double() - before).norm())
            assert last(guard, "update_norm")["weight"] == pytest.approx(moved, rel=0.3)


def test_sparse_use_of_a_large_table():
    """Of an embedding of which one row in ten is touched a step, the sampled update is within 50 % of the whole."""
    torch.manual_seed(0)
    table = nn.Embedding(20_000, 32)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    with Guard(table, optimizer) as guard:
        for _ in range(5):
            before = table.weight.detach().double().clone()
            loss = table(torch.randperm(20_000)[:2_000]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
            moved = float((table.weight.detach().double() - before).norm())
            assert last(guard, "update_norm")["weight"] == pytest.approx(moved, rel=0.5)


# ---- activations


class Shared(nn.Module):
    """Two layers through one ReLU module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(6, 16), nn.Linear(16, 16), nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))))


class Functional(nn.Module):
    """Two layers through F.relu, the second without a module of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)

    def forward(self, x):
        return F.relu(self.b(torch.relu(self.a(x))))


class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x):
        return F.relu(self.norm(self.a(x))).mean((2, 3))


def images(i):
    return torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(i))


def tokens(i):
    return torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(i))


def lines(i):
    return torch.randn(8, 6, 10, generator=torch.Generator().manual_seed(i))


def plain(i):
    return batch(i, 64)[0]


DEAD = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()), plain, ["0", "2"], ["1", "3"]),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True)), plain, ["0", "2"], ["1", "3"]),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(2)), images, ["0"], ["1"]),
    "channels last": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).to(memory_format=torch.channels_last), images, ["0"], ["1"]),
    "large convolution": (lambda: nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU()), images, ["0"], ["1"]),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 16, 3), nn.ReLU()), lines, ["0"], ["1"]),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU()), tokens, ["0"], ["1"]),
    "shared": (Shared, plain, ["a", "b"], ["relu", "relu[1]"]),
    "functional": (Functional, plain, ["a", "b"], ["a", "b"]),
    "functional after a norm": (FunctionalConv, images, ["norm"], ["norm"]),
    "ReLU6": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU6()), plain, ["0"], ["1"]),
}


@pytest.mark.parametrize("memory", ["as is", "large"])
@pytest.mark.parametrize("name", DEAD)
def test_dead_units_are_counted_exactly(name, memory, monkeypatch):
    """k planted dead units of n read as k / n after a window, for every way of writing a ReLU, for small and large outputs."""
    if memory == "large":
        monkeypatch.setattr("lossguard.device.forward.SMALL", 0)
    make, batches, layers, sites = DEAD[name]
    torch.manual_seed(0)
    model = make()
    planted = {}
    with torch.no_grad():
        for k, (layer, site) in enumerate(zip(layers, sites, strict=True), 3):
            module = model.get_submodule(layer)
            module.weight[:k] = 0.0
            module.bias.abs_()
            module.bias[:k] = -1.0
            planted[site] = k / module.bias.numel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with Guard(model, optimizer, halt=None, dense=60) as guard:
        for i in range(60):
            output = model(batches(i))
            loss = (output - torch.rand_like(output)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    dead = {u.name: float(v) for u, v in zip(guard.history.units, guard.history.last("dead_fraction", 1)[0], strict=False) if not math.isnan(v)}
    assert dead == pytest.approx(planted), guard.coverage


def test_activation_rms():
    """The root mean square of each module's output, in execution order, for small, large, halved and in-place ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 600), nn.Tanh(), nn.Linear(600, 3))
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, float(y.detach().double().square().mean().sqrt())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(3):
            loss = model(batch(i)[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert [u.name for u in guard.history.units] == list("01234")
    assert unit(guard, "activation_rms") == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("small", [0, 16384])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_first_nonfinite_module(value, small, monkeypatch):
    """The first module whose output is not finite is the one that made it so."""
    monkeypatch.setattr("lossguard.device.forward.SMALL", small)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(model, optimizer, halt=None)
    with guard:
        for i in range(3):
            if i == 2:
                with torch.no_grad():
                    model[2].bias[3] = value
            x, y = batch(i)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    rms = guard.history.last("activation_rms", 1)[0]
    assert np.isfinite(rms).tolist()[:3] == [True, True, False]
    assert guard.history.seen("activation_rms", 1)[0].all()


@pytest.mark.parametrize("how", ["batch", "module"])
def test_nonfinite_input(how):
    """A non-finite batch is seen: at every step where the guard is shown it, else at sampled steps at the first module."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Guard(model, optimizer, halt=None) as guard:
        for i in range(4):
            x, y = batch(i)
            x[0, 0] = math.nan if i == 2 else 0.0
            if how == "batch":
                guard.batch(x, y)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            guard.step(loss)
    if how == "batch":
        assert (guard.history.inputs() == 0).tolist() == [False, False, True, False]
    else:
        assert np.isfinite(guard.history.last("input_rms")[:, 0]).tolist() == [True, True, False, True]


# ---- logits


class Head(nn.Module):
    """Tokens to class scores, (B, T, C); the loss sees them through a view."""

    def __init__(self, tail=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.tail = nn.Linear(6, 5), tail

    def forward(self, x):
        y = self.body(x)
        return y if self.tail is None else self.tail(y)


def labels(i, shape=(4, 20)):
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(i))


LOSSES = {
    "module": (None, lambda y, t: nn.CrossEntropyLoss()(y.flatten(0, 1), t.flatten())),
    "module, classes in the middle": (None, lambda y, t: nn.CrossEntropyLoss()(y.transpose(1, 2), t)),
    "view": (None, lambda y, t: F.cross_entropy(y.view(-1, 5), t.view(-1))),
    "transpose": (None, lambda y, t: F.cross_entropy(y.transpose(1, 2), t)),
    "permute": (None, lambda y, t: F.cross_entropy(y.permute(0, 2, 1), t)),
    "contiguous": (None, lambda y, t: F.cross_entropy(y.transpose(1, 2).contiguous(), t)),
    "log_softmax and nll": (None, lambda y, t: F.nll_loss(y.log_softmax(-1).flatten(0, 1), t.flatten())),
    "float": (None, lambda y, t: F.cross_entropy(y.float().reshape(-1, 5), t.reshape(-1))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_logits_are_found(name):
    """The logits behind the loss are found with their class dimension, and the labels' likelihood is the loss."""
    tail, criterion = LOSSES[name]
    model = Head(tail)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(4):
            x, y = tokens(i), labels(i)
            guard.batch(x, y)
            output = model(x)
            loss = criterion(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert guard.history.loss_family == "cross_entropy"
    found = {s: guard.history.last(s, 1)[0, 0] for s in ("logit_peak", "log_normalizer", "label_nll")}
    scores = output.detach().double()
    assert found == pytest.approx(
        {"logit_peak": float(scores.abs().max()), "log_normalizer": float(scores.logsumexp(-1).mean().abs()), "label_nll": loss.item()}, rel=1e-4
    )


def test_image_logits_are_found():
    """Segmentation: classes in dimension 1."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(3):
            y = labels(i, (2, 4, 4))
            guard.batch(images(i)[:2, :, :4, :4], y)
            output = model(images(i)[:2, :, :4, :4])
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert guard.history.last("label_nll", 1)[0, 0] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax])
def test_softmax_modules(kind):
    """A softmax module's input is looked at as logits, under its own name and as the loss's head."""
    model = Head(kind(dim=-1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(3):
            y = labels(i)
            output = model(tokens(i))
            loss = F.nll_loss((output.log() if kind is nn.Softmax else output).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                scores = F.linear(tokens(i), model.body.weight, model.body.bias)
            optimizer.step()
            guard.step(loss)
    assert guard.history.heads == ["loss", "tail"]
    assert guard.history.last("logit_peak", 1)[0].tolist() == pytest.approx([float(scores.abs().max())] * 2, rel=1e-5)


def test_logits_given():
    """Logits given with the step are those measured, with the labels of the batch."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(3):
            x, y = batch(i)
            guard.batch(x, y)
            output = model(x)
            probabilities = output.exp() / output.exp().sum(1, keepdim=True)
            loss = -probabilities.gather(1, y[:, None]).log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss, logits=output)
    assert guard.history.last("label_nll", 1)[0, 0] == pytest.approx(loss.item(), rel=1e-4)


def test_several_optimizers_and_rates():
    """The learning rate is the largest over all groups of all optimizers."""
    model = mlp()
    a = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.3}, {"params": [model[0].bias], "lr": 0.01}], lr=0.1)
    b = torch.optim.Adam(model[2].parameters(), lr=torch.tensor(0.02))
    with Guard(model, [a, b]) as guard:
        for i in range(2):
            x, y = batch(i)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for o in (a, b):
                o.step()
                o.zero_grad()
            guard.step(loss)
    assert guard.history.lr == pytest.approx(0.3)
    assert sorted({p.optimizer for p in guard.history.params}) == [0, 1]
    assert guard.history.last("clip_coefficient", 1)[0].tolist() == pytest.approx([1.0, 1.0])


def test_the_input_is_that_of_the_first_module_at_every_sample():
    """Once settled, modules shown by their activation are passed over, but never the first: what it is given is the input."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, every=2, dense=4) as guard:
        for i in range(12):
            x = torch.full((16, 8), float(i + 1))
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert guard.history.last("input_rms")[:, 0] == pytest.approx([s + 1 for s in guard.history.steps()])


def test_networks_in_turn_may_leave_gradients_to_each_other():
    """In an adversarial pair the generator's pass adds to the discriminator's gradients, which are cleared before its own: no carry-over."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)})
    g, d = torch.optim.SGD(pair["g"].parameters(), lr=0.01), torch.optim.SGD(pair["d"].parameters(), lr=0.01)
    with Guard(pair, [g, d], loss_family="adversarial") as guard:
        for _ in range(20):
            fake = pair["g"](torch.randn(16, 4))
            d.zero_grad()
            (pair["d"](fake.detach()) - pair["d"](torch.randn(16, 4))).mean().backward()
            d.step()
            g.zero_grad()
            loss = -pair["d"](fake).mean()
            loss.backward()
            g.step()
            guard.step(loss)
    assert not (guard.history.fact("not_cleared", default=0.0) > 0).any()


@pytest.mark.parametrize("clears", [True, False])
def test_optimizers_of_one_loss_are_asked_for_clearing(clears):
    """Two optimizers behind one backward pass: gradients that neither clears are seen."""
    model = mlp()
    layers = list(model.children())
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in layers if list(layer.parameters())]
    with Guard(model, optimizers) as guard:
        for i in range(8):
            x, y = batch(i)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                if clears:
                    optimizer.zero_grad()
            guard.step(loss)
    assert np.nanmax(guard.history.fact("not_cleared")) == (0.0 if clears else 1.0)
