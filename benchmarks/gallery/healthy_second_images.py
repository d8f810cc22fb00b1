"""Healthy programs, second set: images as people train them. Augmented, pruned, quantised, averaged, grown, detected."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import ConvNet, mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.93, families=("second", "schedule", "cnn"))
def convnet_one_cycle_nesterov_cutout(job: Job) -> float:
    """One-cycle with Nesterov momentum to a peak of 0.3, a square cut out of every image, label smoothing, per-epoch validation."""
    d = data.digits("image")
    model = ConvNet(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader, epochs = data.loader(d.x, d.y, 64, job.generator, drop_last=True), 14
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, epochs=epochs, steps_per_epoch=len(loader), pct_start=0.3)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    guard = job.guard(model, optimizer)
    for _ in range(epochs):
        model.train()
        for x, y in guard.batches(loader):
            x = x.clone()
            top, left = torch.randint(0, 6, (2, len(x)), generator=job.generator)
            for i in range(len(x)):
                x[i, :, top[i] : top[i] + 3, left[i] : left[i] + 3] = 0
            loss = criterion(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            guard.step(loss)
        model.eval()
        with torch.no_grad():
            out = model(d.test_x)
        guard.validation(criterion(out, d.test_y).item(), accuracy=(out.argmax(1) == d.test_y).float().mean().item())
    return data.accuracy(model, d.test_x, d.test_y)


class Scaled(nn.Module):
    """A residual branch that begins a ten-thousandth as large as it could be, and that is left out in some steps."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(width), mlp(width, 2 * width, width, activation=nn.GELU)
        self.gamma, self.drop = nn.Parameter(1e-4 * torch.ones(width)), drop

    def forward(self, x: Tensor) -> Tensor:
        """x + gamma f(x), or x alone for some samples."""
        branch = self.gamma * self.feed(self.norm(x))
        if self.training and self.drop:
            keep = (torch.rand(len(x), 1) >= self.drop).float() / (1 - self.drop)
            branch = branch * keep
        return x + branch


@program(healthy=True, bar=0.93, families=("second", "deep"))
def digits_stochastic_depth_layer_scale(job: Job) -> float:
    """Twelve residual blocks with LayerScale 1e-4 and stochastic depth up to 0.3: gradients of the blocks begin tiny."""
    d = data.digits()
    model = nn.Sequential(nn.Linear(64, 48), *(Scaled(48, 0.3 * i / 11) for i in range(12)), nn.LayerNorm(48), nn.Linear(48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.endless(data.loader(d.x, d.y, 64, job.generator), 350)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (i + 1) / 40)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised each time they are used."""

    def forward(self, x: Tensor) -> Tensor:
        """As a convolution."""
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)


@program(healthy=True, bar=0.93, families=("second", "mixup", "cnn"))
def convnet_weight_standardised_cutmix(job: Job) -> float:
    """Weight standardisation with group norm; a box of another image is pasted in, so the training loss stays far above validation."""
    d = data.digits("image")
    model = nn.Sequential(
        Standardised(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), Standardised(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.endless(data.loader(d.x, d.y, 64, job.generator), 440)):
        other = torch.randperm(len(x), generator=job.generator)
        side = int(torch.randint(2, 7, (), generator=job.generator))
        top, left = (int(torch.randint(0, 9 - side, (), generator=job.generator)) for _ in range(2))
        mixed = x.clone()
        mixed[:, :, top : top + side, left : left + side] = x[other, :, top : top + side, left : left + side]
        share = side * side / 64
        out = model(mixed)
        loss = (1 - share) * F.cross_entropy(out, y) + share * F.cross_entropy(out, y[other])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 44 == 0:
            guard.validation(data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("second", "averaging"))
def digits_validates_averaged_weights(job: Job) -> float:
    """Only the averaged weights (decay 0.99) are validated: their loss lags far behind training at first."""
    d = data.digits()
    model = mlp(64, 96, 10)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.endless(data.loader(d.x, d.y, 64, job.generator), 700)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        with torch.no_grad():
            for slow, p in zip(average.parameters(), model.parameters()):
                slow.lerp_(p, 0.01)
        if (i + 1) % 23 == 0:
            guard.validation(data.mean_loss(average, F.cross_entropy, d.test_x, d.test_y))
    return data.accuracy(average, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("second", "optimizer"))
def digits_lookahead_slow_weights(job: Job) -> float:
    """Lookahead: every five steps the weights go half the way back to the slow ones, behind the optimizer's back."""
    d = data.digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    slow = [p.detach().clone() for p in model.parameters()]
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(guard.batches(data.draws(d.x, d.y, 64, 500, job.generator))):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if (i + 1) % 5 == 0:
            with torch.no_grad():
                for s, p in zip(slow, model.parameters()):
                    s.lerp_(p, 0.5)
                    p.copy_(s)
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.92, families=("second", "sparsity"))
def digits_pruned_in_stages(job: Job) -> float:
    """Each epoch a tenth more of the smallest weights is set to zero and held there, up to 90 percent: the loss steps up each time."""
    d = data.digits()
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = {p: torch.ones_like(p) for p in model.parameters() if p.dim() == 2}
    loader = data.loader(d.x, d.y, 32, job.generator)
    guard = job.guard(model, optimizer)
    for epoch in range(12):
        if epoch:
            for p, mask in masks.items():
                mask.copy_(p.abs() >= p.abs().flatten().quantile(min(0.9, 0.1 * epoch)))
        for x, y in loader:
            with torch.no_grad():
                for p, mask in masks.items():
                    p.mul_(mask)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    with torch.no_grad():
        for p, mask in masks.items():
            p.mul_(mask)
    return data.accuracy(model, d.test_x, d.test_y)


