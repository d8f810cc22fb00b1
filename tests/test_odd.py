"""Odd tensors, modules and loops: never an exception, never a warning, and whatever is not observed is listed."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lossguard import Guard

pytestmark = pytest.mark.filterwarnings("error")


def train(model, batches, *, optimizer=None, loss_of=None, steps=6, guard=None, **options):
    """A plain loop; returns the closed guard."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    guard = guard or Guard(model, optimizer, halt=None, **options)
    with guard:
        for i in range(steps):
            x = batches(i)
            output = model(x)
            loss = loss_of(output) if loss_of else output.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert len(guard._history.losses()) == steps
    assert not guard._faults.silenced, guard._faults.silenced
    return guard


def names(guard, signal="grad_norm"):
    """The parameters whose numbers were seen."""
    seen = guard._history.seen(signal)
    return {p.name for p, s in zip(guard._history.params, seen.any(axis=0), strict=False) if s} if seen.size else set()


def last(guard, signal):
    """Parameter name -> newest number."""
    return {p.name: float(v) for p, v in zip(guard._history.params, guard._history.last(signal, 1)[0], strict=False)}


def rows(n=8, features=4, dtype=torch.float32):
    return lambda i: torch.randn(n, features, generator=torch.Generator().manual_seed(i)).to(dtype)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


# ---- parameters


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients(optimizer):
    """A sparse embedding gradient is left out and listed; the other parameters are measured, and no finding calls it missing."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x)).square().mean()

    model = Model()
    sparse = optimizer([model.table.weight], lr=0.1)
    dense = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with Guard(model, [sparse, dense]) as guard:
        for i in range(60):
            loss = model(torch.tensor([i % 50, (i + 1) % 50]))
            loss.backward()
            for o in (sparse, dense):
                o.step()
                o.zero_grad()
            guard.step(loss)
    assert names(guard) == {"head.weight", "head.bias"}
    assert names(guard, "update_norm") == {"table.weight", "head.weight", "head.bias"}
    assert "sparse" in guard.coverage.not_observed["table.weight"]
    assert not [f for f in guard.findings if "table" in f.where], guard.findings


def test_complex_parameters():
    """A complex parameter's norms are those of its real and imaginary parts together."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.w).abs()

    model = Model()
    before = model.w.detach().clone()
    guard = train(model, rows(), steps=1)
    assert last(guard, "weight_norm")["w"] == pytest.approx(torch.linalg.vector_norm(before).item(), rel=1e-5)
    assert last(guard, "update_norm")["w"] == pytest.approx(torch.linalg.vector_norm(model.w.detach() - before).item(), rel=1e-3)


@pytest.mark.parametrize("size", [4, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, size):
    """Half, bfloat16 and double parameters, small and large, are measured in float32 without overflow."""
    torch.manual_seed(0)
    model = nn.Linear(size, size, bias=False).to(dtype)
    x = torch.ones(8, size, dtype=dtype)
    guard = train(model, lambda i: x, loss_of=lambda y: (y * 100).sum(), steps=2, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6))
    assert last(guard, "grad_norm")["weight"] == pytest.approx(800.0 * size, rel=0.01)
    assert not guard.coverage.not_observed.keys() & {"weight"}


