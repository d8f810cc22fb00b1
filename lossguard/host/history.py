"""What has arrived from the device: a bounded numpy window, read by rules. No torch.

Losses arrive for every step, the other signals for sampled steps ("samples"), oldest first. A number that is missing
was not observed in that sample and reads as NaN where ``seen`` is False; a NaN where ``seen`` is True was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lossguard.host.columns import Array, Columns, Mask
from lossguard.host.derived import derive
from lossguard.host.evaluations import Evaluations
from lossguard.host.sample import PER_PARAMETER, Param, Sample, Unit

__all__ = ["PER_PARAMETER", "ZERO_BORN_RMS", "Array", "History", "Mask", "Param", "Sample", "Unit"]

FIRST = 50  # losses of the run's beginning that are never forgotten

# A tensor born with a root mean square below this is zero-born (zero-gamma, LoRA B, zero heads and biases): the survey's role of that name.
ZERO_BORN_RMS = 1e-3


class History:
    """A ring of losses (every step) and of samples (sampled steps).

    >>> history = History(losses=8, samples=4, params=[Param("w", 4)])
    >>> history.add_loss(0, 2.3)
    >>> history.add_sample(Sample(0, {"grad_norm": (np.array([0]), np.array([0.5], np.float32))}, {"lr": 0.1}))
    >>> history.last("grad_norm", 1)
    array([[0.5]])
    >>> history.fact("lr", 1)
    array([0.1])
    """

    def __init__(
        self,
        losses: int = 2048,
        samples: int = 256,
        params: Sequence[Param] = (),
        *,
        loss_family: str = "unknown",
        optimizers: int = 1,
    ) -> None:
        self.memo: dict[Any, Any] = {}  # readings derived from the present state, shared by rules; emptied by every arrival
        self.lasting: dict[Any, Any] = {}  # those derived from parameters and first numbers alone; emptied when these change
        self._births = 0
        self.params = params
        self.units: list[Unit] = []  # module calls in execution order; grows as they are first seen
        self.heads: list[str] = []  # softmaxes observed; the one at the loss is called "loss"
        self.loss_family = loss_family  # "cross_entropy", "binary", "mse", ..., "unknown"
        self.optimizers = optimizers
        self.notes: dict[str, Any] = {}  # host-known facts that hold for the whole run, such as "missing_from_optimizer"
        self._window = losses  # how many are kept; rows are written twice, as those of the columns are, so that the newest are one slice
        self._losses = np.full((2 * losses, 5), np.nan)  # step, total, input finite (1), not (0), not looked at (NaN); fingerprint, samples of the batch
        self._terms: dict[str, Array] = {}
        self._loss_count = 0
        self._capacity = samples
        self._steps = np.full(2 * samples, -1, dtype=np.int64)  # written twice, as the columns are
        self._signals = Columns(samples)
        self._noted: dict[str, Array] = {}  # the numeric facts, written twice as well
        self._facts: list[dict[str, Any]] = []
        self._count = 0
        self._first_losses: list[float] = []
        self._evaluations = Evaluations(losses)
        self._judged_losses = 0
        self.lr_peak = 0.0

    # ---- what arrives

    def add_loss(self, step: int, total: float, terms: Mapping[str, float] | None = None, input_finite: float = np.nan,
                 fingerprint: float = np.nan, samples: float = np.nan) -> None:  # fmt: skip
        """One step's loss, its named terms if it has any; of its batch whether it was finite (1, 0, NaN: not looked at), a fingerprint, how many samples."""
        self.memo.clear()
        row = self._loss_count % self._window
        self._losses[row] = self._losses[row + self._window] = step, total, input_finite, fingerprint, samples
        for name in terms or {}:
            self._terms.setdefault(name, np.full(len(self._losses), np.nan))
        for name, ring in self._terms.items():
            ring[row] = ring[row + self._window] = (terms or {}).get(name, np.nan)
        self._loss_count += 1
        if len(self._first_losses) < FIRST:
            self._first_losses.append(total)

    def add_sample(self, sample: Sample) -> None:
        """One sampled step; derived signals (``update_ratio``, ``grad_total``, ``grad_rms``, ...) are filled in here; see ``derived``."""
        row = self._count % self._capacity
        self.memo.clear()
        self._steps[row] = self._steps[row + self._capacity] = sample.step
        self._signals.put(row, derive(sample.values, self._roots), dict.fromkeys(PER_PARAMETER, len(self.params)))
        if self._births != self._signals.births:
            self._births = self._signals.births
            self.lasting.clear()
        self._note(row, sample.facts)
        self._facts.append(sample.facts)
        del self._facts[: max(0, len(self._facts) - self._capacity)]
        self._count += 1
        lr = sample.facts.get("lr")
        if lr is not None and np.isfinite(lr):
            self.lr_peak = max(self.lr_peak, float(lr))

    def add_validation(self, step: int, value: float, accuracy: float = np.nan, train_accuracy: float = np.nan) -> None:
        """One evaluation's loss, after this step, and accuracies where they are told; as many are kept as losses."""
        self.memo.clear()
        self._evaluations.add(step, (value, accuracy, train_accuracy), self.losses(), self._losses[self._loss_slice(None), 0])

    # ---- what rules read

    @property
    def samples(self) -> int:
        """How many samples the window holds now."""
        return min(self._count, self._capacity)

    @property
    def step(self) -> int:
        """The newest step that has arrived, as loss or as sample; -1 before the first."""
        newest = self._steps[(self._count - 1) % self._capacity] if self._count else -1
        loss = self._losses[(self._loss_count - 1) % self._window, 0] if self._loss_count else -1
        return int(max(newest, loss))

    def steps(self, n: int | None = None) -> npt.NDArray[np.int64]:
        """The steps of the last n samples, oldest first."""
        return self._steps[self._rows(n)]

    def last(self, signal: str, n: int | None = None) -> Array:
        """The last n samples of a signal: (at most n, sites), oldest first, NaN where unseen. Empty if never seen. Not to be written to."""
        return self._signals.values(signal, self._rows(n))

    def seen(self, signal: str, n: int | None = None) -> Mask:
        """Where :meth:`last` holds measured numbers."""
        return self._signals.seen(signal, self._rows(n))

    @property
    def sound(self) -> bool:
        """Whether every measured number of the newest sample is finite: the first look of exact tests."""
        return self._signals.sound

    def extremes(self, signal: str, n: int) -> tuple[float, float]:
        """The least and the greatest measured number of the last n samples of a signal; (inf, -inf) if there is none."""
        return self._signals.extremes(signal, self._rows(n))

    def row_extremes(self, signal: str, n: int) -> tuple[Array, Array]:
        """The same of each of the last n samples: (at most n,) twice, NaN where nothing was measured."""
        return self._signals.row_extremes(signal, self._rows(n))

    def born(self, signal: str) -> Array:
        """The first finite number seen at each site of a signal, however long ago: (sites,)."""
        return self._signals.born(signal)

    def fact(self, name: str, n: int | None = None, default: float = np.nan) -> Array:
        """A numeric host-known fact of the last n samples: (at most n,), ``default`` where a sample lacks it."""
        held, rows = self._noted.get(name), self._rows(n)
        values = np.full(rows.stop - rows.start, np.nan) if held is None else held[rows]
        return values if np.isnan(default) else np.where(np.isnan(values), default, values)

    def facts(self, back: int = 1) -> dict[str, Any]:
        """All host-known facts of the newest sample (``back=2``: the one before it); empty if there is none."""
        return self._facts[-back] if len(self._facts) >= back else {}

    def losses(self, n: int | None = None) -> Array:
        """The last n losses, one per step, oldest first. Not to be written to."""
        return self._losses[self._loss_slice(n), 1]

    def loss_steps(self, n: int | None = None) -> npt.NDArray[np.int64]:
        """The steps of :meth:`losses`."""
        return self._losses[self._loss_slice(n), 0].astype(np.int64)

    @property
    def first_step(self) -> int:
        """The step of the oldest loss that is held; -1 without losses."""
        return int(self._losses[self._loss_slice(None), 0][0]) if self._loss_count else -1

    def inputs(self, n: int | None = None) -> Array:
        """Whether the batches of :meth:`losses` were finite: 1 yes, 0 no, NaN not looked at."""
        return self._losses[self._loss_slice(n), 2]

    def first_losses(self, n: int = FIRST) -> Array:
        """The first n losses of the run, however long ago, at most FIRST."""
        return np.array(self._first_losses[:n], dtype=np.float64)

    def fingerprints(self, n: int | None = None) -> Array:
        """A number for the batch of each of :meth:`losses`, equal where batches are equal; NaN where none was shown."""
        return self._losses[self._loss_slice(n), 3]

    def batch_sizes(self, n: int | None = None) -> Array:
        """How many samples the batch of each of :meth:`losses` had; NaN where none was shown."""
        return self._losses[self._loss_slice(n), 4]

    def validations(self) -> Array:
        """The evaluations so far, oldest first: (n, 6), the columns of ``host.evaluations.COLUMNS``."""
        return self._evaluations.table()

    @property
    def fresh_validations(self) -> int:
        """How many of the newest evaluations no rule has judged yet."""
        return self._evaluations.fresh

    def term(self, name: str, n: int | None = None) -> Array:
        """A named loss term, as :meth:`losses`."""
        return self._terms[name][self._loss_slice(n)]

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms."""
        return tuple(self._terms)

    @property
    def fresh_losses(self) -> int:
        """How many of the newest losses no rule has judged yet."""
        return min(self._loss_count - self._judged_losses, self._window)

    def name_units(self, units: Sequence[tuple[str, str, int]]) -> None:
        """The module calls known by now, in execution order."""
        if len(units) != len(self.units):
            self.units = [Unit(*u) for u in units]

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        rings = [self._losses, *self._terms.values(), *self._noted.values()]
        return sum(ring.nbytes for ring in rings) + self._signals.nbytes + self._evaluations.nbytes

    def observed(self) -> dict[str, int]:
        """How many sites of each signal were ever seen with a finite number."""
        counts = {name: int(np.isfinite(self._signals.born(name)).sum()) for name in self._signals.places}
        return {name: n for name, n in counts.items() if n}

    def mark_judged(self) -> None:
        """Called by the judge after a round."""
        self._judged_losses, self._evaluations.fresh = self._loss_count, 0

    # ---- what rules ask often

    @property
    def params(self) -> tuple[Param, ...]:
        """The trained parameters, in model order."""
        return self._params

    @params.setter
    def params(self, params: Sequence[Param]) -> None:
        self._params = tuple(params)
        self.memo.clear()
        self.lasting.clear()
        self.numels = np.array([max(p.numel, 1) for p in params], dtype=np.float64)  # elements of each, at least 1
        self._roots = np.sqrt(self.numels)
        self.held = np.array([p.optimizer >= 0 and not p.cancelled for p in params], dtype=np.bool_)  # by an optimizer, with a gradient of their own
        self._kinds = np.array([p.kind for p in params], dtype=object)

    def kinds(self, *kinds: str) -> Mask:
        """Which parameters are of these kinds: (params,)."""
        return np.logical_or.reduce([self._kinds == kind for kind in kinds]).astype(np.bool_) if len(self._kinds) else np.zeros(0, dtype=np.bool_)

    @property
    def zero_born(self) -> Mask:
        """Which parameters began with a root mean square below ZERO_BORN_RMS: (params,); unknown counts as zero-born."""
        norms = self.born("weight_norm")
        rms = np.full(len(self.params), np.nan)
        rms[: len(norms)] = norms / np.sqrt(self.numels[: len(norms)])
        return ~(rms >= ZERO_BORN_RMS)

    @property
    def lr(self) -> float:
        """The newest learning rate (the largest over parameter groups), NaN if unknown."""
        lr = self.fact("lr", 1)
        return float(lr[0]) if lr.size else float("nan")

    @property
    def schedule_tail(self) -> bool:
        """The learning rate is below a tenth of its peak: low-side rules are off there."""
        return bool(self.lr < 0.1 * self.lr_peak)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to give the alarms of an uninterrupted one; plain types and numpy arrays."""
        keys = ("_losses", "_terms", "_loss_count", "_steps", "_facts", "_count", "_judged_losses", "_first_losses", "_noted", "lr_peak")
        state: dict[str, Any] = {key: getattr(self, key) for key in keys}
        state.update({part: getattr(self, f"_{part}").state_dict() for part in _STATEFUL})
        units = [(u.name, u.kind, u.width) for u in self.units]
        return {**state, "units": units, "heads": self.heads, "params": [p.name for p in self.params], "loss_family": self.loss_family}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; ``ValueError`` if the state is of another model."""
        names = [p.name for p in self.params]
        if list(state["params"]) != names:
            theirs = list(state["params"])[:3]
            raise ValueError(f"the state is of a model with parameters {theirs}..., this one has {names[:3]}...; load it into the guard of the same model")
        for key, value in state.items():
            if key in _STATEFUL:
                getattr(self, f"_{key}").load_state_dict(value)
            elif key == "units":
                self.units = [Unit(*u) for u in value]
            elif key != "params":
                setattr(self, key, value)
        self.memo.clear()
        self.lasting.clear()

    # ---- inside

    def _rows(self, n: int | None) -> slice:
        count, capacity = self._count, self._capacity
        held = count if count < capacity else capacity
        if n is None or n > held:
            n = held
        elif n < 0:
            n = 0
        end = count % capacity
        if end < n or (end == 0 and n):
            end += capacity
        return slice(end - n, end)

    def _loss_slice(self, n: int | None) -> slice:
        held = min(self._loss_count, self._window)
        n = held if n is None else min(n, held)
        end = self._loss_count % self._window
        end += self._window if end < n or (end == 0 and n) else 0
        return slice(end - n, end)

    def _note(self, row: int, facts: Mapping[str, Any]) -> None:
        """Keep the numeric facts of a sample."""
        for name, value in facts.items():
            if name not in self._noted and isinstance(value, (int, float)):
                self._noted[name] = np.full(2 * self._capacity, np.nan)
        for name, ring in self._noted.items():
            value = facts.get(name, np.nan)
            ring[row] = ring[row + self._capacity] = value if isinstance(value, (int, float)) else np.nan


_STATEFUL = ("signals", "evaluations")  # what keeps a state of its own
