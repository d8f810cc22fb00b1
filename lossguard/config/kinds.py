"""Kinds of values that can be told in a file or an environment variable. A type hint flows in, a reader of such values flows out.

A reader checks what it is given by type and says what it expected. It gets what the code says (``base``) as well: a table is
merged into it, field by field; everything else takes its place. What no text can hold (a module, a callable) has no kind.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lossguard.findings import DIAGNOSES, Severity

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")  # in an environment variable
NONE = "none"  # TOML has no null


class Unfit(Exception):
    """The value is of another kind."""


class Where(NamedTuple):
    """Where a value stands: ``every`` in ``run.toml``, or an environment variable, which needs no place."""

    key: str
    source: str = ""

    def of(self, key: str) -> Where:
        """A key in the table that stands here."""
        return Where(f"{self.key}.{key}" if self.key else key, self.source)

    def __str__(self) -> str:
        return " in ".join(part for part in (self.key, self.source) if part)


class Kept(frozenset[str]):
    """Names in the code that stay whatever list takes the place of its own: what an integration knows to be needed."""


@dataclass(frozen=True)
class Kind:
    """words: what is expected. read: value, where it stands, what the code says -> the value as Guard takes it; raises ``Unfit``
    for another kind, ``ValueError`` for a wrong value of this one. text: an environment variable's text -> a value to read, None
    where only a file can hold it."""

    words: str
    read: Callable[[Any, Where, Any], Any]
    text: Callable[[str], Any] | None = None


def checked(kind: Kind, value: Any, where: Where, base: Any) -> Any:
    """The value as Guard takes it; ``ValueError`` if it is of another kind.

    >>> checked(kind_of(int), 20, Where("every", "run.toml"), 10)
    20
    >>> checked(kind_of(int), "often", Where("every", "run.toml"), 10)
    Traceback (most recent call last):
    ValueError: every in run.toml: expected an integer, got "often"; leave it out for 10
    """
    try:
        return kind.read(value, where, base)
    except Unfit:
        raise ValueError(f"{where}: expected {kind.words}, got {shown(value)}; leave it out for {shown(base)}") from None


def kind_of(hint: Any) -> Kind | None:
    """The kind of a type hint; None for what cannot be told in a file.

    >>> kind_of(bool | float | None).words, kind_of(Callable[[], int])
    ("true or false, a number or 'none'", None)
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _union(typing.get_args(hint))
    if hint in KINDS:
        return KINDS[hint]
    if dataclasses.is_dataclass(hint):
        return fields_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Mapping:
        member = kind_of(arguments[1])
        return None if member is None else _table(member)
    if origin is tuple and arguments[1:] == (...,):
        member = kind_of(arguments[0])
        return None if member is None else _row(member)
    return None


def shown(value: Any) -> str:
    """A value as TOML has it; what TOML does not know as Python writes it.

    >>> print(shown(None), shown(True), shown((1, "a")), shown({"a": 1.5}), shown(Severity.HALT))
    "none" true [1, "a"] { a = 1.5 } "halt"
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, (str, Path, Severity)):
        return json.dumps(NONE if value is None else value.label if isinstance(value, Severity) else str(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {shown(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else repr(value)


def nearest(name: object, known: Iterable[str], what: str, where: object) -> ValueError:
    """The error for an unknown name, with the one that was meant.

    >>> print(nearest("evry", ["every", "dense"], "key", "run.toml"))
    unknown key 'evry' in run.toml; did you mean 'every'? known: dense, every
    """
    known = sorted(known)
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    return ValueError(f"unknown {what} {name!r} in {where}; {f'did you mean {folded[near[0]]!r}? ' if near else ''}known: {', '.join(known)}")


# ---- plain values


def _only(*kinds: type) -> Callable[[Any, Where, Any], Any]:
    def read(value: Any, where: Where, base: Any) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):  # True is an int to Python
            raise Unfit
        return value

    return read


def _number(value: Any, where: Where, base: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unfit
    if math.isnan(value):
        raise ValueError(f"{where}: NaN is no limit that a number can be held against; give a number, or inf for never")
    return value


def _none(value: Any, where: Where, base: Any) -> None:
    if value not in (None, NONE):
        raise Unfit


def _severity(value: Any, where: Where, base: Any) -> Severity:
    if isinstance(value, Severity):
        return value
    labels = [s.label for s in Severity]
    if value in labels:
        return Severity.parse(value)
    near = difflib.get_close_matches(value, labels, 1, 0.7) if isinstance(value, str) else []
    if near and value not in DIAGNOSES:
        raise ValueError(f"{where}: unknown severity {value!r}; did you mean {near[0]!r}? known: {', '.join(labels)}")
    raise Unfit


def _names(value: Any, where: Where, base: Any) -> frozenset[str]:
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise Unfit
    given = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in given):
        raise Unfit
    for name in given:
        if name not in DIAGNOSES:
            raise nearest(name, DIAGNOSES, "diagnosis", where)
    names = frozenset(given)
    return Kept(names | base) if isinstance(base, Kept) else names


def _bool_of(text: str) -> bool:
    if text.lower() not in ON + OFF:
        raise Unfit
    return text.lower() in ON


def _number_of(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise Unfit from None

    return read


def _list_of(text: str) -> str | list[str]:
    """Names between commas; a single one stays a text, since it may be a severity."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if len(names) == 1 and text.lower() != NONE else [name for name in names if name.lower() != NONE]


