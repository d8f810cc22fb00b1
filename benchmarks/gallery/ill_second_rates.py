"""Ill programs, second set: rates, schedules, scales and numbers out of hand. What is expected was written before it was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.fresh import explained
from gallery.healthy_second_representations import moved, neighbour
from gallery.healthy_second_sequences import Llama, Translator
from gallery.ill_tools import Recurrent, accuracy, convnet, digits, fit, images, mlp, rows, shuffled
from gallery.models import Block, CharRNN
from gallery.registry import Job, program

NAN = {"nonfinite_loss", "nonfinite_gradient", "nonfinite_activation", "nonfinite_weight"}
FAST = {"update_ratio_high", "exploding_gradient", "diverging_loss", "loss_spike", "oscillating_loss"} | NAN
STILL = {"loss_plateau", "learning_bottleneck", "constant_loss"}
RATE = ("learning rate too high", "exploding gradient")
SLOW = ("learning rate too low", "learning rate schedule", "learning rate is zero")
Batches = Iterator[tuple[Tensor, Tensor]]


class Vit(nn.Module):
    """Sixteen patches, a block, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.place = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.blocks = nn.Sequential(*(Block(32, 4, causal=False) for _ in range(1)))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2) + self.place).mean(1))


@program(
    expect={*FAST, "saturated_softmax", "attention_logit_growth", "collapsed_activation", "loss_plateau"}, cause="a one-cycle peak copied from an SGD recipe",
    causes=RATE, bar=0.88, families=("second", "transformer", "schedule"), repairable=True,
)  # fmt: skip
def vit_one_cycle_peak_from_sgd(job: Job) -> float:
    d = images()
    model = Vit()
    peak = job.planted("lr", ill=0.4, healthy=4e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=301)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"update_ratio_low", *STILL}, cause="a learning rate of 2e-6 for 4e-3", causes=SLOW, bar=0.5, families=("second", "recurrent"), repairable=True,
)  # fmt: skip
def reversal_lr_2000x_too_low(job: Job) -> float:
    model = Translator(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=2e-6, healthy=4e-3))
    guard = job.guard(model, optimizer)
    for _ in range(300):
        x = torch.randint(8, (48, 5), generator=job.generator)
        loss = F.cross_entropy(model(x, x.flip(1), 1.0, job.generator).flatten(0, 1), x.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        x = torch.randint(8, (300, 5), generator=job.generator)
        return (model(x, x.flip(1), 1.0, job.generator).argmax(-1) == x.flip(1)).float().mean().item()


@program(
    expect={"unchanged_weights", "update_ratio_low", *STILL}, cause="a polynomial decay over 12 epochs is stepped by batch: the rate is 0 from step 12 on",
    causes=SLOW, bar=0.9, enters=12, families=("second", "schedule", "cnn"),
)  # fmt: skip
def convnet_polynomial_decay_by_batch(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    total = job.planted("total_iters", ill=12, healthy=12 * 21)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, 1.0)
    fit(job, model, optimizer, shuffled(d.x, d.y), 252, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*FAST, *STILL}, cause="Adam's betas are swapped: 0.999 for the mean, 0.9 for the square", bar=0.98, families=("second", "momentum"),
    causes=("momentum too high", *RATE),
)  # fmt: skip
def convnet_adam_betas_swapped(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=job.planted("betas", ill=(0.999, 0.9), healthy=(0.9, 0.999)))
    fit(job, model, optimizer, shuffled(d.x, d.y), 350)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"saturated_softmax", *FAST, *STILL, "initial_loss_off", "attention_logit_growth"}, cause="a temperature of 0.0005 for 0.5",
    causes=("logits out of scale", *RATE), bar=0.93, families=("second", "contrastive"),
)  # fmt: skip
def simclr_temperature_of_nothing(job: Job) -> float:
    d = data.digits()
    model = mlp((64, 96, 96, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    temperature = job.planted("temperature", ill=5e-4, healthy=0.5)
    guard = job.guard(model, optimizer)
    for x, _ in data.draws(d.x, d.y, 64, 350, job.generator):
        z = F.normalize(model(torch.cat([moved(x, job.generator), moved(x, job.generator)])), dim=1)
        logits = (z @ z.T).masked_fill(torch.eye(128, dtype=torch.bool), -1e4) / temperature
        loss = F.cross_entropy(logits, (torch.arange(128) + 64) % 128)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return neighbour(model, d) if all(p.isfinite().all() for p in model.parameters()) else 0.0


@program(
    expect={"clipping_dominates", "update_ratio_low", *STILL}, cause="gradients are clipped at 1e-4 under SGD", causes=("clip value too low",), bar=0.8,
    families=("second", "clipping", "recurrent"), repairable=True,
)  # fmt: skip
def rows_gru_clipped_at_1e_4(job: Job) -> float:
    d = rows()
    model = Recurrent(nn.GRU, 8, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y), 350, clip=job.planted("max_norm", ill=1e-4, healthy=1.0))
    return accuracy(model, d.held_x, d.held_y)


class Tower(nn.Module):
    """Forty residual branches without a norm; each has its inner part and its gain."""

    def __init__(self, gain: float, depth: int = 40) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(mlp((64, 64, 64)) for _ in range(depth))
        for block in self.blocks:
            nn.init.kaiming_normal_(block[0].weight)
            nn.init.normal_(block[2].weight, 0.0, gain / 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


@program(
    expect={*FAST, "initial_loss_off", "poor_initialization", "saturated_softmax", "overflow_risk", "dead_relu"}, bar=0.85,
    cause="forty residual branches at full size without a norm: the stream grows a thousand times and more", families=("second", "deep"),
    causes=("weights too large", "depth without normalisation", "depth without normalisation or residuals", "initialisation", "logits out of scale", *RATE),
)  # fmt: skip
def digits_residual_stream_explodes(job: Job) -> float:
    d = digits()
    model = Tower(job.planted("branch_gain", ill=1.4, healthy=0.02))
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*FAST, "initial_loss_off", "dead_relu"}, cause="squared errors are summed over pixels and batch, at the rate of a mean",
    causes=("sum reduction", *RATE), bar=0.3, families=("second", "autoencoder"), repairable=True,
)  # fmt: skip
def autoencoder_sum_over_everything(job: Job) -> float:
    d = digits()
    model = mlp((64, 48, 16, 48, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=job.planted("lr", ill=0.5, healthy=0.5), momentum=0.9)
    reduction = job.planted("loss_reduction", ill="sum", healthy="mean")

    def summed(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y, reduction=reduction)

    fit(job, model, optimizer, shuffled(d.x, d.x), 600, summed)
    with torch.no_grad():
        value = 1 - float((model(d.held_x) - d.held_x).square().mean() / d.held_x.var(0).mean())
    return value if math.isfinite(value) else -1e9


@program(
    expect={*STILL, "collapsed_activation", "vanishing_gradient", "update_ratio_high"}, cause="a weight decay of 0.3 under SGD", bar=1.0,
    causes=("weight decay too high", "over-regularised", "same output for every sample"), families=("second", "text", "decay"), repairable=True,
)  # fmt: skip
def text_lstm_decay_of_a_third(job: Job) -> float:
    stream, size = data.text()
    model = CharRNN(size, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=job.planted("weight_decay", ill=0.03, healthy=1e-6))
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, y) in zip(range(350), data.windows(stream, 32, 16, job.generator)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 310) / 40
    return 4.0 - last


