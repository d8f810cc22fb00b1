"""Weights & Biases: scalars on a step axis of their own, findings as alerts and in the run's summary. Needs ``pip install wandb``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lossguard.findings import Finding, Severity
from lossguard.trackers.csvfile import headline

LEVELS = {Severity.WARNING: "WARN", Severity.ERROR: "ERROR", Severity.HALT: "ERROR"}


class WandB:
    """run: what ``wandb.init()`` returned, online or offline; None for the run that is active now.

    The numbers have the x axis ``lossguard/step``, the guard's own step. commit: False, the numbers join the row of the
    loop's own next ``run.log``, whatever step the loop passes, so that no point of the loop's is dropped for a step that
    went back; of several samples before one row the newest stays. True, for a run that nobody else logs to: a row for each sample.
    layers: every parameter's and module's series besides the at most 20 scalars. prefix: of all names.
    """

    def __init__(self, run: Any = None, *, commit: bool = False, layers: bool = False, prefix: str = "lossguard") -> None:
        if run is None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError("lossguard.trackers.WandB() needs wandb; pip install wandb") from error
            run = wandb.run
            if run is None:
                raise ValueError("no Weights & Biases run is active; call wandb.init() first, or give its run: WandB(run)")
        if not hasattr(run, "define_metric") or not hasattr(run, "log"):
            raise ValueError(f"WandB() takes the run that wandb.init() returned, got {type(run).__name__}")
        self.layers, self.prefix = layers, prefix
        self._run, self._commit = run, commit
        self._rows, self._began = 0, run.step
        run.define_metric(f"{prefix}/step", hidden=True)
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a sample."""
        self._rows += 1
        self._run.log({f"{self.prefix}/step": step, **{f"{self.prefix}/{name}": value for name, value in numbers.items()}}, commit=self._commit)

    def finding(self, finding: Finding) -> None:
        """A line in the run's summary; from a warning up an alert, too."""
        self._run.summary[f"{self.prefix}/{finding.diagnosis}"] = headline(finding)
        if finding.severity in LEVELS:
            self._run.alert(title=f"{self.prefix}: {finding.diagnosis}"[:63], text=str(finding), level=LEVELS[finding.severity], wait_duration=0)

    def close(self) -> None:
        """A row that still waits is left to the run's end; a run in which nobody logs but us is told of ``commit``."""
        if not self._commit and self._rows > 1 and self._run.step == self._began:
            warnings.warn(
                "lossguard: the loop logged nothing to Weights & Biases by itself, so that only the newest sample is in the run; use WandB(run, commit=True)",
                RuntimeWarning,
                stacklevel=2,
            )
