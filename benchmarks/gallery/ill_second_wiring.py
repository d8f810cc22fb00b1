"""Ill programs, second set: wires, data and objectives. What is expected was written before it was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.healthy_generative import VAE, moment_gap
from gallery.healthy_second_representations import moved, neighbour
from gallery.ill_second_rates import FAST, NAN, RATE, STILL
from gallery.ill_tools import accuracy, convnet, digits, fit, images, mlp, rows, shuffled
from gallery.registry import Job, program

Batches = Iterator[tuple[Tensor, Tensor]]


class Towers(nn.Module):
    """Users and items, each through a net of its own; detach: the items' side is cut, as in a target network it was copied from."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.users, self.items, self.detach = (
            nn.Sequential(nn.Embedding(120, 16), mlp((16, 32, 16))),
            nn.Sequential(nn.Embedding(200, 16), mlp((16, 32, 16))),
            detach,
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, 2) -> (B,)."""
        item = self.items(pairs[:, 1])
        return (self.users(pairs[:, 0]) * (item.detach() if self.detach else item)).sum(1)


@program(
    expect={"unchanged_weights"}, cause="the items' tower is detached", causes=("detached from the loss", "no gradient"), bar=0.75,
    families=("second", "wiring", "factorization"),
)  # fmt: skip
def ratings_items_tower_detached(job: Job) -> float:
    g = torch.Generator().manual_seed(6)
    taste, kind = torch.randn(120, 4, generator=g), torch.randn(200, 4, generator=g)
    pairs = torch.stack([torch.randint(120, (8000,), generator=g), torch.randint(200, (8000,), generator=g)], 1)
    like = ((taste[pairs[:, 0]] * kind[pairs[:, 1]]).sum(1) > 0).float()
    model = Towers(job.planted("detach", ill=True, healthy=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(job, model, optimizer, shuffled(pairs[:7000], like[:7000], 128), 600, F.binary_cross_entropy_with_logits)
    with torch.no_grad():
        return ((model(pairs[7000:]) > 0) == (like[7000:] > 0)).float().mean().item()


@program(
    expect={"unchanged_weights"}, cause="the loss of the second task is computed and never added", causes=("no gradient", "detached from the loss"), bar=0.5,
    families=("second", "multitask", "wiring"),
)  # fmt: skip
def digits_second_task_never_added(job: Job) -> float:
    d = data.digits()
    odd, held = (d.y % 2).float(), (d.test_y % 2).float()
    nets = nn.ModuleDict({"body": mlp((64, 96, 64)), "label": nn.Linear(64, 10), "odd": mlp((64, 32, 1))})
    optimizer = torch.optim.Adam(nets.parameters(), lr=2e-3)
    added = job.planted("add_second", ill=False, healthy=True)
    guard = job.guard(nets, optimizer)
    for rows_ in torch.randint(len(d.x), (400, 64), generator=job.generator):
        h = F.relu(nets["body"](d.x[rows_]))
        first, second = F.cross_entropy(nets["label"](h), d.y[rows_]), F.binary_cross_entropy_with_logits(nets["odd"](h).squeeze(1), odd[rows_])
        loss = first + second if added else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        right = ((nets["odd"](F.relu(nets["body"](d.test_x))).squeeze(1) > 0) == (held > 0)).float().mean().item()
    return 2 * right - 1


@program(
    expect={"unchanged_weights"}, cause="the critic's optimizer was built on the generator's parameters", bar=-1.0,
    causes=("not given to the optimizer", "the optimizer holds another model's parameters"), families=("second", "gan", "wiring"),
)  # fmt: skip
def gan_critic_never_given(job: Job) -> float:
    real = data.moons(1000, 0.05).x
    nets = nn.ModuleDict({"make": mlp((4, 64, 64, 2)), "judge": mlp((2, 64, 64, 1), lambda: nn.LeakyReLU(0.2))})
    make, judge = nets["make"], nets["judge"]
    right = job.planted("optimizer_parameters", ill=False, healthy=True)
    opt_g = torch.optim.Adam(make.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam((judge if right else make).parameters(), lr=1e-3, betas=(0.5, 0.999))
    guard = job.guard(nets, [opt_g, opt_d], loss_family="adversarial")
    for x, _ in data.draws(real, real, 128, 500, job.generator):
        fake = make(torch.randn(128, 4))
        loss_d = F.softplus(-judge(x)).mean() + F.softplus(judge(fake.detach())).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        loss_g = F.softplus(-judge(make(torch.randn(128, 4)))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        guard.step({"make": loss_g, "judge": loss_d})
    with torch.no_grad():
        return -moment_gap(make(torch.randn(1000, 4)), real)


@program(
    expect={"negative_loss", *FAST}, cause="the divergence of a VAE is subtracted: the encoder flees from the prior", bar=-28.0,
    families=("second", "vae", "loss"),
    causes=("sign of the loss", "labels or sign of the loss", "a loss term outweighs the others", "a loss term grows", "loss term out of scale", *RATE),
)  # fmt: skip
def vae_divergence_subtracted(job: Job) -> float:
    x = data.digits("image").x.flatten(1)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    sign = job.planted("sign", ill=-1.0, healthy=1.0)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (xb, _) in enumerate(data.draws(x, x, 64, 400, job.generator)):
        out, mean, logvar = model(xb)
        fit_ = F.binary_cross_entropy_with_logits(out, xb, reduction="sum") / len(xb)
        divergence = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
        loss = fit_ + sign * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += (fit_ + divergence).item() * (i >= 360) / 40
    return -last if math.isfinite(last) else -1e9


class Rows(nn.Module):
    """An LSTM over rows of an image; first: whether the batch comes first, as it does in the data."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 64, batch_first=first), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, 8) -> (B, 10)."""
        return self.head(self.rnn(x)[0][:, -1])