def test_double_gate():
    """A skip on double parameters judges their gradients too."""
    model = mlp(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    guard = train(model, rows(dtype=torch.float64), optimizer=optimizer, guard=Guard(model, optimizer, skip={"nonfinite_gradient"}))
    assert guard._history.last("total_skips", 1)[0, 0] == 0.0


def test_scalar_empty_tied_frozen_and_unused():
    """0-dim parameters are measured, tied ones once, frozen ones not; empty and unused ones are listed or have no number."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.nothing = nn.Parameter(torch.empty(0, 3))
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return self.gain * self.b(self.frozen(self.a(x))) + self.nothing.sum()

    guard = train(Model(), rows())
    assert names(guard) == {"gain", "a.weight"}
    assert guard.coverage.not_observed["nothing"] == "empty"
    assert not {"frozen.weight", "b.weight"} & set(guard.coverage.not_observed)


@pytest.mark.parametrize("size", [8, 160])
def test_channels_last_and_transposed(size):
    """Parameters in another memory order are measured as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, size, 3), nn.ReLU(), nn.Conv2d(size, size, 3)).to(memory_format=torch.channels_last)
    flipped = nn.Parameter(torch.randn(size, 40).t())
    model.register_parameter("flipped", flipped)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    guard = train(model, lambda i: torch.randn(2, 3, 6, 6), loss_of=lambda y: y.square().mean() + flipped.square().sum(), steps=1)
    for name, p in model.named_parameters():
        assert last(guard, "weight_norm")[name] == pytest.approx(before[name].norm().item(), rel=0.1 if p.numel() > 16384 else 1e-5)
        assert last(guard, "update_norm")[name] == pytest.approx((p.detach() - before[name]).norm().item(), rel=0.1 if p.numel() > 16384 else 1e-3)


def test_gapped_memory_is_listed():
    """A parameter that is a strided window into other memory cannot be read as one piece, and is listed."""
    model = mlp()
    model.register_parameter("window", nn.Parameter(torch.randn(6, 6)[:, :3]))
    guard = train(model, rows(), loss_of=lambda y: y.square().mean() + model.window.square().sum())
    assert "gaps" in guard.coverage.not_observed["window"]


def test_meta_model():
    """A whole step on the meta device runs; nothing has values, and the coverage does not claim any."""
    model = mlp().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for _ in range(12):
            loss = model(torch.empty(8, 4, device="meta")).square().mean()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert not guard.coverage.observed
    assert guard.findings == []


