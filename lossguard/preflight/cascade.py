"""Puts what follows from a fault behind the fault. The checks' findings flow in, roots first; events with consequences flow out.

The table is the judge's (``rules/judge.py``, ``FOLLOWS``); a preflight has no time in which things follow, only the order of its checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lossguard.findings import Finding, Severity
from lossguard.rules.judge import FOLLOWS

# Causes of a first loss that is off which are faults of their own, whatever else was found.
OWN_CAUSES = ("sum reduction", "over-regularised", "targets not standardised")


def cascade(found: Iterable[Finding]) -> list[Finding]:
    """The findings with each consequence attached to the earliest root that explains it. Infos explain nothing, and what halts is never hidden.

    >>> root = Finding("poor_initialization", Severity.WARNING, -1, "0.weight", "all equal")
    >>> event, = cascade([root, Finding("cannot_overfit_batch", Severity.WARNING, -1, "8 samples", "not learned")])
    >>> event.diagnosis, [f.diagnosis for f in event.consequences]
    ('poor_initialization', ['cannot_overfit_batch'])
    """
    events: list[Finding] = []
    for finding in found:
        root = next((i for i, event in enumerate(events) if _explains(event, finding)), None)
        if root is None:
            events.append(finding)
        else:
            events[root] = replace(events[root], consequences=(*events[root].consequences, finding))
    return events


def _explains(root: Finding, finding: Finding) -> bool:
    own = finding.diagnosis == "initial_loss_off" and bool(finding.causes) and finding.causes[0].name in OWN_CAUSES
    return root.severity >= Severity.WARNING and finding.severity < Severity.HALT and not own and finding.diagnosis in FOLLOWS.get(root.diagnosis, ())
