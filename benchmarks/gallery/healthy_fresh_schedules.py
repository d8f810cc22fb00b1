"""Healthy programs written after the rules and measured before the rules were touched: schedules, clips, curricula and optimizers of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.fresh import fit
from gallery.models import GPT, ConvNet, ResNet, mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.9, families=("fresh", "cnn", "cyclic"))
def convnet_cyclic_rate_and_momentum(job: Job) -> float:
    """CyclicLR between 0.005 and 0.2, momentum against it; evaluated four times a cycle."""
    d = data.digits("image")
    model = ConvNet(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.005, 0.2, step_size_up=60, mode="triangular2", cycle_momentum=True)
    batches = data.endless(data.loader(d.x, d.y, 64, job.generator), 480)
    fit(job, model, optimizer, batches, F.cross_entropy, schedule=schedule, every=30, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("fresh", "cnn", "restarts"))
def resnet_sgdr_snapshots(job: Job) -> float:
    """SGDR: three cosine cycles from 0.1 to 0, evaluated at the end of each epoch."""
    d = data.digits("image")
    model = ResNet(12, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)
    batches = data.endless(data.loader(d.x, d.y, 96, job.generator), 300)
    fit(job, model, optimizer, batches, F.cross_entropy, schedule=schedule, every=15, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("fresh", "clipping"))
def digits_clipped_at_a_twentieth_adam(job: Job) -> float:
    """Clipping at 0.05 under Adam, which does not mind the scale of gradients."""
    d = data.digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, data.draws(d.x, d.y, 32, 800, job.generator), F.cross_entropy, clip=0.05)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=-2.75, families=("fresh", "recurrent", "clipping"))
def text_elman_clipped_at_a_thousand(job: Job) -> float:
    """A plain recurrent net of tanh on text, with a clip that never binds."""
    stream, size = data.text()
    embed = nn.Embedding(size, 48)
    rnn, head = nn.RNN(48, 96, batch_first=True), nn.Linear(96, size)

    class Elman(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = embed, rnn, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x))[0])

    model = Elman()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    windows = data.windows(stream[:150_000], 32, 16, job.generator)
    fit(job, model, optimizer, (next(windows) for _ in range(450)), loss_of, clip=1000.0)
    x, y = next(data.windows(stream[150_000:], 32, 128, job.generator))
    with torch.no_grad():
        return -loss_of(model(x), y).item()


@program(healthy=True, bar=0.85, families=("fresh", "shift"))
def digits_permuted_domain_switch(job: Job) -> float:
    """The pixels are permuted at step 400: by design the loss leaps, and the second task is learned."""
    d = data.digits()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    model = mlp(64, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(data.draws(d.x, d.y, 32, 900, job.generator)):
            yield (x[:, order] if i >= 400 else x), y

    fit(job, model, optimizer, batches(), F.cross_entropy)
    return data.accuracy(model, d.test_x[:, order], d.test_y)


@program(healthy=True, bar=0.85, families=("fresh", "curriculum"))
def digits_noise_grows_in_stages(job: Job) -> float:
    """A curriculum: noise on the pixels grows from 0 to 1 in five stages, and the loss with it."""
    d = data.digits()
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(data.draws(d.x, d.y, 64, 1000, job.generator)):
            yield x + 0.25 * (i // 200) * torch.randn(x.shape, generator=job.generator), y

    fit(job, model, optimizer, batches(), F.cross_entropy)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=-2.6, families=("fresh", "transformer", "curriculum"))
def gpt_growing_context(job: Job) -> float:
    """Windows of 8, 16, 32 and 48 characters in turn; longer ones are easier."""
    stream, size = data.text()
    model = GPT(size, 48, 48, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for length in (8, 16, 32, 48):
            windows = data.windows(stream[:150_000], length, 768 // length, job.generator)
            for _ in range(100):
                yield next(windows)

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    fit(job, model, optimizer, batches(), loss_of, clip=1.0)
    x, y = next(data.windows(stream[150_000:], 48, 64, job.generator))
    with torch.no_grad():
        return -loss_of(model(x), y).item()


@program(healthy=True, bar=0.9, families=("fresh", "large-batch"))
def digits_batches_of_1024(job: Job) -> float:
    """Nearly full batches, SGD at 0.5, a warm-up of 10 steps."""
    d = data.digits()
    model = mlp(64, 128, 10, norm=nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
    batches = data.endless(data.loader(d.x, d.y, 1024, job.generator), 160)
    fit(job, model, optimizer, batches, F.cross_entropy, schedule=schedule, every=10, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


class Lion(torch.optim.Optimizer):
    """Signs of an interpolated momentum, with decoupled decay."""

    def __init__(self, parameters: Any, lr: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"]).sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.lerp_(p.grad, 0.01)


@program(healthy=True, bar=0.93, families=("fresh", "cnn", "lion"))
def convnet_lion_decay(job: Job) -> float:
    """A Lion with a decay of 1, group norm, batches of 24."""
    d = data.digits("image")
    model = ConvNet(12, norm="group")
    fit(job, model, Lion(model.parameters(), 3e-4, 1.0), data.draws(d.x, d.y, 24, 500, job.generator), F.cross_entropy)
    return data.accuracy(model, d.test_x, d.test_y)


class Orthogonal(torch.optim.Optimizer):
    """Momentum brought to singular values of 1 by Newton and Schulz; vectors by signs."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.dim() < 2:
                    p.sub_(0.1 * group["lr"] * torch.sign(m))
                    continue
                x = m / (m.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.sub_(group["lr"] * x)


@program(healthy=True, bar=0.93, families=("fresh", "muon"))
def digits_own_orthogonal_cooldown(job: Job) -> float:
    """Orthogonalised momentum with a linear cool-down to 0."""
    d = data.digits()
    model = mlp(64, 96, 96, 10, activation=nn.SiLU)
    optimizer = Orthogonal(model.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 500)
    fit(job, model, optimizer, data.draws(d.x, d.y, 48, 500, job.generator), F.cross_entropy, schedule=schedule)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.88, families=("fresh", "full-batch"))
def wine_rprop_full_batch(job: Job) -> float:
    """Resilient propagation: each weight has a step size of its own, that grows while signs agree."""
    d = data.table("wine")
    model = mlp(13, 16, 3, activation=nn.Sigmoid)
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.01, step_sizes=(1e-6, 0.2))
    fit(job, model, optimizer, ((d.x, d.y) for _ in range(200)), F.cross_entropy)
    return data.accuracy(model, d.test_x, d.test_y)
