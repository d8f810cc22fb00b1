"""What is left behind: the folder of a halt, its replay, and a record that survives kills, full disks and broken parts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lossguard import Guard, TrainingHalted, aftermath, replay
from lossguard.cli import main
from lossguard.sinks import findings, read

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(record, *, ill=7, steps=20, seed=0, batch=None, fault=None, checkpoints=(), **options):
    """A small run whose loss is NaN at one step; returns the halt, or None."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with Guard(model, optimizer, record=record, **options) as guard:
            for i in range(steps):
                x = torch.randn(8, 4)
                guard.batch(x if batch is None else batch(x))
                loss = model(x).square().mean() * (float("nan") if i == ill else 1.0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if i in checkpoints:
                    guard.saved(f"step-{i}.pt")
                if fault is not None:
                    fault(i, guard)
                guard.step(loss)
    except TrainingHalted as halt:
        return halt
    return None


def state_of(halt):
    return json.loads((halt.folder / "state.json").read_text())


# ---- the folder


def test_what_a_halt_leaves(tmp_path):
    """The folder holds verdict, state, the tape's tail and the random states; the halt names it; a healthy run leaves none."""
    halt = run(tmp_path, checkpoints=(2, 5, 7))
    assert halt.folder == tmp_path / "halt-7" / "rank0"
    assert sorted(p.name for p in halt.folder.iterdir()) == ["rng.pt", "state.json", "tape.npz"]
    state = state_of(halt)
    assert json.loads((tmp_path / "halt-7" / "verdict.json").read_text()) == state
    assert (state["step"], state["exit_code"], state["loss"], state["missing"]) == (7, 83, "NaN", {})
    assert state["lr"] == [[0.01]]
    assert state["checkpoint"] == {"after_steps": 7, "path": "step-7.pt"}
    assert state["batch"]["index"] == 7
    assert state["versions"]["torch"] == torch.__version__
    assert run(tmp_path / "healthy", ill=None) is None
    assert not list((tmp_path / "healthy").glob("halt-*"))


def test_the_tape_is_what_the_guard_saw(tmp_path):
    """The tail holds the newest losses and sampled rows as the history has them, with the names of their columns."""
    halt = run(tmp_path)
    tape = np.load(halt.folder / "tape.npz")
    losses = [x for line in read(tmp_path, "rows") if line["kind"] == "losses" for x in line["total"]]
    assert np.allclose(tape["losses"][:7], losses[:7], rtol=1e-5)
    assert np.isnan(tape["losses"][7])
    assert tape["parameters"].tolist() == ["weight", "bias"]
    assert tape["steps"].tolist() == list(range(8))
    assert np.isnan(tape["signal.grad_norm"][7]).all()
    assert np.isfinite(tape["signal.grad_norm"][:7]).all()


def test_a_checkpoint_from_after_the_fault_is_not_good(tmp_path):
    """The checkpoint named is the newest from before the finding's step, or none."""
    assert state_of(run(tmp_path / "a", checkpoints=()))["checkpoint"] is None
    assert state_of(run(tmp_path / "b", checkpoints=(2, 5, 7)))["checkpoint"] == {"after_steps": 7, "path": "step-7.pt"}
    assert state_of(run(tmp_path / "c", checkpoints=(8, 9), ill=7))["checkpoint"] is None


def test_the_first_of_many_writers_wins(tmp_path):
    """Of many processes that write at once one verdict stands, whole, and nobody's draft stays."""
    code = """
import sys, time
from pathlib import Path
from lossguard.aftermath import first_wins
folder = Path(sys.argv[1])
print("ready", flush=True)
while not (folder / "go").exists(): pass
print(int(first_wins(folder / "verdict.json", sys.argv[2] * 100_000)))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(k)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for k in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    won = [int(p.communicate(timeout=100)[0]) for p in processes]
    assert sum(won) == 1
    assert (tmp_path / "verdict.json").read_text() == str(won.index(1)) * 100_000
    assert {p.name for p in tmp_path.iterdir()} == {"go", "verdict.json"}


def test_no_secret_is_left_behind(tmp_path, monkeypatch):
    """Only variables of the allow-list are written, and none whose name speaks of a secret."""
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_AUTH_TOKEN", "HF_TOKEN", "PYTORCH_PASSWORD", "HOME"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    halt = run(tmp_path)
    assert state_of(halt)["environment"]["NCCL_DEBUG"] == "WARN"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]


def test_a_second_halt_keeps_the_first(tmp_path):
    """A run started again in the same folder leaves its halt beside the first, and replay takes the newest."""
    first, second = run(tmp_path), run(tmp_path)
    assert [h.folder.parent.name for h in (first, second)] == ["halt-7", "halt-7-2"]
    assert replay.load(tmp_path).folder == second.folder
    assert replay.load(tmp_path / "halt-7").folder == first.folder


def test_a_retry_that_brings_the_same_halt_is_the_last(tmp_path):
    """Rolling back may help once: the same diagnosis at the same step of a second start gives the code for no retry."""

    def spike(record):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with pytest.raises(TrainingHalted) as caught, Guard(model, optimizer, record=record, halt={"loss_spike"}) as guard:
            for i in range(200):
                loss = model(torch.randn(8, 4)).square().mean() * (1e4 if 150 <= i < 160 else 1.0)
                guard.step(loss)
        return caught.value

    assert [spike(tmp_path).exit_code, spike(tmp_path).exit_code] == [84, 83]
    assert spike(tmp_path / "another").exit_code == 84


# ---- the batch


def test_the_batch_is_kept_on_request(tmp_path):
    """With keep_batch the batch of the step lies there bit for bit, its storage not beyond its own elements, other objects as text."""
    kept = []

    def batch(x):
        kept.append(torch.cat([x, x])[:8])  # a view of a larger storage
        return {"x": kept[-1], "ids": [1, "a"], "odd": object}

    halt = run(tmp_path, batch=batch, keep_batch=True)
    inputs, targets = torch.load(halt.folder / "batch.pt", weights_only=True)
    assert targets is None
    assert torch.equal(inputs["x"], kept[7])
    assert inputs["x"].untyped_storage().nbytes() == 8 * 4 * 4
    assert inputs["ids"] == [1, "a"]
    assert inputs["odd"] == repr(object)
    assert state_of(halt)["batch"]["fingerprint"] == aftermath.fingerprint([kept[7]])


def test_kept_batches_are_counted_and_bounded(tmp_path):
    """The batches kept alive are part of the guard's memory, two on a CPU, and without keep_batch there are none."""

    def memory(keep):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        with Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), record=tmp_path, keep_batch=keep) as guard:
            for _ in range(20):
                guard.batch(torch.zeros(1000))
                guard.step(1.0)
            return guard.memory

    assert memory(True) - memory(False) == 2 * 4000


