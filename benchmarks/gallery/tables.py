"""Figures in, Markdown text out: the same tables for the terminal and for RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from gallery.measure import Outcome, Said
from gallery.registry import PROGRAMS
from gallery.tally import Figures, by_diagnosis, count, usable


def page(outcomes: Sequence[Outcome], how: str) -> str:
    """The whole report."""
    halves = {half: [o for o in outcomes if PROGRAMS[o.program].half == half] for half in ("tune", "held")}
    figures = {"all": count(outcomes), **{half: count(part) for half, part in halves.items()}}
    parts = [
        "# What the guard says of the gallery",
        how,
        headline(figures),
        "## By diagnosis",
        diagnoses(outcomes),
        listing("Programs that did not do what they claim; left out of every figure", [_unproven(o) for o in outcomes if not usable(o)]),
        listing("The guard's own faults", sorted({f"{o.program}: {text}" for o in outcomes for text in o.broken})),
        listing("False alarms", [_alarm(o, s) for o, s in figures["all"].alarms]),
        listing("False halts", [_alarm(o, s) for o in outcomes if usable(o) and _sound(o) for s in o.halts]),
        listing("Missed", [_missed(o) for o in figures["all"].missed]),
        listing("First cause is another one", [f"{_run(o)}: {s.diagnosis} says `{s.cause}`" for o, s in figures["all"].wrong_cause]),
        listing("Untrue names at the end of ill runs", [_alarm(o, s) for o, s in figures["all"].others]),
        listing("Not repaired", [f"{_run(o)}: changed {o.overrides or 'nothing'}" for o in outcomes if o.variant == "repaired" and usable(o) and not o.proven]),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def headline(figures: dict[str, Figures]) -> str:
    """One column for each half."""
    rows = [
        ("ill runs named rightly (recall)", lambda f: f.recall),
        ("first cause is the planted one", lambda f: f.cause),
        ("median delay, steps", lambda f: f.delay),
        ("non-finite number reported at its very step", lambda f: f.located),
        ("healthy runs with a false alarm", lambda f: f.false_healthy),
        ("healthy twins with a false alarm", lambda f: f.false_twins),
        ("healthy runs or twins falsely halted", lambda f: f.false_halts),
        ("ill runs with an alarm before the fault", lambda f: f.early),
        ("ill runs with an untrue name at the end", lambda f: f.untrue),
        ("repaired by the first remedy", lambda f: f.repairs),
    ]
    head = ["", *(("tuning half" if k == "tune" else "held-out half" if k == "held" else "all") for k in figures)]
    return grid(head, [[name, *(str(read(f)) for f in figures.values())] for name, read in rows])


def diagnoses(outcomes: Sequence[Outcome]) -> str:
    """One row for each diagnosis."""
    head = ["diagnosis", "ill runs that accept it", "heard", "heard first", "median delay", "false (healthy, twins)", "untrue (ill)"]
    rows = by_diagnosis(outcomes)
    return grid(head, [[n, r.expected, r.heard, r.first, f"{median(r.delays):g}" if r.delays else "-", r.false, r.untrue] for n, r in rows.items()])


def grid(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up."""
    texts = [[str(c).replace("|", "/") for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in texts]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def listing(title: str, items: Sequence[str]) -> str:
    """A section, or nothing."""
    return f"## {title} ({len(items)})\n\n" + "\n".join(f"- {i}" for i in items) if items else ""


def _sound(outcome: Outcome) -> bool:
    return PROGRAMS[outcome.program].healthy or outcome.variant == "twin"


def _run(outcome: Outcome) -> str:
    variant = "" if outcome.variant == "itself" else f", {outcome.variant}"
    return f"`{outcome.program}` (seed {outcome.seed}{variant})"


def _alarm(outcome: Outcome, said: Said) -> str:
    at = f"heard at {said.heard} of {outcome.steps}" if said.heard >= 0 else f"step {said.step}"
    return f"{_run(outcome)}: {('info', 'warning', 'error', 'halt')[said.severity]} {said.diagnosis}, {at}, {said.where}: {said.message}"


def _unproven(outcome: Outcome) -> str:
    bar = PROGRAMS[outcome.program].bar
    return f"{_run(outcome)}: {outcome.error or f'score {outcome.score:.4g}, bar {bar:g}'}"


def _missed(outcome: Outcome) -> str:
    program = PROGRAMS[outcome.program]
    heard = ", ".join(sorted({s.diagnosis + ("" if s.alarm else " (info)") for s in outcome.heard})) or "nothing"
    buried = f"; as a consequence: {', '.join(sorted(set(outcome.buried)))}" if outcome.buried else ""
    return f"{_run(outcome)}: {program.cause}; expected {', '.join(sorted(program.expect))}; heard {heard}{buried}"
