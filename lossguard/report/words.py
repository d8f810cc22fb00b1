"""A run in a sentence. What was found and how the curves read flow in, plain words flow out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lossguard import actions
from lossguard.findings import DIAGNOSES, Finding, Severity, number
from lossguard.report.reading import Run

# How the curves read (``verdict.STATES``): as the whole sentence of a run without findings, and as the first half of one with.
CURVES = {
    "learning": ("The loss falls", "but"),
    "flat": ("The loss no longer falls", "and"),
    "diverging": ("The loss rises", "and"),
    "no order": ("The loss rises, as a loss without order may", "and"),
    "overfitting begins": ("The training loss falls, the validation loss no longer", "and"),
    "overfitting": ("The model overfits: the validation loss has turned up", "and"),
    "done": ("Both losses have come down and settled", "but"),
    "oscillating validation": ("The validation loss swings up and down", "and"),
    "bottleneck": ("Neither the training nor the validation loss falls any more", "and"),
    "validation mismatch": ("The validation loss falls while the training loss does not", "and"),
    "not a number": ("The loss is not a finite number", "and"),
    "too early": ("The run is too short for its curve to be read", "and"),
}
CURED = ("cured by", "seen in the cool-down")  # how the note of a finding begins that the recovery ladder has dealt with
SPARED = (*actions.SPARED, "the update")  # and of one whose updates were left out, also in older records
GOOD = ("learning", "done")  # states that need nobody's attention
SAME = {"diverging_loss": ("diverging",), "overfitting": ("overfitting", "overfitting begins"), "loss_plateau": ("flat", "bottleneck"),
        "constant_loss": ("flat", "bottleneck"), "learning_bottleneck": ("flat", "bottleneck"), "validation_mismatch": ("validation mismatch",),
        "oscillating_validation": ("oscillating validation",)}  # fmt: skip  # diagnosis -> readings of the curves that say the same
MENDED = ("learning", "done", "flat", "no order", "too early", "overfitting begins", "bottleneck")  # in which what was dealt with is no trouble any more
QUIET = ("flat", "no order", "too early", "bottleneck", "overfitting begins")  # states that a run may rightly end in


@dataclass(frozen=True)
class Headline:
    """tone: ``well``, ``note``, ``ill`` or ``lost``. word: the tone as people read it. then: what to do, or nothing."""

    tone: str
    word: str
    sentence: str
    then: str = ""


def main_finding(run: Run) -> Finding | None:
    """The gravest finding from a warning up; of several one that was not dealt with and does not follow from another, and of these the earliest."""
    loud = [f for f in run.findings if f.severity >= Severity.WARNING]
    follows = {c.diagnosis for f in loud for c in f.consequences if c.diagnosis != f.diagnosis}
    return min(loud, key=lambda f: (f.note.startswith((*CURED, *SPARED)), -f.severity, f.diagnosis in follows, f.step)) if loud else None


def stood_still(run: Run) -> int | None:
    """The step after which no other came, where the run said so before it was killed."""
    last = run.stalls[-1].step if run.stalls else None
    return last if last is not None and not run.ended and run.steps <= last + 1 else None


def headline(run: Run) -> Headline:
    """The verdict on a run."""
    finding = main_finding(run)
    stuck = stood_still(run)
    if stuck is not None and (finding is None or finding.severity < Severity.HALT):
        return Headline("lost", "Lost", f"The run stood still after step {stuck:,}, and was killed.", "Where each thread stood is told below.")
    if finding is None:
        return _silent(run)
    if run.state in MENDED and finding.note.startswith((*CURED, *SPARED)):
        return _mended(run, finding)
    summary = DIAGNOSES[finding.diagnosis][1] if finding.diagnosis in DIAGNOSES else finding.diagnosis.replace("_", " ")
    more = sum(f.severity >= Severity.WARNING for f in run.findings) - 1
    rest = f" {_count(more, 'more finding')} below." if more else ""
    lost = finding.severity is Severity.HALT or (run.state == "not a number" and finding.diagnosis.startswith("nonfinite"))
    if lost:
        stopped = bool(run.facts.get("halted")) and run.steps <= finding.step + 64
        head = f"{'Stopped' if stopped else 'Lost'} at step {finding.step:,}: {summary}."
    else:
        once = finding.count == 1 and finding.last_step in (None, finding.step)
        since = f"at step {finding.step:,}" if once else "from the first step on" if finding.step == 0 else f"from step {finding.step:,} on"
        head = _sentence(run.state, finding.diagnosis, since, summary)
    then = f"Seen in {finding.where}. " if finding.where != "loss" else ""
    if finding.causes:
        then += f"Most likely: {finding.causes[0].name}. "
    if finding.remedies:
        then += f"Try: {finding.remedies[0].text}."
    return Headline("lost" if lost else "ill", "Lost" if lost else "Needs attention", head, then + rest)


def _sentence(state: str, diagnosis: str, since: str, summary: str) -> str:
    """How the curve reads, and what was found; one of them where they say the same.

    >>> _sentence("diverging", "diverging_loss", "from step 9 on", "the loss rises"), _sentence("flat", "dead_relu", "at step 9", "units are silent")
    ('From step 9 on the loss rises.', 'The loss no longer falls, and at step 9 units are silent.')
    """
    if state in SAME.get(diagnosis, ()):
        words = summary if "since the start" in summary else f"{since} {summary}"
        return f"{words[0].upper()}{words[1:]}."
    curve, link = CURVES[state]
    return f"{curve}, {link} {since} {summary}."


def _mended(run: Run, finding: Finding) -> Headline:
    """All that was found has been dealt with, and the curve is sound."""
    cures = [f"a {e.kind}" if e.kind != "load" else "a checkpoint" for e in run.events if e.kind in ("cut", "rollback", "load")]
    left_out = sum(e.count for e in run.events if e.kind == "skip")
    done = [f"was cured by {cures[0]}" if len(cures) == 1 else f"was cured {len(cures)} times"] if cures else []
    done += [f"had {_count(left_out, 'update')} left out"] if left_out else []
    sentence = f"{CURVES[run.state][0]}; the run {' and '.join(done) or 'was spared'} because of {finding.diagnosis}, first at step {finding.step:,}."
    then = f"Most likely: {finding.causes[0].name}. " if finding.causes else ""
    then += f"To need no cure: {finding.remedies[0].text}." if finding.remedies else ""
    return Headline("note", "Cured" if cures else "Spared", sentence, then)


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
    if stood_still(run) is not None and (finding is None or finding.severity < Severity.HALT):
        return f"stood still after step {stood_still(run):,}"
    if finding is None:
        return {"learning": "is healthy", "too early": "is too short to be read"}.get(run.state, f"has no finding ({run.state})")
    if finding.severity is Severity.HALT:
        return f"is lost at step {finding.step:,} ({finding.diagnosis})"
    if run.state in MENDED and finding.note.startswith((*CURED, *SPARED)):
        return f"was {'cured' if finding.note.startswith(CURED) else 'spared'} of {finding.diagnosis}"
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
        ("Configured", "; ".join(f"{name} = {value}" for name, value in (known.get("configured") or {}).items())),
        ("Loss", f"{number(run.span[0])} → {last}" if np.isfinite(run.span[0]) else ""),
        ("Left out", _left_out(run)),
        ("Cured", _cured(run)),
        ("Last good state", _last_good(run)),
        ("Resumed", ", ".join(e.when for e in run.events if e.kind == "resumed")),
        ("Began", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else ""),
        ("Took", duration(ended - began) if began and ended else ""),
        ("Parameters", f"{known['tensors']:,} tensors, {', '.join(known.get('dtypes', []))}" if known.get("tensors") else ""),
        ("Device", ", ".join(known.get("devices", []))),
        ("Versions", ", ".join(f"{n} {known[k]}" for k, n in (("torch", "torch"), ("python", "Python"), ("lossguard", "lossguard")) if known.get(k))),
    ]
    return [(name, value) for name, value in pairs if value]


def _left_out(run: Run) -> str:
    counts = {name: n for name, n in run.facts.get("skipped", {}).items() if n}
    total = sum(counts.values()) or sum(e.count for e in run.events if e.kind == "skip")
    return _count(total, "update") + (f" ({', '.join(counts)})" if counts else "") if total else ""


def _cured(run: Run) -> str:
    kinds = [e.kind for e in run.events if e.kind in ("cut", "rollback", "load")]
    factor = [c["factor"] for c in run.facts.get("cures", ())][-1:]
    rate = f"; learning rate × {factor[0]:g}" if factor and factor[0] != 1.0 else ""
    return ", ".join(_count(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)) + rate if kinds else ""


def _last_good(run: Run) -> str:
    good = run.facts.get("last_good")
    return f"{good['path']}, after {good['after_steps']:,} steps" if good else ""


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
