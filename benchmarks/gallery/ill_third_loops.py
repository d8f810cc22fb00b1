"""Ill programs, third set: loops, optimizers, schedules, precision and models. Written blind: nothing of the guard was read or run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import GPT, Block, CharRNN, ConvNet, mlp
from gallery.registry import Job, program

NAN = {"nonfinite_loss", "nonfinite_gradient", "nonfinite_activation", "nonfinite_weight"}
FAST = {"update_ratio_high", "exploding_gradient", "diverging_loss", "loss_spike", "oscillating_loss"} | NAN
FLAT = {"loss_plateau", "learning_bottleneck", "constant_loss"}
RATE = ("learning rate too high", "learning rate too high to settle", "exploding gradient", "weights or learning rate too large")
SLOW = ("learning rate too low", "learning rate schedule", "learning rate is zero")
SAME = ("same output for every sample", "the same output for every sample", "dead, saturated or constant weights", "constant weights or identical inputs")
DEAD = (*SAME, "weights all zero", "weights all equal", "bias or initialisation", "loss function or initialisation", "dead units", "zero gradient")


def train(
    job: Job, model: nn.Module, optimizer: Any, batches: Iterable[Any], criterion: Callable[..., Tensor] = F.cross_entropy, *,
    after: Callable[[int], None] | None = None, validate: Callable[[], float] | None = None, every: int = 20,
) -> None:  # fmt: skip
    """A plain loop under a guard. after: called with the number of steps done; validate: a loss, told every so many steps."""
    guard = job.guard(model, optimizer)
    for done, (x, y) in enumerate(guard.batches(batches), 1):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after:
            after(done)
        guard.step(loss)
        if validate and done % every == 0:
            guard.validation(validate())


class Last(nn.Module):
    """A linear layer on the last state of a recurrent net."""

    def __init__(self, rnn: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, features) -> (B, outputs)."""
        return self.head(self.rnn(x)[0][:, -1])


def characters(out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of (B, T, V) logits."""
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def passages(length: int = 32) -> tuple[Callable[[Job, int], Iterator[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor], int]:
    """Batches of the text's first nine tenths, 64 held-out passages, and the number of letters."""
    stream, letters = data.text()
    cut = int(0.9 * len(stream))
    held = stream[cut : cut + 64 * (length + 1)].view(64, length + 1)
    return lambda job, steps: islice(data.windows(stream[:cut], length, 16, job.generator), steps), (held[:, :-1], held[:, 1:]), letters


@program(
    expect={"update_ratio_low", "unchanged_weights", *FLAT}, cause="ReduceLROnPlateau is fed with accuracy, and looks for a minimum", causes=SLOW, bar=-2.5,
    enters=30, families=("third", "schedule", "recurrent", "text"),
)  # fmt: skip
def text_gru_plateau_of_rising_accuracy(job: Job) -> float:
    batches, held, letters = passages()
    model = CharRNN(letters, 64, "GRU")
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, job.planted("mode", ill="min", healthy="max"), factor=0.3, patience=1)

    def watch() -> float:
        schedule.step(data.accuracy(model, *held))
        return data.mean_loss(model, characters, *held)

    train(job, model, optimizer, batches(job, 260), characters, validate=watch, every=10)
    return -data.mean_loss(model, characters, *held)


@program(
    expect={"update_ratio_low", "unchanged_weights", *FLAT}, cause="the function given to LambdaLR returns the rate, not a factor: it is squared", causes=SLOW,
    bar=-2.9, families=("third", "schedule", "transformer", "text"),
)  # fmt: skip
def text_lambda_returns_the_rate(job: Job) -> float:
    batches, held, letters = passages()
    model, peak, total, unit = GPT(letters, 32), 3e-3, 250, job.planted("divisor", ill=1.0, healthy=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: peak * min(1.0, (s + 1) / 20, (total - s) / 100) / unit)
    train(job, model, optimizer, batches(job, total), characters, after=lambda _: schedule.step())
    return -data.mean_loss(model, characters, *held)


@program(
    expect={*FAST, *FLAT, "saturated_softmax", "attention_logit_growth", "collapsed_activation"}, bar=-2.7, causes=(*RATE, "learning rate schedule"),
    cause="a Noam schedule with a warm-up of 1 step, under post-norm blocks: the first rates are far too high",
    families=("third", "schedule", "transformer", "text"), repairable=True,
)  # fmt: skip
def text_noam_without_warm_up(job: Job) -> float:
    batches, held, letters = passages()
    model, width, warm_up = GPT(letters, 32, layers=2, pre=False), 48, job.planted("warm_up", ill=1, healthy=150)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=0.6, healthy=0.6), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: width**-0.5 * min((s + 1) ** -0.5, (s + 1) * warm_up**-1.5))
    train(job, model, optimizer, batches(job, 260), characters, after=lambda _: schedule.step())
    value = data.mean_loss(model, characters, *held)
    return -value if math.isfinite(value) else -1e9


