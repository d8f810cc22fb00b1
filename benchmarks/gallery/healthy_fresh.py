"""Healthy programs written after the rules and measured before the rules were touched: losses, optimizers and schedules the others lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from gallery import data
from gallery.models import GPT, ConvNet, ResNet, mlp
from gallery.registry import Job, program

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Any]


def fit(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, loss_of: Loss, *,
    schedule: Any = None, clip: float | None = None, every: int = 0, validate: Callable[[], float] | None = None, **keywords: Any,
) -> None:  # fmt: skip
    """The loop of most programs here. every: steps between evaluations."""
    guard = job.guard(model, optimizer, **keywords)
    model.train()
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        terms, total = (loss, sum(loss.values())) if isinstance(loss, dict) else (loss, loss)
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        guard.step(terms)
        if validate is not None and every and (i + 1) % every == 0:
            model.eval()
            with torch.no_grad():
                held = validate()
            model.train()
            guard.validation(held)
    model.eval()


def explained(prediction: Tensor, y: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - float((prediction.squeeze(-1) - y).square().mean() / y.var())


def houses(n: int = 3000) -> data.Split:
    """Prices as a housing table has them: skewed features, one interaction, a long upper tail that is capped."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, 8, generator=g)
    x[:, :3] = x[:, :3].mul(0.8).exp()
    y = 0.5 * x[:, 0] + 0.3 * x[:, 3] * x[:, 4] + 0.4 * torch.sin(2 * x[:, 5]) + 0.2 * x[:, 1] + 0.3 * torch.randn(n, generator=g)
    x = (x - x.mean(0)) / x.std(0)
    return data.split(x, ((y - y.mean()) / y.std()).clamp(max=3.0))


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


class Mixer(nn.Module):
    """An MLP-mixer of 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.across = nn.ModuleList([mlp(16, 32, 16, activation=nn.GELU) for _ in range(blocks)])
        self.within = nn.ModuleList([mlp(width, 64, width, activation=nn.GELU) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * blocks + 1)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        h = self.stem(F.unfold(x, 2, stride=2).transpose(1, 2))
        for i, (across, within) in enumerate(zip(self.across, self.within, strict=True)):
            h = h + across(self.norms[2 * i](h).transpose(1, 2)).transpose(1, 2)
            h = h + within(self.norms[2 * i + 1](h))
        return self.head(self.norms[-1](h).mean(1))


@program(healthy=True, bar=0.93, families=("fresh", "mixer"))
def mixer_one_cycle(job: Job) -> float:
    """An MLP-mixer under AdamW and a one-cycle schedule that starts at a 25th."""
    d = data.digits("image")
    model = Mixer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, 450)
    batches = data.endless(data.loader(d.x, d.y, 64, job.generator), 450)
    fit(job, model, optimizer, batches, F.cross_entropy, schedule=schedule, every=45, validate=lambda: F.cross_entropy(model(d.test_x), d.test_y).item())
    return data.accuracy(model, d.test_x, d.test_y)


class Causal(nn.Module):
    """Dilated causal convolutions over characters, with weight norm and dropout."""

    def __init__(self, size: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width)
        self.layers = nn.ModuleList([nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, dilation=2**i)) for i in range(3)])
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, size)."""
        h = self.embed(x).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            h = h + self.drop(F.relu(layer(F.pad(h, (2 << i, 0)))))
        return self.head(h.transpose(1, 2))


@program(healthy=True, bar=-2.6, families=("fresh", "cnn", "text"))
def text_causal_convolutions(job: Job) -> float:
    """A temporal convolutional net on text, under RAdam; exponential decay of the rate."""
    stream, size = data.text()
    model = Causal(size)
    optimizer = torch.optim.RAdam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    windows = data.windows(stream[:150_000], 48, 16, job.generator)
    x, y = next(data.windows(stream[150_000:], 48, 64, job.generator))
    fit(job, model, optimizer, (next(windows) for _ in range(400)), loss_of, schedule=schedule, every=40, validate=lambda: loss_of(model(x), y).item())
    with torch.no_grad():
        return -loss_of(model(x), y).item()


