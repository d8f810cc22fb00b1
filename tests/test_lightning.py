"""The Lightning callback: every promise of its docstring, in both namespaces where they could differ."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

L = pytest.importorskip("lightning.pytorch")
PL = pytest.importorskip("pytorch_lightning")

from lossguard import Guard, Severity, TrainingHalted  # noqa: E402
from lossguard.integrations.lightning import LossGuardCallback  # noqa: E402

for _name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.filterwarnings("error::RuntimeWarning:lossguard")]
namespaces = pytest.mark.parametrize("ns", [L, PL], ids=["lightning", "pytorch_lightning"])


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def classifier(ns=L, optimizer=torch.optim.SGD, **options):
    """A LightningModule of the namespace; ``lr`` and the like go to the optimizer."""

    class Classifier(ns.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.dtypes = set()

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.dtypes.add(logits.dtype)
            return F.cross_entropy(logits, batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return optimizer(self.parameters(), **{"lr": 0.05, **options})

    return Classifier()


def manual(ns=L, clip: float | None = None, where: str = "step", direct: bool = False):
    class Manual(type(classifier(ns))):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if direct:
                loss.backward()
            else:
                self.manual_backward(loss)
            if clip and where == "step":
                self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")
            optimizer.step()
            return loss if direct else None

        def on_before_optimizer_step(self, optimizer):
            if clip and where == "hook":
                self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")

    return Manual()


class GAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.automatic_optimization = False
        self.g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.d = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        for_d, for_g = self.optimizers()
        noise = torch.randn(len(batch[0]), 4)
        self.toggle_optimizer(for_d)
        real, fake = self.d(batch[0]), self.d(self.g(noise).detach())
        loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real)) + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        for_d.zero_grad()
        self.manual_backward(loss)
        for_d.step()
        self.untoggle_optimizer(for_d)
        self.toggle_optimizer(for_g)
        fake = self.d(self.g(noise))
        loss = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
        for_g.zero_grad()
        self.manual_backward(loss)
        for_g.step()
        self.untoggle_optimizer(for_g)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.d.parameters(), lr=1e-3), torch.optim.Adam(self.g.parameters(), lr=1e-3)]


def loader(n: int = 256, batch: int = 16, poison: int | None = None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    y = x[:, :4].argmax(1)
    if poison is not None:
        x[poison * batch + 3, 2] = float("nan")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


def trainer(*callbacks, ns=L, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return ns.Trainer(callbacks=list(callbacks), **{"max_epochs": 1, "accelerator": "cpu", **quiet, **options})


def fit(module, *, data=None, callback=None, ns=L, **options):
    callback = callback or LossGuardCallback()
    trainer(callback, ns=ns, **options).fit(module, data or loader())
    return callback


def worst(callback) -> list[str]:
    return [f"{f.severity.label} {f.diagnosis}" for f in callback.findings if f.severity >= Severity.WARNING]


def hooks_on(module, optimizers) -> int:
    """Hooks of any kind that are left."""
    count = len(nn.modules.module._global_forward_hooks)
    count += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())
    count += sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)
    return count + sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())


# ---- what it sees


@namespaces
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_a_healthy_run_is_seen_whole_and_nothing_is_found(ns, kind):
    """A healthy run has every signal at every site, its own number of steps, and no finding of a warning or above."""
    module = classifier(ns) if kind == "automatic" else manual(ns)
    callback = fit(module, ns=ns, max_epochs=8)
    observed = callback.guard.coverage.observed
    assert callback.guard.steps == 128
    assert {k: observed[k] for k in ("grad_norm", "update_norm", "weight_norm", "activation_rms", "clip_coefficient", "label_nll")} == {
        "grad_norm": 6, "update_norm": 6, "weight_norm": 6, "activation_rms": 5, "clip_coefficient": 1, "label_nll": 1}  # fmt: skip
    assert callback.guard.coverage.not_observed == {}
    assert callback.guard.history.loss_family == "cross_entropy"
    assert worst(callback) == []


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_the_numbers_are_those_of_a_plain_loop(kind):
    """Losses, gradient norms and update norms are, bit for bit, those that a guard of a plain loop records."""
    module = classifier() if kind == "automatic" else manual()
    ours = fit(module, max_epochs=2, gradient_clip_val=0.5 if kind == "automatic" else None).guard.history
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer) as guard:
        for _ in range(2):
            for x, y in guard.batches(loader()):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if kind == "automatic":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                guard.step(loss)
    for signal in ("grad_norm", "update_norm", "weight_norm", "activation_rms", "clip_coefficient", "logit_peak", "confident_wrong"):
        np.testing.assert_array_equal(ours.last(signal), guard.history.last(signal), err_msg=signal)
    np.testing.assert_array_equal(ours.losses(), guard.history.losses())


@pytest.mark.parametrize("optimizer", [{"optimizer": torch.optim.AdamW, "lr": 1e-3}, {"momentum": 0.9, "nesterov": True}], ids=["adamw", "nesterov"])
def test_clip_coefficient_under_automatic_optimisation(optimizer):
    """The clip coefficient is the clip value over the unclipped norm, also where the optimizer changes gradients in its step."""
    history = fit(classifier(**optimizer), gradient_clip_val=0.1).guard.history
    norms = history.last("grad_total")[:, 0]
    assert norms.min() > 0.1
    np.testing.assert_allclose(history.last("clip_coefficient")[:, 0], 0.1 / norms, rtol=1e-4)


@namespaces
@pytest.mark.parametrize("where", ["step", "hook"])
def test_clip_coefficient_under_manual_optimisation(ns, where):
    """self.clip_gradients is measured in training_step and in on_before_optimizer_step."""
    history = fit(manual(ns, clip=0.1, where=where), ns=ns).guard.history
    norms = history.last("grad_total")[:, 0]
    assert norms.min() > 0.1
    np.testing.assert_allclose(history.last("clip_coefficient")[:, 0], 0.1 / norms, rtol=1e-4)


def test_a_direct_backward_is_seen():
    """loss.backward() past Lightning in manual optimisation is seen as in a plain loop."""
    with_hooks, without = fit(manual()).guard.history, fit(manual(direct=True)).guard.history
    np.testing.assert_array_equal(with_hooks.last("grad_norm"), without.last("grad_norm"))
    np.testing.assert_array_equal(with_hooks.losses(), without.losses())


def test_accumulation_equals_one_large_batch():
    """Four accumulated batches give one record of gradients and updates, equal to that of one batch four times as large."""
    small = fit(classifier(), data=loader(batch=16), max_epochs=2, accumulate_grad_batches=4).guard
    large = fit(classifier(), data=loader(batch=64), max_epochs=2).guard
    assert (small.steps, large.steps) == (32, 8)
    assert small.history.samples == large.history.samples == 8
    assert small.history.steps().tolist() == [3, 7, 11, 15, 19, 23, 27, 31]
    for signal in ("grad_norm", "update_norm", "weight_norm"):
        np.testing.assert_allclose(small.history.last(signal), large.history.last(signal), rtol=1e-5, err_msg=signal)
    np.testing.assert_allclose(small.history.losses().reshape(-1, 4).mean(1), large.history.losses(), rtol=1e-5)
    assert small.findings == []


def test_sparse_samples_wait_for_their_update():
    """A step that is due between updates is recorded at the next one."""
    callback = fit(classifier(), callback=LossGuardCallback(every=10, dense=0), max_epochs=4, accumulate_grad_batches=4)
    assert callback.guard.history.steps().tolist() == [3, 11, 23, 31, 43, 51, 63]
    assert callback.guard.history.seen("update_norm").all()


def test_several_optimizers():
    """Two optimizers in one step: each parameter has its own gradient and update, the losses are named terms."""
    callback = fit(GAN(), max_epochs=4)
    guard = callback.guard
    assert guard.history.optimizers == 2
    assert guard.history.terms == ("loss_0", "loss_1")
    assert len(guard.history.params) == 8
    assert {p.name: p.optimizer for p in guard.history.params}["d.0.weight"] == 0
    assert guard.history.seen("grad_norm", 20).all()
    assert guard.history.seen("update_norm", 20).all()
    assert (guard.history.last("update_norm", 20) > 0).all()
    assert worst(callback) == []


def test_a_training_step_without_loss_is_no_step():
    """training_step may return None: that batch counts as no step and leaves nothing behind."""

    class Sometimes(type(classifier())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    callback = fit(Sometimes(), max_epochs=2)
    assert callback.guard.steps == 22
    assert len(callback.guard.history.units) == 5
    assert callback.guard.history.seen("update_norm").all()
    assert worst(callback) == []


def test_validation_and_sanity_checking_leave_no_trace():
    """Validation within the fit changes no number that is recorded."""
    alone, among = LossGuardCallback(), LossGuardCallback()
    trainer(alone, max_epochs=2).fit(classifier(), loader())
    trainer(among, max_epochs=2, val_check_interval=3, num_sanity_val_steps=2).fit(classifier(), loader(), loader(64))
    for signal in ("grad_norm", "activation_rms", "logit_peak", "update_norm"):
        np.testing.assert_array_equal(alone.guard.history.last(signal), among.guard.history.last(signal), err_msg=signal)


def test_the_monitored_metric_is_the_validation_loss():
    """Each validation after training steps adds the metric to the guard's curves; sanity checking adds nothing."""
    module = classifier()
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", torch.tensor(0.5))
    callback = LossGuardCallback()
    trainer(callback, max_epochs=3, num_sanity_val_steps=1).fit(module, loader(), loader(32))
    assert callback.guard.history.validations()[:, 1].tolist() == [0.5] * 3


