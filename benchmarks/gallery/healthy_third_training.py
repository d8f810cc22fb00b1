"""Healthy programs, third set: unusual ways of training. Local rules, gradients made by hand, late and sparse ones, odd labels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


def with_label(x: Tensor, y: Tensor) -> Tensor:
    """An image beside a claimed label."""
    return torch.cat([3 * F.one_hot(y, 10).float(), x], 1)


@program(healthy=True, bar=0.8, families=("third", "local"))
def digits_forward_forward(job: Job) -> float:
    """Hinton's forward-forward: each layer has an optimizer and a goodness of its own, and no gradient goes from layer to layer."""
    d = data.digits()
    layers = nn.ModuleList([nn.Linear(74, 160), nn.Linear(160, 160)])
    optimizers = [torch.optim.Adam(layer.parameters(), lr=3e-3) for layer in layers]
    guard = job.guard(layers, optimizers)
    for x, y in data.endless(data.loader(d.x, d.y, 128, job.generator), 600):
        wrong = (y + torch.randint(1, 10, y.shape, generator=job.generator)) % 10
        h, sign = torch.cat([with_label(x, y), with_label(x, wrong)]), torch.cat([torch.ones(len(x)), -torch.ones(len(x))])
        total = torch.zeros(())
        for layer, optimizer in zip(layers, optimizers):
            h = F.relu(layer(F.normalize(h.detach()) * math.sqrt(h.shape[1])))
            loss = F.softplus(-sign * (h.square().mean(1) - 1) * 4).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        guard.step(total)
    with torch.no_grad():
        goodness = torch.zeros(len(d.test_x), 10)
        for k in range(10):
            h = with_label(d.test_x, torch.full_like(d.test_y, k))
            for layer in layers:
                h = F.relu(layer(F.normalize(h) * math.sqrt(h.shape[1])))
                goodness[:, k] += h.square().mean(1)
    return (goodness.argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.9, families=("third", "local"))
def digits_direct_feedback(job: Job) -> float:
    """Direct feedback alignment: fixed random matrices carry the error back, gradients are written by hand, autograd is never used."""
    d = data.digits()
    model = mlp(64, 100, 100, 10, activation=nn.Tanh)
    one, two, three = (m for m in model if isinstance(m, nn.Linear))
    ways = [torch.randn(10, 100, generator=job.generator) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = job.guard(model, optimizer)
    with torch.no_grad():
        for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 600)):
            h1 = torch.tanh(one(x))
            h2 = torch.tanh(two(h1))
            out = three(h2)
            loss = F.cross_entropy(out, y)
            error = (out.softmax(1) - F.one_hot(y, 10)) / len(x)
            blames = [error @ ways[0] * (1 - h1**2), error @ ways[1] * (1 - h2**2), error]
            for layer, inputs, blame in zip((one, two, three), (x, h1, h2), blames):
                layer.weight.grad, layer.bias.grad = blame.T @ inputs, blame.sum(0)
            optimizer.step()
            guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.85, families=("third", "gradient-free"))
def digits_evolution_strategy(job: Job) -> float:
    """Antithetic evolution strategy: 40 perturbed copies under vmap give the gradient, the loss has no graph at all."""
    d = data.digits()
    model = mlp(64, 16, 10, activation=nn.Tanh).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = job.guard(model, optimizer)

    for x, y in data.endless(data.loader(d.x, d.y, 128, job.generator), 600):
        weights = dict(model.named_parameters())
        noise = {k: torch.randn(20, *w.shape, generator=job.generator) for k, w in weights.items()}
        crowd = {k: torch.cat([w + 0.05 * noise[k], w - 0.05 * noise[k]]) for k, w in weights.items()}
        losses = vmap(lambda w, x=x, y=y: F.cross_entropy(functional_call(model, w, (x,)), y))(crowd)
        slope = (losses[:20] - losses[20:]) / (2 * 0.05 * 20)
        for k, w in weights.items():
            w.grad = torch.tensordot(slope, noise[k], 1)
        optimizer.step()
        guard.step(losses.mean())
    return data.accuracy(model, d.test_x, d.test_y)


