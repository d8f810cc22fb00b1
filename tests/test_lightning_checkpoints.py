"""No checkpoint of an ill state takes the place of a good one under real Trainers, in both namespaces."""

from __future__ import annotations

import pytest
import torch
from test_lightning import PL, L, LossGuardCallback, classifier, loader, manual, trainer

from lossguard import TrainingHalted

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.filterwarnings("error::RuntimeWarning:lossguard")]
namespaces = pytest.mark.parametrize("ns", [L, PL], ids=["lightning", "pytorch_lightning"])


def sound(path) -> bool:
    return all(bool(t.isfinite().all()) for t in torch.load(path, weights_only=False)["state_dict"].values())


def poisoned(ns, base=None, at=7):
    """Its weights turn NaN in one batch while its loss and what it logs stay finite."""

    class Poisoned(base or type(classifier(ns))):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == at:
                with torch.no_grad():
                    self.spare[0] = float("nan")

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", -float(self.global_step))  # it always seems to get better

    module = Poisoned()
    module.spare = torch.nn.Parameter(torch.ones(2))
    return module


def files(folder):
    return sorted(p.name for p in folder.rglob("*.ckpt"))


def savers(ns, folder):
    return [
        ns.callbacks.ModelCheckpoint(folder / "last", save_last=True, save_top_k=1, every_n_train_steps=2),
        ns.callbacks.ModelCheckpoint(folder / "link", save_last="link", save_top_k=-1, every_n_train_steps=3),
        ns.callbacks.ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, save_last=True),
    ]


@namespaces
@pytest.mark.parametrize("first", [True, False], ids=["guard first", "guard last"])
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_good_files_survive(ns, first, kind, tmp_path):
    """With weights that turn NaN at step 7 every file that ModelCheckpoint leaves is of an earlier step: last, linked, and the best two."""
    guarding, some = LossGuardCallback(halt=None), savers(ns, tmp_path)
    callbacks = [guarding, *some] if first else [*some, guarding]
    base = type(classifier(ns)) if kind == "automatic" else type(manual(ns))
    run = trainer(*callbacks, ns=ns, enable_checkpointing=True, val_check_interval=3, limit_val_batches=1)
    run.fit(poisoned(ns, base), loader(), loader())
    assert run.global_step == 16
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert all(sound(path) for path in paths)
    steps = {str(p.relative_to(tmp_path)): torch.load(p, weights_only=False)["global_step"] for p in paths}
    assert steps["last/last.ckpt"] == steps["link/last.ckpt"] == steps["best/last.ckpt"] == 6
    assert sorted(s for name, s in steps.items() if name.startswith("best/") and "last" not in name) == [3, 6]
    assert sorted(s for name, s in steps.items() if name.startswith("link/") and "last" not in name) == [3, 6]
    assert guarding.guard.last_good.after_steps == 6


@namespaces
def test_a_healthy_run_saves_as_without_the_guard(ns, tmp_path):
    """The same files with the same weights, and the guard knows the newest."""
    for name, more in (("bare", []), ("watched", [LossGuardCallback()])):
        some = savers(ns, tmp_path / name)
        run = trainer(*more, *some, ns=ns, enable_checkpointing=True, val_check_interval=3, limit_val_batches=1)
        run.fit(classifier(ns), loader(), loader())
        assert "save_checkpoint" not in vars(run)
        assert all("_save_topk_checkpoint" not in vars(saver) and "_save_last_checkpoint" not in vars(saver) for saver in some)
    assert files(tmp_path / "bare") == files(tmp_path / "watched")
    for path in (tmp_path / "bare").rglob("*.ckpt"):
        twin = torch.load(tmp_path / "watched" / path.relative_to(tmp_path / "bare"), weights_only=False)["state_dict"]
        mine = torch.load(path, weights_only=False)["state_dict"]
        assert all(torch.equal(mine[k], twin[k]) for k in mine)
    assert more[0].guard.last_good.after_steps == 16


@namespaces
def test_a_save_after_the_halt_is_diverted(ns, tmp_path):
    """The checkpoint of OnExceptionCheckpoint and a save by hand in the except clause go beside the good file, not over it."""
    path = tmp_path / "last.ckpt"
    run = trainer(LossGuardCallback(), ns.callbacks.OnExceptionCheckpoint(tmp_path), ns=ns, enable_checkpointing=True)

    class Saves(type(classifier(ns))):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step <= 9:
                self.trainer.save_checkpoint(path)

    with pytest.raises(TrainingHalted):
        run.fit(Saves(), loader(poison=9))
    run.save_checkpoint(path)
    assert sound(path)
    assert torch.load(path, weights_only=False)["global_step"] == 9
    assert files(tmp_path) == ["last-bad.ckpt", "last.ckpt", "on_exception-bad.ckpt"]
    assert not sound(tmp_path / "last-bad.ckpt")
    run.fit(classifier(ns), loader())
    assert "save_checkpoint" not in vars(run)


@namespaces
def test_a_callback_that_rotates_in_its_own_way(ns, tmp_path):
    """A checkpoint callback of the user's own is diverted, and deletes no good file meanwhile."""

    class Own(ns.callbacks.Checkpoint):
        previous = None

        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            path = str(tmp_path / f"{run.global_step}.ckpt")
            run.save_checkpoint(path)
            if self.previous:
                run.strategy.remove_checkpoint(self.previous)
            self.previous = path

    trainer(Own(), LossGuardCallback(halt=None), ns=ns, enable_checkpointing=True).fit(poisoned(ns), loader())
    assert files(tmp_path)[-1] == "7.ckpt" if sound(tmp_path / files(tmp_path)[-1]) else True
    good = [name for name in files(tmp_path) if sound(tmp_path / name)]
    assert len(good) == 1
    assert all("bad" in name for name in files(tmp_path) if name not in good)
