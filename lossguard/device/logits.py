"""The softmax signals of one set of logits. Logits flow in on their device, scalars flow into a ``Row``; nothing is read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lossguard.device import signals
from lossguard.device.tape import Row

LOGIT_ROWS = 256  # rows of logits looked at, spread over the batch


def logits_numbers(head: int, logits: Tensor, dim: int, targets: Tensor | None, row: Row) -> None:
    """The logit signals of one softmax. logits: any shape with the classes in ``dim``; targets: class indices or None."""
    classes = logits.detach().movedim(dim, -1)
    rows = classes.reshape(-1, classes.shape[-1]) if classes.is_contiguous() else classes.flatten(0, -2)
    stride = max(1, -(-rows.shape[0] // LOGIT_ROWS))
    rows = rows[::stride].to(torch.float32)
    site = np.array([head], dtype=np.intp)
    for chosen in signals.of("logits"):
        row.add_scalars(chosen.name, site, [chosen.measure(rows)])
    if targets is not None and not targets.is_floating_point() and targets.numel() * classes.shape[-1] == classes.numel() and targets.device == logits.device:
        labels = targets.detach().reshape(-1)[::stride].to(torch.int64)
        row.add_scalars("confident_wrong", site, [signals.confident_wrong(rows, labels)])
        row.add_scalars("label_nll", site, [signals.label_nll(rows, labels)])
