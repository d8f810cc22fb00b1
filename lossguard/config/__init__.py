"""Options of a guard from outside of the code: a TOML file, the environment. They flow in, keywords of ``Guard`` flow out.

The options, their defaults and their types are those of ``Guard``'s own signature; nothing is listed a second time here.
"""

from lossguard.config.configured import Configured, configurable
from lossguard.config.kinds import Kept
from lossguard.config.sources import FILE, toml

__all__ = ["FILE", "Configured", "Kept", "configurable", "toml"]
