"""What the live view shows of a job, as lines of styled text. A job flows in, renderables of the library ``rich`` flow out.

Nothing here reads a file or a key. Text from a record is shown as it is, without markup and without control characters.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lossguard.findings import Finding, Severity
from lossguard.watch.job import QUIET, Job
from lossguard.watch.run import SIGNALS, Run, shared
from lossguard.watch.series import ASCII, Ink, Series, chart, drawn_range, logarithmic

LABEL = 15  # columns of a row's name
NUMBERS = 28  # columns of a row's numbers
NARROWEST = 12  # columns of bars, however narrow the terminal is
TALL = 4  # rows of the loss's chart
TERMS = 4  # named terms of the loss that are drawn; the others are counted
NEWEST = 200  # steps of the loss's second row; our own choice: enough to see a turn, few enough that it is of now
FEWEST = 3  # findings shown however low the terminal is
STYLES = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "red", Severity.HALT: "bold red"}
SHARES = ("dead_fraction_largest",)  # drawn between 0 and 1


class Screen:
    """A job as it stands now. lines: how many it may take; None for every finding. whole: no line is cut, as a pipe or a file gets them."""

    def __init__(self, job: Job, *, lines: int | None = None, whole: bool = False) -> None:
        self.job, self.lines, self.whole = job, lines, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ink, width = ink_of(console), options.max_width
        rows = [*_head(self.job, width, ink), *_curves(self.job, width, ink), *_ranks(self.job)]
        room = None if self.lines is None else max(FEWEST, self.lines - len(rows) - 1)
        for row in [*rows, *findings(self.job, room)]:
            row.no_wrap = True
            if self.whole:
                row.rstrip()
            elif len(row) > width:
                row.truncate(width - len(ink.cut))
                row.append(ink.cut)
            yield row


def ink_of(console: Console) -> Ink:
    """Characters that the console's encoding has."""
    try:
        "".join([Ink().bars, Ink().infinite, Ink().cut, Ink().dot]).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return Ink()


def waiting(job: Job) -> Text:
    """Before there is a record."""
    return Text(f"no record in {clean(str(job.folder))} yet; waiting for Guard(record=...) to begin one (Ctrl-C ends)")


def status(job: Job) -> str:
    """The state in a word or two, without the verdict.

    >>> status(Job("/nowhere"))
    'waiting'
    """
    lead = job.lead
    if lead is None:
        return "waiting"
    if job.behind:
        return f"reading {100 * (1 - job.behind):.0f} %"
    if lead.ended:
        return "halted" if lead.facts.get("halted") else "over"
    stalled = job.stalled
    if stalled is not None:
        return f"stalled, see {stalled.name}"
    return "running" if job.quiet < QUIET else f"no news for {ago(job.quiet)}"


def line(job: Job) -> str:
    """The state in one line of text, for what is no screen."""
    lead = job.lead
    if lead is None:
        return waiting(job).plain
    newest = [f"{label} {_shown(name, series.newest[1])}" for name, label in SIGNALS.items() if (series := lead.signals[name]).newest is not None]
    if lead.validation.newest is not None:
        newest.append(f"validation {short(lead.validation.newest[1])}")
    return "  ".join([f"step {lead.step}", f"loss {short(lead.loss)}", *newest, *_speed(job), f"verdict {clean(lead.verdict)}", status(job)])


def findings(job: Job, room: int | None = None) -> list[Text]:
    """A line each, newest last; those for which there is no room are counted."""
    events = [(step, what, rank) for rank, run in sorted(job.ranks.items()) for step, what in run.events]
    several = sum(run.exists for run in job.ranks.values()) > 1
    heard = shared(job.ranks)
    rows = [(f.step, of_finding(f, ranks if several else ())) for f, ranks in heard]
    for step, what, rank in events:
        rows.append((step, _row(step, "event", "dim", clean(what), [rank] if several else ())))
    rows.sort(key=lambda pair: pair[0])
    title = Text(f"findings ({len(heard)})" if heard else "no findings", style="bold")
    if room is not None and len(rows) > room:
        title.append(f", {len(rows) - room} earlier lines not shown", style="dim")
        rows = rows[-room:]
    return [title, *(row for _, row in rows)]


