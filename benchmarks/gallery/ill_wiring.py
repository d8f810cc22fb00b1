"""Ill programs: the pieces are wired wrongly, so that weights do not learn what the gradients say, or do not move at all."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.ill_tools import Characters, accuracy, convnet, digits, fit, images, missed, mlp, per_character, pieces, shuffled, standardised, text_score
from gallery.registry import Job, program

STILL = {"unchanged_weights"}
STANDSTILL = {"unchanged_weights", "loss_plateau", "update_ratio_low", "learning_bottleneck"}


@program(
    expect={"missing_zero_grad"}, cause="gradients are never cleared", causes=("zero_grad() is not called",), bar=0.9, families=("cnn", "momentum"),
    repairable=True,
)  # fmt: skip
def digits_cnn_no_zero_grad(job: Job) -> float:
    d = images()
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    clear = job.planted("zero_grad", ill=False, healthy=True)
    with job.guard(model, optimizer) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y), 250)):
            if clear:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect={"missing_zero_grad"}, cause="zero_grad() is lost in a branch from step 100 on", causes=("zero_grad() is not called",), bar=-2.65, enters=100,
    fault=missed, families=("transformer", "adamw"), repairable=True,
)  # fmt: skip
def text_zero_grad_lost(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    clear = job.planted("zero_grad", ill=False, healthy=True)
    job.notes["fault"] = not clear
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(pieces(), 250))):
            loss = per_character(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step < 100 or clear:
                optimizer.zero_grad()
            guard.step(loss)
    return text_score(model)


@program(
    expect=STANDSTILL, cause="gradients are cleared between backward() and step()",
    causes=("gradients are cleared before the step", "zero gradient", "detached from the loss"), bar=0.9, families=("mlp", "adam"),
)  # fmt: skip
def digits_zero_grad_before_step(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    late = job.planted("zero_grad_before_step", ill=True, healthy=False)
    with job.guard(model, optimizer) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y), 250)):
            loss = F.cross_entropy(model(x), y)
            if not late:
                optimizer.zero_grad()
            loss.backward()
            if late:
                optimizer.zero_grad()
            optimizer.step()
            guard.step(loss)
    return accuracy(model, d.held_x, d.held_y)


@program(expect=STANDSTILL, cause="optimizer.step() is never called", causes=("optimizer.step() is never called",), bar=0.8, families=("mlp",), repairable=True)
def cancer_never_steps(job: Job) -> float:
    d = standardised("breast_cancer")
    model = mlp((30, 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every = job.planted("step_every", ill=0, healthy=1)
    with job.guard(model, optimizer) as guard:
        for x, y in guard.batches(islice(shuffled(d.x, d.y, 32), 200)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if every:
                optimizer.step()
            guard.step(loss)
    trained = accuracy(model, d.held_x, d.held_y)
    job.notes["fault"] = not every
    return trained


@program(
    expect=STILL, cause="a condition on the step's number stops the optimizer at step 100",
    causes=("optimizer.step() is never called", "optimizer.step() is no longer called"), bar=-2.6, enters=100, families=("transformer",), repairable=True,
)  # fmt: skip
def text_steps_stop(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    go_on = job.planted("step_every", ill=0, healthy=1)
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(pieces(), 250))):
            optimizer.zero_grad()
            loss = per_character(model(x), y)
            loss.backward()
            if step < 100 or go_on:
                optimizer.step()
            guard.step(loss)
    return text_score(model)


@program(
    expect=STILL, cause="the head is replaced after the optimizer was built", bar=0.9, families=("cnn", "fine-tune"), repairable=True,
    causes=("not given to the optimizer", "the optimizer holds another model's parameters"), fault=missed,
)  # fmt: skip
def digits_new_head_not_in_optimizer(job: Job) -> float:
    d = images()
    model = convnet()
    new_head = nn.Linear(128, 10)
    if job.planted("optimizer_parameters", ill=False, healthy=True):
        model[-1] = new_head
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model[-1] = new_head
    before = new_head.weight.clone()
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    job.notes["fault"] = bool((before == new_head.weight).all())
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=STANDSTILL, cause="the model is copied after the optimizer was built", causes=("the optimizer holds another model's parameters",), bar=0.8,
    families=("mlp", "adam"), repairable=True,
)  # fmt: skip
def digits_optimizer_of_old_model(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if not job.planted("optimizer_parameters", ill=False, healthy=True):
        model = copy.deepcopy(model)
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=STILL, cause="the rule that makes the parameter groups forgets the attention", causes=("not given to the optimizer",), bar=-2.6, fault=missed,
    families=("transformer",), repairable=True,
)  # fmt: skip
def text_group_left_out(job: Job) -> float:
    """Decay and no-decay groups by name; the rule forgets the attention."""
    model = Characters()
    named = dict(model.named_parameters())
    everything = job.planted("optimizer_parameters", ill=False, healthy=True)
    decay = [p for n, p in named.items() if p.dim() > 1 and ("feed" in n or (everything and "attention" in n))]
    rest = [p for n, p in named.items() if p.dim() < 2 or n.startswith(("embed", "place", "head"))]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=2e-3)
    watched = model.blocks[0].attention.qkv.weight
    before = watched.detach().clone()
    fit(job, model, optimizer, pieces(), 200, per_character)
    job.notes["fault"] = bool((before == watched).all())
    return text_score(model)


@program(expect=STILL, cause="features are detached before the head", causes=("detached from the loss",), bar=0.9, fault=missed, families=("cnn",))
def digits_cnn_features_detached(job: Job) -> float:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = convnet()
            self.body, self.head = net[:-1], net[-1]

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x)
            return self.head(features.detach() if detach else features)

    detach = job.planted("detach", ill=True, healthy=False)
    d = images()
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    before = model.body[0].weight.detach().clone()
    fit(job, model, optimizer, shuffled(d.x, d.y), 200)
    job.notes["fault"] = bool((before == model.body[0].weight).all())
    return accuracy(model, d.held_x, d.held_y)


@program(expect=STILL, cause="the encoder runs under no_grad()", causes=("detached from the loss",), bar=-2.6, fault=missed, families=("transformer",))
def text_encoder_under_no_grad(job: Job) -> float:
    class Net(Characters):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not frozen):  # left over from inference
                h = self.embed(x) + self.place.weight[: x.shape[1]]
                for block in self.blocks:
                    h = block(h)
            return self.head(self.norm(h))

    frozen = job.planted("no_grad", ill=True, healthy=False)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = model.embed.weight.detach().clone()
    fit(job, model, optimizer, pieces(), 200, per_character)
    job.notes["fault"] = torch.equal(before, model.embed.weight)
    return text_score(model)


@program(
    expect=STANDSTILL, cause="the loss is rebuilt from its number: a new leaf", causes=("detached from the loss", "no gradient"), bar=0.8,
    families=("mlp",),
)  # fmt: skip
def digits_loss_is_a_new_leaf(job: Job) -> float:
    d = digits()
    model = mlp((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new = job.planted("new_leaf", ill=True, healthy=False)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(out, y)
        return torch.tensor(value.item(), requires_grad=True) if new else value

    fit(job, model, optimizer, shuffled(d.x, d.y), 200, loss)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=STANDSTILL, cause="only the head is trained, and the head does not require gradients", bar=0.9, families=("cnn", "fine-tune"), fault=missed,
    causes=("not given to the optimizer", "frozen by mistake", "detached from the loss"),
)  # fmt: skip
def digits_only_a_frozen_head(job: Job) -> float:
    d = images()
    model = convnet()
    head = model[-1]
    head.requires_grad_(not job.planted("frozen", ill=True, healthy=False))
    optimizer = torch.optim.Adam(head.parameters() if not head.weight.requires_grad else model.parameters(), lr=3e-3)
    before = [p.detach().clone() for p in model.parameters()]
    fit(job, model, optimizer, shuffled(d.x, d.y), 150)
    job.notes["fault"] = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=STILL, cause="one group's learning rate is 0 from step 80 on", causes=("learning rate is zero", "frozen by mistake"), bar=0.9, enters=80,
    fault=missed, families=("cnn", "groups"),
)  # fmt: skip
def digits_group_rate_becomes_zero(job: Job) -> float:
    d = images()
    model = convnet()
    optimizer = torch.optim.SGD([{"params": model[:4].parameters()}, {"params": model[4:].parameters()}], lr=0.05, momentum=0.9)
    late = job.planted("lr", ill=0.0, healthy=0.05)
    kept: dict[str, Any] = {}

    def change(step: int) -> None:
        optimizer.param_groups[1]["lr"] = 0.05 if step < 80 else late
        if step == 80:
            kept["weight"] = model[4].weight.detach().clone()

    fit(job, model, optimizer, shuffled(d.x, d.y), 220, change=change)
    job.notes["fault"] = torch.equal(kept["weight"], model[4].weight)
    return accuracy(model, d.held_x, d.held_y)


@program(
    expect=STANDSTILL, cause="a checkpoint is loaded into a new model at step 120; the optimizer keeps the old one", bar=-2.55, enters=120,
    causes=("the optimizer holds another model's parameters", "detached from the loss"), families=("transformer", "resume"),
)  # fmt: skip
def text_reload_makes_new_parameters(job: Job) -> float:
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    new = job.planted("optimizer_parameters", ill=False, healthy=True)

    def change(step: int) -> None:
        if step == 120:
            model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=not new)  # assign: new parameters

    fit(job, model, optimizer, pieces(), 260, per_character, change=change)
    return text_score(model)
