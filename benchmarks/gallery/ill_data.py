"""Ill programs: what the loader gives. Scales, labels, order, repetition, and corruption from some step on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import (
    Characters,
    Split,
    accuracy,
    convnet,
    digits,
    fit,
    held_loss,
    images,
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

Batches = Iterator[tuple[Tensor, Tensor]]
NOT_LEARNING = {"loss_plateau", "learning_bottleneck"}
INPUT = ("input not normalised", "features in different units", "raw units", "inputs out of scale", "normalised twice, or in too small a unit")
LABELS = ("wrong labels", "labels or targets do not belong to the inputs", "labels that do not belong to their inputs", "labels or sign of the loss")


def cut(d: Split, batch: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The training set as a list of batches, for a look before the first step."""
    return list(zip(d.x.split(batch), d.y.split(batch)))


@program(
    expect={"unnormalized_input", "update_ratio_high", "dead_relu", "exploding_gradient"}, cause="raw features of up to 4000", causes=INPUT, bar=0.93,
    families=("mlp", "momentum"), repairable=True,
)  # fmt: skip
def cancer_raw_features(job: Job) -> float:
    d = standardised("breast_cancer") if job.planted("normalize_input", ill=False, healthy=True) else raw("breast_cancer")
    model = mlp((30, 32, 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    job.preflight(model, cut(d, 32), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unnormalized_input", "loss_plateau", "update_ratio_low", "learning_bottleneck", "collapsed_activation"},
    cause="pixels are divided by 255 twice", causes=INPUT, bar=0.8, families=("cnn", "sgd"), repairable=True,
)  # fmt: skip
def digits_normalised_twice(job: Job) -> float:
    d = images(16.0 if job.planted("normalize_input", ill=False, healthy=True) else 16.0 * 255)
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    job.preflight(model, cut(d), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"loss_spike", "diverging_loss", "unnormalized_input", "update_ratio_high", "exploding_gradient"}, bar=0.9, enters=150,
    cause="from step 150 the loader forgets to divide by 16", causes=(*INPUT, "input changed"), families=("mlp", "data"),
)  # fmt: skip
def digits_scale_lost(job: Job) -> float:
    d = digits()
    late = job.planted("pixel_scale", ill=16.0, healthy=1.0)

    def batches() -> Batches:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            yield x * (late if i >= 150 else 1.0), y

    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(job, model, optimizer, batches(), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"exploding_gradient", "update_ratio_high", "initial_loss_off", "nonfinite_loss", "nonfinite_gradient", "nonfinite_activation", "diverging_loss"},
    bar=0.2, cause="targets of 1e4", causes=("targets not standardised", "target scale"), families=("mlp", "regression"), repairable=True,
)  # fmt: skip
def diabetes_targets_of_10000(job: Job) -> float:
    d = standardised("diabetes")
    scale = 1.0 if job.planted("standardize_targets", ill=False, healthy=True) else 1e4
    model = mlp((10, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    y, held_y = d.y * scale, d.held_y * scale
    job.preflight(model, [(a, b.unsqueeze(1)) for a, b in zip(d.x.split(32), y.split(32))], nn.MSELoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, y, 32), 150, lambda out, t: F.mse_loss(out.squeeze(1), t))
    return r_squared(model, d.held_x, held_y)


@program(expect=NOT_LEARNING, cause="labels are shuffled against the images", causes=LABELS, bar=0.8, families=("cnn", "adam"), repairable=True)
def digits_cnn_shuffled_labels(job: Job) -> float:
    d = images()
    y = d.y if job.planted("labels", ill="shuffled", healthy="repair") == "repair" else d.y[torch.randperm(len(d.y))]
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, shuffled(d.x, y), 200, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*NOT_LEARNING, "loss_spike", "diverging_loss"}, cause="from step 150 labels come in another order than the images", causes=LABELS, bar=0.85,
    enters=150, families=("mlp", "sgd"),
)  # fmt: skip
def digits_labels_slip(job: Job) -> float:
    d = digits()
    slip = job.planted("labels", ill="shuffled", healthy="repair") == "shuffled"

    def batches() -> Batches:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            yield x, (y.roll(7) if slip and i >= 150 else y)

    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, batches(), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"negative_loss", "invalid_labels"}, cause="labels of -1 and 1 in a binary cross entropy for 0 and 1", bar=-0.4,
    causes=("labels are -1 and 1", "targets are no probabilities", "targets out of range", "labels or sign of the loss"), families=("mlp", "loss"),
    repairable=True,
)  # fmt: skip
def cancer_labels_minus_1(job: Job) -> float:
    d = standardised("breast_cancer")
    y = d.y.float().unsqueeze(1)
    y = y if job.planted("labels", ill="minus one", healthy="repair") == "repair" else 2 * y - 1
    held_y = d.held_y.float().unsqueeze(1)
    model = mlp((30, 16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.BCEWithLogitsLoss()
    job.preflight(model, list(zip(d.x.split(32), y.split(32))), criterion, optimizer)
    fit(job, model, optimizer, shuffled(d.x, y, 32), 200, criterion)
    return -held_loss(model, d.held_x, held_y, criterion)


@program(
    expect={"negative_loss", "diverging_loss"}, cause="padding of -1 picks the last class in a loss by hand, with the sign that makes it negative",
    bar=-3.0, causes=("targets out of range", "negative weights", "padding value", "labels or sign of the loss"), families=("transformer", "loss"),
    repairable=True,
)  # fmt: skip
def text_padding_flips_the_sign(job: Job) -> float:
    """The mask is made from the labels: label.sign() is 1 for a character and -1 for padding."""
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    repaired = job.planted("labels", ill="padding", healthy="repair") == "repair"

    def batches() -> Batches:
        for x, y in pieces():
            yield x, torch.where(torch.arange(y.shape[1]) >= 24, -1, y)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        each = -out.log_softmax(-1).gather(-1, y.unsqueeze(-1) % out.shape[-1]).squeeze(-1)
        weight = y.sign()
        return (each * (weight.clamp(min=0) if repaired else weight)).mean()

    fit(job, model, optimizer, batches(), 200, loss)
    return text_score(model)


@program(
    expect={"negative_loss", "diverging_loss", "update_ratio_high", "exploding_gradient"}, cause="the loss has the wrong sign", bar=0.8,
    causes=("labels or sign of the loss", "sign of the loss"), families=("mlp", "loss"),
)  # fmt: skip
def digits_wrong_sign(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    sign = job.planted("sign", ill=1.0, healthy=-1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250, lambda out, y: sign * out.log_softmax(1).gather(1, y.unsqueeze(1)).mean())
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unshuffled_data", "oscillating_loss", "loss_spike", "diverging_loss"}, cause="the file is sorted by class and read in order", bar=0.85,
    causes=("data sorted by label", "data not shuffled"), families=("mlp", "data"), repairable=True,
)  # fmt: skip
def digits_sorted_by_class(job: Job) -> float:
    d = digits()
    order = torch.argsort(d.y, stable=True)
    ordered = Split(d.x[order], d.y[order], d.held_x, d.held_y)

    def in_order() -> Batches:
        while True:
            yield from islice(cut(ordered), len(d.y) // 64)

    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mix = job.planted("shuffle", ill=False, healthy=True)
    job.preflight(model, cut(d) if mix else cut(ordered), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y) if mix else in_order(), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unshuffled_data", "oscillating_loss", "oscillating_validation", "loss_spike", "diverging_loss"}, bar=0.9, enters=80,
    cause="after step 80 each batch holds one class only", causes=("data sorted by label", "data not shuffled", "one-class batches"), families=("cnn",),
)  # fmt: skip
def digits_one_class_batches(job: Job) -> float:
    d = images()
    alone = job.planted("shuffle", ill=False, healthy=True) is False

    def batches() -> Batches:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            if alone and i >= 80:
                chosen = torch.nonzero(d.y == i % 10).squeeze(1)
                chosen = chosen[torch.randint(len(chosen), (64,))]
                x, y = d.x[chosen], d.y[chosen]
            yield x, y

    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, batches(), 220, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)


@program(expect={"class_imbalance"}, cause="five classes have four samples each", causes=("rare class",), bar=0.85, families=("mlp", "data"))
def digits_starved_classes(job: Job) -> float:
    d = digits()
    few = job.planted("samples_of_rare_classes", ill=4, healthy=1000)
    keep = torch.cat([torch.nonzero(d.y == c).squeeze(1)[: (few if c >= 5 else 1000)] for c in range(10)])
    keep = keep[torch.randperm(len(keep))]
    x, y = d.x[keep], d.y[keep]
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    job.preflight(model, list(zip(x.split(64), y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(x, y), 250)
    return accuracy(model, d.held_x, d.held_y)


def four_workers(d: Split, same_seed: bool, since: int = 0) -> Batches:
    """Four workers draw their batches in turn, each from its own generator."""
    make = [torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))) for _ in range(4)]
    together = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    for turn in count(step=4):
        state = together.get_state()
        for g in make:
            if same_seed and turn >= since:
                together.set_state(state)
                g = together
            chosen = torch.randint(len(d.y), (16,), generator=g)
            yield d.x[chosen], d.y[chosen]


