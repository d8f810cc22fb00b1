"""The package: what its wheel holds, what installing it changes, which extras there are."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lossguard

ROOT = Path(__file__).parent.parent
EXTRAS = {"lightning", "transformers", "report", "watch", "tensorboard", "wandb", "mlflow", "demo", "bench", "all", "test"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built as ``pip wheel .`` does."""
    folder = tmp_path_factory.mktemp("wheel")
    alone = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]  # without the network where the backend is at hand
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *alone, "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True, timeout=150)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package(wheel):
    """Every file of the package is in the wheel, py.typed and the report's page too, and nothing else beside the metadata."""
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "lossguard").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert names == there
    assert "lossguard/py.typed" in names


def test_extras(wheel):
    """The wheel names the extras that users are told of; ``all`` holds every one but the tests'; torch is pinned for the tests only."""
    (metadata,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert set(re.findall(r"^Provides-Extra: (\S+)", text, re.MULTILINE)) == EXTRAS
    assert re.search(rf"^Version: {re.escape(lossguard.__version__)}$", text, re.MULTILINE)
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(\S*?)(?:; extra == '(\w+)')?$", text, re.MULTILINE)
    assert {name for name, _, extra in needs if not extra} == {"torch", "numpy"}
    assert {name for name, _, extra in needs if extra == "all"} == {name for name, _, extra in needs if extra not in ("", "all", "test", "demo", "bench")}
    assert [extra for name, bound, extra in needs if name == "torch" and bound.startswith("==")] == ["demo", "test"]
    assert all(bound.startswith((">=", "==")) for _, bound, _ in needs)
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "lossguard").rglob("*.py")]
    told = {name for file in files for some in re.findall(r"lossguard\[([\w,]+)\]", file.read_text(encoding="utf-8")) for name in some.split(",")}
    assert told <= EXTRAS, told - EXTRAS


def test_installing_changes_nothing_else(wheel):
    """Where torch and numpy are, pip installs this package and leaves every other one as it is."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--report", "-", wheel]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=150).stdout
    assert {item["metadata"]["name"] for item in json.loads(answer)["install"]} <= {"lossguard"}
