"""What kind of run it was: the facts that end a record and head a report. A guard flows in, plain values flow out."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lossguard.actions import Policy
from lossguard.sinks import Record

if TYPE_CHECKING:
    from lossguard.guard import Guard


def of(guard: Guard, policy: Policy) -> dict[str, Any]:
    """The facts of a guard's run so far; host values only, nothing waits."""
    parameters = list(guard.model.parameters())
    devices = sorted({str(p.device) for p in parameters})
    good = guard.last_good
    halting = [f.step for f in guard.findings if policy.halts(f)]
    return {
        "lossguard": getattr(sys.modules.get("lossguard"), "__version__", ""),
        "torch": torch.__version__,
        "model": type(guard.model).__name__,
        "optimizers": [type(o).__name__ for o in guard.optimizers],
        "devices": devices,
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "tensors": len(parameters),
        "steps": guard.steps,
        "every": guard.every,
        "configured": guard.configured,
        "verdict": guard.verdict,
        "memory": guard.memory,
        "skipped": guard.skipped,
        "cures": [asdict(cure) for cure in guard.recovery.cures],
        "culprits": guard.culprits,
        "last_good": None if good is None else good._asdict(),
        "halted": bool(halting),
        "ended": time.time(),
    }


def finish(guard: Guard, policy: Policy, record: Record) -> None:
    """The record's last line, and its end. A fault in the facts costs the facts, not the findings."""
    facts, coverage = {}, {}
    try:
        facts, coverage = of(guard, policy), asdict(guard.coverage)
    finally:
        try:
            record.summary(guard.findings, facts, coverage)
        finally:
            record.close()
