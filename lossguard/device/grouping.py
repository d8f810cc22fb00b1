"""Groups trained parameters into banks: those of one optimizer on one device together, sharded ones apart from whole ones.

A roster flows in, banks flow out; what cannot be measured is told to the roster. Never reads a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossguard.device import shards
from lossguard.device.bank import Bank
from lossguard.device.joint import Joint
from lossguard.device.roles import Roster


def banks_of(roster: Roster, joint: Joint) -> tuple[list[Bank], int]:
    """The banks of this rank, and how many elements are measured in all. joint: plans how the parts of sharded parameters come together."""
    held = _plan(roster, joint)
    groups: dict[tuple[int, torch.device, bool], list[tuple[int, Tensor]]] = {}
    elements = 0
    for i, t in enumerate(roster.trained):
        if t.name in roster.unread or t.optimizer < 0:
            continue
        elements += t.tensor.numel()
        if i in held or not shards.is_sharded(t.tensor):
            groups.setdefault((t.optimizer, t.tensor.device, i in held), []).append((i, t.tensor))
    return [Bank(members, owner, elements, joint.probed if cut else None) for (owner, _, cut), members in groups.items()], elements


def _plan(roster: Roster, joint: Joint) -> frozenset[int]:
    """The sharded parameters of which this rank holds a part."""
    some = [(i, t) for i, t in enumerate(roster.trained) if shards.is_sharded(t.tensor) and t.optimizer >= 0 and t.name not in roster.unread]
    held = joint.plan([i for i, _ in some], [t.tensor for _, t in some], [t.name for _, t in some])
    if held is None:
        roster.unread.update({t.name: "sharded over several meshes of which none is the whole world" for _, t in some})
    return frozenset(held or ())
