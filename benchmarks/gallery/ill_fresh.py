"""Ill programs written after the rules and measured before the rules were touched: known faults in nets, losses and optimizers the others lack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery import models as nets
from gallery.fresh import explained, houses
from gallery.healthy_fresh_models import Mixer, Sparse
from gallery.healthy_fresh_schedules import Lion
from gallery.ill_tools import Recurrent, accuracy, digits, fit, held_loss, images, mlp, rows, shuffled
from gallery.registry import Job, program

FAST = {
    "update_ratio_high",
    "exploding_gradient",
    "diverging_loss",
    "loss_spike",
    "oscillating_loss",
    "nonfinite_loss",
    "nonfinite_gradient",
    "nonfinite_weight",
}
RATE = ("learning rate too high", "exploding gradient")
Batches = Iterator[tuple[Tensor, Tensor]]


def squared(out: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of one output."""
    return F.mse_loss(out.squeeze(1), y)


def houses_score(model: nn.Module, d: data.Split) -> float:
    """Explained variance; a large negative number where outputs are not finite."""
    with torch.no_grad():
        value = explained(model(d.test_x), d.test_y)
    return value if math.isfinite(value) else -1e9


@program(expect=FAST, cause="an MLP-mixer under AdamW at 100 times its rate", causes=RATE, bar=0.9, families=("fresh", "mixer"), repairable=True)
def mixer_adamw_lr_100x(job: Job) -> float:
    d = images()
    model = Mixer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.planted("lr", ill=0.3, healthy=3e-3))
    fit(job, model, optimizer, shuffled(d.x, d.y), 350)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*FAST, "dead_relu", "collapsed_activation"}, cause="a Lion at the rate of an SGD", causes=RATE, bar=0.9, families=("fresh", "lion"), repairable=True
)
def digits_lion_lr_of_sgd(job: Job) -> float:
    d = digits()
    model = mlp((64, 96, 96, 10))
    optimizer = Lion(model.parameters(), job.planted("lr", ill=0.1, healthy=5e-4), 0.01)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"update_ratio_low", "loss_plateau", "learning_bottleneck", "unchanged_weights"}, cause="a warm-up of a million steps", bar=0.8,
    causes=("learning rate too low", "learning rate schedule"), families=("fresh", "schedule"),
)  # fmt: skip
def digits_warm_up_never_ends(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    over = job.planted("warm_up", ill=1e7, healthy=20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / over))
    fit(job, model, optimizer, shuffled(d.x, d.y), 400, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*FAST, "initial_loss_off"}, cause="prices of 200000 as targets of a plain SGD", bar=0.4, families=("fresh", "regression"), repairable=True,
    causes=("targets not standardised", "regression targets not standardised", "targets far from zero mean and unit scale"),
)  # fmt: skip
def houses_targets_in_dollars(job: Job) -> float:
    d = houses()
    level, scale = (0.0, 1.0) if job.planted("standardize_targets", ill=False, healthy=True) else (2e5, 5e4)
    model = mlp((8, 64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    fit(job, model, optimizer, shuffled(d.x, level + scale * d.y), 400, squared)
    return houses_score(model, d._replace(test_y=level + scale * d.test_y))


@program(
    expect={"loss_plateau", "constant_loss", "collapsed_activation", "update_ratio_high", "vanishing_gradient", "dead_relu"},
    cause="triplets of the hardest negatives at a high rate: all embeddings fall on one point", bar=0.6, families=("fresh", "metric"),
    causes=("learning rate too high", "same output for every sample", "dead, saturated or constant weights", "dead units"),
)  # fmt: skip
def digits_triplets_collapse(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=0.05, healthy=1e-3))

    def hard(out: Tensor, y: Tensor) -> Tensor:
        apart = (out[:, None] - out[None]).square().sum(-1)
        same = y[:, None] == y[None]
        return F.relu((apart * same).amax(1) - apart.masked_fill(same, 1e9).amin(1) + 0.5).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y), 500, hard)
    with torch.no_grad():
        base, asked = model(d.x), model(d.held_x)
    return float((d.y[torch.cdist(asked, base).argmin(1)] == d.held_y).float().mean())


