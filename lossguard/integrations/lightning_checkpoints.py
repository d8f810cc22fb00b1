"""No checkpoint of an ill state takes the place of a good one under a Trainer. Its saves flow in; those that are sound go on.

``ModelCheckpoint`` decides, rotates and deletes in ``_save_topk_checkpoint`` and ``_save_last_checkpoint``: where the state is
ill, neither runs, so nothing is pushed out of the best k and ``last.ckpt`` stays. Every other save goes through
``Trainer.save_checkpoint`` and is diverted to ``NAME-bad.ckpt``. The methods are replaced on the instances, so the order of
callbacks does not matter. Needs no trainer package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lossguard.guard import Guard
from lossguard.safekeeping import Soundness, beside

DECIDES = ("_save_topk_checkpoint", "_save_last_checkpoint")  # of ModelCheckpoint: where it rotates and deletes


class Vetoes:
    """Stands before the saves of one fit until :meth:`close`."""

    def __init__(self, trainer: Any, guard: Guard) -> None:
        self._trainer, self._guard = trainer, guard
        self._asked: tuple[Any, Soundness | None] = None, None  # when the guard was asked last, and its answer
        self._diverted: Any = None  # when a save was diverted
        self._replaced: list[tuple[Any, str]] = []
        for saver in trainer.checkpoint_callbacks:
            for name in DECIDES:
                if callable(getattr(saver, name, None)):
                    self._replace(saver, name, self._decide)
        self._replace(trainer, "save_checkpoint", self._save)
        self._replace(trainer.strategy, "remove_checkpoint", self._remove)

    def close(self) -> None:
        """Everything is as it was."""
        while self._replaced:
            owner, name = self._replaced.pop()
            vars(owner).pop(name, None)

    def _replace(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        if name in vars(owner):
            return  # somebody else stands there already
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **keywords: by(original, *args, **keywords))
        self._replaced.append((owner, name))

    def _now(self) -> tuple[int, int]:
        return self._trainer.global_step, self._guard.steps

    def _sound(self, instead: str | None = None) -> Soundness:
        """The guard's answer, asked for once a step. After an exception nobody can say whether the other ranks ask, too."""
        when, sound = self._asked
        new = sound is None or when != self._now()
        if sound is None or new:
            sound = self._guard.safe_to_save(together=False if self._trainer.interrupted else None)
            self._asked = self._now(), sound
        if not sound and (new or instead):
            self._guard.veto(instead, sound)
        return sound

    def _decide(self, original: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        return original(*args, **keywords) if self._sound() else None

    def _save(self, original: Callable[..., Any], filepath: Any, *args: Any, **keywords: Any) -> Any:
        head, slash, name = str(filepath).rpartition("/")
        instead = f"{head}{slash}{beside(name, 'bad')}"
        if not self._sound(instead):
            self._diverted = self._now()
            return original(instead, *args, **keywords)
        done = original(filepath, *args, **keywords)
        self._guard.saved(filepath)
        return done

    def _remove(self, original: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """A callback that rotates in its own way believes that its newest file stands where it wanted it."""
        return None if self._diverted == self._now() else original(*args, **keywords)
