"""Takes batches for the checks: the first few whole, numbers about many more. A loader flows in, a ``Sample`` flows out.

Nothing of the user's is used up: a DataLoader is read through a shallow copy without workers; of an iterator that can be
read only once no more is taken than is kept, and what was taken is handed back in front of the rest. Batches are cloned
before anything runs on them.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lossguard.batches import split

KEEP = 8  # batches kept whole
LATE = 2.0  # times the time for the loader, after which fewer batches than are wanted must do
MOST_BATCHES = 1000  # batches looked through at most
MOST_LABELS = 1_000_000  # labels kept in order, 8 bytes each
MOST_BAD = 3  # batches with non-finite values that are kept, so that their loss can be asked for
DISTINCT = 2  # a float target with no more values than this, all of them 0 or 1, is a class number


@dataclass
class Bad:
    """A batch with non-finite values: its number, the samples in it, how many values, in which tensor, of its inputs or targets."""

    batch: int
    first_sample: int
    samples: list[int]
    values: int
    tensor: str
    part: str
    data: Any


@dataclass
class Sample:
    """What was taken. labels: the class numbers of single-label targets in the order of the loader, empty if there are none."""

    kept: list[Any] = field(default_factory=list)  # those without NaN or Inf, if there are any
    spare: list[Any] = field(default_factory=list)  # those with
    looked_at: int = 0
    samples: int = 0
    complete: bool = False
    total: int | None = None
    once: bool = False  # the iterator can be read only once
    rest: Iterable[Any] = ()
    bad: list[Bad] = field(default_factory=list)
    bad_samples: int = 0
    labels: list[Tensor] = field(default_factory=list)  # one per batch
    values: list[Tensor] = field(default_factory=list)  # the same of continuous targets, one number a sample
    counts: Counter[int] = field(default_factory=Counter)  # of integer targets of any shape
    dense: bool = False  # targets hold more than one class number a sample
    order: str = "unknown"  # "sequential", "random" or "own": how the sampler draws
    stopped: str = ""

    @property
    def span(self) -> str:
        """How much was looked at, in words."""
        whole = f"{self.looked_at} batches" if self.total is None else f"{self.looked_at} of {self.total} batches"
        return f"all {self.looked_at} batches" if self.complete else f"the first {whole}"


def sizes(tree: Any) -> set[int]:
    """The first dimensions of the tensors in a batch."""
    return {t.shape[0] for _, t in tensors(tree) if t.dim() > 0}


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists and dicts, with their names.

    >>> [name for name, _ in tensors({"a": torch.ones(1), "b": [torch.ones(1)]})]
    ['a', 'b.0']
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from tensors(value, f"{name}.{i}" if name else str(i))


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with ``function`` applied to what is no tuple, list or dict; such leaves are left alone unless tensors.

    >>> mapped((torch.ones(2), "a"), lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf)
    (tensor([2., 2.]), 'a')
    """
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, function) for value in tree))
    if type(tree) in (list, tuple):
        return type(tree)(mapped(value, function) for value in tree)
    if isinstance(tree, Mapping):
        changed = {key: mapped(value, function) for key, value in tree.items()}
        if type(tree) is dict:
            return changed
        twin = copy.copy(tree)
        twin.update(changed)  # type: ignore[attr-defined]
        return twin
    return function(tree)


def fresh(batch: Any) -> Any:
    """A copy of a batch, so that a model that works in place spoils only the copy."""
    return mapped(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf))


def chosen(batch: Any, indices: list[int]) -> Any:
    """The batch of these samples only; ``ValueError`` where samples cannot be told apart."""
    found = sizes(batch)
    if len(found) != 1:
        raise ValueError("its tensors have different first dimensions, so that samples cannot be told apart")
    n = next(iter(found))

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return copy.copy(leaf)
        return leaf[torch.tensor(indices, device=leaf.device)].clone()

    def lists(tree: Any) -> Any:
        """Lists of as many strings or numbers as there are samples are picked from too."""
        if isinstance(tree, list) and len(tree) == n and not any(isinstance(v, (Tensor, list, tuple, dict)) for v in tree):
            return [tree[i] for i in indices]
        if type(tree) in (list, tuple):
            return type(tree)(lists(v) for v in tree)
        return {k: lists(v) for k, v in tree.items()} if type(tree) is dict else tree

    return mapped(lists(batch), pick)


def joined(batches: list[Any]) -> Any:
    """Batches of one nesting as one batch; ``ValueError`` where they do not fit together.

    >>> joined([(torch.ones(1), ["a"]), (torch.zeros(2), ["b", "c"])])
    (tensor([1., 0., 0.]), ['a', 'b', 'c'])
    """
    first = batches[0]
    if isinstance(first, Tensor) and first.dim() and len({t.shape[1:] for t in batches}) == 1:
        return torch.cat(batches)
    if type(first) is tuple or (type(first) is list and any(isinstance(v, (Tensor, list, tuple, dict)) for v in first)):
        return type(first)(joined([b[i] for b in batches]) for i in range(len(first)))
    if type(first) is dict:
        return {k: joined([b[k] for b in batches]) for k in first}
    if type(first) is list:
        return [v for b in batches for v in b]
    raise ValueError(f"batches of {type(first).__name__} cannot be joined")