def of_finding(finding: Finding, ranks: Sequence[int] = ()) -> Text:
    """A finding in one line."""
    again = f" x{finding.count}" if finding.count > 1 else ""
    said = clean(f"{finding.diagnosis}{again}  {finding.where}: {finding.message}")
    row = _row(finding.step, finding.severity.label, STYLES[finding.severity], said, ranks)
    begin = row.plain.index(said)
    row.stylize(STYLES[finding.severity], begin, begin + len(finding.diagnosis))
    return row


def _row(step: int, word: str, style: str, said: str, ranks: Sequence[int]) -> Text:
    where = f"{span('rank', ranks)}  " if ranks else ""
    return Text.assemble((f"{step:>8}  ", "dim"), (f"{word:<8}", style), (where, "magenta"), said)


def _head(job: Job, width: int, ink: Ink) -> list[Text]:
    lead = job.lead
    if lead is None:
        return [waiting(job)]
    about = [str(lead.header.get("model", "")), f"run {lead.runs} of this record" if lead.runs > 1 else "", f"began {_clock(lead)}"]
    title = Text.assemble(("lossguard ", "bold"), (clean(str(job.folder)), "bold cyan"))
    title.append("".join(f" {ink.dot} {clean(part)}" for part in about if part), style="dim")
    now = status(job)
    style = "green" if now in ("running", "over") else "bold red" if now.startswith(("halted", "stalled")) else "yellow"
    numbers = [f"step {lead.step}" if lead.step >= 0 else "no step yet", *_speed(job), f"verdict {clean(lead.verdict)}"]
    rows = textwrap.wrap("  ".join([now, *(part.replace(" ", "\0") for part in numbers)]), max(width, len(now)))
    state = [Text(row.replace("\0", " ")) for row in rows]
    state[0].stylize(style, 0, len(now))
    return [title, *state]


def _curves(job: Job, width: int, ink: Ink) -> list[Text]:
    lead = job.lead
    if lead is None or lead.step < 0:
        return []
    bars = max(NARROWEST, width - LABEL - NUMBERS - 2)
    steps = 0, lead.step
    rows = _chart("loss", lead.losses, bars, steps, ink)
    newest = Series()
    for step, value in list(lead.window)[-NEWEST:]:
        newest.add(step, value)
    if newest and lead.step > 2 * NEWEST:  # else the first chart shows them as well
        rows += _spark(f"newest {NEWEST}", newest, bars, (lead.step - NEWEST + 1, lead.step), ink)
    for name, series in list(lead.terms.items())[:TERMS]:
        rows += _spark(clean(name), series, bars, steps, ink)
    if len(lead.terms) > TERMS:
        rows.append(Text(f"{'':<{LABEL}}and {len(lead.terms) - TERMS} more terms of the loss", style="dim"))
    if lead.validation:
        best = "" if lead.best is None else f"best {short(lead.best[1])} at {lead.best[0]}"
        rows += _spark("validation", lead.validation, bars, steps, ink, beside=best)
    for name, label in SIGNALS.items():
        if lead.signals[name]:
            rows += _spark(label, lead.signals[name], bars, steps, ink, name)
    return [*rows, *_marks(lead, width, ink), Text()]


def _chart(label: str, series: Series, bars: int, steps: tuple[int, int], ink: Ink) -> list[Text]:
    """The series in several rows; its greatest and its least number, and the newest, beside them."""
    if not series:
        return []
    columns = series.columns(bars, *steps)
    drawn = chart(columns, TALL, None, ink)
    now = f"now {short(series.newest[1])}" if series.newest else ""
    beside = [f"max {short(series.high)}", now, "(log scale)" if logarithmic(*drawn_range(columns)) else "", f"min {short(series.low)}", ""]
    return [_assembled(label if i == 0 else "", bar, number, ink) for i, (bar, number) in enumerate(zip(drawn, beside))]


