"""Healthy programs written after the rules and measured before the rules were touched: losses and the optimizers and samplers that go with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from gallery import data
from gallery.fresh import explained, fit, houses
from gallery.models import mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.85, families=("fresh", "lbfgs"))
def iris_lbfgs_no_line_search(job: Job) -> float:
    """A full batch under LBFGS with a fixed rate and four inner iterations."""
    d = data.table("iris")
    model = mlp(4, 8, 3, activation=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=4)
    guard = job.guard(model, optimizer)
    for _ in range(120):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(d.x), d.y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        guard.step(optimizer.step(closure))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("fresh", "rmsprop"))
def wine_rmsprop_batches_of_four(job: Job) -> float:
    """RMSprop with momentum, ELU, four samples a batch."""
    d = data.table("wine")
    model = mlp(13, 24, 24, 3, activation=nn.ELU)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-4, momentum=0.5)
    batches = data.endless(data.loader(d.x, d.y, 4, job.generator), 700)
    fit(job, model, optimizer, batches, F.cross_entropy, every=70, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("fresh", "adagrad"))
def cancer_squared_hinge_adagrad(job: Job) -> float:
    """A support vector machine by hand: squared hinge, Adagrad, one linear layer."""
    d = data.table("breast_cancer")
    model = nn.Linear(30, 1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, weight_decay=1e-3)

    def hinge(out: Tensor, y: Tensor) -> Tensor:
        return F.relu(1 - out.squeeze(1) * (2.0 * y - 1)).square().mean()

    fit(job, model, optimizer, data.draws(d.x, d.y, 16, 800, job.generator), hinge)
    return ((model(d.test_x).squeeze(1) > 0) == (d.test_y == 1)).float().mean().item()


@program(healthy=True, bar=0.9, families=("fresh", "sgd"))
def digits_multi_margin_plain_sgd(job: Job) -> float:
    """A multi-class margin loss under SGD without momentum; most samples soon owe nothing."""
    d = data.digits()
    model = mlp(64, 100, 10, activation=nn.LeakyReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    fit(job, model, optimizer, data.draws(d.x, d.y, 16, 1200, job.generator), nn.MultiMarginLoss())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.55, families=("fresh", "regression", "plateau"))
def houses_huber_reduce_on_plateau(job: Job) -> float:
    """Skewed features, Huber loss, the learning rate divided by 5 whenever validation stands."""
    d = houses()
    model = mlp(8, 64, 64, 1, activation=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=3)
    loader = data.loader(d.x, d.y, 64, job.generator)
    with job.guard(model, optimizer) as guard:
        for _ in range(25):
            for x, y in guard.batches(loader):
                optimizer.zero_grad()
                loss = F.smooth_l1_loss(model(x).squeeze(1), y)
                loss.backward()
                optimizer.step()
                guard.step(loss)
            with torch.no_grad():
                held = F.smooth_l1_loss(model(d.test_x).squeeze(1), d.test_y)
            plateau.step(held)
            guard.validation(held)
    with torch.no_grad():
        return explained(model(d.test_x), d.test_y)


@program(healthy=True, bar=0.7, families=("fresh", "regression"))
def friedman_pinball_nadam(job: Job) -> float:
    """Three quantiles at once under NAdam; coverage is the score."""
    x, y = (torch.tensor(v, dtype=torch.float32) for v in datasets.make_friedman1(2000, noise=1.0, random_state=0))
    d = data.split((x - 0.5) * 3.46, (y - y.mean()) / y.std())
    taus = torch.tensor([0.1, 0.5, 0.9])
    model = mlp(10, 64, 64, 3)
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)

    def pinball(out: Tensor, y: Tensor) -> Tensor:
        gap = y[:, None] - out
        return torch.maximum(taus * gap, (taus - 1) * gap).mean()

    fit(job, model, optimizer, data.draws(d.x, d.y, 128, 700, job.generator), pinball, every=50, validate=lambda: pinball(model(d.test_x), d.test_y).item())
    with torch.no_grad():
        out = model(d.test_x)
    return 1 - abs(0.8 - ((d.test_y > out[:, 0]) & (d.test_y < out[:, 2])).float().mean().item())


@program(healthy=True, bar=0.5, families=("fresh", "regression", "restarts"))
def counts_poisson_warm_restarts(job: Job) -> float:
    """Poisson likelihood with counts to 60: negative losses; cosine with warm restarts that double."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2500, 6, generator=g)
    rate = (1.2 + 0.6 * x[:, 0] - 0.4 * x[:, 1] * x[:, 2] + 0.3 * x[:, 3].abs()).clamp(max=4).exp()
    d = data.split(x, torch.poisson(rate, generator=g))
    model, criterion = mlp(6, 48, 48, 1, activation=nn.Softplus), nn.PoissonNLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100, 2)

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return criterion(out.squeeze(1), y)

    batches = data.draws(d.x, d.y, 64, 700, job.generator)
    fit(job, model, optimizer, batches, loss_of, schedule=schedule, every=50, validate=lambda: loss_of(model(d.test_x), d.test_y).item())
    with torch.no_grad():
        return explained(model(d.test_x).exp().clamp(max=80), d.test_y)


