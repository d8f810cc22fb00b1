"""Skipping under Lightning: every precision and both ways of optimisation end where a fit without the bad batches ends."""

from __future__ import annotations

import math

import pytest
import torch
from skip_runs import OTHERS, QUICK, everything, finite
from test_lightning import L, half, trainer
from torch.utils.data import DataLoader, TensorDataset

from lossguard import TrainingHalted
from lossguard.integrations.lightning import LossGuardCallback

BATCHES, BAD = 14, (8, 11)
MAKES = {
    "fused": ("found_inf", lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
    "put back": ("restore", lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9)),
    "custom": ("restore", OTHERS["lion"]),
}


def data(leave=()):
    """Batches of 8 samples that carry their number, so that a module knows the bad ones."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(8 * BATCHES, 8, generator=generator), torch.randint(4, (8 * BATCHES,), generator=generator)
    number = torch.arange(8 * BATCHES) // 8
    keep = ~torch.isin(number, torch.tensor(leave, dtype=torch.long))
    return DataLoader(TensorDataset(x[keep], y[keep], number[keep]), batch_size=8)


class Module(L.LightningModule):
    """A small classifier whose loss is multiplied on bad batches."""

    def __init__(self, make, factor, *, manual=False, bad=BAD, clips=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        self.make, self.factor, self.bad, self.clips = make, factor, bad, clips
        self.seen, self.until = 0, 10**6
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return self.make(list(self.parameters()))

    def training_step(self, batch, index):
        x, y, number = batch
        loss = torch.nn.functional.cross_entropy(self.net(x).float(), y)
        self.seen += 1
        loss = loss * (self.factor if int(number[0]) in self.bad or self.seen > self.until else 1.0)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.clips:
                self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step()
        return loss


def fit(name, factor, *, precision="32-true", manual=False, leave=(), guarded=True, scaler=None, gate="nonfinite_gradient", **options):
    by, make = MAKES[name]
    # Lightning refuses to clip for a fused optimizer in mixed precision, and clips scaled gradients in manual optimisation
    clips = (name != "fused" and not (manual and precision == "16-mixed")) or precision == "32-true"
    module = Module(make, factor, manual=manual, clips=clips)
    skip = {gate: QUICK if gate == "exploding_gradient" else None}
    callback = LossGuardCallback(skip=skip, skip_by=by, halt=None)
    words = {"plugins": [scaler]} if scaler else {"precision": precision}
    words.update({"gradient_clip_val": 0.1} if clips and not manual else {})
    fitted = trainer(*([callback] if guarded else []), **words, **options)
    fitted.fit(module, data(leave))
    return module, fitted.optimizers[0], callback


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    ("name", "gate"), [("fused", "nonfinite_gradient"), ("fused", "exploding_gradient"), ("put back", "nonfinite_gradient"), ("custom", "exploding_gradient")]
)
def test_a_fit_with_bad_batches_ends_like_one_without(name, gate, precision, manual):
    """Bad batches leave weights, moments and counters as if they had never been there."""
    ends, factor = [], math.nan if gate == "nonfinite_gradient" else 300.0
    for leave in ((), BAD):
        scaler = half(init_scale=64.0, growth_interval=10**6) if precision == "16-mixed" else None
        module, optimizer, callback = fit(name, factor, precision=precision, manual=manual, leave=leave, guarded=not leave, scaler=scaler, gate=gate)
        ends.append(everything(module, optimizer))
        assert finite(module)
        if not leave:
            assert callback.guard.skipped.get("exploding_gradient", 0) == (2 if gate == "exploding_gradient" else 0)
    assert ends[0] == ends[1]


def test_accumulation():
    """One bad batch among the four of an update leaves the whole update out."""
    module, optimizer, callback = fit("fused", math.nan, accumulate_grad_batches=2)
    reference, other, _ = fit("fused", math.nan, accumulate_grad_batches=2, leave=(8, 9, 10, 11), guarded=False)
    assert everything(module, optimizer) == everything(reference, other)
    assert callback.guard.skipped == {"nonfinite_gradient": 2}


def test_a_fit_that_only_skips_halts():
    """Twenty updates left out in a row end the fit, and the weights are the last good ones."""
    module = Module(MAKES["fused"][1], math.nan, bad=())
    module.until = 3
    good = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 2:
                good.update(everything(pl_module, trainer.optimizers[0]))

    fitted = trainer(Keep(), LossGuardCallback(skip={"nonfinite_gradient"}, mute={"nonfinite_loss"}), max_epochs=3)
    with pytest.raises(TrainingHalted) as caught:
        fitted.fit(module, data())
    assert caught.value.finding.diagnosis == "skipped_steps"
    assert everything(module, fitted.optimizers[0]) == good