def test_a_batch_above_the_cap_is_named_not_kept(tmp_path):
    """A batch larger than the cap stays out, and the state says how to keep it."""
    halt = run(tmp_path, keep_batch=100)
    assert not (halt.folder / "batch.pt").exists()
    assert "128 bytes and the cap is 100; give keep_batch=128" in state_of(halt)["missing"]["batch.pt"]


def test_without_request_no_batch_is_held(tmp_path):
    """The guard holds no batch alive for its fingerprint."""
    import gc
    import weakref

    refs = []

    def fault(i, guard):
        gc.collect()
        assert sum(r() is not None for r in refs) <= 1

    def batch(x):
        x = x.clone()
        refs.append(weakref.ref(x))
        return x

    halt = run(tmp_path, batch=batch, fault=fault)
    assert state_of(halt)["batch"]["index"] == 7


def test_fingerprints_tell_batches_apart():
    """Equal bytes of one dtype and shape give one fingerprint; another bit, dtype or shape another; NaN and bfloat16 have one."""
    a = torch.arange(6, dtype=torch.float32)
    marks = [a, a.reshape(2, 3), a.double(), a + 1, a.bfloat16(), a * float("nan"), torch.tensor(1.0)]
    assert len({aftermath.fingerprint([t]) for t in marks}) == len(marks)
    assert aftermath.fingerprint([a.reshape(2, 3).t()]) == aftermath.fingerprint([a.reshape(2, 3).t().contiguous()])


@pytest.mark.parametrize("value", [-1, "yes", 0.5])
def test_caps_that_cannot_be(value):
    """keep_batch is a bool or a number of bytes, and needs a record."""
    with pytest.raises(ValueError, match="keep_batch must be True, False or a number of bytes"):
        run("x", keep_batch=value)
    with pytest.raises(ValueError, match="give record= as well"):
        run(None, keep_batch=True)


