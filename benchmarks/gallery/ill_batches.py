"""Ill programs: single batches that hold NaN, Inf, or make them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import (
    accuracy,
    convnet,
    fit,
    images,
    mlp,
    r_squared,
    raw,
    rows,
    shuffled,
    standardised,
)
from gallery.registry import Job, program


@program(
    expect={"nonfinite_input"}, cause="batch 120 holds a NaN", causes=("bad input",), bar=0.85, enters=120, nonfinite=120, families=("cnn", "data"),
    repairable=True,
)  # fmt: skip
def digits_cnn_nan_batch(job: Job) -> float:
    d = images()
    drop = job.planted("drop_batch", ill=None, healthy=120)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            if i == 120:
                x[5, 0, 3, 3] = float("nan")
            if i != drop:
                yield x, y

    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, batches(), 220)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"nonfinite_input"}, cause="a feature is divided by 0 in the loader: Inf", causes=("bad input",), bar=0.2, enters=90, nonfinite=90,
    families=("mlp", "data"), repairable=True,
)  # fmt: skip
def diabetes_inf_batch(job: Job) -> float:
    d = standardised("diabetes")
    drop = job.planted("drop_batch", ill=None, healthy=90)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(shuffled(d.x, d.y, 32)):
            if i == 90:
                x[0, 2] = 1.0 / torch.zeros(())
            if i != drop:
                yield x, y

    model = mlp((10, 32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, batches(), 200, lambda out, y: F.mse_loss(out.squeeze(1), y))
    return r_squared(model, d.held_x, d.held_y)


@program(
    expect={"nonfinite_input"}, cause="each batch is standardised by its own deviation, and one batch has a constant feature", causes=("bad input",),
    bar=0.85, enters=70, nonfinite=70, families=("mlp", "data"), repairable=True,
)  # fmt: skip
def wine_batch_deviation_zero(job: Job) -> float:
    d = standardised("wine")
    eps = job.planted("eps", ill=0.0, healthy=1e-5)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(shuffled(d.x, d.y, 32)):
            if i == 70:
                x[:, 4] = 0.5  # a broken sensor
            yield (x - x.mean(0)) / (x.std(0) + eps), y

    model = mlp((13, 32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, batches(), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"nonfinite_loss", "nonfinite_input", "nonfinite_gradient"}, cause="the logarithm of a target that is -1 for missing",
    causes=("bad target", "bad input", "invalid labels"), bar=0.1, enters=110, nonfinite=110, families=("regression", "data"),
)  # fmt: skip
def diabetes_log_of_missing_target(job: Job) -> float:
    d = raw("diabetes")
    x = standardised("diabetes").x
    missing = job.planted("labels", ill=-2.0, healthy=100.0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (a, y) in enumerate(shuffled(x, d.y, 32)):
            if i == 110:
                y[3] = missing
            yield a, torch.log1p(y) - 4.8

    model = mlp((10, 32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, batches(), 200, lambda out, y: F.mse_loss(out.squeeze(1), y))
    return r_squared(model, standardised("diabetes").held_x, torch.log1p(d.held_y) - 4.8)


@program(
    expect={"nonfinite_activation", "nonfinite_loss"}, cause="attention over a sample that is padding altogether",
    causes=("fully masked attention", "bad input"), bar=0.8, enters=80, nonfinite=80, families=("attention", "data"),
)  # fmt: skip
def rows_attention_all_padding(job: Job) -> float:
    class Net(nn.Module):
        """Attends over the rows of an image; rows of zeros only are padding."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.score, self.place = nn.Linear(8, 32), nn.Linear(32, 1), nn.Parameter(torch.randn(8, 32) * 0.1)
            self.feed, self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU()), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.feed(self.into(x) * (1 + self.place))
            weights = self.score(self.into(x)).squeeze(-1).masked_fill(x.abs().sum(-1) == 0, float("-inf")).softmax(-1)
            return self.head(h.mean(1) + (weights.unsqueeze(-1) * h).sum(1))

    d = rows()
    blank = job.planted("blank_rows", ill=8, healthy=2)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            if i == 80:
                x[7, :blank] = 0.0
            yield x, y

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(job, model, optimizer, batches(), 300)
    return accuracy(model, d.held_x, d.held_y)
