"""Ill programs, second set: data, the order they come in, and how they meet the loss. What is expected was written before it was measured."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.fresh import explained
from gallery.ill_second_rates import FAST, NAN, RATE
from gallery.ill_tools import accuracy, convnet, fit, held_loss, images, missed, mlp, shuffled
from gallery.registry import Job, program


@program(
    expect=NAN, cause="each batch is divided by its own deviation, and the last of an epoch holds one sample", bar=0.85,
    causes=("loss function", "overflow in forward", "odd batch", "batches too small", "bad input"), enters=44, nonfinite=44,
    families=("second", "data", "loss"),
)  # fmt: skip
def digits_last_batch_of_one(job: Job) -> float:
    d = data.digits()
    x, y = d.x[: 44 * 32 + 1], d.y[: 44 * 32 + 1]

    class Whitened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(F.relu((h - h.mean(0)) / (h.std(0) + 1e-5)))

    model = Whitened()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(x, y, 32, job.generator, drop_last=job.planted("drop_last", ill=False, healthy=True))
    fit(job, model, optimizer, data.endless(loader, 250), 250)
    return accuracy(model, d.test_x, d.test_y)


@program(
    expect={*FAST, "unnormalized_input", "initial_loss_off"}, cause="missing values are -999", bar=0.3, families=("second", "regression", "data"),
    causes=("input not normalised", "features not normalised", "features in different units", "features of very different scale", "one feature out of scale",
            "raw units", "inputs out of scale", "odd batch", "bad input", *RATE),
)  # fmt: skip
def diabetes_missing_is_minus_999(job: Job) -> float:
    d = data.table("diabetes")
    x, filled = d.x.clone(), job.planted("filled", ill=-999.0, healthy=0.0)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.01] = filled
    model = mlp((10, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    job.preflight(model, list(zip(x.split(32), d.y.split(32))), nn.MSELoss(), optimizer)
    fit(job, model, optimizer, shuffled(x, d.y, 32), 400, F.mse_loss)
    with torch.no_grad():
        value = explained(model(d.test_x), d.test_y.squeeze(1))
    return value if math.isfinite(value) else -1e9


@program(
    expect={"negative_loss", "wrong_output_activation", "loss_plateau"}, cause="NLLLoss gets probabilities: softmax for log_softmax", bar=0.0,
    causes=("no log-softmax before nll_loss", "log_softmax missing", "wrong output activation", "softmax before cross entropy"), fault=missed,
    families=("second", "cnn", "loss"),
)  # fmt: skip
def convnet_nll_of_probabilities(job: Job) -> float:
    d = images()
    job.notes["fault"] = job.planted("output_activation", ill="softmax", healthy="log_softmax") == "softmax"
    model = nn.Sequential(*convnet(), nn.Softmax(1) if job.notes["fault"] else nn.LogSoftmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200, F.nll_loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"duplicate_batches", "overfitting"}, cause="next(iter(loader)) in the loop of an unshuffled loader: always the first batch", bar=0.85,
    causes=("the data set or its sampler repeats itself", "the same samples again", "too few samples for the capacity", "samples learned by heart"),
    families=("second", "data", "cnn"),
)  # fmt: skip
def digits_first_batch_for_ever(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(d.x, d.y, 32, job.generator, shuffle=job.planted("shuffle", ill=False, healthy=True))
    guard = job.guard(model, optimizer)
    for step in range(250):
        x, y = next(iter(loader))
        guard.batch(x, y)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (step + 1) % 20 == 0:
            guard.validation(held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unshuffled_data", "oscillating_loss", "loss_spike", "diverging_loss"}, cause="a table sorted by its target is read in order", bar=0.3,
    causes=("data sorted by label", "data not shuffled"), families=("second", "data", "regression"),
)  # fmt: skip
def diabetes_sorted_by_target(job: Job) -> float:
    d = data.table("diabetes")
    order = d.y.squeeze(1).argsort()
    model = mlp((10, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loader = data.loader(d.x[order], d.y[order], 16, job.generator, shuffle=job.planted("shuffle", ill=False, healthy=True))
    job.preflight(model, loader, nn.MSELoss(), optimizer)
    fit(job, model, optimizer, data.endless(loader, 300), 300, F.mse_loss)
    with torch.no_grad():
        return explained(model(d.test_x), d.test_y.squeeze(1))


@program(
    expect={"overfitting"}, cause="sixty paragraphs for a net of 70000 weights", bar=-0.62,
    causes=("too few samples for the capacity", "samples learned by heart"), families=("second", "text"),
)  # fmt: skip
def documents_sixty_paragraphs(job: Job) -> float:
    texts, label = data.documents()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    train, held = order[: job.planted("samples", ill=60, healthy=1600)], order[-300:]
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(1000, 64), "net": mlp((64, 64, 1))})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def answer(rows_: list[int]) -> tuple[Tensor, Tensor]:
        tokens = [texts[r] for r in rows_]
        starts = torch.tensor([0, *[len(t) for t in tokens[:-1]]]).cumsum(0)
        return model["net"](model["bag"](torch.cat(tokens), starts)).squeeze(1), label[rows_]

    guard = job.guard(model, optimizer)
    for step in range(240):
        chosen = [train[i] for i in torch.randint(len(train), (30,), generator=job.generator).tolist()]
        loss = F.binary_cross_entropy_with_logits(*answer(chosen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if (step + 1) % 10 == 0:
            with torch.no_grad():
                guard.validation(F.binary_cross_entropy_with_logits(*answer(held)).item())
    with torch.no_grad():
        return -F.binary_cross_entropy_with_logits(*answer(held)).item()
