"""Ranks stop together: one 8-byte vote a sampled step, counted exactly one such step later. Host values only.

A vote travels on a group of its own (gloo), so nothing enters the order of the training's own collectives. Every rank
votes at the same steps, known from the arguments alone, and takes what all voted one round later: so that all of them
see the same verdict at the same step, with no training collective open. A rank that leaves says so with its last vote,
which ends the voting everywhere at the same round; a rank that dies ends it by a closed connection, within the timeout.
Now and then ranks tell each other some numbers beside their votes, on the same group and heard one round later as well.
"""

from __future__ import annotations

import hashlib
import socket
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lossguard.findings import DIAGNOSES, Finding

OF_ALL = ("replica_divergence", "rank_outlier")  # found by all ranks alike: whose vote counts says nothing
VERDICT = "all ranks halt"
LEAVING = 1 << 62  # above every verdict: a rank that votes no more
PATIENCE = timedelta(minutes=30)  # that a vote may wait for the slowest rank: as long as torch's own collectives of gloo do
GATHER = timedelta(minutes=5)  # that the first rank waits for guards on the others
FAREWELL = timedelta(seconds=20)  # that a rank which ends well waits for the others to hear that it leaves
HASTE = timedelta(seconds=2)  # that one which ends by an error waits for the round that is under way: its message shall come soon


def wanted(agree: bool | None) -> bool:
    """Whether ranks are to agree: by default where a process group of several ranks exists."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if agree and not together:
        raise ValueError("agree=True needs an initialised torch.distributed process group of several ranks; call init_process_group before Guard(...)")
    return together if agree is None else agree


class Teller(Protocol):
    """What ranks tell each other: a float64 vector of one length on all of them."""

    length: int

    def due(self, round_number: int) -> bool:
        """Whether in this round."""

    def vector(self) -> torch.Tensor:
        """This rank's."""

    def hear(self, vectors: Sequence[torch.Tensor]) -> None:
        """Those of all ranks."""


_made = 0  # agreements made by this process: the same number on every rank


