"""Whether a training state is finite. A model and its optimizers flow in, reasons flow out.

The whole state is reduced to one flag for each device and dtype, in few operations, and these flags are read: it waits for the
device, and is asked for only where a state is saved or taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NAMED = 3  # ill tensors named in a reason
_norms: Any = torch._foreach_norm


def nonfinite(model: nn.Module, optimizers: Iterable[Optimizer], born: Mapping[str, Tensor] | None = None) -> list[str]:
    """What of a state is not finite, in words; empty if all is. Waits for the device.

    Of tensors that are sharded, this rank's shards. born: flags by :func:`born_finite`; a buffer or a frozen weight
    that was not finite then (a mask, an observer's range) may stay so.

    >>> model = nn.Linear(2, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> nonfinite(model, [optimizer])
    []
    >>> with torch.no_grad():
    ...     _ = model.bias.fill_(torch.inf)
    >>> nonfinite(model, [optimizer])
    ['1 of 2 weights are not finite (bias)']
    """
    kinds = {"weights": dict(_weights(model)), "buffers": dict(_buffers(model)), "optimizer tensors": dict(_held(model, optimizers))}
    with torch.no_grad():
        finite = _finite({(kind, name): t for kind, some in kinds.items() for name, t in some.items()})
    ill = [key for key, well in finite.items() if not well and not (born and key[1] in born and not bool(born[key[1]]))]
    reasons = []
    for kind, some in kinds.items():
        names = [name for k, name in ill if k == kind]
        if names:
            more = ", ..." if len(names) > NAMED else ""
            reasons.append(f"{len(names)} of {len(some)} {kind} are not finite ({', '.join(names[:NAMED])}{more})")
    return reasons


def born_finite(model: nn.Module) -> dict[str, Tensor]:
    """For each buffer and frozen weight whether it is finite now: a flag that stays on its device. Reads nothing."""
    still = {("", name): t for name, t in (*_buffers(model), *_weights(model)) if not t.requires_grad}
    with torch.no_grad():
        return {name: flags[i] for keys, flags in _flags(still) for i, (_, name) in enumerate(keys)}


def finite_flags(model: nn.Module, optimizers: Iterable[Optimizer], born: Mapping[str, Tensor]) -> list[Tensor]:
    """Flags, 0-d and on their devices, that are all True where :func:`nonfinite` is empty. Reads nothing."""
    state = {("", name): t for name, t in (*_weights(model), *_buffers(model))} | {("held", name): t for name, t in _held(model, optimizers)}
    moving = {key: t for key, t in state.items() if key[0] or key[1] not in born}
    still = {key: t for key, t in state.items() if key not in moving}
    with torch.no_grad():
        single = [flags[i] | ~born[name] for keys, flags in _flags(still) for i, (_, name) in enumerate(keys)]
        return [flags.all() for _, flags in _flags(moving)] + single


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in its own memory; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _finite(tensors: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], bool]:
    """Whether each is finite. One flag a group is read, and the single ones only where it is down."""
    found: dict[tuple[str, str], bool] = {}
    groups = list(_flags(tensors))
    sound = [flags.all() for _, flags in groups]  # all are under way before the first is read
    for (keys, flags), all_well in zip(groups, sound, strict=True):
        found.update(dict.fromkeys(keys, True) if bool(all_well) else zip(keys, flags.tolist(), strict=True))
    return found


def _flags(tensors: Mapping[tuple[str, str], Tensor]) -> Iterator[tuple[list[tuple[str, str]], Tensor]]:
    """Groups of tensors of one device and dtype with their flags (K,): 1 where the largest magnitude is finite."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[tuple[str, str], Tensor]]] = {}
    for key, tensor in tensors.items():
        values = _values(tensor)
        if values is not None:
            groups.setdefault((values.device, values.dtype), []).append((key, values))
    for (_, dtype), members in groups.items():
        some = [t if dtype.itemsize > 1 else t.to(torch.float32) for _, t in members]  # float8 has no norms
        norms = _norms(some, torch.inf) if dtype == torch.float64 else _norms(some, torch.inf, dtype=torch.float32)
        yield [key for key, _ in members], torch.isfinite(torch.stack(norms))


def _values(tensor: Tensor) -> Tensor | None:
    """The numbers of a tensor, real and dense; None where there are none."""
    if nn.parameter.is_lazy(tensor):
        return None
    tensor = local(tensor.detach())
    if tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    tensor = tensor._values() if tensor.is_sparse else tensor  # an uncoalesced sum of finite numbers is as finite as they are
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor if tensor.layout == torch.strided and tensor.numel() else None


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are saved."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _held(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    for k, optimizer in enumerate(optimizers):
        for i, (holder, state) in enumerate(optimizer.state.items()):
            owner = names.get(id(holder), f"parameter {i} of optimizer {k}")
            yield from _tensors(state, f"{{}} of {owner}", ())


def _tensors(value: Any, form: str, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested state with their names."""
    if isinstance(value, Tensor):
        yield form.format(".".join(path)), value
    elif len(path) < 6 and isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, form, (*path, str(key)))
