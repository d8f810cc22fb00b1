"""Never overwritten: whether a training state is fit to be saved, and which checkpoint was the last good one.

A model and its optimizers flow in; a ``Soundness`` and paths flow out. Asked for only where a checkpoint is written, so it may
wait for the device. Nothing here changes a tensor.

For trainers: call ``guard.safe_to_save()`` (its answer is truthy or falsy, and says why) before a checkpoint is written, on
every rank; do not write, rotate or delete anything where it is falsy; call ``guard.saved(path)`` behind a good one. Without a
guard: ``Soundness(step, tuple(nonfinite(model, optimizers)))``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lossguard import place
from lossguard.actions import logger
from lossguard.findings import Finding
from lossguard.host.unison import Unison
from lossguard.soundness import born_finite, nonfinite

CHECKPOINTS = 16  # checkpoints remembered


@dataclass(frozen=True)
class Soundness:
    """Whether a state is fit to be saved: truthy if so. step: how many steps led to it. reasons: why not.

    >>> bool(Soundness(7)), bool(Soundness(7, ("3 of 4 weights are not finite",)))
    (True, False)
    >>> print(Soundness(7, ("3 of 4 weights are not finite",)))
    not fit to be saved after 7 steps: 3 of 4 weights are not finite
    """

    step: int
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return f"fit to be saved after {self.step} steps" if self else f"not fit to be saved after {self.step} steps: {'; '.join(self.reasons)}"


class Checkpoint(NamedTuple):
    """A checkpoint of a state that was good. after_steps: how many steps led to it."""

    after_steps: int
    path: str


class Checkpoints:
    """The newest checkpoints, oldest first; a path that was written again counts as of then."""

    def __init__(self) -> None:
        self._known: deque[Checkpoint] = deque(maxlen=CHECKPOINTS)

    def saved(self, step: int, path: str | Path) -> None:
        """A checkpoint was written after so many steps."""
        kept = [c for c in self._known if c.path != str(path)]
        self._known.clear()
        self._known.extend([*kept, Checkpoint(step, str(path))])

    def last_good(self, step: int | None = None) -> Checkpoint | None:
        """The newest one, from before a step if one is given; one that a rotation has deleted only where none is left.

        >>> known = Checkpoints(); known.saved(5, "a.pt"); known.saved(9, "b.pt")
        >>> known.last_good(7)
        Checkpoint(after_steps=5, path='a.pt')
        """
        good = [c for c in self._known if step is None or c.after_steps <= step]
        there = [c for c in good if "://" in c.path or Path(c.path).exists()]
        return there[-1] if there else good[-1] if good else None

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"known": [list(c) for c in self._known]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._known.clear()
        self._known.extend(Checkpoint(int(step), str(path)) for step, path in state["known"])


# ---- what a guard offers


class Keeper:
    """The part of a guard that knows of checkpoints."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    steps: int
    closed: bool
    _fatal: Finding | None  # what ends the run, from when it is known until the run is cured or continued elsewhere
    _agreement: Any
    _record: Any
    _faults: Any

    def _keep(self) -> None:
        """Get ready, on all ranks alike."""
        self._fatal = None
        self._checkpoints = Checkpoints()
        self._born = born_finite(self.model)
        self._unison = Unison() if place.together() else None

    def settle(self, *, patience: float | None = None) -> None:
        """Judge what was recorded."""
        raise NotImplementedError

    def note(self, event: str, **details: Any) -> None:
        """A line in the run's record, such as a signal; nothing without a record. details: the same for programs, in plain types."""
        if self._record:
            self._faults.watch(self._record.event, self.steps, event, **details)

    @property
    def last_good(self) -> Checkpoint | None:
        """The newest checkpoint that was written while the state was good, and before what ends the run: ``.after_steps``, ``.path``."""
        return self._checkpoints.last_good(None if self._fatal is None else self._fatal.step)

    def saved(self, checkpoint: str | Path) -> None:
        """The run's checkpoint was written there: a halt names the newest one from before its finding."""
        self._checkpoints.saved(self.steps, checkpoint)
        self.note(f"saved {checkpoint}", saved=str(checkpoint))

    def safe_to_save(self, *, together: bool | None = None) -> Soundness:
        """Whether the state is fit to be saved: no finding that ends the run is known, and every weight, saved buffer and
        optimizer tensor is finite. Truthy or falsy; printed, it says why. Waits for the device: ask where you save, not in every step.

        together: all ranks ask at once, and all get the same answer, which is no where one of them says no; by default where
        the guards of several ranks agree on halts. With False this rank's state alone is judged, as for a save by rank 0 only.
        Raises ``ValueError`` where a rank does not ask within five minutes.

        >>> from lossguard import Guard
        >>> import torch
        >>> model = nn.Linear(2, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Guard(model, optimizer) as guard:
        ...     if guard.safe_to_save():
        ...         print("torch.save(...)")
        torch.save(...)
        """
        if not self.closed:
            self.settle()
        reasons = [] if self._fatal is None else [f"{self._fatal.diagnosis} at step {self._fatal.step} ends the run"]
        reasons += nonfinite(self.model, self.optimizers, self._born)
        if self._asks_others(together):
            assert self._unison is not None
            others = [rank for rank in self._unison.ask(bool(reasons)) if rank != place.rank()]
            reasons += [f"so says rank {', '.join(map(str, others))}"] if others else []
        return Soundness(self.steps, tuple(reasons))

    @contextlib.contextmanager
    def saving(self, path: str | Path, *, together: bool | None = None) -> Iterator[Path]:
        """Write a checkpoint that never takes the place of a better one: ``with guard.saving("last.pt") as target: torch.save(state, target)``.

        What is written to ``target`` (a file or a folder, complete when the block ends) takes the place of ``path`` in one
        move, and only if the state is :meth:`safe_to_save`; an ill state goes to ``last-bad.pt``. If the block raises, or the
        process is killed in it, ``path`` is as it was. together: as there; all ranks enter the block, and any of them may write.

        >>> import tempfile
        >>> from lossguard import Guard
        >>> import torch
        >>> model = nn.Linear(2, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder, Guard(model, optimizer) as guard:
        ...     with guard.saving(f"{folder}/last.pt") as target:
        ...         torch.save(model.state_dict(), target)
        ...     [file.name for file in Path(folder).iterdir()], guard.last_good.after_steps
        (['last.pt'], 0)
        """
        path = Path(path)
        if place.first_here():
            for left in (beside(path, "draft"), beside(beside(path, "bad"), "draft")):
                _discard(left)  # of a process that was killed
        sound = self.safe_to_save(together=together)
        final = path if sound else beside(path, "bad")
        draft, unison = beside(final, "draft"), self._unison if self._asks_others(together) else None
        if not sound:
            self.veto(final, sound)
        try:
            yield draft
        except BaseException:
            _discard(draft)  # half a checkpoint is none, and the disk may be full
            if unison is not None:
                unison.tell(True)
            raise
        failed = unison.ask(False) if unison is not None else []
        if failed:
            logger.warning("lossguard: rank %s could not write its part of %s, which stays as it was", ", ".join(map(str, failed)), final)
            return
        if unison is None or place.rank() == 0:
            put_in_place(draft, final)
        if unison is not None:
            unison.ask(False)  # on a shared disk the draft is gone by now; a node with a disk of its own moves its own
            if place.first_here() and draft.exists():
                put_in_place(draft, final)
        if sound:
            self.saved(path)

    def veto(self, instead: str | Path | None, sound: Soundness) -> None:
        """Say that a checkpoint is not written, or where ``instead``."""
        what = "no checkpoint is written" if instead is None else f"the checkpoint goes to {instead}"
        good = self.last_good
        known = f"; the last good one is {good.path}, after {good.after_steps} steps" if good else ""
        logger.warning("lossguard: %s: %s%s", what, sound, known)
        self.note(f"{what}: {sound}", unfit=list(sound.reasons))

    def _asks_others(self, together: bool | None) -> bool:
        if together and self._unison is None:
            raise ValueError("together=True needs an initialised torch.distributed process group of several ranks; call init_process_group before Guard(...)")
        return self._unison is not None and (together if together is not None else self._agreement is not None and self._agreement.over is None)


# ---- files


def beside(path: str | Path, word: str) -> Path:
    """The same path with a word at the end of its name, before the suffix.

    >>> str(beside("runs/last.pt", "bad")), str(beside("checkpoint-100", "bad"))
    ('runs/last-bad.pt', 'checkpoint-100-bad')
    """
    path = Path(path)
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def put_in_place(draft: Path, final: Path) -> None:
    """The draft takes the place of what is there, in one move for a file; a folder's place is empty for a moment, in which
    the old one stands beside it. Nothing happens without a draft: this rank had nothing to write."""
    if draft.is_dir():
        aside = beside(final, "old")
        _discard(aside)
        if final.exists():
            final.rename(aside)
        draft.rename(final)
        _discard(aside)
    elif draft.exists():
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the place of what is
        draft.replace(final)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
