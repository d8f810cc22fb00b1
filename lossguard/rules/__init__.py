"""Rules over the history: numpy only. Importing this package fills the registry."""

from lossguard.rules import activations, attention, curves, gradients, initialization, loader, numeric, precision, softmax, updates
from lossguard.rules.rule import RULES, Rule, rule

__all__ = [
    "RULES",
    "Rule",
    "activations",
    "attention",
    "curves",
    "gradients",
    "initialization",
    "loader",
    "numeric",
    "precision",
    "rule",
    "softmax",
    "updates",
]
