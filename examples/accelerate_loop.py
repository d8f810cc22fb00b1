"""scikit-learn digits in a loop with Accelerate: two micro-batches an update, clipping, bf16, a CSV file of scalars. ``--ill``: a NaN in the data.

pip install lossguard accelerate scikit-learn
python examples/accelerate_loop.py
python examples/accelerate_loop.py --ill
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import Guard, TrainingHalted
from lossguard.trackers import CSV


def main(ill: bool) -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    if ill:
        x[700, 13] = float("nan")
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loader)

    table = Path(tempfile.mkdtemp()) / "run.csv"
    with Guard(model, optimizer, accumulate=2, trackers=[CSV(table)]) as guard:  # what prepare() returned
        try:
            for _ in range(12):
                for inputs, targets in guard.batches(loader):
                    with accelerator.accumulate(model):
                        loss = F.cross_entropy(model(inputs), targets)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), 5.0)
                        optimizer.step()
                        optimizer.zero_grad()
                    guard.step(loss)  # once for each micro-batch
            print(f"accuracy {float((model(x[1500:]).argmax(1) == y[1500:]).float().mean()):.3f}")
        except TrainingHalted as halt:
            print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")
    print(f"{len(table.read_text().splitlines()) - 1} lines in {table}")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
