"""What must be known of a Hugging Face Trainer to watch it: who calls, by which engine, and how to stand in a method's way for a while.

Objects of transformers and Accelerate flow in; nothing of either is imported before it is asked for.
"""

from __future__ import annotations

import base64
import functools
import io
import sys
import weakref
import zlib
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

# Engines that keep gradients and weights where no module's parameter shows them.
HIDING = {
    "DEEPSPEED": "DeepSpeed keeps gradients and master weights in flat buffers of its own: gradients and updates are not seen, all else is",
    "MEGATRON_LM": "Megatron-LM runs backward and the update inside its own engine: gradients and updates are not seen",
}


class Detour:
    """One object's method is led through ``around(method, *args, **kwargs)`` until it is removed. Its class stays as it is."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = weakref.ref(owner), name
        self._before = vars(owner).get(name)
        method = getattr(owner, name)

        @functools.wraps(method)
        def led(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs)

        self._led = led
        setattr(owner, name, led)

    def remove(self) -> None:
        """As it was before; where somebody has put his own in front of ours meanwhile, his stays, and ours does nothing."""
        owner = self._owner()
        if owner is None or vars(owner).get(self._name) is not self._led:
            return
        if self._before is None:
            delattr(owner, self._name)
        else:
            setattr(owner, self._name, self._before)


def caller(belongs: Callable[[Any], bool]) -> tuple[Any, Any]:
    """The Trainer whose event this is, and which of its callbacks belongs to us: callbacks are not told, but it stands on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        one = frame.f_locals.get("self")
        handler = getattr(one, "__dict__", {}).get("callback_handler")
        for callback in getattr(handler, "callbacks", ()):
            if belongs(callback):
                return one, callback
        frame = frame.f_back
    return None, None


def engine(accelerator: Any) -> str:
    """``NO``, ``MULTI_GPU``, ``FSDP``, ``DEEPSPEED``, ..."""
    return str(getattr(getattr(accelerator, "distributed_type", ""), "value", ""))


def shifts_labels(trainer: Any, model: Any) -> bool:
    """Whether the model's own loss shifts the labels by one token, as that of a causal language model does."""
    if getattr(trainer, "_loss_shifts_labels", False) is True:  # of newer versions, which do not know it of every such model
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM")


def as_text(state: Mapping[str, Any]) -> str:
    """Tensors and plain types as compressed text, for a JSON file."""
    held = io.BytesIO()
    torch.save(dict(state), held)
    return base64.b64encode(zlib.compress(held.getvalue())).decode("ascii")


def from_text(text: str) -> Any:
    """The inverse of :func:`as_text`; reads no pickled code."""
    return torch.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), weights_only=True)
