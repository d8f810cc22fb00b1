"""The judge: grace, patience, episodes, cascades, faults. Rules here are scripted: they find what the script says at each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from lossguard.findings import Cause, Finding, Severity
from lossguard.host.history import History, Sample
from lossguard.preflight import CHECKS
from lossguard.rules.judge import FOLLOWS, Judge
from lossguard.rules.rule import RULES, Rule

W, E, H = Severity.WARNING, Severity.ERROR, Severity.HALT


def scripted(name: str, script: dict[int, Any], *, grace: int = 0, patience: int = 1, reads: tuple[str, ...] = ("loss",)) -> Any:
    """A rule that finds with the severity the script holds for the newest step; an exception in the script is raised."""

    @dataclass(frozen=True)
    class Scripted:
        diagnosis: ClassVar[str] = name
        asked: list[int] = field(default_factory=list)

        def check(self, history: History) -> Finding | None:
            self.asked.append(history.step)
            now = script.get(history.step)
            if isinstance(now, Exception):
                raise now
            return None if now is None else Finding(name, now, history.step, "here", f"seen at {history.step}")

    Scripted.reads, Scripted.grace, Scripted.patience = reads, grace, patience  # type: ignore[attr-defined]
    return Scripted()


def play(judge: Judge, steps: int, every: int = 1, start: int = 0) -> list[tuple[int, str]]:
    """Run so many steps, a sample at every ``every``-th: what was heard, and when."""
    history, heard = History(), []
    for step in range(start, start + steps):
        history.add_loss(step, 1.0)
        if step % every == 0:
            history.add_sample(Sample(step))
        heard += [(step, f"{f.severity.label} {f.diagnosis}") for f in judge.observe(history, new_sample=step % every == 0)]
    return heard


def test_a_rule_rests_during_its_grace() -> None:
    """A rule is not asked before its grace is over."""
    rule = scripted("loss_spike", dict.fromkeys(range(20), W), grace=7)
    assert play(Judge([rule]), 20) == [(7, "warning loss_spike")] and rule.asked[0] == 7


def test_a_finding_is_heard_after_its_patience() -> None:
    """It takes so many findings in a row; one quiet answer between begins the count anew."""
    rule = scripted("loss_spike", {**dict.fromkeys((1, 2, 4, 5), W), **dict.fromkeys((7, 8, 9, 10), W)}, patience=3)
    assert play(Judge([rule]), 12) == [(9, "warning loss_spike")]


def test_a_halt_needs_no_patience() -> None:
    """A halt is heard at once, whatever the rule's patience."""
    assert play(Judge([scripted("nonfinite_loss", {4: H}, patience=5)]), 6) == [(4, "halt nonfinite_loss")]


def test_an_episode_is_one_event_with_a_count() -> None:
    """A fault that lasts is heard once; its event counts the findings and remembers the last step."""
    judge = Judge([scripted("loss_spike", dict.fromkeys(range(5, 15), W))])
    assert play(judge, 20) == [(5, "warning loss_spike")]
    assert [(f.step, f.count, f.last_step) for f in judge.findings] == [(5, 10, 14)]


def test_a_new_episode_begins_after_calm() -> None:
    """After so many quiet answers the same diagnosis is a new event; before, it is the old one."""
    script = {5: W, 5 + 20: W, 25 + 21: W}
    judge = Judge([scripted("loss_spike", script)], calm=20)
    assert play(judge, 60) == [(5, "warning loss_spike"), (46, "warning loss_spike")]
    assert [(f.step, f.count) for f in judge.findings] == [(5, 2), (46, 1)]


def test_a_graver_finding_of_an_episode_is_heard() -> None:
    """A warning that becomes a halt is heard again, under its first step."""
    judge = Judge([scripted("nonfinite_loss", {3: W, 4: W, 5: H, 6: W})])
    assert play(judge, 8) == [(3, "warning nonfinite_loss"), (5, "halt nonfinite_loss")]
    assert [(f.severity, f.step, f.count) for f in judge.findings] == [(H, 3, 4)]


