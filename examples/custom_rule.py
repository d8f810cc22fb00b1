"""A signal and a rule of your own, in one file: does the classifier predict one and the same class for whole batches?

``--ill``: the digits come sorted by label and nobody shuffles them, so that the model learns whatever digit comes by and forgets
the others.

pip install lossguard scikit-learn
python examples/custom_rule.py
python examples/custom_rule.py --ill
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import Cause, Evidence, Finding, Guard, Remedy, Severity, rule, signal


@signal("logits", unit="share of a batch")  # (rows, classes) -> one number, on the device; never reads a value
def top_class_share(logits):
    return F.one_hot(logits.argmax(dim=1), logits.shape[1]).float().mean(dim=0).amax()


@rule
@dataclass(frozen=True)
class OneClass:
    """The model predicts one class for whole batches."""

    diagnosis = "one_class"
    reads = ("top_class_share",)
    share: float = 0.8  # of a batch; shuffled digits have 0.1 of each class
    samples: int = 5  # newest samples looked at
    grace: int = 30  # steps before the rule is asked: an untrained model may prefer one class
    patience: int = 2  # times in a row before it is heard

    def check(self, history):
        shares = history.last("top_class_share", self.samples)
        if len(shares) < self.samples or not shares.min() > self.share:
            return None
        return Finding(
            self.diagnosis, Severity.WARNING, history.step, "logits", f"at least {shares.min():.0%} of each batch gets the same class",
            evidence=(Evidence("share of the most frequent prediction", float(shares.min()), limit=self.share),),
            causes=(Cause("batches hold one class each", 0.7, "all samples of a batch get the same prediction"),),
            remedies=(Remedy("shuffle the training data: DataLoader(..., shuffle=True)"),),
        )  # fmt: skip


def main(ill: bool) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
    order = y[:1500].argsort() if ill else torch.arange(1500, device=device)
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=32, shuffle=not ill)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with Guard(model, optimizer) as guard:  # finds every rule that is registered; Guard(..., rules=[OneClass(share=0.9)]) changes a limit
        for _ in range(5):
            for inputs, targets in guard.batches(loader):
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
    print(f"last loss {loss.item():.3f}, accuracy {(model(x[1500:]).argmax(1) == y[1500:]).float().mean().item():.3f}")
    print(*(guard.findings or ["no findings"]), sep="\n")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
