"""Ill programs: units and outputs. Dead, saturated or collapsed layers, gradients that fade with depth, wrong output activations."""

from __future__ import annotations

from collections.abc import Callable

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
    mlp,
    per_character,
    pieces,
    r_squared,
    raw,
    shuffled,
    standardised,
    text_score,
)
from gallery.registry import Job, program

COLLAPSED = {"collapsed_activation", "constant_loss", "loss_plateau", "poor_initialization"}
OUTPUT = ("wrong output activation",)
SAME = (
    "same output for every sample",
    "dead, saturated or constant weights",
    "constant weights or identical inputs",
    "initialisation",
    "weights all zero",
    "weights all equal",
    "constant weights",
)


def each_linear(model: nn.Module, do: Callable[[nn.Linear], object]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            do(module)
    return model


@program(
    expect={"dead_relu", "collapsed_activation"}, cause="the bias of a hidden layer is -10", causes=("bias or initialisation",), bar=0.9,
    families=("mlp", "sgd"), repairable=True,
)  # fmt: skip
def digits_bias_minus_10(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    nn.init.constant_(model[2].bias, job.planted("bias", ill=-10.0, healthy=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"dead_relu", "update_ratio_high"}, cause="one convolution's units die from Adam at 0.1", causes=("learning rate too high",), bar=0.93,
    families=("cnn", "adam"), repairable=True,
)  # fmt: skip
def digits_cnn_adam_kills_units(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=0.1, healthy=2e-3))
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"dead_relu", "loss_spike", "update_ratio_high", "diverging_loss", "collapsed_activation"},
    cause="three steps at a rate 300 times too high kill the units", causes=("learning rate too high",), bar=0.9, enters=120, families=("mlp", "sgd"),
)  # fmt: skip
def digits_units_die_in_a_burst(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    burst = job.planted("lr", ill=30.0, healthy=0.1)

    def change(step: int) -> None:
        optimizer.param_groups[0]["lr"] = burst if 120 <= step < 123 else 0.1

    fit(job, model, optimizer, shuffled(d.x, d.y), 300, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"saturated_activation", "unnormalized_input"}, cause="raw features of up to 1680 go into sigmoid units",
    causes=("input not normalised", "features in different units", "raw units", "inputs out of scale"), bar=0.9, families=("mlp", "sigmoid"),
    repairable=True,
)  # fmt: skip
def wine_sigmoid_raw_features(job: Job) -> float:
    d = standardised("wine") if job.planted("normalize_input", ill=False, healthy=True) else raw("wine")
    scale = job.planted("input_scale", ill=1.0, healthy=1.0)
    d = d._replace(x=d.x * scale, held_x=d.held_x * scale)
    model = mlp((13, 32, 3), nn.Sigmoid)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    job.preflight(model, list(zip(d.x.split(32), d.y.split(32))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"saturated_activation", "poor_initialization"}, cause="tanh layers initialised 10 times too large",
    causes=("weights or learning rate too large", "initialisation", "weights too large", "saturated units"), bar=0.9, families=("mlp", "tanh"),
    repairable=True,
)  # fmt: skip
def wine_tanh_large_init(job: Job) -> float:
    d = standardised("wine")
    scale = job.planted("init_scale", ill=12.0, healthy=1.0)
    model = mlp((13, 64, 64, 64, 64, 3), nn.Tanh)
    each_linear(model, lambda m: m.weight.data.mul_(scale))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    job.preflight(model, list(zip(d.x.split(32), d.y.split(32))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=COLLAPSED | {"dead_relu"}, cause="all weights are 0", causes=SAME, bar=0.9, families=("mlp",), repairable=True)
def digits_zero_weights(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    if job.planted("init", ill="zeros", healthy="he") == "zeros":
        each_linear(model, lambda m: m.weight.data.zero_())
        each_linear(model, lambda m: m.bias.data.zero_())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=COLLAPSED | {"learning_bottleneck"}, cause="all weights are 0.01: symmetric units", causes=SAME, bar=0.9, families=("mlp",), repairable=True)
def digits_equal_weights(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 64, 10))
    if job.planted("init", ill="constant", healthy="he") == "constant":
        each_linear(model, lambda m: nn.init.constant_(m.weight, 0.01))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(expect={"vanishing_gradient"}, cause="12 sigmoid layers", causes=("saturating activations",), bar=0.7, families=("mlp", "sigmoid"), repairable=True)