@program(
    expect={"update_ratio_low", *FLAT}, cause="a graph convolution at a rate of 2e-6 for 1e-2", causes=SLOW, bar=0.8, families=("third", "graph"),
    repairable=True,
)  # fmt: skip
def graph_convolution_lr_5000x_too_low(job: Job) -> float:
    fixed = torch.Generator().manual_seed(5)
    y = torch.randint(4, (240,), generator=fixed)
    edges = (torch.rand(240, 240, generator=fixed) < torch.where(y[:, None] == y[None], 0.12, 0.01)).float().triu(1)
    spread = F.normalize(edges + edges.T + torch.eye(240), p=1, dim=1)
    x = 0.6 * F.one_hot(y, 4).float() @ torch.randn(4, 12, generator=fixed) + torch.randn(240, 12, generator=fixed)
    model = nn.ModuleDict({"first": nn.Linear(12, 32), "last": nn.Linear(32, 4)})
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=2e-6, healthy=1e-2), weight_decay=5e-4)

    def answer() -> Tensor:
        return spread @ model["last"](F.relu(spread @ model["first"](x)))

    guard = job.guard(model, optimizer)
    for step in range(300):
        loss = F.cross_entropy(answer()[:80], y[:80])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if step % 25 == 24:
            with torch.no_grad():
                guard.validation(F.cross_entropy(answer()[80:], y[80:]).item())
    return (answer()[80:].argmax(1) == y[80:]).float().mean().item()


@program(
    expect={*FAST, "dead_relu", "collapsed_activation", "loss_plateau", "learning_bottleneck"}, cause="a denoiser of convolutions under Adam at 0.3 for 3e-3",
    causes=(*RATE, "wrong labels, or too large a step"), bar=0.6, families=("third", "cnn", "autoencoder"), repairable=True,
)  # fmt: skip
def denoiser_adam_lr_100x(job: Job) -> float:
    d = data.digits("image")
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=0.3, healthy=3e-3))
    noisy = ((x + 0.3 * torch.randn(x.shape, generator=job.generator), x) for x, _ in data.draws(d.x, d.y, 32, 350, job.generator))
    train(job, model, optimizer, noisy, F.mse_loss)
    with torch.no_grad():
        left = F.mse_loss(model(d.test_x + 0.3 * torch.randn(d.test_x.shape, generator=job.generator)), d.test_x)
    return 1 - (left / d.test_x.var()).item()


@program(
    expect={"unchanged_weights"}, cause="the body is unfrozen at step 100, and the optimizer was built from what was trainable before", bar=0.85, enters=100,
    causes=("not given to the optimizer", "frozen by mistake"), families=("third", "cnn", "fine-tune"),
)  # fmt: skip
def convnet_unfrozen_without_an_optimizer(job: Job) -> float:
    d = data.digits("image")
    model, add = ConvNet(12), job.planted("optimizer_parameters", ill=False, healthy=True)
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def unfreeze(done: int) -> None:
        if done == 100:
            model.body.requires_grad_(True)
            if add:
                optimizer.add_param_group({"params": list(model.body.parameters())})

    train(job, model, optimizer, data.draws(d.x, d.y, 32, 340, job.generator), after=unfreeze)
    return data.accuracy(model, d.test_x, d.test_y)


class Lookup(nn.Module):
    """Tokens and one mark among them; the marked token is to be named. listed: the blocks are in a plain list, as no module knows of them."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.tokens, self.mark = nn.Embedding(8, 32), nn.Embedding(2, 32)
        self.blocks = (list if listed else nn.ModuleList)([Block(32, 4, causal=False) for _ in range(3)])
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 2) indices -> (B, 8), read at the first place."""
        return self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.tokens(x[..., 0]) + self.mark(x[..., 1]))[:, 0])


