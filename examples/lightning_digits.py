"""scikit-learn digits with Lightning, guarded by one line. ``--ill``: a learning rate far too high.

pip install lossguard[lightning] scikit-learn
python examples/lightning_digits.py
python examples/lightning_digits.py --ill
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as L
except ModuleNotFoundError:
    import pytorch_lightning as L

from lossguard import TrainingHalted
from lossguard.integrations.lightning import LossGuardCallback


class Digits(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(ill: bool) -> None:
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    train, validation = torch.utils.data.random_split(data, [1500, 297])
    guard = LossGuardCallback()
    trainer = L.Trainer(max_epochs=12, callbacks=[guard], accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    try:
        trainer.fit(Digits(lr=1.0 if ill else 2e-3), DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=297))
        print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
    except TrainingHalted as halt:
        print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
