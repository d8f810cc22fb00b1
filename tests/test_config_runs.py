"""Real runs that are configured from outside: a guard that is switched off, trainers, and scripts that nobody edits."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lossguard import Guard, cli
from lossguard.device import listening
from lossguard.host.history import History
from lossguard.launch import run
from lossguard.sinks import read

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No option from the environment of whoever runs the tests."""
    for name in [*os.environ]:
        if name.startswith("LOSSGUARD"):
            monkeypatch.delenv(name)


@pytest.fixture
def off(monkeypatch):
    monkeypatch.setenv("LOSSGUARD", "off")


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches(n=12, ill=None):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 8, generator=g) * (float("nan") if i == ill else 1.0), torch.randint(3, (16,), generator=g)) for i in range(n)]


def train(model, optimizer, guard=None, loader=None):
    loader = batches() if loader is None else loader
    for x, y in loader if guard is None else guard.batches(loader):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.step(loss)


def hooks(model, optimizer):
    """Whatever hangs on a model and its optimizer."""
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    gradients = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return own + gradients + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) + len(nn.modules.module._global_forward_hooks)


# ---- off


def ours():
    return {thread for thread in threading.enumerate() if thread.name.startswith("lossguard")}


@pytest.mark.parametrize("word", ["off", "0", "False", "no"])
def test_a_guard_that_is_switched_off_watches_nothing(monkeypatch, caplog, tmp_path, word):
    """With LOSSGUARD=off nothing is attached, recorded, halted, voted or kept; the run is the same bit for bit, and it is said once."""
    monkeypatch.setenv("LOSSGUARD", word)
    threads = ours()
    model, optimizer = network()
    with caplog.at_level(logging.INFO, "lossguard"):
        guard = Guard(model, optimizer, record=tmp_path / "run", halt="warning", stall=True, every=1, trackers=[print])
        assert hooks(model, optimizer) == 0
        with guard:
            train(model, optimizer, guard)
    plain, theirs = network()
    train(plain, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert caplog.messages == ["lossguard: switched off by LOSSGUARD=off, nothing is watched"]
    assert (guard.findings, guard.steps, guard.skipped, guard.verdict, guard.history.losses().size) == ([], 12, {}, "too early", 0)
    assert guard.coverage.not_observed == {"everything": "switched off by LOSSGUARD=off"}
    assert (guard.configured, repr(guard)) == ({"LOSSGUARD": "off"}, "<lossguard.Guard switched off by LOSSGUARD=off>")
    assert isinstance(guard, Guard)
    assert not guard._recorder.banks  # no memory on the model's device
    assert not (tmp_path / "run").exists()
    assert ours() == threads


def test_a_switched_off_guard_lets_a_sick_run_go_on(off):
    """What would halt goes on: whoever switches the guard off rules it out as a cause."""
    model, optimizer = network()
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, locate=lambda x, y: None, keep_batch=True) as guard:
        train(model, optimizer, guard, batches(ill=3))
    assert guard.steps == 12
    assert guard.safe_to_save()


