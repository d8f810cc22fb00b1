"""Manners towards whoever started the process: codes, error file, last line, signals. Nothing here happens unless asked for.

``python -m lossguard run script.py`` asks for an unchanged script; ``exit_on_halt()`` asks from within one.
"""

from lossguard.exits import NO_RETRY, ROLL_BACK
from lossguard.launch.manners import Manners, exit_on_halt

__all__ = ["NO_RETRY", "ROLL_BACK", "Manners", "exit_on_halt"]
