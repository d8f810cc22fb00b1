"""What is left behind at a halt: a folder for the post-mortem. Host values and the batch flow in, files flow out.

``RECORD/halt-STEP/verdict.json`` is written once for all ranks (the first writer wins, atomically); ``rankN/`` beside it
holds ``state.json``, ``tape.npz``, ``rng.pt`` and, on request, ``batch.pt``. Waits for the device: a halt has no next step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard import exits, place, resume
from lossguard.actions import TrainingHalted
from lossguard.device.capture import capturing
from lossguard.findings import plain
from lossguard.host.history import History
from lossguard.safekeeping import Checkpoints

SCHEMA = 1
ROWS, LOSSES = 64, 512  # samples and losses of the tape's tail; as many as the widest windows of the rules
TAIL_BYTES = 4 * 2**20  # of the tape's tail, before compression; our own choice, because a thousand ranks leave 4 GB then

# Variables that explain a fault and hold no secret. Everything else of the environment stays out.
NAMES = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "NVIDIA_TF32_OVERRIDE", "PYTHONHASHSEED", "RANK", "SLURM_JOB_ID",
         "SLURM_JOB_NUM_NODES", "SLURM_NODEID", "SLURM_PROCID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
         "WORLD_SIZE")  # fmt: skip
PREFIXES = ("CUBLAS_", "CUDA_LAUNCH_", "CUDNN_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_NCCL_", "TORCHINDUCTOR_")
NEVER = ("AUTH", "CREDENTIAL", "KEY", "PASS", "SECRET", "TOKEN")  # in a name: left out whatever it begins with


@dataclass
class _Shown:
    """A batch on its way: alive by itself only where it is to be kept."""

    step: int
    index: int
    leaves: list[weakref.ref[Tensor]]
    batch: Any = None
    rng: tuple[Any, ...] = ()


class Aftermath:
    """Remembers what a halt must know and writes it down then. cap: most bytes of a batch to keep, 0 for none; lag: steps that
    a halt comes late; checkpoints: those that are known to be good."""

    def __init__(self, folder: str | Path, optimizers: Sequence[Optimizer], scaler: Any, cap: int, lag: int, checkpoints: Checkpoints) -> None:
        self._folder, self._optimizers, self._scaler, self._cap = Path(folder), optimizers, scaler, cap
        self._shown: deque[_Shown] = deque(maxlen=lag + 2)
        self._born = time.time_ns()
        self._checkpoints = checkpoints

    def show(self, step: int, index: int, batch: Any) -> None:
        """The batch of the coming step. Kept alive only on request, else its fingerprint is taken if it lives at the halt."""
        shown = _Shown(step, index, [weakref.ref(t) for t in leaves(batch)])
        if self._cap:
            shown.batch, shown.rng = batch, random_now()
        self._shown.append(shown)

    @property
    def nbytes(self) -> int:
        """Bytes of the batches kept alive."""
        return sum(t.numel() * t.element_size() for shown in self._shown if shown.batch is not None for t in leaves(shown.batch))

    def leave(self, halt: TrainingHalted, history: History, steps: int) -> None:
        """Write the folder and name it in the halt. A part that cannot be written is named in the state; ``OSError`` if nothing can."""
        attempt, finding = place.attempt(self._born), halt.finding
        root = _folder_of(self._folder, finding.step, attempt)
        own = root / f"rank{place.rank()}"
        own.mkdir(parents=True, exist_ok=True)
        halt.folder = own
        if halt.exit_code == exits.ROLL_BACK and _happened(self._folder, finding.to_dict(), attempt):
            halt.exit_code = exits.NO_RETRY  # a retry has brought the same halt at the same step: another one would do so too
        shown = next((s for s in self._shown if s.step == finding.step), self._shown[-1] if self._shown else None)
        exact = shown is not None and shown.step == finding.step and bool(shown.rng)
        states = random_states(shown.rng if shown is not None and exact else None)
        missing: dict[str, str] = {}
        _try(missing, "tape.npz", lambda: _write_tape(own / "tape.npz", history))
        _try(missing, "rng.pt", lambda: torch.save(resume.pack({"at": "before the step" if exact else "at the halt", **states}), own / "rng.pt"))
        if shown is not None and self._cap:
            _try(missing, "batch.pt", lambda: self._write_batch(own / "batch.pt", shown.batch))
        loss = history.losses()[history.loss_steps() == finding.step]
        state = {
            "schema": SCHEMA, "time": time.time(), "attempt": attempt, "rank": place.rank(), "world": place.world(), "exit_code": halt.exit_code,
            "step": finding.step, "steps": steps, "loss": plain(float(loss[-1])) if loss.size else None, "finding": finding.to_dict(),
            "culprit": halt.culprit,
            "lr": [[plain(_number(g.get("lr"))) for g in o.param_groups] for o in self._optimizers], "loss_scale": self._loss_scale(missing),
            "batch": _about(shown, finding.step, missing), "checkpoint": self._last_good(finding.step), "versions": versions(), "environment": environment(),
            "missing": missing,
        }  # fmt: skip
        text = json.dumps(state, allow_nan=False, indent=1)
        write_whole(own / "state.json", text)
        first_wins(root / "verdict.json", text)

    def _write_batch(self, path: Path, batch: Any) -> None:
        size = sum(t.numel() * t.element_size() for t in leaves(batch))
        if size > self._cap:
            raise ValueError(f"the batch has {size} bytes and the cap is {self._cap}; give keep_batch={size}")
        torch.save(portable(batch), path)

    def _loss_scale(self, missing: dict[str, str]) -> float | None:
        scale: list[float] = []
        if self._scaler is not None:
            _try(missing, "loss_scale", lambda: scale.append(float(self._scaler.get_scale())))
        return plain(scale[0]) if scale else None

    def _last_good(self, step: int) -> dict[str, Any] | None:
        """The newest checkpoint from before the finding's step."""
        good = self._checkpoints.last_good(step)
        return None if good is None else good._asdict()