def test_a_cascade_is_attached_to_its_root() -> None:
    """A later symptom of a fresh root is its consequence, and is not heard."""
    judge = Judge([scripted("constant_loss", {9: W, 10: W}), scripted("dead_relu", {4: W})])
    assert play(judge, 12) == [(4, "warning dead_relu")]
    assert [f.diagnosis for f in judge.findings] == ["dead_relu"] and [(c.diagnosis, c.count) for c in judge.findings[0].consequences] == [("constant_loss", 2)]


def test_of_findings_born_together_the_root_is_first() -> None:
    """Of findings of one step the one that the other follows from is the event, in whatever order the rules stand."""
    for rules in (["collapsed_activation", "dead_relu"], ["dead_relu", "collapsed_activation"]):
        judge = Judge([scripted(name, {4: W}) for name in rules])
        play(judge, 6)
        assert [(f.diagnosis, [c.diagnosis for c in f.consequences]) for f in judge.findings] == [("dead_relu", ["collapsed_activation"])]


def test_a_stale_root_explains_nothing() -> None:
    """Beyond the horizon a symptom is an event of its own; information is never a root."""
    assert len(play(Judge([scripted("dead_relu", {4: W}), scripted("constant_loss", {15: W})], horizon=10), 20)) == 2
    assert len(play(Judge([scripted("dead_relu", {4: Severity.INFO}), scripted("constant_loss", {5: W})]), 20)) == 2


def test_a_halt_is_never_hidden() -> None:
    """A halt is an event of its own below its root too, at once or when a consequence becomes one."""
    judge = Judge([scripted("update_ratio_high", {2: W}), scripted("nonfinite_loss", {4: H})])
    assert play(judge, 6) == [(2, "warning update_ratio_high"), (4, "halt nonfinite_loss")]
    judge = Judge([scripted("update_ratio_high", {2: W}), scripted("nonfinite_loss", {4: W, 5: H})])
    assert play(judge, 8) == [(2, "warning update_ratio_high"), (5, "halt nonfinite_loss")]
    assert judge.findings[1].step == 4


def test_mute_silences_rules_and_checks() -> None:
    """A muted diagnosis is neither asked nor admitted."""
    rule = scripted("loss_spike", {3: W})
    judge = Judge([rule], mute=frozenset({"loss_spike"}))
    assert play(judge, 6) == [] and rule.asked == [] and judge.admit([Finding("loss_spike", W, 1, "x", "y")]) == []


def test_a_rule_that_raises_rests() -> None:
    """A rule's own fault is reported once, the rule is asked no more, and the others go on."""
    faults: list[tuple[str, str]] = []
    broken, sound = scripted("loss_spike", {3: RuntimeError("boom")}), scripted("constant_loss", {3: W, 5: W})
    judge = Judge([broken, sound], on_fault=lambda name, error: faults.append((name, str(error))))
    assert play(judge, 8) == [(3, "warning constant_loss")]
    assert faults == [("loss_spike", "boom")] and broken.asked[-1] == 3
    with pytest.raises(RuntimeError, match="boom"):
        play(Judge([scripted("loss_spike", {3: RuntimeError("boom")})]), 8)


def test_only_loss_rules_are_asked_between_samples() -> None:
    """Rules that read the loss alone are asked at every hand-over, all others at new samples."""
    often, seldom = scripted("loss_spike", {}), scripted("dead_relu", {}, reads=("dead_fraction",))
    play(Judge([often, seldom]), 20, every=5)
    assert often.asked == list(range(20)) and seldom.asked == [0, 5, 10, 15]


def test_a_resumed_judge_goes_on() -> None:
    """The state of a judge holds its events and streaks: a resumed run hears what an uninterrupted one hears."""
    script = {**dict.fromkeys((3, 4), W), **dict.fromkeys(range(8, 14), W)}
    one, two = Judge([scripted("loss_spike", script, patience=3)]), Judge([scripted("loss_spike", script, patience=3)])
    whole = play(one, 20)
    first = play(two, 9)
    resumed = Judge([scripted("loss_spike", script, patience=3)])
    resumed.load_state_dict(two.state_dict())
    assert first + play(resumed, 11, start=9) == whole and resumed.findings == one.findings


