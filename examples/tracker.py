"""Where the numbers go in a hand-written loop: TensorBoard if it is installed, else a CSV file, and any function besides.

Each gets at most 20 scalars at every sampled step, from numbers that have arrived; the first two get the findings, too, as text.
``--ill``: the learning rate is a hundred times too high.

pip install lossguard[tensorboard] scikit-learn
python examples/tracker.py
python examples/tracker.py --ill
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import Guard, TrainingHalted
from lossguard.trackers import CSV, TensorBoard


def tell(step, numbers):
    if step % 50 == 0:
        print(f"step {step}: loss {numbers['loss']:.3f}, update ratio {numbers['update_ratio_median']:.4f}, {len(numbers)} scalars in all")


def main(ill: bool) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3 if ill else 3e-3)

    folder = Path(tempfile.mkdtemp())
    try:
        tracker = TensorBoard(folder)
    except ImportError:
        tracker = CSV(folder / "run.csv")

    with Guard(model, optimizer, trackers=[tracker, tell]) as guard:
        try:
            for _ in range(6):
                for inputs, targets in guard.batches(loader):
                    loss = F.cross_entropy(model(inputs), targets)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    guard.step(loss)
        except TrainingHalted as halt:
            print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")
    for file in folder.iterdir():
        print(f"{file.stat().st_size} bytes in {file}")
    if isinstance(tracker, TensorBoard):
        print(f"look at them: tensorboard --logdir {folder}")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
