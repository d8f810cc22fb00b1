"""A few training steps of a copy, and what they show of each parameter: whether gradients arrive, whether units differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from lossguard.preflight.bench import Bench, told

STEPS = 5  # a zero head passes gradients on from the second step, two zero layers in a row never do
RATE = 1e-3  # of Adam: small enough for any model, large enough to break a symmetry
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


@dataclass
class Trial:
    """Per trainable parameter: the gradient never came, or was exactly zero at every step; and symmetric matrices with their value."""

    steps: int = 0
    absent: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    symmetric: list[tuple[str, float]] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    arrived: set[str] = field(default_factory=set)  # a gradient that is not all zero came
    elements: dict[str, int] = field(default_factory=dict)
    cut: bool = False  # the loss depends on no parameter
    error: str = ""


def trial(bench: Bench) -> Trial:
    """The trial of this bench, made once."""
    made: Trial | None = getattr(bench, "_trial", None)
    if made is None:
        made = Trial()
        try:
            _train(bench, made)
        except Exception as error:
            made.error = told(error)
        bench._trial = made  # type: ignore[attr-defined]
    return made


def _train(bench: Bench, done: Trial) -> None:
    with bench.twin() as twin:
        parameters = twin.trainable
        if not parameters or not bench.kept:
            raise ValueError("no trainable parameter" if bench.kept else bench.why_no_pass)
        done.elements = {n: p.numel() for n, p in parameters.items()}
        suspects = {n: p for n, p in parameters.items() if _equal_rows(twin.model, n, p)}
        handles = [m.register_forward_hook(lambda *_, name=n: done.called.add(name)) for n, m in twin.model.named_modules()]
        optimizer = torch.optim.Adam(parameters.values(), lr=RATE)
        seen: set[str] = set()
        moved: set[str] = set()
        try:
            for step in range(STEPS):
                for p in parameters.values():
                    p.grad = None
                result = twin.run(bench.kept[step % len(bench.kept)], grad=True)
                if result.value is None or not result.value.requires_grad:
                    done.cut = True
                    raise ValueError("the loss depends on no parameter")
                result.value.backward()  # type: ignore[no-untyped-call]
                if not math.isfinite(result.loss):
                    raise ValueError(f"the loss is not finite at step {step}")
                for n, p in parameters.items():
                    if p.grad is not None:
                        seen.add(n)
                        if n not in moved and bool((p.grad.coalesce().values() if p.grad.is_sparse else p.grad).any()):
                            moved.add(n)
                if any(p.grad is not None and p.grad.is_sparse for p in parameters.values()):
                    for p in parameters.values():
                        p.grad = p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
                optimizer.step()
                done.steps += 1
        finally:
            for handle in handles:
                handle.remove()
        done.arrived = moved
        done.absent = [n for n in parameters if n not in seen]
        done.zero = [n for n in parameters if n in seen and n not in moved]
        done.symmetric = [
            (n, float(p.detach().reshape(-1)[0]) if _constant(suspects[n]) else math.nan)
            for n, p in suspects.items()
            if n in seen and _equal_rows(twin.model, n, p)
        ]


def _constant(p: torch.Tensor) -> bool:
    return bool((p.detach() == p.detach().reshape(-1)[0]).all())


def _equal_rows(model: nn.Module, name: str, p: nn.Parameter) -> bool:
    """All rows of a weight matrix are the same (gate by gate in recurrent layers). Embeddings and vectors have no units that could be equal."""
    if sum(size > 1 for size in p.shape) < 2 or p.dim() < 2 or p.shape[0] < 2 or not p.is_floating_point():
        return False
    holder = model.get_submodule(name.rpartition(".")[0]) if not name.startswith("criterion.") else model
    if not isinstance(holder, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)):
        return False
    rows = p.detach().reshape(p.shape[0], -1)
    gates = GATES.get(type(holder).__name__, 1)
    blocks = rows.reshape(gates, -1, rows.shape[1]) if rows.shape[0] % gates == 0 else rows.unsqueeze(0)
    return blocks.shape[1] > 1 and bool((blocks == blocks[:, :1]).all())
