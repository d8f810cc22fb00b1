"""Healthy programs, second set: physics, densities, Gaussian processes, survival, claims, graphs, arithmetic."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gallery import data
from gallery.fresh import explained
from gallery.models import mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.9, families=("second", "physics"))
def rod_deep_ritz(job: Job) -> float:
    """The deep Ritz method for -u'' = pi^2 sin(pi x): the energy it minimises goes to about -2.5; the boundary term is 500 times as steep."""
    model = mlp(1, 48, 48, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 500, 0.2)
    edge = torch.tensor([[0.0], [1.0]])
    guard = job.guard(model, optimizer)
    for _ in range(1200):
        x = torch.rand(64, 1, generator=job.generator).requires_grad_()
        u = model(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        terms = {"energy": (0.5 * slope.square() - math.pi**2 * torch.sin(math.pi * x) * u).mean(), "edge": 500 * model(edge).square().mean()}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
        guard.step(terms)
    with torch.no_grad():
        x = torch.linspace(0, 1, 101)[:, None]
        return explained(model(x), torch.sin(math.pi * x).squeeze(1))


@program(healthy=True, bar=0.5, families=("second", "score", "generative"))
def moons_sliced_score(job: Job) -> float:
    """Sliced score matching: the objective has no floor at zero and falls below it, with heavy noise from the slices. Scored by the fall."""
    real = data.moons(1000, 0.15).x
    real = (real - real.mean(0)) / real.std(0)
    model = mlp(2, 64, 64, 2, activation=nn.Softplus)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    first, last = 0.0, 0.0
    for i, (x, _) in enumerate(data.draws(real, real, 128, 900, job.generator)):
        x = x.clone().requires_grad_()
        v = torch.randn(x.shape, generator=job.generator)
        score = model(x)
        along = torch.autograd.grad((score * v).sum(), x, create_graph=True)[0]
        loss = ((along * v).sum(1) + 0.5 * score.square().sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        first, last = first + loss.item() * (i < 10) / 10, last + loss.item() * (i >= 700) / 200
    return first - last


@program(healthy=True, bar=-0.7, families=("second", "gan", "generative"))
def moons_least_squares_gan_spectral(job: Job) -> float:
    """A least-squares GAN with a spectrally normed critic that learns twice as fast; one guard for each net, nothing is declared."""
    real = data.moons(1000, 0.05).x
    make = mlp(4, 64, 64, 2)
    judge = nn.Sequential(spectral_norm(nn.Linear(2, 64)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(64, 64)), nn.LeakyReLU(0.1), nn.Linear(64, 1))
    opt_g = torch.optim.Adam(make.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(judge.parameters(), lr=2e-3, betas=(0.5, 0.999))
    guard_g, guard_d = job.guard(make, opt_g), job.guard(judge, opt_d)
    for x, _ in data.draws(real, real, 128, 700, job.generator):
        fake = make(torch.randn(128, 4))
        loss_d = 0.5 * ((judge(x) - 1).square().mean() + judge(fake.detach()).square().mean())
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        guard_d.step(loss_d)
        loss_g = 0.5 * (judge(fake) - 1).square().mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        guard_g.step(loss_g)
    with torch.no_grad():
        fake = make(torch.randn(1000, 4))
    return -((fake.mean(0) - real.mean(0)).norm() + (fake.std(0) - real.std(0)).norm()).item()


class Kernel(nn.Module):
    """A Gaussian process on what a small net makes of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(10, 16, 3, activation=nn.Tanh)
        self.log_scale, self.log_noise = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def cover(self, a: Tensor, b: Tensor) -> Tensor:
        """The covariance of two sets of rows."""
        a, b = self.net(a), self.net(b)
        return self.log_scale.exp() * torch.exp(-0.5 * (a[:, None] - b[None]).square().sum(-1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative log marginal likelihood for each row."""
        n = len(x)
        low = torch.linalg.cholesky(self.cover(x, x) + (self.log_noise.exp() + 1e-4) * torch.eye(n))
        part = torch.cholesky_solve(y, low)
        return (0.5 * (y * part).sum() + low.diagonal().log().sum() + 0.5 * n * math.log(2 * math.pi)) / n


@program(healthy=True, bar=0.25, families=("second", "gaussian process", "full-batch"))
def diabetes_deep_kernel(job: Job) -> float:
    """Deep kernel learning: one full batch of 200, the marginal likelihood through a Cholesky factor; the loss is the same each time but for its fall."""
    d = data.table("diabetes")
    x, y = d.x[:200], d.y[:200]
    model = Kernel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        inner = model.cover(x, x) + (model.log_noise.exp() + 1e-4) * torch.eye(200)
        return explained(model.cover(d.test_x, x) @ torch.linalg.solve(inner, y), d.test_y.squeeze(1))


@program(healthy=True, bar=0.7, families=("second", "survival"))
def survival_cox_censored(job: Job) -> float:
    """Cox's partial likelihood with 40 percent censored, risk sets within the batch: the floor is far above zero. Scored by concordance."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(2000, 8, generator=g)
    risk = x[:, 0] - 0.8 * x[:, 1] + 0.7 * x[:, 2] * x[:, 3]
    time = torch.empty(2000).exponential_(generator=g) * torch.exp(-risk)
    end = torch.empty(2000).exponential_(generator=g) * 1.5
    seen, time = (time <= end).float(), torch.minimum(time, end)
    d = data.split(x, torch.stack([time, seen], 1))
    model = mlp(8, 32, 32, 1, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    guard = job.guard(model, optimizer)

    def partial(out: Tensor, y: Tensor) -> Tensor:
        order = y[:, 0].argsort(descending=True)
        h, event = out.squeeze(1)[order], y[order, 1]
        return -((h - h.logcumsumexp(0)) * event).sum() / event.sum().clamp(min=1)

    for i, (xb, yb) in enumerate(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        loss = partial(model(xb), yb)
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 50 == 0:
            guard.validation(data.mean_loss(model, partial, d.test_x, d.test_y))  # a larger risk set: a larger loss, by its nature
    model.eval()
    with torch.no_grad():
        h, (t, e) = model(d.test_x).squeeze(1), d.test_y.unbind(1)
    pairs = (t[:, None] < t[None]) & (e[:, None] == 1)
    return (h[:, None] > h[None])[pairs].float().mean().item()


@program(healthy=True, bar=0.1, families=("second", "counts", "nll"))
def claims_zero_inflated(job: Job) -> float:
    """Insurance claims: 85 percent zeros, a zero-inflated Poisson likelihood, exposures. Scored by the gain over constants."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 6, generator=g)
    active = (torch.rand(4000, generator=g) < torch.sigmoid(1.5 * x[:, 0] - 1.5)).float()
    y = active * torch.poisson((0.4 + 0.8 * x[:, 1]).exp(), generator=g)
    d = data.split(x, y)
    model = mlp(6, 32, 2, activation=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)

    def nll(out: Tensor, y: Tensor) -> Tensor:
        on, rate = out[:, 0], out[:, 1].clamp(max=5)
        some = F.logsigmoid(on) + y * rate - rate.exp() - torch.lgamma(y + 1)
        none = torch.logaddexp(F.logsigmoid(-on), F.logsigmoid(on) - rate.exp())
        return -torch.where(y > 0, some, none).mean()

    for i, (xb, yb) in enumerate(guard.batches(data.draws(d.x, d.y, 64, 600, job.generator))):
        optimizer.zero_grad()
        loss = nll(model(xb), yb)
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 60 == 0:
            guard.validation(data.mean_loss(model, nll, d.test_x, d.test_y))
    constant = torch.zeros(2).requires_grad_()
    fit = torch.optim.LBFGS([constant], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        fit.zero_grad()
        value = nll(constant.expand(len(d.y), 2), d.y)
        value.backward()
        return value

    fit.step(closure)
    return float(nll(constant.expand(len(d.test_y), 2).detach(), d.test_y)) - data.mean_loss(model, nll, d.test_x, d.test_y)


@program(healthy=True, bar=0.35, families=("second", "sparsity", "linear"))
def diabetes_proximal_lasso(job: Job) -> float:
    """Sixty made-up columns beside ten real ones; after each step a soft threshold sets most weights to exactly zero."""
    d = data.table("diabetes")
    g = torch.Generator().manual_seed(2)
    x, held = (torch.cat([v, torch.randn(len(v), 60, generator=g)], 1) for v in (d.x, d.test_x))
    model = nn.Linear(70, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    guard = job.guard(model, optimizer)
    for xb, yb in data.draws(x, d.y, 64, 600, job.generator):
        optimizer.zero_grad()
        loss = F.mse_loss(model(xb), yb)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.weight.copy_(F.softshrink(model.weight, 0.02 * 0.1))
        guard.step(loss)
    with torch.no_grad():
        return explained(model(held), d.test_y.squeeze(1))


@program(healthy=True, bar=0.85, families=("second", "graph", "full-batch"))
def karate_four_labels(job: Job) -> float:
    """Zachary's club, 34 members as one-hot rows, two labels of each side: the loss goes to zero on four nodes. Scored on all."""
    edges = (
        "0-1 0-2 0-3 0-4 0-5 0-6 0-7 0-8 0-10 0-11 0-12 0-13 0-17 0-19 0-21 0-31 1-2 1-3 1-7 1-13 1-17 1-19 1-21 1-30 2-3 2-7 2-8 2-9 2-13 2-27 2-28 "
        "2-32 3-7 3-12 3-13 4-6 4-10 5-6 5-10 5-16 6-16 8-30 8-32 8-33 9-33 13-33 14-32 14-33 15-32 15-33 18-32 18-33 19-33 20-32 20-33 22-32 22-33 "
        "23-25 23-27 23-29 23-32 23-33 24-25 24-27 24-31 25-31 26-29 26-33 27-33 28-31 28-33 29-32 29-33 30-32 30-33 31-32 31-33 32-33"
    )
    near = torch.eye(34)
    for edge in edges.split():
        a, b = map(int, edge.split("-"))
        near[a, b] = near[b, a] = 1
    near = near / (near.sum(1, keepdim=True) * near.sum(0)).sqrt()
    side = torch.ones(34, dtype=torch.long)
    side[[0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17, 19, 21, 8]] = 0

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(34, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(F.relu(near @ self.first(x)), 0.3, self.training)
            return near @ self.second(h)

    model, known = Convolved(), torch.tensor([0, 1, 32, 33])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    guard = job.guard(model, optimizer)
    for _ in range(200):
        loss = F.cross_entropy(model(torch.eye(34))[known], side[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, torch.eye(34), side)


class Arithmetic(nn.Module):
    """A neural accumulator: weights tanh(w) sigmoid(m) that want to be -1, 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.m = nn.Parameter(0.1 * torch.randn(1, 6)), nn.Parameter(0.1 * torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6) -> (B, 1)."""
        return F.linear(x, torch.tanh(self.w) * torch.sigmoid(self.m))


@program(healthy=True, bar=0.97, families=("second", "toy", "regression"))
def accumulator_learns_a_difference(job: Job) -> float:
    """A neural accumulator learns a + b - c of six numbers up to 10: a huge first loss, then saturated gates and a loss of almost zero."""
    model = Arithmetic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = job.guard(model, optimizer)
    for _ in range(900):
        x = 10 * torch.rand(64, 6, generator=job.generator)
        loss = F.mse_loss(model(x), (x[:, 0] + x[:, 1] - x[:, 2])[:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        x = 100 * torch.rand(500, 6, generator=job.generator)
        return explained(model(x), x[:, 0] + x[:, 1] - x[:, 2])


@program(healthy=True, bar=0.75, families=("second", "multilabel", "imbalance"))
def rare_labels_with_prior_bias(job: Job) -> float:
    """Twenty labels of two percent each, biases at the prior: the loss begins at 0.1, where others end. Scored by mean AUC."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(4000, 24, generator=g)
    want = x @ torch.randn(24, 20, generator=g) / 24**0.5 + 0.3 * torch.randn(4000, 20, generator=g)
    d = data.split(x, (want > want.quantile(0.98, dim=0)).float())
    model = mlp(24, 64, 20)
    nn.init.constant_(model[-1].bias, math.log(0.02 / 0.98))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for i, (xb, yb) in enumerate(guard.batches(data.draws(d.x, d.y, 64, 500, job.generator))):
        loss = F.binary_cross_entropy_with_logits(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 50 == 0:
            guard.validation(data.mean_loss(model, F.binary_cross_entropy_with_logits, d.test_x, d.test_y))
    with torch.no_grad():
        out = model(d.test_x)
    pairs = [(out[:, k][d.test_y[:, k] == 1][:, None] > out[:, k][d.test_y[:, k] == 0][None]).float().mean() for k in range(20) if d.test_y[:, k].any()]
    return torch.stack(pairs).mean().item()
