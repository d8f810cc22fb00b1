"""Batches that come again: what shared seeds do is told from what is meant. Real loaders, real runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import criterion, make_batch, mlp
from no_read import no_read_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lossguard import Guard, Severity, fingerprint
from lossguard.fingerprint import Fingerprints, checksum


class Stream(IterableDataset):
    """An iterable data set that every worker reads from its beginning."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(160):
            x = torch.randn(16, generator=generator)
            yield x, x[:4].argmax()


class Noise(Dataset):
    """A map-style data set that draws its samples from numpy's global generator."""

    def __len__(self):
        return 640

    def __getitem__(self, i):
        x = torch.from_numpy(np.random.randn(16).astype("f"))
        return x, x[:4].argmax()


def same_seed(worker):
    np.random.seed(7)


def own_seed(worker):
    np.random.seed(torch.initial_seed() % 2**32)


def test_the_size_of_each_batch_is_known():
    """How many samples each step's batch had stands beside its loss, in plain and sampled steps; NaN where none was shown."""
    sizes = [16, 16, 4] * 30
    guard = train([(torch.randn(n, 16), torch.zeros(n, dtype=torch.long)) for n in sizes], dense=5)
    assert guard.history.batch_sizes().tolist() == sizes
    model = mlp()
    with Guard(model, torch.optim.Adam(model.parameters())) as guard:
        guard.step(torch.tensor(1.0))
    assert np.isnan(guard.history.batch_sizes()).all()


def train(batches, *, epochs=1, steps=200, **keywords):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Guard(model, optimizer, halt=None, **keywords) as guard:
        for _ in range(epochs):
            for x, y in guard.batches(batches):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
                if guard.steps >= steps:
                    return guard
    return guard


def heard(guard):
    return [f for f in guard.findings if f.diagnosis == "duplicate_batches"]


@pytest.mark.parametrize(
    ("loader", "workers"),
    [(lambda: DataLoader(Stream(), batch_size=8, num_workers=2), 2), (lambda: DataLoader(Noise(), batch_size=8, num_workers=3, worker_init_fn=same_seed), 3)],
)
def test_workers_that_share_a_seed_or_a_stream_are_named(loader, workers):
    """Each batch comes once for every worker: the finding says so, and that the number of workers is the same."""
    (finding,) = heard(train(loader()))
    assert finding.severity == Severity.WARNING and 0 < finding.step <= 2 * workers
    assert finding.causes[0].confidence > 0.9 and f"{workers} workers" in finding.causes[0].because
    assert finding.remedies[0].change == {"seed_workers": True}


def batches(n, seed=0):
    return [make_batch("mlp", seed=seed + i) for i in range(n)]


def cycled(some, n):
    return [some[i % len(some)] for i in range(n)]


def discrete(n):
    """Single samples of an exclusive or."""
    torch.manual_seed(0)
    corners = torch.eye(4).repeat(1, 4)
    return [(corners[i : i + 1], torch.tensor([i % 2])) for i in torch.randint(4, (n,)).tolist()]


HEALTHY = {
    "fresh batches": lambda: batches(120),
    "one worker per share": lambda: DataLoader(Noise(), batch_size=8, num_workers=2, worker_init_fn=own_seed),
    "full batch": lambda: cycled(batches(1), 120),
    "full batch, shuffled": lambda: cycled(list(DataLoader(TensorDataset(*make_batch("mlp", n=64)), batch_size=64, shuffle=True)), 120),
    "copies of one batch": lambda: [tuple(t.clone() for t in b) for b in cycled(batches(1), 120)],
    "two batches in turn": lambda: cycled(batches(2), 120),
    "short epochs": lambda: cycled(batches(5), 120),
    "single discrete samples": lambda: discrete(200),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_repeats_by_design_is_silent(name):
    """Full-batch training, few batches in turn, short epochs and small discrete inputs are no duplicates."""
    assert heard(train(HEALTHY[name]())) == []


@pytest.mark.parametrize("times", [2, 3])
def test_a_batch_shown_again_by_hand_is_meant(times):
    """Several inner steps on the very same tensors are no duplicates; copies that a loader hands out are."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Guard(model, optimizer) as guard:
        for x, y in batches(40):
            for _ in range(times):
                guard.batch(x, y)
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
    assert heard(guard) == []
    assert heard(train([tuple(t.clone() for t in b) for b in batches(40) for _ in range(times)]))


def test_batches_of_integers_are_told_apart():
    """Token ids have fingerprints too."""
    ids = [torch.randint(1000, (4, 12), generator=torch.Generator().manual_seed(i // 2)) for i in range(60)]
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 16), torch.nn.Flatten(), torch.nn.Linear(192, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Guard(model, optimizer) as guard:
        for x in ids:
            guard.batch({"input_ids": x.clone(), "attention_mask": torch.ones(4, 12)})
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert heard(guard)


def test_a_checksum_reads_no_device_and_no_great_part_of_a_batch():
    """What lies on another device has none, and a large batch costs no more than a small one."""
    assert checksum(torch.zeros(3, device="meta")) is None
    large = torch.zeros(10**6)
    before = checksum(large)
    large[::1000] = 1.0
    assert before == checksum(torch.zeros(10**6)) and isinstance(before, int) and 0 <= before < 2**24


def test_a_batch_is_asked_once():
    """A step without a batch of its own has no fingerprint."""
    prints, cell, host = Fingerprints(), torch.zeros(()), np.zeros(1, np.float32)
    prints.show(torch.ones(4), handed=True)
    assert prints.write(cell, host, 0) and host[0] == checksum(torch.ones(4))
    assert not prints.write(cell, host, 0)


def test_checksums_pause():
    """A window of batches is looked at, then none until the next period: a long run pays for few of them."""
    prints, host = Fingerprints(), np.zeros(1, np.float32)
    written = []
    for i in range(fingerprint.PERIOD + 2):
        prints.show(torch.full((4,), float(i)), handed=True)
        written.append(prints.write(torch.zeros(()), host, 0))
    assert written == [True] * fingerprint.WINDOW + [False] * (fingerprint.PERIOD - fingerprint.WINDOW) + [True] * 2


def test_batches_on_a_device_are_told_apart_without_a_read():
    """Where a read of the device raises, the sums that show whether a batch is finite tell one batch from another."""
    with no_read_device() as device:
        model = mlp(device=device)
        shown = [make_batch("mlp", device, seed=i // 2) for i in range(60)]
        with Guard(model, torch.optim.SGD(model.parameters(), lr=0.05)) as guard:
            for x, y in guard.batches(shown):
                loss = criterion(model(x), y)
                loss.backward()
                guard.step(loss)
    assert heard(guard)