class Radial(nn.Module):
    """Gaussian bumps at learned places."""

    def __init__(self, inputs: int, bumps: int) -> None:
        super().__init__()
        self.places, self.widths = nn.Parameter(torch.randn(bumps, inputs)), nn.Parameter(torch.full((bumps,), -2.0))
        self.head = nn.Linear(bumps, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, 1)."""
        return self.head(torch.exp(-torch.cdist(x, self.places).square() * self.widths.exp()))


@program(healthy=True, bar=0.3, families=("fresh", "regression"))
def diabetes_radial_basis(job: Job) -> float:
    """A radial basis network on a noisy table that allows half of the variance at best."""
    d = data.table("diabetes")
    y, held = d.y.squeeze(1), d.test_y.squeeze(1)
    model = Radial(10, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out.squeeze(1), y)

    fit(job, model, optimizer, data.draws(d.x, y, 32, 400, job.generator), loss_of, every=25, validate=lambda: loss_of(model(d.test_x), held).item())
    with torch.no_grad():
        return explained(model(d.test_x), held)


@program(healthy=True, bar=0.7, families=("fresh", "regression", "recurrent"))
def sine_recurrent_sgd_without_momentum(job: Job) -> float:
    """A GRU that continues noisy sines of random frequency, by plain SGD with a clip of 1."""
    model = nn.GRU(1, 32, batch_first=True)
    head = nn.Linear(32, 1)

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = model, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    net = Forecast()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)

    def waves(n: int) -> tuple[Tensor, Tensor]:
        t = torch.arange(41)[None, :, None]
        angle = 6.28 * torch.rand(n, 1, 1, generator=job.generator) + (0.2 + 0.4 * torch.rand(n, 1, 1, generator=job.generator)) * t
        wave = torch.sin(angle) + 0.1 * torch.randn(angle.shape, generator=job.generator)
        return wave[:, :-1], wave[:, 1:]

    fit(job, net, optimizer, (waves(32) for _ in range(450)), F.mse_loss, clip=1.0)
    x, y = waves(256)
    with torch.no_grad():
        return 1 - float(F.mse_loss(net(x), y) / y.var())


class Sparse(nn.Module):
    """An overcomplete code and its reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(64, 160), nn.Linear(160, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 64) -> code (B, 160), reconstruction (B, 64)."""
        code = F.relu(self.encode(x))
        return code, self.decode(code)


@program(healthy=True, bar=0.6, families=("fresh", "autoencoder", "terms"))
def digits_sparse_dictionary(job: Job) -> float:
    """A sparse autoencoder: squared error and an L1 term, told apart; many units are silent by design."""
    d = data.digits()
    model = Sparse()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_of(out: Any, y: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": F.mse_loss(out[1], y), "sparsity": 3e-4 * out[0].abs().sum(1).mean()}

    fit(job, model, optimizer, ((x, x) for x, _ in data.draws(d.x, d.y, 64, 700, job.generator)), loss_of)
    with torch.no_grad():
        return 1 - float(F.mse_loss(model(d.test_x)[1], d.test_x) / d.test_x.var())


class Variational(nn.Module):
    """A small VAE."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.encode, self.decode = mlp(64, 96, 2 * latent), mlp(latent, 96, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 64) -> reconstruction, mean, log variance."""
        mean, log = self.encode(x).chunk(2, 1)
        return self.decode(mean + (0.5 * log).exp() * torch.randn_like(mean)), mean, log


@program(healthy=True, bar=0.35, families=("fresh", "generative", "terms"))
def vae_cyclical_annealing(job: Job) -> float:
    """The weight of the divergence rises from 0 to 1 in each of four cycles: the loss rises and falls by design."""
    d = data.digits()
    model = Variational()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = iter(range(10_000))

    def loss_of(out: Any, y: Tensor) -> dict[str, Tensor]:
        beta = min(1.0, 2 * ((next(steps) % 200) / 200))
        divergence = -0.5 * (1 + out[2] - out[1].square() - out[2].exp()).sum(1).mean()
        return {"reconstruction": 0.5 * (out[0] - y).square().sum(1).mean(), "divergence": beta * divergence}

    fit(job, model, optimizer, ((x, x) for x, _ in data.draws(d.x, d.y, 64, 800, job.generator)), loss_of)
    with torch.no_grad():
        return 1 - float(F.mse_loss(model.decode(model.encode(d.test_x).chunk(2, 1)[0]), d.test_x) / d.test_x.var())


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
