"""A file of options to start from. A configurable class flows in; TOML with every option, its default and its meaning flows out.

Defaults come from the signature, meanings from the docstring and from the comments of a dataclass's fields, so that the file
cannot lag behind the code. Every option is commented out: as it is printed the file changes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from typing import Any

from lossguard import explain
from lossguard.config import sources
from lossguard.config.kinds import kind_of, nearest, shown
from lossguard.rules import RULES

WIDTH = 120
HEAD = """\
Options of lossguard with their defaults; "none" stands for None. Take the '#' from what you want to change, and name the file
in the environment: LOSSGUARD_CONFIG=FILE
on the command line: python -m lossguard run --config FILE script.py
or in code: Guard.from_config(model, optimizer, FILE)
Single values may stand in the environment as well, and go before the file: LOSSGUARD_EVERY=20"""
EXAMPLES = {"exit_codes": "exit_codes = { nonfinite_loss = 9 }", "trackers": 'trackers = { csv = "run.csv", tensorboard = "runs/7" }'}
KEYS = {"skip": "exploding_gradient", "rules": "update_ratio_low"}  # which of a table's tables is shown
UNTOLD = "'none'"  # words of a kind that holds nothing else


def page(cls: Any) -> str:
    """Every option of the class that a file can hold; tables come last, as TOML wants it."""
    told, nested = meanings(cls), tables(cls)
    plain, behind = [], []
    for option in sources.options(cls.__init__).values():
        if option.kind is None or option.kind.words == UNTOLD:
            continue
        about = _comment(f"{told[option.name]} [{option.kind.words}]")
        if option.name not in nested or (option.default == () and option.kind.text):
            plain.append(f"{about}\n# {EXAMPLES.get(option.name, f'{option.name} = {shown(option.default)}')}")
            about = f"# {option.name} with settings, in the place of the list above"
        if option.name in nested:
            head, fields = nested[option.name]
            asked = KEYS["rules"] if option.name == "rules" else option.name
            first = next(line for line in _fields(fields) if line.partition(" = ")[2][0].isdigit())
            behind.append(f"{about}\n# [{head}]   # all fields: python -m lossguard config {asked}\n# {first}")
    return "\n\n".join([_comment(HEAD, wrap=False), "[lossguard]", *plain, *behind])


def table(cls: Any, name: str) -> str:
    """All fields of a rule, by its diagnosis, or of another option of the class that is a table; ``ValueError`` for an unknown name.

    >>> from lossguard import Guard
    >>> print(table(Guard, "recover").splitlines()[1])
    [lossguard.recover]
    """
    known = {diagnosis: (f"lossguard.rules.{diagnosis}", fields) for diagnosis, fields in RULES.items() if dataclasses.is_dataclass(fields)} | tables(cls)
    if name not in known:
        raise nearest(name, known, "table", "the options")
    head, fields = known[name]
    about = _comment(explain.sections(fields)[""])
    return "\n".join([about, f"[{head}]", *(f"# {line}" for line in _fields(fields))])


def tables(cls: Any) -> dict[str, tuple[str, Any]]:
    """Options that are tables of a dataclass's fields: option -> (the table's head, the dataclass)."""
    hints = typing.get_type_hints(inspect.unwrap(cls.__init__))
    found = {name: fields for name, hint in hints.items() if (fields := _dataclass(hint)) is not None} | {"rules": RULES[KEYS["rules"]]}
    return {name: (".".join(["lossguard", name, *([KEYS[name]] if name in KEYS else [])]), fields) for name, fields in found.items()}


def meanings(cls: Any) -> dict[str, str]:
    """What the docstring says of each argument.

    >>> class Kettle:
    ...     '''Boils. heat: how hot. lid: whether it
    ...     has one.'''
    ...     def __init__(self, heat: int, lid: bool = True) -> None: ...
    >>> meanings(Kettle)
    {'heat': 'how hot', 'lid': 'whether it has one'}
    """
    names = list(sources.options(cls.__init__))
    text = " ".join(inspect.cleandoc(cls.__doc__ or "").partition("Raises ``")[0].split()).replace("``", "")
    text = re.sub(r"\b(None|True|False)\b", lambda word: word.group().lower(), text)  # as TOML has them
    parts = re.split(rf"(?:^|(?<=\. )|(?<=\) ))({'|'.join(names)}): ", text)
    return {name: meaning.strip().rstrip(".") for name, meaning in zip(parts[1::2], parts[2::2], strict=True)}


def _fields(cls: Any) -> list[str]:
    """The fields of a dataclass that a file can hold, each with what it means."""
    hints = typing.get_type_hints(cls)
    told = [(name, default, why) for name, default, why in explain.fields(cls) if (kind := kind_of(hints[name])) is not None and kind.words != UNTOLD]
    return [f"{name} = {shown(default)}" + (f"  # {why}" if why else "") for name, default, why in told]


def _dataclass(hint: Any) -> Any:
    """The dataclass that a hint speaks of, alone, beside others or in a mapping; None without one."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for member in typing.get_args(hint) if (found := _dataclass(member)) is not None), None)


def _comment(text: str, *, wrap: bool = True) -> str:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, WIDTH - 2, break_on_hyphens=False) if wrap else [line])]
    return "\n".join(f"# {line}" for line in lines)
