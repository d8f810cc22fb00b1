"""Which numbered parts of a model run, and whether that depends on the batch. A history flows in; numpy only."""

from __future__ import annotations

import numpy as np

from lossguard.host.history import History


def running(history: History, n: int) -> set[str]:
    """The modules that ran, less those whose outputs were seen once and not in the newer half of n samples: a head of an earlier task."""
    rests = np.zeros(len(history.units), dtype=np.bool_)
    outputs = np.isfinite(history.born("activation_rms"))[: rests.size]
    if outputs.size:
        rests[: outputs.size] = outputs & ~np.atleast_1d(history.seen("activation_rms", max(1, n // 2)).any(axis=0))[: outputs.size]
    return {u.name for u, rest in zip(history.units, rests.tolist(), strict=True) if not rest}


def routes(history: History) -> bool:
    """Some numbered part of the model ran, did not, and ran again: what runs depends on the batch. To stop alone says nothing: modules whose
    output shows in the activation behind them are no longer looked at once steps are not dense."""
    seen = history.seen("activation_rms")
    seen = seen[seen.any(axis=1)]
    rested = np.maximum.accumulate(np.maximum.accumulate(seen, axis=0) & ~seen, axis=0)
    again = np.atleast_1d((seen & rested).any(axis=0)) if seen.size else np.zeros(0, dtype=np.bool_)
    return any(v and any(part.isdigit() for part in u.name.split(".")) for u, v in zip(history.units, again.tolist(), strict=False))


def passed_over(history: History, site: int, n: int) -> bool:
    """A numbered part of the model that did not run in the last n samples while a part like it did: an expert that nothing is routed to."""
    seen = history.seen("activation_rms", n)
    ran = [u.name for u, at in zip(history.units, np.atleast_1d(seen.any(axis=0)), strict=False) if at]
    names, parts = {p.name: p.numel for p in history.params}, history.params[site].name.split(".")
    for j, part in enumerate(parts[:-2]):
        if not part.isdigit() or any(name.startswith(".".join(parts[: j + 1]) + ".") for name in ran):
            continue
        for other in {name.split(".")[j] for name in ran if name.split(".")[:j] == parts[:j] and name.count(".") > j} - {part}:
            if other.isdigit() and names.get(".".join([*parts[:j], other, *parts[j + 1 :]])) == history.params[site].numel:
                return True
    return False
