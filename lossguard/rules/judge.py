"""Asks every rule, and turns what they say into events: grace, patience, episodes, cascades. Numpy only.

History in, findings out. The judge holds the only state on the rules' side: streaks and open episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lossguard.findings import Finding, Severity
from lossguard.host.history import History
from lossguard.rules.rule import Rule

_DIVERGENCE = ("nonfinite_loss", "nonfinite_activation", "nonfinite_gradient", "nonfinite_weight", "exploding_gradient",
               "diverging_loss", "loss_spike", "saturated_softmax", "saturated_activation", "collapsed_activation", "dead_relu",
               "vanishing_gradient", "constant_loss", "clipping_dominates", "unchanged_weights", "update_ratio_low", "loss_plateau",
               "oscillating_loss", "oscillating_validation", "learning_bottleneck", "validation_mismatch",
               "attention_logit_growth", "overflow_risk", "skipped_steps")  # fmt: skip
_STANDSTILL = ("constant_loss", "loss_plateau", "learning_bottleneck")
_COLLAPSE = (*_STANDSTILL, "unchanged_weights", "update_ratio_low")
_NO_SIGNAL = ("vanishing_gradient", "collapsed_activation", *_COLLAPSE)
_BEFORE = ("initial_loss_off", "cannot_overfit_batch")  # found before the first step, or at it

# root -> what may follow from it. A later symptom found while its root's episode is fresh is attached to the root.
# Order matters: of findings born in one round, the earlier row is the root.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "nonfinite_input": (*_DIVERGENCE, "update_ratio_high", *_BEFORE),
    "missing_zero_grad": (*_DIVERGENCE, "update_ratio_high"),
    "poor_initialization": (*_DIVERGENCE, "update_ratio_high", *_BEFORE),
    "unchanged_weights": (*_NO_SIGNAL, *_BEFORE),
    "update_ratio_high": _DIVERGENCE,
    "exploding_gradient": (*_DIVERGENCE, "update_ratio_high"),
    "nonfinite_activation": (*_DIVERGENCE, "update_ratio_high"),
    "nonfinite_gradient": (*_DIVERGENCE, "update_ratio_high"),
    "nonfinite_weight": (*_DIVERGENCE, "update_ratio_high"),
    "nonfinite_loss": (*_DIVERGENCE, "update_ratio_high"),
    "overflow_risk": ("skipped_steps",),
    "skipped_steps": _NO_SIGNAL,
    "attention_logit_growth": ("saturated_softmax", "loss_spike", "diverging_loss", "vanishing_gradient", "exploding_gradient"),
    "saturated_softmax": ("vanishing_gradient", "loss_spike", "diverging_loss", "oscillating_loss", "update_ratio_low", *_STANDSTILL),
    "dead_relu": _NO_SIGNAL,
    "saturated_activation": _NO_SIGNAL,
    "vanishing_gradient": _NO_SIGNAL,
    "collapsed_activation": _COLLAPSE,
    "update_ratio_low": (*_STANDSTILL, "unchanged_weights"),
    "clipping_dominates": ("learning_bottleneck", "loss_plateau", "update_ratio_low"),
    "diverging_loss": ("loss_spike", "oscillating_loss", "oscillating_validation", "loss_plateau", "learning_bottleneck"),
    "constant_loss": ("loss_plateau", "learning_bottleneck"),
    "oscillating_loss": ("oscillating_validation", "learning_bottleneck", "loss_spike"),
    "loss_plateau": ("learning_bottleneck",),
    "validation_mismatch": ("validation_below_training", "oscillating_validation"),
    "overfitting": ("validation_mismatch", "oscillating_validation"),
    "negative_loss": (*_DIVERGENCE, "update_ratio_high", "overfitting"),  # a loss without a floor is followed downwards for ever
    "invalid_labels": ("collapsed_activation", "vanishing_gradient", "oscillating_loss", *_STANDSTILL, *_BEFORE),
    "unnormalized_input": ("poor_initialization", "unchanged_weights", *_BEFORE),
    "wrong_output_activation": (
        "unchanged_weights",
        "vanishing_gradient",
        "update_ratio_low",
        "saturated_softmax",
        "validation_mismatch",
        *_STANDSTILL,
        *_BEFORE,
    ),
    "cross_sample_leak": ("cannot_overfit_batch",),
    "initial_loss_off": ("cannot_overfit_batch",),
}
# (root, what follows from it) -> when it does so. Of two that can follow from each other, what was measured decides.
ONLY_IF: dict[tuple[str, str], Callable[[Finding, Finding], bool]] = {
    # a loss scale that collapses ends in gradients that stay non-finite: the skips before them are no consequence
    ("nonfinite_gradient", "skipped_steps"): lambda root, late: late.step > root.step,
    # a latent code that was emptied is no layer that collapsed
    **{
        (root, "collapsed_activation"): lambda _, late: late.causes[:1] == () or late.causes[0].name != "posterior collapse"
        for root in ("dead_relu", "vanishing_gradient", "saturated_activation", "skipped_steps")
    },
    # no layer tells samples apart, not even the first: a unit silent for one sample is silent for all
    ("collapsed_activation", "dead_relu"): lambda root, _: root.causes[:1] != () and root.causes[0].name == "constant weights or identical inputs",
    # dead units read from the rows of gradients: where gradients vanish, rows are 0 for that reason
    ("vanishing_gradient", "dead_relu"): lambda _, late: "(gradient rows)" in late.where,
    # a rate that fell to nothing moves nothing, and the optimizer steps all the same
    ("unchanged_weights", "skipped_steps"): lambda root, _: root.causes[:1] != () and root.causes[0].name == "learning rate schedule",
}
SEEN_LATE = ("dead_relu", "vanishing_gradient")  # measured over a window that began before what follows from it was seen
RANK = {name: i for i, name in enumerate(FOLLOWS)}


def follows(root: Finding, late: Finding) -> bool:
    """Whether a finding may be the consequence of another."""
    condition = ONLY_IF.get((root.diagnosis, late.diagnosis))
    return late.diagnosis in FOLLOWS.get(root.diagnosis, ()) if condition is None else condition(root, late)


@dataclass
class Judge:
    """Asks rules and keeps the events.

    horizon: how many steps after a root's last sign a symptom still counts as its consequence. calm: how many quiet
    answers end an episode, after which the same rule may report anew. rest: how seldom a rule with a ``slow`` law is asked
    while nothing stirs; the first answer that is not quiet ends its rest. halts: which findings end the run; such a one is
    hidden below a root only if the root ends the run itself. on_fault: called with a rule's own exception, after which
    that rule is asked no more.
    """

    rules: Sequence[Rule]
    mute: frozenset[str] = frozenset()
    horizon: int = 200  # steps; the cascades of the survey's faulty runs unfold within this
    echo: int = 30  # steps before a root was seen in which what follows from it may have been seen; three samples at the default interval
    calm: int = 20  # quiet answers
    rest: int = 2  # a slow rule that has been quiet for ``calm`` answers is asked at every so many samples
    halts: Callable[[Finding], bool] = lambda finding: finding.severity == Severity.HALT
    on_fault: Callable[[str, Exception], None] | None = None
    findings: list[Finding] = field(default_factory=list)
    _streaks: dict[str, int] = field(default_factory=dict)
    _quiet: dict[str, int] = field(default_factory=dict)
    _open: dict[str, tuple[int, ...]] = field(default_factory=dict)  # diagnosis -> path into findings: (event,) or (event, consequence)
    _asked: dict[str, int] = field(default_factory=dict)  # the step at which a rule with a pace was asked last
    _turns: dict[str, list[tuple[Rule, int, int, bool]]] = field(init=False)  # what brings news -> rules, their grace, pace, whether slow
    _calm: dict[str, int] = field(default_factory=dict)  # a slow rule's quiet answers since it last found something
    _samples: int = 0

    def __post_init__(self) -> None:
        self._turns = {"loss": [], "sample": [], "validation": []}
        for rule in self.rules:
            if rule.diagnosis not in self.mute:
                news = "validation" if "validation" in rule.reads else "loss" if rule.reads == ("loss",) else "sample"
                self._turns[news].append((rule, rule.grace, getattr(rule, "pace", 0), getattr(rule, "slow", False)))

    def observe(self, history: History, *, new_sample: bool) -> list[Finding]:
        """Ask all rules that have news; return the events that people should hear of now (new or graver)."""
        step = history.step
        found = self._ask(self._turns["loss"], history, step)
        if new_sample:
            self._samples += 1
            found += self._ask(self._turns["sample"], history, step)
        if history.fresh_validations:  # once for each evaluation
            found += self._ask(self._turns["validation"], history, step)
        history.mark_judged()
        return self.admit(found) if found else []

    def admit(self, found: Iterable[Finding]) -> list[Finding]:
        """Take findings (of rules or of checks) into the list of events; returns the new or graver events."""
        heard: list[str] = []
        for finding in sorted(found, key=lambda f: (f.step, RANK.get(f.diagnosis, len(RANK)))):
            if self._admit(finding):
                heard.append(finding.diagnosis)
        events = [self.findings[self._open[name][0]] for name in dict.fromkeys(heard)]
        return [event for i, event in enumerate(events) if event not in events[:i]]

    def retire(self) -> list[Finding]:
        """End all episodes and hand their events over: what comes is judged as if nothing had been found before."""
        events, self.findings = self.findings, []
        self._open, self._streaks, self._quiet = {}, {}, {}
        return events

    def state_dict(self) -> dict[str, Any]:
        """Events and streaks, as plain types."""
        return {"findings": [f.to_dict() for f in self.findings], "streaks": self._streaks, "quiet": self._quiet, "open": self._open, "asked": self._asked,
                "calm": self._calm, "samples": self._samples}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.findings = [Finding.from_dict(f) for f in state["findings"]]
        self._streaks, self._quiet, self._asked = dict(state["streaks"]), dict(state["quiet"]), dict(state.get("asked", {}))
        self._calm, self._samples = dict(state.get("calm", {})), int(state.get("samples", 0))
        self._open = {k: tuple(v) for k, v in state["open"].items()}

    def _ask(self, turns: Sequence[tuple[Rule, int, int, bool]], history: History, step: int) -> list[Finding]:
        """What these rules find, those whose time has come."""
        found: list[Finding] = []
        for at, (rule, grace, pace, slow) in enumerate(turns):
            if step < grace or (slow and (self._samples + at) % self.rest and self._calm.get(rule.diagnosis, 0) >= self.calm):
                continue
            if pace:
                if step - self._asked.get(rule.diagnosis, -pace) < pace:
                    continue
                self._asked[rule.diagnosis] = step
            try:
                finding = rule.check(history)
            except Exception as error:  # a rule's own fault never kills a run: it is reported once and the rule rests
                self._turns = {news: [turn for turn in those if turn[0] is not rule] for news, those in self._turns.items()}
                if self.on_fault is None:
                    raise
                self.on_fault(rule.diagnosis, error)
                continue
            if finding is None:
                self._calm_down(rule.diagnosis, slow)
            else:
                name = rule.diagnosis
                self._quiet[name] = self._calm[name] = 0
                self._streaks[name] = self._streaks.get(name, 0) + 1
                if self._streaks[name] >= rule.patience or finding.severity == Severity.HALT:
                    found.append(finding)
        return found

    def _calm_down(self, name: str, slow: bool) -> None:
        """A rule has found nothing: its streak ends, and after enough such answers its episode."""
        if slow:
            self._calm[name] = self._calm.get(name, 0) + 1
        if name in self._streaks:
            self._streaks[name] = 0
        if name in self._open:
            self._quiet[name] = self._quiet.get(name, 0) + 1
            if self._quiet[name] >= self.calm:
                del self._open[name]

    def _admit(self, finding: Finding) -> bool:
        """Take one finding in; True if people should hear of its event."""
        name = finding.diagnosis
        if name in self.mute:
            return False
        if name in self._open:
            return self._continue(self._open[name], finding)
        root = self._root_of(finding)
        if root is not None:
            event = self.findings[root]
            self.findings[root] = replace(event, consequences=(*event.consequences, finding))
            self._open[name] = (root, len(event.consequences))
            return False
        if name in FOLLOWS and finding.severity >= Severity.WARNING:
            finding = self._adopt(finding)
        self.findings.append(finding)
        self._open[name] = (len(self.findings) - 1,)
        return True

    def _adopt(self, root: Finding) -> Finding:
        """Events that follow from this root become its consequences: those of a whole window before a root that takes one to
        see, and those seen just before it, since losses come every step and other signals at sampled ones."""
        reach, began = (self.horizon, 0) if root.diagnosis in SEEN_LATE else (self.echo, root.step - self.echo)
        follow = [i for i, f in enumerate(self.findings)
                  if follows(root, f) and f.severity < Severity.HALT and f.step >= began
                  and root.step - (f.last_step or f.step) <= reach and not follows(f, root)]  # fmt: skip
        for i in reversed(follow):
            self._open = {n: (p[0] - (p[0] > i), *p[1:]) for n, p in self._open.items() if p[0] != i}
        adopted = tuple(replace(self.findings[i], consequences=()) for i in follow)
        self.findings = [f for i, f in enumerate(self.findings) if i not in follow]
        for k, f in enumerate(adopted):
            self._open[f.diagnosis] = (len(self.findings), k)
        return replace(root, consequences=adopted)

    def _continue(self, path: tuple[int, ...], finding: Finding) -> bool:
        event = self.findings[path[0]]
        old = event if len(path) == 1 else event.consequences[path[1]]
        graver = finding.severity > old.severity
        last = max(finding.step, old.last_step or old.step)
        new = replace(finding if graver else old, step=old.step, count=old.count + 1, last_step=last, consequences=old.consequences)
        if len(path) == 1:
            self.findings[path[0]] = new
            return graver
        if self.halts(new) and not self.halts(event):  # a halt is never hidden below a root that does not halt
            self.findings.append(new)
            self._open[finding.diagnosis] = (len(self.findings) - 1,)
            return True
        listed = event.consequences
        self.findings[path[0]] = replace(event, consequences=(*listed[: path[1]], new, *listed[path[1] + 1 :]))
        return False

    def _root_of(self, finding: Finding) -> int | None:
        """The earliest event that explains this finding and is still fresh; what halts is hidden only below what halts."""
        for i, event in enumerate(self.findings):
            if self.halts(finding) and not self.halts(event):
                continue
            fresh = finding.step - (event.last_step if event.last_step is not None else event.step) <= self.horizon
            if fresh and event.severity >= Severity.WARNING and follows(event, finding) and event.step <= finding.step:
                return i
        return None
