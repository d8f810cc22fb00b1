"""With which code a halted process ends: one table, from diagnosis to code. Names flow in, numbers flow out.

The two codes lie outside those of shells (124 to 165), sysexits (64 to 78), Python and getopt (1, 2) and of other
launchers and trainers (16, 17, 42, 93), so that a scheduler can tell a halt from everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from lossguard.findings import DIAGNOSES, check_names

NO_RETRY = 83  # halted, and a retry will not help: the same numbers or the same data come again
ROLL_BACK = 84  # halted, and going back to a checkpoint from before the finding and trying again may help

# The loss or the gradients left their course while every number was finite: other batches, or a retry from an earlier
# checkpoint, often pass such a place. Whatever is not named here comes back in a retry.
MAY_PASS = frozenset({"loss_spike", "diverging_loss", "exploding_gradient"})
CODES: dict[str, int] = {name: ROLL_BACK if name in MAY_PASS else NO_RETRY for name in DIAGNOSES}

MEANING = {NO_RETRY: "a retry will not help", ROLL_BACK: "roll back and retry may help"}


def code_of(diagnosis: str, chosen: Mapping[str, int] | None = None) -> int:
    """The code of a halt by this diagnosis; ``chosen`` goes before the table. A diagnosis of the user's own is no retry.

    >>> code_of("nonfinite_loss"), code_of("loss_spike"), code_of("loss_spike", {"loss_spike": 7})
    (83, 84, 7)
    """
    return (chosen or {}).get(diagnosis, CODES.get(diagnosis, NO_RETRY))


def meaning(code: int) -> str:
    """The code in words.

    >>> meaning(83), meaning(7)
    ('a retry will not help', 'a code of your own')
    """
    return MEANING.get(code, "a code of your own")


def check_codes(chosen: Mapping[str, int] | None, known: Mapping[str, object] | None = None) -> dict[str, int]:
    """What a user gave as ``exit_codes=``; ``ValueError`` for an unknown diagnosis or a code that would hide the halt."""
    codes = dict(chosen or {})
    check_names(codes, "exit_codes", {*DIAGNOSES, *(known or ())})
    for name, code in codes.items():
        if isinstance(code, bool) or not isinstance(code, int) or not 1 <= code <= 255:
            raise ValueError(f"exit_codes[{name!r}] must be an integer from 1 to 255 (0 would pass for success), got {code!r}")
    return codes