def test_random_states_come_back():
    """Setting the states gives the same numbers again in torch, numpy and python, after a way through a file too."""
    from lossguard import resume

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()

    np.random.randn()  # leaves a second number waiting
    states = resume.pack(aftermath.random_states())
    first = draw()
    aftermath.set_random_states(states)
    assert draw() == first


def test_keeping_changes_nothing(tmp_path):
    """A run with record and keep_batch has the same weights and random states as one without."""

    def final(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Guard(model, optimizer, **options) as guard:
            for _ in range(15):
                x = torch.randn(8, 4)
                guard.batch(x)
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
        return [p.tolist() for p in model.parameters()], torch.rand(2).tolist()

    assert final() == final(record=tmp_path, keep_batch=True)


# ---- replay

STEPS = """
import os, torch

def same(bundle):
    torch.manual_seed(bundle.step)
    model = torch.nn.Linear(4, 2)
    return {"loss": model(bundle.batch[0]).square().mean() * float("nan"), "noise": torch.rand(3)}

def finite(bundle):
    return bundle.batch[0].square().mean()

def different(bundle):
    return torch.tensor(float(os.getpid()))

def noise(bundle):
    return torch.rand(3)

def nothing(bundle):
    pass

def loose(bundle):
    import warnings
    warnings.warn("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True, warn_only=True)'")
    return torch.tensor(float(os.getpid()))
"""


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halted")
    (folder / "steps.py").write_text(STEPS)
    assert run(folder / "record", keep_batch=True)
    return folder


@pytest.mark.parametrize(
    ("step", "code", "words"),
    [
        ("same", 0, ["reproducible: two runs gave the same result (loss, noise)", "The run saw the loss nan, the replay gives nan", "not in the hardware"]),
        ("finite", 0, ["reproducible", "The fault did not come back"]),
        ("different", 1, ["NOT REPRODUCIBLE: 1 of 1 results differ", "Suspect the hardware"]),
        ("loose", 1, ["not reproducible", "proves nothing about the hardware", "put_ does not have a deterministic implementation"]),
    ],
)
def test_replay(halted, monkeypatch, capfd, step, code, words):
    """Two runs from one state: the same bits are a fault of the numbers, other bits are suspect hardware, unless the step's
    own operations are not deterministic."""
    monkeypatch.chdir(halted)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["replay", "record", "--step", f"steps:{step}"]) == code
    text = capfd.readouterr().out
    assert text.startswith("lossguard: replay of nonfinite_gradient at step 7, rank 0")
    for word in words:
        assert word in text
    assert ("Suspect the hardware" in text) == (step == "different")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("steps", "must be MODULE:FUNCTION"),
        ("nowhere:f", "there is no module nowhere"),
        ("steps:f", "steps has no function f"),
        ("steps:nothing", "returned nothing"),
    ],
)
def test_replay_wrong_use(halted, monkeypatch, tmp_path, step, words):
    """A step that cannot be called or gives nothing is answered in words."""
    monkeypatch.chdir(halted)
    monkeypatch.syspath_prepend(str(halted))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with pytest.raises(ValueError, match=words):
            replay.once(Path("record"), step, tmp_path / "out.pt")
    finally:
        torch.use_deterministic_algorithms(before)
    with pytest.raises(ValueError, match="no halt in"):
        replay.load(tmp_path)


# ---- faults of what is around us


def test_an_unwritable_folder_is_one_warning():
    """A record that cannot be opened is one warning, and training goes on to a halt that leaves nothing."""
    with pytest.warns(RuntimeWarning, match=r"the record failed.*training goes on") as caught:
        halt = run("/dev/null/run", keep_batch=True)
    assert len(caught) == 1
    assert halt.folder is None


def test_a_full_disk_at_the_start(tmp_path):
    """A record on a full disk is one warning."""
    for name in ("findings", "rows"):
        (tmp_path / f"{name}.jsonl").symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        assert run(tmp_path, ill=None) is None
    assert len(caught) == 1


FULL = """
import resource, sys, warnings, torch
sys.path.insert(0, sys.argv[2])
from test_aftermath import run
def fault(i, guard):
    if i == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    halt = run(sys.argv[1], ill=60, steps=80, fault=fault, keep_batch=True)
print(len([w for w in heard if w.category is RuntimeWarning]), halt.finding.step, halt.exit_code)
"""


