"""``python -m lossguard run SCRIPT ...``: an unchanged script, started as python starts it, whose halt gives the exit code.

``sys.argv``, ``sys.path[0]`` and ``__main__`` are those of ``python SCRIPT ...`` (``python -m MODULE ...`` with
``--module``). Exceptions and ``SystemExit`` pass through unchanged.
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from pathlib import Path

from lossguard import config
from lossguard.actions import TrainingHalted
from lossguard.launch.manners import LINGER, exit_on_halt


def parser() -> argparse.ArgumentParser:
    """The options before the script; everything behind it is the script's own."""
    options = argparse.ArgumentParser(prog="lossguard run", description="Run a script so that a halt ends it with its exit code.")
    options.add_argument("-m", "--module", action="store_true", help="TARGET is a module, as in python -m")
    options.add_argument("--termination-log", type=Path, help="where the pod's termination message goes (default: /dev/termination-log if it exists)")
    options.add_argument("--linger", type=float, default=LINGER, help="seconds until a teardown that hangs after a halt is ended (default: %(default)s)")
    options.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file of options for every Guard of the script (python -m lossguard config prints one)"
    )
    options.add_argument("target", help="a script, a folder or zip file with __main__.py, or a module")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the target; returns 0, or the code of a halt, or 2 for a script or a --config that cannot be opened."""
    ours, theirs = _split(list(arguments))
    options = parser().parse_args(ours)
    if options.config is not None:
        try:
            config.toml(options.config)
        except ValueError as error:
            sys.stderr.write(f"lossguard: {error}\n")
            return 2
        os.environ[config.FILE] = str(options.config.resolve())  # the script's workers read it too, wherever it goes
    start = _module if options.module else _script
    manners = exit_on_halt(termination_log=options.termination_log, linger=options.linger, hook=False)
    try:
        return start(options.target, theirs)
    except TrainingHalted as halt:
        trace = halt.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
            trace = trace.tb_next
        sys.excepthook(type(halt), halt.with_traceback(trace), trace)
        return manners.told(halt)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours up to the target, and theirs behind it. By hand: argparse would take a ``--`` of theirs for its own."""
    taking = {"--termination-log", "--linger", "--config"}
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 2 if arguments[at] in taking else 1
    return arguments[: at + 1], arguments[at + 1 :]


def _script(name: str, arguments: list[str]) -> int:
    sys.argv = [name, *arguments]
    path, full = Path(name), os.path.join(os.getcwd(), name)  # noqa: PTH118, PTH109 - python keeps the rest of the path as it was typed
    if path.is_dir() or _is_archive(path):
        _first_on_path(full, always=True)
        _fresh_main()
        _as_main()("__main__", alter_argv=False)
        return 0
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {full!r}: [Errno {error.errno}] {error.strerror}\n")
        return 2
    _first_on_path(str(Path(full).resolve().parent))
    module = _fresh_main()
    if full.endswith(".pyc"):
        loader: SourceFileLoader | SourcelessFileLoader = SourcelessFileLoader("__main__", full)
        code = loader.get_code("__main__")
    else:
        loader = SourceFileLoader("__main__", full)
        code = compile(source, full, "exec", dont_inherit=True)
    assert code is not None
    module.__dict__.update(__file__=full, __cached__=None, __loader__=loader)
    exec(code, module.__dict__)
    return 0


def _module(name: str, arguments: list[str]) -> int:
    sys.argv = ["-m", *arguments]  # as python has it while parent packages are imported
    _first_on_path(os.getcwd())  # noqa: PTH109 - as python writes it
    _fresh_main()
    _as_main()(name, alter_argv=True)
    return 0


def _fresh_main() -> types.ModuleType:
    """A ``__main__`` as python makes it. It stays: threads, pickles and handlers at exit look for it later."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = module
    return module


def _first_on_path(folder: str, *, always: bool = False) -> None:
    """What python -m lossguard (or the console script) has put first gives way to what python would put there."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
    elif always:
        sys.path.insert(0, folder)


def _is_archive(path: Path) -> bool:
    import zipfile

    return path.is_file() and path.suffix not in (".py", ".pyc") and zipfile.is_zipfile(path)


def _as_main() -> Callable[..., object]:
    """What ``python -m`` itself calls, so that errors and packages are treated alike."""
    called: Callable[..., object] = runpy._run_module_as_main  # type: ignore[attr-defined]
    return called
