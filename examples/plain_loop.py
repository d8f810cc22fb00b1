"""A hand-written loop on scikit-learn's digits under a guard. ``--lr 5``: a learning rate far too high.

pip install lossguard scikit-learn
python examples/plain_loop.py
python examples/plain_loop.py --lr 5
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import Guard, TrainingHalted


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_digits()
    loader = DataLoader(TensorDataset(torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    with Guard(model, optimizer) as guard:
        try:
            for _ in range(options.epochs):
                for x, y in guard.batches(loader):
                    loss = criterion(model(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    guard.step(loss)
        except TrainingHalted as halt:
            print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")


if __name__ == "__main__":
    main()