class Quantised(nn.Linear):
    """Weights of 4 bits in the forward pass, full ones behind; the gradient goes straight through."""

    def forward(self, x: Tensor) -> Tensor:
        """As a linear layer."""
        step = self.weight.detach().abs().max() / 7
        rough = (self.weight / step).round() * step
        return F.linear(x, self.weight + (rough - self.weight).detach(), self.bias)


@program(healthy=True, bar=0.92, families=("second", "quantization"))
def digits_four_bit_weights(job: Job) -> float:
    """Quantisation-aware training with 4-bit weights and 8 levels of activation after a float start."""
    d = data.digits()
    model = nn.Sequential(Quantised(64, 96), nn.ReLU6(), Quantised(96, 96), nn.ReLU6(), Quantised(96, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.draws(d.x, d.y, 64, 500, job.generator)):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.88, families=("second", "federated"))
def digits_two_clients_averaged(job: Job) -> float:
    """Two clients, one with digits 0 to 4 and one with 5 to 9, averaged every 10 steps: each round starts with a jump of the loss."""
    d = data.digits()
    clients = [mlp(64, 64, 10) for _ in range(2)]
    clients[1].load_state_dict(clients[0].state_dict())
    parts = [(d.x[d.y < 5], d.y[d.y < 5]), (d.x[d.y >= 5], d.y[d.y >= 5])]
    optimizers = [torch.optim.SGD(c.parameters(), lr=0.05) for c in clients]
    guards = [job.guard(c, o) for c, o in zip(clients, optimizers)]
    for _ in range(60):
        for client, (x, y), optimizer, guard in zip(clients, parts, optimizers, guards):
            for xb, yb in data.draws(x, y, 32, 10, job.generator):
                loss = F.cross_entropy(client(xb), yb)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
        mean = {k: (v + clients[1].state_dict()[k]) / 2 for k, v in clients[0].state_dict().items()}
        for client in clients:
            client.load_state_dict(mean)
    return data.accuracy(clients[0], d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("second", "sampling"))
