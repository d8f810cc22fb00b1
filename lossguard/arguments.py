"""Checks of what users give to the guard. Python objects flow in, sound ones flow out; a ``ValueError`` says what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lossguard.device.taps import unwrap
from lossguard.rules import RULES, Rule

KEPT = 64 * 2**20  # bytes of a batch kept by keep_batch=True; our own choice, because one batch of images or tokens fits, a dataset does not


def a_model(model: Any) -> nn.Module:
    """A module with parameters, out of a data-parallel wrapper: names and hooks are those of the model itself."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}; give the model itself first: Guard(model, optimizer)")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is no training to guard; give the module that holds the weights")
    return model


def some_optimizers(optimizers: Any) -> list[Optimizer]:
    """At least one optimizer, out of a trainer's wrappers."""
    found = [unwrap(o) for o in (optimizers if isinstance(optimizers, (list, tuple)) else [optimizers])]
    if not found:
        raise ValueError("the list of optimizers is empty; give the optimizer that trains the model: Guard(model, optimizer)")
    return found


def a_scaler(scaler: Any, optimizers: Any) -> Any:
    """The loss scaler: the one given, or the one that a trainer's wrapper (Accelerate's) steps its optimizer with."""
    wrappers = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    found = next((s for s in (vars(o).get("scaler") for o in wrappers if hasattr(o, "__dict__")) if s is not None), None)
    return scaler if scaler is not None or not getattr(found, "is_enabled", bool)() else found


def at_least(low: int, value: Any, name: str) -> int:
    """An integer that is not below ``low``.

    >>> at_least(1, 10, "every")
    10
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def batch_cap(keep: Any, record: Any) -> int:
    """The most bytes of a batch that are kept at a halt; 0 for none.

    >>> batch_cap(False, None), batch_cap(True, "run"), batch_cap(1000, "run")
    (0, 67108864, 1000)
    """
    if not isinstance(keep, int) or keep < 0:
        raise ValueError(f"keep_batch must be True, False or a number of bytes, got {keep!r}")
    if keep and record is None:
        raise ValueError("keep_batch= needs a folder to keep the batch in; give record= as well")
    return KEPT if keep is True else int(keep)


def some_rules(given: Iterable[Rule]) -> list[Rule]:
    """The default rules, with the user's in the place of those of the same diagnosis or behind them."""
    chosen: dict[str, Rule] = {name: cls() for name, cls in RULES.items()}
    for rule in given:
        if isinstance(rule, type) or not isinstance(rule, Rule):
            raise ValueError(f"rules= holds {rule!r}, which is no rule object; give instances such as LossSpike(sigmas=10.0)")
        chosen[rule.diagnosis] = rule
    return list(chosen.values())
