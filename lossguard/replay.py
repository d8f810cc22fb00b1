"""``python -m lossguard replay FOLDER --step module:function``: the step that halted, run twice from what was left behind.

A bundle flows in, a sentence flows out. Each run has a process of its own, so that nothing of the first can reach the second.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossguard import aftermath
from lossguard.culprit.find import of_call
from lossguard.findings import Finding

REPRODUCIBLE, DIFFERENT = 0, 1  # exit codes; 2 is wrong use
CLEAN = "  no operation of this step made a non-finite value: its result and its gradients are finite"


@dataclass(frozen=True)
class Bundle:
    """What a halt has left behind, as the step's function gets it. batch: as it was shown to the guard, ``(inputs, targets)``,
    on the CPU; None where it was not kept. The random generators stand as they stood before the step if the batch was kept,
    else as they stood at the halt. checkpoint: the newest one from before the finding that the guard was told of."""

    folder: Path
    finding: Finding
    state: Mapping[str, Any]
    batch: Any
    random: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The guard step at which the fault showed."""
        return self.finding.step

    @property
    def checkpoint(self) -> str | None:
        """Its path, None if the guard was told of none."""
        told = self.state.get("checkpoint")
        return None if told is None else str(told["path"])


def load(folder: str | Path) -> Bundle:
    """The bundle in a record (its newest halt), a folder ``halt-STEP`` (the rank whose verdict it is), or a folder ``rankN``."""
    path = Path(folder)
    if not (path / "state.json").exists():
        if not (path / "verdict.json").exists():
            halts = aftermath.verdicts(path)
            if not halts:
                raise ValueError(f"no halt in {path}; give the folder passed as Guard(record=...), or a folder halt-STEP in it")
            path = halts[-1][0]
        path = path / f"rank{json.loads((path / 'verdict.json').read_text(encoding='utf-8'))['rank']}"
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("schema", 0) > aftermath.SCHEMA:
        raise ValueError(f"{path} has schema {state['schema']}, this version reads up to {aftermath.SCHEMA}; update lossguard")
    batch = torch.load(path / "batch.pt", map_location="cpu", weights_only=True) if (path / "batch.pt").exists() else None
    states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True) if (path / "rng.pt").exists() else {}
    return Bundle(path, Finding.from_dict(state["finding"]), state, batch, states)


def main(folder: Path, step: str, *, locate: bool = False) -> int:
    """Run the step in two fresh processes, compare bit for bit, and say what that means. locate: once more, for the operation."""
    bundle = load(folder)
    with tempfile.TemporaryDirectory(prefix="lossguard-") as scratch:
        first, second = (_fresh(bundle.folder, step, Path(scratch) / f"{k}.pt") for k in range(2))
        culprit = _fresh(bundle.folder, step, Path(scratch) / "culprit.pt", "--locate")["culprit"] if locate else ""
    differing = sorted(k for k in {*first["numbers"], *second["numbers"]} if not _same(first["numbers"].get(k), second["numbers"].get(k)))
    sys.stdout.write("\n".join([*_words(bundle, first["numbers"], differing, first["loose"]), *([culprit] if culprit else [])]) + "\n")
    return DIFFERENT if differing else REPRODUCIBLE


def once(folder: Path, step: str, out: Path, *, locate: bool = False) -> int:
    """One run, in this process: its result goes to ``out``. locate: with the operation that made the first non-finite value."""
    bundle = load(folder)
    function = _function(step)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    if bundle.random:
        aftermath.set_random_states(bundle.random)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result, culprit = of_call(lambda: function(bundle), bundle.batch) if locate else (function(bundle), None)
        numbers = _flat(result)
    if not numbers:
        raise ValueError(f"{step} returned nothing to compare; return the loss, or a dict of tensors")
    loose = sorted({str(w.message).split("\n")[0] for w in heard if "deterministic" in str(w.message)})
    named = "" if not locate else CLEAN if culprit is None else str(culprit)
    torch.save({"numbers": numbers, "loose": loose, "culprit": named}, out)
    return 0


def _words(bundle: Bundle, numbers: Mapping[str, Any], differing: list[str], loose: list[str]) -> list[str]:
    """What the comparison means."""
    head = f"lossguard: replay of {bundle.finding.diagnosis} at step {bundle.step}, rank {bundle.state['rank']}"
    if not differing:
        lines = [head, f"  reproducible: two runs gave the same result ({', '.join(list(numbers)[:3])}), bit for bit."]
    elif loose:
        lines = [head, f"  not reproducible: {len(differing)} of {len(numbers)} results differ ({', '.join(differing[:3])}), but the step uses operations",
                 "  without a deterministic form, so this proves nothing about the hardware:", *(f"    {text}" for text in loose[:3])]  # fmt: skip
    else:
        lines = [head, f"  NOT REPRODUCIBLE: {len(differing)} of {len(numbers)} results differ between two runs ({', '.join(differing[:3])}).",
                 f"  Suspect the hardware: take {bundle.state['versions']['host']} out of service and test its accelerator and memory.",
                 "  (First make sure that the function draws no random numbers of its own and reads no clock.)"]  # fmt: skip
    lines += _beside_the_run(bundle, numbers, differing)
    if bundle.batch is None:
        lines.append("  The batch was not kept, so the function had to find its own: Guard(record=..., keep_batch=True) keeps it.")
    return lines


def _beside_the_run(bundle: Bundle, numbers: Mapping[str, Any], differing: list[str]) -> list[str]:
    """Whether the fault came back: the result named loss, or the only one, against the loss that the run saw."""
    seen, value = bundle.state.get("loss"), numbers.get("loss", next(iter(numbers.values())) if len(numbers) == 1 else None)
    if seen is None or differing or value is None or value.numel() != 1:
        return []
    again, then = value.double().item(), float(seen)
    lines = [f"  The run saw the loss {then:.6g}, the replay gives {again:.6g}."]
    if not math.isfinite(again) and not math.isfinite(then):
        lines.append("  The fault comes back: it is in the numbers, the data or the code, not in the hardware.")
    elif math.isfinite(again) and not math.isfinite(then):
        lines.append("  The fault did not come back: the weights or the batch are not those of the step, or the run met a passing fault of its hardware.")
    return lines


def _fresh(folder: Path, step: str, out: Path, *more: str) -> dict[str, Any]:
    """The result of one run in a process of its own."""
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0"}  # cuBLAS needs the first to be deterministic
    command = [sys.executable, "-m", "lossguard", "replay", str(folder), "--step", step, "--once", str(out), *more]
    done = subprocess.run(command, env={**os.environ, **settings}, check=False)
    if done.returncode or not out.exists():
        raise ValueError(f"{step} ended with code {done.returncode}, so there is nothing to compare; its own message stands above")
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def _function(step: str) -> Any:
    """``module:function``, found from the working directory as ``python -m`` finds it."""
    module, _, name = step.partition(":")
    if not module or not name:
        raise ValueError(f"--step must be MODULE:FUNCTION, got {step!r}; give for instance --step train:replay_step")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"--step {step}: there is no module {error.name}; run from the folder that holds it") from error
    if not callable(found):
        raise ValueError(f"--step {step}: {module} has no function {name}; it is called with the Bundle and returns the loss, or a dict of tensors")
    return found


def _flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor and number of a result, by name, on the CPU."""
    if isinstance(value, Tensor):
        return {name or "loss": torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())}
    if isinstance(value, (int, float)):
        return {name or "loss": torch.tensor(value, dtype=torch.float64)}
    items: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    return {k: v for key, item in items for k, v in _flat(item, f"{name}.{key}" if name else str(key)).items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit; NaN is equal to the same NaN."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