def test_lazy_modules():
    """Lazy layers are measured once their first forward pass has made them."""
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    guard = train(model, rows(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert names(guard) == {n for n, _ in model.named_parameters()}


def test_parametrized_modules():
    """A weight-normalised layer's two parts are measured, and its output as that of any other layer."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)))
    guard = train(model, rows())
    assert names(guard) == {n for n, _ in model.named_parameters()}
    assert [u.name for u in guard._history.units] == ["0", "1", "2"]
    assert [u.kind for u in guard._history.units] == ["Linear", "ReLU", "Linear"]


# ---- outputs and modules


@dataclass
class Answer:
    logits: torch.Tensor
    extra: torch.Tensor | None = None


@pytest.mark.parametrize("pack", [lambda y: {"logits": y, "n": 3}, lambda y: (y, None), lambda y: Answer(y), lambda y: [{"a": (y,)}]])
def test_nested_outputs(pack):
    """Outputs in dicts, tuples, dataclasses and nests of them are looked at."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return pack(x @ self.weight)

    def tensor(value):
        while not isinstance(value, torch.Tensor):
            value = value.logits if isinstance(value, Answer) else next(iter(value.values() if isinstance(value, dict) else value))
        return value

    guard = train(Odd(), rows(), loss_of=lambda y: tensor(y).square().mean())
    assert guard.coverage.observed["activation_rms"] == 1


def test_integer_outputs():
    """A module that gives integers is passed over; those around it are measured."""

    class Bucket(nn.Module):
        def forward(self, x):
            return (x > 0).long()

    torch.manual_seed(0)
    model = nn.Sequential(Bucket(), nn.Embedding(2, 4), nn.Flatten(1), nn.Linear(16, 3))
    guard = train(model, rows())
    assert guard.coverage.observed["activation_rms"] == 2


def test_repeated_calls():
    """A module called several times has one site for each call, up to a bound that is listed."""

    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), calls

        def forward(self, x):
            for _ in range(self.calls):
                x = self.layer(x)
            return x

    assert [u.name for u in train(Twice(3), rows())._history.units] == ["layer", "layer[1]", "layer[2]"]
    many = train(Twice(20), rows())
    assert len(many._history.units) == 8
    assert "more than 8 calls" in many.coverage.not_observed["layer"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("lengths", [(5,), (5, 3, 9, 1)])
def test_recurrent(kind, lengths):
    """Recurrent layers are measured with one length and with many."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    guard = train(Model(), lambda i: torch.randn(2, lengths[i % len(lengths)], 4))
    assert guard.coverage.observed["activation_rms"] == 2
    assert len(names(guard)) == 6


@pytest.mark.parametrize("packed", [True, False])
def test_packed_sequences(packed):
    """A packed sequence goes through."""
    rnn = nn.GRU(4, 6, batch_first=True)

    def batch(i):
        x = torch.randn(3, 5, 4)
        return nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2], batch_first=True) if packed else x

    guard = train(rnn, batch, loss_of=lambda y: (y[0].data if packed else y[0]).square().mean())
    assert guard.coverage.observed["activation_rms"] == 1


def test_attention():
    """Multi-head attention is one site, with its projections' parameters measured."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    guard = train(Model(), lambda i: torch.randn(2, 5, 8))
    assert names(guard) == {"mha.in_proj_weight", "mha.in_proj_bias", "mha.out_proj.weight", "mha.out_proj.bias"}
    assert "mha" in [u.name for u in guard._history.units]
    assert "activations" not in guard.coverage.not_observed


@pytest.mark.parametrize("n", [1, 2])
def test_one_dimensional_and_tiny(n):
    """1-d and 0-d outputs, batches of one: measured, and no false alarm from them."""
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.ReLU())
    guard = train(model, rows(n), steps=12)
    assert guard.coverage.observed["activation_rms"] == 2
    bare = nn.Linear(4, 3)
    guard = train(bare, lambda i: torch.randn(4), steps=12)
    assert guard.coverage.observed["activation_rms"] == 1


def test_last_smaller_batch():
    """A smaller last batch neither resets the dead units nor makes new sites."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[:3] = 0.0
        model[0].bias[:3] = -1.0
    guard = train(model, lambda i: rows(3 if i % 10 == 9 else 64)(i), steps=49)
    dead = guard._history.last("dead_fraction")[:, -1]
    assert len(guard._history.units) == 3
    assert set(dead[35:].tolist()) == {3 / 8}


def test_alternating_shapes_share_counters():
    """Two ReLUs whose shapes agree in some steps only keep one count of silent batches each."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.relu_a, self.relu_b = nn.Linear(4, 8), nn.Linear(4, 8), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.relu_a(self.a(x[0])).mean() + self.relu_b(self.b(x[1])).mean()

    model = Model()
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(1.0)
        model.a.bias[:2] = -1.0
        model.a.bias[2] = 0.0
        model.a.weight[2, 0] = 1.0  # unit 2 fires only where the first feature is positive

    def batch(i):
        a, b = rows(64)(i).abs(), rows(64 if i % 3 == 0 else 48)(i + 1000)
        return (a if i % 3 == 0 else -a), b

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = train(model, batch, steps=49, optimizer=optimizer, loss_of=lambda y: y, dense=100)
    units = {u.name: i for i, u in enumerate(guard._history.units)}
    assert guard._history.last("dead_fraction", 1)[0, units["relu_a"]] == pytest.approx(2 / 8)


# ---- ways of running


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["middle", "all", "end"])
def test_activation_checkpointing(reentrant, where):
    """Under either checkpointing each module counts once a step, and gradients are those without it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6))
            self.saves = {"middle": (2, 3), "all": range(6), "end": (4, 5), "none": ()}[where]

        def forward(self, x):
            x = x.clone().requires_grad_()
            for i, part in enumerate(self.parts):
                x = checkpoint(part, x, use_reentrant=reentrant) if i in self.saves else part(x)
            return x

    model = Model()
    plain = copy.deepcopy(model)
    plain.saves = ()
    seen, expected = train(model, rows()), train(plain, rows())
    assert [u.name for u in seen._history.units] == [u.name for u in expected._history.units]
    assert last(seen, "grad_norm") == pytest.approx(last(expected, "grad_norm"))
    assert last(seen, "update_norm") == pytest.approx(last(expected, "update_norm"))
    assert "no_gradient" not in seen._history.facts()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    """Compiled training is unharmed: one graph, compiled at most once more; gradients are measured, what hooks cannot see is listed."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = train(compiled, rows(), optimizer=optimizer, guard=Guard(model, optimizer), steps=60)
    train(plain, rows(), steps=60)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert names(guard) == {n for n, _ in model.named_parameters()}
    assert len(graphs) <= 2
    assert "activation_rms" not in guard.coverage.observed
    assert "compiled" in guard.coverage.not_observed["activations"]


