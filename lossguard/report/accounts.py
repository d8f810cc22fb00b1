"""What the page tells besides the findings: what was done to the run, where a NaN was made, what a halt left behind, what other
ranks found, where a run stood still. Runs flow in, HTML flows out, all escaped.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lossguard.findings import Finding, Severity
from lossguard.report.happened import Event
from lossguard.report.reading import Run

WORDS = {"skip": "Left out", "cut": "Rate cut", "rollback": "Rolled back", "load": "Loaded", "saved": "Saved", "unfit": "Not saved", "resumed": "Resumed",
         "stall": "Stood still", "note": "Noted"}  # fmt: skip
SIGNS = {  # the shapes that stand on the curve, in a square of 16
    "skip": "M3 5l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z", "cut": "M2 4h12l-6 10z", "rollback": "M2 2h2v12h-2zM4 8l10-6v12z",
    "load": "M2 2h2v12h-2zM4 8l10-6v12z", "saved": "M8 3l5 5-5 5-5-5z", "unfit": "M8 3l5 5-5 5-5-5zM8 6l-2 2 2 2 2-2z",
    "resumed": "M12 2h2v12h-2zM12 8l-10-6v12z", "stall": "M3 2h10l-10 12h10z", "note": "M8 6a2 2 0 1 0 .01 0z",
}  # fmt: skip
SHOWN = {"saved": 3, "note": 6}  # newest events of a kind that are listed at once; the rest unfolds
MOST = 20  # of any other kind
CODE = ("called at", "instead")  # rows of a culprit that are set as code
RANKS = 6  # ranks that are named; our own choice, one line


def done(run: Run) -> str:
    """What was done to the run, in order; nothing where nothing was."""
    listed: dict[str, list[Event]] = {}
    for event in run.events:
        listed.setdefault(event.kind, []).append(event)
    open_ones = {id(e) for kind, events in listed.items() for e in events[-SHOWN.get(kind, MOST) :]}
    first = "".join(_event(e) for e in run.events if id(e) in open_ones)
    rest = [e for e in run.events if id(e) not in open_ones]
    more = f'<details><summary>{len(rest):,} earlier ones</summary><ul class="events">{"".join(map(_event, rest))}</ul></details>' if rest else ""
    return f'<ul class="events">{first}</ul>{more}' if run.events else ""


def sign(kind: str) -> str:
    """The shape of a kind of event."""
    return f'<svg class="sign sign-{kind}" viewBox="0 0 16 16" aria-hidden="true"><path d="{SIGNS[kind]}" fill-rule="evenodd"/></svg>'


def _event(event: Event) -> str:
    return (
        f'<li class="event-{event.kind}">{sign(event.kind)} <b>{WORDS[event.kind]}</b> <span class="at">{escape(event.when)}</span> '
        f"<span>{escape(event.text)}</span></li>"
    )


# ---- within a finding's story


def culprit(finding: Finding, run: Run) -> str:
    """The operation that made the first non-finite value, where it was sought and found."""
    known = next((c for c in _culprits(run) if (c["diagnosis"], c["step"]) == (finding.diagnosis, finding.step)), None)
    if known is None:
        return ""
    name = known["op"] if known["kind"] == "operation" else f"{known['kind']} {known['name']}"
    rows = {"called at": known.get("source", ""), "given": "; ".join(known.get("arguments", ())), "gave": known.get("output", ""),
            "because": known.get("reason", ""), "instead": (known.get("remedy") or {}).get("text", "")}  # fmt: skip
    cells = "".join(f"<dt>{label}</dt><dd>{f'<code>{escape(text)}</code>' if label in CODE else escape(text)}</dd>" for label, text in rows.items() if text)
    head = f"<h4>First made by</h4><p><code>{escape(name)}</code> in {escape(known.get('where', ''))}</p>"
    return f'<section class="culprit">{head}<dl>{cells}</dl></section>'


def _culprits(run: Run) -> list[Mapping[str, Any]]:
    """From the record's end, or from the folders of its halts where the run was killed."""
    left = [
        {**known["culprit"], "diagnosis": known["finding"]["diagnosis"], "step": known["finding"]["step"]} for _, known in run.halts if known.get("culprit")
    ]
    return [*run.facts.get("culprits", ()), *left[::-1]]


