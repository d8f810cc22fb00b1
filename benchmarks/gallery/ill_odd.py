"""Ill programs: odd batches, loss terms out of hand, half precision, and first weights of a wrong size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import (
    Characters,
    accuracy,
    convnet,
    digits,
    fit,
    held_loss,
    images,
    missed,
    mlp,
    per_character,
    pieces,
    raw,
    shuffled,
    standardised,
    text,
)
from gallery.ill_tools import text_score as characters_score
from gallery.registry import Job, program

Batches = Iterator[tuple[Tensor, Tensor]]


@program(
    expect={"loss_spike", "exploding_gradient", "update_ratio_high"}, cause="batch 150 holds pixels of 4096", causes=("odd batch",), bar=0.9, enters=150,
    families=("mlp", "data"),
)  # fmt: skip
def digits_one_batch_of_4096(job: Job) -> float:
    d = digits()
    size = job.planted("pixel_scale", ill=4096.0, healthy=1.0)

    def batches() -> Batches:
        for i, (x, y) in enumerate(shuffled(d.x, d.y)):
            yield (x * size if i == 150 else x), y

    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(job, model, optimizer, batches(), 240)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"loss_spike"}, cause="one batch of binary garbage among the text", causes=("odd batch",), bar=-9.0, enters=140, fault=missed,
    families=("transformer", "data"),
)  # fmt: skip
def text_one_batch_of_garbage(job: Job) -> float:
    garbage = job.planted("garbage", ill=True, healthy=False)

    def batches() -> Batches:
        for i, (x, y) in enumerate(pieces()):
            if i == 140 and garbage:
                x, y = torch.randint(text()[1], x.shape), torch.randint(text()[1], y.shape)
            yield x, y

    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    job.notes["fault"] = garbage
    fit(job, model, optimizer, batches(), 220, per_character)
    return characters_score(model)


@program(
    expect={"negative_loss", "wrong_output_activation", "diverging_loss"}, cause="NLLLoss gets logits: the log-softmax is missing", bar=0.85,
    causes=("no log-softmax before nll_loss", "log_softmax missing", "wrong output activation"), families=("cnn", "loss"),
)  # fmt: skip
def digits_nll_of_logits(job: Job) -> float:
    d = images()
    model = nn.Sequential(*convnet(norm=False), nn.Identity() if job.planted("log_softmax", ill=False, healthy=True) is False else nn.LogSoftmax(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.NLLLoss()
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), criterion, optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200, criterion)
    return accuracy(model, d.held_x, d.held_y) if float(criterion(model(d.held_x), d.held_y)) >= 0 else -1.0


@program(
    expect={"negative_loss", "invalid_labels", "update_ratio_high"}, cause="masks of 0 and 255 go into a binary cross entropy for 0 and 1", bar=-0.5,
    causes=("targets are no probabilities", "not probabilities", "targets out of range", "labels or sign of the loss"), families=("cnn", "loss"),
    repairable=True,
)  # fmt: skip
def digits_masks_of_255(job: Job) -> float:
    """Which pixels are ink, from a blurred image."""
    d = images()
    ink = 1.0 if job.planted("labels", ill="0 to 255", healthy="repair") == "repair" else 255.0
    y, held_y = (d.x > 0.5).float() * ink, (d.held_x > 0.5).float()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, held_x = F.avg_pool2d(d.x, 3, 1, 1), F.avg_pool2d(d.held_x, 3, 1, 1)
    criterion = nn.BCEWithLogitsLoss()
    job.preflight(model, list(zip(x.split(64), y.split(64))), criterion, optimizer)
    fit(job, model, optimizer, shuffled(x, y), 200, criterion)
    return -held_loss(model, held_x, held_y, criterion)


@program(expect={"class_imbalance"}, cause="three ill patients among 200 healthy ones", causes=("rare class",), bar=0.85, families=("mlp", "data"))
def cancer_three_ill_patients(job: Job) -> float:
    d = standardised("breast_cancer")
    few = job.planted("samples_of_rare_classes", ill=3, healthy=1000)
    keep = torch.cat([torch.nonzero(d.y == 0).squeeze(1)[:few], torch.nonzero(d.y == 1).squeeze(1)[:200]])
    keep = keep[torch.randperm(len(keep))]
    x, y = d.x[keep], d.y[keep]
    model = mlp((30, 16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    job.preflight(model, list(zip(x.split(32), y.split(32))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(x, y, 32), 200)
    ill = d.held_y == 0
    return accuracy(model, d.held_x[ill], d.held_y[ill])


@program(
    expect={"exploding_gradient", "diverging_loss", "update_ratio_high", "loss_spike"},
    cause="the weight of a penalty doubles every 8 steps from step 120 on", causes=("a loss term grows", "exploding gradient", "loss term out of scale"),
    bar=0.9, enters=120, families=("cnn", "loss"),
)  # fmt: skip
def digits_penalty_out_of_hand(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    growth = job.planted("penalty_growth", ill=2 ** (1 / 8), healthy=1.0)
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(shuffled(d.x, d.y), 280))):
            out = model(x)
            terms = {"classes": F.cross_entropy(out, y), "size": 1e-3 * growth ** max(0, step - 120) * out.square().mean()}
            optimizer.zero_grad()
            (terms["classes"] + terms["size"]).backward()
            optimizer.step()
            guard.step(terms)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"overflow_risk", "nonfinite_activation", "nonfinite_loss", "nonfinite_gradient", "nonfinite_weight"}, bar=0.9, enters=80,
    families=("mlp", "fp16"), cause="a gain that doubles every 10 steps drives float16 activations over 65504",
    causes=("range of float16 too small", "overflow in forward"),
)  # fmt: skip
def digits_float16_grows_to_its_limit(job: Job) -> float:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.body, self.head, self.gain = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10), 1.0

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.into(x)) * self.gain
            with torch.autocast("cpu", torch.float16):
                h = self.body(h)
            return self.head(F.layer_norm(h.float(), (64,)))

    d = digits()
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    growth = job.planted("gain_growth", ill=2**0.1, healthy=1.0)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, change=lambda step: setattr(model, "gain", growth ** max(0, step - 80)))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"vanishing_gradient", "unchanged_weights", "update_ratio_low", "loss_plateau"},
    cause="a loss weight of 1e-8 under float16: gradients underflow to 0", causes=("float16 underflow", "underflow", "zero gradient"), bar=0.85,
    families=("mlp", "fp16"),
)  # fmt: skip
def digits_float16_gradients_underflow(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight = job.planted("loss_weight", ill=1e-8, healthy=1.0)
    with job.guard(model, optimizer) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y), 250)):
            with torch.autocast("cpu", torch.float16):
                out = model(x)
            loss = weight * F.cross_entropy(out.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"poor_initialization", "initial_loss_off", "saturated_softmax", "update_ratio_high", "exploding_gradient"},
    cause="first weights of deviation 1 in seven layers", causes=("initialisation", "weights too large", "logits out of scale"), bar=0.8,
    families=("mlp", "deep"), repairable=True,
)  # fmt: skip
def digits_normal_weights_of_one(job: Job) -> float:
    d = digits()
    model = mlp((64, *[64] * 6, 10))
    scale = job.planted("init", ill="normal", healthy="he")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0) if scale == "normal" else nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y) - 0.1 * float(held_loss(model, d.held_x, d.held_y) > 10)


@program(
    expect={"poor_initialization", "vanishing_gradient", "collapsed_activation", "loss_plateau"}, cause="first weights of deviation 0.001 in six layers",
    causes=("initialisation", "weights too small"), bar=0.8, families=("mlp", "deep"), repairable=True,
)  # fmt: skip
def digits_weights_of_a_thousandth(job: Job) -> float:
    d = digits()
    model = mlp((64, *[64] * 5, 10), nn.Tanh)
    small = job.planted("init", ill="normal", healthy="xavier") == "normal"
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1e-3) if small else nn.init.xavier_normal_(module.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"nonfinite_weight", "nonfinite_activation", "nonfinite_loss"}, cause="weights are normalised in place; a pruned row has norm 0", enters=110,
    nonfinite=110, causes=("weights are overwritten", "bad weights"), bar=0.85, families=("mlp", "overwrite"), repairable=True,
)  # fmt: skip
def digits_row_of_norm_zero(job: Job) -> float:
    """Each row of the first layer is kept at norm 1 by hand; at step 110 pruning sets one row to 0."""
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eps = job.planted("eps", ill=0.0, healthy=1e-8)

    @torch.no_grad()
    def change(step: int) -> None:
        weight = model[0].weight
        if step == 110:
            weight[5] = 0.0
        weight /= weight.norm(dim=1, keepdim=True) + eps

    fit(job, model, optimizer, shuffled(d.x, d.y), 250, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"collapsed_activation", "cannot_overfit_batch", "cross_sample_leak", "loss_plateau"},
    cause="features are averaged over the batch, not over the places", bar=0.85,
    causes=("same output for every sample", "constant weights or identical inputs", "samples leak into each other"), families=("cnn",),
)  # fmt: skip
def digits_mean_over_the_batch(job: Job) -> float:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten())
            self.head = nn.Linear(256, 10)

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x)
            return self.head(features.mean(0, keepdim=True).expand_as(features) if mixed else features)

    mixed = job.planted("mean_over_batch", ill=True, healthy=False)
    d = images()
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"cannot_overfit_batch", "collapsed_activation", "unchanged_weights", "loss_plateau", "unnormalized_input"},
    cause="features are divided by 2000 and cast to integers: all are 0",
    causes=("constant weights or identical inputs", "identical inputs", "input carries no information"), bar=0.9, families=("mlp", "data"),
)  # fmt: skip
def wine_features_cast_to_integers(job: Job) -> float:
    d, source = standardised("wine"), raw("wine")
    cast = job.planted("integer_cast", ill=True, healthy=False)
    x, held_x = ((source.x / 2000).to(torch.uint8).float(), (source.held_x / 2000).to(torch.uint8).float()) if cast else (d.x, d.held_x)
    model = mlp((13, 32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    job.preflight(model, list(zip(x.split(32), d.y.split(32))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(x, d.y, 32), 250)
    return accuracy(model, held_x, d.held_y)
