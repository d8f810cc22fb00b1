"""Rules over the history: numpy only. Importing this package fills the registry."""

from lossguard.rules import (
    activations,
    attention,
    clipping,
    curves,
    gradients,
    initialization,
    loader,
    numeric,
    oscillation,
    precision,
    ranks,
    softmax,
    standstill,
    unchanged,
    updates,
    validation,
)
from lossguard.rules.rule import RULES, Rule, rule

__all__ = [
    "RULES",
    "Rule",
    "activations",
    "attention",
    "clipping",
    "curves",
    "gradients",
    "initialization",
    "loader",
    "numeric",
    "oscillation",
    "precision",
    "ranks",
    "rule",
    "softmax",
    "standstill",
    "unchanged",
    "updates",
    "validation",
]
