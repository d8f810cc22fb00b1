"""Which modules' examples are run: those of an integration, and of the live view, only where its package is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("transformers") else ["lossguard/integrations/transformers.py"]
collect_ignore += [] if find_spec("rich") else ["lossguard/watch/screen.py", "lossguard/watch/follow.py"]
