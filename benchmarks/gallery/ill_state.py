"""Ill programs: precision and state. Rounding, loss scaling, clipping, weights that something else overwrites, frozen ones that move."""

from __future__ import annotations

import copy
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import (
    Block,
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
    shuffled,
    standardised,
    text_score,
)
from gallery.registry import Job, program


class Low(nn.Module):
    """A model whose weights are of a low precision; its logits are of float32 again."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = net.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.net.parameters())
        return self.net(x.to(first.dtype)).float()


@program(
    expect={"unchanged_weights", "update_ratio_low", "loss_plateau"}, cause="bfloat16 weights round updates of a rate of 1e-4 away", causes=("rounding",),
    bar=0.85, families=("mlp", "bf16"), repairable=True,
)  # fmt: skip
def digits_bf16_rounds_away(job: Job) -> float:
    d = digits()
    master = job.planted("master_weights", ill=False, healthy=True)
    model = Low(mlp((64, 256, 10)), torch.float32 if master else torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.planted("lr", ill=1e-4, healthy=1e-4))
    fit(job, model, optimizer, shuffled(d.x, d.y), 400)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unchanged_weights", "update_ratio_low"}, cause="from step 120 the weights are bfloat16, and the rate is 1e-4", causes=("rounding",), bar=0.0,
    enters=120, fault=missed, families=("cnn", "bf16"),
)  # fmt: skip
def digits_cnn_turns_bf16(job: Job) -> float:
    d = images()
    model = Low(convnet(norm=False), torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    low = not job.planted("master_weights", ill=False, healthy=True)
    kept: list[Tensor] = []

    def change(step: int) -> None:
        if step == 120:
            optimizer.param_groups[0]["lr"] = 1e-4
            if low:
                model.bfloat16()
        if step == 140:
            kept.append(model.net[0].weight.detach().clone())

    fit(job, model, optimizer, shuffled(d.x, d.y), 260, change=change)
    job.notes["fault"] = float((kept[0] == model.net[0].weight).float().mean()) > 0.9
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"skipped_steps", "nonfinite_gradient"}, cause="a loss scale of 2^36 under float16, lowered by a thousandth at a time",
    causes=("non-finite gradients", "loss scale too high"), bar=0.85, families=("mlp", "amp"), repairable=True,
)  # fmt: skip
def digits_scaler_far_too_high(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=job.planted("init_scale", ill=2.0**36, healthy=1024.0), backoff_factor=0.999)
    with job.guard(model, optimizer, scaler=scaler) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y), 250)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = model(x)
            loss = F.cross_entropy(out.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"skipped_steps", "nonfinite_gradient"}, cause="from step 100 every gradient is NaN, and the scaler skips every step",
    causes=("non-finite gradients", "loss function"), bar=0.9, enters=100, fault=missed, families=("cnn", "amp"),
)  # fmt: skip
def digits_scaler_skips_from_now_on(job: Job) -> float:
    """A consistency term is switched on: the distance of two views, which are equal, as nothing is random."""
    d = images()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    eps = job.planted("eps", ill=0.0, healthy=1e-4)
    job.notes["fault"] = eps == 0.0
    with job.guard(model, optimizer, scaler=scaler) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(shuffled(d.x, d.y), 300))):
            optimizer.zero_grad()
            features = model[:-1](x)
            loss = F.cross_entropy(model[-1](features), y)
            if step >= 100:
                loss = loss + 0.1 * torch.sqrt(((features - model[:-1](x)) ** 2).sum(1) + eps).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"clipping_dominates"}, cause="gradients are clipped at 1e-3", causes=("clip value too low",), bar=0.85, families=("mlp", "sgd"),
    repairable=True,
)  # fmt: skip
def digits_clip_1e_3(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(job, model, optimizer, shuffled(d.x, d.y), 300, clip=job.planted("max_norm", ill=1e-3, healthy=5.0))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"clipping_dominates"}, cause="a resumed run clips at 0.001 in place of 1", causes=("clip value too low",), bar=-2.63, enters=80,
    families=("transformer", "sgd"), repairable=True,
)  # fmt: skip
def text_clip_changes(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    late = job.planted("max_norm", ill=1e-3, healthy=5.0)
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(pieces(), 300))):
            optimizer.zero_grad()
            loss = per_character(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), late if step >= 80 else 5.0)
            optimizer.step()
            guard.step(loss)
    return text_score(model)


@program(
    expect={"unchanged_weights", "update_ratio_low", "loss_plateau"},
    cause="the moving average of decay 0.9999 is written back into the model after each step", causes=("weights are overwritten", "frozen by mistake"),
    bar=0.85, families=("mlp", "ema"),
)  # fmt: skip
def digits_ema_overwrites_the_model(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    back = job.planted("write_back", ill=True, healthy=False)
    with job.guard(model, optimizer) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y), 300)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters()):
                    slow.lerp_(fast, 1e-4)
                    if back:
                        fast.copy_(slow)
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"unchanged_weights", "loss_plateau", "diverging_loss", "loss_spike", "learning_bottleneck"}, bar=0.85, enters=100, families=("cnn",),
    cause="from step 100 a callback loads the best checkpoint, which is the first one, before every step",
    causes=("weights are overwritten", "frozen by mistake"),
)  # fmt: skip
def digits_first_checkpoint_again_and_again(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    best = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    again = job.planted("reload", ill=True, healthy=False)

    def change(step: int) -> None:
        if again and step >= 100:
            model.load_state_dict(best)

    fit(job, model, optimizer, shuffled(d.x, d.y), 240, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"frozen_weights_changed"}, cause="frozen at step 100, and moved on by AdamW's decay and momentum: gradients of 0 in place of None", bar=0.0,
    enters=100, causes=("a gradient is left from before it was frozen", "the optimizer holds frozen parameters"), fault=missed,
    families=("cnn", "fine-tune"),
)  # fmt: skip
def digits_frozen_backbone_decays(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    to_none = job.planted("set_to_none", ill=False, healthy=True)
    kept: list[Tensor] = []
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(shuffled(d.x, d.y), 240))):
            optimizer.zero_grad(set_to_none=to_none)
            if step == 100:
                model[:-1].requires_grad_(False)
                kept.append(model[0].weight.clone())
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
    job.notes["fault"] = not torch.equal(kept[0], model[0].weight)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"frozen_weights_changed"}, cause="the frozen embedding is written to by a weight-tying line in the loop", causes=("weights are overwritten",),
    bar=-9.0, fault=missed, families=("transformer", "fine-tune"),
)  # fmt: skip
def text_frozen_embedding_is_overwritten(job: Job) -> float:
    model = Characters()
    model.embed.requires_grad_(False)
    before = model.embed.weight.clone()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    tie = job.planted("tie", ill=True, healthy=False)

    def change(step: int) -> None:
        if tie:
            model.embed.weight.data.lerp_(model.head.weight.data, 0.01)

    fit(job, model, optimizer, pieces(), 180, per_character, change=change)
    job.notes["fault"] = not torch.equal(before, model.embed.weight)
    return text_score(model)


@program(
    expect={"constant_loss", "loss_plateau", "saturated_softmax", "unchanged_weights"},
    cause="a bias of 200 on the background class: probabilities underflow, the loss stays at 87.3365", causes=("softmax underflow", "logits out of scale"),
    bar=0.8, families=("mlp", "softmax"),
)  # fmt: skip
def digits_background_bias(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 11))  # the eleventh class is the background
    model[-1].bias.data[10] = job.planted("bias", ill=200.0, healthy=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    least = torch.finfo(torch.float32).tiny
    fit(job, model, optimizer, shuffled(d.x, d.y), 250, lambda out, y: -torch.softmax(out, 1).gather(1, y.unsqueeze(1)).clamp(min=least).log().mean())
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"constant_loss", "collapsed_activation", "dead_relu", "loss_plateau", "poor_initialization"},
    cause="zero weights and no biases: the loss stays at ln 10", bar=0.8,
    causes=("same output for every sample", "constant weights or identical inputs", "weights all zero", "constant weights"), families=("cnn",),
    repairable=True,
)  # fmt: skip
def digits_cnn_zero_without_bias(job: Job) -> float:
    d = images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10, bias=False))
    if job.planted("init", ill="zeros", healthy="he") == "zeros":
        for p in model.parameters():
            nn.init.zeros_(p)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(job, model, optimizer, shuffled(d.x, d.y), 250)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"attention_logit_growth", "saturated_softmax", "update_ratio_high", "diverging_loss"},
    cause="q and k grow without bound: their learning rate is 100 times the others'", causes=("learning rate too high", "logits out of scale"), bar=0.88,
    enters=60, families=("transformer", "attention"),
)  # fmt: skip
def rows_attention_logits_grow(job: Job) -> float:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.place, self.block, self.head = nn.Linear(8, 32), nn.Parameter(torch.randn(8, 32) * 0.1), Block(32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.into(x.view(-1, 8, 8)) + self.place).mean(1))

    d = digits()
    model = Net()
    fast = list(model.block.attention.qkv.parameters())
    rest = [p for n, p in model.named_parameters() if "qkv" not in n]
    optimizer = torch.optim.AdamW([{"params": fast}, {"params": rest}], lr=3e-3)
    late = job.planted("lr", ill=0.3, healthy=3e-3)

    def change(step: int) -> None:
        optimizer.param_groups[0]["lr"] = late if step >= 60 else 3e-3

    fit(job, model, optimizer, shuffled(d.x, d.y), 250, change=change)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"validation_mismatch", "overfitting", "diverging_loss", "learning_bottleneck"},
    cause="eval() of the first validation is never taken back: dropout and batch norm stay off", causes=("train/eval mismatch", "train() is not called"),
    bar=0.0, enters=20, fault=missed, families=("mlp", "mode"),
)  # fmt: skip
def cancer_train_mode_forgotten(job: Job) -> float:
    d = standardised("breast_cancer")
    model = nn.Sequential(nn.Linear(30, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    back = job.planted("train_mode", ill=False, healthy=True)

    def validate() -> float:
        value = held_loss(model, d.held_x, d.held_y)
        model.train(back)
        return value

    fit(job, model, optimizer, shuffled(d.x, d.y, 32), 400, validate=validate)
    job.notes["fault"] = not model.training
    return accuracy(model, d.held_x, d.held_y)
