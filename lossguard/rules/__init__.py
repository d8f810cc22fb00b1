"""Rules over the history: numpy only. Importing this package fills the registry."""

from lossguard.rules import activations, clipping, curves, gradients, numeric, oscillation, softmax, standstill, unchanged, updates, validation
from lossguard.rules.rule import RULES, Rule, rule

__all__ = [
    "RULES", "Rule", "activations", "clipping", "curves", "gradients", "numeric", "oscillation", "rule", "softmax", "standstill", "unchanged", "updates",
    "validation",
]  # fmt: skip
