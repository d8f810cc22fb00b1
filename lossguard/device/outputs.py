"""Which modules are watched, which tensor of an output is measured, and how it is laid out as samples by features.

Python objects and tensors flow in, views flow out; nothing is computed and nothing is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, FEATURES = 16, 64  # of an output, for the signals that need no more than a sample
MIN_SAMPLES = 8  # rows below which samples say nothing about their spread

# Modules that add nothing to what their neighbours show.
PASSED_OVER = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d,
               nn.MaxPool3d, nn.ZeroPad2d, nn.PixelShuffle, nn.Upsample)  # fmt: skip
# Activations that give NaN for NaN and whose scale and spread follow those of what they are given.
ELEMENTWISE = ("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus", "Hardswish")
PRODUCTS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
         "LayerNorm", "RMSNorm")  # fmt: skip
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


def shown_by(kind: str, output: Tensor, following: str) -> bool:
    """Whether a module that is given this output shows all that is asked of it: what is not finite, and samples that are all alike.

    An elementwise activation does; so does a product behind a norm, whose scale says little, and a norm behind a product, save
    for float16, in which the product's own scale may come to its end.
    """
    if following in ELEMENTWISE:
        return True
    return output.dtype != torch.float16 and ((kind in NORMS and following in PRODUCTS) or (kind in PRODUCTS and following in NORMS))


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
    """At most SAMPLES rows and FEATURES features of each, spread over the whole, a view: (K, R, F) -> (K, r, f)."""
    over_rows, over_features = _strides(rows.shape[1], rows.shape[2])
    return rows[:, ::over_rows, ::over_features][:, :, :FEATURES]


def few(x: Tensor, channels_first: bool) -> Tensor:
    """:func:`sample` of one output, as :func:`matrix` lays it out, a view: (1, r, f); one operation where the output is contiguous."""
    if type(x) is not Tensor or not x.is_contiguous() or not x.dim():  # what stands in for a tensor may know no strides
        return sample(matrix(x, channels_first).unsqueeze(0))
    return x.as_strided(*_few(x.shape, channels_first))


@functools.lru_cache(maxsize=1024)
def _few(shape: tuple[int, ...], channels_first: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Size and strides of the view, where the memory has no gaps."""
    r = shape[0] if channels_first or len(shape) == 1 else math.prod(shape[:-1])
    f = math.prod(shape) // r
    over_rows, over_features = _strides(r, f)
    return (1, -(-r // over_rows), min(FEATURES, -(-f // over_features))), (r * f, f * over_rows, over_features)


@functools.lru_cache(maxsize=1024)
def _strides(r: int, f: int) -> tuple[int, int]:
    return stride(-(-r // SAMPLES), r, MIN_SAMPLES), stride(max(1, f // FEATURES), f, FEATURES // 2)


@functools.lru_cache(maxsize=1024)
def stride(least: int, over: int, fewest: int) -> int:
    """A stride from ``least`` on that shares as small a divisor as may be with what it strides over, and leaves ``fewest`` of it.

    Rows are B*T, and a stride that T divides would see the same place of each sequence only; features are C*H*W.

    >>> stride(160, 2560, 8), stride(2, 30, 8), stride(1, 64, 32)
    (161, 2, 1)
    """
    return min(range(least, max(least, over // fewest) + 1), key=lambda s: (math.gcd(s, over), s))