# ---- the parts


def leaves(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors of a nested batch, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth < 6 and isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item, depth + 1)
    elif depth < 6 and isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item, depth + 1)


def portable(value: Any) -> Any:
    """A copy of a batch in tensors and plain types, which ``torch.load(weights_only=True)`` reads; what is neither becomes its ``repr``."""
    if isinstance(value, Tensor):
        return value.detach().clone()  # a view would take its whole storage along
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {k if isinstance(k, (str, int)) else repr(k): portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value] if isinstance(value, list) else tuple(portable(v) for v in value)
    return value if value is None or type(value) in (bool, int, float, str, bytes) else repr(value)


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """The same sixteen letters for the same dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(resume.unpack(tensor.detach().contiguous().reshape(-1).view(torch.uint8))))
    return digest.hexdigest()[:16]


def random_states(raw: tuple[Any, ...] | None = None) -> dict[str, Any]:
    """The states of all random generators, now or as they were, as plain types and tensors. Reads host memory only."""
    torchs, (version, words, gauss), (name, keys, *rest), cuda = raw or random_now()
    numpys = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(v) for v in rest)]
    return {"torch": torchs, "python": [version, list(words), gauss], "numpy": numpys, "cuda": cuda}


def random_now() -> tuple[Any, ...]:
    """The states of all random generators as they are handed out; :func:`random_states` makes them portable."""
    cuda = torch.cuda.get_rng_state_all() if _cuda() and not capturing() else []
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True), cuda


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`; CUDA's where there are as many devices."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, resume.unpack(keys).astype(np.uint32), int(position), int(has_gauss), cached))
    if states["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def versions() -> dict[str, Any]:
    """What ran."""
    own = getattr(sys.modules.get("lossguard"), "__version__", None)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if _cuda() else []
    return {"lossguard": own, "torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__, "python": platform.python_version(),
            "system": platform.platform(), "host": platform.node(), "devices": devices}  # fmt: skip


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that explain a fault; none that could hold a secret.

    >>> environment({"OMP_NUM_THREADS": "1", "HOME": "/root", "NCCL_TOKEN": "x"})
    {'OMP_NUM_THREADS': '1'}
    """
    found = os.environ if variables is None else variables
    return {k: v for k, v in sorted(found.items()) if (k in NAMES or k.startswith(PREFIXES)) and not any(word in k.upper() for word in NEVER)}