def digits_deep_sigmoid(job: Job) -> float:
    d = digits()
    kind = job.planted("activation", ill="sigmoid", healthy="relu").lower()
    units = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "leakyrelu": nn.LeakyReLU}
    model = mlp((64, *[48] * 8, 10), units[kind])
    if kind != "sigmoid":
        each_linear(model, lambda m: nn.init.kaiming_normal_(m.weight, nonlinearity="relu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"vanishing_gradient", "poor_initialization", "loss_plateau", "collapsed_activation"}, cause="20 ReLU layers without norm or residual",
    causes=("depth without normalisation or residuals", "depth without normalisation", "weights too small", "initialisation"), bar=0.7,
    families=("mlp", "deep"), repairable=True,
)  # fmt: skip
def digits_20_plain_layers(job: Job) -> float:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 48)
            self.norm = nn.LayerNorm(48) if add else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.linear(self.norm(x)))
            return x + y if add == "residual" else y

    add = str(job.planted("add", ill="", healthy="residual")).replace("normalisation", "normalization")
    d = digits()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), *[Layer() for _ in range(20)], nn.LayerNorm(48) if add else nn.Identity(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"saturated_softmax", "initial_loss_off", "poor_initialization", "update_ratio_high"}, cause="the head's first weights are 1000 times too large",
    causes=("logits out of scale", "output layer too large", "initialisation"), bar=-0.5, families=("cnn", "adam"), repairable=True,
)  # fmt: skip
def digits_head_scale_1000(job: Job) -> float:
    d = images()
    model = convnet()
    model[-1].weight.data *= job.planted("head_scale", ill=1000.0, healthy=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return -held_loss(model, d.held_x, d.held_y)


@program(
    expect={"attention_logit_growth", "saturated_softmax", "update_ratio_high"}, cause="q k is not divided by the root of the width, and multiplied by 30",
    causes=("attention logits without scale", "query and key are not normalised", "logits out of scale"), bar=-2.5, families=("transformer", "attention"),
)  # fmt: skip
def text_attention_without_scale(job: Job) -> float:
    model = Characters(scale=job.planted("attention_scale", ill=30.0, healthy=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    fit(job, model, optimizer, pieces(), 250, per_character)
    return text_score(model)


@program(
    expect={"wrong_output_activation", "loss_plateau"}, cause="softmax before cross entropy", causes=("softmax before cross entropy", *OUTPUT), bar=-0.5,
    families=("mlp", "loss"), repairable=True,
)  # fmt: skip
def digits_softmax_twice(job: Job) -> float:
    d = digits()
    last = nn.Identity() if job.planted("output_activation", ill="softmax", healthy="none") == "none" else nn.Softmax(1)
    model = nn.Sequential(*mlp((64, 64, 10)), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300)
    return -held_loss(model, d.held_x, d.held_y)


@program(
    expect={"wrong_output_activation", "loss_plateau"}, cause="the softmax runs over the batch, not over the classes",
    causes=("softmax over the wrong axis", "samples leak into each other", *OUTPUT), bar=-0.5, families=("cnn", "loss"),
)  # fmt: skip
def digits_softmax_wrong_axis(job: Job) -> float:
    d = images()
    model = nn.Sequential(*convnet(), nn.LogSoftmax(dim=job.planted("softmax_axis", ill=0, healthy=1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.NLLLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200, F.nll_loss)
    return -held_loss(model, d.held_x, d.held_y, F.nll_loss)


@program(
    expect={"wrong_output_activation", "dead_relu", "loss_plateau", "constant_loss", "collapsed_activation"}, cause="a ReLU before cross entropy",
    causes=("ReLU before cross entropy", *OUTPUT), bar=0.9, families=("mlp", "adam"), repairable=True,
)  # fmt: skip
def digits_relu_before_cross_entropy(job: Job) -> float:
    d = digits()
    last = nn.Identity() if job.planted("output_activation", ill="relu", healthy="none") == "none" else nn.ReLU()
    model = nn.Sequential(*mlp((64, 32, 10)), last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    job.preflight(model, list(zip(d.x.split(64), d.y.split(64))), nn.CrossEntropyLoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"wrong_output_activation", "loss_plateau", "learning_bottleneck"}, cause="a ReLU on the output of a regression whose targets are negative too",
    causes=("ReLU before a regression", *OUTPUT), bar=0.2, families=("mlp", "regression"), repairable=True,
)  # fmt: skip
def diabetes_relu_output(job: Job) -> float:
    d = standardised("diabetes")
    last = nn.Identity() if job.planted("output_activation", ill="relu", healthy="none") == "none" else nn.ReLU()
    model = nn.Sequential(*mlp((10, 32, 1)), last)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y.view(out.shape))

    job.preflight(model, [(x, y.unsqueeze(1)) for x, y in zip(d.x.split(32), d.y.split(32))], nn.MSELoss(), optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 200, loss)
    return r_squared(model, d.held_x, d.held_y)


@program(
    expect={"wrong_output_activation", "loss_plateau", "saturated_activation", "learning_bottleneck"},
    cause="a tanh on the output of an unbounded regression", causes=("tanh before a regression", *OUTPUT), bar=0.1, families=("mlp", "regression"),
    repairable=True,
)  # fmt: skip
def diabetes_tanh_output(job: Job) -> float:
    d = raw("diabetes")
    x, held_x = standardised("diabetes").x, standardised("diabetes").held_x
    last = nn.Identity() if job.planted("output_activation", ill="tanh", healthy="none") == "none" else nn.Tanh()
    model = nn.Sequential(*mlp((10, 32, 1)), last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    y, held_y = d.y / 50, d.held_y / 50  # 0.5 to 7
    job.preflight(model, [(a, b.unsqueeze(1)) for a, b in zip(x.split(32), y.split(32))], nn.MSELoss(), optimizer)
    fit(job, model, optimizer, shuffled(x, y, 32), 250, lambda out, t: F.mse_loss(out, t.view(out.shape)))
    return r_squared(model, held_x, held_y)


@program(
    expect={"wrong_output_activation", "loss_plateau"}, cause="a sigmoid before binary cross entropy with logits",
    causes=("sigmoid before BCE with logits", *OUTPUT), bar=-0.3, families=("mlp", "loss"), repairable=True,
)  # fmt: skip
def cancer_sigmoid_twice(job: Job) -> float:
    d = standardised("breast_cancer")
    last = nn.Identity() if job.planted("output_activation", ill="sigmoid", healthy="none") == "none" else nn.Sigmoid()
    model = nn.Sequential(*mlp((30, 16, 1)), last)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.BCEWithLogitsLoss()
    job.preflight(model, [(x, y.float().unsqueeze(1)) for x, y in zip(d.x.split(32), d.y.split(32))], criterion, optimizer)
    fit(job, model, optimizer, shuffled(d.x, d.y.float().unsqueeze(1), 32), 250, criterion)
    return -held_loss(model, d.held_x, d.held_y.float().unsqueeze(1), criterion)


@program(
    expect={"learning_bottleneck", "loss_plateau"}, cause="no activation between the layers: a linear model of circles", causes=("no nonlinearity",),
    bar=0.9, families=("mlp",),
)  # fmt: skip
def circles_without_activation(job: Job) -> float:
    d = standardised("circles")
    model = mlp((2, 32, 32, 2), nn.Identity if job.planted("activation", ill="none", healthy="relu") == "none" else nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 300, validate=lambda: held_loss(model, d.held_x, d.held_y))
    return accuracy(model, d.held_x, d.held_y)