def convnet_batch_grows(job: Job) -> float:
    """The batch doubles from 8 to 256 instead of the rate falling: noise, and with it the bounce of the loss, ends in stages."""
    d = data.digits("image")
    model = ConvNet(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = job.guard(model, optimizer)
    for size, steps in ((8, 200), (16, 100), (32, 80), (64, 60), (128, 40), (256, 30)):
        for x, y in guard.batches(data.draws(d.x, d.y, size, steps, job.generator)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.92, families=("second", "curriculum"))
def convnet_progressive_resolution(job: Job) -> float:
    """4 x 4 images, then 6 x 6, then 8 x 8, with the same convolutions: the loss jumps as the size changes."""
    d = data.digits("image")
    model = ConvNet(16, norm="group")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 450)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.draws(d.x, d.y, 64, 450, job.generator)):
        side = (4, 6, 8)[min(2, i // 120)]
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True) if side < 8 else x
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Reverse(torch.autograd.Function):
    """The identity; its gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        """x."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """Minus the weighted slope."""
        return -ctx.weight * slope, None


@program(healthy=True, bar=0.6, families=("second", "adversarial"))
def digits_domain_adversarial(job: Job) -> float:
    """Labelled digits and unlabelled inverted ones; a domain head whose gradient is reversed: its loss goes up to log 2 and stays."""
    d = data.digits("image")
    x, held = d.x.flatten(1), 0.7 * d.test_x.flatten(1) + 0.3
    nets = nn.ModuleDict({"body": mlp(64, 96, 48), "label": nn.Linear(48, 10), "domain": mlp(48, 32, 1)})
    optimizer = torch.optim.Adam(nets.parameters(), lr=1e-3)
    guard = job.guard(nets, optimizer)
    for i, (xb, y) in enumerate(data.draws(x, d.y, 64, 600, job.generator)):
        other = 0.7 * x[torch.randint(len(x), (64,), generator=job.generator)] + 0.3
        h = F.relu(nets["body"](torch.cat([xb, other])))
        place = torch.cat([torch.zeros(64), torch.ones(64)])
        guess = nets["domain"](Reverse.apply(h, 0.3 * min(1.0, i / 300))).squeeze(1)
        terms = {"label": F.cross_entropy(nets["label"](h[:64]), y), "domain": F.binary_cross_entropy_with_logits(guess, place)}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
    with torch.no_grad():
        return (nets["label"](F.relu(nets["body"](held))).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.75, families=("second", "detection"))
def digits_detected_on_a_canvas(job: Job) -> float:
    """One digit on a 16 x 16 canvas: objectness of 81 cells (one is right), box offsets, and a class; three losses of unlike size."""
    d = data.digits("image")

    def canvases(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        canvas, at = torch.zeros(len(x), 1, 16, 16), torch.randint(0, 9, (2, len(x)), generator=job.generator)
        for i in range(len(x)):
            canvas[i, :, at[0, i] : at[0, i] + 8, at[1, i] : at[1, i] + 8] = x[i]
        return canvas, at[0] * 9 + at[1]

    model = nn.Sequential(nn.Conv2d(1, 32, 8), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 13, 1))
    nn.init.constant_(model[-1].bias[:1].data, -4.0)  # as RetinaNet's prior: nearly every cell is empty
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for xb, y in data.draws(d.x, d.y, 48, 400, job.generator):
        x, cell = canvases(xb, y)
        out = model(x).flatten(2)
        there = F.one_hot(cell, 81).float()
        mine = out[torch.arange(len(x)), :, cell]
        wanted = torch.stack([cell // 9, cell % 9], 1) / 9
        terms = {
            "object": F.binary_cross_entropy_with_logits(out[:, 0], there, reduction="sum") / len(x),
            "box": 5 * F.smooth_l1_loss(mine[:, 1:3], wanted), "class": F.cross_entropy(mine[:, 3:], y),
        }  # fmt: skip
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
    model.eval()
    with torch.no_grad():
        x, cell = canvases(d.test_x, d.test_y)
        out = model(x).flatten(2)
        best = out[:, 0].argmax(1)
        right = out[torch.arange(len(x)), 3:, best].argmax(1) == d.test_y
    return (right & (best == cell)).float().mean().item()
