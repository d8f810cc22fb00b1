"""Which modules' examples are run: those of an integration, and of the live view, only where its package is installed. And no test hears another's guard."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from lossguard.device import listening

collect_ignore = [] if find_spec("transformers") else ["lossguard/integrations/transformers.py"]
collect_ignore += [] if find_spec("rich") else ["lossguard/watch/screen.py", "lossguard/watch/follow.py"]


@pytest.fixture(autouse=True)
def forgotten_guards_end() -> Iterator[None]:
    """A guard that a test forgot to close ends with it: else the process's hook would stay, and other tests would count it."""
    before = set(listening._attached)
    yield
    for key in listening._attached - before:
        listening.detach(key)
