"""The softmax signals of one set of logits. Logits flow in on their device, scalars flow into a ``Row``; nothing is read.

The built-in signals share one log-softmax; each is defined in ``signals`` by itself, for reading and for tests. Few logits
travel whole, and ``host.softmaxes`` takes the same numbers of them: two copies here instead of sixteen operations.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from lossguard.device import outputs, signals
from lossguard.device.tape import Row, Sites

LOGIT_ROWS = 256  # rows of logits looked at at most, spread over the batch
LOGIT_ELEMENTS, FEW_ROWS = 2**17, 64  # of more logits than these so many rows: six passes over 256 rows of a large vocabulary cost more than all else
PEAK = "logit_peak"
SHARED = ("confident_fraction", "log_normalizer")  # what every softmax gives
# what it gives beside targets: shares and a mean over all rows, from which the host makes those over the rows that count
LABELLED = ("labelled_fraction", "wrong_part", "nll_part")
WHOLE = 4096  # elements up to which logits travel whole: 16 KB of a row; our own choice, on a GPU less than what one launch costs
LOGITS, LABELS = "whole_logits", "whole_labels"  # the sites of these two are places in a matrix, see `place`
FIELD = 16  # bits of each number in a place: element, columns, rows, head


def logits_numbers(head: int, logits: Tensor, dim: int, targets: Tensor | None, row: Row) -> None:
    """The logit signals of one softmax. logits: any shape with the classes in ``dim``; targets: class indices or None."""
    classes = logits.detach().movedim(dim, -1)
    rows = classes.reshape(-1, classes.shape[-1]) if classes.is_contiguous() else classes.flatten(0, -2)
    most = max(FEW_ROWS, min(LOGIT_ROWS, LOGIT_ELEMENTS // rows.shape[1]))
    stride = outputs.stride(-(-rows.shape[0] // most), rows.shape[0], most // 2)
    rows = rows[::stride].to(torch.float32)
    site = _site(head)
    labels = None
    if targets is not None and not targets.is_floating_point() and targets.numel() * classes.shape[-1] == classes.numel() and targets.device == logits.device:
        labels = targets.detach().reshape(-1)[::stride]
    whole = rows.numel() <= WHOLE
    if whole:
        row.add(LOGITS, _places(head, *rows.shape), rows.clone(memory_format=torch.contiguous_format).view(-1))
        if labels is not None:
            row.add(LABELS, _places(head, len(labels), 1), labels.to(torch.float32))
    else:
        for names, numbers in together(rows, labels).items():
            row.add_block(names, [site] * len(names), numbers)
    for chosen in signals.of("logits"):
        if chosen.name not in SHARED and not (whole and chosen.name == PEAK):
            row.add_scalars(chosen.name, site, [chosen.measure(rows)])


def together(rows: Tensor, labels: Tensor | None) -> dict[tuple[str, ...], Tensor]:
    """SHARED, and LABELLED where there are labels: (R, C), (R,) -> names and as many numbers.

    nll_part: mean negative log-likelihood of the labels; wrong_part: share of rows that are confident and wrong. Rows
    whose label is no class (padding) count in neither and not in ``labelled_fraction``.
    """
    scores = torch.log_softmax(rows, dim=1)
    top = scores.amax(dim=1)
    confident = top > math.log(signals.CONFIDENT)
    normalizer = rows.amax(dim=1) - top
    if labels is None:
        return {SHARED: torch.stack((confident, normalizer)).mean(dim=1).abs()}
    labels = labels.to(torch.int64)
    inside = labels.clamp(0, rows.shape[1] - 1)
    counted = inside == labels
    own = torch.where(counted, scores.gather(1, inside.unsqueeze(1)).squeeze(1), 0.0)
    wrong = (own < top) & confident  # top is at most 0: a row that does not count is never wrong
    means = torch.stack((confident, normalizer, counted, wrong, own)).mean(dim=1).abs()  # log-likelihoods are at most 0
    return {(*SHARED, *LABELLED): means}


@functools.lru_cache(maxsize=64)
def _site(head: int) -> Sites:
    return np.array([head], dtype=np.intp)


@functools.lru_cache(maxsize=64)
def _places(head: int, rows: int, columns: int) -> Sites:
    """Where the numbers of a matrix stand: its head and shape in each place, so that matrices of one row do not overlap."""
    return np.arange(rows * columns, dtype=np.intp) | ((head << FIELD | rows) << FIELD | columns) << FIELD


def place(site: int) -> tuple[int, int, int]:
    """Head, rows and columns of the matrix that a place belongs to.

    >>> place(int(_places(3, 64, 10)[-1]))
    (3, 64, 10)
    """
    shape = site >> FIELD
    return shape >> 2 * FIELD, shape >> FIELD & (1 << FIELD) - 1, shape & (1 << FIELD) - 1