def test_a_switched_off_guard_asks_no_other_rank(off):
    """Among several ranks a guard that is switched off makes no group, votes on nothing and has no thread: it cannot hang a job."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model, optimizer = network()
        with Guard(model, optimizer, agree=True, stall=True) as guard:
            train(model, optimizer, guard)
            assert guard.safe_to_save(together=True)
        assert (guard._agreement, guard._unison, guard._watchdog.on) == (None, None, False)
    finally:
        torch.distributed.destroy_process_group()


CALLS = {
    "step": lambda guard, path: guard.step(torch.tensor(1.0), logits=torch.zeros(2, 3)),
    "batches": lambda guard, path: list(guard.batches(batches(2))),
    "batch": lambda guard, path: guard.batch(torch.zeros(2), None),
    "validation": lambda guard, path: guard.validation(torch.tensor(1.0), accuracy=0.5),
    "flush": lambda guard, path: guard.flush(patience=1.0),
    "settle": lambda guard, path: guard.settle(),
    "note": lambda guard, path: guard.note("something"),
    "pause": lambda guard, path: guard.pause().__enter__(),
    "close": lambda guard, path: guard.close(),
    "report": lambda guard, path: guard.report(path / "page.html"),
    "state_dict": lambda guard, path: guard.state_dict(),
    "load_state_dict": lambda guard, path: guard.load_state_dict({"steps": 3, "batches": 3}),
    "abandon": lambda guard, path: guard.abandon(),
    "watch_forward": lambda guard, path: guard.watch_forward(True),
    "after_backward": lambda guard, path: guard.after_backward(unscaled=True),
    "before_update": lambda guard, path: guard.before_update(0),
    "after_update": lambda guard, path: guard.after_update(0),
    "saved": lambda guard, path: guard.saved(path / "a.pt"),
    "safe_to_save": lambda guard, path: guard.safe_to_save(),
    "saving": lambda guard, path: guard.saving(path / "b.pt").__enter__(),
    "veto": lambda guard, path: guard.veto(None, guard.safe_to_save()),
    "from_config": lambda guard, path: Guard.from_config(guard.model, guard.optimizers, {"trackers": {"csv": str(path / "run.csv")}}, every=3),
}


def test_all_calls_of_a_guard_are_known():
    """Each public method of a guard is among those that are tried on one that is switched off; a new one has to be."""
    methods = {name for name in dir(Guard) if not name.startswith("_") and callable(inspect.getattr_static(Guard, name, None))}
    methods |= {name for name in dir(Guard) if isinstance(inspect.getattr_static(Guard, name), classmethod)}
    assert {name for name in methods if not name.startswith("_")} == set(CALLS)


@pytest.mark.filterwarnings("ignore:this model was watched")
@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_harmless(off, tmp_path, name):
    """Whatever is called on a guard that is switched off, nothing comes on, nothing is written and nothing is raised."""
    model, optimizer = network()
    guard = Guard(model, optimizer)
    CALLS[name](guard, tmp_path)
    train(model, optimizer, guard, batches(2))
    assert hooks(model, optimizer) == 0
    assert list(tmp_path.iterdir()) == []
    assert guard.findings == []


@pytest.mark.filterwarnings("ignore:this model was watched")
def test_what_an_earlier_run_knew_outlives_a_run_without_the_guard(monkeypatch):
    """A checkpoint goes through a run that is switched off unchanged but for its steps, and is taken by a guard that watches again."""
    model, optimizer = network()
    with Guard(model, optimizer) as guard:
        train(model, optimizer, guard)
        state = guard.state_dict()
    monkeypatch.setenv("LOSSGUARD", "off")
    with Guard(model, optimizer) as guard:
        guard.load_state_dict(state)
        train(model, optimizer, guard)
        state = guard.state_dict()
    monkeypatch.setenv("LOSSGUARD", "on")
    with Guard(model, optimizer) as guard:
        guard.load_state_dict(state)
        assert (guard.steps, guard.history.losses().size) == (24, 12)
        train(model, optimizer, guard)
    monkeypatch.setenv("LOSSGUARD", "off")
    fresh = Guard(model, optimizer)
    train(model, optimizer, fresh)
    monkeypatch.delenv("LOSSGUARD")
    with Guard(model, optimizer) as guard:
        guard.load_state_dict(fresh.state_dict())  # of a run that never was watched
        train(model, optimizer, guard)
        assert (guard.steps, isinstance(guard.history, History)) == (24, True)


def test_a_subclass_is_switched_off_too(off):
    """A guard of one's own, with arguments of its own, is still itself when it is switched off."""

    class Mine(Guard):
        def __init__(self, model, optimizer, colour, **keywords):
            super().__init__(model, optimizer, **keywords)
            self.colour = colour

    model, optimizer = network()
    guard = Mine(model, optimizer, "red", every=3)
    train(model, optimizer, guard)
    assert (guard.colour, guard.steps, isinstance(guard, Mine), hooks(model, optimizer)) == ("red", 12, True, 0)


