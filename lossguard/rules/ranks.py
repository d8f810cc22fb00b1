"""What ranks tell of each other: replicas that differ, ranks that stand out. History in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard.advice import ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity, number
from lossguard.host.columns import Array, Mask
from lossguard.host.history import History
from lossguard.host.peers import Exchange, Peers
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class ReplicaDivergence:
    """replica_divergence: weights that are equal on all ranks of a data-parallel run are not (survey).

    Every tenth round of votes each rank sends a projection of every parameter tensor on fixed random signs (of large tensors, of
    a spread sample). Law: the greatest minus the smallest projection over the ranks exceeds 1e-4 of the tensor's norm, for a
    tensor that should be equal: all of them under a ``DistributedDataParallel`` wrapper over all ranks, else those that were
    equal after they had moved. Both halt. If no wrapper is known and all tensors were equal at the start only, it is a warning.
    A number that is not finite on some ranks only differs. Of three ranks and more, those that stand apart from a majority are named.

    Why: the wrapped model is bypassed (``model.module(x)``, a second forward), hooks are lost by a copy or a compile; a
    checkpoint was loaded on one rank after wrapping; parameters unfrozen after wrapping are in no bucket; an update is
    skipped on one rank; a device computes wrongly.
    Do: call the wrapper itself; load before wrapping; compare one step's gradients over ranks; run the named rank's device
    through a burn-in for 30 minutes; go back to a checkpoint from before the first difference, or broadcast rank 0's weights.
    False alarm: methods that let replicas differ by design (local SGD, federated rounds, population training): mute it there.
    Buffers are not compared (batch-norm statistics differ in healthy runs), nor are shards, nor tensors that began unequal
    with no wrapper known; dropout and different batches change nothing, since gradients are averaged before the update.
    """

    diagnosis: ClassVar[str] = "replica_divergence"
    reads: ClassVar[tuple[str, ...]] = ("weight_print",)
    limit: float = 1e-4  # of a tensor's norm; our own choice: equal ranks differ by 0, other kernels' rounding of a sum by 1e-6, one lost update by 1e-3
    grace: int = 0  # steps; equal weights need none
    patience: int = 1  # answers; a difference never heals

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest exchange."""
        peers: Peers | None = history.notes.get("peers")
        if peers is None or peers.first is None or not peers.window or peers.window[-1].printed < 0:
            return None
        now = peers.window[-1]
        differs = self._differs(now)
        started, kept = ~self._differs(peers.first), self._kept(peers)
        graver = differs if history.notes.get("replicated") else differs & kept
        judged = graver if graver.any() else differs if started.all() else np.zeros_like(differs)
        if not judged.any():
            return None
        return self._finding(peers, now, judged, certain=bool(graver.any()))

    def _differs(self, one: Exchange) -> Mask:
        """Which tensors are not equal on all ranks: (parameters,)."""
        prints = np.where(np.isfinite(one.prints), one.prints, np.inf)
        all_sick = np.isinf(prints).all(axis=0)
        with np.errstate(invalid="ignore"):
            spread = np.ptp(prints, axis=0)
        # NaN falls on the sick side; where no rank has a number, that is another diagnosis
        differs: Mask = ~(spread <= self.limit * np.maximum(one.norms, 1e-30)) & ~all_sick & (spread != 0)
        return differs

    def _kept(self, peers: Peers) -> Mask:
        """Which tensors were equal once after they had moved."""
        kept = np.zeros(peers.window[-1].prints.shape[1], dtype=np.bool_)
        for one in peers.window:
            if peers.first is not None and one.printed > peers.first.printed:
                moved = (one.prints != peers.first.prints).any(axis=0)
                kept |= moved & ~self._differs(one)
        return kept

    def _finding(self, peers: Peers, now: Exchange, judged: Mask, *, certain: bool) -> Finding:
        first = int(np.flatnonzero(judged)[0])
        where = peers.names[first] if first < len(peers.names) else f"parameter {first}"
        apart = self._apart(now.prints[:, judged], np.maximum(now.norms[judged], 1e-30))
        named = ", ".join(peers.name(rank) for rank in apart)
        worst = float(np.ptp(now.prints[:, first]) / max(now.norms[first], 1e-30))
        evidence = (Evidence("difference over ranks, of the norm", worst, self.limit), Evidence("parameters that differ", float(judged.sum()), 0.0))
        wrapped = Cause("the wrapper is bypassed or its hooks are lost", 0.6 if not apart else 0.4, f"{judged.sum()} of {judged.size} tensors differ")
        alone = Cause("one rank's weights were written, or its device computes wrongly", 0.3 if not apart else 0.7, f"{named or 'no rank'} stands apart")
        missing = Cause("the model was never wrapped", 0.7, "all tensors were equal at the start, and no data-parallel wrapper was seen")
        fix = Remedy("call the wrapped model itself, not model.module, in every forward pass", {})
        back = Remedy(f"go back to a checkpoint from before step {now.printed}, load it on every rank before wrapping", {"rewind_before": now.printed})
        wrap = Remedy("wrap the model in DistributedDataParallel before training, or say Guard(mute={'replica_divergence'}) if ranks train apart", {})
        causes, remedies = ranked([(wrapped, [fix, back]), (alone, [back]), *([] if certain else [(missing, [wrap])])])
        message = f"ranks hold different weights in {judged.sum()} of {judged.size} tensors" + (f"; {named} differs from the others" if named else "")
        severity = Severity.HALT if certain else Severity.WARNING
        return Finding(self.diagnosis, severity, now.printed, where + (f" on {named}" if named else ""), message, evidence, causes, remedies)

    def _apart(self, prints: Array, norms: Array) -> list[int]:
        """The ranks that stand apart from a majority, which agrees."""
        ranks = len(prints)
        prints = np.where(np.isfinite(prints), prints, 1e300)
        agrees = (np.abs(prints[:, None] - prints[None]) <= self.limit * norms).all(axis=2).sum(axis=1)  # (ranks,): with how many
        leader = int(np.argmax(agrees))
        if ranks < 3 or agrees[leader] <= ranks / 2:
            return []
        same = (np.abs(prints - prints[leader]) <= self.limit * norms).all(axis=1)
        return [int(rank) for rank in np.flatnonzero(~same)]


