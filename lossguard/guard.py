"""The guard: wires taps, tape, hand-over, history, rules and actions together. No formula, no threshold of a rule.

Users call it once an iteration; it raises only ``TrainingHalted`` and errors about how it was called.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lossguard import actions, arguments, batches, cluster, exits, facts, place, resume, watching
from lossguard.aftermath import Aftermath
from lossguard.config import Configured, configurable
from lossguard.device.capture import NO_STEP, capturing
from lossguard.device.recorder import Recorder
from lossguard.device.spikes import Limit
from lossguard.device.taps import Taps
from lossguard.faults import Faults
from lossguard.findings import Finding, Severity, check_names
from lossguard.host import agreement
from lossguard.host.handover import Handover
from lossguard.host.history import History
from lossguard.host.intake import Intake
from lossguard.introduce import Introduction
from lossguard.locating import Locator
from lossguard.phases import Phased
from lossguard.pulses import Pulses, check_loss, evaluation
from lossguard.recovery import Calls, Ladder, Recovery
from lossguard.rules import Rule
from lossguard.rules.judge import Judge
from lossguard.safekeeping import Keeper
from lossguard.schedule import DENSE, Schedule
from lossguard.sinks import Record, Sink
from lossguard.skipping import Skipping
from lossguard.snapshot import State
from lossguard.telling import Teller
from lossguard.trackers.feed import Feed
from lossguard.watchdog import Watchdog

LAG = 8  # steps between recording and judging on an accelerator: more than the host ever runs ahead, so nothing waits


class Guard(Configured, Keeper, Teller, Phased):
    """Watches one training run.

    model: any ``nn.Module``. optimizers: one ``torch.optim.Optimizer`` or a list. every: interval, in steps, of the
    costly signals. dense: how many first steps are all sampled. halt: diagnosis names, or a ``Severity`` and above, that
    raise ``TrainingHalted``; None for never. skip: diagnoses whose update is left out on the device
    (``nonfinite_gradient``, ``exploding_gradient``). skip_by: ``"found_inf"`` (fused optimizers), or ``"restore"``: the others
    too, for a copy of weights and optimizer state. mute: diagnosis names not to report. rules: rule objects that
    replace the default of the same diagnosis or join them. record: a folder for the run's record; after a halt
    it holds a folder ``halt-STEP`` with what a post-mortem needs. keep_batch: the batch too, True for up to 64 MiB or a cap in bytes
    (holds ``lag + 2`` batches; 0.1 ms a step). exit_codes: diagnosis -> code of the process, where it differs from ``lossguard.exits``. scaler: the
    ``GradScaler``, so that gradient norms have their true scale. accumulate: micro-batches per update, where the guard
    is stepped for each. loss_family: such as ``"adversarial"`` where the loss's fall means nothing. lag: steps between
    recording and judging (0 on a CPU, 8 elsewhere). sinks: callables that get each finding. trackers: what gets scalars and
    findings, see ``lossguard.trackers``. phases: ``"hooks"`` for a plain loop, ``"explicit"`` for trainers that call
    ``after_backward`` themselves, once before each update. agree: whether the ranks of a ``torch.distributed`` job halt
    together, at the same step, within two regular samples; None: where there are several.
    locate: ``lambda x, y: criterion(model(x), y)``, the loss of a batch as it was shown; a halt by a non-finite value then runs
    the step again and names the operation (holds a copy of the weights and ``lag + 2`` batches; see ``lossguard.culprit``).
    stall: whether a thread watches for ``stalled_training``, or the least number of seconds it waits; None: where ranks agree.
    recover: what is tried before a halt, a ``lossguard.recovery.Ladder``; None for nothing.
    compiled: look into what ``torch.compile`` makes, at the price of a second compilation and of other rounding in sampled
    steps where the compiler fuses.

    Raises ``ValueError`` for arguments that cannot work, and says what to do. Keywords may also stand in a file
    (:meth:`from_config`), or in the environment, which goes before the code: ``LOSSGUARD_EVERY=20``.

    >>> model = torch.nn.Linear(4, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Guard(model, optimizer) as guard:
    ...     for _ in range(3):
    ...         loss = model(torch.ones(8, 4)).square().mean()
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    ...         guard.step(loss)
    >>> guard.findings
    []
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        optimizers: Any,
        *,
        every: int = 10,
        dense: int = DENSE,
        halt: Iterable[str] | Severity | str | None = Severity.HALT,
        skip: Iterable[str] | Mapping[str, Limit | None] = (),
        skip_by: str = "found_inf",
        mute: Iterable[str] = (),
        rules: Iterable[Rule] = (),
        record: str | Path | None = None,
        keep_batch: bool | int = False,
        exit_codes: Mapping[str, int] | None = None,
        scaler: Any = None,
        accumulate: int | None = None,
        loss_family: str | None = None,
        lag: int | None = None,
        sinks: Sequence[Sink] = (),
        trackers: Iterable[Any] = (),
        phases: str = "hooks",
        agree: bool | None = None,
        locate: Callable[[Any, Any], Any] | None = None,
        stall: bool | float | None = None,
        recover: Ladder | None = None,
        compiled: bool = False,
    ) -> None:
        model = arguments.a_model(model)
        parameters = list(model.parameters())
        self.optimizers = arguments.some_optimizers(optimizers)
        self.every, self.dense = arguments.at_least(1, every, "every"), arguments.at_least(0, dense, "dense")
        accumulate = None if accumulate is None else arguments.at_least(1, accumulate, "accumulate")
        if phases not in ("hooks", "explicit"):
            raise ValueError(f"unknown phases {phases!r}; expected 'hooks' or 'explicit'")
        chosen = arguments.some_rules(rules)
        self._policy = actions.Policy.of(halt)
        self.model, self.steps, self.closed = model, 0, True  # closed until it is whole
        self._muted = check_names(mute, "mute")
        self._scaler = scaler = arguments.a_scaler(scaler, optimizers)
        on_host = all(p.device.type == "cpu" for p in parameters)
        lag = (0 if on_host else LAG) if lag is None else arguments.at_least(0, lag, "lag")
        self._faults = Faults()
        self._codes = exits.check_codes(exit_codes, {rule.diagnosis: rule for rule in chosen})
        self._keep()
        self._aftermath = Aftermath(record or "", self.optimizers, scaler, arguments.batch_cap(keep_batch, record), lag, self._checkpoints)
        about = {"torch": torch.__version__, "model": type(model).__name__, "every": every}
        self._record: Record | None = None if record is None else self._faults.watch(Record, place.own_folder(record), about, part="the record")
        self._skipping, self._locator = Skipping(skip, self.optimizers, skip_by, model), Locator(locate, model, lag, scaler)
        self._recorder = Recorder(model, self.optimizers, scaler)
        self._history = History(loss_family=loss_family or "unknown", optimizers=len(self.optimizers))
        self._introduction = Introduction(self._history, self._recorder, declared=loss_family is not None)
        self._judge = Judge(chosen, self._muted, halts=lambda f: self._policy.halts(self._skipping.told(f)), on_fault=self._faults.of_rule)
        self._handover = Handover(lag)
        self._intake = Intake(self._history, self._handover)
        self._pulses = Pulses(self._handover, min(self.every, 10))
        self._feed = Feed(trackers, self._faults)
        self._sinks: list[Sink] = [actions.log, *([self._record.finding] if self._record else []), self._feed.finding, *sinks]
        self._batches, self._explicit = 0, phases == "explicit"
        self._schedule = Schedule(self.every, self.dense, accumulate=accumulate, may_skip=scaler is not None and not self._explicit)
        self._parts: dict[str, resume.Resumable] = {  # what a resumed run takes over
            "history": self._history, "judge": self._judge, "skipping": self._skipping, "checkpoints": self._checkpoints,
        }  # fmt: skip
        self._holders = (self._recorder, self._pulses, self._handover, self._history, self._aftermath, self._skipping, self._locator)
        self._overdue: Finding | None = None  # what the coming step halts for
        self._quiet = 0  # coming steps that record their loss only, and after which such a step follows
        watching.take_over(model, self)
        self._taps = Taps(self._recorder, self.after_backward, self.after_update, self._faults.watch, backward=phases == "hooks", compiled=compiled)
        settings = (every, dense, lag, accumulate, sorted(self._muted), sorted(self._policy.names), self._policy.severity, getattr(recover, "settings", None))
        self._agreement = cluster.agreement(settings, model, self._history) if agreement.wanted(agree) else None
        stall = False if "stalled_training" in self._muted else stall
        self._watchdog = Watchdog(self._history, chosen, self._record and self._record.folder, stall, ranks=self._agreement is not None)
        calls = Calls(lambda: self._intake.drop(self._pulses), lambda: self._faults.watch(self.recovery.begin, self.steps), self.note)
        state, known = State(model, self.optimizers, scaler), (self._history, self._judge, self._checkpoints)
        self.recovery: Recovery = Recovery(recover, state, *known, calls, every=every, lag=lag, agreement=self._agreement)
        self._parts["recovery"] = self.recovery
        self._holders = (*self._holders, self.recovery)
        self.closed = False
        self._open_step()

    # ---- what a loop calls

    def step(self, loss: Tensor | float | Mapping[str, Tensor | float], *, logits: Tensor | None = None) -> None:
        """One iteration is over. loss: a scalar, still on its device, or a dict of named scalars whose sum is the loss.

        logits: the softmax's input, (rows, ..., classes), where the guard cannot find it by itself.
        Raises ``TrainingHalted`` when a finding halts, ``ValueError`` for a loss that is no scalar or a closed guard.
        """
        if capturing():
            warnings.warn(NO_STEP, RuntimeWarning, stacklevel=2)
            return
        now = self.steps
        if self._watchdog.on:
            self._watchdog.beat(now)
        if self._quiet and logits is None and self._pulses.quick(loss):
            self._quiet -= 1
            self.steps = now + 1
            if self._handover.waiting and self._handover.due(now):
                self._end(self._receive(now))
            return
        self._check_open()
        terms = check_loss(loss)
        self._faults.watch(self._locator.keep, now, terms)
        sick = self._pulses.write(now, terms)
        if sick:
            self._schedule.alarm(now)
            self._faults.watch(self._recorder.post_mortem)
        together = self._schedule.together(now, stepped := bool(self._recorder.facts.get("stepped")))
        if sick or (self._recorder.on and self._schedule.complete(stepped)) or together:
            self._close_sample(now, [t for t in terms.values() if isinstance(t, Tensor)], logits, together)
        elif self._pulses.full:
            self._pulses.send()
        self.steps += 1
        self._open_step()
        ending = self._receive(now) if self._handover.due(now) else None
        verdict = self._agreement.round() if self._agreement is not None and self._schedule.regular(now) else None
        ending, self._overdue = self._overdue or ending or verdict, None
        self._end(ending)
        self._faults.watch(self.recovery.look, self.steps, regular=self._schedule.regular(now))

    def batches(self, loader: Iterable[Any]) -> batches.Batches:
        """The loader's batches, each shown to the guard: ``for x, y in guard.batches(loader)``. Keeps ``len``."""
        self._check_open()
        return batches.Batches(self, loader)

    def batch(self, inputs: Any, targets: Any = None) -> None:
        """Shows the guard the batch of the coming step: a non-finite one is named, labels sharpen the softmax signals."""
        if self.closed:
            self._check_open()
        self._show(inputs, targets, handed=False)

    def validation(self, loss: Tensor | float, *, accuracy: Tensor | float | None = None, train_accuracy: Tensor | float | None = None) -> None:
        """An evaluation is over: its loss, a scalar tensor still on its device, or a float. Read by ``verdict`` and by the validation rules.

        accuracy, train_accuracy: shares in [0, 1] on the validation and the training data, if you have them: the gap between
        them tells overfitting, and an accuracy that still rises excuses a validation loss that does.
        """
        self._check_open()
        numbers = evaluation(loss, accuracy, train_accuracy)
        if self._recorder.extras.evaluated_in_training_mode:
            self._history.notes["evaluated_in_training_mode"] = self._history.notes.get("evaluated_in_training_mode", 0) + 1
        self._pulses.send()
        self._handover.send(self.steps - 1, numbers, ("validation", self.steps - 1))
        if self._handover.due(self.steps - 1):
            self._end(self._receive(self.steps - 1))

    def flush(self, *, patience: float | None = None) -> None:
        """Judge all that was recorded; waits for the device, ``patience`` seconds at most. Raises ``TrainingHalted`` as :meth:`step` does."""
        self._end(self._receive_all(patience))

    def settle(self, *, patience: float | None = None) -> None:
        """As :meth:`flush`, but a finding that halts is raised by the next step."""
        ending = self._receive_all(patience)
        if ending is not None:
            self._overdue, self._quiet = ending, 0

    def pause(self) -> AbstractContextManager[None]:
        """``with guard.pause():`` around what is meant to take long, such as an evaluation: ``stalled_training`` leaves it out."""
        return self._watchdog.pause()

    def close(self, *, patience: float | None = None) -> None:
        """Flush, then take every hook off. A finding that would halt is kept, not raised. Harmless when closed already."""
        if self.closed:
            return
        self._watchdog.close()
        try:
            ending = self._receive_all(patience)
            if ending is not None:
                self._halt(ending)  # not raised, the run is over anyway: the finding stands in ``findings``
        finally:
            self.closed, self._quiet = True, 0
            if self._agreement is not None:
                self._agreement.leave(wait=patience is None and sys.exc_info()[0] is None)
            self._taps.close()
            self._skipping.close()
            self.recovery.close()
            if self._record:
                self._faults.watch(facts.finish, self, self._policy, self._record)
            self._feed.close()
            watching.release(self.model, self)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- what is left of it

    def report(self, path: str | Path) -> Path:
        """Write the post-mortem page of the run so far: one HTML file. Needs ``pip install 'lossguard[report]'``."""
        from lossguard import report

        return report.of_guard(self, facts.of(self, self._policy), path, self._record.folder if self._record else None)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to give the same alarms; tensors and plain types, safe to ``torch.save``."""
        self.settle()  # a checkpoint is written first
        self._introduction.ensure()
        return {"steps": self.steps, "batches": self._batches, **resume.states(self._parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ``ValueError`` for the state of another model."""
        self._check_open()
        self._introduction.ensure()
        resume.restore(self._parts, state)
        self.steps, self._batches, self._fatal = state["steps"], state["batches"], None
        self._open_step()

    # ---- inside

    def _show(self, inputs: Any, targets: Any, *, handed: bool) -> None:
        self._batches += 1
        if self._recorder.on:
            self._recorder.passes.show(inputs, targets)
        self._pulses.show((inputs, targets), handed=handed)
        if self._record:
            self._faults.watch(self._aftermath.show, self.steps, self._batches - 1, (inputs, targets))
        if self._locator:
            self._faults.watch(self._locator.show, self.steps, (inputs, targets))

    def _open_step(self) -> None:
        """Decide whether the coming step is sampled, and attach what it needs."""
        self._schedule.update_tried, self._quiet = False, 0
        sampled = self._schedule.due(self.steps)
        self._taps.next_step()
        self._skipping.begin()
        if not sampled and not self._recorder.on:  # nothing to attach, nothing to take off
            self._taps.listen(bool(self._skipping) or self._recorder.expects_clearing)
            if not self._taps.listening and not self._locator:
                self._quiet = self._schedule.next_due(self.steps) - self.steps - 1
            return
        if sampled and self._recorder.outdated:
            self._faults.watch(self._recorder.build)
            self._taps.rehook()
        self._recorder.begin(sampled, every_module=self._schedule.settling(self.steps))
        self._taps.watch_forward(sampled)
        self._taps.listen(sampled or bool(self._skipping) or self._recorder.expects_clearing)

    def _close_sample(self, now: int, losses: list[Tensor], logits: Tensor | None, together: bool) -> None:
        self._skipping.lay(self._recorder.row)
        self._recorder.printing = self._agreement is not None and self._agreement.telling
        parts = self._faults.watch(self._recorder.finish, losses, logits)
        joined = self._recorder.join(measured=parts is not None) if together else []
        self._pulses.send()
        if parts is None:
            return
        facts = {**self._recorder.facts, "batch": self._batches - 1 if self._batches else now}
        facts.update(self._skipping.facts(self._scaler))
        self._introduction.update()
        parts += joined
        for k, (row, segments) in enumerate(parts):
            self._handover.send(now, row, ("row", now, segments, facts, k == len(parts) - 1))

    def _receive_all(self, patience: float | None) -> Finding | None:
        """What was recorded up to now, as far as the device answers in time."""
        self._pulses.send()
        return self._receive(self.steps, everything=True) if patience is None or self._handover.arrived(patience) else None

    def _receive(self, now: int, *, everything: bool = False) -> Finding | None:
        """Take what has arrived, judge it, tell of it. Returns the finding that ends the run now."""
        if capturing():
            return None  # asking an event would break the capture
        heard: list[Finding] = []
        for news in self._intake.receive(now, everything=everything):
            if news.sick:
                self._schedule.alarm(self.steps)
                self._quiet = 0
            if self._record:
                self._faults.watch(news.write, self._record, self._history)
            self._skipping.arrived(news.sample)
            heard += self._judge.observe(self._history, new_sample=news.sample is not None)
            if news.sample is not None:
                self._feed.arrived(self._history, self._judge.findings)
        heard = [self._skipping.told(f) for f in heard]
        if self._locator.locate([f for f in heard if self._policy.halts(f)], self._taps, self._faults.watch):
            self._open_step()
        heard = [self._locator.told(f) for f in heard]
        for finding in [f for f in heard if not self.recovery.repeats(f, self.steps)]:
            for sink in self._sinks:
                self._faults.watch(sink, finding)
        worst = max((f for f in heard if self._policy.halts(f)), key=lambda f: f.severity, default=None)
        if worst is None:
            return None
        self._fatal = self._fatal or worst
        if self._agreement is None or self._agreement.over is not None:
            return worst
        self._agreement.accuse(worst)
        return None

    def _end(self, ending: Finding | None) -> None:
        """Raise ``TrainingHalted`` for a finding that ends the run and cannot be cured."""
        if ending is None:
            return
        incurable = self.recovery.cure(ending, self.steps)
        if incurable is not None:
            raise self._halt(incurable)
        self._schedule.alarm(self.steps)
        self._fatal, self._quiet = None, 0

    def _halt(self, finding: Finding) -> actions.TrainingHalted:
        halt = actions.TrainingHalted(finding, codes=self._codes)
        halt.culprit = self._locator.culprit(finding)
        if self._record:
            self._faults.watch(self._aftermath.leave, halt, self._history, self.steps)
        return halt

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("this guard is closed; make a new one with Guard(model, optimizer), a closed guard keeps only its findings")
