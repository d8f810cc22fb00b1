"""Healthy programs: unusual structures: experts, graphs, sets, factorisations, nets that make nets, curricula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


class Experts(nn.Module):
    """Eight experts, each sample goes to one: some experts see few samples or none."""

    def __init__(self, width: int = 64, experts: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([mlp(width, 32, width) for _ in range(experts)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture, and a load-balancing term."""
        share = F.softmax(self.gate(x), 1)
        weight, chosen = share.max(1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == k).squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        load = F.one_hot(chosen, len(self.experts)).float().mean(0)
        return out, len(self.experts) * (load * share.mean(0)).sum()


@program(healthy=True, bar=0.93, families=("moe",))
def digits_mixture_of_experts(job: Job) -> float:
    """Top-1 routing with a load-balancing loss."""
    d = data.digits()
    model = nn.ModuleDict({"moe": Experts(), "norm": nn.LayerNorm(64), "head": nn.Linear(64, 10)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, balance = model["moe"](x)
        return model["head"](model["norm"](x + mixed)), balance

    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 450)):
        out, balance = forward(x)
        terms = {"task": F.cross_entropy(out, y), "balance": 0.01 * balance}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
    with torch.no_grad():
        return (forward(d.test_x)[0].argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.85, families=("graph",))
