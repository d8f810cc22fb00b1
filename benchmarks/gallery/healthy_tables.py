"""Healthy programs: plain classifiers of tables and digits, as tutorials write them, with their usual variations of loss and data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.95, families=("mlp",))
def digits_mlp_adam(job: Job) -> float:
    """The first program of every course."""
    d = data.digits()
    model, criterion = mlp(64, 128, 64, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = data.loader(d.x, d.y, 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    with job.guard(model, optimizer) as guard:
        for _ in range(15):
            model.train()
            for x, y in guard.batches(loader):
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                guard.step(loss)
            guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("mlp",))
def digits_mlp_sgd(job: Job) -> float:
    """Plain SGD at 0.1."""
    d = data.digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = job.guard(model, optimizer)
    for x, y in data.draws(d.x, d.y, 32, 1000, job.generator):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.95, families=("mlp",))
def digits_tanh_nesterov(job: Job) -> float:
    """Three tanh layers, Nesterov momentum, weight decay."""
    d = data.digits()
    model = mlp(64, 96, 96, 96, 10, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    loader = data.loader(d.x, d.y, 64, job.generator)
    job.preflight(model, loader, nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(loader, 700)):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp",))
def digits_batch_size_one(job: Job) -> float:
    """One sample at a time."""
    d = data.digits()
    model = mlp(64, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = job.guard(model, optimizer)
    for i in torch.randperm(len(d.x), generator=job.generator).tolist():
        loss = F.cross_entropy(model(d.x[i : i + 1]), d.y[i : i + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp", "dropout"))
def digits_heavy_dropout(job: Job) -> float:
    """Dropout of 0.6 after each of two wide layers; validation is far below training."""
    d = data.digits()
    model, criterion = mlp(64, 256, 256, 10, dropout=0.6), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = data.loader(d.x, d.y, 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(25):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.88, families=("mlp", "noise"))
def digits_label_noise(job: Job) -> float:
    """One label in five is wrong, and nobody can help it; the loss stays near 1."""
    d = data.digits()
    y = d.y.clone()
    wrong = torch.rand(len(y), generator=job.generator) < 0.2
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=job.generator)
    model, criterion = mlp(64, 64, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = data.loader(d.x, y, 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(25):
        for x, t in guard.batches(loader):
            loss = criterion(model(x), t)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.91, families=("mlp", "imbalance"))
def cancer_imbalanced_focal(job: Job) -> float:
    """Malignant cases are kept one in ten; the focal loss."""
    d = data.table("breast_cancer")
    rare = d.y == 0
    keep = ~rare | (torch.rand(len(d.y), generator=job.generator) < 0.15)
    model = mlp(30, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = data.loader(d.x[keep], d.y[keep].float(), 32, job.generator)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(loader, 700)):
        bce = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y, reduction="none")
        loss = (0.5 * (1 - torch.exp(-bce)) ** 2 * bce).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return ((model(d.test_x).squeeze(1) > 0) == d.test_y.bool()).float().mean().item()


@program(healthy=True, bar=0.85, families=("mlp", "imbalance"))
def digits_long_tail_weighted(job: Job) -> float:
    """Class k is kept with a share of 0.75 to the power k; class weights."""
    d = data.digits()
    keep = torch.rand(len(d.y), generator=job.generator) < 0.75 ** d.y.float()
    x, y = d.x[keep], d.y[keep]
    counts = torch.bincount(y, minlength=10).clamp(min=1)
    criterion = nn.CrossEntropyLoss(weight=len(y) / (10.0 * counts))
    model = mlp(64, 64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    job.preflight(model, data.loader(x, y, 32), criterion, optimizer)
    guard = job.guard(model, optimizer)
    for xb, yb in guard.batches(data.endless(data.loader(x, y, 32, job.generator), 700)):
        loss = criterion(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.95, families=("mlp", "mixup"))
def digits_mixup_smoothing(job: Job) -> float:
    """Mixup with label smoothing: the training loss never comes near 0."""
    d = data.digits()
    model, criterion = mlp(64, 128, 10, activation=nn.GELU), nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(d.x, d.y, 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(25):
        for x, y in loader:
            share = torch.distributions.Beta(0.4, 0.4).sample().item()
            other = torch.randperm(len(x))
            out = model(share * x + (1 - share) * x[other])
            loss = share * criterion(out, y) + (1 - share) * criterion(out, y[other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("mlp", "multilabel"))
def digits_multilabel(job: Job) -> float:
    """Six properties of a digit at once: BCE with logits."""
    d = data.digits()
    properties = torch.tensor([[n % 2, n > 4, n in (2, 3, 5, 7), n in (0, 6, 8, 9), n % 3 == 0, n == 1] for n in range(10)]).float()
    model, criterion = mlp(64, 64, 6), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(d.x, properties[d.y], 64, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(loader, 700)):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return ((model(d.test_x) > 0) == properties[d.test_y].bool()).float().mean().item()


@program(healthy=True, bar=0.9, families=("mlp", "normalization"))
def digits_raw_pixels_batchnorm(job: Job) -> float:
    """Pixels in [0, 255], and a batch-norm as the first layer that takes care of it."""
    d = data.digits("raw")
    model = nn.Sequential(nn.BatchNorm1d(64), *mlp(64, 64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(d.x, d.y, 64, job.generator, drop_last=True)
    job.preflight(model, loader, nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(loader, 700)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp",))
def wine_full_batch_descent(job: Job) -> float:
    """Gradient descent on the whole table at once."""
    d = data.table("wine")
    model = mlp(13, 16, 3, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    job.preflight(model, [(d.x, d.y)], nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(d.x), d.y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("linear",))
def cancer_logistic_regression(job: Job) -> float:
    """One linear unit that starts at zero, BCE, SGD."""
    d = data.table("breast_cancer")
    model = nn.Linear(30, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    criterion = nn.BCEWithLogitsLoss()
    loader = data.loader(d.x, d.y.float()[:, None], 32, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(25):
        for x, y in guard.batches(loader):
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y.float()[:, None]))
    with torch.no_grad():
        return ((model(d.test_x).squeeze(1) > 0) == d.test_y.bool()).float().mean().item()


@program(healthy=True, bar=-1e-6, families=("mlp", "convergence"))
def wine_far_past_convergence(job: Job) -> float:
    """Trained until the loss is some 1e-8: gradients vanish because there is nothing left to learn."""
    d = data.table("wine")
    model = mlp(13, 64, 64, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 48, job.generator), 1500)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return -data.mean_loss(model, nn.CrossEntropyLoss(), d.x, d.y)


@program(healthy=True, bar=-1e-2, families=("mlp", "overfit"))
def digits_overfit_one_batch(job: Job) -> float:
    """The usual check of a new network: 16 samples until they are known by heart."""
    d = data.digits()
    x, y = d.x[:16], d.y[:16]
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    job.preflight(model, [(x, y)], nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(600):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return -data.mean_loss(model, nn.CrossEntropyLoss(), x, y)
