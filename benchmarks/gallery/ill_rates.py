"""Ill programs: step sizes. Learning rates, momentum, schedules and decay that are wrong from the start or from some step on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gallery.ill_tools import (
    Characters,
    Recurrent,
    accuracy,
    convnet,
    digits,
    fit,
    held_loss,
    images,
    mlp,
    per_character,
    pieces,
    r_squared,
    rows,
    shuffled,
    standardised,
    text_score,
)
from gallery.registry import Job, program

HIGH = {"update_ratio_high", "exploding_gradient", "diverging_loss", "oscillating_loss"}
LOW = {"update_ratio_low", "loss_plateau"}
TOO_HIGH, TOO_LOW = ("learning rate too high",), ("learning rate too low",)


def set_lr(optimizer: torch.optim.Optimizer, lr: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@program(expect=HIGH, cause="learning rate 200 times too high", causes=TOO_HIGH, bar=0.9, families=("mlp", "sgd"), repairable=True)
def digits_mlp_sgd_lr_200x(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=job.planted("lr", ill=20.0, healthy=0.1))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=HIGH, cause="learning rate 300 times too high", causes=TOO_HIGH, bar=0.85, families=("cnn", "adam"), repairable=True)
def digits_cnn_adam_lr_300x(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=0.3, healthy=1e-3))
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=HIGH, cause="learning rate 100 times too high", causes=TOO_HIGH, bar=0.85, families=("rnn", "rmsprop"), repairable=True)
def rows_gru_rmsprop_lr_100x(job: Job) -> float:
    d = rows()
    model = Recurrent(nn.GRU, 8, 48, 10)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=job.planted("lr", ill=0.2, healthy=2e-3))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={*HIGH, "attention_logit_growth", "saturated_softmax"}, cause="learning rate 30 times too high, without warm-up", causes=TOO_HIGH, bar=-2.75,
    families=("transformer", "adamw"), repairable=True,
)  # fmt: skip
def text_transformer_lr_30x(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.planted("lr", ill=6e-2, healthy=2e-3))
    fit(job, model, optimizer, pieces(), 200, per_character)
    return text_score(model)


@program(expect=LOW, cause="learning rate 1e-8", causes=TOO_LOW, bar=0.8, families=("mlp", "sgd"), repairable=True)
def digits_mlp_lr_1e_8(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=job.planted("lr", ill=1e-8, healthy=0.1))
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=LOW, cause="learning rate 1000 times too low", causes=TOO_LOW, bar=-3.0, families=("transformer", "adamw"), repairable=True)
def text_transformer_lr_too_low(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.planted("lr", ill=2e-7, healthy=2e-3))
    fit(job, model, optimizer, pieces(), 150, per_character)
    return text_score(model)


@program(
    expect={"oscillating_loss", "update_ratio_high", "learning_bottleneck", "loss_plateau", "diverging_loss"}, cause="momentum 0.999",
    causes=("momentum too high", *TOO_HIGH), bar=0.93, families=("mlp", "momentum"),
)  # fmt: skip
def digits_momentum_0999(job: Job) -> float:
    d = digits()
    model = mlp((64, 32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=job.planted("momentum", ill=0.999, healthy=0.9))
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"oscillating_loss", "update_ratio_high", "diverging_loss", "exploding_gradient", "loss_spike"},
    cause="the loss falls and then bounces at a height: learning rate 15 times too high", causes=TOO_HIGH, bar=-0.4, families=("mlp", "momentum"),
    repairable=True,
)  # fmt: skip
def digits_tanh_momentum_bounces(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10), nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.planted("lr", ill=0.3, healthy=0.02), momentum=0.9)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 300)
    return -held_loss(model, d.held_x, d.held_y)


@program(
    expect={"oscillating_loss", "update_ratio_high", "diverging_loss", "exploding_gradient"}, cause="a step just above the edge of stability",
    causes=TOO_HIGH, bar=0.28, families=("linear", "regression"), repairable=True,
)  # fmt: skip
def diabetes_lr_above_the_edge(job: Job) -> float:
    d = standardised("diabetes")
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.planted("lr", ill=0.255, healthy=0.05))
    fit(job, model, optimizer, shuffled(d.x, d.y, 300), 250, lambda out, y: F.mse_loss(out.squeeze(1), y))
    return r_squared(model, d.held_x, d.held_y)


@program(expect=HIGH | {"loss_spike"}, cause="learning rate jumps by 100 at step 150", causes=TOO_HIGH, bar=0.9, enters=150, families=("mlp", "sgd"))
def digits_mlp_lr_jumps(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    jump = job.planted("lr", ill=10.0, healthy=0.1)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, change=lambda step: set_lr(optimizer, jump if step >= 150 else 0.1))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=HIGH | {"loss_spike", "attention_logit_growth", "saturated_softmax"}, cause="a resumed run takes a learning rate of 0.1 from the wrong file",
    causes=TOO_HIGH, bar=-2.9, enters=120, families=("transformer", "adamw"),
)  # fmt: skip
def text_transformer_lr_jumps(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    late = job.planted("lr", ill=0.1, healthy=2e-3)
    fit(job, model, optimizer, pieces(), 220, per_character, change=lambda step: set_lr(optimizer, late if step >= 120 else 2e-3))
    return text_score(model)


@program(expect=HIGH | {"loss_spike"}, cause="the schedule multiplies the rate instead of dividing it", causes=TOO_HIGH, bar=0.9, enters=60, families=("cnn",))
def digits_cnn_schedule_grows(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 120, 180], gamma=job.planted("gamma", ill=5.0, healthy=0.5))
    fit(job, model, optimizer, shuffled(d.x, d.y), 250, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=HIGH, cause="one-cycle peak of 8 in place of 0.3", causes=TOO_HIGH, bar=0.9, families=("mlp",))
def cancer_onecycle_peak_too_high(job: Job) -> float:
    d = standardised("breast_cancer")
    model = mlp((30, 32, 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=job.planted("lr", ill=8.0, healthy=0.1), total_steps=250)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 250, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=LOW | {"learning_bottleneck", "unchanged_weights"}, cause="the decay meant for epochs is applied at every step",
    causes=("learning rate schedule", *TOO_LOW), bar=0.85, enters=10, families=("mlp", "schedule"),
)  # fmt: skip
def digits_decay_per_step(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=job.planted("gamma", ill=0.8, healthy=0.999))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=LOW | {"learning_bottleneck", "unchanged_weights", "constant_loss"}, cause="an integer division makes the schedule 0 after the first step",
    causes=("learning rate schedule", "learning rate is zero", *TOO_LOW), bar=0.85, enters=1, families=("cnn", "schedule"),
)  # fmt: skip
def digits_cnn_schedule_is_zero(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    whole = job.planted("integer_division", ill=True, healthy=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (250 - step) // 250 if whole else (250 - step) / 250)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200, schedule=schedule)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"vanishing_gradient", "update_ratio_low", "loss_plateau"}, cause="Adam's eps is 100", causes=("adam epsilon",), bar=0.85,
    families=("mlp", "adam"), repairable=True,
)  # fmt: skip
def digits_adam_eps_100(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=job.planted("eps", ill=100.0, healthy=1e-8))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"collapsed_activation", "loss_plateau", "constant_loss", "learning_bottleneck", "vanishing_gradient", "update_ratio_high"},
    cause="weight decay 1", causes=("weight decay too high",), bar=0.85, families=("mlp", "decay"), repairable=True,
)  # fmt: skip
def digits_weight_decay_1(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=job.planted("weight_decay", ill=1.0, healthy=1e-4))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"collapsed_activation", "diverging_loss", "constant_loss", "learning_bottleneck", "vanishing_gradient", "loss_plateau", "update_ratio_high"},
    cause="from step 150 weight decay 20 comes from a wrong entry of the configuration", causes=("weight decay too high",), bar=0.85, enters=150,
    families=("cnn", "decay"),
)  # fmt: skip
def digits_cnn_adamw_decay_enters(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    late = job.planted("weight_decay", ill=100.0, healthy=0.01)

    def change(step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = late if step >= 150 else 0.01

    fit(job, model, optimizer, shuffled(d.x, d.y), 300, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=HIGH | {"initial_loss_off"}, cause="the loss is summed over the batch", causes=("sum reduction", *TOO_HIGH), bar=0.9, families=("mlp", "loss"),
    repairable=True,
)  # fmt: skip
def digits_sum_reduction(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    criterion = nn.CrossEntropyLoss(reduction=job.planted("loss_reduction", ill="sum", healthy="mean"))
    job.preflight(model, list(zip(d.x.split(128), d.y.split(128))), criterion, optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 128), 200, criterion)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=HIGH, cause="losses of 32 micro-batches are added, not averaged", causes=TOO_HIGH, bar=0.9, families=("mlp", "accumulation"))
def digits_accumulation_not_averaged(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    share = job.planted("micro_batches", ill=1, healthy=32)
    batches = shuffled(d.x, d.y, 8)
    with job.guard(model, optimizer) as guard:
        for _ in range(150):
            optimizer.zero_grad()
            total = torch.zeros(())
            for _ in range(32):
                x, y = next(batches)
                guard.batch(x, y)
                loss = F.cross_entropy(model(x), y) / share
                loss.backward()
                total += loss.detach()
            optimizer.step()
            guard.step(total)
    return accuracy(model, d.held_x, d.held_y)
