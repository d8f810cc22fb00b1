"""A file of options to start from. A configurable class flows in; TOML with every option, its default and its meaning flows out.

Defaults come from the signature, meanings from the docstring and from the comments of a dataclass's fields, so that the file
cannot lag behind the code. Every option is commented out: as it is printed the file changes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
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
# What a table of a file may hold, where no signature says it.
EXAMPLES = {
    "exit_codes": "exit_codes = { nonfinite_loss = 9 }",
    "trackers": 'trackers = { csv = "run.csv", tensorboard = "runs/7" }',
    "skip": "[lossguard.skip.exploding_gradient]\ntimes = 32.0",
    "rules": "[lossguard.rules.update_ratio_low]   # all fields of a rule: python -m lossguard config update_ratio_low\nratio = 1e-6",
}


def page(cls: Any) -> str:
    """Every option of the class that a file can hold; tables come last, as TOML wants it."""
    told = meanings(cls)
    plain, tables = [], []
    for option in sources.options(cls.__init__).values():
        if option.kind is None or option.kind.words == "'none'":
            continue
        about = _comment(f"{told[option.name]} [{option.kind.words}]")
        example = EXAMPLES.get(option.name, "")
        nested = _dataclass(cls, option.name)
        if option.name not in EXAMPLES:
            example = _table(f"lossguard.{option.name}", nested) if nested else f"{option.name} = {shown(option.default)}"
        elif "[" in example[:1] and option.kind.text is not None:
            plain.append(f"{about}\n{_comment(f'{option.name} = {shown(option.default)}')}")
            about = _comment(f"{option.name} with settings, in the place of the list above")
        (tables if example.startswith("[") else plain).append(f"{about}\n{_comment(example, wrap=False)}")
    return "\n\n".join([_comment(HEAD, wrap=False), "[lossguard]", *plain, *tables])


def rule(name: str) -> str:
    """The table of a rule's fields; ``ValueError`` for an unknown diagnosis.

    >>> print(rule("constant_loss").splitlines()[1])
    [lossguard.rules.constant_loss]
    """
    if name not in RULES:
        raise nearest(name, RULES, "diagnosis", "the rules")
    return f"{_comment(explain.sections(RULES[name])[''])}\n{_table(f'lossguard.rules.{name}', RULES[name], mark='# ')}"


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


def _table(head: str, cls: Any, mark: str = "") -> str:
    """The fields of a dataclass that a file can hold."""
    lines = [f"[{head}]"]
    hints = typing.get_type_hints(cls)
    for name, default, why in explain.fields(cls):
        if (kind := kind_of(hints[name])) is not None and kind.words != "'none'" and default is not dataclasses.MISSING:
            lines.append(f"{mark}{name} = {shown(default)}" + (f"  # {why}" if why else ""))
    return "\n".join(lines)


def _dataclass(cls: Any, name: str) -> Any:
    """The dataclass that an argument's hint speaks of, or None."""
    hint = typing.get_type_hints(inspect.unwrap(cls.__init__))[name]
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((m for m in members if dataclasses.is_dataclass(m)), None)


def _comment(text: str, *, wrap: bool = True) -> str:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, WIDTH - 2, break_on_hyphens=False) if wrap else [line])]
    return "\n".join(f"# {line}" for line in lines)