def test_a_closure_that_is_called_again():
    """LBFGS runs backward many times in a step: one loss and one update are recorded."""
    callback = fit(classifier(optimizer=torch.optim.LBFGS, lr=0.1, max_iter=3))
    assert callback.guard.steps == 16
    assert callback.guard.history.seen("update_norm").all()


# ---- precision


def test_bf16_mixed():
    """bf16-mixed is watched like float32."""
    module = classifier()
    callback = fit(module, precision="bf16-mixed", max_epochs=4)
    assert module.dtypes == {torch.bfloat16}
    assert worst(callback) == []
    assert callback.guard.coverage.observed["grad_norm"] == 6


def half(ns=L, **options):
    """float16 with a loss scaler, which Lightning replaces by bf16 on a CPU unless the plugin is given."""
    return ns.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))


@namespaces
@pytest.mark.parametrize("case", ["automatic", "fused", "manual"])
def test_loss_scaler_keeps_the_true_scale(ns, case):
    """Under 16-mixed, losses and gradient norms have the scale they have without it."""
    options = {"optimizer": torch.optim.AdamW, "lr": 1e-3, "fused": True} if case == "fused" else {}
    make = (lambda: manual(ns)) if case == "manual" else lambda: classifier(ns, **options)
    module = make()
    ours = fit(module, ns=ns, plugins=[half(ns, init_scale=1024.0)]).guard.history
    true = fit(make(), ns=ns).guard.history
    assert module.dtypes <= {torch.float16}
    np.testing.assert_allclose(ours.losses(), true.losses(), rtol=0.02)
    np.testing.assert_allclose(ours.last("grad_total", 16)[:, 0], true.last("grad_total", 16)[:, 0], rtol=0.1)
    assert (ours.fact("scaler") == 1.0).all()
    assert (ours.last("update_norm") > 0).all()
    np.testing.assert_allclose(ours.last("clip_coefficient"), 1.0, rtol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_overflows_while_the_scale_is_searched_are_no_finding(accumulate):
    """A scale that is too high overflows a few times at the start, which is the scaler's own business."""
    callback = fit(classifier(), plugins=[half(init_scale=2.0**25)], max_epochs=8, accumulate_grad_batches=accumulate)
    history = callback.guard.history
    skipped = ~np.isfinite(history.last("grad_norm")).all(axis=1)
    assert 3 <= skipped.sum() <= 8
    assert (history.fact("stepped")[skipped] == 0).all()
    assert worst(callback) == []


def test_lasting_overflow_is_found_under_accumulation():
    """Gradients that no scale makes finite are seen at every sampled update, whatever batch the sample was due at."""

    class Broken(type(classifier())):
        def on_after_backward(self):
            self.net[0].weight.grad[0, 0] = float("inf")

    callback = LossGuardCallback(dense=0, every=10, halt=None)
    fit(Broken(), callback=callback, plugins=[half()], max_epochs=8, accumulate_grad_batches=4)
    assert callback.guard.history.seen("grad_norm").all()
    assert "halt nonfinite_gradient" in worst(callback)


# ---- what it does


@namespaces
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_a_bad_batch_halts_the_fit(ns, kind):
    """A NaN in batch 9 ends trainer.fit with TrainingHalted, which carries the diagnosis and the step."""
    module = classifier(ns) if kind == "automatic" else manual(ns)
    callback = LossGuardCallback()
    with pytest.raises(TrainingHalted) as caught:
        fit(module, data=loader(poison=9), callback=callback, ns=ns)
    finding = caught.value.finding
    assert (finding.diagnosis, finding.step, finding.severity) == ("nonfinite_input", 9, Severity.HALT)
    assert callback.findings[0].diagnosis == "nonfinite_input"
    assert callback.guard.closed
    assert hooks_on(module, callback.guard.optimizers) == 0


@namespaces
def test_a_halt_names_the_last_good_checkpoint(ns, tmp_path):
    """The folder of a halt names the newest checkpoint that the Trainer wrote before the bad batch."""
    saver = ns.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
    guarding = LossGuardCallback(record=tmp_path / "record")
    with pytest.raises(TrainingHalted) as caught:
        trainer(guarding, saver, ns=ns, enable_checkpointing=True).fit(classifier(ns), loader(poison=8))
    told = json.loads((caught.value.folder / "state.json").read_text())["checkpoint"]
    assert told["after_steps"] == 6
    assert Path(told["path"]).exists()
    assert "step=6" in told["path"]


def test_a_late_finding_halts_before_the_fit_returns():
    """What is judged some steps late, as on an accelerator, is still raised when the bad batch is the last one."""
    with pytest.raises(TrainingHalted) as caught:
        fit(classifier(), data=loader(poison=15), callback=LossGuardCallback(lag=8))
    assert caught.value.finding.step == 15


def test_a_skipped_update_leaves_the_weights():
    """skip= works under Lightning: the update with NaN gradients is left out on the device."""

    class Poisoned(type(classifier())):
        def on_after_backward(self):
            if self.global_step == 5:
                self.net[0].weight.grad[0, 0] = float("nan")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    module = Poisoned()
    callback = fit(module, callback=LossGuardCallback(skip={"nonfinite_gradient"}))
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert worst(callback) == ["warning nonfinite_gradient"]


@pytest.mark.parametrize("kind", ["automatic", "manual", "gan", "accumulate"])
def test_training_is_bit_identical(kind):
    """Weights and random numbers are, bit for bit, those of a fit without the callback."""
    make = {"manual": lambda: manual(clip=0.1), "gan": GAN}.get(kind, classifier)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2} if kind == "accumulate" else {"max_epochs": 3}
    ends = []
    for callbacks in ([], [LossGuardCallback()]):
        module = make()
        torch.manual_seed(5)
        trainer(*callbacks, **options).fit(module, loader())
        ends.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["automatic", "manual"])