def graph_convolution_scatter(job: Job) -> float:
    """Two graph convolutions on the neighbour graph of the digits: forty labels, the whole graph as one batch, dropout."""
    d = data.digits()
    near = torch.cdist(d.x, d.x).topk(7, largest=False).indices
    source, sink = near.flatten(), torch.arange(len(d.x)).repeat_interleave(7)
    source, sink = torch.cat([source, sink]), torch.cat([sink, source])
    degree = torch.bincount(sink, minlength=len(d.x)).float()
    weight = (degree[source] * degree[sink]).rsqrt()[:, None]

    class Convolution(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return torch.zeros_like(h).index_add(0, sink, h[source] * weight)

    model = nn.Sequential(Convolution(64, 32), nn.ReLU(), nn.Dropout(0.5), Convolution(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    guard = job.guard(model, optimizer)
    for i in range(200):
        loss = F.cross_entropy(model(d.x)[:80], d.y[:80])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if i % 20 == 19:
            model.eval()
            with torch.no_grad():
                guard.validation(F.cross_entropy(model(d.x)[80:], d.y[80:]))
            model.train()
    return data.accuracy(model, d.x, d.y)


@program(healthy=True, bar=-0.05, families=("sets",))
def sets_deep_mean(job: Job) -> float:
    """Deep sets of varying size: the variance of a set of numbers."""
    each, whole = mlp(1, 64, 64), mlp(64, 64, 1)
    model = nn.ModuleList([each, whole])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(700):
        size = int(torch.randint(5, 30, (1,), generator=job.generator))
        spread = torch.rand(64, 1, generator=job.generator) * 1.5 + 0.2
        x = torch.randn(64, size, generator=job.generator) * spread
        loss = F.mse_loss(whole(each(x[..., None]).mean(1)), x.var(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 650) / 50
    return -last


@program(healthy=True, bar=0.5, families=("sparse", "factorization"))
def ratings_factorization(job: Job) -> float:
    """Users times items with biases, two thousand users of whom most come rarely; weight decay in the loss."""
    g = job.generator
    u, v = torch.randn(2000, 4, generator=g), torch.randn(300, 4, generator=g)
    rows = (torch.rand(20000, generator=g) ** 2 * 2000).long()
    columns = (torch.rand(20000, generator=g) ** 2 * 300).long()
    y = (u[rows] * v[columns]).sum(1) / 2 + 0.3 * torch.randn(20000, generator=g)
    users, items = nn.Embedding(2000, 8), nn.Embedding(300, 8)
    for e in (users, items):
        nn.init.normal_(e.weight, 0, 0.1)
    model = nn.ModuleList([users, items])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(700):
        b = torch.randint(20000, (256,), generator=g)
        p, q = users(rows[b]), items(columns[b])
        error = F.mse_loss((p * q).sum(1), y[b])
        loss = error + 0.01 * (p.square().mean() + q.square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += error.item() * (i >= 650) / 50
    return 1 - last / y.var().item()


@program(healthy=True, bar=-0.05, families=("hypernetwork",))
def hypernetwork_sines(job: Job) -> float:
    """One net writes the weights of another, for sines of any frequency."""
    model = mlp(1, 64, 16 + 16 + 16 + 1)
    model[-1].weight.data.mul_(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(900):
        frequency = torch.rand(32, 1, generator=job.generator) * 1.5 + 0.5
        t = torch.rand(32, 20, generator=job.generator) * 4 - 2
        w1, b1, w2, b2 = model(frequency).split([16, 16, 16, 1], 1)
        out = torch.einsum("bth,bh->bt", torch.tanh(t[..., None] * w1[:, None] + b1[:, None]), w2) + b2
        loss = F.mse_loss(out, torch.sin(frequency * t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 850) / 50
    return -last


@program(healthy=True, bar=0.9, families=("mlp", "curriculum"))
def digits_curriculum(job: Job) -> float:
    """Two classes at first, two more every eighty steps: the loss jumps up each time, by intent."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for i in range(700):
        known = torch.nonzero(d.y < min(10, 2 + 2 * (i // 80))).squeeze(1)
        rows = known[torch.randint(len(known), (64,), generator=job.generator)]
        guard.batch(d.x[rows], d.y[rows])
        loss = F.cross_entropy(model(d.x[rows]), d.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("mlp", "gates"))
def digits_highway_gates(job: Job) -> float:
    """Highway layers: sigmoid gates that start nearly shut."""
    d = data.digits()

    class Highway(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.change, self.gate = nn.Linear(64, 64), nn.Linear(64, 64)
            nn.init.constant_(self.gate.bias, -3.0)
            self.squash = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            open_ = self.squash(self.gate(x))
            return x + open_ * (torch.tanh(self.change(x)) - x)

    model = nn.Sequential(*(Highway() for _ in range(6)), nn.Linear(64, 10))
    optimizer = torch.optim.RAdam(model.parameters(), lr=2e-3)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 450)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp", "quantization"))
def digits_binary_straight_through(job: Job) -> float:
    """Hidden activations are signs; gradients go straight through; many weights have a zero gradient at any time."""
    d = data.digits()

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(context: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            return torch.sign(x)

        @staticmethod
        def backward(context: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
            (x,) = context.saved_tensors
            return grad * (x.abs() <= 1)

    first, second, head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 10)
    norm1, norm2 = nn.BatchNorm1d(128), nn.BatchNorm1d(64)
    model = nn.ModuleList([first, norm1, second, norm2, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)

    def forward(x: Tensor) -> Tensor:
        return head(Sign.apply(norm2(second(Sign.apply(norm1(first(x)))))))

    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 450)):
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    model.eval()
    with torch.no_grad():
        return (forward(d.test_x).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=-0.01, families=("recurrent", "regression"))
def oscillator_neural_ode(job: Job) -> float:
    """A vector field fitted through twenty Euler steps."""
    model = mlp(2, 48, 2, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    times = torch.arange(1, 21) * 0.1
    last = 0.0
    for i in range(500):
        start = torch.randn(32, 2, generator=job.generator)
        true = torch.stack([start[:, :1] * times.cos() + start[:, 1:] * times.sin(), start[:, 1:] * times.cos() - start[:, :1] * times.sin()], -1)
        x, path = start, []
        for _ in range(20):
            x = x + 0.1 * model(x)
            path.append(x)
        loss = F.mse_loss(torch.stack(path, 1), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 450) / 50
    return -last
