"""Healthy programs, second set: representations. Contrasts, agreement, implicit layers, latents, weights that are kept, ensembles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


@torch.no_grad()
def neighbour(encode: nn.Module, d: data.Split) -> float:
    """Accuracy of the nearest training sample by cosine."""
    encode.eval()
    base, asked = (F.normalize(encode(x), dim=1) for x in (d.x, d.test_x))
    return (d.y[(asked @ base.T).argmax(1)] == d.test_y).float().mean().item()


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """A view: noise, and some pixels missing."""
    noise = torch.randn(x.shape, generator=generator)
    return (x + 0.4 * noise) * (torch.rand(x.shape, generator=generator) > 0.15)


@program(healthy=True, bar=0.93, families=("second", "contrastive"))
def digits_supervised_contrastive_cold(job: Job) -> float:
    """Supervised contrastive loss at temperature 0.07: it begins near 5 and ends high, for many positives share one softmax."""
    d = data.digits()
    model = mlp(64, 96, 96, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    guard = job.guard(model, optimizer)
    for x, y in data.draws(d.x, d.y, 64, 400, job.generator):
        z = F.normalize(model(torch.cat([moved(x, job.generator), moved(x, job.generator)])), dim=1)
        label, own = y.repeat(2), torch.eye(128, dtype=torch.bool)
        logits = (z @ z.T / 0.07).masked_fill(own, -1e9)
        same = (label[:, None] == label[None]) & ~own
        loss = -(F.log_softmax(logits, 1) * same).sum(1).div(same.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return neighbour(model, d)


@program(healthy=True, bar=0.85, families=("second", "contrastive"))
def digits_variance_invariance_covariance(job: Job) -> float:
    """VICReg: a weighted sum of three terms, 25, 25 and 1, of which the hinge on the variance goes to nothing."""
    d = data.digits()
    model = nn.ModuleDict({"encoder": mlp(64, 96, 48, norm=nn.BatchNorm1d), "expander": mlp(48, 96, 96, norm=nn.BatchNorm1d)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    guard = job.guard(model, optimizer)
    for x, _ in data.draws(d.x, d.y, 128, 350, job.generator):
        a, b = (model["expander"](model["encoder"](moved(x, job.generator))) for _ in range(2))

        def spread(z: Tensor) -> Tensor:
            return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()

        def shared(z: Tensor) -> Tensor:
            c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
            return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]

        loss = {"invariance": 25 * F.mse_loss(a, b), "variance": 25 * (spread(a) + spread(b)) / 2, "covariance": shared(a) + shared(b)}
        optimizer.zero_grad()
        sum(loss.values()).backward()
        optimizer.step()
        guard.step(loss)
    return neighbour(model["encoder"], d)


@program(healthy=True, bar=0.9, families=("second", "anomaly"))
def digits_deep_one_class(job: Job) -> float:
    """Deep SVDD on one digit without biases: the loss is a distance to a fixed centre that falls to thousandths. Scored by AUC."""
    d = data.digits()
    normal = d.x[d.y == 3]
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.LeakyReLU(0.1), nn.Linear(48, 16, bias=False))
    with torch.no_grad():
        centre = model(normal).mean(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    guard = job.guard(model, optimizer)
    for x, _ in data.endless(data.loader(normal, normal, 32, job.generator), 250):
        optimizer.zero_grad()
        loss = (model(x) - centre).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        far = (model(d.test_x) - centre).square().sum(1)
    return (far[d.test_y != 3][:, None] > far[d.test_y == 3][None]).float().mean().item()


class Equilibrium(nn.Module):
    """The fixed point of one layer; 20 steps without a graph, one with it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward, self.again, self.head = nn.Linear(64, width), nn.Linear(width, width, bias=False), nn.Linear(width, 10)
        nn.init.normal_(self.again.weight, 0.0, 0.3 / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        u = self.inward(x)
        z = torch.zeros_like(u)
        with torch.no_grad():
            for _ in range(20):
                z = torch.tanh(self.again(z) + u)
        return self.head(torch.tanh(self.again(z) + u))


@program(healthy=True, bar=0.9, families=("second", "deep"))
def digits_deep_equilibrium(job: Job) -> float:
    """A layer is called 21 times in each forward pass, 20 of them under no_grad: the rest is the one-step gradient of the fixed point."""
    d = data.digits()
    model = Equilibrium(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.draws(d.x, d.y, 64, 500, job.generator)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Many(nn.Module):
    """Eight nets side by side in batched matrices."""

    def __init__(self, members: int = 8, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, 64, width) / 8)
        self.second = nn.Parameter(torch.randn(members, width, 10) / width**0.5)
        self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (members, B, 10)."""
        return torch.relu(x @ self.first + self.shift) @ self.second


@program(healthy=True, bar=0.94, families=("second", "ensemble"))
def digits_batched_ensemble(job: Job) -> float:
    """Eight members in one module, their losses summed so that each learns as if alone: the first loss is 8 times log 10."""
    d = data.digits()
    model = Many()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in data.draws(d.x, d.y, 64, 400, job.generator):
        out = model(x)
        loss = sum(F.cross_entropy(member, y) for member in out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return (model(d.test_x).softmax(-1).mean(0).argmax(-1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.65, families=("second", "continual"))
def digits_elastic_weight_consolidation(job: Job) -> float:
    """Digits 0 to 4, then 5 to 9 with two heads and a penalty that holds what mattered: zero in the first half, then a term of its own."""
    d = data.digits()
    body, heads = mlp(64, 64, 64), nn.ModuleList([nn.Linear(64, 5), nn.Linear(64, 5)])
    model = nn.ModuleList([body, heads])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    kept: list[tuple[Tensor, Tensor]] = []
    for task in range(2):
        mine = (d.y >= 5) == bool(task)
        x, y = d.x[mine], d.y[mine] - 5 * task
        for xb, yb in data.draws(x, y, 32, 300, job.generator):
            loss = F.cross_entropy(heads[task](F.relu(body(xb))), yb)
            if kept:
                loss = loss + 100 * sum((f * (p - old).square()).sum() for p, (old, f) in zip(body.parameters(), kept))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        fisher = [torch.zeros_like(p) for p in body.parameters()]
        for i in range(60):
            model.zero_grad()
            F.cross_entropy(heads[task](F.relu(body(x[i : i + 1]))), y[i : i + 1]).backward()
            for f, p in zip(fisher, body.parameters()):
                f += p.grad.square() / 60
        model.zero_grad()
        kept = [(p.detach().clone(), f) for p, f in zip(body.parameters(), fisher)]
    with torch.no_grad():
        right = [heads[t](F.relu(body(d.test_x[(d.test_y >= 5) == bool(t)]))).argmax(1) + 5 * t for t in range(2)]
    wanted = [d.test_y[(d.test_y >= 5) == bool(t)] for t in range(2)]
    return (torch.cat(right) == torch.cat(wanted)).float().mean().item()


@program(healthy=True, bar=0.93, families=("second", "dropout"))
def digits_two_passes_agree(job: Job) -> float:
    """R-Drop: each batch goes twice through dropout, and the answers must agree; the agreement begins at 0 and grows before it falls."""
    d = data.digits()
    model = mlp(64, 128, 128, 10, dropout=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    model.train()
    for x, y in guard.batches(data.draws(d.x, d.y, 64, 450, job.generator)):
        a, b = model(x).log_softmax(1), model(x).log_softmax(1)
        terms = {
            "fit": (F.nll_loss(a, y) + F.nll_loss(b, y)) / 2,
            "agreement": F.kl_div(a, b, log_target=True, reduction="batchmean") + F.kl_div(b, a, log_target=True, reduction="batchmean"),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("second", "multitask"))
def digits_tasks_weigh_themselves(job: Job) -> float:
    """Kendall's weights: exp(-s) L + s for a class loss and an ink regression; the total goes below zero as the tasks are solved."""
    d = data.digits()
    ink, held = (x.mean(1, keepdim=True) * 5 for x in (d.x, d.test_x))
    model = nn.ModuleDict({"body": nn.Sequential(mlp(64, 96, 64), nn.ReLU()), "label": nn.Linear(64, 10), "ink": nn.Linear(64, 1)})
    scale = nn.Parameter(torch.zeros(2))
    model.register_parameter("scale", scale)
    optimizer = torch.optim.Adam([{"params": [p for n, p in model.named_parameters() if n != "scale"]}, {"params": [scale], "lr": 1e-2}], lr=1e-3)
    guard = job.guard(model, optimizer)
    for i, rows in enumerate(torch.randint(len(d.x), (700, 64), generator=job.generator)):
        h = model["body"](d.x[rows])
        each = torch.stack([F.cross_entropy(model["label"](h), d.y[rows]), F.mse_loss(model["ink"](h), ink[rows])])
        loss = ((-scale).exp() * each + scale).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 50 == 0:
            with torch.no_grad():
                h = model["body"](d.test_x)
                both = torch.stack([F.cross_entropy(model["label"](h), d.test_y), F.mse_loss(model["ink"](h), held)])
                guard.validation((((-scale).exp() * both + scale).sum()).item())
    with torch.no_grad():
        return (model["label"](model["body"](d.test_x)).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=5.0, families=("second", "vae", "generative"))
def digits_gumbel_categories(job: Job) -> float:
    """A VAE of 8 categorical latents; the Gumbel temperature goes from 1 to 0.3, so gradients grow while the softmaxes harden."""
    x = data.digits("image").x.flatten(1)
    encoder, decoder = mlp(64, 96, 80), mlp(80, 96, 64)
    model = nn.ModuleList([encoder, decoder])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    first, last = 0.0, 0.0
    for i, (xb, _) in enumerate(data.draws(x, x, 64, 600, job.generator)):
        logits = encoder(xb).view(-1, 8, 10)
        z = F.gumbel_softmax(logits, tau=max(0.3, 1 - i / 600), dim=-1)
        fit = F.binary_cross_entropy_with_logits(decoder(z.flatten(1)), xb, reduction="none").sum(1).mean()
        log = logits.log_softmax(-1)
        loss = fit + (log.exp() * (log + 2.302585)).sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        first, last = first + loss.item() * (i < 5) / 5, last + loss.item() * (i >= 550) / 50
    return first - last


class Boltzmann(nn.Module):
    """A restricted Boltzmann machine."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(hidden, 64))
        self.seen, self.hidden = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(hidden))

    def forward(self, v: Tensor) -> Tensor:
        """The free energy of each row."""
        return -(v @ self.seen) - F.softplus(F.linear(v, self.weight, self.hidden)).sum(1)

    @torch.no_grad()
    def gibbs(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep: a sample of the visible units, and their means."""
        mean = torch.sigmoid(torch.bernoulli(torch.sigmoid(F.linear(v, self.weight, self.hidden))) @ self.weight + self.seen)
        return torch.bernoulli(mean), mean


@program(healthy=True, bar=0.25, families=("second", "energy", "generative"))
def digits_contrastive_divergence(job: Job) -> float:
    """An RBM by contrastive divergence: the 'loss' is a difference of free energies that hovers about zero. Scored by reconstruction."""
    x = (data.digits("image").x.flatten(1) > 0.5).float()
    model = Boltzmann()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-4)
    guard = job.guard(model, optimizer)

    def batches() -> Iterator[Tensor]:
        for xb, _ in data.draws(x, x, 64, 700, job.generator):
            yield xb

    for v in guard.batches(batches()):
        made = v
        for _ in range(2):
            made, _ = model.gibbs(made)
        loss = model(v).mean() - model(made).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    _, mean = model.gibbs(x)
    return 1 - ((mean - x).square().mean() / x.var(0).mean()).item()