def _write_tape(path: Path, history: History) -> None:
    """The newest samples and losses, as far as they are on the host."""
    names = sorted(history.observed())
    sites = sum(history.last(name, 1).size for name in names)
    rows = max(4, min(ROWS, TAIL_BYTES // max(1, 4 * sites)))
    arrays: dict[str, Any] = {f"signal.{name}": history.last(name, rows).astype(np.float32) for name in names}
    arrays |= {f"term.{name}": history.term(name, LOSSES) for name in history.terms}
    arrays |= {"steps": history.steps(rows), "losses": history.losses(LOSSES), "loss_steps": history.loss_steps(LOSSES), "validations": history.validations()}
    arrays |= {"parameters": np.array([p.name for p in history.params], dtype=str), "units": np.array([u.name for u in history.units], dtype=str)}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _about(shown: _Shown | None, step: int, missing: dict[str, str]) -> dict[str, Any] | None:
    """Which batch it was. Without ``keep_batch`` its fingerprint is known only while the loop still holds it."""
    if shown is None:
        return None
    alive = list(leaves(shown.batch)) if shown.batch is not None else [t for ref in shown.leaves if (t := ref()) is not None]
    marks: list[str] = []
    if alive and len(alive) == len(shown.leaves):
        _try(missing, "fingerprint", lambda: marks.append(fingerprint(alive)))
    shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in alive]
    return {"step": shown.step, "index": shown.index, "of_the_finding": shown.step == step, "fingerprint": marks[0] if marks else None, "tensors": shapes}


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _number(value: Any) -> float:
    return float(value) if value is not None else float("nan")


def _try(missing: dict[str, str], part: str, write: Callable[[], Any]) -> None:
    try:
        write()
    except Exception as error:
        missing[part] = f"{type(error).__name__}: {error}"


# ---- files


def write_whole(path: Path, text: str) -> None:
    """The whole text or nothing: readers never see a part of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def first_wins(path: Path, text: str) -> bool:
    """As :func:`write_whole`, but only where nothing stands yet; whether it was written. Safe among many writers."""
    draft = path.with_name(f".{path.name}.{place.rank()}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: a short race is left there
            if path.exists():
                return False
            draft.replace(path)
        return True
    finally:
        draft.unlink(missing_ok=True)


def verdicts(record: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """The halts that a record knows, oldest first: their folders and verdicts."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in Path(record).glob("halt-*/verdict.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda pair: float(pair[1].get("time", 0.0)))


def _folder_of(record: Path, step: int, attempt: str) -> Path:
    """``halt-STEP``, with a number behind it where another start of the run has halted at that step before."""
    for k in range(1, 1000):
        folder = record / (f"halt-{step}" if k == 1 else f"halt-{step}-{k}")
        folder.mkdir(parents=True, exist_ok=True)
        first_wins(folder / "attempt", attempt)
        if (folder / "attempt").read_text(encoding="utf-8") == attempt:
            return folder
    raise OSError(f"{record} holds a thousand halts at step {step}; give record= a folder of its own for each run")


def _happened(record: Path, finding: Mapping[str, Any], attempt: str) -> bool:
    """Whether an earlier start of the run has halted by the same diagnosis at the same step."""
    same = ("diagnosis", "step", "where")
    return any(v.get("attempt") != attempt and all(v["finding"].get(k) == finding[k] for k in same) for _, v in verdicts(record) if "finding" in v)
