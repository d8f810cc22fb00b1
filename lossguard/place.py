"""Which process of a run this is: rank, number of ranks, attempt. Read from torch.distributed or the launcher; no collective."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from torch import distributed


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


def together() -> bool:
    """Whether several processes train together and can talk to each other by now."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def first_here() -> bool:
    """Whether this is the first process of its machine, as far as the launcher tells; without one, the first of all."""
    return _number("LOCAL_RANK", rank()) == 0


def own_folder(folder: str | Path) -> Path:
    """Where this rank's record goes: the folder itself for rank 0, ``rank1`` and so on in it for the others.

    >>> str(own_folder("run"))
    'run'
    """
    me = rank()
    return Path(folder) / f"rank{me}" if me else Path(folder)


def attempt(born: int) -> str:
    """The same text on all ranks of one start of the run, another one after a restart. born: when this process's run began."""
    named = [os.environ[k] for k in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID") if k in os.environ]
    restarts = [os.environ[k] for k in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT") if k in os.environ]
    if world() == 1:
        own = [socket.gethostname(), str(os.getpid()), str(born)]
    else:  # the parent tells two starts apart where no launcher names them
        own = [os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")] + ([] if named else [str(os.getppid())])
    return ":".join(named + restarts + own)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return default
