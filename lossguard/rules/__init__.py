"""Rules over the history: numpy only. Importing this package fills the registry."""

from lossguard.rules import activations, curves, gradients, numeric, softmax, standstill, updates, validation
from lossguard.rules.rule import RULES, Rule, rule

__all__ = ["RULES", "Rule", "activations", "curves", "gradients", "numeric", "rule", "softmax", "standstill", "updates", "validation"]
