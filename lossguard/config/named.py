"""Rules and trackers, which a file tells of by name. Tables flow in; rule objects with these fields, and trackers, flow out.

On a cluster only the first rank makes a tracker: a file is read by all ranks, and several writers would spoil one file.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lossguard import place, trackers
from lossguard.config.kinds import KINDS, Kind, Unfit, Where, checked, fields_of, kind_of, nearest, shown
from lossguard.rules import RULES, Rule

CLASSES = {"csv": trackers.CSV, "tensorboard": trackers.TensorBoard, "mlflow": trackers.MLflow, "wandb": trackers.WandB}
TRACKERS = {"csv": "path", "tensorboard": "folder", "mlflow": "run_id", "wandb": ""}  # what a text says; "" where it can say nothing
PYTHON = {"folder": "writer"}  # called otherwise in Python, where it may be an object too


def arguments_of(name: str) -> dict[str, Any]:
    """What a tracker may be told, with the types.

    >>> sorted(arguments_of("tensorboard"))
    ['folder', 'layers', 'prefix']
    """
    hints = typing.get_type_hints(vars(CLASSES[name])["__init__"])
    plain = {key: hint for key, hint in hints.items() if key != "return" and hint is not Any}
    return {TRACKERS[name]: str | Path, **plain} if TRACKERS[name] else plain


def needed(name: str) -> str:
    """The argument that a tracker cannot do without, or nothing.

    >>> needed("csv"), needed("mlflow")
    ('path', '')
    """
    first = next(iter(inspect.signature(CLASSES[name]).parameters.values()))
    return TRACKERS[name] if first.default is inspect.Parameter.empty else ""


def make(name: str, given: Mapping[str, Any]) -> Any:
    """The tracker on the first rank; on another a function that does nothing, so that all ranks have as many."""
    if place.rank():
        return _nothing
    return CLASSES[name](**{PYTHON.get(key, key): value for key, value in given.items()})


def _nothing(step: int, numbers: Mapping[str, float]) -> None:
    """Rank 0 writes."""


def _rules(value: Any, where: Where, base: Any) -> list[Rule]:
    """Tables of fields by diagnosis; they change the rule that the code gives, else the default one."""
    if not isinstance(value, Mapping):
        raise Unfit
    chosen = {getattr(rule, "diagnosis", id(rule)): rule for rule in base}
    for name, fields in value.items():
        if name not in chosen and name not in RULES:
            raise nearest(name, {*RULES, *map(str, chosen)}, "diagnosis", where)
        rule = chosen.get(name) or RULES[name]()
        if not dataclasses.is_dataclass(rule):
            raise ValueError(f"{where.of(name)}: {type(rule).__name__} is no dataclass, so it has no fields to set; give the rule in code: Guard(rules=[...])")
        chosen[name] = checked(fields_of(type(rule)), fields, where.of(name), rule)
    return list(chosen.values())


def _trackers(value: Any, where: Where, base: Any) -> list[Any]:
    """Those of the code, and those that the table names."""
    if not isinstance(value, Mapping):
        raise Unfit
    held = list(base) if isinstance(base, Iterable) else [base]
    made = []
    for name, given in value.items():
        if name not in TRACKERS:
            raise nearest(name, TRACKERS, "tracker", where)
        arguments = {TRACKERS[name]: given} if isinstance(given, (str, Path)) and TRACKERS[name] else given
        if not isinstance(arguments, Mapping):
            text = f"its {TRACKERS[name]} or " if TRACKERS[name] else ""
            raise ValueError(f"{where.of(name)}: expected {text}a table of its arguments, got {shown(given)}; leave it out for no such tracker")
        hints = arguments_of(name)
        for key, argument in arguments.items():
            if key not in hints:
                raise nearest(key, hints, "argument", where.of(name))
            kind = kind_of(hints[key])
            assert kind is not None
            checked(kind, argument, where.of(name).of(key), None)
        if (first := needed(name)) and first not in arguments:
            raise ValueError(f'{where.of(name)}: {first} is missing; tell where it goes, as in {name}.{first} = "run"')
        made.append((name, arguments))
    return [*held, *(make(name, arguments) for name, arguments in made)]


KINDS[Iterable[Rule]] = Kind("a table of rules by diagnosis, each a table of its fields", _rules)
KINDS[Iterable[Any]] = Kind(f"a table of trackers ({', '.join(TRACKERS)})", _trackers)