class Agreement:
    """The votes of one rank. Made on all ranks at once. Raises ``ValueError`` where ranks are configured differently.

    settings: what must be the same on every rank for votes to be cast at the same steps. model: what may be compared between
    ranks only where it is the same on all, as ``alike`` tells. place: what people call this rank's device.
    """

    def __init__(self, settings: Sequence[object], timeout: timedelta = PATIENCE, gather: timedelta = GATHER, *, model: object = None, place: str = "") -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._await_all(gather)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._names = sorted(DIAGNOSES)
        self._work: Any = None
        self._vote = torch.zeros(1, dtype=torch.int64)
        self._accused: Finding | None = None  # what this rank will vote for,
        self._voted: Finding | None = None  # and what it voted for last
        self.over: str | None = None  # why votes are no longer cast
        self.teller: Teller | None = None
        self._rounds = 0  # votes cast
        self._telling: Any = None
        self._heard: list[torch.Tensor] = []
        self.places: list[str] = []
        self.alike = False
        self._compare(settings, model, f"{socket.gethostname()}, {place}" if place else socket.gethostname())

    @property
    def telling(self) -> bool:
        """Whether ranks tell each other something beside the next vote, or did beside the last: a sample may wait for its update."""
        return self.over is None and self.teller is not None and (self.teller.due(self._rounds) or self.teller.due(self._rounds - 1))

    def accuse(self, finding: Finding) -> None:
        """This rank wants to halt, and says so in its next vote."""
        if self._accused is None or finding.severity > self._accused.severity:
            self._accused = finding

    def round(self) -> Finding | None:
        """Take the verdict of the last round and vote in the next. Returns the finding for which this rank halts now: that of
        all ranks, or its own once the others are gone."""
        if self.over is None:
            verdict = self._count()
            if LEAVING > verdict > 0:
                self.over = VERDICT
                return self._share(verdict)
            if verdict >= LEAVING:
                self.over = "a rank has ended its run"
            elif self.over is None and self._listen():
                self._voted = self._accused
                self._cast(0 if self._voted is None else self._encode(self._voted))
        accused, self._accused = (self._accused, None) if self.over is not None else (None, self._accused)
        return accused

    def share(self, mine: Any) -> list[Any]:
        """What each rank says, behind a verdict, when all ranks are at the same place."""
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, mine, group=self._group)
        return told

    def go_on(self) -> None:
        """The verdict was acted on without a halt, on all ranks: vote again."""
        self.over, self._accused, self._voted, self._work = None, None, None, None
        self._vote = torch.zeros(1, dtype=torch.int64)

    def leave(self, *, wait: bool) -> None:
        """Vote no more. wait: give the others a while to hear of it; not where this rank ends by an error, which then tells them
        if they come to the round that is under way, else they hear of it when its process ends."""
        if self.over is None:
            try:
                self._wait(FAREWELL if wait else HASTE)
                self._cast(LEAVING)
                self._wait(FAREWELL) if wait else None
                self._telling.wait(FAREWELL) if wait and self._telling is not None else None
            except RuntimeError:
                pass  # the others are gone, or busy: they will find the connection closed
            self.over = "this rank has ended its run"

    # ---- inside

    def _await_all(self, at_most: timedelta) -> None:
        """No rank may be without a guard: it would never vote."""
        global _made
        _made += 1
        store = _default_store()
        if store is None:
            return
        keys = [f"lossguard/{_made}/{rank}" for rank in range(self.world)]
        store.set(keys[self.rank], "here")
        try:
            store.wait(keys, at_most)
        except RuntimeError as error:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            raise ValueError(f"rank(s) {missing} have no Guard; make one on every rank, or say Guard(agree=False) where ranks may halt alone") from error

    def _compare(self, settings: Sequence[object], model: object, place: str) -> None:
        mine = [hashlib.sha256(repr(what).encode()).hexdigest() for what in ((*settings, self._names), model)]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, (*mine, place), group=self._group)
        others = [rank for rank, theirs in enumerate(everyone) if theirs[0] != mine[0]]
        if others:
            raise ValueError(f"rank {self.rank} and rank(s) {', '.join(map(str, others))} have guards with different arguments; give every rank the same")
        self.alike = model is not None and all(theirs[1] == mine[1] for theirs in everyone)
        self.places = [theirs[2] for theirs in everyone]

    def _cast(self, vote: int) -> None:
        self._vote = torch.tensor([vote], dtype=torch.int64)
        self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self.teller is not None and self.teller.due(self._rounds):  # a rank that leaves tells once more: the others wait for it
            try:
                mine = self.teller.vector()
            except Exception as error:  # a fault of our own: the others must not wait for this rank
                warnings.warn(f"lossguard: this rank cannot tell the others its numbers ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=4)
                mine = torch.full((self.teller.length,), float("nan"), dtype=torch.float64)
            self._heard = [torch.empty_like(mine) for _ in range(self.world)]
            self._telling = dist.all_gather(self._heard, mine, group=self._group, async_op=True)
        self._rounds += 1

    def _listen(self) -> bool:
        """Take what ranks told in the last round. False if one of them has gone meanwhile."""
        if self._telling is None or self.teller is None:
            return True
        try:
            self._telling.wait()
        except RuntimeError as error:
            self._end(error)
            return False
        self._telling = None
        try:
            self.teller.hear(self._heard)
        except Exception as error:
            warnings.warn(f"lossguard: what the ranks told could not be read ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=4)
        return True

    def _count(self) -> int:
        """The verdict of the last round. Waits for the slowest rank, for which the next training collective would wait as long."""
        try:
            self._wait(None)
        except RuntimeError as error:
            self._end(error)
            return 0
        return int(self._vote)

    def _wait(self, at_most: timedelta | None) -> None:
        if self._work is not None:
            work, self._work = self._work, None
            work.wait() if at_most is None else work.wait(at_most)

    def _end(self, error: Exception) -> None:
        self.over = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        warnings.warn(f"lossguard: ranks no longer agree on halts, a rank has gone ({self.over}); this rank decides alone", RuntimeWarning, stacklevel=4)

    def _encode(self, finding: Finding) -> int:
        """Orders votes: the gravest, then the earliest, then the highest rank."""
        step = (1 << 32) - 1 - min(max(finding.step, 0), (1 << 32) - 1)
        return (1 + int(finding.severity)) << 57 | step << 25 | self._names.index(finding.diagnosis) << 16 | self.rank

    def _share(self, verdict: int) -> Finding | None:
        """The accusing rank's finding, on all ranks, with the name of the accuser."""
        accuser = verdict & 0xFFFF
        box: list[Any] = [None]
        if accuser == self.rank and self._voted is not None:
            where = self._voted.where
            if self._voted.diagnosis not in OF_ALL:
                where += f" on rank {self.rank} of {self.world} ({socket.gethostname()})"
            box = [replace(self._voted, where=where).to_dict()]
        try:
            dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, accuser), group=self._group)
        except RuntimeError as error:
            self._end(error)
        return Finding.from_dict(box[0]) if box[0] else self._voted


def _default_store() -> Any:
    """The store that the ranks met at: it tells which rank is missing. torch has no public way to it; without it, the making of
    the group waits for the missing rank and then fails by itself, without its name."""
    found = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if found is None else found()
