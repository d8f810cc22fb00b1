"""Collects what the modules of one forward pass gave, and reduces it to a few numbers each. Never reads a value.

Module outputs flow in one by one, vectors (one number per module call) flow into a ``Row``. Small outputs of one shape
are kept until the end of the forward pass and reduced together, at most KEEP bytes in all; large ones are reduced at
once. An output that was overwritten in place meanwhile is left out and reduced at once from then on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossguard.device import signals
from lossguard.device.tape import Row, Sites
from lossguard.device.units import SilentUnits, window

SMALL = 16384  # elements of an output that is kept rather than reduced at once
KEEP = 8 * 2**20  # bytes of outputs kept at most
SAMPLES, FEATURES = 16, 64  # of an output, for the signals that need no more than a sample
MIN_SAMPLES = 8  # rows below which samples say nothing about their spread
LOGIT_ROWS = 256  # rows of logits looked at
MAX_CALLS = 8  # calls of one module told apart in a step
MAX_SITES = 2048  # module calls watched at most

# Modules that add nothing to what their neighbours show.
PASSED_OVER = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d,
               nn.MaxPool3d, nn.ZeroPad2d, nn.PixelShuffle, nn.Upsample)  # fmt: skip

CHANNELS_FIRST = ("Conv1d", "ConvTranspose1d", "LazyConv1d", "InstanceNorm1d")
SHAPING = (*CHANNELS_FIRST, "Linear", "LayerNorm", "Embedding", "LSTM", "GRU", "RNN", "MultiheadAttention")


@dataclass(frozen=True)
class Site:
    """One module call: its place in execution order, its name (``relu``, ``relu[1]`` for a second call), its class,
    how many units it has, and whether these stand in dimension 1 (convolutions) or in the last."""

    index: int
    name: str
    kind: str
    width: int
    channels_first: bool


@dataclass
class _Piece:
    site: Site
    output: Tensor
    version: int


def watched(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The modules whose outputs are measured: id -> (name, class name)."""
    chosen: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        loss = isinstance(module, nn.modules.loss._Loss)
        if leaf and not loss and not isinstance(module, (*PASSED_OVER, nn.ParameterList, nn.ParameterDict)):
            chosen[id(module)] = (name or type(module).__name__, type(module).__name__)
    return chosen


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


class Forward:
    """What one forward pass of a sampled step left behind, on one guard. ``sites`` grows as calls are first seen."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.units = SilentUnits()
        self.unwatched: set[str] = set()  # calls that could not be measured, and why
        self._by_call: dict[tuple[str, int], Site] = {}
        self._calls: dict[str, int] = {}
        self._pieces: list[_Piece] = []
        self._kept = 0
        self._at_once: set[int] = set()  # sites whose output is overwritten in place
        self._conv1d = False  # whether the last shaping module of three dimensions put channels first

    def begin(self) -> None:
        """A new step: forget calls that led to no update."""
        self._calls.clear()
        self._pieces.clear()
        self._kept = 0

    def add(self, name: str, kind: str, output: Tensor, row: Row) -> Site | None:
        """One module call's output. Returns its site, None if it is not watched."""
        site = self._site(name, kind, output)
        if site is None:
            return None
        nbytes = output.numel() * output.element_size()
        if output.numel() <= SMALL and self._kept + nbytes <= KEEP and site.index not in self._at_once:
            self._pieces.append(_Piece(site, output.detach(), output._version))
            self._kept += nbytes
        else:
            self._reduce([site], _matrix(output.detach(), site.channels_first).unsqueeze(0), row)
        return site

    def finish(self, row: Row) -> None:
        """The forward pass is over: reduce what was kept, outputs of one shape together."""
        groups: dict[Hashable, list[_Piece]] = {}
        for piece in self._pieces:
            if piece.output._version != piece.version:
                self._at_once.add(piece.site.index)  # overwritten in place: too late for this step
                continue
            rows = _matrix(piece.output, piece.site.channels_first)
            groups.setdefault((tuple(rows.shape), piece.site.width, rows.dtype, rows.device), []).append(_Piece(piece.site, rows, 0))
        for pieces in groups.values():
            pieces.sort(key=lambda p: _family(p.site.kind))  # sites of one kind side by side, so that a slice holds them
            self._reduce([p.site for p in pieces], torch.stack([p.output for p in pieces]), row)
        self._pieces.clear()
        self._kept = 0

    @property
    def nbytes(self) -> int:
        """Device bytes held between steps, and at most kept during a forward pass."""
        return self.units.nbytes + KEEP * bool(self.sites)

    # ---- inside

    def _site(self, name: str, kind: str, output: Tensor) -> Site | None:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        site = self._by_call.get((name, call))
        if site is None:
            if call >= MAX_CALLS or len(self.sites) >= MAX_SITES:
                self.unwatched.add(f"{name}: more than {MAX_CALLS} calls a step" if call >= MAX_CALLS else f"{name}: more than {MAX_SITES} module calls")
                return None
            if kind in SHAPING:
                self._conv1d = kind in CHANNELS_FIRST
            first = output.dim() >= 4 or (output.dim() == 3 and self._conv1d)
            width = output.shape[1] if first else output.shape[-1] if output.dim() else 1
            site = Site(len(self.sites), name if call == 0 else f"{name}[{call}]", kind, width, first)
            self.sites.append(site)
            self._by_call[name, call] = site
        return site

    def _reduce(self, sites: list[Site], rows: Tensor, row: Row) -> None:
        """rows: (K, R, F), one site each, sites of one kind side by side."""
        indices = np.array([s.index for s in sites], dtype=np.intp)
        norms = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=torch.float32)
        row.add("activation_rms", indices, norms, np.full(len(sites), (rows.shape[1] * rows.shape[2]) ** -0.5))
        sample = _sample(rows)
        for chosen in signals.of("activation"):
            if chosen.name == "sample_variance" and rows.shape[1] < MIN_SAMPLES:
                continue
            part = _slice_of(sites, chosen.kinds)
            if part is not None:
                row.add(chosen.name.removesuffix("_tanh"), indices[part], chosen.measure(sample[part]))
        part = _slice_of(sites, signals.RELU_KINDS)
        if part is not None:
            self._silence(sites[part], indices[part], rows[part], row)

    def _silence(self, sites: list[Site], indices: Sites, rows: Tensor, row: Row) -> None:
        width = sites[0].width
        peaks = rows.amax(dim=1)  # (K, F)
        positions = rows.shape[1]
        if width and width != peaks.shape[1]:  # channels first: F is channels x positions
            positions *= peaks.shape[1] // width
            peaks = peaks.view(len(sites), width, -1).amax(dim=2)
        share = self.units.update(tuple(indices.tolist()), peaks, window(positions))
        if share is not None:
            row.add("dead_fraction", indices, share)


