"""Which process of a run this is: rank, number of ranks, attempt. Read from torch.distributed or the launcher; no collective."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from torch import distributed

_STARTED = time.time_ns()


def rank() -> int:
    """This process's rank, 0 where there is only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return _number("RANK", 0)


def world() -> int:
    """How many processes train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return max(1, _number("WORLD_SIZE", 1))


def own_folder(folder: str | Path) -> Path:
    """Where this rank's record goes: the folder itself for rank 0, ``rank1`` and so on in it for the others.

    >>> str(own_folder("run"))
    'run'
    """
    me = rank()
    return Path(folder) / f"rank{me}" if me else Path(folder)


def attempt(environment: Mapping[str, str] | None = None) -> str:
    """The same text on all ranks of one start of the run, another one after a restart."""
    env = os.environ if environment is None else environment
    named = [env[k] for k in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID") if k in env]
    restarts = [env[k] for k in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT") if k in env]
    if world() == 1:
        own = [socket.gethostname(), str(os.getpid()), str(_STARTED)]
    else:  # the parent tells two starts of one address apart, where the launcher runs on this host only
        own = [env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")] + ([] if named else [str(os.getppid())])
    return ":".join(named + restarts + own)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return default