# ---- tables and lists


def fields_of(cls: Any) -> Kind:
    """A table of a dataclass's fields."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(cls)}

    def read(value: Any, where: Where, base: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise Unfit
        base = base if isinstance(base, cls) else cls()
        told: dict[str, Any] = {}
        for name, given in value.items():
            if name not in fields:
                raise nearest(name, fields, "field", where)
            kind = fields[name]
            if kind is None:
                raise ValueError(f"{where.of(name)}: this cannot be told in a file; give it in code: {cls.__name__}({name}=...)")
            told[name] = checked(kind, given, where.of(name), getattr(base, name))
        try:
            return dataclasses.replace(base, **told)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return Kind(f"a table of fields of {cls.__name__}", read)


def _table(member: Kind) -> Kind:
    """A table from name to value. Where the code gives a list of names, these stay."""

    def read(value: Any, where: Where, base: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Unfit
        held = dict(base) if isinstance(base, Mapping) else dict.fromkeys([base] if isinstance(base, str) else base or ())
        return {**held, **{str(name): checked(member, given, where.of(name), held.get(name)) for name, given in value.items()}}

    return Kind(f"a table from a name to {member.words}", read)


def _row(member: Kind) -> Kind:
    """A list of values of one kind, as a tuple."""

    def read(value: Any, where: Where, base: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise Unfit
        return tuple(checked(member, given, where, base) for given in value)

    return Kind(f"a list, each of it {member.words}", read)


# ---- one of several


def _union(members: Iterable[Any]) -> Kind | None:
    """What any member reads; the narrower first. Texts of a certain meaning (names, paths) go before any text."""
    hints = sorted(members, key=lambda hint: list(KINDS).index(hint) if hint in KINDS else len(KINDS))
    special = {Path, Severity, NAMES} & {hint for hint in hints if hint in KINDS}
    kinds = [kind for hint in hints if not (hint is str and special) and (kind := kind_of(hint)) is not None]
    if not kinds:
        return None

    def read(value: Any, where: Where, base: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value, where, base)
            except Unfit:
                continue
        raise Unfit

    def text(given: str) -> Any:
        for kind in kinds:
            try:
                if kind.text is not None:
                    return kind.text(given)
            except Unfit:
                continue
        raise Unfit

    words = [kind.words for kind in (kinds[1:] + kinds[:1] if kinds[0] is KINDS[type(None)] else kinds)]
    told = " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
    return Kind(told, read, text if any(kind.text for kind in kinds) else None)


def _none_of(text: str) -> None:
    if text.lower() != NONE:
        raise Unfit


NAMES = Iterable[str]
KINDS: dict[Any, Kind] = {  # the narrower before the wider
    type(None): Kind(f"{NONE!r}", _none, _none_of),
    bool: Kind("true or false", _only(bool), _bool_of),
    int: Kind("an integer", _only(int), _number_of(int)),
    float: Kind("a number", _number, _number_of(float)),
    Severity: Kind("a severity (" + ", ".join(s.label for s in Severity) + ")", _severity),
    NAMES: Kind("a list of diagnoses", _names, _list_of),
    Path: Kind("a path", _only(str, Path), str),
    str: Kind("a text", _only(str), str),
}
