"""Translates a finding's first remedy into what ``job.planted`` is asked for. A finding flows in, overrides flow out.

What a person must look at by eye ("look at the batch") changes nothing by itself: no overrides then. Nothing is invented
here: only what stands in ``remedies[0].change`` is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lossguard import Finding

LOOKS = frozenset({"look_at", "batch_of_step", "parameter", "rewind_before", "slope"})  # for people, or of no program here


def _as_it_is(key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {key: value}


def _add(value: Any) -> dict[str, Any]:
    """``add`` names either what to put between layers or parameters to give to the optimizer."""
    if isinstance(value, str):
        return {"add": "residual" if "residual" in value else "normalization"}
    return {"optimizer_parameters": True}


def _activation(value: Any) -> dict[str, Any]:
    return {"activation": {"leakyrelu": "leaky_relu"}.get(str(value).lower(), str(value).lower())}


TRANSLATIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "head_scale": _as_it_is("head_scale_factor"),  # a factor on the initial weights as they are
    "zero_grad_every": lambda _: {"zero_grad": True},
    "parameters": lambda _: {"optimizer_parameters": True},
    "optimizer_step": lambda _: {"step_every": 1},
    "optimizer_parameters": lambda _: {"optimizer_parameters": True},
    "batch": _as_it_is("drop_batch"),
    "normalise_input": lambda _: {"normalize_input": True},
    "add": _add,
    "activation": _activation,
}  # every other key of the vocabulary is asked for by its own name


def overrides(finding: Finding, planted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the first remedy changes, by the keys of ``job.planted``; empty if it is a look-at, or no remedy.

    planted: the ill values of the program, where they are known; then only its keys stay, and factors become values.

    >>> from lossguard import Remedy, Severity
    >>> finding = Finding("loss_spike", Severity.WARNING, 3, "loss", "", remedies=(Remedy("", {"lr_factor": 0.1}),))
    >>> overrides(finding), overrides(finding, {"lr": 10.0}), overrides(finding, {"eps": 0.0})
    ({'lr_factor': 0.1}, {'lr': 1.0}, {})
    """
    if not finding.remedies:
        return {}
    changes: dict[str, Any] = {}
    for key, value in finding.remedies[0].change.items():
        if key not in LOOKS:
            changes |= TRANSLATIONS.get(key, _as_it_is(key))(value)
    return changes if planted is None else _of(changes, planted)


def _of(changes: Mapping[str, Any], planted: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of what is planted, factors multiplied in."""
    known: dict[str, Any] = {}
    for key, value in changes.items():
        base = key.removesuffix("_factor")
        if key in planted:
            known[key] = value
        elif base in planted:
            known[base] = planted[base] * value
    return known
