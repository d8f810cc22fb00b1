"""Manners towards launchers: codes, error file, last words, signals, and a script that runs as python would run it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lossguard import Finding, Guard, Severity, TrainingHalted, exits
from lossguard.findings import DIAGNOSES
from lossguard.launch import exit_on_halt, signals, tell
from lossguard.sinks import read

ROOT = Path(__file__).parent.parent
VARIABLES = ("TORCHELASTIC_ERROR_FILE", "LOSSGUARD_TERMINATION_LOG", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in VARIABLES}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

TRAIN = """
    import sys, time, torch
    from lossguard import Guard

    def train(record, ill=None, steps=20, pause=0.0, **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Guard(model, optimizer, record=record, **options) as guard:
            for i in range(steps):
                loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if i == ill else 1.0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
                if i == 12:
                    print("under way", flush=True)
                time.sleep(pause if i > 12 else 0)
"""


@pytest.fixture
def work(tmp_path):
    """A folder with the training code above as a module."""
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    return tmp_path


def script(folder, text, name="script.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return name


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def python(folder, *arguments, **variables):
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env={**ENVIRONMENT, **variables}, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def a_halt(diagnosis="nonfinite_loss", message="the loss is NaN", **keywords):
    return TrainingHalted(Finding(diagnosis, Severity.HALT, 7, "loss", message), **keywords)


# ---- codes


def test_every_diagnosis_has_a_code():
    """The table names a code for every diagnosis, and only the two that are documented; what may pass is rolled back."""
    assert set(exits.CODES) == set(DIAGNOSES)
    assert set(exits.CODES.values()) == {83, 84}
    assert {name for name, code in exits.CODES.items() if code == 84} == {"loss_spike", "diverging_loss", "exploding_gradient"}
    assert a_halt("loss_spike").exit_code == 84
    assert a_halt("a_rule_of_mine").exit_code == 83
    assert a_halt("loss_spike", codes={"loss_spike": 9}).exit_code == 9


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({"los_spike": 9}, r"unknown diagnosis 'los_spike' in exit_codes=; did you mean 'loss_spike'"),
        ({"loss_spike": 0}, r"from 1 to 255 \(0 would pass for success\), got 0"),
        ({"loss_spike": 256}, r"got 256"),
        ({"loss_spike": True}, r"got True"),
        ({"loss_spike": "83"}, r"got '83'"),
    ],
)
def test_codes_that_would_hide_a_halt_are_refused(codes, words):
    """A code of one's own belongs to a known diagnosis and is one that a process can end with, but not success."""
    with pytest.raises(ValueError, match=words):
        exits.check_codes(codes)


def test_a_chosen_code_reaches_the_halt():
    """Guard(exit_codes=) sets the code of its halts."""
    model = torch.nn.Linear(2, 1)
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), halt={"nonfinite_loss"}, exit_codes={"nonfinite_loss": 11})
    with pytest.raises(TrainingHalted) as caught, guard:
        guard.step(float("nan"))
    assert caught.value.exit_code == 11


# ---- what launchers hear


def test_the_last_line_has_the_words_that_classifiers_look_for():
    """A halt by non-finite numbers says 'non-finite', a NaN loss 'loss: nan'; other halts say neither."""
    assert "(non-finite, loss: nan)" in tell.summary(a_halt())
    assert "(non-finite)" in tell.summary(a_halt("nonfinite_gradient", "3 parameters"))
    other = tell.summary(a_halt("loss_spike", "9 times its median"))
    assert "non-finite" not in other
    assert "nan" not in other
    assert other.endswith("exit code 84: roll back and retry may help")


def test_the_error_file_is_what_torchrun_reads(tmp_path, monkeypatch):
    """torch's own reader finds message, time and code in the error file, and the finding stands in it for programs."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell.error_file(a_halt())
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=83, error_file=str(path))
    assert failure.timestamp > 0
    message = json.loads(path.read_text())["message"]
    assert message["errorCode"] == 83
    assert "nonfinite_loss" in message["message"]
    assert Finding.from_dict(message["extraInfo"]["lossguard"]["finding"]) == a_halt().finding


def test_the_termination_message_fits_and_the_first_one_stays(tmp_path):
    """The message has at most 4096 bytes of whole characters, and a second process of the pod does not replace it."""
    path = tmp_path / "log"
    tell.termination_message(a_halt(message="é" * 5000), path)
    written = path.read_bytes()
    assert 4000 < len(written) <= 4096
    assert written.decode().startswith("lossguard: halted: nonfinite_loss")
    tell.termination_message(a_halt("loss_spike"), path)
    assert path.read_bytes() == written


def test_nothing_is_created_where_there_is_no_pod(tmp_path, monkeypatch):
    """Without the kubelet's file and without a path of the user's nothing is written."""
    monkeypatch.delenv("LOSSGUARD_TERMINATION_LOG", raising=False)
    monkeypatch.setattr(tell, "TERMINATION_LOG", tmp_path / "termination-log")
    tell.termination_message(a_halt())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_warning(tmp_path, monkeypatch, capsys):
    """Paths that cannot be written give one warning each, the rest is told all the same, and a halt is told once."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/null/x")
    halt = a_halt()
    with pytest.warns(RuntimeWarning, match="could not be written") as caught:
        tell.everyone(halt, "/dev/null/y")
        tell.everyone(halt, "/dev/null/y")
    assert len(caught) == 2
    assert capsys.readouterr().err.count("lossguard: halted") == 1