def test_wrong_calls_stay_wrong_when_off(off, monkeypatch):
    """A switched-off guard hides no wrong call, and a word that is neither on nor off is no switch."""
    model, optimizer = network()
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        Guard(model, optimizer, evry=3)
    with pytest.raises(ValueError, match=r"expected a torch.nn.Module"):
        Guard(optimizer, model)
    with Guard(model=model, optimizers=optimizer, every=3) as guard:
        assert guard.model is model
    monkeypatch.setenv("LOSSGUARD", "offf")
    with pytest.raises(ValueError, match=r"LOSSGUARD must be 'on' or 'off', got 'offf'; unset it"):
        Guard(model, optimizer)


def test_a_switched_off_guard_is_forgotten(off):
    """Nothing holds a guard that is switched off: it goes with its last reference."""
    known = weakref.ref(Guard(*network()))
    gc.collect()
    assert known() is None
    assert not [one for one in listening._listeners.values() if one() is not None]


# ---- under a trainer


def lightning_module():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()[0]

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    return Module()


def fit(callback, folder):
    import lightning.pytorch as pl

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", default_root_dir=folder, **options)
    module = lightning_module()
    trainer.fit(module, torch.utils.data.DataLoader([(x[0], y[0]) for x, y in batches(64)], batch_size=8))
    return trainer, module


def test_the_environment_reaches_a_trainers_callback_once(monkeypatch, tmp_path, caplog):
    """Under Lightning variables and file go before the callback's keywords; what adds up is added once, and the Trainer's own answers hold."""
    pytest.importorskip("lightning.pytorch")
    from lossguard.integrations.lightning import LossGuardCallback

    (tmp_path / "run.toml").write_text(f"[recover]\nrollbacks = 1\n[trackers]\ncsv = '{tmp_path}/run.csv'\n[rules.loss_spike]\nsigmas = 9.0\n")
    monkeypatch.setenv("LOSSGUARD_CONFIG", str(tmp_path / "run.toml"))
    monkeypatch.setenv("LOSSGUARD_EVERY", "2")
    monkeypatch.setenv("LOSSGUARD_RECORD", str(tmp_path / "record"))
    callback = LossGuardCallback(every=5, dense=0)
    with caplog.at_level(logging.INFO, "lossguard"):
        trainer, _ = fit(callback, tmp_path)
    guard = callback.guard
    assert (guard.every, guard.dense, guard.steps, guard._explicit) == (2, 0, 8, True)
    assert [m for m in caplog.messages if "every" in m] == ["lossguard: every = 2 by LOSSGUARD_EVERY, in the place of 5"]
    assert guard.recovery.ladder.rollbacks == 1
    assert guard.recovery.state.also == tuple(c.scheduler for c in trainer.lr_scheduler_configs)
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 1 + 4
    (summary,) = (line for line in read(tmp_path / "record") if line["kind"] == "summary")
    assert set(summary["facts"]["configured"]) == {"every", "record", "recover", "trackers", "rules"}


