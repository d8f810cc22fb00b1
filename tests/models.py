"""Small seeded models and batches. In: a device and a seed. Out: a module, or (inputs, targets), on that device.

The same seed gives the same values on every device: all is drawn on the CPU and moved, and the global random state is
left as it was. On `meta` the values are lost, the shapes stay. Every target is a function of its input, so a healthy
run of a few dozen steps lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES = 16, 4  # the flat input of `mlp`; the classes of `mlp` and `convnet`
CHANNELS, SIDE = 3, 8  # the images of `convnet`
VOCABULARY, CONTEXT = 31, 12  # the sequences of `transformer`


@contextmanager
def drawn_with(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mlp(device: torch.device | str = "cpu", seed: int = 0, *, depth: int = 3, width: int = 32, dropout: float = 0.0) -> nn.Module:
    """`depth` hidden layers of `width` with ReLU, then a linear head."""
    with drawn_with(seed):
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(width if i else FEATURES, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(*layers, nn.Linear(width, CLASSES)).to(device)


class ConvNet(nn.Module):
    """What trips a guard on images: batch-norm buffers, in-place ReLU, a residual sum, functional calls without a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.body_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = F.max_pool2d(x, 2)
        x = F.relu(x + self.body_norm(self.body(x)))
        scores: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def convnet(device: torch.device | str = "cpu", seed: int = 0, *, width: int = 8) -> nn.Module:
    """Two convolutions with batch-norm, in-place and functional ReLU, pooling, a linear head."""
    with drawn_with(seed):
        return ConvNet(width).to(device)


class Attention(nn.Module):
    """Causal self-attention written out, so that the scores pass through visible operations."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return mixed


class LibraryAttention(nn.Module):
    """The same through nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        mixed: Tensor = self.mha(x, x, x, attn_mask=future, need_weights=False)[0]
        return mixed


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.up, self.act, self.down = nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return mixed


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, attention: str, activation: str, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        attend = {"explicit": Attention, "library": LibraryAttention}[attention]
        act = {"gelu": nn.GELU, "relu": nn.ReLU}[activation]
        self.blocks = nn.ModuleList(Block(width, attend(width, heads), act()) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def transformer(
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    attention: Literal["explicit", "library"] = "explicit",
    activation: Literal["gelu", "relu"] = "gelu",
    tied: bool = False,
) -> nn.Module:
    """A small GPT: embeddings, pre-norm blocks with causal attention, and a head that may share the embedding's weight."""
    with drawn_with(seed):
        model = Transformer(layers, width, heads, attention, activation, tied).to(device)
    if tied:  # moving to a device of another tensor type makes two parameters of the one
        model.head.weight = model.tokens.weight
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


def make_batch(name: str, device: torch.device | str = "cpu", n: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batch number `seed` for the model `name`: n inputs and their targets. The task is the same for every seed."""
    with drawn_with(10_000):
        teacher = torch.randn(CHANNELS * SIDE * SIDE, CLASSES)
    with drawn_with(seed):
        if name == "mlp":
            x = torch.randn(n, FEATURES)
            y = (x @ teacher[:FEATURES]).argmax(1)
        elif name == "convnet":
            x = torch.randn(n, CHANNELS, 1, 1) + 0.5 * torch.randn(n, CHANNELS, SIDE, SIDE)
            y = (x.mean((2, 3)) @ teacher[:CHANNELS]).argmax(1)
        elif name == "transformer":  # each sequence counts upward in its own stride
            start, stride = torch.randint(VOCABULARY, (n, 1)), torch.randint(1, 4, (n, 1))
            counted = (start + stride * torch.arange(CONTEXT + 1)) % VOCABULARY
            x, y = counted[:, :-1], counted[:, 1:].contiguous()
        else:
            raise ValueError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")
    return x.to(device), y.to(device)


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the last dimension of the outputs, for all three models."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
