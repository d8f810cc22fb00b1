"""What the search for the operation behind a non-finite value costs: before the fault (`locate=`), and once after it.

    python benchmarks/culprit.py [--steps 200]

Before the fault a guard with `locate=` keeps a copy of the weights at each step; after it, one step is run again with
every result looked at. Both are opt-in. Times are medians, on one CPU thread, against the bare step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from lossguard import Guard
from lossguard.culprit import find


def networks():
    """Name, model, batch: many small layers, and few large ones."""
    yield "30 layers of 64", nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(64, 64), nn.ReLU()))), torch.randn(64, 64)
    layer = nn.TransformerEncoderLayer(256, 8, 512, dropout=0.1, batch_first=True)
    yield "4 transformer layers of 256", nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(8, 64, 256)


def median_step(model, x, steps, *, guarded=True, **options):
    """Seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    guard = Guard(model, optimizer, **options) if guarded else None
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        if guard:
            guard.batch(x)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard:
            guard.step(loss)
        times.append(time.perf_counter() - begin)
    if guard:
        guard.close()
    return statistics.median(times[steps // 4 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(f"{'network':<30}{'bare ms':>10}{'guard':>8}{'+ locate':>10}{'search, in steps':>20}")
    for name, model, x in networks():
        torch.manual_seed(0)
        bare = median_step(model, x, steps, guarded=False)
        guarded = median_step(model, x, steps)
        located = median_step(model, x, steps, locate=lambda a, b: None)
        begin = time.perf_counter()
        found = find(model, lambda model=model, x=x: (model(x).square().mean() * 0).log())
        search = time.perf_counter() - begin
        assert found is not None and found.op == "aten.log"
        print(f"{name:<30}{1000 * bare:>10.2f}{guarded / bare:>8.2f}{located / bare:>10.2f}{search / bare:>20.1f}")


if __name__ == "__main__":
    main()
