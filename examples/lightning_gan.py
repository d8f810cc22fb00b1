"""A GAN on scikit-learn's digits with Lightning's manual optimisation: two optimizers, one line to attach the guard.

A healthy GAN is silent, although neither loss falls. ``--ill``: a line copied and not changed, so that both optimizers hold the
discriminator's parameters. Nothing breaks and both losses are finite, but the generator draws noise for ever.

pip install lossguard[lightning] scikit-learn
python examples/lightning_gan.py
python examples/lightning_gan.py --ill
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as L
except ModuleNotFoundError:
    import pytorch_lightning as L

from lossguard import TrainingHalted
from lossguard.integrations.lightning import LossGuardCallback


class GAN(L.LightningModule):
    def __init__(self, ill: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.ill = ill
        self.generator = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), 16, device=self.device))

        loss = self.judged(real, 1.0) + self.judged(fake.detach(), 0.0)
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()

        loss = self.judged(fake, 1.0)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def judged(self, images, target):
        return (self.discriminator(images) - target).square().mean()  # least squares

    def configure_optimizers(self):
        learner = self.discriminator if self.ill else self.generator
        for_generator = torch.optim.Adam(learner.parameters(), lr=1e-3, betas=(0.5, 0.999))
        for_discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999))
        return [for_generator, for_discriminator]


def main(ill: bool) -> None:
    L.seed_everything(0)
    images, _ = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 8.0 - 1.0, dtype=torch.float32))
    guard = LossGuardCallback(loss_family="adversarial")  # neither loss is meant to fall
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=8, callbacks=[guard], devices=1, **quiet)
    try:
        trainer.fit(GAN(ill), DataLoader(data, batch_size=64, shuffle=True, drop_last=True))
    except TrainingHalted as halt:
        print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