# ---- exit_on_halt


def test_everything_is_put_back():
    """After close() excepthook and handlers are those from before; a handler that somebody set meanwhile stays."""
    before = sys.excepthook, signal.getsignal(signal.SIGTERM)
    with exit_on_halt() as manners:
        assert exit_on_halt() is manners
        assert sys.excepthook is not before[0]
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (sys.excepthook, signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
    later = lambda number, frame: None  # noqa: E731
    with exit_on_halt():
        signal.signal(signal.SIGTERM, later)
    assert signal.getsignal(signal.SIGTERM) is later
    signal.signal(signal.SIGTERM, before[1])


def test_an_event_loops_wakeup_stays():
    """Where an event loop listens for signals already, it goes on listening."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        try:
            with exit_on_halt():
                pass
        finally:
            assert signal.set_wakeup_fd(-1) == theirs.fileno()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("train.train(None, ill=7)", 1, "TrainingHalted: lossguard: halt"),
        ("exit_on_halt(); train.train(None, ill=7)", 83, "exit code 83: a retry will not help\n"),
        ("exit_on_halt(); train.train(None, ill=7, exit_codes={'nonfinite_gradient': 9})", 9, "exit code 9: a code of your own\n"),
        ("exit_on_halt(); 1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_halt_gives_its_code_only_when_asked(work, text, code, words):
    """A plain script ends with 1 as ever; one that called exit_on_halt ends with the halt's code; other errors are untouched."""
    name = script(work, f"import train\nfrom lossguard.launch import exit_on_halt\n{text}\n")
    done = python(work, name)
    assert done.returncode == code, done.stderr
    assert words in done.stderr


# ---- run


IDENTITY = """
    import json, os, sys, pickle
    class Thing: pass
    main = sys.modules["__main__"]
    def shown(k, v):
        return type(v).__name__ if k in ("__builtins__", "__loader__") else v.name if k == "__spec__" and v else repr(v)
    known = {k: shown(k, v) for k, v in vars(main).items() if k.startswith("__")}
    pickle.loads(pickle.dumps(Thing()))
    facts = dict(known=known, argv=sys.argv, path=sys.path, own=vars(main) is globals(), flags=repr(sys.flags))
    open(os.environ["OUT"], "w").write(json.dumps(facts, sort_keys=True, indent=1))
    import atexit; atexit.register(lambda: open(os.environ["OUT"], "a").write(str(sys.modules["__main__"] is main)))
    sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["script", "module", "folder"])
def test_a_script_is_run_as_python_runs_it(work, kind):
    """sys.argv, sys.path, __main__ and the exit code are those of plain python, for a script, a module and a folder."""
    (work / "package").mkdir()
    script(work, IDENTITY, "package/__main__.py")
    plain = {"script": ["./package/__main__.py"], "module": ["-m", "package"], "folder": ["package"]}[kind]
    ours = ["--module", "package"] if kind == "module" else plain
    theirs = ["--lr", "5", "--", "--module", "-x"]
    codes = [python(work, *plain, *theirs, OUT="a").returncode, python(work, "-m", "lossguard", "run", *ours, *theirs, OUT="b").returncode]
    assert codes == [7, 7]
    assert (work / "a").read_text() == (work / "b").read_text()
    assert (work / "a").read_text().endswith("True")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("raise SystemExit('so be it')", 1, "so be it"),
        ("raise KeyError('theirs')", 1, "KeyError: 'theirs'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_other_ends_pass_through(work, text, code, words):
    """A message for SystemExit, an exception and a signal end the process as they end python."""
    done = python(work, "-m", "lossguard", "run", script(work, text))
    assert done.returncode == code
    assert words in done.stderr
    assert "lossguard: halted" not in done.stderr


def test_a_halt_under_run(work):
    """An unchanged script that halts ends with 83, tells the error file and the pod, shows its own traceback, and speaks last."""
    name = script(work, "import sys, train\nsys.excepthook = lambda *a: sys.stderr.write('their hook\\n')\ntrain.train('record', ill=7)\n")
    done = python(work, "-m", "lossguard", "run", name, TORCHELASTIC_ERROR_FILE="error.json", LOSSGUARD_TERMINATION_LOG="pod")
    assert done.returncode == 83
    assert "their hook" in done.stderr
    assert re.fullmatch(r"lossguard: halted: nonfinite_gradient at step 7 .*left behind in record/halt-7/rank0", done.stderr.splitlines()[-1])
    assert json.loads((work / "error.json").read_text())["message"]["errorCode"] == 83
    assert (work / "pod").read_text().startswith("lossguard: halted: nonfinite_gradient")


def test_a_script_that_is_not_there(work):
    """A missing script is told in python's own words, with python's own code."""
    done, plain = python(work, "-m", "lossguard", "run", "nowhere.py"), python(work, "nowhere.py")
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)


# ---- torchrun


def readme(mark, language):
    """The block behind a mark of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {mark} -->\n```{language}\n(.*?)```", text, re.DOTALL).group(1)


def test_under_torchrun(work):
    """The README's command with two ranks: torchrun shows the code, each rank leaves its part, one verdict stands for both, and
    the launch command ends with the code that torchrun loses."""
    text = "import train\nimport torch.distributed as dist\ndist.init_process_group('gloo')\ntrain.train('record', ill=7)\n"
    script(work, text, "work.py")
    command = readme("torchrun", "bash").replace("train.py", "work.py")
    done = python(work, "-c", "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])", command, PATH=PATH)
    assert done.returncode == 83, done.stderr
    assert "exitcode  : 83" in done.stderr
    assert "exitcode  : -15" not in done.stderr  # a rank that torchrun ends on its way out keeps its code
    halt = work / "record" / "halt-7"
    assert sorted(p.name for p in halt.iterdir()) == ["attempt", "rank0", "rank1", "verdict.json"]
    assert json.loads((halt / "verdict.json").read_text())["world"] == 2
    for folder in (work / "record", work / "record" / "rank1"):
        assert [line["diagnosis"] for line in read(folder) if line["kind"] == "finding"] == ["nonfinite_gradient"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, None, False),
        (1, None, False),
        (exits.NO_RETRY, None, False),
        (exits.ROLL_BACK, None, True),
        (exits.ROLL_BACK, "2", True),
        (exits.ROLL_BACK, "3", False),
    ],
)
def test_the_slurm_script(tmp_path, code, restarts, requeued):
    """The README's batch script requeues on the code for rolling back, three times at most, and passes every code on."""
    for name, text in (("python", f"exit {code}"), ("scontrol", 'echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
    done = subprocess.run(["bash", "-c", readme("slurm", "bash")], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_the_kubernetes_job():
    """The README's Job names our two codes, fails on the one and counts the other, for its own container, whose pods never restart."""
    import yaml

    job = yaml.safe_load(readme("kubernetes", "yaml"))["spec"]
    pod = job["template"]["spec"]
    rules = {rule["action"]: rule.get("onExitCodes") for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["values"] == [exits.NO_RETRY]
    assert rules["Count"]["values"] == [exits.ROLL_BACK]
    assert {rules[action]["containerName"] for action in ("FailJob", "Count")} == {pod["containers"][0]["name"]}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["containers"][0]["command"][:5] == ["python", "-m", "lossguard", "launch", "--"]


@pytest.mark.parametrize(
    ("command", "code"),
    [(["-c", "raise SystemExit(5)"], 5), (["-c", "pass"], 0), (["-c", "import os; os.kill(os.getpid(), 9)"], 137)],
)
def test_launch_keeps_other_codes(work, command, code):
    """Without a halt the launcher's own code is kept; a stale error file of an earlier run says nothing."""
    (work / "old.json").write_text(json.dumps({"message": {"message": "x", "errorCode": 83, "extraInfo": {"lossguard": {"exit_code": 83}}}}))
    done = python(work, "-m", "lossguard", "launch", "--", sys.executable, *command, TORCHELASTIC_ERROR_FILE="old.json")
    assert done.returncode == code


def test_launch_without_a_command_or_with_an_unknown_one(work):
    """Wrong use is answered as shells do."""
    assert python(work, "-m", "lossguard", "launch").returncode == 2
    done = python(work, "-m", "lossguard", "launch", "--", "no-such-launcher")
    assert done.returncode == 127
    assert "cannot run 'no-such-launcher'" in done.stderr


# ---- signals


def start(folder, *arguments):
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "under way" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


def recorded(folder):
    """The last step whose loss is in the record."""
    return max(line["first"] + len(line["total"]) - 1 for line in read(folder, "rows") if line["kind"] == "losses")


def test_sigterm_flushes_and_still_kills(work):
    """Preemption: the losses up to the last step are on disk, the event is noted, and the process dies of the signal."""
    name = script(work, "import train\ntrain.train('record', steps=10**6, dense=3, pause=1.0)\n")
    process = start(work, "-m", "lossguard", "run", name)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert recorded(work / "record") >= 13  # the block of losses that was under way; without the flush the last is 10
    assert [line["what"] for line in read(work / "record") if line["kind"] == "event"] == ["signal SIGTERM"]


def test_a_halt_that_is_ended_keeps_its_code(work):
    """A rank that has halted and is still ending (here: at exit) when its launcher sends SIGTERM ends with the halt's code."""
    text = """
        import atexit, time, train
        from lossguard.launch import exit_on_halt
        exit_on_halt()
        atexit.register(lambda: (print("under way", flush=True), time.sleep(30)))
        train.train(None, ill=7)
    """
    process = start(work, script(work, text))
    process.terminate()
    assert process.wait(20) == 83


def test_a_teardown_that_hangs_is_ended(work):
    """Where processes train together, a halt whose teardown hangs (here: at exit) ends with its code after ``linger``."""
    text = """
        import atexit, time, train
        import torch.distributed as dist
        from lossguard.launch import exit_on_halt
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        exit_on_halt(linger=0.2)
        atexit.register(time.sleep, 60)
        train.train(None, ill=7)
    """
    began = time.monotonic()
    assert python(work, script(work, text)).returncode == 83
    assert time.monotonic() - began < 50


def test_sigterm_reaches_the_handler_that_was_there(work):
    """A handler set before ours is called after the flush, and its SystemExit ends the process with its code."""
    text = """
        import signal, sys, train
        from lossguard.launch import exit_on_halt
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(21))
        exit_on_halt()
        train.train('record', steps=10**6, dense=3, pause=1.0)
    """
    process = start(work, script(work, text))
    time.sleep(0.3)
    process.terminate()
    assert process.wait(60) == 21
    kinds = [line["kind"] for line in read(work / "record")]
    assert kinds == ["header", "event", "summary"]


def test_a_handler_set_later_decides(work):
    """A handler that was set after ours and calls it (Lightning's, which ends at the next batch) still decides what happens:
    the records are flushed and nothing is killed."""
    text = """
        import signal, train
        from lossguard.launch import exit_on_halt, signals
        signals.STUCK = 0.2
        exit_on_halt()
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: before(number, frame))
        train.train('record', steps=15, dense=3, pause=1.0)
        print("ended by itself")
    """
    process = start(work, script(work, text))
    process.terminate()
    assert process.communicate(timeout=60)[0] == "ended by itself\n"
    assert process.returncode == 0
    assert [line["kind"] for line in read(work / "record")] == ["header", "event", "summary"]


def test_a_process_stuck_outside_python_dies_all_the_same(work):
    """A main thread that is stuck in a C call (a collective whose peers are gone) does not outlive SIGTERM."""
    text = """
        import ctypes
        from lossguard.launch import exit_on_halt, signals
        signals.STUCK = 0.5
        exit_on_halt()
        print("under way", flush=True)
        ctypes.CDLL(None).system(b"sleep 30")  # waits for its child, and goes on waiting after a signal
    """
    process = start(work, script(work, text))
    time.sleep(0.5)
    began = time.monotonic()
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert time.monotonic() - began < 15


def test_a_forked_child_keeps_its_own_ways(work):
    """A forked worker that gets SIGTERM dies of it at once, writes nothing to its parent's record, and leaves the parent alone."""
    text = """
        import os, signal, time, train
        from lossguard.launch import exit_on_halt, signals
        signals.STUCK = 0.3
        exit_on_halt()
        import torch
        from lossguard import Guard
        model = torch.nn.Linear(2, 1)
        guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), record="record")
        guard.step(1.0)
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(1.0)
        guard.close()
    """
    done = python(work, script(work, text))
    assert done.returncode == 0, done.stderr
    assert [line["kind"] for line in read(work / "record")] == ["header", "summary"]


def test_a_signal_inside_the_guard_waits_for_it(tmp_path):
    """A signal that comes while the guard is at work is seen as such; one that comes in the loop or the loader is not."""
    frames = {}
    model = torch.nn.Linear(2, 1)

    def sink(finding):
        frames["guard"] = signals._inside(sys._getframe())

    def loader():
        frames["loader"] = signals._inside(sys._getframe())
        yield torch.ones(2), None

    with Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[sink], halt=None) as guard:
        for _ in guard.batches(loader()):
            guard.step(float("nan"))
    assert frames == {"guard": True, "loader": False}