@program(
    expect={"nonfinite_loss", "nonfinite_gradient", "nonfinite_activation", "nonfinite_weight"},
    cause="a focal loss with gamma 0.5: its slope is infinite where a probability reaches 1",
    causes=("loss function",), bar=0.85, families=("fresh", "loss"), repairable=True,
)  # fmt: skip
def digits_focal_root_of_zero(job: Job) -> float:
    d = digits()
    model = mlp((64, 128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    eps = job.planted("eps", ill=0.0, healthy=1e-6)

    def focal(out: Tensor, y: Tensor) -> Tensor:
        log = F.log_softmax(4 * out, 1).gather(1, y[:, None]).squeeze(1)
        return (-((1 - log.exp() + eps) ** 0.5) * log).mean()

    fit(job, model, optimizer, shuffled(d.x, d.y), 400, focal)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"loss_plateau", "learning_bottleneck", "overfitting", "validation_mismatch"}, cause="prices are shuffled against the houses", bar=0.4,
    causes=("labels or targets do not belong to the inputs", "validation data of another kind, or nothing that generalises", "samples learned by heart",
            "other labels or preprocessing in validation", "labels learned by heart", "too few samples for the capacity"),
    families=("fresh", "regression", "data"),
)  # fmt: skip
def houses_targets_shuffled(job: Job) -> float:
    d = houses()
    y = d.y[torch.randperm(len(d.y))] if job.planted("labels", ill="as they are", healthy="repair") != "repair" else d.y
    model = mlp((8, 64, 64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, shuffled(d.x, y), 800, squared, validate=lambda: held_loss(model, d.test_x, d.test_y, squared))
    return houses_score(model, d)


@program(
    expect={"loss_plateau", "learning_bottleneck"}, cause="labels are shuffled against the digits, no validation", bar=0.5,
    causes=("labels or targets do not belong to the inputs", "wrong labels, or too large a step"), families=("fresh", "data"),
)  # fmt: skip
def text_next_character_of_another_place(job: Job) -> float:
    """Targets of a language model come from another window: nothing but the frequencies of characters can be learned."""
    stream, size = data.text()
    slip = job.planted("labels", ill="slipped", healthy="repair") == "slipped"
    model = nets.CharRNN(size, 48, "GRU")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def batches() -> Batches:
        for x, y in data.windows(stream[:150_000], 32, 16, job.generator):
            yield x, (stream[torch.randint(140_000, (16, 1)) + torch.arange(32)] if slip else y)

    x, y = next(data.windows(stream[150_000:], 32, 64, job.generator))
    fit(job, model, optimizer, batches(), 450, loss, validate=lambda: held_loss(model, x, y, loss))
    return 4.0 - held_loss(model, x, y, loss) - 0.8


@program(
    expect={"unchanged_weights", "vanishing_gradient"}, cause="the stem of a mixer runs under no_grad", causes=("detached from the loss",), bar=0.985,
    fault=lambda job, score: bool(job.notes.get("fault")), families=("fresh", "wiring"),
)  # fmt: skip
def mixer_stem_under_no_grad(job: Job) -> float:
    d = images()
    detach = job.planted("unfreeze", ill=False, healthy=True) is False
    job.notes["fault"] = detach

    class Detached(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(F.unfold(x, 2, stride=2).transpose(1, 2))
            h = h + self.across[0](self.norms[0](h).transpose(1, 2)).transpose(1, 2)
            h = h + self.within[0](self.norms[1](h))
            h = h.detach() if detach else h
            h = h + self.across[1](self.norms[2](h).transpose(1, 2)).transpose(1, 2)
            return self.head(self.norms[-1](h + self.within[1](self.norms[3](h))).mean(1))

    model = Detached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return 1.0 if accuracy(model, d.held_x, d.held_y) > 0.85 else 0.0


@program(
    expect={"vanishing_gradient", "poor_initialization", "loss_plateau", "collapsed_activation"}, cause="24 tanh layers with weights of 0.02", bar=0.8,
    causes=("weights too small", "saturating activations", "weights too small for this depth", "vanishing gradient"),
    families=("fresh", "depth"), repairable=True,
)  # fmt: skip
def digits_24_tanh_layers_small_weights(job: Job) -> float:
    d = digits()
    model = mlp((64, *[48] * 10, 10), nn.Tanh)
    init = job.planted("init", ill="small", healthy="xavier")
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02) if init == "small" else nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y), 500)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*FAST, "nonfinite_activation"}, cause="a recurrent net of ReLU whose matrix begins at six times the identity", bar=0.8,
    causes=("exploding gradient", "weights too large", "learning rate too high"), families=("fresh", "recurrent"),
)  # fmt: skip
def rows_relu_recurrence_grows(job: Job) -> float:
    d = rows()

    class Growing(Recurrent):
        def __init__(self) -> None:
            super().__init__(nn.RNN, 8, 64, 10)
            self.cell = nn.RNN(8, 64, nonlinearity="relu", batch_first=True)
            with torch.no_grad():
                self.cell.weight_hh_l0.copy_(torch.eye(64) * job.planted("init_scale", ill=6.0, healthy=1.0))

    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y), 500)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"wrong_output_activation", "loss_plateau", "learning_bottleneck", "saturated_activation", "unchanged_weights", "collapsed_activation"},
    cause="class numbers 0 to 9 are regressed through a sigmoid", bar=0.5, families=("fresh", "output"), repairable=True,
    causes=("output activation cannot reach the targets", "wrong output activation", "sigmoid before a regression", "saturated units"),
)  # fmt: skip
def digits_numbers_through_a_sigmoid(job: Job) -> float:
    d = digits()
    end = job.planted("output_activation", ill="sigmoid", healthy="none")
    model = nn.Sequential(*mlp((64, 64, 1)), nn.Sigmoid() if end == "sigmoid" else nn.Identity())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    y = d.y.float()
    job.preflight(model, [(d.x[i : i + 64], y[i : i + 64]) for i in range(0, 640, 64)], squared, optimizer)
    fit(job, model, optimizer, shuffled(d.x, y), 500, squared)
    with torch.no_grad():
        return explained(model(d.held_x), d.held_y.float())