@program(
    expect={"unchanged_weights", *FLAT}, cause="the blocks stand in a Python list: no optimizer ever sees their parameters", bar=0.85,
    causes=("not given to the optimizer", "frozen by mistake", "too little capacity", "too small a model, or gradients cut on the way"),
    families=("third", "transformer", "wiring"),
)  # fmt: skip
def lookup_blocks_in_a_python_list(job: Job) -> float:
    model = Lookup(job.planted("listed", ill=True, healthy=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batches(n: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            tokens, place = torch.randint(8, (n, 10), generator=job.generator), torch.randint(10, (n,), generator=job.generator)
            yield torch.stack([tokens, F.one_hot(place, 10)], -1), tokens[torch.arange(n), place]

    train(job, model, optimizer, batches(64, 300))
    return data.accuracy(model, *next(batches(400, 1)))


@program(
    expect={"unchanged_weights", "collapsed_activation", "vanishing_gradient", "poor_initialization", *FLAT}, bar=-0.6,
    cause="weights are clamped to 0.01 after each step, a line from a Wasserstein critic",
    causes=("weights are overwritten", "vanishing gradient", "weights too small", "weights too small for this depth", "weights do not move", *SAME),
    families=("third", "mlp", "weights"),
)  # fmt: skip
def digits_clamped_like_a_critic(job: Job) -> float:
    d = data.digits()
    model, limit = mlp(64, 96, 96, 10), job.planted("limit", ill=0.01, healthy=10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def clamp(_: int) -> None:
        for p in model.parameters():
            p.data.clamp_(-limit, limit)

    train(job, model, optimizer, data.draws(d.x, d.y, 32, 300, job.generator), after=clamp)
    return -data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y)


@program(
    expect={"unchanged_weights", "missing_zero_grad", "update_ratio_low", *FLAT}, bar=0.85, families=("third", "loader", "wiring"),
    cause="a step after every 32 batches of an epoch that has 23: optimizer.step() is never reached", causes=("optimizer.step() is never called",),
)  # fmt: skip
def digits_accumulation_longer_than_an_epoch(job: Job) -> float:
    d = data.digits()
    model, parts = mlp(64, 48, 10), job.planted("step_every", ill=32, healthy=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = data.loader(d.x, d.y, 64, job.generator)
    guard = job.guard(model, optimizer)
    for _ in range(12):
        for i, (x, y) in enumerate(guard.batches(loader)):
            loss = F.cross_entropy(model(x), y)
            (loss / parts).backward()
            if (i + 1) % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
            guard.step(loss)
        guard.validation(data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(
    expect={"clipping_dominates", "update_ratio_low", "unchanged_weights", *FLAT}, cause="gradients are clipped at 1 while they are still scaled by 65536",
    causes=("clip value too low", "learning rate too low"), bar=0.85, families=("third", "amp", "clipping"),
)  # fmt: skip
def digits_clipped_before_unscale(job: Job) -> float:
    d = data.digits()
    model, unscale = mlp(64, 48, 10), job.planted("unscale_first", ill=False, healthy=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    guard = job.guard(model, optimizer, scaler=scaler)
    for x, y in guard.batches(data.draws(d.x, d.y, 32, 250, job.generator)):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank correction b a; ``a`` begins with this deviation, ``b`` at 0."""

    def __init__(self, base: nn.Linear, deviation: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(deviation * torch.randn(12, base.in_features)), nn.Parameter(torch.zeros(base.out_features, 12))

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its correction."""
        return self.base(x) + x @ self.a.T @ self.b.T


@program(
    expect={"unchanged_weights", "vanishing_gradient", "poor_initialization", *FLAT}, cause="both factors of the low-rank adapters begin at 0", bar=0.85,
    causes=("weights all zero", "weights all equal", "bias or initialisation", "loss function or initialisation", "dead, saturated or constant weights",
            "zero gradient", "no gradient", "vanishing gradient"), families=("third", "fine-tune", "initialisation"),
)  # fmt: skip
def digits_adapters_of_two_zeros(job: Job) -> float:
    d = data.digits()
    model = mlp(64, 64, 10)
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in data.draws(d.x, d.y, 32, 200, job.generator):
        F.cross_entropy(model(x), y).backward()
        first.step()
        first.zero_grad()
    deviation = job.planted("init_scale", ill=0.0, healthy=0.1)
    model = nn.Sequential(Adapted(model[0], deviation), nn.ReLU(), Adapted(model[2], deviation))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    train(job, model, optimizer, data.draws(d.x, 9 - d.y, 32, 300, job.generator))  # another customer counts from the other end
    return data.accuracy(model, d.test_x, 9 - d.test_y)


@program(
    expect={"collapsed_activation", "dead_relu", "unchanged_weights", "vanishing_gradient", "poor_initialization", *FLAT}, bar=0.9, causes=DEAD,
    cause="every one-dimensional parameter is set to 0: not only biases, also the gains of the batch norms", families=("third", "cnn", "initialisation"),
)  # fmt: skip
def convnet_gains_zeroed_with_biases(job: Job) -> float:
    d = data.digits("image")
    model, gains = ConvNet(12), job.planted("zero_gains", ill=True, healthy=False)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
        elif gains or name.endswith("bias"):
            nn.init.zeros_(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(job, model, optimizer, data.draws(d.x, d.y, 32, 260, job.generator))
    return data.accuracy(model, d.test_x, d.test_y)


@program(
    expect={"vanishing_gradient", "poor_initialization", "collapsed_activation", *FLAT}, bar=0.9,
    cause="the recurrent matrix begins at deviation 0.02, as in a transformer: nothing of the first input arrives 30 places later",
    causes=("vanishing gradient", "weights too small", "weights too small for this depth", "bias or initialisation", "loss function or initialisation",
            "depth without normalisation", "depth without normalisation or residuals", *SAME[:2]),
    families=("third", "recurrent", "initialisation"),
)  # fmt: skip
def recall_recurrent_matrix_of_gpt(job: Job) -> float:
    model = Last(nn.RNN(5, 32, nonlinearity="relu", bias=False, batch_first=True), 32, 4)
    begin = job.planted("begin", ill=lambda w: nn.init.normal_(w, 0.0, 0.02), healthy=nn.init.eye_)
    begin(model.rnn.weight_hh_l0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def batches(n: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            y = torch.randint(4, (n,), generator=job.generator)
            yield torch.cat([F.one_hot(y, 5).float()[:, None], 0.02 * torch.randn(n, 30, 5, generator=job.generator)], 1), y

    train(job, model, optimizer, batches(32, 250))
    return data.accuracy(model, *next(batches(400, 1)))
