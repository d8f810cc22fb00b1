"""The part of a guard that is configured from outside of the code. Keywords flow in, those that hold flow out.

What stands in the environment goes before the file that ``LOSSGUARD_CONFIG`` names, and this before the keywords in the code:
whoever runs a job must be able to change what he cannot edit. A table (rules, recover, exit_codes, skip, trackers) is merged
into what the code says, anything else takes its place. What was set so is told in the log and in the record.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lossguard import arguments, place, watching
from lossguard.actions import logger
from lossguard.config import sources
from lossguard.config.idle import QUIET, Idle
from lossguard.config.kinds import checked, shown
from lossguard.config.sources import Options, Setting

G = TypeVar("G", bound="Configured")
Init = TypeVar("Init", bound=Callable[..., None])


def configurable(init: Init) -> Init:
    """A guard's constructor that heeds the environment; name, signature and documentation stay."""

    @functools.wraps(init)
    def configured(self: Any, *args: Any, **keywords: Any) -> None:
        known = sources.options(init)
        self.configured, off = {}, isinstance(self, Idle)
        if off:
            logger.warning("lossguard: switched off by LOSSGUARD=off, nothing is watched")
            self.configured[sources.SWITCH] = "off"
            needed = {name: value for name, value in keywords.items() if name not in known or known[name].default is inspect.Parameter.empty}
            init(self, *args, **needed, **QUIET)
            self.close()
            return
        settings = sources.outside(known)
        with blamed(settings):
            held = merged(known, keywords, settings)
            if any(s.name == "record" for s in settings):
                held["record"] = untaken(held["record"], args[0] if args else keywords.get("model"))
            init(self, *args, **held)
        for name, (written, where) in newest(settings).items():
            value = held["record"] if name == "record" else written
            code = keywords.get(name, known[name].default)
            instead = "" if isinstance(value, Mapping) or shown(code) == shown(value) else f", in the place of {shown(code)}"
            self.configured[name] = f"{shown(value)} ({where})"
            words = f"{name} = {shown(value)} by {where}{instead}"
            logger.info("lossguard: %s", words)
            self.note(words)

    return cast(Init, configured)


class Configured:
    """The part of a guard that is set up by people who do not edit the code. configured: keyword -> value and where it stands."""

    configured: dict[str, str]

    def __new__(cls: type[G], *args: Any, **keywords: Any) -> G:
        """With ``LOSSGUARD=off`` in the environment one that does nothing."""
        chosen: Any = cls
        return cast(G, super().__new__(_idle(chosen) if sources.switched_off() else chosen))

    @classmethod
    def from_config(cls: type[G], model: Any, optimizers: Any, source: str | Path | Mapping[str, Any], **overrides: Any) -> G:
        """A guard whose keywords stand in a TOML file, in a table ``[lossguard]``, ``[tool.lossguard]`` or at its top, or in a mapping.

        ``"none"`` stands for None. rules: ``[lossguard.rules.DIAGNOSIS]`` with the rule's fields; skip:
        ``[lossguard.skip.exploding_gradient]`` with those of its ``Limit``, or a list; recover: those of a ``Ladder``; trackers:
        ``csv = "run.csv"``, ``tensorboard = "runs/7"``, made on the first rank only. overrides: keywords that go before the file, and
        what no file can hold: scaler, callables, rules of your own. ``python -m lossguard config`` prints such a file.

        Raises ``ValueError`` for unknown keys, names and fields, and for values of another type; it says where they stand.

        >>> import torch
        >>> from lossguard import Guard
        >>> model = torch.nn.Linear(4, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> options = {"every": 20, "halt": "error", "rules": {"update_ratio_low": {"ratio": 1e-8}}}
        >>> with Guard.from_config(model, optimizer, options, dense=10) as guard:
        ...     guard.every, guard.dense
        (20, 10)
        >>> Guard.from_config(model, optimizer, {"mutes": ["loss_spike"]})
        Traceback (most recent call last):
        ValueError: unknown key 'mutes' in the mapping; did you mean 'mute'? known: ...
        """
        if sources.switched_off():
            return cls(model, optimizers, **overrides)  # no file is read, no tracker made
        known = sources.options(_init_of(cls))
        settings = [s for s in sources.written(source, known) if s.name not in overrides]
        with blamed(settings):
            guard = cls(model, optimizers, **{**merged(known, {}, settings), **overrides})
        guard.configured = {**{s.name: f"{shown(s.value)} ({s.where})" for s in settings}, **guard.configured}
        return guard


def merged(known: Options, keywords: Mapping[str, Any], settings: Iterable[Setting]) -> dict[str, Any]:
    """The keywords with the settings in their place, or merged into them; the later goes before the earlier.

    >>> def init(self, *, every: int = 10, exit_codes: dict[str, int] | None = None) -> None: ...
    >>> known = sources.options(init)
    >>> merged(known, {"every": 5}, sources.outside(known, {"LOSSGUARD_EVERY": "20"}))
    {'every': 20}
    """
    held = dict(keywords)
    for name, value, where in settings:
        option = known[name]
        assert option.kind is not None
        held[name] = checked(option.kind, value, where, held.get(name, option.default))
    return held


def newest(settings: Iterable[Setting]) -> dict[str, tuple[Any, object]]:
    """What holds of several settings of one name."""
    return {s.name: (s.value, s.where) for s in settings}


@contextlib.contextmanager
def blamed(settings: Iterable[Setting]) -> Iterator[None]:
    """A ``ValueError`` of the guard about an option that was set outside of the code says where."""
    try:
        yield
    except ValueError as error:
        named = [str(where) for name, (_, where) in newest(settings).items() if re.search(rf"\b{name}(=| must|\[)|unknown {name} ", str(error))]
        if not named:
            raise
        raise ValueError(f"{error} (set by {', '.join(named)})") from error


def untaken(record: Any, model: Any) -> Any:
    """A folder in which no other guard of this process writes now: one variable speaks to all of them, as of two networks that train together."""
    if record is None:
        return None
    old = watching.watcher(arguments.a_model(model))
    open_ = [guard for guard in watching.guards() if guard is not old]
    taken = {held.folder for guard in open_ if (held := getattr(guard, "_record", None)) is not None}
    chosen, number = Path(record), 1
    while place.own_folder(chosen) in taken:
        number += 1
        chosen = Path(record) / f"guard{number}"
    return chosen


@functools.cache
def _idle(cls: Any) -> Any:
    """The class with the idle one before it."""
    return cls if issubclass(cls, Idle) else type(f"Idle{cls.__name__}", (Idle, cls), {"__doc__": Idle.__doc__, "__module__": cls.__module__})


def _init_of(cls: type[Any]) -> Callable[..., None]:
    """The constructor that is configurable, whatever a subclass has put before it."""
    own: Callable[..., None] = next(vars(c)["__init__"] for c in cls.__mro__ if hasattr(vars(c).get("__init__"), "__wrapped__"))
    return own
