"""Lightning's hooks flow in, phases of the guard flow out. Holds no rule, reads no tensor.

``Trainer(callbacks=[LossGuardCallback()])``, for ``lightning`` and ``pytorch_lightning`` (2.2 and later) alike. Needs one of
the two and imports no other; ``import lossguard`` imports neither.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossguard.batches import split
from lossguard.device.taps import unwrap
from lossguard.findings import Finding
from lossguard.guard import Guard
from lossguard.integrations import keywords as keywords_
from lossguard.integrations.lightning_checkpoints import Vetoes
from lossguard.scalars import chosen

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
OURS = ("model", "optimizers", "scaler", "phases")  # keywords of the guard that the Trainer answers
MAX_TERMS = 8  # backward passes in one batch that are told apart as loss terms; of more, the mean is the loss


def _callback_class() -> Any:
    """``Callback`` of every trainer package that is imported by now, so that either Trainer knows ours; else of the first installed."""
    found = [sys.modules[name].Callback for name in PACKAGES if hasattr(sys.modules.get(name), "Callback")]
    if found:
        return found[0] if len(found) == 1 else type("Callback", tuple(found), {})
    for name in PACKAGES:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # installed, but something that it needs is not
    raise ImportError("lossguard.integrations.lightning needs a Trainer and found neither lightning nor pytorch_lightning; pip install 'lightning>=2.2'")


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback_class()


class LossGuardCallback(Callback):
    """Guards ``trainer.fit``: the one line is ``Trainer(callbacks=[LossGuardCallback()])``.

    Takes the keywords of ``lossguard.Guard`` but for model, optimizers, scaler and phases, which the Trainer answers. name:
    the prefix of its scalars in the Trainer's loggers and part of its key in checkpoints; two callbacks need two names.
    log_layers: every parameter's and module's series besides the at most 20 scalars. monitor: the logged metric that is the
    validation loss, for the guard's verdict. A step is a training batch that has a
    loss, so with ``accumulate_grad_batches`` several steps make an update. ``TrainingHalted`` comes out of ``trainer.fit``.

    guard: the ``Guard`` of the newest fit, None before the first. findings: what it found; stays after the fit.

    >>> LossGuardCallback(every=20, halt={"nonfinite_loss"}).findings
    []
    """

    def __init__(self, *, name: str = "lossguard", log_layers: bool = False, monitor: str = "val_loss", **keywords: Any) -> None:
        super().__init__()
        keywords_.check(keywords, ("name", "log_layers", "monitor"), OURS)
        self.name, self.log_layers, self.monitor = name, log_layers, monitor
        self.guard: Guard | None = None
        self._keywords = keywords
        self._state: dict[str, Any] | None = None  # from a checkpoint, until a fit begins
        self._losses: list[Tensor] = []  # of the backward passes of this batch, with their graphs
        self._clock: dict[int, int] = {}  # guard's step -> the loggers' step, until its sample has arrived
        self._logged: int | None = None  # the loggers' step of the newest scalars
        self._logs = True
        self._vetoes: Vetoes | None = None

    @property
    def findings(self) -> list[Finding]:
        """The events so far, oldest first; one an episode."""
        return [] if self.guard is None else self.guard.findings

    # ---- the fit begins and ends

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach. A fit that continues another, by checkpoint or by calling ``fit`` again, continues its history."""
        self._close()
        state, self._state = self._state, None
        if state is None and self.guard is not None and self.guard.model is pl_module and trainer.global_step:
            state = self.guard.state_dict()
        automatic = pl_module.automatic_optimization
        keywords = {"accumulate": _micro_batches(trainer), **self._keywords} if automatic else dict(self._keywords)
        # In manual optimisation clipping comes before Lightning's hooks, as in a plain loop: there the guard's own hooks see more.
        self.guard = Guard(pl_module, trainer.optimizers, scaler=_scaler(trainer), phases="explicit" if automatic else "hooks", **keywords)
        self.guard.recovery.join(*(c.scheduler for c in trainer.lr_scheduler_configs))  # they belong to what is taken back
        self._vetoes = Vetoes(trainer, self.guard)
        self._clock, self._logged, self._logs = {}, None, True
        if state:
            try:
                self.guard.load_state_dict(state)
            except (ValueError, KeyError) as error:
                warnings.warn(f"lossguard: the state from the checkpoint does not fit, the history begins anew ({error})", RuntimeWarning, stacklevel=2)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last steps are judged before the fit returns."""
        guard = self._watching()
        if guard is not None:
            try:
                guard.flush()
            finally:
                self._report(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach."""
        if stage == "fit":
            self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach: after an exception no other hook is called. Checkpoints of an ill state stay diverted until the next fit."""
        self._close(vetoes=False)

    # ---- one training batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Show the batch, which is on its device by now."""
        self._losses.clear()
        guard = self._watching()
        if guard is not None:
            guard.batch(*split(batch))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Keep the loss in its true scale; the graph behind it says what kind it is."""
        if self._watching() is None:
            return
        scale = getattr(_scaler(trainer), "_scale", None)
        if scale is not None:
            loss = loss / scale.to(loss.device, non_blocking=True)
        if pl_module.automatic_optimization:
            self._losses.clear()  # one loss a batch: a closure called again (LBFGS) replaces it
        self._losses.append(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """All gradients of the update are there, unclipped; unscaled unless the optimizer does that inside its step."""
        guard = self._watching()
        if guard is not None and pl_module.automatic_optimization:
            guard.after_backward(unscaled=not getattr(unwrap(optimizer), "_step_supports_amp_scaling", False))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over; one without a loss (``training_step`` gave None) is none."""
        guard = self._watching()
        if guard is None:
            return
        loss = self._loss(outputs, trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        if loss is None:
            guard.abandon()
            return
        if trainer.loggers:
            self._clock[guard.steps] = _logger_step(trainer)
        try:
            guard.step(loss)
        finally:
            self._report(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The metric ``monitor`` is the validation loss, if it was logged."""
        guard, value = self._watching(), trainer.callback_metrics.get(self.monitor)
        if guard is not None and not trainer.sanity_checking and isinstance(value, Tensor) and value.numel() == 1 and guard.steps:
            guard.validation(value)

    # ---- checkpoints

    @property
    def state_key(self) -> str:
        """Its key in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """The guard's state, part of the Trainer's checkpoints; tensors and plain types."""
        if self._state is not None or self.guard is None:
            return self._state or {}
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the next fit begins."""
        self._state = dict(state_dict)

    # ---- inside

    def _watching(self) -> Guard | None:
        """The guard while it watches; another guard on the same model may have closed it."""
        return None if self.guard is None or self.guard.closed else self.guard

    def _close(self, *, vetoes: bool = True) -> None:
        self._losses.clear()
        if vetoes and self._vetoes is not None:
            self._vetoes.close()
            self._vetoes = None
        if self.guard is not None:
            self.guard.close()

    def _loss(self, outputs: Any, divided_by: int) -> Tensor | Mapping[str, Tensor] | None:
        """The loss as ``training_step`` gave it, or the terms of several backward passes; None for a batch without any."""
        losses = [x if x.numel() == 1 else x.mean() for x in self._losses]
        self._losses.clear()
        if not losses:
            given = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            losses = [given] if isinstance(given, Tensor) and given.numel() == 1 else []
        if not losses:
            return None
        if 1 < len(losses) <= MAX_TERMS:
            return {f"loss_{i}": x for i, x in enumerate(losses)}
        whole = losses[0] if len(losses) == 1 else torch.stack([x.reshape(()) for x in losses]).mean()
        return whole if divided_by == 1 else whole * divided_by

    def _report(self, trainer: Any) -> None:
        """Scalars of a sample that has newly arrived, to every logger at the step it was recorded. A broken logger ends no run."""
        guard = self.guard
        if guard is None or not self._logs or not trainer.loggers or not guard.history.samples:
            return
        sampled = int(guard.history.steps(1)[0])
        step = self._clock.get(sampled)
        if step is None:
            return
        self._clock = {k: v for k, v in self._clock.items() if k > sampled}
        if self._logged is not None and step - self._logged < trainer.log_every_n_steps:
            return
        self._logged = step
        numbers = chosen(guard.history, guard.findings, of_layers=self.log_layers)
        try:
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.name}/{k}": v for k, v in numbers.items()}, step=step)
        except Exception as error:
            self._logs = False
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"lossguard: a logger failed and gets no more scalars ({why}); training goes on", RuntimeWarning, stacklevel=2)


def _scaler(trainer: Any) -> Any:
    """The precision plugin's ``GradScaler`` where one is in use."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _micro_batches(trainer: Any) -> int:
    """The most batches that make an update, now or by a schedule (``GradientAccumulationScheduler``)."""
    schedules = [s for c in trainer.callbacks if isinstance(s := getattr(c, "scheduling", None), dict)]
    return int(max([1, trainer.accumulate_grad_batches, *(n for s in schedules for n in s.values())]))


def _logger_step(trainer: Any) -> int:
    """The step at which Lightning logs what ``self.log`` gets in the same batch."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
