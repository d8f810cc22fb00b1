"""What the ill programs share: small real data sets, endless batches, one plain training loop, and scores.

Data sets of installed packages flow in, a score flows out. A program whose fault sits in the loop itself writes its own loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from gallery.registry import Job

Loss = Callable[[Tensor, Tensor], Tensor]
CONTEXT = 32  # characters of one piece of text
WARN = 1  # lossguard.Severity.WARNING


class Split(NamedTuple):
    """A data set, cut once at random: three quarters to train on, a quarter held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


@functools.cache
def raw(name: str) -> Split:
    """One of scikit-learn's data sets as it comes: digits, wine, breast_cancer, diabetes, moons, circles."""
    if name in ("moons", "circles"):
        make = datasets.make_moons if name == "moons" else datasets.make_circles
        x, y = make(600, noise=0.1, random_state=0, **({"factor": 0.4} if name == "circles" else {}))
    else:
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True, **({"scaled": False} if name == "diabetes" else {}))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(7))
    inputs, targets = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    targets = targets.float() if targets.is_floating_point() else targets
    cut = len(y) * 3 // 4
    return Split(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])


def standardised(name: str) -> Split:
    """The same with features of mean 0 and deviation 1, and targets too where they are real numbers."""
    d = raw(name)
    mean, std = d.x.mean(0), d.x.std(0)
    y, held_y = d.y, d.held_y
    if y.is_floating_point():
        y, held_y = (d.y - d.y.mean()) / d.y.std(), (d.held_y - d.y.mean()) / d.y.std()
    return Split((d.x - mean) / std, y, (d.held_x - mean) / std, held_y)


def digits(scale: float = 16.0) -> Split:
    """Handwritten digits, pixels in [0, 1]."""
    d = raw("digits")
    return Split(d.x / scale, d.y, d.held_x / scale, d.held_y)


def images(scale: float = 16.0) -> Split:
    """The digits as 8 by 8 images with one channel."""
    d = digits(scale)
    return Split(d.x.view(-1, 1, 8, 8), d.y, d.held_x.view(-1, 1, 8, 8), d.held_y)


def rows(scale: float = 16.0) -> Split:
    """The digits as sequences of 8 rows of 8 pixels."""
    d = digits(scale)
    return Split(d.x.view(-1, 8, 8), d.y, d.held_x.view(-1, 8, 8), d.held_y)


@functools.cache
def text() -> tuple[Tensor, int]:
    """The help text of the standard library as codes of characters, and how many characters there are."""
    words = "\n".join(topics[k] for k in sorted(topics))[:200_000]
    characters = {c: i for i, c in enumerate(sorted(set(words)))}
    return torch.tensor([characters[c] for c in words]), len(characters)


def pieces(batch: int = 16, context: int = CONTEXT) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of text and the characters that follow."""
    codes, _ = text()
    while True:
        starts = torch.randint(len(codes) - context - 1, (batch,))
        cut = torch.stack([codes[s : s + context + 1] for s in starts])
        yield cut[:, :-1], cut[:, 1:]


def shuffled(x: Tensor, y: Tensor, batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch in a new order; a last part of a batch is dropped."""
    while True:
        order = torch.randperm(len(y))
        for at in range(0, len(y) - min(batch, len(y)) + 1, batch):
            chosen = order[at : at + batch]
            yield x[chosen], y[chosen]


def fit(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    loss: Loss = F.cross_entropy,
    *,
    change: Callable[[int], None] | None = None,
    clip: float | None = None,
    schedule: Any = None,
    validate: Callable[[], float] | None = None,
    every: int = 20,
) -> None:
    """A plain loop. change: called with the step's number before it. A remedy may name the rate or the clip value of any program."""
    model.train()
    clip = job.overrides.get("max_norm", clip)
    for group in optimizer.param_groups:
        group["lr"] = job.overrides.get("lr", group["lr"])
    with job.guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(guard.batches(islice(batches, steps))):
            if change is not None:
                change(step)
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            guard.step(value)
            if validate is not None and (step + 1) % every == 0:
                guard.validation(validate())


@torch.no_grad()
def held_loss(model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> float:
    """The loss on held-out samples, in evaluation mode; the model is in training mode afterwards."""
    model.eval()
    value = float(loss(model(x), y))
    model.train()
    return value


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers in evaluation mode; 0 where the outputs are not finite."""
    model.eval()
    out = model(x).float()
    model.train()
    if not torch.isfinite(out).all():
        return 0.0
    guess = (out.squeeze(-1) > 0).long() if out.dim() == 1 or out.shape[-1] == 1 else out.argmax(-1)
    return float((guess == y).float().mean())


@torch.no_grad()
def r_squared(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the targets' variance that is explained; a large negative number where outputs are not finite."""
    model.eval()
    out = model(x).squeeze(-1)
    model.train()
    value = 1 - float(((out - y) ** 2).mean() / y.var())
    return value if value == value else -1e9


def text_score(model: nn.Module, classes_last: bool = True) -> float:
    """Minus the cross entropy of the next character on a fixed piece of text."""
    codes, _ = text()
    cut = codes[: 64 * (CONTEXT + 1)].view(64, CONTEXT + 1)
    value = held_loss(model, cut[:, :-1], cut[:, 1:].reshape(-1), lambda out, y: F.cross_entropy(out.reshape(-1, out.shape[-1]), y))
    return -value if value == value else -1e9


def per_character(out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy over all places of all pieces."""
    return F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))


def missed(job: Job, score: float) -> bool:
    """The program's own proof, left in its notes."""
    return bool(job.notes.get("fault"))


def mlp(sizes: tuple[int, ...], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def convnet(norm: bool = True) -> nn.Sequential:
    """A small convolutional net for the digits."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(128, 10))


class Recurrent(nn.Module):
    """A recurrent net over sequences; the last state gives the answer."""

    def __init__(self, cell: type[nn.RNNBase], inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cell = cell(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    """Causal self-attention, written out. scale: what q k is multiplied with; by default 1 over the root of the width."""

    def __init__(self, width: int, heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) * (self.scale or (w // self.heads) ** -0.5)
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, t, w))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int = 4, scale: float | None = None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, scale)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Characters(nn.Module):
    """A small causal transformer over characters; logits have the classes last."""

    def __init__(self, width: int = 48, layers: int = 2, scale: float | None = None) -> None:
        super().__init__()
        vocabulary = text()[1]
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, scale=scale) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