def logits_numbers(head: int, logits: Tensor, dim: int, targets: Tensor | None, row: Row) -> None:
    """The logit signals of one softmax. logits: any shape with the classes in ``dim``; targets: class indices or None."""
    classes = logits.detach().movedim(dim, -1)
    rows = classes.reshape(-1, classes.shape[-1]) if classes.is_contiguous() else classes.flatten(0, -2)
    stride = max(1, -(-rows.shape[0] // LOGIT_ROWS))
    rows = rows[::stride].to(torch.float32)
    site = np.array([head], dtype=np.intp)
    for chosen in signals.of("logits"):
        row.add_scalars(chosen.name, site, [chosen.measure(rows)])
    if targets is not None and not targets.is_floating_point() and targets.numel() * classes.shape[-1] == classes.numel() and targets.device == logits.device:
        labels = targets.detach().reshape(-1)[::stride].to(torch.int64)
        row.add_scalars("confident_wrong", site, [signals.confident_wrong(rows, labels)])
        row.add_scalars("label_nll", site, [signals.label_nll(rows, labels)])


def _matrix(x: Tensor, channels_first: bool) -> Tensor:
    """Samples by features, a view wherever the memory allows: (N, C, H, W) -> (N, C*H*W); (B, T, F) -> (B*T, F); (N,) -> (N, 1).

    Channels-last memory reads as (N*H*W, C), its order in memory.
    """
    if channels_first:
        return x.flatten(1) if x.is_contiguous() else x.movedim(1, -1).flatten(0, -2)
    if x.dim() >= 3:
        return x.flatten(0, -2)
    return x if x.dim() == 2 else x.reshape(-1, 1)


def _sample(rows: Tensor) -> Tensor:
    """At most SAMPLES rows and FEATURES features of each site, spread over the whole: (K, R, F) -> (K, r, f), float32.

    The stride over features is odd, so that it does not stay in one column of a feature map.
    """
    r, f = rows.shape[1], rows.shape[2]
    return rows[:, :: -(-r // SAMPLES), :: max(1, f // FEATURES) | 1][:, :, :FEATURES].to(torch.float32)


_FAMILIES = (signals.RELU_KINDS, *(s.kinds for s in signals.of("activation") if s.kinds and s.kinds != signals.RELU_KINDS))


def _family(kind: str) -> int:
    """The number of the group of module classes that share their signals; 0 for those without any of their own."""
    return next((i for i, kinds in enumerate(_FAMILIES, 1) if kind in kinds), 0)


def _slice_of(sites: list[Site], kinds: tuple[str, ...]) -> slice | None:
    """The slice of sites of these kinds; they stand side by side because sites are sorted by family."""
    if not kinds:
        return slice(0, len(sites))
    chosen = [i for i, s in enumerate(sites) if s.kind in kinds]
    return slice(chosen[0], chosen[-1] + 1) if chosen else None
