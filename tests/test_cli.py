"""The commands, as a user types them."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lossguard import Guard, explain
from lossguard.actions import logger
from lossguard.cli import main
from lossguard.findings import DIAGNOSES
from lossguard.preflight import CHECKS
from lossguard.rules import RULES

ROOT = Path(__file__).parent.parent


def test_the_demo_judges_every_run_as_it_should(tmp_path, capsys):
    """The demo hears every ill run, is silent on the healthy, halts those that must halt, and leaves readable records."""
    level = logger.level
    assert main(["demo", "--folder", str(tmp_path), "--steps", "90"]) == 0
    assert logger.level == level
    text = capsys.readouterr().out
    assert "7 of 7 runs judged as they should be" in text
    assert len(list(tmp_path.iterdir())) == 7
    halted = next(tmp_path.glob("7-*"))
    assert main(["findings", str(halted)]) == 0
    assert "halt nonfinite_input at step 60" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(DIAGNOSES))
def test_every_diagnosis_has_a_page(name, capsys):
    """A page says what a diagnosis means, every limit with its source, and how to silence it."""
    assert main(["explain", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name} (")
    assert f"mute={{'{name}'}}" in text
    for field, _, why in explain.fields(RULES.get(name) or CHECKS[name]):
        assert field in text
        assert why, f"{name}.{field} has no unit and source"


def test_the_list_of_diagnoses(capsys):
    """explain without a name lists every diagnosis with its severity, by family."""
    assert main(["explain"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {row[0]: row[1] for row in rows} == {name: severity.label for name, (severity, _) in DIAGNOSES.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "explodng_gradient"], "did you mean 'exploding_gradient'"),
        (["findings", "/nowhere"], "no record at"),
        (["demo", "--steps", "0"], "--steps must be at least 70"),
    ],
)
def test_wrong_use_is_answered_in_words(arguments, words, capsys):
    """Wrong use ends with code 2 and says what to do."""
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_record_ends_with_counts_and_consequences(tmp_path, capsys):
    """The findings of a record are those of the finished run, each event once."""
    model = torch.nn.Linear(4, 2)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, record=tmp_path, halt=None) as guard:
        for _ in range(30):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()  # never cleared
            optimizer.step()
            guard.step(loss)
    assert main(["findings", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("missing_zero_grad at step") == 1
    assert f"{guard.findings[0].count} times" in text


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_loop_runs(capsys):
    """The README's first snippet runs as it stands and finds nothing."""
    exec(compile(python_blocks()[0], "README.md", "exec"), {})
    assert "4 parameter tensors, 20 steps, no findings" in capsys.readouterr().out


def test_the_readme_rule_and_signal_run():
    """The README's own rule and signal run as they stand, and hear a gradient with a single entry."""
    from lossguard.device.signals import SIGNALS
    from lossguard.rules.rule import unregister

    names = {}
    try:
        exec(compile("from __future__ import annotations\n" + python_blocks()[-1], "README.md", "exec"), names)
        model = torch.nn.Linear(8, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        with Guard(model, optimizer, mute={"missing_zero_grad"}) as guard:
            for _ in range(40):
                optimizer.zero_grad()
                loss = (model.weight[0, 3] - 1).square()
                loss.backward()
                optimizer.step()
                guard.step(loss)
        (finding,) = [f for f in guard.findings if f.diagnosis == "lone_peak"]
        assert str(finding).endswith('silence    Guard(mute={"lone_peak"})') and "explain" not in str(finding)  # explain has no page of it
    finally:
        SIGNALS.pop("grad_peak", None)
        if "lone_peak" in RULES:
            unregister("lone_peak")


def test_every_readme_snippet_is_python():
    """Every snippet of the README at least compiles."""
    assert len(python_blocks()) >= 4
    for block in python_blocks():
        ast.parse(block)


def test_the_module_can_be_run(monkeypatch, capsys):
    """python -m lossguard is the command."""
    monkeypatch.setattr(sys, "argv", ["lossguard", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lossguard", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("lossguard 0.")
