"""The Hugging Face Trainer's events flow in, phases of the guard flow out. Holds no rule, reads no tensor.

``Trainer(..., callbacks=[LossGuardCallback()])``. The Trainer's log is filtered (a NaN loss is replaced by the running
mean) and its events see no loss, no batch, and gradients after clipping only. So, while training, three methods of this one
Trainer are led through here: ``accelerator.backward`` (the loss itself, and gradients before clipping), ``training_step``
(the batch) and ``_save_checkpoint`` (no ill state over good ones). No class is changed, and all comes off at the end.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerCallback
except ImportError as error:
    raise ImportError("lossguard.integrations.transformers needs Hugging Face's Trainer; pip install 'transformers>=4.46' 'accelerate>=1.0'") from error

from lossguard.actions import TrainingHalted
from lossguard.batches import split
from lossguard.coverage import Coverage
from lossguard.device.outputs import float_tensors
from lossguard.findings import Finding
from lossguard.guard import Guard
from lossguard.integrations import keywords as keywords_
from lossguard.integrations.hftrainer import HIDING, Detour, as_text, caller, engine, from_text, shifts_labels
from lossguard.safekeeping import Soundness
from lossguard.scalars import chosen

OURS = ("model", "optimizers", "scaler", "phases", "accumulate")  # keywords of the guard that the Trainer answers
OWN = ("name", "log_layers", "monitor", "on_halt", "veto_saves")
PATIENCE = 2.0  # seconds to wait for the device after an exception; our own choice, because the device may be what failed
logger = logging.getLogger("lossguard")


class LossGuardCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Guards ``trainer.train``: the one line is ``Trainer(..., callbacks=[LossGuardCallback()])``.

    Takes the keywords of ``lossguard.Guard`` but for model, optimizers, scaler, phases and accumulate, which the Trainer answers. A
    step is an update: guard step N is the Trainer's ``global_step`` N + 1, and its loss is the sum over the micro-batches as
    they were scaled, which is what the Trainer logs. name: the prefix of its scalars in whatever the Trainer reports to; they come at
    the Trainer's own logging steps, at most 20. log_layers: every parameter's and module's series too. monitor: the metric that is
    the validation loss. on_halt: ``"raise"``, so that ``TrainingHalted`` comes out of ``trainer.train``, or ``"stop"``, so that it
    returns early, with the best model loaded if that was asked for. veto_saves: no checkpoint is written where
    ``guard.safe_to_save()`` says no, so that ``save_total_limit`` and ``load_best_model_at_end`` keep the good ones.

    guard: the ``Guard`` of the newest training, None before the first. halted: the ``TrainingHalted`` that stopped it, if any.
    Its state is part of the Trainer's checkpoints; a resumed run goes on with the same history and findings.

    >>> LossGuardCallback(every=20, halt={"nonfinite_loss"}).findings
    []
    """

    def __init__(
        self,
        *,
        name: str = "lossguard",
        log_layers: bool = False,
        monitor: str = "eval_loss",
        on_halt: str = "raise",
        veto_saves: bool = True,
        _restored: bool = False,
        **keywords: Any,
    ) -> None:
        if _restored:
            self._become_the_living_one()
            return
        keywords_.check(keywords, OWN, OURS)
        if on_halt not in ("raise", "stop"):
            raise ValueError(f"unknown on_halt {on_halt!r}; expected 'raise' or 'stop'")
        self.name, self.log_layers, self.monitor, self.on_halt, self.veto_saves = name, log_layers, monitor, on_halt, veto_saves
        self.guard: Guard | None = None
        self.halted: TrainingHalted | None = None
        self._keywords, self._detours = keywords, list[Detour]()
        self._trainer: weakref.ref[Any] | None = None
        self._loss: Tensor | None = None  # of the micro-batches since the last update; only the last one's graph is held
        self._sums: list[Tensor] = []  # one for each float tensor of the micro-batches since then
        self._backwards = 0  # of the micro-batch under way
        self._shifts, self._logs = False, True
        self._asked: tuple[int, Soundness | None] = -1, None  # after how many steps the guard was asked last, and its answer
        self._offset = 0  # the Trainer's step before the guard's first
        self._logged = -1  # the newest sample whose scalars were logged

    @property
    def findings(self) -> list[Finding]:
        """The events so far, oldest first; one an episode."""
        return [] if self.guard is None else self.guard.findings

    @property
    def coverage(self) -> Coverage:
        """What is observed and what is not, and why; an engine that hides gradients is named."""
        seen = Coverage() if self.guard is None else self.guard.coverage
        hidden = HIDING.get(engine(self._of_trainer("accelerator")))
        return Coverage(seen.observed, {**seen.not_observed, "gradients": hidden}) if hidden else seen

    # ---- training begins and ends

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whatever ends a training by an exception detaches the guard."""
        trainer, _ = caller(lambda c: c is self)
        if trainer is not None and hasattr(trainer, "_inner_training_loop"):
            Detour(trainer, "_inner_training_loop", self._whole_training)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        """Attach. A training that is resumed from a checkpoint goes on with the history in it."""
        self._close()
        trainer, _ = caller(lambda c: c is self)
        if trainer is None or not hasattr(trainer, "accelerator"):
            warnings.warn("lossguard: no transformers.Trainer calls this callback, so nothing is guarded; give it to a Trainer", RuntimeWarning, stacklevel=2)
            return
        self._trainer = weakref.ref(trainer)
        keywords = dict(self._keywords)
        if hidden := HIDING.get(engine(trainer.accelerator)):
            logger.warning("lossguard: %s", hidden)
            keywords_.mute(keywords, "unchanged_weights")  # its optimizer holds copies, and none of the model's own
        self.guard = guard = Guard(model, optimizer, phases="explicit", **keywords)
        self.halted, self._logged, self._logs, self._asked = None, -1, True, (-1, None)
        self._resume(guard, state)
        self._offset = state.global_step - guard.steps
        self._shifts = shifts_labels(trainer, model)
        self._detours = [
            Detour(trainer.accelerator, "backward", self._backward),
            Detour(trainer, "training_step", self._training_step),
            *([Detour(trainer, "_save_checkpoint", self._save)] if self.veto_saves and hasattr(trainer, "_save_checkpoint") else []),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last steps are judged before ``train`` returns; then all comes off."""
        guard = self._watching()
        if guard is None:
            return
        try:
            guard.flush()
        except TrainingHalted as halt:
            self._halt(halt, control)
        finally:
            self._report(args, state, control, kwargs)
            self._close()

    # ---- one update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The update is over; one without a loss counts as no step."""
        guard = self._watching()
        if guard is None:
            return control
        loss, self._loss = self._loss, None
        self._sums.clear()
        if loss is None:
            guard.abandon()
            self._offset += 1
            return control
        try:
            guard.step(loss)
        except TrainingHalted as halt:
            self._halt(halt, control)
        self._veto(control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An epoch's checkpoint is vetoed like any other."""
        self._veto(control)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """The metric ``monitor`` is the validation loss, ``eval_accuracy`` the accuracy, if they are there."""
        guard, found = self._watching(), metrics or {}
        loss, accuracy = found.get(self.monitor), found.get("eval_accuracy")
        if guard is not None and guard.steps and isinstance(loss, (int, float)):
            share = accuracy if isinstance(accuracy, (int, float)) and not (accuracy < 0 or accuracy > 1) else None
            guard.validation(float(loss), accuracy=share)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Where the Trainer logs its loss, the newest sample's scalars go beside it, at the step that they are of."""
        if "loss" in (logs or {}):
            self._report(args, state, control, kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The guard knows the newest checkpoint."""
        guard, path = self._watching(), Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if guard is not None and path.is_dir():
            guard.saved(path)

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """The guard's state as text, since the Trainer keeps its callbacks' states in a JSON file."""
        guard = self._watching()
        return {"args": {"_restored": True}, "attributes": {"_saved": None if guard is None else as_text(guard.state_dict())}}

    def _become_the_living_one(self) -> None:
        """The Trainer (``restore_callback_states_from_checkpoint``) makes a callback anew from its state: it goes on as the
        one that the user holds, whose keywords JSON could not keep."""
        _, living = caller(lambda c: type(c) is type(self))
        self.__dict__ = (living or LossGuardCallback()).__dict__

    def _resume(self, guard: Guard, state: Any) -> None:
        entry = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step else None
        entries = entry if isinstance(entry, list) else [entry]
        texts = [e["attributes"]["_saved"] for e in entries if e and e.get("attributes", {}).get("_saved")]
        if not texts:
            if state.global_step:
                state.stateful_callbacks.setdefault(type(self).__name__, {})  # the Trainer's next save looks for it
                logger.warning("lossguard: the checkpoint holds no state of the guard, its history begins at step %d", state.global_step)
            return
        try:
            guard.load_state_dict(from_text(texts[-1]))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"lossguard: the state from the checkpoint does not fit, the history begins anew ({why})", RuntimeWarning, stacklevel=2)

    # ---- what the Trainer's methods are led through

    def _whole_training(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException:
            self._close(patience=PATIENCE)
            raise

    def _training_step(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        guard = self._watching()
        if guard is None:
            return method(*args, **kwargs)
        self._backwards = 0
        guard.watch_forward(self._updates())  # else every micro-batch would count as further calls of each module
        self._show(guard, kwargs.get("inputs", args[1] if len(args) > 1 else None))
        loss = method(*args, **kwargs)
        if not self._backwards and isinstance(loss, Tensor):  # a step of the user's own that calls loss.backward() itself
            self._add(loss, 1)
            if self._updates():
                guard.after_backward()
        return loss

    def _backward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        guard, loss = self._watching(), kwargs.get("loss", args[0] if args else None)
        if guard is not None and isinstance(loss, Tensor):
            self._backwards += 1
            accelerator = self._of_trainer("accelerator")
            self._add(loss, 1 if engine(accelerator) == "DEEPSPEED" else int(getattr(accelerator, "gradient_accumulation_steps", 1)))
            if self._updates():
                guard.after_backward()
        return result

    def _save(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if self._ill() else method(*args, **kwargs)

    # ---- inside

    def _watching(self) -> Guard | None:
        """The guard while it watches; another guard on the same model may have closed it."""
        return None if self.guard is None or self.guard.closed else self.guard

    def _of_trainer(self, attribute: str) -> Any:
        trainer = None if self._trainer is None else self._trainer()
        return getattr(trainer, attribute, None)

    def _updates(self) -> bool:
        """Whether the micro-batch under way is the last before an update."""
        return bool(getattr(self._of_trainer("accelerator"), "sync_gradients", True))

    def _show(self, guard: Guard, given: Any) -> None:
        """The batch of an update: the last micro-batch, and a sum of each float tensor of those before it."""
        batch = dict(given) if isinstance(given, Mapping) else given
        inputs, targets = split(batch)
        if not self._updates():
            self._sums += [x.detach().sum(dtype=torch.float32) for x in float_tensors(inputs)]
            return
        if isinstance(batch, dict):  # labels last: batches are told apart by their first tensor
            inputs = {**{k: v for k, v in batch.items() if v is not targets}, "labels": targets}
        if self._sums:
            inputs = [torch.stack(self._sums), inputs] if len({s.device for s in self._sums}) == 1 else inputs
        if self._shifts and isinstance(targets, Tensor) and targets.dim() and "shift_labels" not in batch:
            targets = torch.nn.functional.pad(targets, (0, 1), value=-100)[..., 1:]  # as the model's own loss does
        guard.batch(inputs, targets)

    def _add(self, loss: Tensor, divided_by: int) -> None:
        loss = loss if loss.numel() == 1 else loss.mean()
        if divided_by > 1:
            loss = loss / divided_by
        if not self._updates():
            loss = loss.detach()  # its graph must not outlive its backward pass
        self._loss = loss if self._loss is None else self._loss.detach().to(loss.device) + loss

    def _halt(self, halt: TrainingHalted, control: Any) -> None:
        self.halted = halt
        if self.on_halt == "raise":
            self._close()
            raise halt
        control.should_training_stop = True

    def _veto(self, control: Any) -> None:
        if control.should_save and self.veto_saves and self._ill():
            control.should_save = False

    def _ill(self) -> bool:
        """Whether what would be saved is unfit to be; the guard is asked once a step, on all ranks."""
        guard = self._watching()
        if guard is None:
            return False
        step, sound = self._asked
        if sound is None or step != guard.steps:
            sound = guard.safe_to_save()
            self._asked = guard.steps, sound
            if not sound:
                guard.veto(None, sound)
        return not sound

    def _report(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        """Scalars of the newest sample, to all that hears of the Trainer's logs and does not print them; and to its history."""
        trainer, guard = None if self._trainer is None else self._trainer(), self.guard
        if trainer is None or guard is None or not self._logs or not guard.history.samples:
            return
        sampled = int(guard.history.steps(1)[0])
        if sampled <= self._logged:
            return
        self._logged = sampled
        then = copy.copy(state)
        then.global_step = sampled + 1 + self._offset
        numbers = {f"{self.name}/{k}": v for k, v in chosen(guard.history, guard.findings, of_layers=self.log_layers).items()}
        state.log_history.append({**numbers, "epoch": state.epoch, "step": then.global_step})
        try:
            for callback in list(trainer.callback_handler.callbacks):
                if callback is not self and not isinstance(callback, (ProgressCallback, PrinterCallback)):
                    callback.on_log(args, then, copy.copy(control), logs={**numbers, "epoch": state.epoch}, **{k: v for k, v in kwargs.items() if k != "logs"})
        except Exception as error:
            self._logs = False
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"lossguard: a logger failed and gets no more scalars ({why}); training goes on", RuntimeWarning, stacklevel=2)

    def _close(self, patience: float | None = None) -> None:
        """Detach. What fails in doing so must not hide the exception under way."""
        for detour in self._detours:
            detour.remove()
        self._detours, self._loss = [], None
        self._sums.clear()
        if self.guard is not None:
            try:
                self.guard.close(patience=patience)
            except Exception as error:
                warnings.warn(f"lossguard: the guard could not be closed ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2)
