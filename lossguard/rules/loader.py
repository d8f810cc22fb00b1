"""What the data loader hands out. Fingerprints of batches in, finding or None out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lossguard import readings
from lossguard.advice import informational, ranked
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.host.history import Array, History
from lossguard.rules.rule import rule


@rule
@dataclass(frozen=True)
class DuplicateBatches:
    """duplicate_batches: each batch comes several times in a row, always equally often (survey).

    W workers that share a seed, or that all read the same stream, deliver in turn, so every batch comes exactly W times
    in a row. Law: over the newest 256 batches that were shown, the longest run of equal batches is W >= 2; from the first
    run of this very length on, such runs hold at least 75 % of the batches, there are at least 8 of them, and they hold at
    least 6 different batches. So workers that are started anew with one seed are heard as well. Chance repeats have runs of
    all lengths, and a small data set repeats at the distance of an epoch: neither has the pattern. Law (one batch): 64 batches and more,
    each handed out anew, are one and the same, and validation shows that this is not all the data there is: training lies below it by a
    quarter of what was learned. A full-batch run has a single batch as well, and is silent where the loader is known to have one.

    Why: a worker's own random generator (numpy's, or a Python one seeded in ``__init__``) starts equal in every worker;
    an iterable data set that does not split its stream by ``get_worker_info()``; a sampler that repeats its indices;
    ``next(iter(loader))`` in the loop, which begins anew each time.
    Do: seed each worker (``worker_init_fn`` with ``torch.initial_seed() % 2**32``), or give worker k every W-th item of
    the stream; until then set num_workers=0. An epoch holds W times fewer distinct samples than it seems.
    False alarm: loops that show the guard a copy of one batch for each of several inner steps (data echoing, several
    epochs on one rollout). Show each batch once, or not at all, or mute the diagnosis. A data set in one batch, from a loader
    that the guard does not go through, beside a gap to validation: that is overfitting. The same tensor object given
    again to ``guard.batch`` counts as meant; adversarial and reinforcement losses get information only.
    """

    diagnosis: ClassVar[str] = "duplicate_batches"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    window: int = 256  # newest batches looked at; our own choice, enough for 16 workers
    alone: int = 64  # batches that are all the same; our own choice, four times what the runs need
    gap: float = readings.GAP  # of what was learned: training below validation, in 3 evaluations; as in overfitting
    runs: int = 8  # runs of the same length; our own choice, chance gives all runs one length with less than 0.25 ** 8
    distinct: int = 6  # different batches among them; our own choice, few mean a tiny data set and not a loader's fault
    share: float = 0.75  # of the batches within such runs; our own choice, the end of an epoch cuts one run short
    pace: int = 10  # steps; asked at most once in so many, the law needs at least 16 batches
    grace: int = 0  # steps; the runs are the grace
    patience: int = 1  # answers; the runs are the patience

    def check(self, history: History) -> Finding | None:
        """The law of the class docstring, on the newest data."""
        prints = history.fingerprints(self.window)
        shown = np.flatnonzero(~np.isnan(prints))
        prints = prints[shown]
        fresh = np.flatnonzero(prints[1:] != prints[:-1]) + 1  # where a run begins
        if not fresh.size:
            return self._one(history, prints.size)
        if fresh.size == prints.size - 1 or fresh.size <= self.runs:
            return None
        lengths = np.diff(fresh)  # of whole runs: neither the first nor the last may be cut
        longest = int(lengths.max())
        whole = lengths == longest
        since = int(np.argmax(whole))
        if longest < 2 or whole.sum() < self.runs or longest * whole.sum() < self.share * lengths[since:].sum():
            return None
        first = prints[fresh[:-1][whole]]
        if np.unique(first).size < self.distinct:
            return None
        step = int(history.loss_steps(self.window)[shown[fresh[:-1][whole][0] + 1]])
        return self._finding(history, step, longest, first)

    def _one(self, history: History, shown: int) -> Finding | None:
        """Law (one batch)."""
        if shown < self.alone or history.notes.get("loader_batches") == 1 or informational(history):
            return None
        gap = readings.apart(readings.curves(history))
        if not gap > self.gap:
            return None
        evidence = (Evidence("batches in a row that are one and the same", float(shown), float(self.alone)),
                    Evidence("gap between the curves over what was learned", gap, self.gap))  # fmt: skip
        look = Remedy("go through the loader, for batch in loader: next(iter(loader)) begins anew each time; and shuffle=True", {"shuffle": True})
        causes, remedies = ranked([(Cause("the same samples again", 0.9, f"{shown} batches that were handed out anew hold the same numbers"), [look])])
        message = f"the last {shown} batches are one and the same, and what is learned from it does not hold for validation"
        return Finding(self.diagnosis, Severity.WARNING, history.step, "data loader", message, evidence, causes, remedies)

    def _finding(self, history: History, step: int, times: int, runs: Array) -> Finding:
        workers = history.notes.get("loader_workers")
        seed = Remedy("seed each worker: worker_init_fn=lambda i: numpy.random.seed(torch.initial_seed() % 2**32)", {"seed_workers": True})
        split = Remedy("split an iterable data set by torch.utils.data.get_worker_info(); until then num_workers=0", {"num_workers": 0})
        name, confidence, because = "loader workers share a seed or a stream", 0.6, f"every batch comes {times} times in a row"
        if workers == times:
            confidence, because = 0.95, f"every batch comes {times} times in a row, and the loader has {workers} workers"
        elif workers in (0, 1):
            name, confidence = "the data set or its sampler repeats itself", 0.6
            split = Remedy("look at the sampler's first 20 indices", {"look_at": 20})
        causes, remedies = ranked([(Cause(name, confidence, because), [seed, split])])
        severity = Severity.INFO if informational(history) else Severity.WARNING
        evidence = (Evidence("runs of equal batches", float(runs.size), float(self.runs)), Evidence("batches in each run", float(times), 1.0))
        message = f"each batch comes {times} times in a row ({runs.size} runs): an epoch holds 1/{times} of what it seems to"
        return Finding(self.diagnosis, severity, step, "data loader", message, evidence, causes, remedies)
