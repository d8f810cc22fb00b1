"""Checks before the first step. Importing this package fills the registry; what runs on the user's model runs on copies.

Unlike the guard, a preflight reads values: it is done before training begins. Nothing of it is imported by device, host or rules.
"""

from lossguard.preflight import balance, data, fit, flow, labels, loss, modes, outputs, rates, samples, targets, weights
from lossguard.preflight.check import CHECKS, Answer, Check, check, failed, finding, passed, unknown
from lossguard.preflight.run import Preflight, preflight

__all__ = ["CHECKS", "Answer", "Check", "Preflight", "balance", "check", "data", "failed", "finding", "fit", "flow", "labels", "loss", "modes", "outputs",
           "passed", "preflight", "rates", "samples", "targets", "unknown", "weights"]  # fmt: skip
