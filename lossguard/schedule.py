"""Which steps are sampled, and when a sample is complete. Host numbers only."""

from __future__ import annotations

DENSE = 50  # steps at the start that are all sampled: a rate 100 times too large shows for 5 to 10 steps only
ALARM = 10  # steps sampled densely after a non-finite number
MICRO_BATCHES = 16  # iterations a sample waits for an update where ``accumulate`` is not given


class Schedule:
    """Every ``every``-th step, all of the first ``dense``, and those after an alarm.

    accumulate: micro-batches of an update, None if unknown. may_skip: an update may be left out unseen (a loss scaler), so
    that a sample without one is complete too. A sample stays open until the iteration in which the optimizer steps.

    >>> schedule = Schedule(every=10, dense=2)
    >>> [step for step in range(25) if schedule.due(step)]
    [0, 1, 10, 20]
    """

    def __init__(self, every: int, dense: int = DENSE, *, accumulate: int | None = None, may_skip: bool = False) -> None:
        self.every, self.dense = every, dense
        self.update_seen = False  # since the guard was attached
        self.update_tried = False  # announced in this iteration, whether or not a loss scaler let it happen
        self._accumulate, self._may_skip = accumulate, may_skip and accumulate is None
        self._tries = 0  # iterations the open sample has waited
        self._common = 0  # the same of a sample that all ranks take, whatever one of them was alarmed by
        self._alarm_until = -1

    def due(self, step: int) -> bool:
        """Whether this step is sampled."""
        return self._tries > 0 or self._common > 0 or step % self.every == 0 or self.settling(step)

    def regular(self, step: int) -> bool:
        """Whether the arguments alone make this step a sampled one: so it is on every rank."""
        return step % self.every == 0 or step < self.dense

    def next_due(self, step: int) -> int:
        """The first step after this one that is sampled, if nothing happens until then.

        >>> Schedule(every=10, dense=2).next_due(13)
        20
        """
        after = step + 1
        return after if self.due(after) else (after // self.every + 1) * self.every

    def settling(self, step: int) -> bool:
        """Whether this step is looked at closely: at the start, and after an alarm."""
        return step < self.dense or step <= self._alarm_until

    def alarm(self, step: int) -> None:
        """Something non-finite was seen at this step."""
        self._alarm_until = max(self._alarm_until, step + ALARM)

    def complete(self, stepped: bool) -> bool:
        """Whether the sample of this iteration is complete; if not, it is taken anew in the next."""
        self._tries = self._waited(self._tries, stepped)
        return self._tries == 0

    def together(self, step: int, stepped: bool) -> bool:
        """Whether a sample is complete on every rank in this iteration: as :meth:`complete`, with alarms left out. Once an iteration."""
        if not self._common and not self.regular(step):
            return False
        self._common = self._waited(self._common, stepped)
        return self._common == 0

    def _waited(self, tries: int, stepped: bool) -> int:
        """How many iterations a sample has waited for its update now; 0 if it is complete."""
        if stepped or self.update_tried or self._may_skip:
            return 0
        tries += 1
        return tries if tries < (self._accumulate or (MICRO_BATCHES if self.update_seen else 1)) else 0