@pytest.mark.parametrize("how", ["end", "exception", "interrupt"])
def test_everything_comes_off(kind, how):
    """However the fit ends, no hook is left, and the module can be copied and pickled before and after."""
    base = type(classifier() if kind == "automatic" else manual())

    class Ends(base):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            copy.deepcopy(self.net)
            pickle.dumps(self.net)
            if batch_idx == 7 and how != "end":
                raise {"exception": OSError, "interrupt": KeyboardInterrupt}[how]

    module, callback = Ends(), LossGuardCallback()
    run = trainer(callback)
    with contextlib.suppress(OSError, SystemExit):  # an interrupt ends the process from 2.4 on, the fit before
        run.fit(module, loader())
    assert run.interrupted == (how != "end")
    assert callback.guard.closed
    assert hooks_on(module, callback.guard.optimizers) == 0
    assert "configure_gradient_clipping" not in vars(module)


def test_fit_called_again_continues():
    """A second fit of the same Trainer continues the history; a new Trainer begins anew."""
    callback, module = LossGuardCallback(), classifier()
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert (callback.guard.steps, callback.guard.history.step) == (32, 31)
    trainer(callback).fit(module, loader())
    assert callback.guard.steps == 16


def test_two_callbacks_need_two_names():
    """State keys come from names: two of one name are refused by the Trainer, of two names the second one watches."""
    assert LossGuardCallback().state_key != LossGuardCallback(name="other").state_key
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(LossGuardCallback(), LossGuardCallback())
    first, second = LossGuardCallback(), LossGuardCallback(name="other")
    trainer(first, second).fit(classifier(), loader())
    assert (first.guard.steps, second.guard.steps) == (0, 16)


