"""Healthy programs: optimizers and learning-rate schedules of all kinds, on digits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import ConvNet, mlp, warmup_cosine
from gallery.registry import Job, program


def batches(job: Job, steps: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Digits from a shuffling loader."""
    d = data.digits()
    return data.endless(data.loader(d.x, d.y, size, job.generator), steps)


def score(model: nn.Module) -> float:
    """Accuracy on the test digits."""
    d = data.digits()
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.95, families=("schedule",))
def schedule_warmup_cosine(job: Job) -> float:
    """AdamW, 60 steps of warm-up, a cosine to zero."""
    model = mlp(64, 128, 128, 10, activation=nn.GELU, norm=nn.LayerNorm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = warmup_cosine(optimizer, 60, 700)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 700)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.94, families=("schedule",))
def schedule_warmup_from_zero(job: Job) -> float:
    """The learning rate is exactly 0 at first and rises over 150 steps."""
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 150))
    job.preflight(model, batches(job, 20), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 700)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.95, families=("schedule",))
def schedule_one_cycle(job: Job) -> float:
    """One cycle to a peak of 0.5 with momentum SGD and batch-norm."""
    model = mlp(64, 128, 128, 10, norm=nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=600)
    job.preflight(model, batches(job, 20), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.95, families=("schedule",))
def schedule_cyclic_restarts(job: Job) -> float:
    """Cosine with warm restarts: the loss jumps a little at each."""
    model, criterion = mlp(64, 96, 96, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=100, T_mult=2)
    d = data.digits()
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(guard.batches(batches(job, 700))):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
        if i % 50 == 49:
            guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return score(model)


@program(healthy=True, bar=0.94, families=("schedule",))
def schedule_triangular(job: Job) -> float:
    """CyclicLR between 0.01 and 0.3, momentum cycling against it."""
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.3, step_size_up=75)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.94, families=("schedule",))
def schedule_on_plateau_steps(job: Job) -> float:
    """ReduceLROnPlateau to tiny rates, and the run just goes on."""
    d = data.digits()
    model, criterion = mlp(64, 64, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=1)
    loader = data.loader(d.x, d.y, 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(40):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
        held = data.mean_loss(model, criterion, d.test_x, d.test_y)
        schedule.step(held)
        guard.validation(held)
    return score(model)


@program(healthy=True, bar=0.9, families=("normalization", "schedule"))
def large_rate_batchnorm(job: Job) -> float:
    """SGD at 1.0, which only batch-norm permits; weights grow and steps shrink by themselves."""
    model = mlp(64, 128, 128, 10, norm=nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    job.preflight(model, batches(job, 20), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600, 128)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.93, families=("optimizer",))
def optimizer_adagrad(job: Job) -> float:
    """Adagrad, whose steps only ever shrink."""
    model = mlp(64, 96, 10)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    job.preflight(model, batches(job, 20), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 700)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.94, families=("optimizer",))
def optimizer_adafactor(job: Job) -> float:
    """Adafactor, whose steps are relative to the weights."""
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.02)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.9, families=("optimizer",))
def optimizer_adam_large_epsilon(job: Job) -> float:
    """Adam's epsilon at 1e-2, as some recipes have it: gradients are below it, and it acts as momentum SGD."""
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-2)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.95, families=("optimizer",))
def optimizer_lbfgs(job: Job) -> float:
    """L-BFGS with a closure on iris: many forward passes for one step."""
    d = data.table("iris")
    model = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    guard = job.guard(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(d.x), d.y) + 1e-3 * model.weight.square().sum()
        loss.backward()
        return loss

    for _ in range(60):
        loss = optimizer.step(closure)
        guard.step(loss)
    return data.accuracy(model, d.x, d.y)


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023)."""

    def __init__(self, params: object, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m * group["betas"][0] + p.grad * (1 - group["betas"][0])), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


@program(healthy=True, bar=0.95, families=("optimizer",))
def optimizer_own_lion(job: Job) -> float:
    """An optimizer of the user's own."""
    model = mlp(64, 128, 10)
    optimizer = Lion(model.parameters(), lr=3e-4, weight_decay=0.1)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 600)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.95, families=("optimizer",))
def optimizer_sharpness_aware(job: Job) -> float:
    """SAM: a second backward pass from perturbed weights before every update."""
    model = mlp(64, 96, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(batches(job, 500)):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            moves = [p.grad * (0.05 / (norm + 1e-12)) for p in model.parameters()]
            for p, e in zip(model.parameters(), moves, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, e in zip(model.parameters(), moves, strict=True):
                p.sub_(e)
        optimizer.step()
        optimizer.zero_grad()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.94, families=("accumulation",))
def accumulation_of_four(job: Job) -> float:
    """Four micro-batches for each update; the guard is stepped for each micro-batch."""
    model = mlp(64, 96, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer, accumulate=4)
    for i, (x, y) in enumerate(guard.batches(batches(job, 1200, 16))):
        loss = F.cross_entropy(model(x), y)
        (loss / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        guard.step(loss)
    return score(model)


@program(healthy=True, bar=0.94, families=("accumulation",))
def accumulation_unannounced(job: Job) -> float:
    """The same with eight, stepped once for each update, and the guard is not told."""
    model = mlp(64, 96, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guard = job.guard(model, optimizer)
    total = torch.zeros(())
    for i, (x, y) in enumerate(batches(job, 2400, 8)):
        loss = F.cross_entropy(model(x), y) / 8
        loss.backward()
        total = total + loss.detach()
        if i % 8 == 7:
            optimizer.step()
            optimizer.zero_grad()
            guard.step(total)
            total = torch.zeros(())
    return score(model)


@program(healthy=True, bar=0.95, families=("averaging",))
def averaging_ema_and_swa(job: Job) -> float:
    """An EMA copy that is used for validation, and SWA with a constant rate at the end."""
    d = data.digits("image")
    model, criterion = ConvNet(8), nn.CrossEntropyLoss()
    ema = copy.deepcopy(model).requires_grad_(False)
    swa = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = data.loader(d.x, d.y, 64, job.generator)
    guard = job.guard(model, optimizer)
    for epoch in range(14):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for a, b in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                    a.lerp_(b, 0.05) if a.is_floating_point() else a.copy_(b)
            guard.step(loss)
        if epoch >= 10:
            optimizer.param_groups[0]["lr"] = 0.03
            swa.update_parameters(model)
        guard.validation(data.mean_loss(ema, criterion, d.test_x, d.test_y))
    torch.optim.swa_utils.update_bn(loader, swa)
    return data.accuracy(swa, d.test_x, d.test_y)
