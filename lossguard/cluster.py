"""Ranks that train one model: what their guards agree on and tell each other. A model and a history flow in, an ``Agreement`` flows out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lossguard.host.agreement import Agreement
from lossguard.host.exchange import Teller
from lossguard.host.history import History


def agreement(settings: Sequence[object], model: nn.Module, history: History) -> Agreement:
    """The votes of this rank, with what ranks tell each other beside them. Made on all ranks at once; raises as :class:`Agreement` does."""
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    device = next((str(p.device) for p in model.parameters()), "cpu")
    agreed = Agreement(settings, model=trained, place=device)
    agreed.teller = Teller(history, agreed.places, len(trained) if agreed.alike else 0)
    return agreed
