"""``Guard(locate=...)``: at a halt by a non-finite value, the step is run again and the operation is named.

Batches and losses flow in; a finding that halts flows out with the operation as its first cause. Off unless asked for: it
holds a copy of the weights and the last batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lossguard import aftermath, place
from lossguard.advice import MOST
from lossguard.device.keepsake import Keepsake
from lossguard.device.taps import Taps
from lossguard.findings import Finding

if TYPE_CHECKING:
    from lossguard.culprit import Culprit

RANKS = "the operation is not sought where several ranks train together, because the step would wait for the others: use python -m lossguard replay --locate"
NO_BATCH = "the operation could not be sought: no batch was shown; use for x, y in guard.batches(loader)"
NOT_AGAIN = "the step was run again and came out finite: what differed was random, came from outside of the batch and the weights, or from the hardware"
FAILED = "the operation was sought and the step failed when it was run again"


@dataclass
class _Shown:
    step: int
    batch: tuple[Any, Any]
    random: tuple[Any, ...]


class Locator:
    """Remembers what a step needs to be run again; nothing where ``function`` is None.

    function: called with inputs and targets as they were shown to the guard, returns the loss.
    """

    def __init__(self, function: Callable[[Any, Any], Any] | None, model: nn.Module, lag: int, scaler: Any) -> None:
        if function is not None and not callable(function):
            kind = type(function).__name__
            raise ValueError(f"locate is a {kind}; give a function of inputs and targets that returns the loss: locate=lambda x, y: criterion(model(x), y)")
        self._function, self._model, self._scaler = function, model, scaler
        self._keepsake = None if function is None else Keepsake(model)
        self._shown: deque[_Shown] = deque(maxlen=lag + 2)
        self._found: dict[tuple[str, int], tuple[Culprit | None, str]] = {}

    def __bool__(self) -> bool:
        return self._function is not None

    def show(self, step: int, batch: tuple[Any, Any]) -> None:
        """The batch of the coming step, held alive with the random states from before it."""
        if self._keepsake is not None:
            self._shown.append(_Shown(step, batch, aftermath.random_now()))

    def keep(self, step: int, terms: Mapping[str, Any]) -> None:
        """A step is over."""
        if self._keepsake is not None:
            self._keepsake.keep(step, [t for t in terms.values() if isinstance(t, Tensor)])

    def locate(self, halting: Iterable[Finding], taps: Taps, watch: Callable[..., Any]) -> bool:
        """Seek the operation behind the first of these findings that speaks of computed non-finite values. Waits for the device.

        taps: rest meanwhile, and want to be opened anew where True is returned. watch: swallows our own faults.
        """
        finding = next((f for f in halting if f.diagnosis.startswith("nonfinite_") and f.diagnosis != "nonfinite_input"), None)
        if finding is None or self._keepsake is None:
            return False
        taps.watch_forward(False)
        taps.listen(False)
        self._found[finding.diagnosis, finding.step] = watch(self._seek, finding, part="locate") or (None, FAILED)
        return True

    def told(self, finding: Finding) -> Finding:
        """The finding, with the operation as its first cause where it was sought."""
        if (finding.diagnosis, finding.step) not in self._found:
            return finding
        culprit, words = self._found[finding.diagnosis, finding.step]
        message = f"{finding.message}; {words}"
        if culprit is None:
            return replace(finding, message=message)
        remedies = (culprit.remedy, *(r for r in finding.remedies if r.text != culprit.remedy.text))
        return replace(finding, message=message, causes=(culprit.cause(), *finding.causes)[:MOST], remedies=remedies)

    def culprit(self, finding: Finding) -> dict[str, Any] | None:
        """What was found for a finding, in plain types."""
        culprit, _ = self._found.get((finding.diagnosis, finding.step), (None, ""))
        return None if culprit is None else culprit.to_dict()

    @property
    def culprits(self) -> list[dict[str, Any]]:
        """What was found so far, in plain types, each with the diagnosis and the step of its finding."""
        return [{"diagnosis": name, "step": step, **culprit.to_dict()} for (name, step), (culprit, _) in self._found.items() if culprit is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the copy and of the batches kept alive."""
        if self._keepsake is None:
            return 0
        return self._keepsake.nbytes + sum(t.numel() * t.element_size() for shown in self._shown for t in aftermath.leaves(shown.batch))

    def _seek(self, finding: Finding) -> tuple[Culprit | None, str]:
        """Run the steps held again, the likeliest first, until one is not finite."""
        from lossguard.culprit import find

        if place.world() > 1:
            return None, RANKS
        if not self._shown:
            return None, NO_BATCH
        assert self._keepsake is not None
        sound = max(int(at.item()) for at in self._keepsake.at)  # host read: the run is over
        order = sorted(self._shown, key=lambda s: (s.step != sound, s.step != finding.step, -s.step))
        for shown in order:
            culprit = find(self._model, lambda: self._loss(*shown.batch), batch=shown.batch, prepare=lambda: self._rewind(shown))  # noqa: B023
            if culprit is not None:
                return culprit, f"run again, step {shown.step} has it first from {culprit.what} in {culprit.where}"
        return None, NOT_AGAIN

    def _rewind(self, shown: _Shown) -> None:
        assert self._keepsake is not None
        self._keepsake.put_back()
        aftermath.set_random_states(aftermath.random_states(shown.random))

    def _loss(self, inputs: Any, targets: Any) -> Any:
        """The loss as it goes into the backward pass: a loss scaler's factor may be what overflows."""
        assert self._function is not None
        loss = self._function(inputs, targets)
        return self._scaler.scale(loss) if self._scaler is not None and isinstance(loss, Tensor) else loss
