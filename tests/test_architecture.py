"""The house's order: who may import whom, what may stand where, how large a part may grow."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lossguard

ROOT = Path(lossguard.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
TREES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in FILES}
NAMES = [str(p.relative_to(ROOT)) for p in FILES]

# From the inside out. A module may import from its own layer and from those before it; nobody imports what stands behind.
LAYERS = [
    ("findings.py", "notebook.py", "painting.py"),
    ("device/",),
    ("host/",),
    ("rules/rule.py", "rules/judge.py"),
    ("advice.py",),
    ("structure.py",),
    ("readings.py", "obstacles.py"),
    ("verdict.py",),
    ("rules/",),
    ("cluster.py", "exits.py", "place.py", "watching.py", "actions.py", "resume.py", "batches.py", "faults.py"),
    ("rehearsal.py", "soundness.py", "safekeeping.py"),
    (
        "aftermath.py",
        "sinks.py",
        "coverage.py",
        "fingerprint.py",
        "pulses.py",
        "arguments.py",
        "introduce.py",
        "schedule.py",
        "skipping.py",
        "watchdog.py",
        "preflight/",
    ),
    ("culprit/", "locating.py"),
    ("snapshot.py", "recovery_rates.py", "recovery.py"),
    ("record.py", "beside.py", "facts.py", "explain.py", "scalars.py", "trackers/"),
    ("report/", "watch/"),
    ("telling.py", "phases.py"),
    ("config/",),
    ("guard.py",),
    ("integrations/", "demo.py", "replay.py", "launch/"),
    ("__init__.py", "__main__.py", "cli.py"),
]
# The face is imported by what is behind it in the order above.
BEHIND_THE_FACE = ("integrations/", "demo.py", "cli.py", "__main__.py")


def layer(name):
    return next(i for i, members in enumerate(LAYERS) if any(name == m or (m.endswith("/") and name.startswith(m)) for m in members))


def imports(tree):
    """Every module imported anywhere in the file, as dotted names; those for type checkers only are left out."""
    skipped = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(dotted):
    """The file of our own that a dotted name leads to, or None."""
    if dotted.partition(".")[0] != "lossguard":
        return None
    parts = dotted.split(".")[1:]
    while parts:
        for candidate in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if candidate.exists():
                return str(candidate.relative_to(ROOT))
        parts.pop()
    return "__init__.py"


@pytest.mark.parametrize("name", NAMES)
def test_order_of_imports(name):
    """Imports point inwards only: findings, device, host, rules, advice, actions, sinks, guard, integrations, cli."""
    for dotted in imports(TREES[ROOT / name]):
        target = own(dotted)
        if target is None or (target == "__init__.py" and any(name.startswith(b) for b in BEHIND_THE_FACE)):
            continue
        assert layer(target) <= layer(name), f"{name} imports {dotted}"


ALLOWED = {
    "findings.py": {"numpy": False, "torch": False},
    "notebook.py": {"numpy": False, "torch": False},
    "painting.py": {"numpy": False, "torch": False},
    "watch/": {"numpy": True, "torch": False, "rich": True},
    "rules/": {"numpy": True, "torch": False},
    "advice.py": {"numpy": True, "torch": False},
    "obstacles.py": {"numpy": True, "torch": False},
    "readings.py": {"numpy": True, "torch": False},
    "verdict.py": {"numpy": True, "torch": False},
    "host/history.py": {"numpy": True, "torch": False},
    "host/evaluations.py": {"numpy": True, "torch": False},
    "host/decode.py": {"numpy": True, "torch": False},
    "host/intake.py": {"numpy": True, "torch": False},
    "actions.py": {"numpy": False, "torch": False},
    "sinks.py": {"numpy": True, "torch": False},
    "record.py": {"numpy": True, "torch": False},
    "scalars.py": {"numpy": True, "torch": False},
    "report/": {"numpy": True, "torch": False},
}


@pytest.mark.parametrize("name", NAMES)
def test_packages_of_others(name):
    """Outside of integrations, trackers, the demo and the live view only torch and numpy are imported, and these only where they belong."""
    foreign = {d.partition(".")[0] for d in imports(TREES[ROOT / name])} - set(sys.stdlib_module_names) - {"lossguard"}
    if not name.startswith(("integrations/", "trackers/", "demo.py", "watch/")):
        assert foreign <= {"numpy", "torch"}, foreign
    for prefix, rights in ALLOWED.items():
        if name.startswith(prefix):
            assert not {package for package in foreign if not rights.get(package)}, f"{name} imports {foreign}"


READS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "masked_select", "unique", "equal", "allclose", "argwhere"}
HOST_SIDE = {"indices.tolist", "sites.tolist", "taken.tolist"}  # numpy arrays of site numbers, which never were on a device
SPEAKS = {"print", "logging", "input", "open"}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("device/")])
def test_the_device_side_reads_nothing(name):
    """On the device side nothing is read, logged or printed, and no tensor becomes a Python number, boolean or text."""
    for node in ast.walk(TREES[ROOT / name]):
        if isinstance(node, ast.Call):
            called = node.func
            text = ast.unparse(called)
            if isinstance(called, ast.Attribute):
                assert called.attr not in READS or text in HOST_SIDE, f"{name}:{node.lineno} {text}"
            if isinstance(called, ast.Name):
                assert called.id not in SPEAKS, f"{name}:{node.lineno} {text}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "logging" not in ast.unparse(node), f"{name}:{node.lineno}"


def test_conversions_on_the_device_side_are_of_host_values():
    """float(), int() and bool() on the device side are applied to what is known to be a host value; each place is listed here."""
    known = {"float('nan')", "float('inf')", "float(r)", "int(s)", "int(site)", "bool(self.banks)", "bool(self._versions)", "bool(self.sites)",
             "bool(roots)"}  # fmt: skip
    for name in NAMES:
        if not name.startswith("device/"):
            continue
        for node in ast.walk(TREES[ROOT / name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("float", "int", "bool"):
                text = ast.unparse(node)
                assert text in known or text.startswith("int(SHARE * model_elements"), f"{name}:{node.lineno} {text}"


def test_one_place_moves_data_to_the_host():
    """Only the hand-over turns tensors into numpy arrays, and resume, which reads what was loaded from a file."""
    for name in NAMES:
        for node in ast.walk(TREES[ROOT / name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("cpu", "numpy") and not name.startswith("demo"):
                assert name in ("host/handover.py", "resume.py"), f"{name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    """A module has at most 350 lines (the guard, which wires all, 400), a function at most 60, its signature and docstring not counted."""
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= (400 if name == "guard.py" else 350)
    for node in ast.walk(TREES[ROOT / name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 60, f"{name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_for_later(name):
    """No note of unfinished work and no code that is commented out stands in the house; each module says what it is."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "XXX", "HACK"):
        assert word not in text, word
    assert ast.get_docstring(TREES[ROOT / name])