@rule
@dataclass(frozen=True)
class RankOutlier:
    """rank_outlier: one rank's loss or gradient norm lies far from those of all others, again and again (survey; asks).

    Every tenth round of votes each rank tells the median of its losses, and of its total gradient norms, since the exchange before. Law:
    over the newest 4 exchanges of at least 3 ranks, a rank's deviation from the median of the others has one sign and always
    exceeds 8 times the spread (from the median difference between other ranks in these exchanges; at least 2 % of the median).
    Numbers that are not finite have diagnoses of their own and are left out. Rank, host and device are named.

    Why: that rank reads other data (a broken shard, a wrong sampler, labels of another version), or a file system gives it
    stale or zeroed files; its device computes wrongly; it runs in another mode or precision than the others.
    Do: swap the shards of the named rank and one other for 100 steps: if the deviation moves, it is the data, else the machine;
    then check the shard's labels and its share of repeated samples, or take the host out of the job.
    False alarm: ranks that are given different data on purpose (one domain or one task a rank, sequences sorted by length):
    mute it, or let every rank see a mixture. Gradient norms are equal on all ranks once they are averaged and then never deviate.
    """

    diagnosis: ClassVar[str] = "rank_outlier"
    reads: ClassVar[tuple[str, ...]] = ("weight_print",)
    window: int = 4  # exchanges, newest first; our own choice: one sign four times
    sigmas: float = 8.0  # spreads; our own choice, as for spikes of the loss (survey): healthy shards of one data set stay below 4
    floor: float = 0.02  # of the median; our own choice, so that ranks of nearly equal losses do not deviate by nothing
    fewest: int = 3  # ranks; of two, neither is the odd one
    grace: int = 0  # steps; the window is the grace
    patience: int = 1  # answers; the window is the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest exchanges."""
        peers: Peers | None = history.notes.get("peers")
        if peers is None or len(peers.window) < self.window or len(peers.places) < self.fewest:
            return None
        newest = list(peers.window)[-self.window :]
        for what in ("losses", "gradients"):
            table = np.stack([getattr(one, what) for one in newest])
            found = self._odd(table)
            if found is not None:
                return self._finding(peers, newest[-1].step, "loss" if what == "losses" else "gradient norm", table, *found)
        return None

    def _odd(self, table: Array) -> tuple[int, float] | None:
        """The rank that deviates most, and by how many spreads at least. table: (exchanges, ranks)."""
        if not np.isfinite(table).all():
            return None
        apart = np.abs(table - np.median(table, axis=1, keepdims=True)).min(axis=0)  # (ranks,): by how much at least
        rank = int(np.argmax(apart))
        others = np.delete(table, rank, axis=1)
        middle = np.median(others, axis=1)
        # differences of neighbours, since of few ranks one is its own median; sqrt(2) wider than a deviation
        spread = 1.4826 * np.median(np.abs(np.diff(others, axis=1))) / 2**0.5
        times = (table[:, rank] - middle) / np.maximum(np.maximum(spread, self.floor * np.abs(middle)), 1e-30)
        least = float(np.abs(times).min())
        one_sided = (times > 0).all() or (times < 0).all()
        return (rank, least) if one_sided and least > self.sigmas else None

    def _finding(self, peers: Peers, step: int, what: str, table: Array, rank: int, times: float) -> Finding:
        theirs, middle = float(np.median(table[:, rank])), float(np.median(table))
        evidence = (Evidence(f"spreads from the median {what}", times, self.sigmas), Evidence(f"{what} of the rank", theirs), Evidence("median of all", middle))
        data = Cause("that rank reads other data", 0.6, f"{what} {number(theirs)} against {number(middle)} in {self.window} exchanges in a row")
        machine = Cause("its device or precision differs", 0.3, "the model's weights are the same on all ranks")
        swap = Remedy("swap the data shards of this rank and another for 100 steps: if the deviation moves along, look at the shard", {"look_at": 100})
        out = Remedy("if it stays, take the host out of the job and test its device", {})
        causes, remedies = ranked([(data, [swap]), (machine, [out])])
        message = f"{peers.name(rank)} has a {what} of {number(theirs)}, the ranks' median is {number(middle)}"
        return Finding(self.diagnosis, Severity.WARNING, step, peers.name(rank), message, evidence, causes, remedies)