class DoG(torch.optim.Optimizer):
    """Distance over gradients: the rate is how far the weights have come, over the root of all squared gradients."""

    def __init__(self, parameters: Any, start: float = 1e-5) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.far, self.power = start, 0.0
        self.origin = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step along the gradient."""
        weights = [p for g in self.param_groups for p in g["params"]]
        self.far = max(self.far, math.sqrt(sum(float((p - o).square().sum()) for p, o in zip(weights, self.origin))))
        self.power += sum(float(p.grad.square().sum()) for p in weights)
        for p in weights:
            p -= self.far / math.sqrt(self.power + 1e-8) * p.grad


@program(healthy=True, bar=0.9, families=("third", "optimizer"))
def digits_distance_over_gradients(job: Job) -> float:
    """No learning rate at all: the first steps are a hundred-thousandth long and nothing moves, then they grow by themselves."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = DoG(model.parameters())
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 900):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW in short: gradients are taken at y, between the iterate z and its average x."""

    def __init__(self, parameters: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """The weights hold y before and after."""
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s["z"], s["x"], s["v"] = p.clone(), p.clone(), torch.zeros_like(p)
                s["v"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                s["z"] -= group["lr"] * p.grad / ((s["v"] / (1 - 0.99**self.count)).sqrt() + 1e-8)
                s["x"].lerp_(s["z"], 1 / self.count)
                p.copy_(torch.lerp(s["z"], s["x"], group["beta"]))

    @torch.no_grad()
    def show(self, which: str) -> None:
        """Put the average ``x`` into the weights, or ``y`` back."""
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                p.copy_(s["x"] if which == "x" else torch.lerp(s["z"], s["x"], group["beta"]))


@program(healthy=True, bar=0.93, families=("third", "optimizer"))
def digits_schedule_free(job: Job) -> float:
    """A schedule-free optimizer: weights are swapped for their average at each validation and back, behind everybody's back."""
    d = data.digits()
    model = mlp(64, 96, 96, 10, activation=nn.GELU)
    optimizer = ScheduleFree(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 600))):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (i + 1) % 40 == 0:
            optimizer.show("x")
            guard.validation(data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y))
            optimizer.show("y")
    optimizer.show("x")
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("third", "gradients"))
def digits_one_percent_of_the_gradient(job: Job) -> float:
    """Compressed communication: only the largest hundredth of each gradient is applied, the rest is kept for later (error feedback)."""
    d = data.digits()
    model = mlp(64, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rest = [torch.zeros_like(p) for p in model.parameters()]
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 900):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        for r, p in zip(rest, model.parameters()):
            r += p.grad
            bound = r.abs().flatten().topk(math.ceil(0.01 * r.numel())).values[-1]
            p.grad = torch.where(r.abs() >= bound, r, 0.0)
            r -= p.grad
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("third", "multitask"))
def digits_gradient_surgery(job: Job) -> float:
    """PCGrad: a gradient for each of three tasks, conflicts projected away, the sum set by hand into ``.grad``."""
    d = data.digits()
    model = mlp(64, 96, 10 + 2 + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    weights = list(model.parameters())
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 500):
        out = model(x)
        terms = {
            "digit": F.cross_entropy(out[:, :10], y),
            "even": F.cross_entropy(out[:, 10:12], y % 2),
            "ink": F.mse_loss(out[:, 12], 3 * x.mean(1)),
        }
        flat = [torch.cat([g.flatten() for g in torch.autograd.grad(t, weights, retain_graph=True)]) for t in terms.values()]
        total = torch.zeros_like(flat[0])
        for i, g in enumerate(flat):
            for j in torch.randperm(3, generator=job.generator).tolist():
                if j != i and (dot := g @ flat[j]) < 0:
                    g = g - dot / flat[j].square().sum() * flat[j]
            total += g
        for p, g in zip(weights, total.split([p.numel() for p in weights])):
            p.grad = g.reshape(p.shape)
        optimizer.step()
        guard.step(terms)
    return (model(d.test_x)[:, :10].argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.9, families=("third", "schedule"))
