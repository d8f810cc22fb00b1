"""The one forward hook of the process, shared by all guards. Module calls flow in and go to whoever listens; nothing is measured.

The hook exists while somebody listens. Once code was compiled under it, it stays until the last guard is closed: compiled
code asks whether it is there, and would be compiled anew without it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lossguard.device import compiled
from lossguard.device.compiled import SWITCH

WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"

_attached: set[int] = set()
_listeners: dict[int, weakref.ref[Any]] = {}
_hearing: tuple[weakref.ref[Any], ...] = ()  # the same, as calls go through them
_key: list[int] = []  # under which the hook is known to torch, the same for good: compiled code is specialised on it


def attach(listener: Any) -> int:
    """A guard begins; its key. ``listener.forward_ended(module, args, output)`` is called while it listens."""
    key = id(listener)
    _attached.add(key)
    compiled.join(key, weakref.ref(listener))
    return key


def detach(key: int) -> None:
    """A guard ended."""
    _attached.discard(key)
    compiled.leave(key)
    _set(key, None, keep=False)


def listen(key: int, listener: Any, on: bool, *, keep: bool = False) -> None:
    """Whether this guard wants the coming step's forward passes. keep: leave the hook in place even if nobody does."""
    _set(key, weakref.ref(listener) if on else None, keep=keep)


def _set(key: int, listener: weakref.ref[Any] | None, *, keep: bool) -> None:
    if listener is not None:
        _listeners[key] = listener
    else:
        _listeners.pop(key, None)
    global _hearing
    _hearing = tuple(_listeners.values())
    SWITCH.on = len(_listeners) > 0
    wanted = SWITCH.on or (len(_attached) > 0 and (SWITCH.traced or keep))
    hooks = torch.nn.modules.module._global_forward_hooks
    if not wanted:
        hooks.pop(_key[0] if _key else -1, None)
    elif not _key:
        _expect_compiled_modules()
        _key.append(register_module_forward_hook(_forward_ended).id)
    elif _key[0] not in hooks:
        _expect_compiled_modules()
        hooks[_key[0]] = _forward_ended


def _forward_ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook. Under Dynamo it is traced into the code; what else traces a module records nothing."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_dynamo_compiling():
            compiled.traced(module, args, output)
        return
    for listener in _hearing:
        taps = listener()
        if taps is not None:
            taps.forward_ended(module, args, output)


def _expect_compiled_modules() -> None:
    """torch warns at calls of a compiled module while a global hook exists. Ours knows compiled modules, so that its
    user has nothing to heed. Added once: a change of the filters makes Python show every old warning again."""
    if "torch._dynamo" in sys.modules and not any(f[0] == "ignore" and f[1] is not None and f[1].pattern == WARNING for f in warnings.filters):
        warnings.filterwarnings("ignore", message=WARNING, category=UserWarning)
