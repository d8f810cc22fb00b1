"""Rules over the history: numpy only. Importing this package fills the registry."""

from lossguard.rules import activations, clipping, curves, gradients, numeric, oscillation, softmax, standstill, unchanged, updates, validation
from lossguard.rules.rule import RULES, Rule, rule

FAMILIES = (numeric, curves, standstill, oscillation, validation, gradients, clipping, updates, unchanged, activations, softmax)

__all__ = ["FAMILIES", "RULES", "Rule", "rule"]
