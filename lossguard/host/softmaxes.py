"""The softmax signals of small logits, which travel whole: a dozen numpy calls here for as many device operations.

Logits and labels flow in as they arrived, what ``device.logits`` takes of larger ones flows out. Numpy only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lossguard.device.logits import LABELS, LOGITS, place
from lossguard.device.signals import CONFIDENT
from lossguard.host.columns import Array, Sites

NAMES = ("logit_peak", "confident_fraction", "log_normalizer")  # of every softmax
LABELLED = ("labelled_fraction", "wrong_part", "nll_part")  # of one beside labels: shares and a mean over all rows
UNSURE = -math.log(CONFIDENT)  # the log-normaliser of logits whose largest is 0, from which on a row is not confident

Values = dict[str, tuple[Sites, Array]]


def unpack(values: Values) -> None:
    """Puts the signals of all softmaxes whose logits came whole in the place of these."""
    if LOGITS not in values:
        return
    labels = dict(_matrices(*values.pop(LABELS))) if LABELS in values else {}
    found: dict[str, dict[int, float]] = {}
    with np.errstate(all="ignore"):
        for head, logits in _matrices(*values.pop(LOGITS)):
            theirs = labels.get(head)
            beside = theirs is not None and len(theirs) == len(logits)
            numbers = measure(logits, theirs[:, 0] if theirs is not None and beside else None)
            for name, number in zip(NAMES + LABELLED if beside else NAMES, numbers, strict=True):
                found.setdefault(name, {})[head] = number
    for name, of in found.items():
        if name in values:  # of larger logits
            of = {**dict(zip(*(part.tolist() for part in values[name]), strict=True)), **of}
        values[name] = _sites(tuple(of)), np.array(list(of.values()))


def measure(logits: Array, labels: Array | None = None) -> list[float]:
    """NAMES, and LABELLED where there are labels: (R, C), (R,) -> numbers, as defined in ``device.signals`` and ``device.logits``."""
    rows, classes = logits.shape
    largest = logits.max(axis=1)
    shifted = logits - largest[:, None]
    normalizer = np.log(np.exp(shifted).sum(axis=1))  # of the shifted logits: minus the log-likelihood of each row's top class
    confident = normalizer < UNSURE
    found = [_peak(logits, float(largest.max())), np.count_nonzero(confident) / rows, abs(float((largest + normalizer).sum()) / rows)]
    if labels is None:
        return found
    counted = (labels >= 0) & (labels < classes)  # padding has a label that is no class
    own = shifted[np.arange(rows), np.where(counted, labels, 0).astype(np.intp)]  # 0 where the label has the top
    nll = np.where(counted, normalizer - own, 0.0)
    return [*found, np.count_nonzero(counted) / rows, np.count_nonzero(confident & counted & (own < 0)) / rows, float(nll.sum()) / rows]


def _peak(logits: Array, largest: float) -> float:
    """The largest magnitude: -inf is a legal mask and counts as 0, NaN and +inf pass through."""
    least = float(logits.min())
    if least == -math.inf:
        least = float(logits.min(initial=0.0, where=logits > -math.inf))
        largest = max(largest, 0.0)
    return largest if math.isnan(largest) else max(largest, -least)


def _matrices(places: Sites, numbers: npt.NDArray[Any]) -> Iterator[tuple[int, Array]]:
    """The matrices that came end to end, and whose each is."""
    first = 0
    while first < len(places):
        head, rows, columns = place(int(places[first]))
        yield head, numbers[first : first + rows * columns].reshape(rows, columns)
        first += rows * columns


@functools.lru_cache(maxsize=64)
def _sites(heads: tuple[int, ...]) -> Sites:
    """The same array for the same heads, as for those of a layout: what is known of it is found again."""
    return np.array(heads, dtype=np.intp)
