"""Ill programs: numbers that stop being numbers. Losses by hand, odd batches, overflow, explosions through time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import (
    Characters,
    Recurrent,
    accuracy,
    digits,
    fit,
    missed,
    mlp,
    pieces,
    r_squared,
    raw,
    shuffled,
    standardised,
    text_score,
)
from gallery.registry import Job, program

NOT_A_NUMBER = {"nonfinite_loss", "nonfinite_gradient", "nonfinite_activation", "nonfinite_weight"}


@program(
    expect=NOT_A_NUMBER, cause="the logarithm of a probability that became 0", causes=("loss function",), bar=0.9, families=("mlp", "loss"),
    repairable=True,
)  # fmt: skip
def cancer_log_of_zero(job: Job) -> float:
    d = standardised("breast_cancer")
    model = mlp((30, 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    eps = job.planted("eps", ill=0.0, healthy=1e-6)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(out[:, 1] * 8)  # a sharp sigmoid: rounds to 1 within some epochs
        return -(y * torch.log(p + eps) + (1 - y) * torch.log(1 - p + eps)).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 250, loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=NOT_A_NUMBER, cause="0 times log 0 in a divergence by hand", causes=("loss function",), bar=0.85, nonfinite=0, fault=missed,
    families=("mlp", "loss"),
)  # fmt: skip
def digits_kl_of_hard_targets(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    eps = job.planted("eps", ill=0.0, healthy=1e-8)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        target = F.one_hot(y, 10).float()
        value = (target * (torch.log(target + eps) - torch.log_softmax(out, 1))).sum(1).mean()
        job.notes["fault"] = not bool(torch.isfinite(value))  # the weights do learn: what is lost is the loss
        return value

    fit(job, model, optimizer, shuffled(d.x, d.y), 200, loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=NOT_A_NUMBER, cause="a batch without a valid place: 0/0", causes=("loss function",), bar=-2.9, enters=130, nonfinite=130,
    families=("transformer",),
)  # fmt: skip
def text_mean_over_no_place(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    least = job.planted("least_divisor", ill=0, healthy=1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(pieces()):
            yield x, torch.where(torch.rand(y.shape) < (2.0 if i == 130 else 0.2), -100, y)  # -100 marks what does not count

    def loss(out: Tensor, y: Tensor) -> Tensor:
        counts = (y != -100).float()
        each = F.cross_entropy(out.transpose(1, 2), y.clamp(min=0), reduction="none")
        return (each * counts / counts.sum().clamp(min=least)).sum()

    fit(job, model, optimizer, batches(), 220, loss)
    return text_score(model)


@program(
    expect=NOT_A_NUMBER, cause="the gradient of a root at 0: a pair of equal inputs", causes=("loss function",), bar=0.5, enters=100, nonfinite=100,
    families=("siamese", "loss"), repairable=True,
)  # fmt: skip
def digits_siamese_distance_zero(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    eps = job.planted("eps", ill=0.0, healthy=1e-6)
    half = len(d.y) // 2
    pairs = zip(shuffled(d.x[:half], d.y[:half]), shuffled(d.x[half:], d.y[half:]))
    with job.guard(model, optimizer) as guard:
        for step, ((x1, y1), (x2, y2)) in enumerate(islice(pairs, 220)):
            if step == 100:
                x2, y2 = torch.cat([x1[:1], x2[1:]]), torch.cat([y1[:1], y2[1:]])  # the same image twice
            guard.batch(torch.cat([x1, x2]))
            distance = torch.sqrt(((model(x1) - model(x2)) ** 2).sum(1) + eps)
            loss = torch.where(y1 == y2, distance**2, F.relu(2 - distance) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    with torch.no_grad():
        near = torch.cdist(model(d.held_x), model(d.x)).argmin(1)
        return float((d.y[near] == d.held_y).float().mean()) if bool(torch.isfinite(model(d.held_x)).all()) else 0.0


@program(expect=NOT_A_NUMBER, cause="a NaN gradient behind torch.where", causes=("loss function",), bar=0.2, families=("regression", "loss"), repairable=True)
def diabetes_where_hides_nan(job: Job) -> float:
    d = standardised("diabetes")
    model = mlp((10, 32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    eps = job.planted("eps", ill=float("-inf"), healthy=1e-6)

    def loss(out: Tensor, y: Tensor) -> Tensor:  # a square root for large errors, a square for small ones
        error = (out.squeeze(1) - y).abs()
        return torch.where(error > 1, 2 * torch.sqrt((error - 1).clamp(min=eps)) + 1, error**2).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 200, loss)
    return r_squared(model, d.held_x, d.held_y)


@program(
    expect=NOT_A_NUMBER | {"exploding_gradient", "update_ratio_high"}, cause="exp of a rate from inputs that are not normalised",
    causes=("input not normalised", "loss function", "exploding gradient"), bar=-0.5, families=("mlp", "poisson"), repairable=True,
)  # fmt: skip
def wine_poisson_exp_overflow(job: Job) -> float:
    normal = job.planted("normalize_input", ill=False, healthy=True)
    d = standardised("wine") if normal else raw("wine")
    model = mlp((13, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (torch.exp(out.squeeze(1)) - y * out.squeeze(1)).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 200, loss)
    with torch.no_grad():
        value = -float(F.mse_loss(torch.exp(model(d.held_x).squeeze(1)), d.held_y.float()))
    return value if value == value else -1e9


def elman(strips: int, gain: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU recurrent net whose state keeps its size times the gain, and the digits as so many strips of pixels."""
    d = digits()
    model = Recurrent(nn.RNN, 64 // strips, 48, 10)
    model.cell = nn.RNN(64 // strips, 48, nonlinearity="relu", batch_first=True)
    nn.init.orthogonal_(model.cell.weight_hh_l0, gain)
    return model, d.x.view(-1, strips, 64 // strips), d.held_x.view(-1, strips, 64 // strips)


@program(
    expect=NOT_A_NUMBER | {"exploding_gradient", "update_ratio_high", "diverging_loss", "poor_initialization", "initial_loss_off"},
    cause="gradients explode through time: a recurrent gain of 8 and no clipping", causes=("exploding gradient", "initialisation", "weights too large"),
    bar=0.7, families=("rnn", "sgd"), repairable=True,
)  # fmt: skip
def rows_rnn_explodes_through_time(job: Job) -> float:
    model, x, held_x = elman(8, job.planted("init_scale", ill=8.0, healthy=1.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, shuffled(x, digits().y), 300, clip=job.planted("max_norm", ill=None, healthy=None))
    return accuracy(model, held_x, digits().held_y)


@program(
    expect=NOT_A_NUMBER | {"exploding_gradient", "update_ratio_high", "diverging_loss", "loss_spike"}, bar=0.8, enters=120, families=("rnn", "sgd"),
    cause="a recurrent net whose rate is 20 times too high from step 120", causes=("exploding gradient", "learning rate too high"),
)  # fmt: skip
def rows_rnn_lr_enters(job: Job) -> float:
    model, x, held_x = elman(8, 1.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    late = job.planted("lr", ill=2.0, healthy=0.1)

    def change(step: int) -> None:
        optimizer.param_groups[0]["lr"] = late if step >= 120 else 0.1

    fit(job, model, optimizer, shuffled(x, digits().y), 300, change=change)
    return accuracy(model, held_x, digits().held_y)


@program(
    expect={"nonfinite_weight", "nonfinite_loss", "nonfinite_activation"}, cause="the learning rate is NaN: a warm-up of 0 steps divides 0 by 0",
    causes=("learning rate is not finite", "learning rate too high"), bar=0.85, families=("mlp", "schedule"), repairable=True,
)  # fmt: skip
def digits_learning_rate_is_nan(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    warm = job.planted("warm_up", ill=0, healthy=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(step: int) -> None:
        factor = torch.tensor(float(step + (warm > 0))) / warm
        optimizer.param_groups[0]["lr"] = 0.1 * float(factor.clamp(max=1))

    fit(job, model, optimizer, shuffled(d.x, d.y), 150, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"nonfinite_activation", "nonfinite_loss", "overflow_risk", "nonfinite_gradient"}, cause="softmax by hand overflows in float32", bar=0.6,
    causes=("overflow in forward", "loss function"), families=("mlp", "softmax"), repairable=True,
)  # fmt: skip
def digits_softmax_by_hand(job: Job) -> float:
    """Two noisy views of each image must find each other, at a temperature of 0.01: similar views have logits of 100."""
    d = digits()
    model = mlp((64, 64, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shift = job.planted("subtract_maximum", ill=0.0, healthy=1.0)
    with job.guard(model, optimizer) as guard:
        for x, _ in guard.batches(islice(shuffled(d.x, d.y), 250)):
            a, b = (F.normalize(model(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2))
            likeness = a @ b.T / 0.01
            e = torch.exp(likeness - shift * likeness.max(1, keepdim=True).values)
            loss = -torch.log(e.diagonal() / e.sum(1) + 1e-12).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    with torch.no_grad():
        near = torch.cdist(F.normalize(model(d.held_x), dim=1), F.normalize(model(d.x), dim=1)).argmin(1)
        return float((d.y[near] == d.held_y).float().mean()) if bool(torch.isfinite(model(d.held_x)).all()) else 0.0


@program(
    expect={"overflow_risk", "nonfinite_activation", "nonfinite_loss", "nonfinite_gradient", "poor_initialization"},
    cause="a residual stream without norm grows by 8 a layer from the start, and overflows float16",
    causes=("range of float16 too small", "overflow in forward", "weights too large"), bar=0.5, families=("mlp", "fp16"), fault=missed,
)  # fmt: skip
def digits_residual_float16_overflow(job: Job) -> float:
    """From step 60 on the activations are kept in float16, and the stream gains size with depth."""
    d = digits()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
            self.half = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            h = h.half() if self.half else h
            for layer in self.layers:
                h = h * gain + F.relu(layer(h.float())).to(h.dtype)
            return self.head(F.layer_norm(h.float(), (32,)))

    gain = job.planted("gain", ill=8.0, healthy=1.0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200, change=lambda step: setattr(model, "half", step >= 60))
    score = accuracy(model, d.held_x, d.held_y)
    job.notes["fault"] = score == 0.0
    return score
