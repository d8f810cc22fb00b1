"""Whether a training state is worth a checkpoint: no trained weight and no moment of an optimizer is NaN or infinite.

A model and optimizers flow in, the name of the first unsound tensor flows out. Reads the device, so that it belongs where a
checkpoint is about to be written, which reads all of this anyway; never into a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def unsound(model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """The first trained weight or optimizer state that is not finite; "" if all are. One read for each device and dtype.

    On a rank that holds a part of a sharded state, it speaks of that part.

    >>> model = nn.Linear(2, 1); unsound(model, [])
    ''
    >>> _ = nn.init.constant_(model.bias, float("nan")); unsound(model, [])
    'bias'
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, tensor in _tensors(model, optimizers):
        groups.setdefault((tensor.device, tensor.dtype), []).append((name, tensor))
    for named in groups.values():
        with torch.no_grad():
            peaks = torch.stack(torch._foreach_norm([t for _, t in named], math.inf))
        for (name, _), peak in zip(named, peaks.tolist(), strict=True):
            if not math.isfinite(abs(peak)):
                return name
    return ""


def agreed(where: str, device: torch.device) -> str:
    """What was found on this rank, or that something was found on another: all ranks write a checkpoint or none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return where
    flag = torch.tensor([float(bool(where))], device=device)
    torch.distributed.all_reduce(flag)
    return where or ("the state of another rank" if flag.item() else "")


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    of_optimizer = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    trained = {id(p): p for p in [*(p for p in model.parameters() if p.requires_grad), *of_optimizer]}
    for p in trained.values():
        yield from _readable(names.get(id(p), "a weight of the optimizer"), p)
    for o in optimizers:
        for p, state in o.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    yield from _readable(f"{key} of {names.get(id(p), 'a weight of the optimizer')}", value)


def _readable(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    local = getattr(tensor, "_local_tensor", tensor).detach()
    if local.is_floating_point() and local.element_size() > 1 and local.layout == torch.strided and local.numel() and local.device.type != "meta":
        yield name, local
