"""A run that stands still in time: no step ends. What the watchdog saw flows in, a finding flows out; no torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lossguard.advice import ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.host.history import History
from lossguard.rules.rule import rule

# What the innermost frames of the main thread tell, the first that fits; parts of file names and of function names.
PLACES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("waits for data", ("torch/utils/data", "/queue.py", "multiprocessing/connection"), "the data loader or its worker hangs",
     "look for a dead worker, a slow file system or a deadlock in the data set; set DataLoader(timeout=120), try num_workers=0"),
    ("waits for other ranks", ("torch/distributed", "agreement.py"), "another rank does not come to this collective",
     "read the logs of the other ranks: the one whose main thread is elsewhere holds up the rest"),
    ("writes or reads a checkpoint", ("torch/serialization", "checkpoint"), "storage is slow or full", "look at the file system; save asynchronously"),
    ("waits for the device", ("torch/cuda", "handover.py"), "a kernel hangs or is very slow",
     "look at the device's log for errors such as Xid; run with CUDA_LAUNCH_BLOCKING=1"),
)  # fmt: skip


@dataclass(frozen=True)
class Stall:
    """No step for ``quiet`` seconds after ``step``; the limit and the median of steps in seconds; the main thread's stack,
    outermost first: (file, function, line)."""

    step: int
    quiet: float
    limit: float
    median: float
    stack: tuple[tuple[str, str, int], ...] = ()


@rule
@dataclass(frozen=True)
class StalledTraining:
    """stalled_training: no step has ended for far longer than steps take (the survey has no law for it).

    A thread of the guard's own, on by default where several ranks agree, else with ``Guard(stall=True)``, compares the time since
    the last ``guard.step`` with a limit: the largest of 300 seconds, 50 times the median of the newest 64 steps, and 3 times the
    longest pause of this run that ended by itself. In the first 10 steps, which compile and fill caches, it is 1800 seconds.
    When it is passed, every thread's stack and the newest losses go to the log and to ``stalled-STEP.txt`` in the record, once,
    while the run hangs; the finding itself is among the findings once a step ends again. Each rank's guard tells where its own stands.

    Why: another rank died or left the loop, so that a collective waits; a loader's worker was killed or waits for storage;
    a deadlock of threads after a fork; a device that hangs; a checkpoint on a slow file system.
    Do: read which rank's main thread is not in a collective: that one is the culprit; set DataLoader(timeout=120);
    set the process group's timeout to 10 minutes, so that a lost rank ends the job instead of holding its machines.
    False alarm: the first evaluation or checkpoint that takes longer than 300 seconds: put it into ``with guard.pause():``, or
    give Guard(stall=1800.0); later ones are excused by the first. It is a warning and never halts by itself. A thread cannot
    run, and so cannot tell, while native code holds the interpreter's lock.
    """

    diagnosis: ClassVar[str] = "stalled_training"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    least: float = 300.0  # seconds; our own choice, half of the 600 after which NCCL's watchdog ends a job
    factor: float = 50.0  # times the median step; our own choice: evaluations, checkpoints and epochs' ends seldom take as long as 50 steps
    again: float = 3.0  # times the longest pause so far; our own choice, so that what recurs is excused
    first: float = 1800.0  # seconds before the median is known; our own choice: compilation of large models takes up to half an hour
    fewest: int = 10  # steps that make a median
    fresh: int = 32  # steps after a pause in which it is told: more than a block of losses and the hand-over's lag
    grace: int = 0  # steps; the limit before the median is the grace
    patience: int = 1  # answers; the watchdog has waited long enough

    def seconds(self, steps: int, median: float, longest: float, least: float | None = None) -> float:
        """How long a pause may be after so many steps, in seconds. least: what the user gave instead of the field.

        >>> StalledTraining().seconds(64, median=0.5, longest=20.0), StalledTraining().seconds(64, 12.0, 20.0)
        (300.0, 600.0)
        """
        least = self.least if least is None else least
        if steps < self.fewest:
            return max(self.first, least)
        return max(least, self.factor * median, self.again * longest)

    def check(self, history: History) -> Finding | None:
        """What the watchdog saw, once a step ended again."""
        stall = history.notes.get("stall")
        return self.finding(stall) if isinstance(stall, Stall) and 0 <= history.step - stall.step <= self.fresh else None

    def finding(self, stall: Stall) -> Finding:
        """The pause in words, with where the main thread stands."""
        state, cause, cure, frame = _place(stall)
        evidence = (Evidence("seconds without a step", stall.quiet, stall.limit), Evidence("seconds of a step, median", stall.median))
        causes, remedies = ranked([(Cause(cause, 0.7 if state != "is busy" else 0.3, f"the main thread {state}: {frame}"), [Remedy(cure, {})])])
        message = f"no step for {stall.quiet:.0f} s after step {stall.step}; the main thread {state}"
        return Finding(self.diagnosis, Severity.WARNING, stall.step, frame, message, evidence, causes, remedies)


def _place(stall: Stall) -> tuple[str, str, str, str]:
    """What the main thread does, why that may be, what to do, and the innermost frame."""
    frames = list(reversed(stall.stack))
    inner = f"{frames[0][0].rpartition('/')[2]}:{frames[0][2]} in {frames[0][1]}" if frames else "unknown"
    for file, function, _ in frames:
        name = file.replace("\\", "/")
        for state, parts, cause, cure in PLACES:
            if any(part in name or part == function for part in parts):
                return state, cause, cure, inner
    return "is busy", "something else than the loop takes the time", "read the stack in stalled-STEP.txt; 50 steps of time is what was waited for", inner
