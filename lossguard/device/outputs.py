"""Which modules are watched, which tensor of an output is measured, and how it is laid out as samples by features.

Python objects and tensors flow in, views flow out; nothing is computed and nothing is read.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, FEATURES = 16, 64  # of an output, for the signals that need no more than a sample

# Modules that add nothing to what their neighbours show.
PASSED_OVER = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d,
               nn.MaxPool3d, nn.ZeroPad2d, nn.PixelShuffle, nn.Upsample)  # fmt: skip
# Activations that give NaN for NaN and whose scale and spread follow those of what they are given.
ELEMENTWISE = ("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus", "Hardswish")
# Modules after which three-dimensional outputs have their channels in dimension 1, and those after which they are last.
CHANNELS_FIRST = ("Conv1d", "ConvTranspose1d", "LazyConv1d", "InstanceNorm1d")
SHAPING = (*CHANNELS_FIRST, "Linear", "LayerNorm", "Embedding", "LSTM", "GRU", "RNN", "MultiheadAttention")


def watched(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The modules whose outputs are measured: id -> (name, class name)."""
    chosen: dict[int, tuple[str, str]] = {}
    inside: set[int] = set()  # parts of a module that is measured as a whole
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        parametrized = isinstance(getattr(module, "parametrizations", None), nn.ModuleDict)
        whole = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) or (parametrized and len(list(module.children())) == 1)
        if whole:
            inside.update(id(m) for m in module.modules())
        elif parametrized:
            inside.update(id(m) for m in module.get_submodule("parametrizations").modules())
        leaf = whole or next(module.children(), None) is None
        loss = isinstance(module, nn.modules.loss._Loss)
        if leaf and not loss and not isinstance(module, (*PASSED_OVER, nn.ParameterList, nn.ParameterDict)):
            kind = type(module).__name__.removeprefix("Parametrized") if parametrized else type(module).__name__
            chosen[id(module)] = (name or kind, kind)
    return chosen


def addresses(model: nn.Module, modules: Mapping[int, tuple[str, str]]) -> dict[int, list[str]]:
    """Where the first parameter of each of these modules lies in memory -> the modules that hold it."""
    found: dict[int, list[str]] = {}
    for module in model.modules():
        known = modules.get(id(module))
        first = next((p for p in module._parameters.values() if p is not None), None)
        if known is not None and first is not None and not nn.parameter.is_lazy(first):
            found.setdefault(first.data_ptr(), []).append(known[0])
    return found


def first_tensor(value: Any, depth: int = 0) -> Tensor | None:
    """The first floating-point tensor of a nested output (tuple, list, dict, dataclass), or None."""
    return next(float_tensors(value, depth), None)


def float_tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """All floating-point, strided, non-empty tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout == torch.strided and value.numel() and not value.is_nested:
            yield value
    elif depth < 4 and isinstance(value, dict):
        for item in value.values():
            yield from float_tensors(item, depth + 1)
    elif depth < 4 and isinstance(value, (tuple, list)):
        for item in value:
            yield from float_tensors(item, depth + 1)
    elif depth < 4 and is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from float_tensors(getattr(value, part.name, None), depth + 1)


def in_rows(x: Tensor) -> bool:
    """Whether an output with its channels in dimension 1 lies in memory sample by sample, rather than channels last."""
    return x.is_contiguous()


def matrix(x: Tensor, channels_first: bool) -> Tensor:
    """Samples by features, a view wherever the memory allows: (N, C, H, W) -> (N, C*H*W); (B, T, F) -> (B*T, F); (N,) -> (N, 1).

    Channels-last memory reads as (N*H*W, C), its order in memory.
    """
    if channels_first and x.dim() > 2:
        return x.flatten(1) if in_rows(x) else x.movedim(1, -1).flatten(0, -2)
    if x.dim() >= 3:
        return x.flatten(0, -2)
    return x if x.dim() == 2 else x.reshape(-1, 1)


def sample(rows: Tensor) -> Tensor:
    """At most SAMPLES rows and FEATURES features of each, spread over the whole, a view: (K, R, F) -> (K, r, f).

    Neither stride has a divisor in common with what it strides over, so that it stays neither at one place of all sequences
    (rows are B*T, and 16 of them would all be their first) nor in one column of a feature map.
    """
    r, f = rows.shape[1], rows.shape[2]
    return rows[:, :: _stride(-(-r // SAMPLES), r), :: _stride(max(1, f // FEATURES), f)][:, :, :FEATURES]


@functools.lru_cache(maxsize=1024)
def _stride(least: int, over: int) -> int:
    """The smallest stride from ``least`` on that is coprime with ``over``.

    >>> _stride(160, 2560), _stride(1, 64)
    (161, 1)
    """
    return next(stride for stride in itertools.count(least) if math.gcd(stride, over) == 1)
