"""MLflow: scalars as metrics, findings as tags and as one text artifact. Needs ``pip install mlflow`` (``mlflow-skinny`` suffices)."""

from __future__ import annotations

import time
from collections.abc import Mapping

from lossguard.findings import Finding
from lossguard.trackers.csvfile import headline


class MLflow:
    """run_id: of the run that is written to; None for the one that is active now. uri: the tracking store, as ``mlflow.set_tracking_uri`` takes it.
    layers: every parameter's and module's series besides the at most 20 scalars. prefix: of all names.

    Each sample is one ``log_batch``; its step is the guard's own.
    """

    def __init__(self, run_id: str | None = None, *, uri: str | None = None, layers: bool = False, prefix: str = "lossguard") -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("lossguard.trackers.MLflow() needs mlflow; pip install mlflow") from error
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise ValueError("no MLflow run is active; call mlflow.start_run() first, or give its id: MLflow(run.info.run_id)")
            run_id = active.info.run_id
        self.layers, self.prefix = layers, prefix
        self._run_id, self._metric = run_id, mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._heard: list[str] = []

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a sample, in one request."""
        now = int(time.time() * 1000)
        metrics = [self._metric(f"{self.prefix}/{_allowed(name)}", float(value), now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), MOST):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + MOST])

    def finding(self, finding: Finding) -> None:
        """A tag with the headline, and the whole text among the artifacts."""
        self._heard.append(str(finding))
        self._client.set_tag(self._run_id, f"{self.prefix}.{finding.diagnosis}", headline(finding))
        self._client.log_text(self._run_id, "\n\n".join(self._heard) + "\n", f"{self.prefix}/findings.txt")


MOST = 1000  # metrics of one request; MLflow's own limit


def _allowed(name: str) -> str:
    """MLflow takes letters, digits and ``_-. :/`` only."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)
