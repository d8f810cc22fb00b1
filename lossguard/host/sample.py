"""What a history is made of: parameters, module calls, samples. Host values only.

Facts of the device flow in as plain types; rules read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Signals with one site per parameter: their arrays are always as wide as ``History.params``.
PER_PARAMETER = ("grad_norm", "grad_rms", "weight_norm", "update_norm", "update_ratio", "net_update")


@dataclass(frozen=True)
class Param:
    """What the rules may know of one parameter tensor, decided on the host.

    kind: ``matrix`` (at least 2 dimensions and 64 elements), ``vector``, ``norm`` (gain or bias of a normalisation) or
    ``embedding``. cancelled: a bias whose only consumer is a batch-norm, so that its true gradient is zero.
    """

    name: str
    numel: int
    kind: str = "matrix"
    optimizer: int = 0  # which optimizer holds it; -1: none
    dtype: str = "float32"
    cancelled: bool = False
    module: str = ""  # the name of the owning module's class, such as "Linear"


@dataclass(frozen=True)
class Unit:
    """One place where a forward value was measured: a module call, in execution order."""

    name: str
    kind: str  # the module's class name, such as "ReLU"; "gradient rows" where dead units are read from gradients
    width: int = 0  # how many units (channels, features) it has; 0: unknown


@dataclass
class Sample:
    """One recorded step, as it leaves the hand-over.

    values: signal name -> (site indices, numbers). facts: host-known things of the same step: ``lr`` (largest learning
    rate), ``stepped`` (1.0 if an optimizer stepped), ``batch`` (index), ``no_gradient`` (indices of parameters whose
    gradient is None), ``not_cleared`` (share of gradients that were not cleared since the last update), ...
    """

    step: int
    values: dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