def left(finding: Finding, run: Run) -> str:
    """What the halt by this finding left behind: the folder, the exit code, the state to go back to."""
    same = [(p, k) for p, k in run.halts if (k["finding"].get("diagnosis"), k["finding"].get("step")) == (finding.diagnosis, finding.step)]
    if not same or finding.severity < Severity.WARNING:
        return ""
    folder, known = same[-1]
    code = int(known.get("exit_code", 1))
    words = {83: "a retry will not help", 84: "a retry from a checkpoint may help"}.get(code, "")
    good, batch = known.get("checkpoint"), known.get("batch") or {}
    rows = {
        "exit code": f"{code}: {words}" if words else str(code),
        "last good state": f"<code>{escape(str(good['path']))}</code>, after {good['after_steps']:,} steps" if good else "",
        "batch": escape(_batch(batch)),
        "run it again": f"<code>{escape(_replay(folder))}</code>",
    }
    cells = "".join(f"<dt>{label}</dt><dd>{text}</dd>" for label, text in rows.items() if text)
    return f'<section class="left"><h4>The halt left behind</h4><p><code>{escape(folder.name)}/</code> in the record</p><dl>{cells}</dl></section>'


def _replay(folder: Path) -> str:
    """The command as it is typed beside the record: the page may travel, and a path of this machine is no business of the reader's."""
    return f"python -m lossguard replay {shlex.quote(f'{folder.parent.name}/{folder.name}')} --step MODULE:FUNCTION --locate"


def _batch(batch: Mapping[str, Any]) -> str:
    mark = f", fingerprint {batch['fingerprint']}" if batch.get("fingerprint") else ""
    return f"number {batch['index']:,} as shown to the guard{mark}" if "index" in batch else ""


# ---- beside the findings


def ranks(run: Run) -> str:
    """What other ranks found and this one did not: alike ones in one line."""
    own = {(f.diagnosis, f.step) for f in run.findings}
    alike: dict[str, list[tuple[int, Finding]]] = {}
    for rank, findings in run.ranks.items():
        for finding in findings:
            if (finding.diagnosis, finding.step) not in own:
                alike.setdefault(finding.diagnosis, []).append((rank, finding))
    if not run.ranks:
        return ""
    quiet = f"{len(run.ranks)} other rank{'s' if len(run.ranks) > 1 else ''} kept a record too"
    if not alike:
        return f'<p class="none">{quiet}, and found nothing else.</p>'
    items = []
    for diagnosis, told in alike.items():
        first = min((f for _, f in told), key=lambda f: f.step)
        names = sorted({rank for rank, _ in told})
        who = ", ".join(map(str, names[:RANKS])) + (f" and {len(names) - RANKS} more" if len(names) > RANKS else "")
        words = f"<code>{escape(first.where)}</code> {escape(first.message)}"
        at = f'<span class="at">rank {who}, {escape(first.when.removeprefix("at "))}</span>'
        items.append(f'<li class="sev-{first.severity.label}"><b>{escape(diagnosis)}</b> {at} {words}</li>')
    return f'<section class="story ranks" aria-label="Other ranks"><h3>Other ranks</h3><p class="seen">{quiet}.</p><ul>{"".join(items)}</ul></section>'


def stalls(run: Run) -> str:
    """Where each thread was when no step ended any more."""
    parts: Sequence[str] = [
        f"<details><summary>Where each thread stood after step {dump.step:,} ({escape(dump.name)})</summary><pre>{escape(dump.text)}</pre></details>"
        for dump in run.stalls
    ]
    return "".join(parts)
