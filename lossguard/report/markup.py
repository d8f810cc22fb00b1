"""The parts of the page that need no script: verdict, facts, stories, coverage. Runs flow in, HTML flows out, all escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lossguard import explain
from lossguard.findings import DIAGNOSES, Evidence, Finding, number
from lossguard.report import accounts, words
from lossguard.report.payload import key, place
from lossguard.report.reading import Run

SHAPES = {"info": "●", "warning": "▲", "error": "■", "halt": "⬣"}  # a severity is told by its shape as well as by its colour
WIDE = 26  # characters of a fact that takes the room of two
DECADES = 2.0  # between a number and its limit: beyond it the bar is logarithmic


def verdict(runs: Sequence[Run]) -> str:
    """The sentence at the top; of two runs, one that names both and one for each."""
    if len(runs) == 1:
        return _headline(words.headline(runs[0]), "h1")
    heads = "".join(f'<div><p class="run-name">{_tag(k)}{escape(run.label)}</p>{_headline(words.headline(run), "h2")}</div>' for k, run in enumerate(runs))
    return _headline(words.comparison(*runs), "h1") + f'<div class="pair">{heads}</div>'


def _headline(head: words.Headline, level: str) -> str:
    then = f'<p class="then">{escape(head.then)}</p>' if head.then else ""
    return f'<div class="verdict tone-{head.tone}"><p class="tone">{escape(head.word)}</p><{level}>{escape(head.sentence)}</{level}>{then}</div>'


def facts(runs: Sequence[Run]) -> str:
    """The runs' facts: a list, or a table of two with what differs marked."""
    if len(runs) == 1:
        return '<dl class="facts">' + "".join(_fact(n, v) for n, v in words.facts(runs[0])) + "</dl>"
    a, b = (dict(words.facts(run)) for run in runs)
    rows = []
    for name in [*a, *(n for n in b if n not in a)]:
        differs = ' class="differs"' if a.get(name) != b.get(name) else ""
        rows.append(f"<tr{differs}><th scope=row>{escape(name)}</th><td>{escape(a.get(name, '–'))}</td><td>{escape(b.get(name, '–'))}</td></tr>")
    heads = "".join(f"<th scope=col>{_tag(k)}{escape(run.label)}</th>" for k, run in enumerate(runs))
    return f'<div class="scroll"><table class="facts"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _fact(name: str, value: str) -> str:
    return f"<div{' class=wide' if len(value) > WIDE else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def stories(runs: Sequence[Run]) -> str:
    """All findings, told; those of two runs side by side."""
    parts = []
    for k, run in enumerate(runs):
        told = "".join(_story(f, key(k, len(runs) > 1, n), run) for n, f in enumerate(run.findings, 1))
        told = told or '<p class="none">No finding: every rule looked, and none had anything to say.</p>'
        name = f'<h3 class="run-name">{_tag(k)}{escape(run.label)}</h3>' if len(runs) > 1 else ""
        parts.append(f"<div>{name}{told}{accounts.ranks(run)}</div>")
    return "".join(parts)


def done(runs: Sequence[Run]) -> str:
    """What was done to the runs and what befell them; nothing where nothing was."""
    if not any(run.events for run in runs):
        return ""
    parts = []
    for k, run in enumerate(runs):
        name = f'<h3 class="run-name">{_tag(k)}{escape(run.label)}</h3>' if len(runs) > 1 else ""
        parts.append(f"<div>{name}{accounts.done(run) or '<p class=small>Nothing.</p>'}{accounts.stalls(run)}</div>")
    return f'<section class="card" aria-labelledby="done-title">\n<h2 id="done-title">Events</h2>\n<div class="coverage">{"".join(parts)}</div>\n</section>'


def index(runs: Sequence[Run]) -> str:
    """Links to the stories, which the keyboard reaches as the mouse reaches the marks."""
    links = [
        f'<li><a href="#f{key(k, len(runs) > 1, n)}" class="sev-{f.severity.label}"><b class="badge">{key(k, len(runs) > 1, n)}</b> '
        f"{escape(f.diagnosis)} <small>step {f.step:,}</small></a></li>"
        for k, run in enumerate(runs)
        for n, f in enumerate(run.findings, 1)
    ]
    return f'<ul class="index" aria-label="Findings">{"".join(links)}</ul>' if links else ""


def coverage(runs: Sequence[Run]) -> str:
    """What was looked at and what was not."""
    parts = []
    for k, run in enumerate(runs):
        name = f'<h3 class="run-name">{_tag(k)}{escape(run.label)}</h3>' if len(runs) > 1 else ""
        parts.append(f"<div>{name}{_coverage(run)}</div>")
    return "".join(parts)


def notices(runs: Sequence[Run]) -> str:
    """What the reader must know before the page is believed."""
    said = [run.window for run in runs if run.window]
    said += [
        f"The record of {run.label} has no end: the run was killed, or still goes on. The page shows what had been written." for run in runs if not run.ended
    ]
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in said)


def _coverage(run: Run) -> str:
    if not run.coverage:
        return "<p>The record has no last line about what was observed, so what was not observed is not known.</p>"
    observed = "".join(f"<li>{escape(name)} <small>{sites}</small></li>" for name, sites in run.coverage.get("observed", {}).items())
    missed = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(why)}</dd></div>" for what, why in run.coverage.get("not_observed", {}).items())
    unseen = f'<dl class="missed">{missed}</dl>' if missed else "<p>Nothing is known to have been missed.</p>"
    title = f"Observed: {len(run.coverage.get('observed', {}))} signals, with the number of places"
    return f'{unseen}<details><summary>{title}</summary><ul class="chips">{observed}</ul></details>'


