"""Healthy programs: generative models, whose losses are negative, adversarial, or never near zero."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


class VAE(nn.Module):
    """64 pixels through two or more latent numbers."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 64, 2 * latent), mlp(latent, 64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of pixels, mean and log-variance."""
        mean, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp()), mean, logvar


@program(healthy=True, bar=-26.0, families=("vae", "generative"))
def vae_digits(job: Job) -> float:
    """The usual VAE: BCE summed over pixels, KL with a weight that warms up over the first half, a dict of two terms."""
    x = data.digits("image").x.flatten(1)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (xb, _) in enumerate(data.draws(x, x, 64, 800, job.generator)):
        out, mean, logvar = model(xb)
        terms = {
            "reconstruction": F.binary_cross_entropy_with_logits(out, xb, reduction="sum") / len(xb),
            "kl": min(1.0, i / 400) * -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean(),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
        last += sum(terms.values()).item() * (i >= 750) / 50
    return -last


@program(healthy=True, bar=20.0, families=("vae", "generative", "nll"))
def vae_gaussian_elbo(job: Job) -> float:
    """A Gaussian decoder with its own variance: the negative ELBO goes far below zero. Scored by the fall."""
    x = data.digits("image").x.flatten(1)
    model = VAE()
    log_sigma = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*model.parameters(), log_sigma], lr=5e-4)
    guard = job.guard(model, optimizer)
    losses = []
    for xb, _ in data.draws(x, x, 64, 1200, job.generator):
        out, mean, logvar = model(xb)
        fit = (0.5 * ((torch.sigmoid(out) - xb) / log_sigma.exp()).square() + log_sigma + 0.5 * math.log(2 * math.pi)).sum(1).mean()
        loss = fit - 0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        losses.append(loss.item())
    return losses[0] - sum(losses[-50:]) / 50


def moment_gap(fake: Tensor, real: Tensor) -> float:
    """Distance of means and of spreads."""
    return ((fake.mean(0) - real.mean(0)).norm() + (fake.std(0) - real.std(0)).norm()).item()


