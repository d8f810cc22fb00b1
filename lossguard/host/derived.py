"""Signals that follow from others of the same sample. Numbers per site flow in and out; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lossguard.host.columns import Array, Sites

# Signals that are not kept, since only what follows from them means something: ``sample_variance``, ``label_nll``, ``confident_wrong``.
PARTS = ("sample_spread", "sample_size", "nll_part", "wrong_part", "attention_heads")
HEADS = 256  # numbers of one attention in ``attention_heads``: site * HEADS + head; as the device side has it
ONLY: Sites = np.zeros(1, dtype=np.intp)  # the site of a signal that has one

Values = dict[str, tuple[Sites, Array]]


def derive(values: Mapping[str, tuple[Sites, npt.NDArray[Any]]], roots: Array) -> Values:
    """The values that are kept, and those that follow. roots: square roots of the parameters' elements.

    update_ratio: |dw| / |w|; grad_rms: |g| / sqrt(n); grad_total: the norm over all parameters; sample_variance: variance
    over the samples of a batch over the mean square; label_nll, confident_wrong: over the rows whose label is a class;
    attention_logit, attention_head: the largest number of an attention's heads, and whose it is (NaN counts as the largest).
    """
    found: Values = {name: numbers for name, numbers in values.items() if name not in PARTS}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if "update_norm" in values and "weight_norm" in values:
            found["update_ratio"] = _share(values, "update_norm", "weight_norm")
        if "sample_spread" in values and "sample_size" in values:
            sites, ratio = _share(values, "sample_spread", "sample_size")
            found["sample_variance"] = sites, np.square(ratio)
        if "labelled_fraction" in values:
            found["label_nll"] = _share(values, "nll_part", "labelled_fraction")
            found["confident_wrong"] = _share(values, "wrong_part", "labelled_fraction")
        if "grad_norm" in values:
            sites, norms = values["grad_norm"][0], np.asarray(values["grad_norm"][1], dtype=np.float64)
            found["grad_total"] = ONLY, np.sqrt(np.array([np.dot(norms, norms)]))
            found["grad_rms"] = sites, norms / roots[sites]
        if "attention_heads" in values:
            found.update(_heads(*values["attention_heads"]))
    return found


def _heads(places: Sites, numbers: npt.NDArray[Any]) -> Values:
    """One row of ``attention_heads`` -> the largest of each attention, and its head."""
    sites, first = np.unique(places // HEADS, return_index=True)
    parts = np.split(np.asarray(numbers, dtype=np.float64), first[1:])
    worst = [int(np.argmax(part)) for part in parts]
    largest = np.array([part[i] for part, i in zip(parts, worst, strict=True)])
    return {"attention_logit": (sites, largest), "attention_head": (sites, np.array(worst, dtype=np.float64))}


def _share(values: Mapping[str, tuple[Sites, npt.NDArray[Any]]], part: str, whole: str) -> tuple[Sites, Array]:
    """One signal over another where both were measured; 0 where both are 0: nothing moved, nothing differs."""
    (sites, a), (others, b) = values[part], values[whole]
    if sites is not others:
        sites, at, bt = np.intersect1d(sites, others, assume_unique=True, return_indices=True)
        a, b = a[at], b[bt]
    return sites, np.where((a == 0.0) & (b == 0.0), 0.0, a / b)
