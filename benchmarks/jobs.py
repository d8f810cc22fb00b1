"""The training jobs whose steps are timed: what is trained, with what, on what. Made from one seed: equal at every call.

Four run anywhere; those of `LARGE` are for a GPU (bfloat16 autocast, a fused optimizer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCHES = 32  # distinct batches of a job, made before the clock runs
CLASSES = 10
VOCABULARY, CONTEXT = 2000, 128

Batch = tuple[Tensor, Tensor]


@dataclass
class Job:
    """One training job."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    halves: bool = False  # the forward pass runs in bfloat16 autocast

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.halves):
            return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())


def stack(depth: int, width: int) -> nn.Module:
    """`depth` linear layers with ReLU between them, He initialisation: healthy at 200 layers too."""
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(64 if i == 0 else width, CLASSES if i == depth - 1 else width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.stride, self.more = width // fan_in, width - fan_in
        self.conv1 = nn.Conv2d(fan_in, width, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return self.act2(short + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))


def resnet() -> nn.Module:
    """13 convolutions with batch-norm: a stem and three stages of two residual blocks."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [Residual(a, b) for a, b in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Any:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, dim), nn.Parameter(0.02 * torch.randn(context, dim))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places)))


def labelled(shape: tuple[int, ...], n: int) -> list[Batch]:
    """Noisy copies of ten prototypes in [0, 1], as the images of digits are."""
    prototypes = torch.rand(CLASSES, *shape)
    targets = [torch.randint(CLASSES, (n,)) for _ in range(BATCHES)]
    return [((prototypes[y] + 0.3 * torch.randn(n, *shape)).clamp(0, 1), y) for y in targets]


def sequences(n: int, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> list[Batch]:
    """Sequences that count upward in a stride of their own."""
    made = []
    for _ in range(BATCHES):
        start, stride = torch.randint(vocabulary, (n, 1)), torch.randint(1, 8, (n, 1))
        tokens = (start + stride * torch.arange(context + 1)) % vocabulary
        made.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return made


class Bottleneck(nn.Module):
    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = stride == 1 and fan_in == 4 * width
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(fan_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.body(x) + self.short(x))


def resnet50() -> nn.Module:
    """The layers of a ResNet-50, 1000 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    fan_in = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(blocks):
            layers.append(Bottleneck(fan_in, width, stride if k == 0 else 1))
            fan_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, 1000))


class Wide(nn.Module):
    """A residual stack of wide layers: 1.07 billion weights at 32 layers of 5792."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, CLASSES)
        self.norms, self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return self.last(self.norm(x))


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)


def fused(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


Recipe = tuple[Callable[[], nn.Module], Callable[[], list[Batch]], Callable[[nn.Module, float], torch.optim.Optimizer], float]
JOBS: dict[str, Recipe] = {
    "mlp": (lambda: stack(30, 64), lambda: labelled((64,), 64), adam, 1e-4),
    "deep": (lambda: stack(200, 32), lambda: labelled((64,), 64), adam, 1e-4),
    "conv": (resnet, lambda: labelled((3, 32, 32), 16), sgd, 0.02),
    "gpt": (lambda: Gpt(6, 256, 8), lambda: sequences(2), adam, 3e-4),
}

LARGE: dict[str, Recipe] = {  # for a GPU
    "gpt2": (lambda: Gpt(12, 768, 12, 50304, 1024), lambda: sequences(8, 50304, 1024), fused, 3e-4),
    "gpt2-compiled": (lambda: torch.compile(Gpt(12, 768, 12, 50304, 1024)), lambda: sequences(8, 50304, 1024), fused, 3e-4),  # type: ignore[dict-item, return-value]
    "resnet50": (resnet50, lambda: labelled((3, 224, 224), 64), fused, 1e-3),
    "billion": (lambda: Wide(32, 5792), lambda: labelled((64,), 4096), fused, 1e-4),
}


def build(name: str, device: str) -> Job:
    """A fresh copy of a job: the same weights and batches at every call."""
    make_model, make_batches, make_optimizer, lr = (JOBS | LARGE)[name]
    torch.manual_seed(0)
    model = make_model().to(device)
    batches = [(x.to(device), y.to(device)) for x, y in make_batches()]
    return Job(model, make_optimizer(model, lr), batches, halves=name in LARGE)
