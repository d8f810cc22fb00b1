"""Healthy programs: regression with its many losses, some of which are negative, huge, or bounded from below by noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


def explained(prediction: Tensor, target: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - ((prediction - target).square().mean() / target.var(0, correction=0).mean()).item()


@program(healthy=True, bar=0.35, families=("mlp", "regression"))
def diabetes_mse_adam(job: Job) -> float:
    """Standardised targets, weight decay, early on it is done: two thirds of the variance are noise."""
    d = data.table("diabetes")
    model, criterion = mlp(10, 32, 1), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loader = data.loader(d.x, d.y, 32, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(30):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    with torch.no_grad():
        return explained(model(d.test_x), d.test_y)


@program(healthy=True, bar=0.3, families=("mlp", "regression"))
def diabetes_raw_targets(job: Job) -> float:
    """Targets from 25 to 346 as they are: the loss starts near 29000 and Adam takes a while to lift the bias."""
    d, raw = data.table("diabetes"), data.raw_table("diabetes")
    model = mlp(10, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    job.preflight(model, data.loader(d.x, raw.y, 32), nn.MSELoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, raw.y, 32, job.generator), 600)):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(d.test_x), raw.test_y)


@program(healthy=True, bar=0.3, families=("linear", "regression"))
def diabetes_sum_reduction(job: Job) -> float:
    """The loss is a sum over 64 samples, and the learning rate is chosen for it."""
    d = data.table("diabetes")
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 / 64)
    criterion = nn.MSELoss(reduction="sum")
    job.preflight(model, data.loader(d.x, d.y, 64), criterion, optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 600)):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(d.test_x), d.test_y)


@program(healthy=True, bar=0.25, families=("mlp", "regression", "nll"))
def diabetes_gaussian_nll(job: Job) -> float:
    """A network that says its own uncertainty."""
    d = data.table("diabetes")
    model = mlp(10, 32, 2, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 500)):
        mean, raw = model(x).chunk(2, 1)
        loss = F.gaussian_nll_loss(mean, y, F.softplus(raw) + 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(d.test_x)[:, :1], d.test_y)


@program(healthy=True, bar=1.5, families=("mlp", "regression", "nll"))
def sine_gaussian_nll_sharpens(job: Job) -> float:
    """Little noise: the negative log-likelihood passes zero and goes on to about -2, with growing gradients."""
    x = torch.rand(1000, 1, generator=job.generator) * 6 - 3
    y = torch.sin(2 * x) + 0.02 * torch.randn(1000, 1, generator=job.generator)
    model = mlp(1, 64, 64, 2, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    guard = job.guard(model, optimizer)
    losses = []
    for xb, yb in data.draws(x, y, 64, 1500, job.generator):
        mean, log_sigma = model(xb).chunk(2, 1)
        loss = (log_sigma + 0.5 * ((yb - mean) / log_sigma.exp()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
        losses.append(loss.item())
    return -sum(losses[-50:]) / 50


@program(healthy=True, bar=-0.27, families=("mlp", "regression"))
def diabetes_quantiles(job: Job) -> float:
    """Three quantiles at once by the pinball loss."""
    d = data.table("diabetes")
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = mlp(10, 32, 3)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def pinball(out: Tensor, y: Tensor) -> Tensor:
        error = y - out
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    job.preflight(model, data.loader(d.x, d.y, 32), pinball, optimizer)
    guard = job.guard(model, optimizer)
    loader = data.loader(d.x, d.y, 32, job.generator)
    for _ in range(30):
        for x, y in guard.batches(loader):
            loss = pinball(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, pinball, d.test_x, d.test_y))
    return -data.mean_loss(model, pinball, d.test_x, d.test_y)


@program(healthy=True, bar=0.3, families=("mlp", "regression"))
def diabetes_poisson_counts(job: Job) -> float:
    """Counts from 2 to 35 by the Poisson likelihood, which is far below zero without its constant."""
    d, raw = data.table("diabetes"), data.raw_table("diabetes")
    model, criterion = mlp(10, 32, 1), nn.PoissonNLLLoss(log_input=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    job.preflight(model, data.loader(d.x, (raw.y / 10).round(), 32), criterion, optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, (raw.y / 10).round(), 32, job.generator), 500)):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(d.test_x).exp() * 10, raw.test_y)


@program(healthy=True, bar=0.8, families=("mlp", "regression"))
def friedman_huber_outliers(job: Job) -> float:
    """One target in fifty is absurd; the Huber loss does not mind."""
    g = job.generator
    x = torch.rand(1500, 5, generator=g)
    y = 10 * torch.sin(3.14 * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y - y.mean()) / y.std()
    dirty = y.clone()
    dirty[torch.rand(len(y), generator=g) < 0.02] += 30
    model = mlp(5, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for xb, yb in data.draws(2 * x - 1, dirty[:, None], 64, 800, g):
        optimizer.zero_grad()
        loss = F.huber_loss(model(xb), yb, delta=0.5)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(2 * x - 1), y[:, None])


@program(healthy=True, bar=0.2, families=("linear", "regression"))
def linnerud_twenty_rows(job: Job) -> float:
    """Twenty rows, three targets, ridge by weight decay; scored on what it saw."""
    d = data.table("linnerud")
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.05)
    job.preflight(model, [(d.x, d.y)], nn.MSELoss(), optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        loss = F.mse_loss(model(d.x), d.y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(d.x), d.y)


@program(healthy=True, bar=0.75, families=("mlp", "ordinal"))
def digits_ordinal(job: Job) -> float:
    """A digit as nine yes-or-no questions, "more than k?"; right within one."""
    d = data.digits()
    model = nn.Sequential(mlp(64, 96, 1), nn.Flatten())
    cuts = nn.Parameter(torch.arange(9.0) - 4)
    optimizer = torch.optim.Adam([*model.parameters(), cuts], lr=3e-3)
    levels = torch.arange(9)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 800)):
        loss = F.binary_cross_entropy_with_logits(model(x) - cuts, (y[:, None] > levels).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        said = ((model(d.test_x) - cuts) > 0).sum(1)
        return ((said - d.test_y).abs() <= 1).float().mean().item()


@program(healthy=True, bar=1.0, families=("mlp", "nll"))
def moons_mixture_density(job: Job) -> float:
    """A mixture density network: y given x is two-valued on the moons."""
    d = data.moons(1000, 0.05)
    model = mlp(1, 64, 9, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    first = last = 0.0
    for i in range(900):
        rows = torch.randint(len(d.x), (128,), generator=job.generator)
        weight, mean, log_sigma = model(d.x[rows, :1]).chunk(3, 1)
        normal = torch.distributions.Normal(mean, log_sigma.exp().clamp(min=1e-3))
        loss = -torch.logsumexp(F.log_softmax(weight, 1) + normal.log_prob(d.x[rows, 1:]), 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        first, last = first + loss.item() * (i < 20) / 20, last + loss.item() * (i >= 850) / 50
    return first - last


@program(healthy=True, bar=0.98, families=("mlp", "regression"))
def image_siren(job: Job) -> float:
    """A network of sines with its own initialisation that learns one picture by heart."""
    image = data.digits("image").x[:16, 0].reshape(4, 4, 8, 8).transpose(1, 2).reshape(32, 32)
    place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij"), -1).reshape(-1, 2)

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x)

    model = nn.Sequential(nn.Linear(2, 96), Sine(), nn.Linear(96, 96), Sine(), nn.Linear(96, 96), Sine(), nn.Linear(96, 1))
    with torch.no_grad():
        for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
            bound = 1 / 2 if i == 0 else (6 / layer.in_features) ** 0.5 / 30
            layer.weight.uniform_(-bound, bound)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    job.preflight(model, [(place, image.reshape(-1, 1))], nn.MSELoss(), optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(500):
        loss = F.mse_loss(model(place), image.reshape(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return explained(model(place), image.reshape(-1, 1))


@program(healthy=True, bar=-3e-3, families=("mlp", "physics"))
def oscillator_physics_informed(job: Job) -> float:
    """y'' = -y from its equation alone: second derivatives inside the loss, two terms as a dict."""
    model = mlp(1, 48, 48, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    guard = job.guard(model, optimizer)
    zero = torch.zeros(1, 1, requires_grad=True)
    for _ in range(1200):
        t = (torch.rand(64, 1, generator=job.generator) * 4).requires_grad_()
        y = model(t)
        slope = torch.autograd.grad(y.sum(), t, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), t, create_graph=True)[0]
        start = model(zero)
        rate = torch.autograd.grad(start.sum(), zero, create_graph=True)[0]
        terms = {"equation": (bend + y).square().mean(), "start": (start - 1).square().mean() + rate.square().mean()}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
        guard.step(terms)
    with torch.no_grad():
        t = torch.linspace(0, 4, 100)[:, None]
        return -F.mse_loss(model(t), torch.cos(t)).item()