def test_a_trainers_callback_is_switched_off(off, tmp_path):
    """Under Lightning a guard that is switched off leaves the fit alone: same weights, nothing attached, no veto."""
    pytest.importorskip("lightning.pytorch")
    import lightning.pytorch as pl

    from lossguard.integrations.lightning import LossGuardCallback

    callback = LossGuardCallback(every=1, halt="warning")
    torch.manual_seed(1)
    _, module = fit(callback, tmp_path)
    torch.manual_seed(1)
    _, plain = fit(pl.Callback(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert (callback.findings, callback.guard.closed) == ([], True)
    assert callback.state_dict()["steps"] == 0


# ---- scripts that nobody edits

SCRIPT = """
    import json, sys, torch
    from lossguard import Guard, cli

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, every=5, halt=None) as guard:
        for i in range(20):
            loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if i == 9 else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    print(json.dumps({"steps": guard.steps, "every": guard.every, "configured": guard.configured, "given": sys.argv[1:], "found": len(guard.findings)}))
"""


def script(folder, *command, **variables):
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    plain = {k: v for k, v in os.environ.items() if not k.startswith("LOSSGUARD")}
    environment = {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_job_is_configured_by_its_environment(tmp_path):
    """A script that would go on is made to halt, and to leave a record, by variables alone."""
    done = script(tmp_path, "script.py", LOSSGUARD_HALT="nonfinite_gradient,nonfinite_loss", LOSSGUARD_RECORD="run", LOSSGUARD_EVERY="2")
    assert done.returncode == 1
    assert "TrainingHalted" in done.stderr
    (summary,) = (line for line in read(tmp_path / "run") if line["kind"] == "summary")
    assert summary["facts"]["configured"] == {
        "every": "2 (LOSSGUARD_EVERY)",
        "halt": '["nonfinite_gradient", "nonfinite_loss"] (LOSSGUARD_HALT)',
        "record": '"run" (LOSSGUARD_RECORD)',
    }
    assert (tmp_path / "run").joinpath("halt-9").exists() or list((tmp_path / "run").glob("halt-*"))


def test_run_with_a_file_of_options(tmp_path):
    """``run --config`` sets the file for the script's guards, whatever was named before, and a variable goes before it."""
    (tmp_path / "options").mkdir()
    (tmp_path / "options" / "run.toml").write_text("[lossguard]\nhalt = ['nonfinite_gradient']\nevery = 3\nexit_codes = { nonfinite_gradient = 9 }\n")
    (tmp_path / "mild.toml").write_text("every = 4\n")
    command = ("-m", "lossguard", "run")
    halted = script(tmp_path, *command, "--config", "options/run.toml", "script.py", "--config", "theirs", LOSSGUARD_CONFIG="nowhere.toml", LOSSGUARD_EVERY="2")
    assert halted.returncode == 9, halted.stderr
    mild = script(tmp_path, *command, "--config=mild.toml", "script.py", "--config", "theirs")
    assert mild.returncode == 0, mild.stderr
    told = json.loads(mild.stdout)
    assert told == {
        "steps": 20, "every": 4, "configured": {"every": f"4 (every in {tmp_path / 'mild.toml'})"}, "given": ["--config", "theirs"], "found": told["found"],
    }  # fmt: skip


def test_run_with_a_file_that_is_not_there(tmp_path, capsys):
    """Nothing is started where the options cannot be read, and the environment is left as it was."""
    assert run.main(["--config", str(tmp_path / "no.toml"), "script.py"]) == 2
    assert capsys.readouterr().err.startswith(f"lossguard: no options can be read from {tmp_path / 'no.toml'} (No such file or directory)")
    assert "LOSSGUARD_CONFIG" not in os.environ


def test_the_command_prints_files_that_can_be_used(tmp_path, capsys):
    """``python -m lossguard config`` prints what ``Guard.from_config`` reads: all options, a rule's fields, those of a table."""
    text = ""
    for name in ((), ("loss_spike",), ("recover",), ("skip",)):
        assert cli.main(["config", *name]) == 0
        text += capsys.readouterr().out
    for old, new in (("# every = 10\n", "every = 7\n"), ("# sigmas = 8.0", "sigmas = 9.0"), ("# factor = 0.5", "factor = 0.1")):
        assert text.count(old) == 1, (old, text)
        text = text.replace(old, new)
    (tmp_path / "run.toml").write_text(text)
    model, optimizer = network()
    with Guard.from_config(model, optimizer, tmp_path / "run.toml", skip=()) as guard:
        assert (guard.every, guard.recovery.ladder.factor) == (7, 0.1)
        assert next(rule for rule in guard._judge.rules if rule.diagnosis == "loss_spike").sigmas == 9.0
    assert cli.main(["config", "dead_rlu"]) == 2
    assert "unknown table 'dead_rlu' in the options; did you mean 'dead_relu'?" in capsys.readouterr().err