def test_the_public_face():
    """At most 16 names; each exists and is documented, and each class or function shows a running example."""
    assert len(lossguard.__all__) <= 16
    assert len(set(lossguard.__all__)) == len(lossguard.__all__)
    assert list(lossguard.__all__) == sorted(lossguard.__all__)
    for name in lossguard.__all__:
        thing = getattr(lossguard, name)
        assert inspect.getdoc(thing), name
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("lossguard"):
            assert ">>> " in inspect.getdoc(thing), f"{name} has no example"


@pytest.mark.parametrize("statement", ["import lossguard", "import lossguard.cli", "import lossguard.rules"])
def test_importing_loads_no_trainer(statement):
    """Importing the package loads no trainer, tracker, plotting or data package, and no compiler."""
    code = f"""
import torch, numpy, sys
before = set(sys.modules)
{statement}
new = set(sys.modules) - before
print(*sorted({{m.partition('.')[0] for m in new}}))
print('torch._dynamo' in new)
"""
    loaded, compiler = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    strange = set(loaded.split()) - set(sys.stdlib_module_names) - {"lossguard", "torch", "numpy"}
    assert {m for m in strange if not m.startswith("_")} == set()
    assert compiler == "False"


def test_rules_run_without_torch():
    """Findings, history, rules and the judge work where torch cannot be imported at all."""
    code = """
import sys, types
sys.modules["torch"] = None
package = types.ModuleType("lossguard"); package.__path__ = [sys.argv[1]]; sys.modules["lossguard"] = package
for part in ("host",):
    module = types.ModuleType(f"lossguard.{part}"); module.__path__ = [f"{sys.argv[1]}/{part}"]; sys.modules[f"lossguard.{part}"] = module
from lossguard.host.history import History
from lossguard.rules import RULES
from lossguard.rules.judge import Judge
history = History()
history.add_loss(0, float("nan"))
judge = Judge([cls() for cls in RULES.values()])
print([f.diagnosis for f in judge.observe(history, new_sample=False)])
"""
    answer = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True).stdout.strip()
    assert answer == "['nonfinite_loss']"
