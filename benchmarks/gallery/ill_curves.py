"""Ill programs: what only the two curves show. Overfitting, mismatched or tiny validation sets, forgotten modes, bottlenecks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import CONTEXT, Characters, accuracy, convnet, digits, fit, held_loss, images, missed, mlp, per_character, shuffled, standardised, text
from gallery.registry import Job, program

OVERFIT = ("too few samples for the capacity", "samples learned by heart")


def noisy(y: Tensor, share: float) -> Tensor:
    """Some labels replaced by random ones."""
    return torch.where(torch.rand(len(y)) < share, torch.randint(10, (len(y),)), y)


@program(expect={"overfitting"}, cause="a wide net on 100 samples", causes=OVERFIT, bar=-0.9, families=("mlp", "adam"))
def digits_100_samples(job: Job) -> float:
    d = digits()
    few = job.planted("samples", ill=100, healthy=len(d.y))
    x, y = d.x[:few], noisy(d.y[:few], 0.1)
    model = mlp((64, 256, 256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, shuffled(x, y, 50), 300, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return -held_loss(model, d.held_x, d.held_y)


@program(expect={"overfitting"}, cause="2000 weights on 60 patients", causes=OVERFIT, bar=-0.75, families=("mlp", "regression"))
def diabetes_60_patients(job: Job) -> float:
    d = standardised("diabetes")
    few = job.planted("samples", ill=60, healthy=len(d.y))
    width = 64
    model = mlp((10, width, width, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out.squeeze(1), y)

    fit(job, model, optimizer, shuffled(d.x[:few], d.y[:few], 30), 250, loss, validate=lambda: held_loss(model, d.held_x, d.held_y, loss))
    return -held_loss(model, d.held_x, d.held_y, loss)


@program(expect={"overfitting"}, cause="a language model on 1500 characters", causes=OVERFIT, bar=-2.9, families=("transformer", "adamw"))
def text_1500_characters(job: Job) -> float:
    codes, _ = text()
    size = job.planted("samples", ill=1500, healthy=150_000)
    held = codes[150_000 : 150_000 + 32 * (CONTEXT + 1)].view(32, CONTEXT + 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            starts = torch.randint(size - CONTEXT - 1, (16,))
            cut = torch.stack([codes[s : s + CONTEXT + 1] for s in starts])
            yield cut[:, :-1], cut[:, 1:]

    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    validate = functools.partial(held_loss, model, held[:, :-1], held[:, 1:], per_character)
    fit(job, model, optimizer, batches(), 300, per_character, validate=validate)
    return -validate()


@program(
    expect={"overfitting"}, cause="from step 200 the loader repeats its first 64 samples", causes=(*OVERFIT, "the same samples again"), bar=-0.45,
    enters=200, families=("mlp", "data"),
)  # fmt: skip
def digits_loader_shrinks(job: Job) -> float:
    d = digits()
    few = job.planted("samples", ill=64, healthy=len(d.y))
    y = noisy(d.y, 0.1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from islice(shuffled(d.x, y, 32), 200)
        yield from shuffled(d.x[:few], y[:few], 32)

    model = mlp((64, 128, 128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, batches(), 500, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return -held_loss(model, d.held_x, d.held_y)


@program(
    expect={"validation_mismatch", "overfitting"}, cause="validation images are inverted: white is 0 in training and 1 in validation",
    causes=("other labels or preprocessing in validation", "validation data of another kind, or nothing that generalises"), bar=-0.5,
    families=("mlp", "data"),
)  # fmt: skip
def digits_validation_inverted(job: Job) -> float:
    d = digits()
    held_x = 1 - d.held_x if job.planted("inverted", ill=True, healthy=False) else d.held_x
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, validate=lambda: held_loss(model, held_x, d.held_y))
    return -held_loss(model, held_x, d.held_y)


@program(
    expect={"validation_mismatch", "overfitting"}, cause="validation labels are sorted and the images are not",
    causes=("other labels or preprocessing in validation", "validation data of another kind, or nothing that generalises"), bar=-1.0,
    families=("cnn", "data"),
)  # fmt: skip
def digits_validation_labels_mixed_up(job: Job) -> float:
    d = images()
    held_y = d.held_y.sort().values if job.planted("validation_labels", ill="sorted", healthy="repair") == "sorted" else d.held_y
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, validate=lambda: held_loss(model, d.held_x, held_y))
    return -held_loss(model, d.held_x, held_y)


@program(
    expect={"validation_mismatch", "learning_bottleneck", "loss_plateau"},
    cause="nine of ten training labels are random: training hardly falls, validation does",
    causes=("the data sets are mixed up", "wrong labels", "labels or targets do not belong to the inputs"), bar=0.99, fault=missed,
    families=("cnn", "data"), repairable=True,
)  # fmt: skip
def digits_training_set_is_the_wrong_one(job: Job) -> float:
    d = images()
    y = noisy(d.y, 0.0 if job.planted("labels", ill="random", healthy="repair") == "repair" else 0.9)
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, shuffled(d.x, y), 400, validate=lambda: held_loss(model, d.held_x, d.held_y))
    job.notes["fault"] = float((y == d.y).float().mean()) < 0.5
    return accuracy(model, d.held_x, d.held_y) + 0.05


def validated_in_training_mode(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@program(
    expect={"validation_mismatch", "oscillating_validation"}, cause="eval() is forgotten: dropout of 0.7 and batches of 4 in validation",
    causes=("train/eval mismatch", "train/eval mismatch or empty validation batches", "eval() is not called"), bar=-0.5, families=("mlp", "dropout"),
)  # fmt: skip
def digits_eval_forgotten(job: Job) -> float:
    d = digits()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.7), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.7), nn.Linear(128, 10)
    )
    forgotten = job.planted("eval_mode", ill=False, healthy=True) is False

    def validate() -> float:
        if not forgotten:
            return held_loss(model, d.held_x, d.held_y)
        parts = [validated_in_training_mode(model, x, y) for x, y in zip(d.held_x.split(4), d.held_y.split(4)) if len(y) > 1]
        return sum(parts) / len(parts)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, validate=validate)
    return -validate()


@program(
    expect={"validation_mismatch", "oscillating_validation"}, cause="batch norm with a momentum of 1e-5: its statistics never arrive in evaluation",
    causes=("train/eval mismatch", "batch norm statistics"), bar=-0.5, families=("cnn", "norm"),
)  # fmt: skip
def digits_batch_norm_momentum(job: Job) -> float:
    d = images()
    model = convnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = job.planted("momentum", ill=1e-5, healthy=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x * 8 + 4, d.y), 250, validate=lambda: held_loss(model, d.held_x * 8 + 4, d.held_y))
    return -held_loss(model, d.held_x * 8 + 4, d.held_y)


def swings(job: Job, values: list[float]) -> None:
    """The proof of an unsteady curve: most of the later changes turn and are large."""
    late = values[len(values) // 3 :]
    changes = [b - a for a, b in pairwise(late)]
    turns = sum(1 for a, b in pairwise(changes) if a * b < 0 and min(abs(a), abs(b)) > 0.1 * min(late))
    job.notes["fault"] = turns >= 3 and sorted(late)[len(late) // 2] > 0.05  # swings near 0 harm nobody


@program(
    expect={"oscillating_validation"}, cause="the validation set is three samples, drawn anew each time", causes=("validation set too small or drawn anew",),
    bar=0.0, fault=missed, families=("mlp", "data"), repairable=False,
)  # fmt: skip
def digits_three_validation_samples(job: Job) -> float:
    d = digits()
    many = job.planted("validation_samples", ill=3, healthy=len(d.held_y))
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values: list[float] = []

    def validate() -> float:
        chosen = torch.randperm(len(d.held_y))[:many]
        values.append(held_loss(model, d.held_x[chosen], d.held_y[chosen]))
        return values[-1]

    fit(job, model, optimizer, shuffled(d.x, d.y), 400, validate=validate)
    swings(job, values)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"oscillating_validation", "oscillating_loss", "update_ratio_high", "dead_relu"}, cause="batches of 2 in a net with batch norm", bar=0.9,
    causes=("batches too small",), families=("cnn", "norm"), repairable=True,
)  # fmt: skip
def digits_batches_of_two(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = shuffled(d.x, d.y, job.planted("batch_size", ill=2, healthy=64))
    fit(job, model, optimizer, batches, 400, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"learning_bottleneck", "validation_below_training", "loss_plateau"}, cause="dropout of 0.95", causes=("dropout too high", "over-regularised"),
    bar=0.9, families=("mlp", "dropout"), repairable=True,
)  # fmt: skip
def digits_dropout_095(job: Job) -> float:
    d = digits()
    p = job.planted("dropout", ill=0.95, healthy=0.1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 400, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(expect={"learning_bottleneck", "loss_plateau"}, cause="a bottleneck of one unit", causes=("too little capacity",), bar=0.85, families=("mlp",))
def digits_bottleneck_of_one(job: Job) -> float:
    d = digits()
    width = job.planted("width", ill=1, healthy=32)
    model = mlp((64, width, 32, 10), nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    fit(job, model, optimizer, shuffled(d.x, d.y), 500, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"learning_bottleneck", "loss_plateau"}, cause="weight decay holds the loss at two thirds", causes=("weight decay too high", "over-regularised"),
    bar=-0.5, families=("cnn", "decay"), repairable=True,
)  # fmt: skip
def digits_decay_holds_the_loss(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=job.planted("weight_decay", ill=0.07, healthy=1e-4))
    fit(job, model, optimizer, shuffled(d.x, d.y), 400, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return -held_loss(model, d.held_x, d.held_y)


@program(
    expect={"diverging_loss", "loss_spike", "update_ratio_high", "exploding_gradient"}, cause="both curves rise: the rate grows by 3 % in each step",
    causes=("learning rate too high",), bar=0.9, enters=100, families=("mlp", "schedule"),
)  # fmt: skip
def digits_rate_grows_without_end(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    growth: Callable[[int], float] = functools.partial(pow, job.planted("growth", ill=1.03, healthy=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: growth(max(0, step - 100)))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, schedule=schedule, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)