def test_compile_wrapper_is_guarded_too():
    """Giving the guard the compiled wrapper itself works as well."""
    torch._dynamo.reset()
    compiled = torch.compile(mlp(), backend="eager")
    guard = train(compiled, rows())
    assert len(names(guard)) == 4


def test_lbfgs_closure():
    """LBFGS evaluates its closure many times; the update is that of the whole step."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x = rows()(0)
    with Guard(model, optimizer, halt=None) as guard:
        for _ in range(5):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}

            def closure():
                optimizer.zero_grad()
                loss = (model(x) - 1).square().mean()
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            guard.step(loss)
            for name, p in model.named_parameters():
                assert last(guard, "update_norm")[name] == pytest.approx((p.detach() - before[name]).norm().item(), rel=1e-3, abs=1e-7)


def test_closure():
    """A step with a closure is measured like a plain one."""

    def run(closing):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Guard(model, optimizer) as guard:
            for i in range(5):

                def closure():
                    optimizer.zero_grad()
                    loss = model(rows()(i)).square().mean()
                    loss.backward()
                    return loss

                if closing:
                    loss = optimizer.step(closure)
                else:
                    loss = closure()
                    optimizer.step()
                guard.step(loss)
        return last(guard, "grad_norm"), last(guard, "update_norm")

    assert run(True) == run(False)


def test_two_optimizers():
    """In a GAN's loop each network's gradients are those at its own update, and none is called missing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)})
    g, d = torch.optim.SGD(model["g"].parameters(), lr=0.01), torch.optim.SGD(model["d"].parameters(), lr=0.01)
    expected = {}
    with Guard(model, [g, d]) as guard:
        for i in range(12):
            z = rows()(i)
            loss_d = model["d"](model["g"](z).detach()).mean() - model["d"](z).mean()
            d.zero_grad()
            loss_d.backward()
            expected.update({f"d.{n}": p.grad.norm().item() for n, p in model["d"].named_parameters()})
            d.step()
            loss_g = -model["d"](model["g"](z)).mean()
            g.zero_grad()
            loss_g.backward()
            expected.update({f"g.{n}": p.grad.norm().item() for n, p in model["g"].named_parameters()})
            g.step()
            guard.step({"d": loss_d, "g": loss_g})
    assert last(guard, "grad_norm") == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert names(guard, "update_norm") == set(expected)
    assert "no_gradient" not in guard._history.facts()


