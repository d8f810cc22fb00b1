"""Whether a CUDA graph is being captured: what runs then goes into a plan, and no number exists yet. A host fact; nothing waits."""

from __future__ import annotations

from collections.abc import Callable

import torch

NO_STEP = "lossguard: guard.step() was called while a CUDA graph is captured, and is left out: no number exists yet. Call it after each replay()"

in_use: Callable[[], bool] = torch.cuda.is_initialized  # the next question raises where torch was built for CUDA and there is no driver


def capturing() -> bool:
    """Whether operations of the current stream are captured rather than run."""
    return in_use() and torch.cuda.is_current_stream_capturing()
