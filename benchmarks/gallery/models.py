"""The networks that several programs share. Written for reading; defaults are torch's own."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, norm: type[nn.Module] | None = None, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths with activations (and norms, dropout) between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            layers += [norm(b)] if norm else []
            layers.append(activation())
            layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


class ConvNet(nn.Module):
    """Three convolutions on 8 x 8 images; norm: ``batch``, ``group`` or ``none``."""

    def __init__(self, width: int = 16, classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        make = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(4, c), "none": lambda c: nn.Identity()}[norm]
        bias = norm == "none"
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=bias), make(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias), make(2 * width), nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=bias), make(2 * width), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, classes)."""
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """A basic residual block; zero: the last batch-norm's gain starts at 0."""

    def __init__(self, width: int, zero: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        if zero:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x)."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stem, residual blocks, a pool and a head."""

    def __init__(self, width: int = 16, blocks: int = 3, classes: int = 10, zero: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*(Residual(width, zero) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, classes)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention through the fused kernel."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """A transformer block; pre: norms stand before the branches, else after the sums."""

    def __init__(self, width: int, heads: int, *, causal: bool, pre: bool = True, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.pre = pre
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed(x))


class GPT(nn.Module):
    """A small decoder-only language model with GPT-2's initialisation; tied: the head shares the embedding's weight."""

    def __init__(
        self, vocabulary: int, context: int, width: int = 48, layers: int = 2, heads: int = 4, *, tied: bool = False, pre: bool = True,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads, causal=True, pre=pre, activation=activation) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "feed.2.weight")):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * layers))
        if tied:
            self.head.weight = self.tokens.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) indices -> (B, T, vocabulary) logits."""
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class CharRNN(nn.Module):
    """Embedding, a recurrent layer, a head; kind: ``LSTM``, ``GRU`` or ``RNN``."""

    def __init__(self, vocabulary: int, width: int = 64, kind: str = "LSTM", layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = getattr(nn, kind)(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) indices -> (B, T, vocabulary) logits."""
        return self.head(self.rnn(self.embed(x))[0])


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int, floor: float = 0.0) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to ``floor`` of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