def take(batches: Any, seconds: float) -> Sample:
    """Go through the loader once, for so many seconds at most."""
    sample = Sample()
    try:
        sample.total = len(batches)
    except (TypeError, NotImplementedError):
        sample.total = None
    source = reader(batches)
    iterator = iter(source)
    sample.once = iterator is batches
    sample.order = _order(batches)
    taken: list[Any] = []
    limit = KEEP if sample.once else MOST_BATCHES
    end, late = time.monotonic() + seconds, time.monotonic() + LATE * seconds
    try:
        for batch in itertools.islice(iterator, limit):
            if sample.once:
                taken.append(batch)
            _look(sample, batch)
            if time.monotonic() > (end if sample.looked_at >= KEEP else late):
                break
        else:
            sample.complete = sample.looked_at < limit or sample.looked_at == sample.total
    except Exception as error:
        sample.stopped = f"batch {sample.looked_at} could not be read: {type(error).__name__}: {error}"
    sample.kept = sample.kept or sample.spare
    sample.rest = itertools.chain(taken, iterator) if sample.once else batches
    return sample


def reader(batches: Any) -> Iterable[Any]:
    """The loader, or a copy of it that has no workers and no iterator of its own under way."""
    if not isinstance(batches, DataLoader) or hasattr(batches, "load_state_dict"):
        return batches
    twin = copy.copy(batches)
    vars(twin).update(num_workers=0, prefetch_factor=None, timeout=0, pin_memory=False, _iterator=None)
    vars(twin)["persistent_workers"] = False
    return twin


def _order(batches: Any) -> str:
    """How a DataLoader's sampler draws, by the samplers that torch itself has."""
    sampler = getattr(batches, "sampler", None)
    inner = getattr(getattr(batches, "batch_sampler", None), "sampler", sampler)
    name = type(inner).__name__ if inner is not None else ""
    if name in ("RandomSampler", "SubsetRandomSampler", "WeightedRandomSampler"):
        return "weighted" if name.startswith("Weighted") else "random"
    if name == "DistributedSampler":
        return "random" if getattr(inner, "shuffle", False) else "sequential"
    if name == "SequentialSampler":
        plain = type(getattr(batches, "batch_sampler", None)).__name__ in ("BatchSampler", "NoneType")
        return "sequential" if plain else "own"
    return "own" if isinstance(batches, DataLoader) and name and "Infinite" not in name else "unknown"


def _look(sample: Sample, batch: Any) -> None:
    """Take down what one batch says."""
    found = sizes(batch)
    n = next(iter(found)) if len(found) == 1 else next((t.shape[0] for _, t in tensors(batch) if t.dim()), 1)
    sick = sample.bad_samples
    inputs, targets = split(batch)
    for part, tree in (("inputs", inputs), ("targets", None if targets is inputs else targets)):
        for name, t in tensors(tree):
            if t.is_floating_point() or t.is_complex():
                _nonfinite(sample, batch, part, name, t)
    place = sample.kept if sample.bad_samples == sick else sample.spare
    if len(place) < KEEP:
        place.append(fresh(batch))
    if isinstance(targets, Tensor):
        _labels(sample, targets.detach(), n)
    sample.looked_at += 1
    sample.samples += n


def _nonfinite(sample: Sample, batch: Any, part: str, name: str, t: Tensor) -> None:
    fine = torch.isfinite(t)
    if bool(fine.all()):
        return
    rows = (~fine.reshape(t.shape[0], -1)).any(dim=1) if t.dim() else ~fine.reshape(1)
    sick: list[int] = torch.nonzero(rows).flatten().tolist()
    sample.bad_samples += len(sick)
    if len(sample.bad) < MOST_BAD:
        sample.bad.append(Bad(sample.looked_at, sample.samples, sick, int((~fine).sum()), name, part, fresh(batch)))


def _labels(sample: Sample, targets: Tensor, n: int) -> None:
    if targets.numel() == 0 or targets.is_complex():
        return
    if targets.is_floating_point():
        single = targets.dim() == 1 or (targets.dim() == 2 and targets.shape[1] == 1)
        if not single or not bool(((targets == 0) | (targets == 1)).all()):
            if single and targets.numel() == n and sum(len(v) for v in sample.values) < MOST_LABELS:
                sample.values.append(targets.reshape(-1).to(device="cpu", dtype=torch.float64))
            return
    flat = targets.reshape(-1).to(device="cpu", dtype=torch.int64)
    values, counts = torch.unique(flat, return_counts=True)
    if values.numel() <= 100_000:
        sample.counts.update(dict(zip(values.tolist(), counts.tolist())))
    if flat.numel() != n:
        sample.dense = True
    elif sum(len(l) for l in sample.labels) < MOST_LABELS:
        sample.labels.append(flat)
