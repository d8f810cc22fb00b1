"""The evaluations of a run: losses and accuracies as they were told, each beside the training loss right before it. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lossguard.host.columns import Array

# The columns: the step before an evaluation, its loss, accuracies (NaN: not told), and the mean of the training losses
# right before it with the standard error of that mean.
COLUMNS = ("step", "loss", "accuracy", "train_accuracy", "training", "training_error")
LEAST, MOST = 20, 512  # losses in that mean: the newest half of those since the last evaluation


class Evaluations:
    """At most so many rows, oldest first. ``fresh`` counts those that no rule has judged yet."""

    def __init__(self, most: int) -> None:
        self._most, self._rows, self.fresh = most, list[tuple[float, ...]](), 0

    def add(self, step: int, told: tuple[float, float, float], losses: Array, steps: Array) -> None:
        """One evaluation after this step: loss, accuracy, training accuracy; and the training losses held, with their steps."""
        last = self._rows[-1][0] if self._rows else -1
        self._rows.append((step, *told, *_mean(losses, int((np.isfinite(losses) & (steps > last)).sum()))))
        self.fresh += 1
        del self._rows[: max(0, len(self._rows) - self._most)]

    def table(self) -> Array:
        """All rows: (n, 6), the columns of COLUMNS."""
        return np.array(self._rows, dtype=np.float64).reshape(-1, len(COLUMNS))

    @property
    def nbytes(self) -> int:
        """Host bytes of the numbers held."""
        return 8 * len(COLUMNS) * len(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """Rows and count, as plain types."""
        return {"rows": [list(row) for row in self._rows], "fresh": self.fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._rows, self.fresh = [tuple(row) for row in state["rows"]], int(state["fresh"])


def _mean(losses: Array, since: int) -> tuple[float, float]:
    """The mean of the newest half of so many finite losses, and its standard error."""
    part = losses[np.isfinite(losses)][-min(max(since // 2, LEAST), MOST) :]
    if not part.size:
        return np.nan, np.nan
    size = max(float(np.abs(part).max()), np.finfo(np.float64).tiny)  # squares of huge losses overflow
    return float((part / size).mean() * size), float((part / size).std() * size / np.sqrt(part.size))
