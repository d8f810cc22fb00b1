"""Every file in examples/ is executed, healthy and ill. A new one needs a line here: what it takes, and what its ill run must find."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

from lossguard.device.signals import SIGNALS
from lossguard.rules import RULES
from lossguard.rules.rule import unregister

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHER = ("TORCHELASTIC_ERROR_FILE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HEARD = re.compile(r"^lossguard: (\w+) (\w+) (?:at step|before the first step)", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """found: the diagnosis that its ill run prints first. says: patterns in what the healthy, and what the ill run prints."""

    found: str
    says: tuple[str, str] = ("no findings", "")
    ill: tuple[str, ...] = ("--ill",)
    needs: tuple[str, ...] = ("sklearn",)  # one of these is enough where they are joined by a bar
    ranks: bool = False  # started by torchrun
    code: int = 0  # of the ill run


EXPECTED = {
    "accelerate_loop.py": Example("nonfinite_input", (r"accuracy 0\.9[\s\S]*no findings", "halted at step"), needs=("sklearn", "accelerate")),
    "custom_rule.py": Example("one_class", (r"accuracy 0\.[89]", r"silence +Guard\(mute=")),
    "ddp.py": Example(
        "nonfinite_input",
        (r"rank 0: loss 0\.[01][\s\S]*no findings", r"rank 0 halted after \d+ steps\n.*\n +seen in +input on rank 1 of 2"),
        ranks=True,
        code=1,  # torchrun's own; the ranks' is beside it in its table
    ),
    "fsdp2.py": Example("unchanged_weights", (r"DTensor; loss 0\.[01]", r"cause +the optimizer holds another model's parameters"), ranks=True),
    "lightning_digits.py": Example(
        "update_ratio_high", (r"accuracy 0\.9[\s\S]*no findings", "learning rate too high"), needs=("sklearn", "lightning|pytorch_lightning")
    ),
    "lightning_gan.py": Example(
        "unchanged_weights",
        ("no findings", r"generator\.0\.weight, .*: 10 of 14 trainable parameters are in no optimizer"),
        needs=("sklearn", "lightning|pytorch_lightning"),
    ),
    "plain_loop.py": Example("update_ratio_high", ill=("--lr", "5")),
    "preflight_digits.py": Example("unnormalized_input", ("14 checks.*: no findings", "wrong_output_activation +output: softmax")),
    "tracker.py": Example("update_ratio_high", (r"\d+ scalars in all\n[\s\S]*bytes in", "bytes in")),
    "transformers_trainer.py": Example("update_ratio_high", (r"evaluation loss [01]\.", ""), needs=("transformers", "accelerate")),
}


def installed(needs):
    return any(find_spec(name) for name in needs.split("|"))


def on_two_ranks(name, arguments, folder):
    """Code and output of ``torchrun --standalone --nproc-per-node 2 examples/NAME ARGUMENTS``, on CPUs."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *TORCHRUN, str(ROOT / "examples" / name), *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks too
        raise
    return process.returncode, out, err


def here(name, arguments, folder, monkeypatch, capfd):
    """The same for ``python examples/NAME ARGUMENTS``, without a process of its own, which would import torch and a trainer once more."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    rules, signals = set(RULES), set(SIGNALS)
    forget_accelerate()
    try:
        with mock.patch.dict(os.environ):  # trainers write into it
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        forget_accelerate()
        for extra in set(RULES) - rules:
            unregister(extra)
        for extra in set(SIGNALS) - signals:
            del SIGNALS[extra]
    out, err = capfd.readouterr()
    return 0, out, err


def forget_accelerate():
    """Accelerate keeps the settings of a process's first Accelerator for all others."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()


@pytest.mark.parametrize("ill", [False, True], ids=["healthy", "ill"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, ill, tmp_path, monkeypatch, capfd):
    """The healthy run ends with 0 and nothing of warning or above; the ill one prints the diagnosis that it promises first."""
    assert name in EXPECTED, f"say in {Path(__file__).name} what examples/{name} --ill must find"
    example = EXPECTED[name]
    absent = [needs for needs in example.needs if not installed(needs)]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    arguments = example.ill if ill else ()
    if example.ranks:
        code, out, err = on_two_ranks(name, arguments, tmp_path)
    else:
        code, out, err = here(name, arguments, tmp_path, monkeypatch, capfd)
    heard = [diagnosis for severity, diagnosis in HEARD.findall(out) if severity != "info"]
    assert code == (example.code if ill else 0), out + err
    assert re.search(example.says[ill], out), out + err
    if ill:
        assert heard[0] == example.found, out + err
    else:
        assert heard == [diagnosis for severity, diagnosis in HEARD.findall(err) if severity != "info"] == [], out + err
    if name == "ddp.py" and ill:  # both ranks halt at the same step, by the same finding, with our code
        steps = re.findall(r"rank \d halted after (\d+) steps", out)
        assert len(steps) == 2 and len(set(steps)) == 1 and heard == ["nonfinite_input"] * 2, out
        assert len(re.findall(r"input on rank 1 of 2", out)) == 2 and "exitcode  : 83" in err, out + err


def test_every_example_is_in_the_readme():
    """The README has a line for each example, and for no other."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\(examples/(\w+\.py)\)", text))) == EXAMPLES


def test_the_tracker_example_without_tensorboard(tmp_path, monkeypatch, capfd):
    """Where TensorBoard is not installed, the tracker example's scalars go to a CSV file."""
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, out, _ = here("tracker.py", (), tmp_path, monkeypatch, capfd)
    assert re.search(r"bytes in .*run\.csv$", out, re.MULTILINE) and "tensorboard" not in out, out
