"""Keywords of a trainer's callback: those of the guard, but for what the Trainer answers itself. Names flow in, an error that says what to write flows out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable

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
