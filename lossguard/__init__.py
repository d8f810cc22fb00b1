"""lossguard: the guard for PyTorch training runs. The public face; imports no trainer, no tracker, no plotting."""

from lossguard.actions import TrainingHalted
from lossguard.coverage import Coverage
from lossguard.device.signals import signal
from lossguard.findings import Cause, Evidence, Finding, Remedy, Severity
from lossguard.guard import Guard
from lossguard.host.history import History
from lossguard.preflight import Preflight, preflight
from lossguard.rules import Rule, rule

__version__ = "0.1.0"
__all__ = ["Cause", "Coverage", "Evidence", "Finding", "Guard", "History", "Preflight", "Remedy", "Rule", "Severity", "TrainingHalted", "preflight", "rule",
           "signal"]  # fmt: skip