def _story(finding: Finding, name: str, run: Run) -> str:
    severity = finding.severity.label
    summary = DIAGNOSES[finding.diagnosis][1] if finding.diagnosis in DIAGNOSES else ""
    until = f" until step {finding.last_step:,}" if finding.last_step is not None and finding.last_step > finding.step else ""
    again = f", {finding.count} times{until}" if finding.count > 1 else ""
    return f"""<article class="story sev-{severity}" id="f{name}" tabindex="-1" aria-labelledby="t{name}">
<header><b class="badge">{name}</b><h3 id="t{name}">{escape(finding.diagnosis)}</h3>
<span class="severity"><i aria-hidden="true">{SHAPES[severity]}</i> {severity}</span>
<span class="when">step {finding.step:,}{again}</span></header>
<p class="lede">{escape(summary[:1].upper() + summary[1:])}{"." if summary else ""}</p>
<p class="seen"><code>{escape(finding.where)}</code> {escape(finding.message)}</p>
{_note(finding)}
{accounts.culprit(finding, run)}
<div class="columns">{_section("Measured", [_evidence(e) for e in finding.evidence], "ul")}
{_section("Likely causes", [_cause(c.name, c.confidence, c.because) for c in finding.causes], "ul")}
{_section("What to do", [f"{escape(r.text)}{_change(r.change)}" for r in finding.remedies], "ol")}
{_section("What followed", [_consequence(f) for f in finding.consequences], "ul")}{accounts.left(finding, run)}</div>
{_foot(finding, name, run)}</article>"""


def _note(finding: Finding) -> str:
    return f'<p class="kept">{escape(finding.note[:1].upper() + finding.note[1:])}.</p>' if finding.note else ""


def _section(title: str, items: Iterable[str], tag: str) -> str:
    inside = "".join(f"<li>{item}</li>" for item in items)
    return f'<section class="{title.split()[-1].lower()}"><h4>{title}</h4><{tag}>{inside}</{tag}></section>' if inside else ""


def _evidence(evidence: Evidence) -> str:
    limit = f' <span class="limit">limit {number(evidence.limit)}</span>' if evidence.limit is not None else ""
    return f'<span class="what">{escape(evidence.what)}</span> <b>{number(evidence.value)}</b>{limit}{bar(evidence)}'


def bar(evidence: Evidence) -> str:
    """The number as a bar with its limit as a tick; nothing where there is no limit to hold it against."""
    value, limit = evidence.value, evidence.limit
    if limit is None or not math.isfinite(limit):
        return ""
    if not math.isfinite(value):
        return '<span class="bar broken" aria-hidden="true"><span style="width:100%"></span></span>'
    least, most = sorted((value, limit))
    if least > 0 and math.log10(most / least) > DECADES:
        low, high = math.log10(least) - 1.0, math.log10(most) + 0.5
        share = {x: (math.log10(x) - low) / (high - low) for x in (value, limit)}
        scale = '<small class="scale">logarithmic</small>'
    elif least >= 0 and most > 0:
        share, scale = {x: x / (1.15 * most) for x in (value, limit)}, ""
    else:
        return ""
    over = "over" if value > limit else "under"
    filled, tick = (f"{100 * share[x]:.1f}%" for x in (value, limit))
    return f'<span class="bar {over}" aria-hidden="true"><span style="width:{filled}"></span><i style="left:{tick}"></i></span>{scale}'


def _cause(name: str, confidence: float, because: str) -> str:
    share = f"{100 * min(max(confidence, 0.0), 1.0):.0f}"
    meter = f'<span class="bar confidence" aria-hidden="true"><span style="width:{share}%"></span></span>'
    return f'<span class="what">{escape(name)}</span> <b title="confidence">{share} %</b>{meter}<span class="because">{escape(because)}</span>'


def _change(change: Any) -> str:
    pairs = ", ".join(f"{k} = {number(v) if isinstance(v, float) else v}" for k, v in change.items())
    return f' <code class="change">{escape(pairs)}</code>' if pairs else ""


def _consequence(finding: Finding) -> str:
    seen = f"{finding.where}: {finding.message}"
    return f'<span class="what">{escape(finding.diagnosis)}</span> <b>step {finding.step:,}</b> <span class="because">{escape(seen)}</span>'


def _foot(finding: Finding, name: str, run: Run) -> str:
    silence = f'Guard(..., mute={{"{finding.diagnosis}"}})'
    signal, _ = place(finding, run)
    show = f'<button type="button" class="show" data-mark="{name}">Show in the heat map</button>' if signal else ""
    page = ""
    if explain.finders(finding.diagnosis):
        text = explain.page(finding.diagnosis).partition("\n")[2].strip()
        page = f"<details><summary>What {escape(finding.diagnosis)} means, its limits and their sources</summary>{prose(text)}</details>"
    return f'<footer>{show}<span class="silence">Expected here? Silence it: <code>{escape(silence)}</code></span></footer>{page}'


def prose(text: str) -> str:
    """A page of ``explain`` as paragraphs; what is indented there stays as it stands."""
    parts = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if any(line.startswith("  ") for line in lines[1:]):
            rest = "\n".join(line.strip() for line in lines[1:])
            parts.append(f"<h5>{escape(lines[0])}</h5><pre>{escape(rest)}</pre>")
        else:
            parts.append(f"<p>{escape(' '.join(lines))}</p>")
    return f'<div class="prose">{"".join(parts)}</div>'


def _tag(k: int) -> str:
    return f'<b class="tag run-{k}">{"AB"[k]}</b> '
