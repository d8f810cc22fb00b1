"""Healthy programs written after the rules and measured before the rules were touched: architectures that the other files lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.fresh import explained, fit
from gallery.models import mlp
from gallery.registry import Job, program


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
