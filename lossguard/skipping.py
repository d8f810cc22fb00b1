"""Leaving bad updates out: which gates are armed, which steps were skipped, and what a finding then says.

Optimizers flow in, counters flow into rows of the tape, and sampled rows flow back in once they are on the host.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard import actions, rehearsal
from lossguard.device import gate
from lossguard.device.buffers import Buffers
from lossguard.device.spikes import Limit
from lossguard.device.tape import Row
from lossguard.findings import Finding, check_names
from lossguard.host.history import Sample

REMEMBERED = 1024  # sampled steps whose update was left out; our own choice, above any window of a rule
WAYS = ("found_inf", "restore")
# What can reach the weights by a non-finite gradient only.
UPSTREAM = ("nonfinite_input", "nonfinite_activation", "nonfinite_loss", "nonfinite_gradient")
# Engines whose gradients are a rank's part without saying so, and what to use.
HIDDEN = {"FullyShardedDataParallel": "fully_shard", "DeepSpeedEngine": "the engine's own overflow check"}


class Skipping:
    """The gates of one guard; none where nothing is to be skipped.

    skip: diagnosis names, or a mapping from name to settings (a ``Limit`` for ``exploding_gradient``). by: ``"found_inf"``, which
    fused optimizers honour, or ``"restore"``, which puts weights and state back for those that do not, at the cost of a copy of both.
    Raises ``ValueError`` for a diagnosis that cannot be skipped, and for an optimizer that cannot leave an update out exactly.
    """

    def __init__(self, skip: Iterable[str] | Mapping[str, Any], optimizers: Sequence[Optimizer], by: str = "found_inf", model: nn.Module | None = None) -> None:
        if by not in WAYS:
            raise ValueError(f"unknown skip_by {by!r}; expected 'found_inf' (fused optimizers) or 'restore' (any other, for a copy of weights and state)")
        self.names = check_names(skip, "skip", gate.SKIPPABLE) if skip else frozenset()
        setting = _limit(skip)
        limit = setting if "exploding_gradient" in self.names else None
        self.gates: list[gate.Gate] = []
        self._buffers: Buffers | None = None
        self._skipped: deque[int] = deque(maxlen=REMEMBERED)
        self._counts: dict[str, float] = {}
        self._failed, self._scaled = "", False
        if self.names:
            _check_engine(model)
            put_back = _chosen(optimizers, by)
            self._buffers = None if model is None else Buffers(model)
            self.gates = gate.armed(optimizers, limit, put_back=put_back, buffers=self._buffers, on_fault=self._fault)

    def __bool__(self) -> bool:
        return bool(self.gates)

    def judge(self, scale: Tensor | None = None) -> None:
        """A backward pass ended: decide on the update to come. On the device. scale: of a loss scaler, where gradients still bear it."""
        for one in self.gates:
            one.judge(scale)

    def begin(self) -> None:
        """A new step of the run starts."""
        for one in self.gates:
            one.begin()
        if self._buffers is not None and not self._failed:
            self._buffers.begin()

    def lay(self, row_of: Callable[[torch.device], Row]) -> None:
        """The counters, into the sampled step's row."""
        for k, one in enumerate(self.gates):
            one.lay(k, row_of(one.device))

    def arrived(self, sample: Sample | None) -> None:
        """A sampled row is on the host."""
        if sample is None or "consecutive_skips" not in sample.values:
            return
        if sample.values["consecutive_skips"][1].any():
            self._skipped.append(sample.step)
        self._counts = {name: float(sample.values[name][1].sum()) for name in gate.COUNTS if name in sample.values}

    def facts(self, scaler: Any) -> dict[str, float]:
        """What a sample's rules should know: a loss scaler is at work, and a gate."""
        self._scaled = scaler is not None or any(one.scaled for one in self.gates)
        return {name: 1.0 for name, so in (("scaler", self._scaled), ("gated", bool(self))) if so}

    @property
    def counts(self) -> dict[str, int]:
        """Updates left out so far by reason, as far as is known on the host."""
        spikes = int(self._counts.get("spike_skips", 0.0))
        found = {"nonfinite_gradient": int(self._counts.get("total_skips", 0.0)) - spikes, "exploding_gradient": spikes}
        return {name: n for name, n in found.items() if name in self.names or n}

    def told(self, finding: Finding) -> Finding:
        """The finding, with what the gates have done about it. Under a loss scaler the scaler itself leaves such updates out: what is still reported lasts."""
        if not self.gates:
            return finding
        armed = "nonfinite_gradient" in self.names and not self._failed
        return actions.spared(finding, UPSTREAM[: -1 if self._scaled else None] if armed else (), self._skipped)

    def unseen(self, steps: int) -> dict[str, str]:
        """What the gates do not guard, and why."""
        found = {"skip": self._failed} if self._failed else {}
        if steps and "exploding_gradient" in self.names and any(one.late for one in self.gates):
            why = "some updates were judged at the update, after clipping, since no backward pass was seen to end"
            found["exploding gradients before clipping"] = why
        if self._buffers is not None:
            found.update(dict.fromkeys(self._buffers.large, "a buffer too large to be kept: what a bad batch writes to it stays"))
        return found

    @property
    def nbytes(self) -> int:
        """Device bytes held, the copies of ``skip_by="restore"`` included."""
        return sum(one.nbytes for one in self.gates) + (0 if self._buffers is None else self._buffers.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """Counters and statistics of each gate; a host read, at a checkpoint."""
        return {"gates": [{name: t.detach().to("cpu", copy=True) for name, t in one.state().items()} for one in self.gates if one.device.type != "meta"]}

    def load_state_dict(self, state: Any) -> None:
        """The inverse; gates that the state does not know begin anew."""
        for one, held in zip(self.gates, state.get("gates", ()), strict=False):
            one.resume({name: torch.as_tensor(t) for name, t in held.items()})

    def close(self) -> None:
        """Disarm: the optimizers step as if nobody had watched."""
        for one in self.gates:
            one.close()

    def _fault(self, error: Exception) -> None:
        if not self._failed:
            self._failed = f"failed and is switched off: {type(error).__name__}: {error}"
            text = f"lossguard: skip= failed and leaves no update out from now on ({type(error).__name__}: {error}); training goes on"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _limit(skip: Iterable[str] | Mapping[str, Any]) -> Limit:
    settings = dict(skip) if isinstance(skip, Mapping) else {}
    given = settings.pop("exploding_gradient", None)
    for name, setting in settings.items():
        if setting not in (None, Limit()):
            raise ValueError(f"skip= gives {name} a setting, {setting!r}, and only exploding_gradient has any; give None")
    if given is not None and not isinstance(given, Limit):
        raise ValueError(f"skip= gives exploding_gradient the setting {given!r}; expected a lossguard.device.spikes.Limit, or None for the usual one")
    return given or Limit()


def _check_engine(model: nn.Module | None) -> None:
    for module in model.modules() if model is not None else ():
        for kind in type(module).__mro__:
            if kind.__name__ in HIDDEN:
                why = "each rank sees a part of the gradients only and would decide by itself"
                raise ValueError(f"skip= cannot judge under {kind.__name__}: {why}; use {HIDDEN[kind.__name__]}, or halt= instead of skip=")


def _chosen(optimizers: Sequence[Optimizer], by: str) -> list[Optimizer]:
    """Those whose updates must be put back. ``ValueError``, before any gate is armed, if one can do nothing exactly."""
    put_back: list[Optimizer] = []
    for optimizer in optimizers:
        fused, reason = rehearsal.refuse(optimizer, by)
        if reason is not None:
            advice = "or use halt= instead of skip="
            if by == "found_inf":
                advice = "or give skip_by='restore', which keeps a copy of weights and state, or use halt= instead of skip="
            raise ValueError(f"skip= needs an optimizer that can leave an update out exactly: {reason}, {advice}")
        if not fused:
            put_back.append(optimizer)
    return put_back