def _spark(label: str, series: Series, bars: int, steps: tuple[int, int], ink: Ink, name: str = "", beside: str = "") -> list[Text]:
    """The series in one row, its newest number, and between which its numbers lie. The highest bar leaves a gap to the row above."""
    bounds, low = (0.0, 1.0) if name in SHARES else None, replace(ink, bars=ink.bars[:-1])
    drawn, *marks = chart(series.columns(bars, *steps), 1, bounds, low)
    now = _shown(name, series.newest[1]) if series.newest else ""
    least, most = _shown(name, series.low), _shown(name, series.high)
    beside = beside or ("" if math.isnan(series.low) else least if least == most else f"{least}..{most}")
    return [_assembled(label, drawn, f"{now:<9}{beside}", ink), *(_assembled("", row, "", ink) for row in marks)]


def _assembled(label: str, drawn: str, numbers: str, ink: Ink) -> Text:
    row = Text.assemble((f"{label[: LABEL - 1]:<{LABEL}}", "bold"))
    for lost, part in groupby(drawn, lambda c: c in (ink.nan, ink.infinite)):
        row.append("".join(part), style="bold red" if lost else "blue")
    return row.append(f"  {numbers}")


def _marks(lead: Run, width: int, ink: Ink) -> list[Text]:
    """What the marks in the drawings stand for."""
    told = []
    drawn = {"loss": lead.losses, "validation": lead.validation, **lead.terms, **{label: lead.signals[name] for name, label in SIGNALS.items()}}
    for label, series in drawn.items():
        if series.lost:
            times = "once" if series.lost == 1 else f"{series.lost} times, first"
            told.append(f"{clean(label)} {times} at step {series.first_lost}")
    text = f"{ink.nan} not a number, {ink.infinite} infinite: {'; '.join(told)}"
    return [Text(row, style="red") for row in textwrap.wrap(text, width)] if told else []


def _ranks(job: Job) -> list[Text]:
    """Which ranks there are and how far each is."""
    there = {rank: run for rank, run in job.ranks.items() if run.exists}
    if not there or list(there) == [0]:
        return []
    steps = {rank: run.step for rank, run in there.items()}
    low, high = min(steps.values()), max(steps.values())
    told = f"step {high}" if low == high else f"steps {low} to {high}, last {span('rank', [r for r, s in steps.items() if s == low])}"
    sick = [rank for rank, run in there.items() if run.step >= 0 and not math.isfinite(run.loss)]
    ended = [rank for rank, run in there.items() if run.ended]
    over = f"; over on {span('rank', ended)}" if ended and len(ended) < len(there) else ""
    rows = [Text.assemble((f"{span('rank', sorted(there))}", "magenta"), f": {told}{over}")]
    return [*rows, Text(f"loss not finite on {span('rank', sick)}", style="bold red")] if sick else rows


def span(word: str, numbers: Sequence[int]) -> str:
    """Numbers in few words.

    >>> span("rank", [3]), span("rank", [0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    groups = [[n for _, n in part] for _, part in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    texts = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    return f"{word}{'' if len(numbers) == 1 else 's'} {', '.join(texts[:6])}{', ...' if len(texts) > 6 else ''}"


def short(value: float) -> str:
    """A number in at most 9 characters.

    >>> short(0.2312345), short(1.2e-7), short(float("nan")), short(float("-inf"))
    ('0.231', '1.2e-07', 'NaN', '-Inf')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "-Inf" if value < 0 else "Inf"
    return f"{value:.3g}"


def ago(seconds: float) -> str:
    """A time span.

    >>> ago(40), ago(600), ago(10000)
    ('40 s', '10 min', '2.8 h')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def clean(text: str) -> str:
    """Text of a record without control characters, which could write to the terminal.

    >>> clean("a\\x1b[2Jb\\nc")
    'a [2Jb c'
    """
    return "".join(c if c.isprintable() else " " for c in text)


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name in SHARES and math.isfinite(value) else short(value)


def _speed(job: Job) -> list[str]:
    speed = job.speed
    return [] if speed is None else [f"{speed[0]:.3g} steps/s{' (mean)' if speed[1] else ''}"]


def _clock(lead: Run) -> str:
    began = float(lead.header.get("time", 0.0))
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(began)) if began else ""