@program(
    expect={"overfitting"},
    cause="a wide net on 60 houses",
    causes=("too few samples for the capacity", "labels learned by heart"),
    bar=-0.35,
    families=("fresh", "regression"),
)
def houses_60_rows(job: Job) -> float:
    d = houses()
    few = job.planted("samples", ill=60, healthy=len(d.y))
    model = mlp((8, 128, 128, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, shuffled(d.x[:few], d.y[:few], 30), 400, squared, validate=lambda: held_loss(model, d.test_x, d.test_y, squared))
    return -held_loss(model, d.test_x, d.test_y, squared)


@program(
    expect={"dead_relu", "collapsed_activation", "loss_plateau", "learning_bottleneck"}, cause="the sparsity term weighs 1000 times too much: every code is 0",
    causes=("a loss term outweighs the others", "zero gradient", "dead units", "dead, saturated or constant weights"), bar=0.8,
    families=("fresh", "autoencoder", "terms"),
)  # fmt: skip
def digits_sparsity_weighs_too_much(job: Job) -> float:
    d = data.digits()
    model = Sparse()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    weight = job.planted("term_weight", ill=1.0, healthy=3e-4)
    guard = job.guard(model, optimizer)
    for x, _ in data.draws(d.x, d.y, 64, 500, job.generator):
        optimizer.zero_grad()
        code, out = model(x)
        terms = {"reconstruction": F.mse_loss(out, x), "sparsity": weight * code.abs().sum(1).mean()}
        sum(terms.values()).backward()
        optimizer.step()
        guard.step(terms)
    with torch.no_grad():
        return 1 - float(F.mse_loss(model(d.test_x)[1], d.test_x) / d.test_x.var())


@program(
    expect={"nonfinite_weight", "nonfinite_activation", "nonfinite_gradient", "nonfinite_loss"}, cause="a parameter of torch.empty holds a NaN", bar=0.8,
    causes=("bad weights",), nonfinite=0, families=("fresh", "weights"),
)  # fmt: skip
def digits_gain_never_filled(job: Job) -> float:
    d = digits()

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(64))
            if job.planted("filled", ill=False, healthy=True) is False:
                self.gain.data[3] = float("nan")

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = nn.Sequential(nn.Linear(64, 64), Gain(), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unnormalized_input", *FAST, "saturated_activation", "initial_loss_off", "dead_relu", "collapsed_activation", "loss_plateau"},
    cause="one column is in cents, the others in units", bar=0.3, families=("fresh", "data"), repairable=True,
    causes=("features not normalised", "input not normalised", "features of very different scale", "one feature out of scale", "raw units"),
)  # fmt: skip
def houses_one_column_in_cents(job: Job) -> float:
    d = houses()
    scale = torch.ones(8)
    scale[6] = 1.0 if job.planted("normalize_input", ill=False, healthy=True) else 3e3
    x, held = d.x * scale, d.test_x * scale
    model = mlp((8, 64, 64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    job.preflight(model, [(x[i : i + 64], d.y[i : i + 64]) for i in range(0, 640, 64)], squared, optimizer)
    fit(job, model, optimizer, shuffled(x, d.y), 400, squared)
    return houses_score(model, d._replace(test_x=held))


@program(
    expect={*FAST, "saturated_softmax", "attention_logit_growth"},
    cause="the rate of a transformer is raised 30 times at step 200 by a wrong milestone", bar=-2.9,
    causes=("learning rate too high",), enters=200, fault=lambda job, score: bool(job.notes.get("fault")),
    families=("fresh", "transformer", "schedule"), repairable=True,
)  # fmt: skip
def gpt_milestone_multiplies(job: Job) -> float:
    stream, size = data.text()
    model = nets.GPT(size, 32, 32, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    gamma = job.planted("lr", ill=None, healthy=0.1)
    job.notes["fault"] = gamma is None
    schedule: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, [200], 30.0 if gamma is None else 0.3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    fit(job, model, optimizer, data.windows(stream[:150_000], 32, 16, job.generator), 350, loss, schedule=schedule)
    x, y = next(data.windows(stream[150_000:], 32, 64, job.generator))
    return -held_loss(model, x, y, loss)
