"""The post-mortem page: a record, two of them, or a living guard flows in; one self-contained HTML file flows out.

The plotting library is an extra, and is read only when a page is written. Nothing in the file is fetched from anywhere.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossguard.report import markup, payload, reading
from lossguard.report.reading import Run

if TYPE_CHECKING:
    from lossguard.guard import Guard

__all__ = ["of_folders", "of_guard", "page"]

HEADER = 1000  # characters in which the library's outermost function begins
NEEDS = "the report needs plotly; install it with: pip install 'lossguard[report]'"


def of_folders(folder: str | Path, other: str | Path | None = None, path: str | Path | None = None) -> Path:
    """The page of a record, or of two beside each other. path: the file; ``report.html`` in the folder without one.

    Raises ``ValueError`` for a folder without a record, or where the plotting library is missing.
    """
    script = _library()
    folders = [folder] if other is None else [folder, other]
    names = reading.labels(folders)
    runs = [reading.from_record(f, name) for f, name in zip(folders, names)]
    return _write(Path(folder) / "report.html" if path is None else Path(path), page(runs, script))


def of_guard(guard: Guard, facts: Mapping[str, Any], path: str | Path, record: Path | None) -> Path:
    """The page of a guard's run so far: from its record, or from the window it holds where it keeps none."""
    script = _library()
    if not guard.closed:
        guard.state_dict()  # brings in what is under way, as before a checkpoint: a halt that is due is raised by the next step
    label = str(facts["model"])
    run = reading.from_history(guard.history, facts, label) if record is None else reading.from_record(record, label)
    run.findings, run.coverage, run.ended = guard.findings, asdict(guard.coverage), True
    run.facts.update(facts)
    return _write(Path(path), page([run], script))


def page(runs: Sequence[Run], script: str) -> str:
    """The whole file. script: the plotting library."""
    drawn = payload.make(runs)
    parts = {
        "title": escape(" and ".join(run.label for run in runs)),
        "several": "several" if len(runs) > 1 else "single",
        "style": _asset("page.css"),
        "notices": markup.notices(runs),
        "verdict": markup.verdict(runs),
        "facts": markup.facts(runs),
        "index": markup.index(runs),
        "stories": markup.stories(runs),
        "done": markup.done(runs),
        "coverage": markup.coverage(runs),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "data": drawn.json(),
        "library": _block("library", payload.compressed(script.encode())),
        "unpack": _asset("unpack.js"),
        "blocks": "\n".join(_block(name, text) for name, text in drawn.blocks.items()),
        "script": "\n".join(_asset(name) for name in ("charts.js", "keys.js", "page.js")),
    }
    html = _asset("page.html")
    pieces = html.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))


def _block(name: str, text: str) -> str:
    return f'<script type="application/octet-stream" id="{escape(name)}">{text}</script>'


def _library() -> str:
    try:
        offline = importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise ValueError(NEEDS) from None
    return eager(str(offline.get_plotlyjs()))


def eager(script: str) -> str:
    """The library with brackets around the function that holds all of it: a browser then compiles it once, beside the page, and not
    a second time when it is called (measured: 0.4 s less until it is ready). A text of another shape stays as it is.

    >>> eager("(function(f) { f(); }(this, () => { go(); }));"), eager("go();")
    ('(function(f) { f(); }(this, (() => { go(); })));', 'go();')
    """
    before, opening, rest = script.partition("this, () => {")
    body = rest.rstrip().removesuffix("}));")
    return f"{before}this, (() => {{{body}}})));" if opening and len(before) < HEADER and body != rest.rstrip() else script


def _asset(name: str) -> str:
    return (resources.files("lossguard.report") / "page" / name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
