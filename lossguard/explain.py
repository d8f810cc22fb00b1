"""What a diagnosis means: made from the registry of rules, so that it can never lag behind the code. Text flows out."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap

from lossguard.findings import DIAGNOSES, check_names
from lossguard.preflight import CHECKS
from lossguard.rules import RULES


def listing() -> str:
    """All diagnoses, one line each."""
    width = max(map(len, DIAGNOSES))
    return "\n".join(f"{name:<{width}}  {severity.label:<8} {summary}" for name, (severity, summary) in sorted(DIAGNOSES.items()))


def page(name: str) -> str:
    """The page of one diagnosis; ``ValueError`` with a suggestion for an unknown one.

    >>> print(page("constant_loss").splitlines()[0])
    constant_loss (warning): the loss does not change from batch to batch
    """
    check_names({name}, "explain")
    severity, summary = DIAGNOSES[name]
    cls = RULES.get(name) or CHECKS.get(name)
    parts = [f"{name} ({severity.label}): {summary}"]
    if cls is not None:
        parts.append(inspect.cleandoc(cls.__doc__ or ""))
        parts.append("It reads " + ", ".join(cls.reads) + "." if name in RULES else "It is asked before the first step, by lossguard.preflight.")
        parts.append("Limits\n" + "\n".join(f"  {field} = {value}" + (f"    {why}" if why else "") for field, value, why in fields(cls)))
        first = next((f for f, value, _ in fields(cls) if isinstance(value, float)), None)
        call, argument = ("Guard", "rules") if name in RULES else ("preflight", "checks")
        tune = f"    {call}(..., {argument}=[{cls.__name__}({first}=...)])\n" if first else ""
        parts.append(f"Silence or tune\n    {call}(..., mute={{{name!r}}})\n{tune}    from {cls.__module__} import {cls.__name__}")
    return "\n\n".join(parts)


def fields(cls: type) -> list[tuple[str, object, str]]:
    """The thresholds of a rule: (name, default, the comment that gives unit and source)."""
    source = inspect.getsource(cls)
    found = []
    for field in dataclasses.fields(cls):
        match = re.search(rf"^    {field.name}:[^\n#]*?(?:#\s*(.*))?$", source, re.MULTILINE)
        found.append((field.name, field.default, (match.group(1) or "").strip() if match else ""))
    return found


def wrapped(text: str, width: int = 100) -> str:
    """Long lines folded for a terminal, indentation kept."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = re.match(r"\s*", line)
        lead = indent.group(0) if indent else ""
        lines += textwrap.wrap(line, width, subsequent_indent=lead + "    " * bool(lead)) or [""]
    return "\n".join(lines)
