"""Keywords of a trainer's callback: those of the guard, but for what the Trainer answers itself. Names flow in, an error that says what to write flows out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

from lossguard.config import Kept
from lossguard.guard import Guard


def check(given: Iterable[str], own: Collection[str], answered: Collection[str]) -> None:
    """``TypeError`` for a keyword that is neither the guard's nor the callback's own. answered: the guard's, which the Trainer answers.

    >>> check(["every"], ["name"], ["model"])
    """
    known = [k for k in inspect.signature(Guard).parameters if k not in answered]
    for keyword in given:
        if keyword not in known:
            near = difflib.get_close_matches(keyword, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join([*own, *known])}"
            raise TypeError(f"unknown keyword {keyword!r}; {hint}")


def mute(keywords: dict[str, Any], diagnosis: str) -> None:
    """Mute what this trainer would be wronged by, besides what the keywords mute, and whatever a file or the environment mutes instead.

    >>> keywords = {"mute": {"dead_relu"}}; mute(keywords, "unchanged_weights"); sorted(keywords["mute"])
    ['dead_relu', 'unchanged_weights']
    """
    given = keywords.get("mute", ())
    keywords["mute"] = Kept([given, diagnosis] if isinstance(given, str) else [*given, diagnosis])
