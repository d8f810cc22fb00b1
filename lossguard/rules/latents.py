"""A latent code that tells nothing. A history flows in, advice flows out; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lossguard.findings import Cause, Remedy, number
from lossguard.host.history import History


@dataclass(frozen=True)
class Posterior:
    """The divergence of a variational autoencoder beside its reconstruction: the terms' names, their newest means, the divergence's largest."""

    divergence: str
    reconstruction: str
    now: float
    beside: float
    most: float

    @property
    def cause(self) -> tuple[Cause, list[Remedy]]:
        """Why, and what to do."""
        because = f"the term {self.divergence!r} fell from {number(self.most)} to {number(self.now)}, beside a {self.reconstruction!r} of {number(self.beside)}"
        weaker = Remedy(
            "a tenth of the divergence's weight, or raise it from 0 over the first epochs, or leave it half a nat free", {"parameter": self.divergence}
        )
        return Cause("posterior collapse", 0.85, because), [weaker]


def posterior(history: History, many: int) -> Posterior | None:
    """Of terms that are told by name, one that begins with "rec" and one that holds "kl"; None without both, before 4 * ``many`` losses, and while
    the divergence rises, as one whose weight is raised does."""
    names = history.terms
    code, shown = next((t for t in names if "kl" in t.lower()), None), next((t for t in names if t.lower().startswith("rec")), None)
    if code is None or shown is None:
        return None
    divergence, reconstruction = history.term(code), history.term(shown)
    if divergence.size < 4 * many or not np.isfinite(divergence).all() or not np.isfinite(reconstruction[-many:]).all():
        return None
    means = divergence[divergence.size % many :].reshape(-1, many).mean(axis=1)
    if not 0.0 <= means[-1] <= 1.5 * means[-2]:
        return None
    return Posterior(code, shown, float(means[-2:].max()), float(np.abs(reconstruction[-many:]).mean()), float(means.max()))