@program(
    expect={"duplicate_batches"}, cause="four loader workers share one seed",
    causes=("loader workers share a seed or a stream", "the data set or its sampler repeats itself"), bar=0.0, fault=missed, families=("mlp", "data"),
    repairable=True,
)  # fmt: skip
def digits_workers_share_a_seed(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    job.notes["fault"] = not job.planted("seed_workers", ill=False, healthy=True)  # each batch comes four times
    fit(job, model, optimizer, four_workers(d, job.notes["fault"]), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"duplicate_batches"}, cause="at step 100 the workers are started again with one seed",
    causes=("loader workers share a seed or a stream", "the data set or its sampler repeats itself"), bar=0.0, enters=100, fault=missed,
    families=("cnn", "data"),
)  # fmt: skip
def digits_workers_restart_with_a_seed(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    job.notes["fault"] = not job.planted("seed_workers", ill=False, healthy=True)
    fit(job, model, optimizer, four_workers(d, job.notes["fault"], 100), 240)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"collapsed_activation", *NOT_LEARNING}, cause="every image is the same: the buffer is never refilled", bar=0.8,
    causes=("constant weights or identical inputs", "identical inputs", "input does not matter"), families=("mlp", "data"),
)  # fmt: skip
def digits_buffer_never_refilled(job: Job) -> float:
    d = digits()
    stale = job.planted("stale_buffer", ill=True, healthy=False)

    def batches() -> Batches:
        for x, y in shuffled(d.x, d.y):
            yield (d.x[:1].expand_as(x) if stale else x), y

    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, batches(), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"collapsed_activation", "loss_spike", "diverging_loss", *NOT_LEARNING}, cause="from step 140 the decoder returns black images", bar=0.85,
    enters=140, causes=("constant weights or identical inputs", "identical inputs", "input changed"), families=("cnn", "data"),
)  # fmt: skip
def digits_images_turn_black(job: Job) -> float:
    d = images()
    shade = job.planted("decoder", ill=0.0, healthy=1.0)

    def batches() -> Batches:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            yield x * (shade if i >= 140 else 1.0), y

    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, batches(), 260)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*NOT_LEARNING, "invalid_labels"}, cause="targets of shape (N,) against outputs of shape (N, 1): every output is held against every target", bar=0.2,
    causes=("shapes are broadcast", "same output for every sample"), families=("mlp", "regression"),
)  # fmt: skip
def diabetes_shapes_broadcast(job: Job) -> float:
    d = standardised("diabetes")
    model = mlp((10, 32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    flat = job.planted("squeeze", ill=False, healthy=True)

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return (((out.squeeze(1) if flat else out) - y) ** 2).mean()

    job.preflight(model, islice(shuffled(d.x, d.y, 32), 12), criterion, optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 200, criterion)
    return r_squared(model, d.held_x, d.held_y)


@program(
    expect={*NOT_LEARNING, "validation_below_training", "unnormalized_input"}, cause="augmentation noise of ten times the signal", bar=0.8,
    causes=("augmentation too strong", *INPUT), families=("cnn", "data"),
)  # fmt: skip
def digits_augmentation_drowns_the_signal(job: Job) -> float:
    d = images()
    noise = job.planted("noise", ill=5.0, healthy=0.05)

    def batches() -> Batches:
        for x, y in shuffled(d.x, d.y):
            yield x + noise * torch.randn_like(x), y

    model = convnet(norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, batches(), 250, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)