def test_wrong_keywords_are_named():
    """A misspelt keyword is refused where it is written, a wrong value before the first step."""
    with pytest.raises(TypeError, match="did you mean 'every'"):
        LossGuardCallback(evry=3)
    with pytest.raises(TypeError, match="unknown keyword 'scaler'"):
        LossGuardCallback(scaler=None)
    with pytest.raises(ValueError, match="unknown diagnosis"):
        fit(classifier(), callback=LossGuardCallback(mute={"explodng_gradient"}))


# ---- checkpoints


@pytest.mark.parametrize("ns", [L, PL], ids=["lightning", "pytorch_lightning"])
def test_checkpoints_carry_the_history(ns, tmp_path):
    """A resumed fit has the history of an uninterrupted one; the checkpoint is readable without pickled code."""
    whole = fit(classifier(ns), ns=ns, max_epochs=2)
    first = LossGuardCallback()
    run = trainer(first, ns=ns)
    run.fit(classifier(ns), loader())
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["callbacks"][first.state_key]["steps"] == 16
    resumed = LossGuardCallback()
    trainer(resumed, ns=ns, max_epochs=2).fit(classifier(ns), loader(), ckpt_path=path)
    assert resumed.guard.steps == whole.guard.steps == 32
    for signal in ("grad_norm", "update_norm", "activation_rms"):
        np.testing.assert_array_equal(resumed.guard.history.last(signal), whole.guard.history.last(signal), err_msg=signal)
    np.testing.assert_array_equal(resumed.guard.history.losses(), whole.guard.history.losses())


