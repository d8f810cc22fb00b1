"""What is tried before a run ends: a lower learning rate, then the last good state, then the halt. Opt-in and bounded.

Findings that would halt flow in; a cured run, or the finding to halt with, flows out. ``Guard(..., recover=Ladder())`` takes
a snapshot of weights, buffers, optimizers, loss scaler, random generators and of what the guard knows every ``every`` steps.
Such a snapshot counts as good once the rules have judged past its step, and if all of it is finite.

What a loop sees: ``guard.step(loss)`` returns where it would have raised, and weights, optimizer, scaler, generators and all
of ``also`` are those of the snapshot, bit for bit; gradients are zero. The data goes on with the next batch: nothing is read
twice. ``guard.steps`` goes on too: it counts iterations, so that a record stays in order. ``guard.recovery.cures`` says what
was done when. A learning rate that was cut is multiplied while the optimizer steps and stands uncut in the group otherwise,
so that any scheduler, which computes its own, keeps the cut without knowing of it; it is part of ``guard.state_dict()``.

Updates that ``skip=`` leaves out on the device do no harm and need no cure: that is the rung below this ladder.

Several ranks climb together, at the step at which all of them would have halted, to the newest snapshot that all of them hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossguard import place, resume
from lossguard.actions import logger
from lossguard.findings import Finding, Severity, check_names
from lossguard.host import agreement
from lossguard.host.handover import Handover
from lossguard.host.history import History
from lossguard.recovery_rates import Rates
from lossguard.rules.judge import Judge
from lossguard.safekeeping import Checkpoint, Checkpoints
from lossguard.snapshot import PLACES, Snapshot, State
from lossguard.soundness import born_finite, finite_flags, nonfinite

CURABLE = ("nonfinite_input", "nonfinite_loss", "nonfinite_activation", "nonfinite_gradient", "nonfinite_weight", "loss_spike", "diverging_loss",
           "exploding_gradient", "update_ratio_high")  # fmt: skip
COOLING = "seen in the cool-down after a cure"
NOT_THE_RATE = ("nonfinite_input",)  # the data's fault: going back suffices


@dataclass(frozen=True)
class Ladder:
    """How a run may be cured. Give it as ``Guard(model, optimizer, recover=Ladder())``.

    Only findings that would halt are cured; ``halt={"diverging_loss", ...}`` makes more of them do so. A finding over finite
    numbers first has the learning rate cut; a non-finite one, or one that comes back after the cool-down, goes back to the last
    good snapshot, with the rate cut as well; when all are used up, or no snapshot is from before the finding, the run halts.

    also: objects with ``state_dict`` and ``load_state_dict`` that belong to the state: schedulers, averaged weights. place:
    where snapshots lie, ``host`` (pinned memory) or ``device``; None keeps none. Of each there are ``keep`` good ones and one
    more, the size of weights, buffers and optimizer state together; ``guard.memory`` counts them. load: called without a
    suitable snapshot, with the last good checkpoint of ``guard.saved`` (``.path``, ``.after_steps``) or None: it must load
    weights and optimizer from disk, on all ranks; what the guard knows begins anew then.

    Raises ``ValueError`` for what cannot work.

    >>> Ladder(rollbacks=2).factor
    0.5
    """

    cures: Iterable[str] = CURABLE  # diagnoses
    cuts: int = 1  # of the learning rate without going back, in the whole run; our own choice, one look at whether it helps
    rollbacks: int = 3  # in the whole run; our own choice, because what three halved rates do not cure is no matter of the rate
    factor: float = 0.5  # on every learning rate at each cut and rollback; our own choice, 1.0 leaves it alone
    every: int = 100  # steps between snapshots; PaLM went back about 100 steps (survey)
    keep: int = 1  # good snapshots
    settle: int | None = None  # steps until a snapshot counts as good; None: lag, and the patience of the rules in sampled steps
    cooldown: int = 50  # steps after a cure in which findings over finite numbers wait; our own choice, the windows of the spike rule
    place: str | None = "host"
    random: bool = True  # put the random generators back, too; with False a loop that draws its data from them sees other data
    also: Sequence[Any] = ()
    load: Callable[[Checkpoint | None], Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cures", check_names(self.cures, "cures"))
        for name, low in (("cuts", 0), ("rollbacks", 0), ("every", 1), ("keep", 1), ("cooldown", 0), ("settle", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"Ladder({name}=) must be an integer of at least {low}, got {value!r}")
        if not 0.0 < self.factor <= 1.0:
            raise ValueError(f"Ladder(factor=) must be above 0 and at most 1, got {self.factor!r}")
        if self.place not in (*PLACES, None):
            raise ValueError(f"Ladder(place=) must be 'host', 'device' or None, got {self.place!r}")
        if self.place is None and self.load is None and self.rollbacks:
            raise ValueError("Ladder(place=None) keeps no snapshot to go back to; give load= as well, or rollbacks=0")
        for thing in self.also:
            if not callable(getattr(thing, "state_dict", None)) or not callable(getattr(thing, "load_state_dict", None)):
                raise ValueError(f"Ladder(also=) holds {type(thing).__name__}, which has no state_dict and load_state_dict; leave it out or give it both")

    @property
    def settings(self) -> tuple[object, ...]:
        """What must be the same on every rank."""
        numbers = (self.cuts, self.rollbacks, self.factor, self.every, self.keep, self.settle, self.cooldown, self.place)
        return (sorted(self.cures), *numbers, len(self.also), self.load is None)


@dataclass(frozen=True)
class Cure:
    """One thing that was done. step: how many steps had been made. what: ``cut``, ``rollback`` or ``load``. to: how many
    steps led to the state that was taken back, None for a cut. factor: on every learning rate from then on."""

    step: int
    what: str
    diagnosis: str
    to: int | None
    factor: float


class Calls(NamedTuple):
    """What a recovery asks of its guard."""

    drop: Callable[[], None]  # forget what is under way from the device
    begin: Callable[[], None]  # call :meth:`Recovery.begin`
    note: Callable[..., None]  # a line in the record, and its details


@dataclass
class Recovery:
    """The ladder of one guard; without a ladder it does nothing. cures: what was done, oldest first."""

    ladder: Ladder | None
    state: State
    history: History
    judge: Judge
    checkpoints: Checkpoints
    guard: Calls
    every: int = 10  # steps between samples
    lag: int = 0
    agreement: agreement.Agreement | None = None
    cures: list[Cure] = field(default_factory=list)
    past: list[Finding] = field(default_factory=list)  # what was cured, and what had been found before
    _good: list[Snapshot] = field(default_factory=list)
    _new: Snapshot | None = None  # not judged yet
    _spare: Snapshot | None = None
    _taken: int | None = None  # steps at the newest snapshot
    _calm: int = 0  # findings over finite numbers wait until so many steps
    _flags: list[Handover] = field(default_factory=list)
    _born: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rates = Rates(self.state.optimizers if self.ladder is not None else (), self._before_step)
        if self.ladder is None:
            return
        if not isinstance(self.ladder, Ladder):
            raise ValueError(f"recover= must be a lossguard.recovery.Ladder, got {self.ladder!r}; for instance Guard(..., recover=Ladder(rollbacks=2))")
        if self.agreement is None and place.world() > 1:
            raise ValueError("recover= needs ranks that go back together; leave agree= at its default, and call init_process_group before Guard(...)")
        self.state = replace(self.state, also=tuple(self.ladder.also))
        self._born = born_finite(self.state.model)
        patience = max((r.patience for r in self.judge.rules if r.diagnosis in self.ladder.cures), default=1)
        votes = 2 if self.agreement is not None else 1  # samples until all ranks know what one has found; one more for the sample itself
        self._settle = self.lag + ((patience + votes) * self.every if self.ladder.settle is None else self.ladder.settle)

    def join(self, *things: Any) -> None:
        """These belong to the state as well, such as a trainer's schedulers; nothing without a ladder."""
        if self.ladder is not None:
            self.state = replace(self.state, also=(*self.state.also, *things))

    # ---- snapshots

    def _before_step(self) -> None:
        if self._taken is None:
            self.guard.begin()

    def begin(self, step: int) -> None:
        """The first update is about to come: this state is the first to go back to."""
        if self.ladder is None or self._taken is not None:
            return
        self._warn_of_schedulers()
        self._take(step)
        if self._new is not None:
            self._good, self._new = [self._new], None  # what a run begins with is what it was given

    def look(self, step: int, *, regular: bool) -> None:
        """So many steps are done. regular: a step at which all ranks sample. By steps alone, so that all ranks hold the same."""
        if self.ladder is None or self._taken is None:
            return
        if self._new is not None and step >= self._new.step + self._settle:
            new, self._new = self._new, None
            if self._finite(step):
                self._good.append(new)
            else:
                self._spare = new
        if self._new is None and regular and step - self._taken >= self.ladder.every:
            self._take(step)

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots."""
        return sum(s.nbytes for s in (*self._good, self._new, self._spare) if s is not None)

    def _take(self, step: int) -> None:
        assert self.ladder is not None
        self._taken = step
        if self.ladder.place is None:
            return
        if len(self._good) > self.ladder.keep:
            self._spare = self._good.pop(0)  # not before its memory is needed: another rank may have no newer one
        own = resume.states({"history": self.history}) if self.history.step >= 0 else {}
        self._new = Snapshot.take(step, self.state, own, place=self.ladder.place, random=self.ladder.random, reuse=self._spare)
        self._spare = None
        self._flags = []
        for flag in finite_flags(self.state.model, self.state.optimizers, self._born):
            self._flags.append(Handover(self.lag))
            self._flags[-1].send(step, flag.to(torch.float32).reshape(1), None)

    def _finite(self, step: int) -> bool:
        return all(numbers is None or bool(numbers.all()) for flag in self._flags for numbers, _ in flag.receive(step, everything=True))

    # ---- the ladder

    def cure(self, finding: Finding, step: int) -> Finding | None:
        """Cure the run of what would halt it now; None if that was done, else the finding to halt with."""
        together = self.agreement is None or self.agreement.over == agreement.VERDICT
        if self.ladder is None or not together:
            return finding
        if finding.diagnosis not in self.ladder.cures:
            return finding
        finite = not finding.diagnosis.startswith("nonfinite")
        count = {what: sum(c.what == what for c in self.cures) for what in ("cut", "rollback", "load")}
        why = ""
        if finite and step < self._calm:
            self._absorb(finding, COOLING, step)
        elif finite and count["cut"] < self.ladder.cuts and self.ladder.factor < 1.0:
            self._done(finding, Cure(step, "cut", finding.diagnosis, None, self._cut(finding)))
        elif count["rollback"] + count["load"] >= self.ladder.rollbacks:
            why = "nothing is left to try"
        elif (target := self._common(finding.step)) is not None:
            self._back_to(target)
            self._done(finding, Cure(step, "rollback", finding.diagnosis, target.step, self._cut(finding)))
        else:
            good = self.checkpoints.last_good(finding.step)
            why = self._load(good)
            if not why:
                self._done(finding, Cure(step, "load", finding.diagnosis, good.after_steps if good else None, self._cut(finding)))
        if why:
            tried = f"{count['cut']} cuts of the learning rate, {count['rollback']} rollbacks and {count['load']} loads came before it" if self.cures else ""
            return replace(finding, note="; ".join(words for words in (finding.note, why, tried) if words))
        if self.agreement is not None:
            self.agreement.go_on()
        return None

    def repeats(self, finding: Finding, step: int) -> bool:
        """Whether it was told in a cool-down already: until that is over it may be found anew at every step."""
        return step < self._calm and any(f.diagnosis == finding.diagnosis and f.note == COOLING for f in self.past)

    def _cut(self, finding: Finding) -> float:
        assert self.ladder is not None
        if finding.diagnosis not in NOT_THE_RATE:
            self.rates.factor *= self.ladder.factor
        return self.rates.factor

    def _done(self, finding: Finding, cure: Cure) -> None:
        assert self.ladder is not None
        self.cures.append(cure)
        self._calm, self._taken = cure.step + self.ladder.cooldown, cure.step
        if self._new is not None:
            self._spare, self._new = self._new, None  # nobody has judged it yet
        where = {"cut": "", "load": "the state is that of the checkpoint", "rollback": f"the state is that after {cure.to} steps"}[cure.what]
        rate = f"the learning rate is multiplied by {cure.factor:g}" if cure.factor != 1.0 else ""
        note = f"cured by a {cure.what} after {cure.step} steps: {' and '.join(words for words in (rate, where) if words)}"
        self._absorb(finding, note, cure.step)
        words = f"{finding.diagnosis} at step {finding.step} {note}"
        logger.warning("lossguard: %s", words)
        self.guard.note(words, cure=asdict(cure))

    def _absorb(self, finding: Finding, note: str, step: int) -> None:
        """What was found so far is past; the rules look at what comes as if nothing had been found."""
        events = self.judge.retire()
        same = [i for i, f in enumerate(events) if (f.diagnosis, f.step) == (finding.diagnosis, finding.step)]
        told = replace(events[same[0]] if same else finding, severity=min(finding.severity, Severity.WARNING), note=note)
        events = [told if i in same else f for i, f in enumerate(events)] if same else [*events, told]
        for event in events:
            old = next((i for i, f in enumerate(self.past) if f.diagnosis == event.diagnosis and event.note == f.note), None)
            if old is None:
                self.past.append(event)
            else:
                count = self.past[old].count + event.count
                self.past[old] = replace(self.past[old], count=count, last_step=event.last_step or event.step)

    def _common(self, step: int) -> Snapshot | None:
        """The newest good snapshot from before a finding's step that all ranks hold."""
        mine = {s.step: s for s in self._good if s.step <= step}
        held = [set(mine)] if self.agreement is None else [set(theirs) for theirs in self.agreement.share(sorted(mine))]
        common = set.intersection(*held)
        return mine[max(common)] if common else None

    def _back_to(self, target: Snapshot) -> None:
        self.guard.drop()
        target.put_back(self.state)
        self._good = [s for s in self._good if s.step <= target.step]
        if target.own:
            resume.restore({"history": self.history}, target.own)
        else:
            self._begin_anew()

    def _begin_anew(self) -> None:
        """The history as it was before the first step, of the same model."""
        fresh, known = History(loss_family=self.history.loss_family, optimizers=self.history.optimizers).state_dict(), self.history.state_dict()
        self.history.load_state_dict({**fresh, **{name: known[name] for name in ("params", "units", "heads")}})

    def _load(self, good: Checkpoint | None) -> str:
        """Load from disk; why that is no cure, or nothing."""
        assert self.ladder is not None
        if self.ladder.load is None:
            return "no good snapshot is from before it"
        why = ""
        try:
            self.ladder.load(good)
        except Exception as error:  # the run ends by its finding, not by a second error that hides it
            why = f"the state could not be loaded ({type(error).__name__}: {error})"
        why = why or "; ".join(nonfinite(self.state.model, self.state.optimizers, self._born))
        if self.agreement is not None:
            why = next((words for words in self.agreement.share(why) if words), "")
        if not why:
            self.guard.drop()
            self._begin_anew()
            self._good = []
        return why

    def _warn_of_schedulers(self) -> None:
        if self.ladder is not None and not self.state.also and any(hasattr(o.step, "_wrapped_by_lr_sched") for o in self.state.optimizers):
            logger.warning("lossguard: a scheduler drives the learning rate and is no part of the snapshots; give Ladder(also=[scheduler])")

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Counters and what was found, no snapshot."""
        cures = [[c.step, c.what, c.diagnosis, c.to, c.factor] for c in self.cures]
        return {"cures": cures, "past": [f.to_dict() for f in self.past], "calm": self._calm, "factor": self.rates.factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; the first snapshot is taken anew."""
        self.cures = [Cure(*c) for c in state["cures"]]
        self.past = [Finding.from_dict(f) for f in state["past"]]
        self._calm, self.rates.factor = state["calm"], state["factor"]
        self._good, self._new, self._taken = [], None, None

    def close(self) -> None:
        """Learning rates are what their owners set again; snapshots are gone."""
        self.rates.close()
        self._good, self._new, self._spare = [], None, None