def digits_recipe_of_2012(job: Job) -> float:
    """The dropout paper's recipe: a rate of 3 that decays, momentum from 0.5 to 0.95 with damping, and columns held to a largest norm."""
    d = data.digits()
    model = nn.Sequential(nn.Dropout(0.2), *mlp(64, 200, 200, 10, dropout=0.5))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0.0, 0.05)
            nn.init.zeros_(m.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.5, dampening=0.5)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.endless(data.loader(d.x, d.y, 100, job.generator), 700)):
        momentum = min(0.95, 0.5 + 0.45 * i / 300)
        optimizer.param_groups[0].update(lr=3.0 * 0.997**i, momentum=momentum, dampening=momentum)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        with torch.no_grad():
            for m in model:
                if isinstance(m, nn.Linear):
                    m.weight.renorm_(2, 0, 2.0)
        if (i + 1) % 50 == 0:
            guard.validation(data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.92, families=("third", "gradients"))
def digits_gradients_come_late(job: Job) -> float:
    """Asynchronous workers: the gradient that is applied was taken four steps ago; the first four steps change nothing."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    guard = job.guard(model, optimizer)
    waiting: list[list[Tensor]] = []
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 700)):
        loss = F.cross_entropy(model(x), y)
        waiting.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        if len(waiting) > 4:
            for p, g in zip(model.parameters(), waiting.pop(0)):
                p.grad = g
            optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Growing(nn.Module):
    """Six residual blocks of which the first few are used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.active = nn.Linear(64, 48), nn.Linear(48, 10), 1
        self.blocks = nn.ModuleList([mlp(48, 96, 48) for _ in range(6)])
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        h = self.stem(x)
        for block in self.blocks[: self.active]:
            h = h + block(F.layer_norm(h, (48,)))
        return self.head(F.layer_norm(h, (48,)))


@program(healthy=True, bar=0.93, families=("third", "growing"))
def digits_blocks_join_later(job: Job) -> float:
    """Progressive stacking: a block joins every 80 steps; until then its weights, which are in the optimizer, have no gradient at all."""
    d = data.digits()
    model = Growing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(data.endless(data.loader(d.x, d.y, 64, job.generator), 560)):
        model.active = min(6, 1 + i // 80)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Uncertain(nn.Module):
    """A linear layer whose weights are Gaussians, drawn anew in each pass."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.mean, self.raw = nn.Parameter(torch.randn(b, a) / math.sqrt(a)), nn.Parameter(torch.full((b, a), -4.0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, a) -> (B, b), by the weights' means in eval mode."""
        return F.linear(x, self.mean + F.softplus(self.raw) * torch.randn_like(self.raw) if self.training else self.mean)

    def divergence(self) -> Tensor:
        """From a prior of width 0.2."""
        width = F.softplus(self.raw)
        return (math.log(0.2) - width.log() + (width.square() + self.mean.square()) / 0.08 - 0.5).sum()


@program(healthy=True, bar=0.9, families=("third", "bayes"))
def digits_bayes_by_backprop(job: Job) -> float:
    """Bayes by backprop, the bound over the whole data set: a loss of 11000, of which two thirds are a divergence that falls slowly."""
    d = data.digits()
    model = nn.Sequential(Uncertain(64, 48), nn.ReLU(), Uncertain(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 600):
        loss = len(d.x) * F.cross_entropy(model(x), y) + sum(m.divergence() for m in model if isinstance(m, Uncertain))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)
