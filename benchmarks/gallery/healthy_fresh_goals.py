"""Healthy programs written after the rules and measured before the rules were touched: goals other than a loss that falls: rewards, rankings, energies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.fresh import explained, fit
from gallery.models import mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.8, families=("fresh", "reinforcement"))
def chain_temporal_difference(job: Job) -> float:
    """TD(0) on a random walk of 19 states: targets come from the network itself, and the loss is small from the start."""
    model = mlp(19, 32, 1, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    guard = job.guard(model, optimizer)
    for _ in range(2500):
        state = torch.randint(19, (32,), generator=job.generator)
        after = state + 2 * torch.randint(2, (32,), generator=job.generator) - 1
        reward, inside = (after == 19).float(), (after >= 0) & (after < 19)
        with torch.no_grad():
            target = reward + inside * model(F.one_hot(after.clamp(0, 18), 19).float()).squeeze(1)
        optimizer.zero_grad()
        loss = F.mse_loss(model(F.one_hot(state, 19).float()).squeeze(1), target)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        values = model(torch.eye(19)).squeeze(1)
    return explained(values, torch.arange(1, 20) / 20)


@program(healthy=True, bar=0.9, families=("fresh", "reinforcement"))
def corridor_q_learning_soft_target(job: Job) -> float:
    """Q-learning from replay in a corridor of 12 with a target that follows by 2 % a step; values grow from 0."""
    size = 12
    model, target = mlp(size, 48, 2), mlp(size, 48, 2)
    target.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    states, actions = torch.randint(size, (3000,), generator=job.generator), torch.randint(2, (3000,), generator=job.generator)
    after = (states + 2 * actions - 1).clamp(0, size - 1)
    done = (after == size - 1).float()
    for _ in range(1200):
        i = torch.randint(3000, (64,), generator=job.generator)
        with torch.no_grad():
            aim = done[i] + 0.95 * (1 - done[i]) * target(F.one_hot(after[i], size).float()).amax(1)
        loss = F.smooth_l1_loss(model(F.one_hot(states[i], size).float()).gather(1, actions[i, None]).squeeze(1), aim)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(target.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.02)
        guard.step(loss)
    with torch.no_grad():
        return model(torch.eye(size))[:-1].argmax(1).float().mean().item()


@program(healthy=True, bar=0.55, families=("fresh", "embedding"))
def words_bayesian_ranking(job: Job) -> float:
    """Word pairs ranked against random ones (BPR), with Adagrad on two embeddings."""
    stream, size = data.words(120_000, 800)

    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Embedding(size, 24), nn.Embedding(size, 24)

        def forward(self, x: Tensor) -> Tensor:
            return (self.left(x[:, :1]) * self.right(x[:, 1:])).sum(-1)

    model = Ranker()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(stream) - 1, (n,), generator=job.generator)
        other = stream[torch.randint(len(stream), (n,), generator=job.generator)]
        return torch.stack([stream[at], stream[at + 1], other], 1), at

    fit(job, model, optimizer, (batch(256) for _ in range(800)), lambda out, _: -F.logsigmoid(out[:, 0] - out[:, 1]).mean())
    x, _ = batch(4000)
    with torch.no_grad():
        out = model(x)
    return (out[:, 0] > out[:, 1]).float().mean().item()


@program(healthy=True, bar=0.85, families=("fresh", "transfer"))
def digits_layer_by_layer(job: Job) -> float:
    """Greedy training: after 250 steps the first layer is frozen and the second begins to learn."""
    d = data.digits()
    model = mlp(64, 64, 64, 10)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.draws(d.x, d.y, 32, 600, job.generator)):
        if i == 250:
            model[0].requires_grad_(False)
            model[2].requires_grad_(True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Pooled(nn.Module):
    """Attention pooling over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.query = nn.Linear(8, 48), nn.Parameter(torch.randn(1, 1, 48) * 0.1)
        self.place = nn.Parameter(torch.randn(1, 8, 48) * 0.1)
        self.attend, self.norm, self.head = nn.MultiheadAttention(48, 4, batch_first=True), nn.LayerNorm(48), mlp(48, 64, 10, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        rows = self.rows(x.squeeze(1)) + self.place
        return self.head(self.norm(self.attend(self.query.expand(len(x), -1, -1), rows, rows)[0].squeeze(1)))


@program(healthy=True, bar=0.8, families=("fresh", "attention"))
def rows_attention_batches_of_two(job: Job) -> float:
    """Attention pooling, two images a batch: losses between 0.001 and 6 side by side."""
    d = data.digits("image")
    model = Pooled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    fit(job, model, optimizer, data.draws(d.x, d.y, 2, 2200, job.generator), F.cross_entropy)
    return data.accuracy(model, d.test_x, d.test_y)


class Quantised(nn.Module):
    """A code book of 32 entries with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.book = mlp(16, 48, 8), mlp(8, 48, 16), nn.Embedding(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 16) patches -> reconstruction, code, chosen entry."""
        z = self.encode(x)
        chosen = self.book(torch.cdist(z, self.book.weight).argmin(1))
        return self.decode(z + (chosen - z).detach()), z, chosen


@program(healthy=True, bar=0.3, families=("fresh", "generative", "terms"))
def patches_vector_quantised(job: Job) -> float:
    """A vector-quantised autoencoder of 4 x 4 patches; entries that are never chosen have no gradient."""
    d = data.digits("image")
    patches = F.unfold(d.x, 4, stride=4).transpose(1, 2).reshape(-1, 16)
    patches = (patches - patches.mean()) / patches.std()
    model = Quantised()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(out: Any, y: Tensor) -> dict[str, Tensor]:
        return {"error": F.mse_loss(out[0], y), "book": F.mse_loss(out[2], out[1].detach()), "commit": 0.25 * F.mse_loss(out[1], out[2].detach())}

    fit(job, model, optimizer, ((x, x) for x, _ in data.draws(patches, patches, 128, 700, job.generator)), loss_of)
    with torch.no_grad():
        return 1 - F.mse_loss(model(patches)[0], patches).item()


@program(healthy=True, bar=0.9, families=("fresh", "sgd"))
def digits_prelu_slow_sgd(job: Job) -> float:
    """Six layers with PReLU and layer norm, SGD without momentum at 0.02, validated every 100 steps."""
    d = data.digits()
    layers: list[nn.Module] = []
    for a, b in zip([64, *[48] * 5], [48] * 6, strict=True):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.PReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batches = data.endless(data.loader(d.x, d.y, 32, job.generator), 1000)
    fit(job, model, optimizer, batches, F.cross_entropy, every=100, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("fresh", "noise"))
def digits_langevin_noise(job: Job) -> float:
    """Stochastic gradient Langevin dynamics: noise is added to the weights after each step."""
    d = data.digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = job.guard(model, optimizer)
    for x, y in data.draws(d.x, d.y, 64, 700, job.generator):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.003 * torch.randn(p.shape, generator=job.generator))
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.65, families=("fresh", "contrastive"))
def moons_noise_contrastive_energy(job: Job) -> float:
    """An energy model of two moons, learned against noise: a binary cross entropy that settles at a height."""
    d = data.moons(1200, 0.08)
    model = mlp(2, 64, 64, 1, activation=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, _ in data.draws(d.x, d.y, 64, 800, job.generator):
            noise = torch.randn(64, 2, generator=job.generator) + torch.tensor([0.5, 0.25])
            yield torch.cat([x, noise]), torch.cat([torch.ones(64), torch.zeros(64)])

    fit(job, model, optimizer, batches(), lambda out, y: F.binary_cross_entropy_with_logits(out.squeeze(1), y))
    with torch.no_grad():
        real = (model(d.test_x) > 0).float().mean()
        false = (model(torch.randn(500, 2, generator=job.generator) + torch.tensor([0.5, 0.25])) < 0).float().mean()
    return float(0.5 * (real + false))