def test_the_findings_of_a_checkpoint_stay():
    """What was found before a checkpoint is still told after the resumption."""
    ill = classifier(lr=30.0)
    first = fit(ill, max_epochs=2, callback=LossGuardCallback(halt=None))
    assert first.findings
    second = LossGuardCallback(halt=None)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["steps"] == 32
    fit(classifier(lr=1e-4), callback=second)
    assert [f.diagnosis for f in second.findings][: len(first.findings)] == [f.diagnosis for f in first.findings]


def test_a_state_that_does_not_fit_is_left_out():
    """The state of another model is one warning, and the fit goes on."""
    other = fit(GAN())
    callback = LossGuardCallback()
    callback.load_state_dict(other.state_dict())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit(classifier(), callback=callback)
    assert sum("begins anew" in str(w.message) for w in heard) == 1
    assert callback.guard.steps == 16


# ---- loggers


def columns(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    lines = next(folder.rglob("metrics.csv")).read_text().splitlines()
    names = lines[0].split(",")
    return names, [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]


def logged(ns, tmp_path, module=None, *, log_layers=False, data=None, **options):
    logger = ns.loggers.CSVLogger(tmp_path)
    callback = LossGuardCallback(log_layers=log_layers, halt=None)
    fit(module or classifier(ns), callback=callback, ns=ns, logger=logger, data=data, **options)
    names, rows = columns(tmp_path)
    return callback, [n for n in names if n.startswith("lossguard/")], [r for r in rows if r.get("lossguard/grad_norm")]


@namespaces
def test_at_most_twenty_scalars_are_logged(ns, tmp_path):
    """The loggers get at most 20 scalars, with the numbers and steps of the history, about every log_every_n_steps."""
    callback, names, rows = logged(ns, tmp_path, max_epochs=8, log_every_n_steps=20)
    assert 12 <= len(names) <= 20
    assert [int(r["step"]) for r in rows] == [0, 20, 40, 60, 80, 100, 120]
    totals = dict(zip(callback.guard.history.steps().tolist(), callback.guard.history.last("grad_total")[:, 0], strict=True))
    np.testing.assert_allclose([float(r["lossguard/grad_norm"]) for r in rows], [totals[int(r["step"])] for r in rows], rtol=1e-6)
    smallest, median, largest = (float(rows[0][f"lossguard/update_ratio_{which}"]) for which in ("smallest", "median", "largest"))
    assert 0 < smallest <= median <= largest


def test_layers_are_logged_on_demand(tmp_path):
    """log_layers gives a series for each parameter and module call."""
    _, names, _ = logged(L, tmp_path, log_layers=True)
    assert {"lossguard/update_ratio/net.0.weight", "lossguard/grad_norm/net.4.bias", "lossguard/activation_rms/net.1"} <= set(names)
    assert len(names) > 20


def test_scalars_stand_at_the_step_of_lightnings_own(tmp_path):
    """With accumulation and a late hand-over, a scalar is logged at the step at which self.log would have put it."""

    class Logs(type(classifier())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("own", float(batch_idx + 16 * self.current_epoch))
            return loss

    logger = L.loggers.CSVLogger(tmp_path)
    callback = LossGuardCallback(lag=8)
    fit(Logs(), callback=callback, logger=logger, accumulate_grad_batches=4, max_epochs=3, log_every_n_steps=1)
    _, rows = columns(tmp_path)
    ours = [int(r["step"]) for r in rows if r["lossguard/grad_norm"]]
    own = {int(float(r["own"])): int(r["step"]) for r in rows if r["own"]}
    sampled = [s for s in callback.guard.history.steps().tolist() if s in own]
    assert ours == sorted(ours)
    assert ours[:5] == [own[s] for s in sampled][:5]


def test_scalars_of_an_ill_run_do_not_fail(tmp_path):
    """NaN is logged as it is, and nothing is raised or warned."""
    _, names, rows = logged(L, tmp_path, data=loader(poison=3), log_every_n_steps=1)
    assert len(names) <= 20
    assert re.fullmatch("nan", rows[-1]["lossguard/grad_norm"])


def test_a_broken_logger_ends_no_run():
    """A logger that raises is one warning; training goes on without scalars."""

    class Broken(L.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(k.startswith("lossguard/") for k in metrics):
                raise OSError("disk full")

        def log_hyperparams(self, *args, **kwargs): ...
        def save(self): ...

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        callback = fit(classifier(), logger=Broken("unused"), log_every_n_steps=1)
    assert callback.guard.steps == 16
    assert sum("disk full" in str(w.message) for w in heard) == 1


# ---- packages


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120)


def test_without_a_trainer_package_the_import_says_what_to_install():
    """With neither package installed the integration names what to install; lossguard itself imports neither."""
    done = run("""
        import sys
        import lossguard
        assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
        for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
            sys.modules[name] = None
        try:
            import lossguard.integrations.lightning
        except ImportError as error:
            print(error)
    """)
    assert "pip install 'lightning>=2.2'" in done.stdout, done.stderr


@pytest.mark.parametrize(("have", "lack"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")])
def test_either_package_suffices(have, lack):
    """One package alone is enough, and the other is not imported; the callback need not stand in a list."""
    done = run("""
        import importlib, sys
        have, lack = sys.argv[1:]
        sys.modules[lack] = None
        from lossguard.integrations.lightning import LossGuardCallback
        L = importlib.import_module(have)
        L.Trainer(callbacks=LossGuardCallback(), logger=False, enable_checkpointing=False, accelerator="cpu")
        print("fine", [m for m in ("lightning.pytorch", "pytorch_lightning") if sys.modules.get(m)])
    """, have, lack)  # fmt: skip
    assert f"fine ['{have}']" in done.stdout, done.stderr


@namespaces
def test_with_both_packages_one_class_is_a_callback_of_either(ns):
    """Imported after both, the class derives from both, and pickles."""
    ns.Trainer(callbacks=LossGuardCallback(), logger=False, enable_checkpointing=False, accelerator="cpu")
    assert isinstance(LossGuardCallback(), ns.Callback)
    assert pickle.loads(pickle.dumps(LossGuardCallback(every=3)))._keywords == {"every": 3}
