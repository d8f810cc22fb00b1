"""Healthy programs, third set: estimates from tables and events. Physical units, heavy tails, weak labels, holes, classic solvers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


def explained(guess: Tensor, truth: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - ((guess - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def friedman(count: int) -> tuple[Tensor, Tensor]:
    """Friedman's first function on the unit cube, standardised, without noise."""
    x, y = datasets.make_friedman1(count, n_features=5, noise=0.0, random_state=0)
    target = torch.tensor(y, dtype=torch.float32)
    return torch.tensor(x, dtype=torch.float32), ((target - target.mean()) / target.std())[:, None]


class Scaled(nn.Module):
    """A network whose output is brought to the units of the target."""

    def __init__(self, net: nn.Module, centre: float, unit: float) -> None:
        super().__init__()
        self.net, self.centre, self.unit = net, centre, unit

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, 1)."""
        return self.centre + self.unit * self.net(x)


@program(healthy=True, bar=0.85, families=("third", "units"))
def lens_micrometres_in_metres(job: Job) -> float:
    """Displacements of micrometres in SI units: losses of 1e-12 and below, an Adam whose epsilon is chosen for it."""
    x, y = friedman(800)
    d = data.split(x, 1e-6 * y)
    model = Scaled(mlp(5, 64, 64, 1), 0.0, 1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, eps=1e-18)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 600))):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 50 == 0:
            guard.validation(data.mean_loss(model, F.mse_loss, d.test_x, d.test_y))
    return explained(model(d.test_x).detach(), d.test_y)


@program(healthy=True, bar=0.85, families=("third", "units", "clipping"))
def incomes_in_dollars_clipped_at_one(job: Job) -> float:
    """Incomes of 40000 to 200000 as they are: gradients of 1e8 are clipped at 1 in every step, which Adam does not mind."""
    x, y = friedman(800)
    d = data.split(x, 90_000 * torch.exp(0.4 * y))
    model = Scaled(mlp(5, 64, 64, 1), 95_000.0, 40_000.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 32, job.generator), 600):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
    return explained(model(d.test_x).detach(), d.test_y)


@program(healthy=True, bar=0.6, families=("third", "heavy-tails"))
def friedman_last_batch_of_one(job: Job) -> float:
    """Noise of infinite variance (a tail of index 1.5) under a Student likelihood, and epochs that end with a batch of one sample."""
    x, y = friedman(1281)
    gauss, chi = torch.randn(1281, 1, generator=job.generator), torch.randn(1281, 3, generator=job.generator)
    noisy = y + 0.2 * gauss / (chi.square().sum(1, keepdim=True) / 3).clamp(min=1e-3)
    truth_x, truth_y = x, y
    model = mlp(5, 48, 48, 1, activation=nn.SiLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = data.loader(x, noisy, 64, job.generator)
    guard = job.guard(model, optimizer)
    for _ in range(35):
        for x, y in guard.batches(loader):
            loss = 1.25 * torch.log1p((model(x) - y).square() / (1.5 * 0.09)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, F.l1_loss, truth_x, noisy))
    return explained(model(truth_x).detach(), truth_y)


class LevenbergMarquardt(torch.optim.Optimizer):
    """Damped Gauss-Newton on all residuals; a step that does not help is taken back and the damping raised."""

    def __init__(self, model: nn.Module, residuals: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__(model.parameters(), {})
        self.weights, self.residuals, self.damping = dict(model.named_parameters()), residuals, 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:
        """The mean squared residual before the step."""
        now = {k: w.detach() for k, w in self.weights.items()}
        r = self.residuals(now)
        jacobian = torch.cat([j.flatten(1) for j in jacrev(self.residuals)(now).values()], 1)
        normal = jacobian.T @ jacobian
        move = torch.linalg.solve(normal + self.damping * torch.eye(len(normal)), jacobian.T @ r)
        pieces = move.split([w.numel() for w in now.values()])
        trial = {k: w - piece.reshape(w.shape) for (k, w), piece in zip(now.items(), pieces)}
        if self.residuals(trial).square().sum() < r.square().sum():
            self.damping = max(self.damping / 3, 1e-4)
            for k, w in self.weights.items():
                w.copy_(trial[k])
        else:
            self.damping *= 4
        return r.square().mean()


@program(healthy=True, bar=0.9, families=("third", "solver"))
def friedman_levenberg_marquardt(job: Job) -> float:
    """Levenberg and Marquardt on the whole table: no gradient is ever stored, and steps that do not help are taken back."""
    x, y = friedman(500)
    d = data.split(x, y + 0.1 * torch.randn(y.shape, generator=job.generator))
    model = mlp(5, 12, 1, activation=nn.Tanh)
    optimizer = LevenbergMarquardt(model, lambda weights: (functional_call(model, weights, (d.x,)) - d.y).squeeze(1))
    guard = job.guard(model, optimizer)
    for _ in range(150):
        guard.step(optimizer.step())
    return explained(model(d.test_x).detach(), d.test_y)


@program(healthy=True, bar=0.9, families=("third", "finance"))
def options_deep_hedging(job: Job) -> float:
    """Deep hedging of a sold call: every batch is of new price paths, the loss is what risk is left, in squared euros. Scored by the risk removed."""
    model = mlp(2, 32, 32, 1, activation=nn.SiLU)
    premium = nn.Parameter(torch.zeros(()))
    whole = nn.ModuleDict({"net": model, "price": nn.ParameterDict({"premium": premium})})
    optimizer = torch.optim.Adam([{"params": model.parameters()}, {"params": [premium], "lr": 0.1}], lr=5e-3)
    guard = job.guard(whole, optimizer)

    def outcome(count: int) -> tuple[Tensor, Tensor]:
        moves = 0.2 * math.sqrt(1 / 20) * torch.randn(count, 20, generator=job.generator) - 0.02 / 20
        price = 100 * torch.exp(F.pad(moves.cumsum(1), (1, 0)))
        clock = torch.linspace(1, 0.05, 20).expand(count, 20)
        held = torch.sigmoid(model(torch.stack([5 * (price[:, :-1] / 100 - 1), clock], -1)).squeeze(-1))
        owed = (price[:, -1] - 100).clamp(min=0)
        return premium + (held * price.diff(dim=1)).sum(1) - owed, owed

    for _ in range(400):
        loss = outcome(128)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        left, owed = outcome(4000)
    return 1 - (left.square().mean() / owed.var()).item()


class Hawkes(nn.Module):
    """A self-exciting point process in three numbers: base rate, excitation, decay."""

    def __init__(self, base: float, excite: float, decay: float) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([base, excite, decay], dtype=torch.float64).log())

    def forward(self, times: Tensor, end: float) -> Tensor:
        """Log-likelihood per event."""
        base, excite, decay = self.logs.exp()
        waits = times[:, None] - times[None, :]
        rate = base + excite * decay * torch.exp(-decay * waits.clamp(min=0)).masked_fill(waits <= 0, 0.0).sum(1)
        return (rate.log().sum() - base * end - excite * (1 - torch.exp(-decay * (end - times))).sum()) / len(times)


@program(healthy=True, bar=0.9, families=("third", "likelihood"))
def earthquakes_hawkes_process(job: Job) -> float:
    """Three scalars by maximum likelihood, the same events in every step: the loss settles at a height within 100 steps and rests."""
    random, times, queue = np.random.default_rng(10 + job.seed), [], []
    queue = list(random.uniform(0, 400, random.poisson(0.5 * 400)))
    while queue:
        t = queue.pop()
        times.append(t)
        queue += [u for u in t + random.exponential(1 / 1.5, random.poisson(0.6)) if u < 400]
    events, model = torch.tensor(np.sort(times)), Hawkes(2.0, 0.1, 0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    guard = job.guard(model, optimizer)
    for _ in range(250):
        loss = -model(events, 400.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    even = math.log(len(events) / 400) - 1
    return (-loss.item() - even) / (Hawkes(0.5, 0.6, 1.5)(events, 400.0).item() - even)


@program(healthy=True, bar=0.9, families=("third", "plateau"))
def matrix_completed_in_stairs(job: Job) -> float:
    """Deep matrix factorisation from tiny weights: the loss stands, drops, stands and drops again, one singular value at a time."""
    left, right = (torch.linalg.qr(torch.randn(24, 3, generator=job.generator))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.tensor([24.0, 12.0, 6.0])) @ right.T
    seen = (torch.rand(24, 24, generator=job.generator) < 0.7).float()
    model = mlp(24, 24, 24, 24, activation=nn.Identity)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0.0, 0.01)
            nn.init.zeros_(m.bias).requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.15, momentum=0.9)
    guard = job.guard(model, optimizer)
    for _ in range(1200):
        loss = (seen * (model(torch.eye(24)) - matrix)).square().sum() / seen.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    error = (1 - seen) * (model(torch.eye(24)).detach() - matrix)
    return 1 - (error.square().sum() / ((1 - seen) * matrix).square().sum()).item()


@program(healthy=True, bar=0.88, families=("third", "weak-labels"))
def cancer_positive_unlabelled(job: Job) -> float:
    """Non-negative PU learning: 60 known positives; where the estimated risk goes below zero the step climbs, and the loss is shown as estimated."""
    d = data.table("breast_cancer")
    known = d.x[d.y == 1][:60]
    share = (d.y == 1).float().mean()
    model = mlp(30, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
    guard = job.guard(model, optimizer)
    for (x,) in data.endless(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(d.x), 64, shuffle=True, generator=job.generator), 400):
        positive, unknown = model(known).squeeze(1), model(x).squeeze(1)
        gain, rest = share * torch.sigmoid(-positive).mean(), torch.sigmoid(unknown).mean() - share * torch.sigmoid(positive).mean()
        loss = gain + rest
        optimizer.zero_grad()
        (loss if rest >= 0 else -rest).backward()
        optimizer.step()
        guard.step(loss)
    return ((model(d.test_x).squeeze(1) > 0).long() == d.test_y).float().mean().item()


class Holes(nn.Module):
    """Missing features, which come as NaN, are replaced by a learned value and marked."""

    def __init__(self) -> None:
        super().__init__()
        self.filling, self.net = nn.Parameter(torch.zeros(30)), mlp(60, 32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 30) with NaN -> (B, 2)."""
        missing = x.isnan()
        return self.net(torch.cat([torch.where(missing, self.filling, x), missing.float()], 1))