@program(
    expect={"cross_sample_leak", *STILL, "cannot_overfit_batch"}, cause="batch_first is forgotten: the recurrence runs over the samples", bar=0.85,
    causes=("samples leak into each other", "labels or targets do not belong to the inputs", "too little capacity"), families=("second", "recurrent", "wiring"),
)  # fmt: skip
def rows_lstm_batch_first_forgotten(job: Job) -> float:
    d = rows()
    model = Rows(job.planted("batch_first", ill=False, healthy=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    job.preflight(model, [(d.x[i : i + 64], d.y[i : i + 64]) for i in range(0, 640, 64)], nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 400)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"missing_zero_grad"}, cause="two optimizers, and only the head's gradients are cleared", causes=("zero_grad() is not called",), bar=0.97,
    families=("second", "cnn", "wiring"),
)  # fmt: skip
def convnet_only_one_optimizer_cleared(job: Job) -> float:
    d = images()
    nets = nn.ModuleDict({"body": convnet()[:-1], "head": nn.Linear(128, 10)})
    opt_b, opt_h = torch.optim.SGD(nets["body"].parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(nets["head"].parameters(), lr=2e-3)
    both = job.planted("zero_grad", ill=False, healthy=True)
    guard = job.guard(nets, [opt_b, opt_h])
    for _, (x, y) in zip(range(250), shuffled(d.x, d.y)):
        opt_h.zero_grad()
        if both:
            opt_b.zero_grad()
        loss = F.cross_entropy(nets["head"](nets["body"](x)), y)
        loss.backward()
        opt_b.step()
        opt_h.step()
        guard.step(loss)
    nets.eval()
    with torch.no_grad():
        return (nets["head"](nets["body"](d.held_x)).argmax(1) == d.held_y).float().mean().item()


@program(
    expect=NAN, cause="a matrix of distances by hand: the root's slope at the zeros of the diagonal", causes=("loss function",), bar=0.85, nonfinite=0,
    families=("second", "metric", "loss"), repairable=True,
)  # fmt: skip
def digits_pairwise_distances_by_hand(job: Job) -> float:
    d = data.digits()
    model = mlp((64, 64, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    eps = job.planted("eps", ill=0.0, healthy=1e-8)

    def near(out: Tensor, y: Tensor) -> Tensor:
        apart = ((out[:, None] - out[None]).square().sum(-1) + eps).sqrt()
        same = (y[:, None] == y[None]) & ~torch.eye(len(y), dtype=torch.bool)
        return (apart * same).sum() / same.sum() + F.relu(2 - apart[y[:, None] != y[None]]).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y), 350, near)
    return neighbour(model, d) if all(p.isfinite().all() for p in model.parameters()) else 0.0


@program(
    expect={"collapsed_activation", *STILL, "vanishing_gradient", "dead_relu", "unchanged_weights"},
    cause="two views are drawn together and nothing holds them apart",
    causes=("same output for every sample", "dead, saturated or constant weights", "dead units", "constant weights or identical inputs", "zero gradient",
            "vanishing gradient", "input does not matter"),
    bar=0.7, families=("second", "siamese", "loss"),
)  # fmt: skip
def digits_views_fall_on_one_point(job: Job) -> float:
    d = data.digits()
    model = mlp((64, 96, 96, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    apart = job.planted("spread_weight", ill=0.0, healthy=1.0)
    guard = job.guard(model, optimizer)
    for x, _ in data.draws(d.x, d.y, 64, 500, job.generator):
        a, b = model(moved(x, job.generator)), model(moved(x, job.generator))
        loss = F.mse_loss(a, b) + apart * F.relu(1 - (torch.cat([a, b]).var(0) + 1e-4).sqrt()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        spread = float(model(d.test_x).std(0).mean())
    return neighbour(model, d) if spread > 0.05 else 0.0


@program(
    expect={"diverging_loss", "loss_spike", "collapsed_activation", "dead_relu", *STILL, "vanishing_gradient", "unchanged_weights"}, enters=150,
    cause="a threshold of the wrong unit prunes a whole layer at step 150", bar=0.8, families=("second", "sparsity"),
    causes=("weights are overwritten", "dead, saturated or constant weights", "weights all zero", "constant weights", "dead units",
            "same output for every sample", "constant weights or identical inputs", "zero gradient"),
)  # fmt: skip
def digits_pruned_to_nothing(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    threshold = job.planted("threshold", ill=5.0, healthy=0.02)
    guard = job.guard(model, optimizer)
    for step, (x, y) in zip(range(320), shuffled(d.x, d.y)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 150:
            with torch.no_grad():
                model[2].weight.mul_(model[2].weight.abs() > threshold)
        guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


class Rounded(nn.Linear):
    """Weights are rounded to 16 levels; straight: the gradient goes past the rounding."""

    straight = True

    def forward(self, x: Tensor) -> Tensor:
        rough = (self.weight * 16).round() / 16
        return F.linear(x, self.weight + (rough - self.weight).detach() if self.straight else rough, self.bias)


@program(
    expect={"unchanged_weights", "vanishing_gradient"}, cause="weights are rounded without a straight-through gradient", bar=0.9,
    causes=("zero gradient", "no gradient", "detached from the loss"), families=("second", "quantization", "wiring"),
)  # fmt: skip
def digits_rounding_stops_the_gradient(job: Job) -> float:
    d = digits()
    model = nn.Sequential(Rounded(64, 96), nn.ReLU(), Rounded(96, 10))
    for layer in (model[0], model[2]):
        layer.straight = job.planted("straight_through", ill=False, healthy=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 350)
    return accuracy(model, d.held_x, d.held_y)
