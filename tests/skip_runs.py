"""Optimizers, ways of training and a poison for the laws of skipping: short runs whose every tensor is compared bit for bit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from lossguard import Guard
from lossguard.device.spikes import Limit

FUSED = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=0.001, maximize=True, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01, weight_decay=0.01, initial_accumulator_value=0.1, fused=True),
}


class Lion(Optimizer):
    """A custom optimizer whose state begins at zero at its first step."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["step"] = torch.zeros(())
                state["step"] += 1
                p.sub_(group["lr"] * torch.sign(state["exp_avg"] * group["betas"][0] + p.grad * (1 - group["betas"][0])))
                state["exp_avg"] = state["exp_avg"] * group["betas"][1] + p.grad * (1 - group["betas"][1])  # a new tensor at every step


class Nested(Lion):
    """Keeps lists and dictionaries of tensors, and a counter in its group."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group.setdefault("updates", torch.zeros(()))
            group["updates"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                past = self.state[p].setdefault("past", {"gradients": [torch.zeros_like(p), torch.zeros_like(p)]})["gradients"]
                past[0].copy_(past[1])
                past[1].copy_(p.grad)


def sgd(p, **words):
    return torch.optim.SGD(p, lr=0.05, **words)


OTHERS = {
    "sgd": sgd,
    "sgd foreach": lambda p: sgd(p, momentum=0.9, foreach=True),
    "momentum": lambda p: sgd(p, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.005),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.005),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.02),
    "lion": Lion,
    "nested": Nested,
    "mixed": lambda p: torch.optim.AdamW([{"params": q} for q in p], lr=0.02),
}


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(i, dtype=torch.float32):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(16, 4, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


def loss_of(model, i, factor=1.0):
    x, y = batch(i, next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y) * factor


def bits(t):
    """A tensor's bytes: NaN equals itself. A zero has one sign, for momentum that begins at zero may lose that of its first gradient."""
    t = t.detach()
    t = (t + 0.0 if t.is_floating_point() else t).contiguous()
    return (tuple(t.shape), t.dtype, bytes(t.reshape(-1).view(torch.uint8).tolist()))


def everything(model, *optimizers):
    """Weights, buffers, and all that the optimizers keep."""
    found = {f"weights {n}": bits(p) for n, p in model.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                leaves = value if isinstance(value, list) else next(iter(value.values())) if isinstance(value, dict) else [value]
                found.update({f"{k}.{i}.{key}.{j}": bits(t) if isinstance(t, torch.Tensor) else t for j, t in enumerate(leaves)})
        for g, group in enumerate(optimizer.param_groups):
            found.update({f"{k}.group {g} {key}": bits(v) for key, v in group.items() if isinstance(v, torch.Tensor)})
    return found


def finite(model):
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


QUICK = Limit(times=20.0, warmup=4)  # judges from the fourth update on

GATES = {  # what is armed, and what a bad batch's loss is multiplied by
    "nan": ({"nonfinite_gradient"}, math.nan),
    "inf": ({"nonfinite_gradient"}, math.inf),
    "spike": ({"exploding_gradient": QUICK}, 1e5),
    "nan under both": ({"exploding_gradient": QUICK, "nonfinite_gradient": None}, math.nan),
}


def run(make, batches, bad=(), *, gate="nan", dtype=torch.float32, clip=None, guarded=True, micro=1, step=None, scaler=None, **options):
    """Train on these batches; those in ``bad`` are poisoned. Gives the model, the optimizer and the guard, closed."""
    model = network(dtype)
    optimizer = make(list(model.parameters()))
    armed, factor = GATES[gate]
    guard = Guard(model, optimizer, skip=armed, halt=None, agree=False, scaler=scaler, **options) if guarded else None
    for i in batches:
        optimizer.zero_grad()
        for k in range(micro):
            loss = loss_of(model, micro * i + k, factor if i in bad and k == micro // 2 else 1.0) / micro
            (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            (step or optimizer.step)()
        if guard:
            guard.step(loss.detach())
    if guard:
        guard.close()
    return model, optimizer, guard
