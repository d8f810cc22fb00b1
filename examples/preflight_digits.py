"""Checks before the first step on scikit-learn's digits. Run: python examples/preflight_digits.py [--ill]"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import preflight


def main(ill):
    """``ill``: raw pixels, and a softmax in front of a loss that has its own."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) * (255 / 16 if ill else 1 / 16)
    loader = DataLoader(TensorDataset(images, torch.tensor(data.target)), batch_size=64, shuffle=True)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers, nn.Softmax(dim=1)) if ill else nn.Sequential(*layers)
    result = preflight(model, loader, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3))
    print(result)
    return result


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
