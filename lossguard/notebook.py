"""A guard and a finding as a notebook shows them: small pieces of HTML, complete in themselves. Plain values flow in, text flows out.

Nothing is fetched and no script runs. Colours of the page are inherited and tints are see-through, so that a light and a
dark notebook read the same; what a model or a batch is called is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lossguard.findings import Finding

SHOWN = 20  # findings in a table, the newest; the others are counted
LISTED = 4  # names of what is not observed that are read without opening it
NAMED = 12  # entries of what is not observed; the others are counted
# severity -> ground of its chip, dark enough for white text (WCAG contrast of 4.5 and above) and seen on white and on black
CHIPS = {"info": "#1f6f8b", "warning": "#8a5a00", "error": "#b3261e", "halt": "#8e1b50"}
_TABLE = "border-collapse:collapse;margin:.3em 0;font-size:13px;color:inherit;background:transparent"
_CELL = "text-align:left;vertical-align:top;padding:3px 12px 3px 0;border:0;border-bottom:1px solid rgba(128,128,128,.35);background:transparent"
_TEXT = "margin:.3em 0;padding:6px 8px;background:rgba(128,128,128,.14);color:inherit;white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px"


def of_finding(finding: Finding) -> str:
    """One finding: its headline, and its whole text beneath.

    >>> from lossguard.findings import Finding, Severity
    >>> html = of_finding(Finding("loss_spike", Severity.WARNING, 12, "loss", "9 < 10"))
    >>> "at step 12" in html, "9 &lt; 10" in html
    (True, True)
    """
    return f'<div style="color:inherit">{_headline(finding)}<pre style="{_TEXT}">{escape(str(finding))}</pre></div>'


def of_guard(
    about: str, state: str, steps: int, verdict: str, findings: Sequence[Finding], observed: Mapping[str, int], not_observed: Mapping[str, str]
) -> str:
    """A guard: what it watches, how far it is, what it found, and what it does not see."""
    rows = [
        ("state", f"{escape(state)}, {steps} step{'' if steps == 1 else 's'}"),
        ("verdict", escape(verdict)),
        ("findings", _findings(findings)),
        ("observed", escape(", ".join(f"{name} ({sites})" for name, sites in observed.items()) or "nothing yet")),
    ]
    if not_observed:
        rows.append(("not observed", _unseen(not_observed)))
    body = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:600;white-space:nowrap">{name}</th><td style="{_CELL}">{text}</td></tr>' for name, text in rows
    )
    title = f'<caption style="text-align:left;font-weight:600;padding:2px 0;color:inherit;caption-side:top">{escape(about)}</caption>'
    return f'<table style="{_TABLE}">{title}<tbody>{body}</tbody></table>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "none"
    shown = findings[-SHOWN:]
    earlier = f"<div>{len(findings) - len(shown)} earlier ones in <code>guard.findings</code></div>" if len(shown) < len(findings) else ""
    return earlier + "".join(_folded(f) for f in shown)


def _folded(finding: Finding) -> str:
    """The headline; the whole text when it is opened."""
    return f'<details><summary style="cursor:pointer">{_headline(finding)}</summary><pre style="{_TEXT}">{escape(str(finding))}</pre></details>'


def _headline(finding: Finding) -> str:
    label = finding.severity.label
    chip = f'<span style="background:{CHIPS[label]};color:#fff;border-radius:3px;padding:0 6px;font-size:12px">{label}</span>'
    again = f", {finding.count} times" if finding.count > 1 else ""
    return f"{chip} <b>{escape(finding.diagnosis)}</b> {escape(finding.when)}{again}, {escape(finding.where)}"


def _unseen(entries: Mapping[str, str]) -> str:
    named = "".join(f"<div>{escape(what)}: {escape(why)}</div>" for what, why in list(entries.items())[:NAMED])
    more = f"<div>and {len(entries) - NAMED} more in <code>guard.coverage</code></div>" if len(entries) > NAMED else ""
    names = ", ".join(list(entries)[:LISTED]) + (f" and {len(entries) - LISTED} more" if len(entries) > LISTED else "")
    return f'<details><summary style="cursor:pointer">{escape(names)}</summary>{named}{more}</details>'
