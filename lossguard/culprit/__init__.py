"""The operation that made the first non-finite value of a step, found by running it once more. Opt-in; reads values.

``find(model, step)`` is the way in; nothing of the rest of the library imports this before a fault.
"""

from lossguard.culprit.find import Culprit, find

__all__ = ["Culprit", "find"]