@program(
    expect={"initial_loss_off", "saturated_softmax", "poor_initialization", "update_ratio_low", "update_ratio_high", "exploding_gradient"}, bar=1.6,
    cause="a tied embedding keeps torch's deviation of 1: the first loss is near 40", families=("second", "transformer", "text"),
    causes=("output layer too large", "logits out of scale", "initialisation", "weights too large"),
)  # fmt: skip
def text_tied_embedding_of_deviation_1(job: Job) -> float:
    stream, size = data.text()
    model = Llama(size, layers=1)
    nn.init.normal_(model.embed.weight, 0.0, job.planted("embedding_std", ill=1.0, healthy=0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, y) in zip(range(300), guard.batches(data.windows(stream, 32, 16, job.generator))):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 260) / 40
    return 4.0 - last


class PostNorm(nn.Module):
    """Six post-norm blocks over characters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(size, 48), nn.Embedding(32, 48), nn.Linear(48, size)
        self.blocks = nn.Sequential(*(Block(48, 4, causal=True, pre=False) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, size)."""
        return self.head(self.blocks(self.embed(x) + self.place.weight[: x.shape[1]]))


@program(
    expect={*FAST, *STILL, "vanishing_gradient", "attention_logit_growth", "collapsed_activation", "saturated_softmax"},
    cause="six post-norm blocks under Adam at 0.01 without a warm-up: nothing but the frequencies is learned", bar=0.95,
    causes=(*RATE, "same output for every sample", "depth without normalisation or residuals"), families=("second", "transformer", "text"), repairable=True,
)  # fmt: skip
def text_post_norm_without_warm_up(job: Job) -> float:
    stream, size = data.text()
    model = PostNorm(size)
    peak, warm = job.planted("lr", ill=1e-2, healthy=1e-3), 40 if job.twin else 1
    optimizer = torch.optim.Adam(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warm))
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, y) in zip(range(200), data.windows(stream, 24, 8, job.generator)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
        last += loss.item() * (i >= 160) / 40
    return 4.0 - last


@program(
    expect=NAN, cause="a variance through a ReLU, without a floor: a division by 0 and log 0", causes=("loss function",), bar=0.5,
    families=("second", "regression", "loss"), repairable=True,
)  # fmt: skip
def friedman_variance_through_relu(job: Job) -> float:
    g = torch.Generator().manual_seed(4)
    x = torch.rand(2000, 5, generator=g)
    y = torch.sin(3 * x[:, 0] * x[:, 1]) + 2 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.05 * torch.randn(2000, generator=g)
    d = data.split(x, (y - y.mean()) / y.std())
    model = mlp((5, 48, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    eps = job.planted("eps", ill=0.0, healthy=1e-2)

    def nll(out: Tensor, y: Tensor) -> Tensor:
        variance = F.relu(out[:, 1]) + eps
        return (0.5 * (out[:, 0] - y).square() / variance + 0.5 * variance.log()).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y), 400, nll)
    with torch.no_grad():
        value = explained(model(d.test_x)[:, 0], d.test_y)
    return value if math.isfinite(value) else -1e9


@program(
    expect=NAN, cause="a mixture's likelihood as the log of a sum of exps by hand: far targets have probability 0", causes=("loss function", "underflow"),
    bar=-4.0, families=("second", "regression", "loss"), repairable=True,
)  # fmt: skip
def diabetes_mixture_density_underflows(job: Job) -> float:
    d = data.raw_table("diabetes")
    x, y = data.table("diabetes").x, d.y / 20
    model = mlp((10, 32, 9), nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    eps = job.planted("eps", ill=0.0, healthy=1e-12)

    def nll(out: Tensor, y: Tensor) -> Tensor:
        share, mean, log = out.chunk(3, 1)
        spread = F.softplus(log) + 0.05
        density = torch.exp(-0.5 * ((y - mean) / spread).square()) / (spread * 2.5066)
        return -((share.softmax(1) * density).sum(1) + eps).log().mean()

    fit(job, model, optimizer, shuffled(x, y), 500, nll)
    with torch.no_grad():
        value = -float(nll(model(x), y))
    return value if math.isfinite(value) else -1e9