def test_networks_in_turn():
    """Where only one network trains in each step, the backward passes of either are seen, from the first to the last."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.01) for n, m in model.items()}
    with Guard(model, list(optimizers.values()), halt=None) as guard:
        for i in range(12):
            for name in ("g", "d"):
                for other, module in model.items():
                    module.requires_grad_(other == name)
                loss = model["d"](model["g"](rows()(i))).square().mean()
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
            model.requires_grad_(True)
            guard.step(loss)
            expected = {n: p.grad.norm().item() for n, p in model.named_parameters()}
            assert i == 0 or last(guard, "grad_norm") == pytest.approx(expected, rel=1e-5), i  # the first step knew one network only


def test_group_added_and_frozen_and_thawed():
    """Parameters that join, freeze and thaw during the run keep their names and numbers apart."""
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    with Guard(model, optimizer, dense=100, halt=None) as guard:
        for i in range(40):
            if i == 10:
                model[2].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.005})
            if i == 20:
                model[0].weight.requires_grad_(False)
            if i == 30:
                model[0].weight.requires_grad_(True)
            loss = model(rows()(i)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            expected = {n: p.grad.norm().item() if p.grad is not None else math.nan for n, p in model.named_parameters()}
            optimizer.step()
            guard.step(loss)
            if i not in (10, 20, 30):  # seen from the step after the change on
                found = last(guard, "grad_norm")
                assert {n: found.get(n, math.nan) for n in expected} == pytest.approx(expected, nan_ok=True, rel=1e-5), i
    assert not guard._faults.silenced


def test_validation_in_between():
    """Evaluation and passes without gradients in between change no number of the training step."""

    def run(validate):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        criterion = nn.CrossEntropyLoss()
        with Guard(model, optimizer) as guard:
            for i in range(8):
                if validate:
                    model.eval()
                    with torch.no_grad():
                        criterion(model(rows(5)(100 + i) * 50), torch.zeros(5, dtype=torch.long))
                    model.train()
                loss = criterion(model(rows()(i)), torch.arange(8) % 3)
                if validate:
                    model.eval()
                    with torch.no_grad():
                        criterion(model(rows(5)(100 + i) * 50), torch.zeros(5, dtype=torch.long))
                    model.train()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
        history = guard._history
        assert len(history.steps()) == 8
        return {s: str(history.last(s)) for s in ("activation_rms", "logit_peak", "grad_norm", "label_nll")}

    assert run(True) == run(False)


def test_module_replaced():
    """A module put in another's place is watched from the next build on, and is listed until then."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(model, optimizer, dense=100)

    def step(i):
        loss = model(rows()(i)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)

    with guard:
        step(0)
        model[2] = nn.Linear(8, 3)
        step(1)
        assert "2.weight" in guard.coverage.not_observed
        optimizer.add_param_group({"params": list(model[2].parameters())})
        step(2)
        step(3)
        assert last(guard, "grad_norm")["2.weight"] == pytest.approx(model[2].weight.grad.norm().item(), rel=1e-5)
        assert "2.weight" not in guard.coverage.not_observed


def test_learning_rate_tensor():
    """A learning rate that is a tensor arrives as the fact ``lr``."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.02))
    assert train(model, rows(), optimizer=optimizer)._history.lr == pytest.approx(0.02)


def test_functional_and_leaf_of_its_own():
    """A custom leaf module with a functional ReLU inside has its dead units measured from gradient rows."""

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.zeros(8))
            with torch.no_grad():
                self.bias[:2] = -100.0

        def forward(self, x):
            return F.relu(F.linear(x, self.weight, self.bias))

    model = nn.Sequential(Leaf(), nn.Linear(8, 3))
    guard = train(model, rows(64), steps=49)
    assert guard.coverage.observed.get("dead_fraction") == 1
    assert guard._history.last("dead_fraction", 1)[0, -1] == pytest.approx(2 / 8)


def test_failed_backward_does_not_blind():
    """A backward pass that raised midway does not end the watching of later ones."""

    class Fuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("blown")

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(4):
            hidden = model[1](model[0](rows()(i)))
            loss = model[2](Fuse.apply(hidden) if i == 1 else hidden).square().mean()
            optimizer.zero_grad()
            if i == 1:
                with pytest.raises(ArithmeticError):
                    loss.backward()
                continue
            loss.backward()
            expected = model[0].weight.grad.norm().item()
            optimizer.step()
            guard.step(loss)
            assert last(guard, "grad_norm")["0.weight"] == pytest.approx(expected, rel=1e-5)


def test_scripted_and_unusual_modules():
    """A module whose output holds nothing to measure, or whose signal fails, is no reason to stop."""

    class Silent(nn.Module):
        def forward(self, x):
            return "text", 3, None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.silent, self.layer = Silent(), nn.Linear(4, 3)

        def forward(self, x):
            self.silent(x)
            return self.layer(x)

    guard = train(Model(), rows())
    assert guard.coverage.observed["activation_rms"] == 1


def test_frozen_between_samples():
    """Layers that are frozen and thawed between two sampled steps, as many as before, never stop the loop and are told apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, dense=4, halt=None) as guard:
        for i in range(60):
            if i == 25:
                model[0].requires_grad_(False)
                model[2].requires_grad_(True)
            loss = model(rows()(i)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert not guard._faults.silenced
    assert guard._history.steps(1)[0] >= 40
    assert {n for n, value in last(guard, "grad_norm").items() if math.isfinite(value)} == {n for n, p in model.named_parameters() if p.requires_grad}