def test_consequences_are_known_diagnoses() -> None:
    """The table of cascades names rules and checks, and nothing follows from itself."""
    known = set(RULES) | set(CHECKS)
    assert set(FOLLOWS) <= known
    for root, symptoms in FOLLOWS.items():
        assert set(symptoms) <= known, root


def test_every_rule_of_the_registry_is_a_rule() -> None:
    """Each registered class fulfils the protocol."""
    assert len(RULES) >= 20 and all(isinstance(make(), Rule) for make in RULES.values())


def test_halts_of_one_fault_are_one_event() -> None:
    """Below a root that halts, further halts are its consequences, whatever warning came before them."""
    judge = Judge([scripted("update_ratio_high", {2: W}), scripted("nonfinite_activation", {4: H}), scripted("nonfinite_loss", {4: H, 5: H})])
    assert play(judge, 7) == [(2, "warning update_ratio_high"), (4, "halt nonfinite_activation")]
    assert [c.diagnosis for c in judge.findings[1].consequences] == ["nonfinite_loss"]


def pair(name: str, cause: str, where: str, step: int) -> Finding:
    return Finding(name, W, step, where, "", causes=(Cause(cause, 0.6, ""),))


@pytest.mark.parametrize(
    ("first", "cause", "second", "where", "root"),
    [
        ("collapsed_activation", "constant weights or identical inputs", "dead_relu", "1 (ReLU)", "collapsed_activation"),
        ("collapsed_activation", "dead, saturated or constant weights", "dead_relu", "1 (ReLU)", "dead_relu"),
        ("vanishing_gradient", "depth", "dead_relu", "6 (gradient rows)", "vanishing_gradient"),
        ("vanishing_gradient", "depth", "dead_relu", "6 (ReLU)", "dead_relu"),
        ("unchanged_weights", "learning rate schedule", "skipped_steps", "optimizer.step", "unchanged_weights"),
        ("unchanged_weights", "frozen by mistake", "skipped_steps", "optimizer.step", "skipped_steps"),
    ],
)  # fmt: skip
def test_of_two_that_can_follow_from_each_other_what_was_measured_decides(first: str, cause: str, second: str, where: str, root: str) -> None:
    """Identical inputs, vanished gradients and a rate of nothing are roots; dead units and skips are it otherwise."""
    judge = Judge([])
    judge.admit([pair(first, cause, "0", 20)])
    judge.admit([pair(second, "", where, 29)])
    assert [f.diagnosis for f in judge.findings] == [root] and len(judge.findings[0].consequences) == 1


def test_a_slow_rule_rests_while_nothing_stirs() -> None:
    """A slow rule that was quiet 20 times is asked at every other sample, and at each one again from its first finding on."""
    rule = scripted("dead_relu", dict.fromkeys(range(61, 65), W), patience=2, reads=("dead_fraction",))
    type(rule).slow = True
    assert ("warning dead_relu") in [what for _, what in play(Judge([rule]), 80)]
    assert rule.asked[:20] == list(range(20)) and len([s for s in rule.asked if 20 <= s < 60]) == 20
    stirred = next(s for s in rule.asked if s > 60)
    assert [s for s in rule.asked if s >= stirred][:10] == list(range(stirred, stirred + 10))


def test_a_rest_is_resumed() -> None:
    """A resumed judge asks a resting rule at the steps of an uninterrupted one."""
    rules = [scripted("dead_relu", {}, reads=("dead_fraction",)) for _ in range(2)]
    for rule in rules:
        type(rule).slow = True
    whole, first, second = Judge([rules[0]]), Judge([rules[1]]), Judge([rules[1]])
    play(whole, 60)
    play(first, 31)
    second.load_state_dict(first.state_dict())
    play(second, 29, start=31)
    assert rules[0].asked == rules[1].asked
