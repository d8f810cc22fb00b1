"""Small real data sets of installed packages, and the field's toy tasks, as tensors. Nothing is downloaded.

Splits are fixed; only the order of batches depends on the run's generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Split(NamedTuple):
    """Training and test data."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def split(x: Tensor, y: Tensor, share: float = 0.8, seed: int = 0) -> Split:
    """A shuffled split, the same each time."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y, cut = x[order], y[order], int(share * len(x))
    return Split(x[:cut], y[:cut], x[cut:], y[cut:])


@cache
def digits(form: str = "flat") -> Split:
    """1797 digits of 8 x 8 pixels. form: ``flat`` (64, standardised), ``image`` (1 x 8 x 8 in [0, 1]), ``raw`` (64 in [0, 255])."""
    data = datasets.load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    if form == "image":
        x = x.reshape(-1, 1, 8, 8)
    elif form == "raw":
        x = (x * 255).round()
    else:
        x = (x - x.mean()) / x.std()
    return split(x, y)


@cache
def table(name: str) -> Split:
    """A scikit-learn table with standardised features: wine, iris, breast_cancer (classes); diabetes, linnerud (standardised targets)."""
    data = getattr(datasets, f"load_{name}")()
    x = torch.tensor(np.asarray(data.data), dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    if name in ("diabetes", "linnerud"):
        y = torch.tensor(np.asarray(data.target), dtype=torch.float32).reshape(len(x), -1)
        return split(x, (y - y.mean(0)) / y.std(0))
    return split(x, torch.tensor(np.asarray(data.target)))


@cache
def raw_table(name: str) -> Split:
    """The same with features and targets as they were measured."""
    data = getattr(datasets, f"load_{name}")()
    y = torch.tensor(np.asarray(data.target))
    y = y.float().reshape(len(y), -1) if name in ("diabetes", "linnerud") else y
    return split(torch.tensor(np.asarray(data.data), dtype=torch.float32), y)


@cache
def text(size: int = 200_000) -> tuple[Tensor, int]:
    """Python's own help topics as character indices, and the number of different characters (96 at most)."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[k] for k in sorted(topics))[:size]
    whole = "".join(c for c in whole if c == "\n" or " " <= c <= "~")
    letters = sorted(set(whole))
    place = {c: i for i, c in enumerate(letters)}
    return torch.tensor([place[c] for c in whole]), len(letters)


@cache
def words(size: int = 200_000, keep: int = 2000) -> tuple[Tensor, int]:
    """The same text as word indices; rare words are index 0. Word counts follow Zipf's law."""
    from collections import Counter
    from pydoc_data.topics import topics

    tokens = " ".join(topics[k] for k in sorted(topics))[:size].lower().split()
    place = {w: i + 1 for i, (w, _) in enumerate(Counter(tokens).most_common(keep - 1))}
    return torch.tensor([place.get(w, 0) for w in tokens]), keep


@cache
def documents(keep: int = 1000) -> tuple[list[Tensor], Tensor]:
    """Paragraphs of the help topics as word indices, and whether each belongs to a topic of the first half of the alphabet."""
    from collections import Counter
    from pydoc_data.topics import topics

    pieces = [(p.lower().split(), float(k < "i")) for k in sorted(topics) for p in topics[k].split("\n\n") if len(p.split()) >= 12]
    counts = Counter(w for p, _ in pieces for w in p)
    place = {w: i + 1 for i, (w, _) in enumerate(counts.most_common(keep - 1))}
    return [torch.tensor([place.get(w, 0) for w in p]) for p, _ in pieces], torch.tensor([label for _, label in pieces])


def windows(stream: Tensor, length: int, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of a token stream, with the same windows one token later."""
    while True:
        starts = torch.randint(len(stream) - length - 1, (batch,), generator=generator)
        chunk = stream[starts[:, None] + torch.arange(length + 1)]
        yield chunk[:, :-1], chunk[:, 1:]


def loader(x: Tensor, y: Tensor, batch: int, generator: torch.Generator | None = None, **keywords: Any) -> DataLoader[Any]:
    """A shuffling DataLoader."""
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=keywords.pop("shuffle", True), generator=generator, **keywords)


def endless(batches: Any, steps: int) -> Iterator[Any]:
    """That many batches, going through the loader again and again."""
    done = 0
    while True:
        for item in batches:
            if done == steps:
                return
            done += 1
            yield item


def draws(x: Tensor, y: Tensor, batch: int, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """That many random batches, drawn with replacement."""
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        yield x[chosen], y[chosen]


# ---- toy tasks


def xor(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy XOR: four clusters, two classes."""
    bits = torch.randint(2, (n, 2), generator=generator)
    return (2.0 * bits - 1) + 0.2 * torch.randn(n, 2, generator=generator), bits[:, 0] ^ bits[:, 1]


def parity(n: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random bits as +-1, and their parity."""
    x = torch.randint(2, (n, bits), generator=generator)
    return 2.0 * x - 1, x.sum(1) % 2


def moons(n: int = 600, noise: float = 0.15) -> Split:
    """Two interleaved half circles."""
    x, y = datasets.make_moons(n, noise=noise, random_state=0)
    return split(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def adding(n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem: (n, length, 2) of values and two marks; the target is the sum of the two marked values."""
    values = torch.rand(n, length, generator=generator)
    half = length // 2
    first, second = torch.randint(half, (n,), generator=generator), half + torch.randint(length - half, (n,), generator=generator)
    marks = torch.zeros(n, length)
    rows = torch.arange(n)
    marks[rows, first] = marks[rows, second] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True)


def copying(n: int, length: int, delay: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The copy task: symbols, a pause of blanks (index 0), then the symbols are to be said again; the rest of the target is ignored (-100)."""
    message = 1 + torch.randint(symbols, (n, length), generator=generator)
    x = torch.cat([message, torch.zeros(n, delay + length, dtype=torch.long)], 1)
    y = torch.cat([torch.full((n, length + delay), -100), message], 1)
    return x, y


def modular(p: int = 23) -> Split:
    """Every pair (a, b) below p with (a + b) mod p."""
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    x = torch.stack([a.flatten(), b.flatten()], 1)
    return split(x, x.sum(1) % p, 0.7)


# ---- scores


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, in eval mode; the model's mode is restored."""
    was = model.training
    model.eval()
    right = (model(x).argmax(-1) == y).float().mean().item()
    model.train(was)
    return right


@torch.no_grad()
def mean_loss(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> float:
    """The criterion on held-out data, in eval mode; the model's mode is restored."""
    was = model.training
    model.eval()
    value = criterion(model(x), y).item()
    model.train(was)
    return value