@pytest.mark.parametrize(("room", "told", "heard"), [(6000, 1, ["nonfinite_gradient"]), (200, 2, [])])
def test_a_disk_that_fills_up(tmp_path, room, told, heard):
    """When the disk fills in the middle of a run, that is one warning for the record and one for what a halt cannot leave; the run
    goes on to its halt, and what was written is readable."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent), str(room)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split()[1:] == ["60", "83"], done.stderr
    assert int(done.stdout.split()[0]) == told
    rows = list(read(tmp_path, "rows"))
    assert rows[0]["kind"] == "header"
    assert [line["step"] for line in rows if line["kind"] == "sample"][:5] == list(range(5))
    assert [f.diagnosis for f in findings(tmp_path)] == heard


def test_a_halt_without_a_place_to_write(tmp_path):
    """A halt whose folder cannot be made is one warning, and the same halt."""

    def fault(i, guard):
        if i == 5:
            (tmp_path / "halt-7").write_text("in the way")

    with pytest.warns(RuntimeWarning, match=r"Aftermath.leave failed") as caught:
        halt = run(tmp_path, fault=fault)
    assert len(caught) == 1
    assert halt.exit_code == 83


def test_a_part_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """One part that fails (here the tape) is named in the state; the others are there."""
    monkeypatch.setattr(np, "savez_compressed", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    halt = run(tmp_path)
    assert state_of(halt)["missing"] == {"tape.npz": "OSError: disk full"}
    assert (halt.folder / "rng.pt").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_aftermath import run
def fault(i, guard):
    if i == 43:
        os.kill(os.getpid(), signal.SIGKILL)
run(sys.argv[1], ill=None, steps=80, dense=5, fault=fault)
"""


def test_kill_nine(tmp_path):
    """After kill -9 the record is readable up to the last block of losses, and the run continued on it stands behind a new header."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=120, check=False).returncode == -9
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"kind": "losses", "fir')  # as if it had been cut within a line
    losses = [line for line in read(tmp_path, "rows") if line["kind"] == "losses"]
    assert losses[-1]["first"] + len(losses[-1]["total"]) >= 40
    run(tmp_path, ill=None, steps=3)
    assert [line["kind"] for line in read(tmp_path, "findings")] == ["header", "header", "summary"]


LEFT_OPEN = """
import sys, torch
from lossguard import Guard
model = torch.nn.Linear(2, 1)
guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), record=sys.argv[1], dense=0)
for i in range(7):
    guard.step(torch.tensor(1.0 + i))
"""


def test_a_guard_left_open_is_flushed_at_exit(tmp_path):
    """A script that ends without closing its guard, or by an exception, leaves the losses up to the last step and the summary."""
    for tail, code in (("", 0), ("1 / 0", 1)):
        folder = tmp_path / str(code)
        done = subprocess.run([sys.executable, "-c", LEFT_OPEN + tail, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code
        assert [x for line in read(folder, "rows") if line["kind"] == "losses" for x in line["total"]] == [1.0 + i for i in range(7)]
        assert [line["kind"] for line in read(folder)] == ["header", "summary"]


def test_an_exception_in_a_hook_of_ours(tmp_path, monkeypatch):
    """A hook of ours that raises is one warning; training ends as without it, and the record is readable."""

    def fail(self, *args, **keywords):
        raise RuntimeError("our own fault")

    monkeypatch.setattr("lossguard.device.passes.Passes.module_called", fail)
    with pytest.warns(RuntimeWarning, match="our own fault") as caught:
        assert run(tmp_path, ill=None) is None
    assert len(caught) == 1
    assert sum(len(line["total"]) for line in read(tmp_path, "rows") if line["kind"] == "losses") == 20


def test_a_broken_sink_does_not_touch_the_record(tmp_path):
    """A sink that raises is one warning; the halt, the record and the folder come out as ever."""

    def broken(finding):
        raise ValueError("broken")

    with pytest.warns(RuntimeWarning, match="broken") as caught:
        halt = run(tmp_path, sinks=[broken])
    assert len(caught) == 1
    assert halt.folder.is_dir()
    assert [f.diagnosis for f in findings(tmp_path)] == ["nonfinite_gradient"]


def test_a_device_that_never_answers_does_not_hold_the_exit():
    """Closing with patience gives up on numbers that do not arrive, and detaches all the same."""

    class Never:
        def query(self):
            return False

        def synchronize(self):
            raise AssertionError("it waited")

    model = nn.Linear(2, 1)
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), lag=8)
    guard._handover.waiting.append((0, torch.zeros(1), Never(), ("validation", 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.close(patience=0.05)
    assert guard.closed
