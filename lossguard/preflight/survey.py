"""What each weighted layer gets and gives in one pass over the first batches. A bench flows in; ``Layer`` records flow out.

Hooks hang on a copy's modules, in the order of execution. A layer is raw if nothing with parameters stands before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lossguard.preflight.bench import Bench, Twin
from lossguard.preflight.take import tensors

WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
MOST_ELEMENTS = 4_000_000  # of an input kept per layer and batch
CHANNELS_SECOND = (nn.modules.conv._ConvNd,)


@dataclass
class Layer:
    """One weighted module. inputs: what it got from the data, one tensor a batch, if it is raw. Scales are of its first output."""

    name: str
    kind: str
    raw: bool = False
    channels_second: bool = False
    inputs: list[Tensor] = field(default_factory=list)
    input_spread: float = float("nan")
    spread: float = float("nan")  # between samples: root mean square over the outputs' elements of the standard deviation over samples
    rms: float = float("nan")
    rails: tuple[float, float] = (0.0, 0.0)  # share of its inputs within 1 % of the lower and the upper end of a tanh or sigmoid
    zero: bool = False  # all its weights are zero


@dataclass
class Survey:
    """Layers in order of execution, modules that were called, norms that got the data as it is, and whether any norm is about."""

    layers: list[Layer] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    roots: list[tuple[str, Tensor]] = field(default_factory=list)  # what the model itself got
    first_norm: str = ""
    norms: int = 0
    error: str = ""


def survey(bench: Bench, batches: int = 4) -> Survey:
    """Run the first batches through a thawed copy and take everything down."""
    done = Survey()
    with bench.twin(thawed=True) as twin:
        done.norms = sum(1 for m in twin.model.modules() if is_norm(m))
        for i, batch in enumerate(bench.kept[:batches]):
            handles = _hooks(twin, done, first=i == 0)
            try:
                done.error = twin.try_run(batch).error
            finally:
                for handle in handles:
                    handle.remove()
            if done.error:
                break
    return done


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer, torch's or one whose class says so.

    >>> is_norm(nn.LayerNorm(3)), is_norm(nn.Linear(3, 3))
    (True, False)
    """
    return "norm" in type(module).__name__.lower()


def _hooks(twin: Twin, done: Survey, *, first: bool) -> list[Any]:
    handles = []
    known = {layer.name: layer for layer in done.layers}
    for name, module in twin.model.named_modules():
        handles.append(module.register_forward_hook(_listener(name, module, done, known, first), with_kwargs=True))
    return handles


def _listener(name: str, module: nn.Module, done: Survey, known: dict[str, Layer], first: bool) -> Callable[..., None]:
    fresh = {"inputs": True}

    def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [t for _, t in tensors([*args, *kwargs.values()]) if t.is_floating_point()]
        done.called.add(name)
        if not name:
            done.roots += [(n, t.detach()) for n, t in tensors([*args, *kwargs.values()])][:4]
        if not given:
            return
        raw = not given[0].requires_grad
        if is_norm(module) and raw and not done.first_norm:
            done.first_norm = name
        if not isinstance(module, WEIGHTED):
            return
        layer = known.get(name)
        if layer is None:
            layer = known[name] = Layer(name or type(module).__name__, type(module).__name__, raw, isinstance(module, CHANNELS_SECOND))
            done.layers.append(layer)
            _scales(layer, module, given[0], output)
        if layer.raw and fresh.pop("inputs", False) and given[0].numel() <= MOST_ELEMENTS:
            layer.inputs.append(given[0].detach().float())

    return hear


def _scales(layer: Layer, module: nn.Module, given: Tensor, output: Any) -> None:
    found = next((t for _, t in tensors(output) if t.is_floating_point()), None)
    weights = [p for p in module.parameters() if p.dim() >= 2]
    layer.zero = bool(weights) and all(not bool(p.detach().any()) for p in weights)
    if found is None or found.dim() < 2:
        return
    out = found.detach().float()
    layer.rms = float(out.square().mean().sqrt())
    layer.spread = between(out)
    layer.input_spread = between(given.detach().float())
    layer.rails = rails(given.detach().float())


def rails(values: Tensor, near: float = 0.01) -> tuple[float, float]:
    """Share of the values at the lower and at the upper end of [-1, 1], or of [0, 1] where none is negative; zero where some lie outside,
    or where all are exactly at the ends: signs and bits are meant.

    >>> import torch
    >>> rails(torch.tensor([-1.0, -0.995, 0.5, 1.0]))
    (0.5, 0.25)
    """
    if not values.numel():
        return 0.0, 0.0
    least, most = float(values.min()), float(values.max())
    low = -1.0 if least < 0 else 0.0
    if least < low or most > 1 or bool(((values == low) | (values == 1) | (values == 0)).all()):
        return 0.0, 0.0
    return float((values < low + near).float().mean()), float((values > 1 - near).float().mean())


def between(values: Tensor) -> float:
    """Root mean square over all elements of the standard deviation between samples (dimension 0); NaN of one sample.

    >>> import torch
    >>> between(torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
    1.0
    """
    if values.dim() < 1 or values.shape[0] < 2:
        return float("nan")
    return float(values.reshape(values.shape[0], -1).var(dim=0, unbiased=False).mean().sqrt())