@program(healthy=True, bar=0.88, families=("third", "missing"))
def cancer_missing_values(job: Job) -> float:
    """A third of all measurements is missing, and says NaN in every batch; the model knows what to do with it."""
    d = data.table("breast_cancer")
    x, test = (t.masked_fill(torch.rand(t.shape, generator=job.generator) < 0.33, math.nan) for t in (d.x, d.test_x))
    model = Holes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    loader = data.loader(x, d.y, 32, job.generator)
    guard = job.guard(model, optimizer)
    for _ in range(20):
        for x, y in guard.batches(loader):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, F.cross_entropy, test, d.test_y))
    return data.accuracy(model, test, d.test_y)


@program(healthy=True, bar=0.85, families=("third", "weak-labels"))
def digits_complementary_labels(job: Job) -> float:
    """Each visit of an image tells one digit that it is not: the loss begins at 0.1 already and has only hundredths to fall, in noise."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 600):
        no = (y + torch.randint(1, 10, y.shape, generator=job.generator)) % 10
        loss = -torch.log1p(-model(x).softmax(1).gather(1, no[:, None]).clamp(max=0.999)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.85, families=("third", "weak-labels"))
def digits_co_teaching(job: Job) -> float:
    """Two nets under one guard, each taught by the samples that the other finds easy: 40 percent of labels are wrong and soon left out."""
    d = data.digits()
    wrong = torch.rand(d.y.shape, generator=job.generator) < 0.4
    labels = torch.where(wrong, torch.randint(0, 10, d.y.shape, generator=job.generator), d.y)
    first = mlp(64, 96, 10)
    nets = nn.ModuleList([first, copy.deepcopy(first)])
    for p in nets[1].parameters():
        nn.init.normal_(p, 0.0, 0.1)
    optimizer = torch.optim.Adam(nets.parameters(), lr=1e-3)
    guard = job.guard(nets, optimizer)
    for i, (x, y) in enumerate(guard.batches(data.endless(data.loader(d.x, labels, 128, job.generator), 400))):
        owed = [F.cross_entropy(net(x), y, reduction="none") for net in nets]
        keep = int(len(x) * (1 - 0.4 * min(1.0, i / 80)))
        easy = [o.argsort()[:keep] for o in owed]
        loss = owed[0][easy[1]].mean() + owed[1][easy[0]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(nets[0], d.test_x, d.test_y)


@program(healthy=True, bar=0.85, families=("third", "futures"))
def futures_winner_takes_all(job: Job) -> float:
    """Six guesses at where a walker turns, only the nearest is taught: heads that never win have next to no gradient. Scored against one guess."""
    model = mlp(4, 64, 64, 6 * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)

    def walks(count: int) -> tuple[Tensor, Tensor]:
        start, angle = torch.randn(count, 2, generator=job.generator), 6.2832 * torch.rand(count, generator=job.generator)
        turn = (torch.randint(0, 3, (count,), generator=job.generator) - 1) * 1.2 + angle + 0.1 * torch.randn(count, generator=job.generator)
        return torch.cat([start, angle.cos()[:, None], angle.sin()[:, None]], 1), start + torch.stack([turn.cos(), turn.sin()], 1)

    for _ in range(700):
        x, y = walks(64)
        miss = (model(x).reshape(-1, 6, 2) - y[:, None]).square().sum(2)
        loss = (0.99 * miss.amin(1) + 0.01 * miss.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    x, y = walks(1000)
    best = (model(x).detach().reshape(-1, 6, 2) - y[:, None]).square().sum(2).amin(1).mean()
    return 1 - (best / (1 - ((1 + 2 * math.cos(1.2)) / 3) ** 2)).item()
