"""A run in a sentence. What was found and how the curves read flow in, plain words flow out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lossguard.findings import DIAGNOSES, Finding, Severity, number
from lossguard.report.reading import Run

# How the curves read (``verdict.STATES``): as the whole sentence of a run without findings, and as the first half of one with.
CURVES = {
    "learning": ("The loss falls", "but"),
    "flat": ("The loss no longer falls", "and"),
    "diverging": ("The loss rises", "and"),
    "overfitting begins": ("The training loss falls, the validation loss no longer", "and"),
    "overfitting": ("The model overfits: the validation loss has turned up", "and"),
    "done": ("Both losses have come down and settled", "but"),
    "oscillating validation": ("The validation loss swings up and down", "and"),
    "bottleneck": ("Neither the training nor the validation loss falls any more", "and"),
    "validation mismatch": ("The validation loss falls while the training loss does not", "and"),
    "not a number": ("The loss is not a finite number", "and"),
    "too early": ("The run is too short for its curve to be read", "and"),
}
GOOD = ("learning", "done")  # states that need nobody's attention
QUIET = ("flat", "too early", "bottleneck", "overfitting begins")  # states that a run may rightly end in


@dataclass(frozen=True)
class Headline:
    """tone: ``well``, ``note``, ``ill`` or ``lost``. word: the tone as people read it. then: what to do, or nothing."""

    tone: str
    word: str
    sentence: str
    then: str = ""


def main_finding(run: Run) -> Finding | None:
    """The gravest finding from a warning up; of several one that does not follow from another, and of these the earliest."""
    loud = [f for f in run.findings if f.severity >= Severity.WARNING]
    follows = {c.diagnosis for f in loud for c in f.consequences if c.diagnosis != f.diagnosis}
    return min(loud, key=lambda f: (-f.severity, f.diagnosis in follows, f.step)) if loud else None


def headline(run: Run) -> Headline:
    """The verdict on a run."""
    finding = main_finding(run)
    if finding is None:
        return _silent(run)
    summary = DIAGNOSES[finding.diagnosis][1] if finding.diagnosis in DIAGNOSES else finding.diagnosis.replace("_", " ")
    more = sum(f.severity >= Severity.WARNING for f in run.findings) - 1
    rest = f" {_count(more, 'more finding')} below." if more else ""
    lost = finding.severity is Severity.HALT or (run.state == "not a number" and finding.diagnosis.startswith("nonfinite"))
    if lost:
        stopped = bool(run.facts.get("halted")) and run.steps <= finding.step + 64
        head = f"{'Stopped' if stopped else 'Lost'} at step {finding.step:,}: {summary}."
    else:
        curve, link = CURVES[run.state]
        once = finding.count == 1 and finding.last_step in (None, finding.step)
        since = f"at step {finding.step:,}" if once else "from the first step on" if finding.step == 0 else f"from step {finding.step:,} on"
        head = f"{curve}, {link} {since} {summary}."
    then = f"Seen in {finding.where}. " if finding.where != "loss" else ""
    if finding.causes:
        then += f"Most likely: {finding.causes[0].name}. "
    if finding.remedies:
        then += f"Try: {finding.remedies[0].text}."
    return Headline("lost" if lost else "ill", "Lost" if lost else "Needs attention", head, then + rest)


def _silent(run: Run) -> Headline:
    curve = CURVES[run.state][0]
    first, last = run.span
    if run.state in ("learning", "overfitting begins") and np.isfinite(last):
        curve += f", from {number(first)} to {number(last)} in {run.steps:,} steps"
    if run.state in GOOD:
        return Headline("well", "Healthy", f"{curve}; no rule found anything ill.")
    notes = {"bottleneck": "If that is too high: a lower learning rate, then a smaller batch.", "flat": "If that is too high: another learning rate."}
    if run.state in QUIET:
        return Headline("note", "Nothing found", f"{curve}; no rule found anything ill.", notes.get(run.state, ""))
    return Headline("lost" if run.state == "not a number" else "ill", "Look closer", f"{curve}, although no rule found anything ill.")


def short(run: Run) -> str:
    """A run in a few words, to stand beside another."""
    finding = main_finding(run)
    if finding is None:
        return {"learning": "is healthy", "too early": "is too short to be read"}.get(run.state, f"has no finding ({run.state})")
    if finding.severity is Severity.HALT:
        return f"is lost at step {finding.step:,} ({finding.diagnosis})"
    return f"is ill from step {finding.step:,} on ({finding.diagnosis})"


def comparison(a: Run, b: Run) -> Headline:
    """The verdict on two runs."""
    order = {"well": 0, "note": 1, "ill": 2, "lost": 3}
    tones = [headline(run).tone for run in (a, b)]
    sentence = f"“{a.label}” {short(a)}; “{b.label}” {short(b)}."
    return Headline(max(tones, key=order.__getitem__), "Two runs compared", sentence)


def facts(run: Run) -> list[tuple[str, str]]:
    """The run's facts, as names and values."""
    known = run.facts
    began, ended = known.get("time"), known.get("ended")
    last = "not finite" if run.state == "not a number" else number(run.span[1])
    pairs = [
        ("Model", str(known.get("model", ""))),
        ("Optimizer", ", ".join(known.get("optimizers", []))),
        ("Steps", f"{run.steps:,}"),
        ("Sampled", f"{run.samples:,} steps" + (f", every {known['every']}" if known.get("every") else "")),
        ("Loss", f"{number(run.span[0])} → {last}" if np.isfinite(run.span[0]) else ""),
        ("Began", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else ""),
        ("Took", duration(ended - began) if began and ended else ""),
        ("Parameters", f"{known['tensors']:,} tensors, {', '.join(known.get('dtypes', []))}" if known.get("tensors") else ""),
        ("Device", ", ".join(known.get("devices", []))),
        ("Versions", ", ".join(f"{n} {known[k]}" for k, n in (("torch", "torch"), ("python", "Python"), ("lossguard", "lossguard")) if known.get(k))),
    ]
    return [(name, value) for name, value in pairs if value]


def duration(seconds: float) -> str:
    """A time span as people say it.

    >>> duration(0.42), duration(75), duration(9000)
    ('0.4 s', '1 min 15 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
