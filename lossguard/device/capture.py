"""Whether a CUDA graph is being captured: what runs then goes into a plan, and no number exists yet. A host fact; nothing waits."""

from __future__ import annotations

import torch

BUILT: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # elsewhere torch has no such question
NO_STEP = "lossguard: guard.step() was called while a CUDA graph is captured, and is left out: no number exists yet. Call it after each replay()"


def capturing() -> bool:
    """Whether operations of the current stream are captured rather than run."""
    return BUILT and torch.cuda.is_current_stream_capturing()