class Pairs(nn.Module):
    """Two views through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = mlp(64, 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, views, 64) -> (B, views, 16)."""
        return self.encode(x)


def near(model: Pairs, d: data.Split) -> float:
    """Accuracy of the nearest neighbour by cosine."""
    with torch.no_grad():
        base, asked = (F.normalize(model.encode(x), dim=1) for x in (d.x, d.test_x))
    return (d.y[(asked @ base.T).argmax(1)] == d.test_y).float().mean().item()


@program(healthy=True, bar=0.85, families=("fresh", "metric"))
def digits_cosine_embedding(job: Job) -> float:
    """Pairs that belong together or not, and a cosine embedding loss with a margin."""
    d = data.digits()
    model = Pairs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(700):
            a, b = (torch.randint(len(d.x), (64,), generator=job.generator) for _ in range(2))
            yield torch.stack([d.x[a], d.x[b]], 1), 2.0 * (d.y[a] == d.y[b]) - 1

    fit(job, model, optimizer, pairs(), lambda out, y: F.cosine_embedding_loss(out[:, 0], out[:, 1], y, margin=0.2))
    return near(model, d)


@program(healthy=True, bar=0.9, families=("fresh", "metric"))
def digits_triplet_batch_hard(job: Job) -> float:
    """Triplets of the hardest positive and negative of a batch: the loss hovers about the margin, and then falls."""
    d = data.digits()
    model = mlp(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def hard(out: Tensor, y: Tensor) -> Tensor:
        apart = torch.cdist(out, out)
        same = y[:, None] == y[None]
        return F.relu((apart * same).amax(1) - apart.masked_fill(same, 1e9).amin(1) + 0.5).mean()

    fit(job, model, optimizer, data.draws(d.x, d.y, 64, 600, job.generator), hard)
    with torch.no_grad():
        return (d.y[torch.cdist(model(d.test_x), model(d.x)).argmin(1)] == d.test_y).float().mean().item()


@program(healthy=True, bar=0.85, families=("fresh", "imbalance"))
def cancer_rare_positive_weight(job: Job) -> float:
    """One positive in twenty, weighed by 19: single batches owe ten times the others."""
    d = data.table("breast_cancer")
    keep = (d.y == 1) | (torch.arange(len(d.y)) % 12 == 0)
    x, y = d.x[keep], (d.y[keep] == 0).float()
    model = mlp(30, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    weight = torch.tensor([(1 - y.mean()) / y.mean()])
    held = (d.test_y == 0).float()

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out.squeeze(1), y, pos_weight=weight)

    fit(job, model, optimizer, data.draws(x, y, 16, 700, job.generator), loss_of)
    with torch.no_grad():
        return ((model(d.test_x).squeeze(1) > 0) == (held == 1)).float().mean().item()


@program(healthy=True, bar=0.9, families=("fresh", "distillation"))
def digits_kl_distillation(job: Job) -> float:
    """A student follows a teacher's soft distribution at temperature 4; the divergence nears 0."""
    d = data.digits()
    teacher = mlp(64, 128, 10)
    first = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for x, y in data.draws(d.x, d.y, 64, 300, job.generator):
        first.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        first.step()
    teacher.requires_grad_(False)
    student = mlp(64, 24, 10)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, _ in data.draws(d.x, d.y, 64, 700, job.generator):
            yield x, F.softmax(teacher(x) / 4, 1)

    fit(job, student, optimizer, batches(), lambda out, soft: 16 * F.kl_div(F.log_softmax(out / 4, 1), soft, reduction="batchmean"))
    return data.accuracy(student, d.test_x, d.test_y)


@program(healthy=True, bar=0.8, families=("fresh", "imbalance"))
def digits_focal_long_tail(job: Job) -> float:
    """Class k has 1 / (k + 1) of its samples; focal loss with gamma 2, AdaMax."""
    d = data.digits()
    kept = torch.cat([(d.y == k).nonzero().squeeze(1)[: 140 // (k // 2 + 1)] for k in range(10)])
    x, y = d.x[kept], d.y[kept]
    model = mlp(64, 96, 48, 10, activation=nn.GELU)
    optimizer = torch.optim.Adamax(model.parameters(), lr=3e-3)

    def focal(out: Tensor, y: Tensor) -> Tensor:
        log = F.log_softmax(out, 1).gather(1, y[:, None]).squeeze(1)
        return (-((1 - log.exp()) ** 2) * log).mean()

    fit(job, model, optimizer, data.draws(x, y, 32, 700, job.generator), focal)
    return data.accuracy(model, d.test_x, d.test_y)