@program(healthy=True, bar=-0.6, families=("gan", "generative"))
def gan_moons_one_guard(job: Job) -> float:
    """A GAN on the moons: both nets under one guard, two optimizers, the sum of both losses."""
    real = data.moons(1000, 0.05).x
    nets = nn.ModuleDict({"generator": mlp(4, 64, 64, 2), "critic": mlp(2, 64, 64, 1, activation=lambda: nn.LeakyReLU(0.2))})
    make, judge = nets["generator"], nets["critic"]
    opt_g = torch.optim.Adam(make.parameters(), lr=5e-4, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(judge.parameters(), lr=5e-4, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    guard = job.guard(nets, [opt_g, opt_d], loss_family="adversarial")
    for x, _ in data.draws(real, real, 128, 900, job.generator):
        fake = make(torch.randn(128, 4))
        loss_d = bce(judge(x), torch.ones(128, 1)) + bce(judge(fake.detach()), torch.zeros(128, 1))
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        loss_g = bce(judge(fake), torch.ones(128, 1))
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        guard.step({"generator": loss_g, "critic": loss_d})
    with torch.no_grad():
        return -moment_gap(make(torch.randn(1000, 4)), real)


@program(healthy=True, bar=-12.0, families=("gan", "generative"))
def gan_digits_undeclared(job: Job) -> float:
    """A GAN on digits; nobody tells the guard what it is, and each net has a guard of its own. Scored by pixel moments."""
    real = data.digits("image").x.flatten(1) * 2 - 1
    make = nn.Sequential(*mlp(16, 64, 128, 64, norm=nn.BatchNorm1d), nn.Tanh())
    judge = mlp(64, 64, 1, activation=lambda: nn.LeakyReLU(0.2), dropout=0.2)
    opt_g = torch.optim.Adam(make.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(judge.parameters(), lr=5e-4, betas=(0.5, 0.999))
    guard_g, guard_d = job.guard(make, opt_g), job.guard(judge, opt_d)
    for x, _ in data.draws(real, real, 64, 600, job.generator):
        fake = make(torch.randn(64, 16))
        loss_d = F.softplus(-judge(x)).mean() + F.softplus(judge(fake.detach())).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        guard_d.step(loss_d)
        loss_g = F.softplus(-judge(fake)).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        guard_g.step(loss_g)
    make.eval()
    with torch.no_grad():
        return -moment_gap(make(torch.randn(1000, 16)), real)


@program(healthy=True, bar=-0.7, families=("gan", "generative"))
def wgan_gradient_penalty(job: Job) -> float:
    """Wasserstein critic, three critic steps for each of the generator's, a gradient penalty by double backward."""
    real = data.moons(1000, 0.05).x
    nets = nn.ModuleList([mlp(4, 64, 64, 2), mlp(2, 64, 64, 1, activation=nn.SiLU)])
    make, judge = nets
    opt_g = torch.optim.Adam(make.parameters(), lr=1e-3, betas=(0.0, 0.9))
    opt_d = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.0, 0.9))
    guard = job.guard(nets, [opt_g, opt_d], loss_family="adversarial")
    source = data.draws(real, real, 128, 2500, job.generator)
    for _ in range(450):
        for _ in range(3):
            x, fake = next(source)[0], make(torch.randn(128, 4)).detach()
            mixed = torch.lerp(x, fake, torch.rand(128, 1)).requires_grad_()
            slope = torch.autograd.grad(judge(mixed).sum(), mixed, create_graph=True)[0].norm(dim=1)
            loss_d = judge(fake).mean() - judge(x).mean() + (slope - 1).square().mean()
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
        loss_g = -judge(make(torch.randn(128, 4))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        guard.step(loss_g + loss_d.detach())
    with torch.no_grad():
        return -moment_gap(make(torch.randn(1000, 4)), real)


@program(healthy=True, bar=0.3, families=("diffusion", "generative"))
def diffusion_moons(job: Job) -> float:
    """Noise is predicted; the loss falls quickly to its floor and stays there. Scored by the explained share of the noise."""
    real = data.moons(1000, 0.05).x
    model = mlp(3, 128, 128, 2, activation=nn.SiLU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    kept = torch.cos(torch.linspace(0.02, 0.98, 50) * math.pi / 2) ** 2
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, _) in enumerate(data.draws(real, real, 128, 1000, job.generator)):
        t = torch.randint(50, (128, 1), generator=job.generator)
        noise = torch.randn(x.shape)
        noisy = kept[t].sqrt() * x + (1 - kept[t]).sqrt() * noise
        loss = F.mse_loss(model(torch.cat([noisy, t / 50], 1)), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 900) / 100
    return 1 - last


class Coupling(nn.Module):
    """An affine coupling that starts as the identity."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, mlp(1, 48, 48, 2)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The moved points and the log-determinant."""
        a, b = (x[:, 1:], x[:, :1]) if self.flip else (x[:, :1], x[:, 1:])
        shift, scale = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale) * 2
        b = b * scale.exp() + shift
        return (torch.cat([b, a], 1) if self.flip else torch.cat([a, b], 1)), scale.squeeze(1)


@program(healthy=True, bar=0.7, families=("flow", "generative", "nll"))
def flow_moons(job: Job) -> float:
    """A normalising flow of six couplings with zero-initialised ends. Scored by the gain over a Gaussian."""
    real = data.moons(1000, 0.05).x
    real = (real - real.mean(0)) / real.std(0)
    model = nn.ModuleList([Coupling(bool(i % 2)) for i in range(6)])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, _) in enumerate(data.draws(real, real, 128, 900, job.generator)):
        total = torch.zeros(len(x))
        for layer in model:
            x, logdet = layer(x)
            total = total + logdet
        loss = (0.5 * x.square().sum(1) + math.log(2 * math.pi) - total).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 850) / 50
    return 1 + math.log(2 * math.pi) - last


@program(healthy=True, bar=-0.4, families=("autoregressive", "generative"))
def pixels_made(job: Job) -> float:
    """A masked autoregressive net over binary pixels: the masked half of each matrix has no gradient."""
    x = (data.digits("image").x.flatten(1) > 0.5).float()

    class Masked(nn.Linear):
        def __init__(self, a: Tensor, b: Tensor, strict: bool) -> None:
            super().__init__(len(a), len(b))
            self.register_buffer("mask", (b[:, None] > a if strict else b[:, None] >= a).float())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask, self.bias)

    pixels, hidden = torch.arange(64), torch.arange(128) % 63
    model = nn.Sequential(Masked(pixels, hidden, False), nn.ReLU(), Masked(hidden, pixels, True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for xb, _ in guard.batches(data.draws(x, x, 64, 700, job.generator)):
        loss = F.binary_cross_entropy_with_logits(model(xb), xb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return -data.mean_loss(model, nn.BCEWithLogitsLoss(), x, x)
