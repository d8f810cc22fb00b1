"""Where options come from besides the code: a TOML file, a mapping, environment variables. Text flows in, settings flow out.

A setting is a value as it was written and where it stands; nothing is merged here. What is unknown is an error that names the
nearest known one: an option that is silently not heeded is worse than none.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lossguard.config import named  # noqa: F401 - adds its kinds
from lossguard.config.kinds import OFF, ON, Kind, Unfit, Where, kind_of, nearest, shown

PREFIX = "LOSSGUARD_"
SWITCH = "LOSSGUARD"  # on or off
FILE = "LOSSGUARD_CONFIG"  # a TOML file for every guard of the process
HOUSE = ("LOSSGUARD_TERMINATION_LOG",)  # variables that are no option of a guard, and read elsewhere
IN_CODE = {"phases": "it says how the code calls the guard"}  # texts that only the one who wrote the loop can know
TABLES = ("lossguard",), ("tool", "lossguard")  # where options stand in a file that has others' too


class Option(NamedTuple):
    """A keyword of the guard. kind: None for what cannot be told outside of the code."""

    name: str
    default: Any
    kind: Kind | None


class Setting(NamedTuple):
    """A value as it was written."""

    name: str
    value: Any
    where: Where


Options = Mapping[str, Option]


@functools.cache
def options(init: Callable[..., None]) -> Options:
    """The arguments of a constructor with their defaults and, by their type hints, their kinds.

    >>> def init(self, model: object, *, every: int = 10) -> None: ...
    >>> {name: option.default for name, option in options(init).items() if option.kind}
    {'every': 10}
    """
    init = inspect.unwrap(init)
    hints = typing.get_type_hints(init)
    hints = {name: Any if hint == (Any | None) else hint for name, hint in hints.items()}  # Python 3.10 adds the None of a default
    parameters = list(inspect.signature(init).parameters.values())[1:]
    return {p.name: Option(p.name, p.default, None if p.name in IN_CODE else kind_of(hints[p.name])) for p in parameters}


def written(source: str | Path | Mapping[str, Any], known: Options) -> list[Setting]:
    """The settings of a TOML file or a mapping. ``ValueError`` for a file that cannot be read, and for unknown keys.

    >>> def init(self, *, every: int = 10) -> None: ...
    >>> [(s.name, s.value) for s in written({"lossguard": {"every": 20}, "else": 1}, options(init))]
    [('every', 20)]
    """
    table, place = (source, "the mapping") if isinstance(source, Mapping) else (toml(source), str(source))
    where = Where("", place)
    for path in TABLES:
        inner: Any = table
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            lost = sorted(name for name in table if name in known and known[name].kind)
            if lost:  # at the top of a file that has a table of ours: not read, and hardly another's
                raise ValueError(f"{', '.join(lost)} in {place} is not in the table [{'.'.join(path)}] and would not be heeded; move it below that line")
            table, where = inner, Where(".".join(path), place)
            break
    found = []
    for name, value in table.items():
        _check(name, name, known, "key", where, lambda n: n)
        found.append(Setting(name, value, where.of(name)))
    return found


def outside(known: Options, environment: Mapping[str, str] | None = None) -> list[Setting]:
    """What the environment says: the file that ``LOSSGUARD_CONFIG`` names, then the variables, which go before it.

    An empty variable says nothing. Raises ``ValueError`` for unknown variables and for texts of another kind.

    >>> def init(self, *, every: int = 10) -> None: ...
    >>> [(s.name, s.value, str(s.where)) for s in outside(options(init), {"LOSSGUARD_EVERY": "20"})]
    [('every', 20, 'LOSSGUARD_EVERY')]
    """
    ours = {name: text.strip() for name, text in (os.environ if environment is None else environment).items() if name.startswith(PREFIX)}
    said = {name: text for name, text in ours.items() if text and name not in HOUSE}
    path = said.pop(FILE, None)
    found = [] if path is None else written(path, known)
    for variable, text in sorted(said.items()):
        name = variable.removeprefix(PREFIX).lower()
        option = _check(variable, name, known, "variable", "the environment", lambda n: PREFIX + n.upper())
        found.append(Setting(name, _read(option, text, variable), Where(variable)))
    return found


def switched_off() -> bool:
    """Whether ``LOSSGUARD=off`` stands in the environment. ``ValueError`` for another word than on or off."""
    word = os.environ.get(SWITCH, "").strip().lower()
    if word and word not in ON + OFF:
        raise ValueError(f"{SWITCH} must be 'on' or 'off', got {word!r}; unset it to have guards watch, or name a file of options in {FILE}")
    return word in OFF


def toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's tables; ``ValueError`` for one that is missing or broken."""
    try:
        tables: dict[str, Any] = parser().loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no options can be read from {path} ({error.strerror}); give a TOML file, python -m lossguard config prints one") from error
    except ValueError as error:
        raise ValueError(f"{path} is no TOML file: {error}; python -m lossguard config prints one") from error
    return tables


def parser() -> Any:
    """The module that reads TOML: Python's own, from 3.11 on."""
    try:
        return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError as error:
        raise ImportError("Python 3.10 needs tomli to read a TOML file; pip install tomli") from error


def _check(written: str, name: str, known: Options, what: str, where: object, spelled: Callable[[str], str]) -> Option:
    """The option of this name; ``ValueError`` where there is none, or where it cannot be told outside of the code."""
    option = known.get(name)
    if option is None or written != spelled(name):
        extra = [SWITCH, FILE] if what == "variable" else []
        raise nearest(written, [*extra, *(spelled(o.name) for o in known.values() if o.kind)], what, where)
    if option.kind is None:
        why = IN_CODE.get(name, "no text can hold it")
        raise ValueError(f"{written} cannot be told in {where}: {why}; give it in code: Guard(..., {name}=...)")
    return option


def _read(option: Option, text: str, variable: str) -> Any:
    assert option.kind is not None
    in_file = f"a table can be told in a file only: name it in {FILE}, and write [lossguard.{option.name}] there"
    try:
        if option.kind.text is not None:
            return option.kind.text(text)
    except Unfit:
        tables = f"; {in_file}" if "table" in option.kind.words else ""
        raise ValueError(f"{variable}: expected {option.kind.words}, got {shown(text)}{tables}; unset it for what the code says") from None
    raise ValueError(f"{variable}: {in_file}")
