"""What was done to a run and what befell it: updates left out, cures, checkpoints, signals. A record's lines flow in, events flow out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SKIPS = 200  # events of left out updates on a page, more than a chart can part; our own choice
REASONS = {"nonfinite_gradient": "their gradients were not finite", "exploding_gradient": "their gradient norm was out of proportion"}


@dataclass(frozen=True)
class Event:
    """kind: ``skip``, ``cut``, ``rollback``, ``load``, ``saved``, ``unfit``, ``resumed``, ``stall`` or ``note``.

    first, last: where it stands on the axis of steps; what happened after N steps stands at N - 0.5, between two of them. count:
    updates left out. to: the step that a rollback went back to, on the same axis.
    """

    kind: str
    first: float
    last: float
    text: str
    count: int = 0
    to: float | None = None

    @property
    def when(self) -> str:
        """In words.

        >>> Event("saved", 9.5, 9.5, "").when, Event("skip", 3, 3, "").when, Event("skip", 3, 9, "").when
        ('after 10 steps', 'step 3', 'steps 3 to 9')
        """
        if self.first != round(self.first):
            return f"after {round(self.first + 0.5):,} steps"
        return f"step {self.first:,.0f}" if self.first == self.last else f"steps {self.first:,.0f} to {self.last:,.0f}"


def after(steps: int) -> float:
    """Where on the axis something stands that happened after so many steps."""
    return steps - 0.5


def skips(counts: Sequence[tuple[int, int, int]]) -> list[Event]:
    """Updates left out, from counters as they stood at sampled steps: (step, all so far, spikes among them).

    >>> [(e.when, e.count) for e in skips([(0, 0, 0), (10, 1, 0), (20, 3, 2), (30, 3, 2)])]
    [('steps 1 to 20', 3)]
    """
    found: list[tuple[int, int, int, int]] = []  # first and last step, all, spikes
    before = (counts[0][0] - 1, 0, 0) if counts and counts[0][0] == 0 else counts[0] if counts else (0, 0, 0)
    for step, total, spikes in counts:
        more, out_of_scale = total - before[1], max(0, spikes - before[2])
        if more > 0 and found and found[-1][1] == before[0]:
            first, _, known, of_those = found[-1]
            found[-1] = (first, step, known + more, of_those + out_of_scale)
        elif more > 0:
            found.append((before[0] + 1, step, more, out_of_scale))
        before = (step, total, spikes)
    while len(found) > SKIPS:
        pairs = [(*found[k : k + 2],) for k in range(0, len(found), 2)]
        found = [(p[0][0], p[-1][1], sum(x[2] for x in p), sum(x[3] for x in p)) for p in pairs]
    return [Event("skip", first, last, _left_out(total, spikes), total) for first, last, total, spikes in found]


def _left_out(total: int, spikes: int) -> str:
    parts = {"nonfinite_gradient": total - spikes, "exploding_gradient": spikes}
    told = [REASONS[name] if n == total else f"of {n} {REASONS[name]}" for name, n in parts.items() if n]
    return f"{total:,} update{'' if total == 1 else 's'} left out: {', '.join(told)}"


def cure(data: Mapping[str, Any]) -> Event:
    """What the recovery ladder did. data: a ``lossguard.recovery.Cure`` in plain types."""
    at, what, back = after(int(data["step"])), str(data["what"]), data.get("to")
    done = {"load": "the state was loaded from a checkpoint" + ("" if back is None else f" of after {back:,} steps"),
            "rollback": f"weights, optimizers and random generators are again those of after {back or 0:,} steps"}  # fmt: skip
    rate = f"every learning rate is multiplied by {float(data['factor']):g} from here on" if data["factor"] != 1.0 else ""
    words = "; ".join(part for part in (done.get(what, ""), rate) if part)
    return Event(what, at, at, f"{data['diagnosis']}: {words}", to=None if back is None else after(int(back)))


def of_record(lines: Iterable[Mapping[str, Any]], resumed: Iterable[int]) -> list[Event]:
    """The events of a record. lines: those of kind ``event``; resumed: the steps at which the run was taken up again."""
    found = [
        Event("resumed", after(step), after(step), "taken up again; what had been recorded beyond this step is not shown", to=after(step)) for step in resumed
    ]
    for line in lines:
        at, text = after(int(line["step"])), str(line["what"])
        if "cure" in line:
            found.append(cure(line["cure"]))
        elif "saved" in line or text.startswith("saved "):
            found.append(Event("saved", at, at, f"checkpoint {line.get('saved', text[6:])}"))
        else:
            found.append(Event("unfit" if "unfit" in line else "note", at, at, text))
    return found
