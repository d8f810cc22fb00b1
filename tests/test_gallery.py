"""The gallery: laws of its registry and of its counting, and the quick subset with what must come out of it."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import diagnosis  # noqa: E402
from gallery import measure, registry, tables, tally  # noqa: E402

from lossguard import Cause, Finding, Guard, Remedy, Severity  # noqa: E402
from lossguard.findings import DIAGNOSES  # noqa: E402

PROGRAMS = registry.load()


def test_there_are_enough():
    """At least 60 programs of each kind, and each half has a third of them or more."""
    for healthy in (True, False):
        some = [p for p in PROGRAMS.values() if p.healthy == healthy]
        assert len(some) >= 60
        assert min(sum(p.half == half for p in some) for half in ("tune", "held")) >= len(some) / 3


def test_expected_names_are_known():
    """An ill program expects diagnoses that exist, or that the catalogue has planned."""
    for p in PROGRAMS.values():
        assert p.expect <= set(DIAGNOSES), p.name


def test_every_program_says_what_it_is():
    """A docstring for each healthy program, a planted cause for each ill one, a finite bar for all."""
    for p in PROGRAMS.values():
        assert p.bar == p.bar and abs(p.bar) < float("inf")
        assert p.cause if not p.healthy else inspect.getdoc(p.run), p.name


def test_programs_neither_seed_nor_print():
    """Seeds belong to the harness: a program that seeds the global generators would be the same run for every seed."""
    for path in sorted(registry.HERE.glob("healthy_*.py")):
        text = path.read_text(encoding="utf-8")
        for word in ("np.random.seed", "random.seed(", "print("):
            assert word not in text, (path.name, word)


def test_files_are_small():
    """No file of programs exceeds 350 lines."""
    for path in registry.HERE.glob("healthy_*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path.name


def test_a_name_is_taken_once(monkeypatch):
    """Two programs of one name are refused, and the message says where the first is."""
    monkeypatch.setattr(registry, "PROGRAMS", {})

    def twice(job):
        return 1.0

    registry.program(healthy=True, bar=0.5)(twice)
    with pytest.raises(ValueError, match=r"two programs are named 'twice'.*rename one"):
        registry.program(healthy=True, bar=0.5)(twice)


@pytest.mark.parametrize("given", [{"healthy": True, "expect": {"loss_spike"}}, {"healthy": False}, {"expect": {"loss_spike"}}])
def test_contradictions_are_refused(given):
    """A healthy program expects nothing; an ill one expects something and says what was planted."""
    with pytest.raises(ValueError, match=r"give healthy=True or expect|give cause="):
        registry.program(bar=1.0, **given)


def test_planted_values():
    """Ill by itself, healthy in the twin, and what a remedy says where it names the key or its factor."""
    assert registry.Job().planted("lr", ill=10.0, healthy=0.1) == 10.0
    assert registry.Job(twin=True).planted("lr", ill=10.0, healthy=0.1) == 0.1
    assert registry.Job(overrides={"lr": 0.5}).planted("lr", ill=10.0, healthy=0.1) == 0.5
    assert registry.Job(overrides={"lr_factor": 0.1}).planted("lr", ill=10.0, healthy=0.1) == 1.0
    assert registry.Job(overrides={"init": "he"}).planted("lr", ill=10.0, healthy=0.1) == 10.0


def test_the_stand_in_knows_every_call():
    """What a loop can call on a guard it can call on the stand-in, too."""
    calls = [n for n, f in vars(Guard).items() if callable(f) and not n.startswith("_") and n not in ("state_dict", "load_state_dict")]
    stand_in = registry.Bare()
    for name in calls:
        assert callable(getattr(stand_in, name)), name
    with pytest.raises(AttributeError):
        stand_in.unheard_of()


def test_a_halt_is_noted_and_the_run_goes_on():
    """A NaN loss halts a user's run; in the gallery it is written down with its step."""
    job, model = registry.Job(), nn.Linear(2, 1)
    guard = job.guard(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for i in range(6):
        loss = model(torch.ones(4, 2)).mean() * (float("nan") if i == 3 else 1.0)
        loss.backward()
        guard.step(loss)
    job.close()
    assert [h.step for h in job.halts][:1] == [3]
    assert job.halts[0].finding.diagnosis.startswith("nonfinite") and guard.steps == 6


@pytest.mark.parametrize("name", ["wine_full_batch_descent", "bandit_reinforce", "precision_bf16_weights"])
def test_the_guard_changes_no_score(name):
    """A program scores the same to the last bit with the guard and without."""
    watched, bare = measure.measure(name, 0), measure.measure(name, 0, bare=True)
    assert not watched.error and not bare.error and watched.score == bare.score and watched.steps > 0 == bare.steps


# ---- counting


def said(name, heard=10, severity=1, cause="", step=None):
    return measure.Said(name, severity, heard, heard if step is None else step, cause, "loss", "")


@pytest.fixture
def two(monkeypatch):
    """One healthy and one ill program, whose fault enters at step 50 and is a NaN."""
    monkeypatch.setattr(registry, "PROGRAMS", registry.PROGRAMS)
    healthy = registry.Program("well", lambda job: 1.0, True, 0.5)
    ill = registry.Program("sick", lambda job: 0.0, False, 0.5, frozenset({"nonfinite_loss"}), "a NaN", ("loss function",), enters=50, nonfinite=50)
    for p in (healthy, ill):
        monkeypatch.setitem(registry.PROGRAMS, p.name, p)


def outcome(name, variant="itself", **parts):
    return measure.Outcome(name, 0, variant, proven=parts.pop("proven", True), **parts)


def test_counting_an_ill_run(two):
    """A diagnosis counts from the fault on, with its first cause, delay and step; another root at the end is untrue."""
    right = said("nonfinite_loss", 51, 3, "loss function", step=50)
    early, other = said("loss_spike", 20), said("dead_relu", -1, step=80)
    figures = tally.count([outcome("sick", heard=[early, right], final=[right, other]), outcome("sick", heard=[said("nonfinite_loss", 40)])])
    assert (figures.recall.hits, figures.recall.of, figures.delays) == (1, 2, [1])
    assert (figures.cause.hits, figures.located.hits, figures.early.hits, figures.untrue.hits) == (1, 1, 2, 1)


def test_counting_healthy_runs(two):
    """Information is no alarm; a warning on a healthy run or a twin is; a halt is counted apart."""
    alarm, info = said("loss_spike"), said("loss_spike", severity=0)
    figures = tally.count([outcome("well", heard=[alarm, alarm]), outcome("well", heard=[info]), outcome("sick", "twin", heard=[alarm], halts=[alarm])])
    assert (figures.false_healthy.hits, figures.false_healthy.of, figures.false_twins.hits, figures.false_halts.hits) == (1, 2, 1, 1)
    assert len(figures.alarms) == 2


def test_what_proves_nothing_is_left_out_loudly(two):
    """A crashed run, and one that does not do what it claims, enter no figure and stand in the report."""
    broken, unproven = outcome("well", error="ValueError: no"), outcome("well", proven=False, heard=[said("loss_spike")])
    assert tally.count([broken, unproven]).false_healthy.of == 0
    text = tables.page([broken, unproven], "")
    assert "did not do what they claim" in text and "ValueError: no" in text


def test_repairs_are_counted(two):
    """A repaired run counts by its bar alone and is no healthy run."""
    figures = tally.count([outcome("sick", "repaired"), outcome("sick", "repaired", proven=False)])
    assert (figures.repairs.hits, figures.repairs.of, figures.false_twins.of, figures.recall.of) == (1, 2, 0, 0)


def test_a_remedy_is_followed():
    """The advised finding is the first accepted one with a remedy, before any other alarm."""
    program = registry.Program("x", lambda job: 0.0, False, 0.5, frozenset({"diverging_loss"}), "rate")
    remedy, cause = (Remedy("", {"lr": 0.1}),), (Cause("learning rate too high", 1.0, ""),)
    first = Finding("loss_spike", Severity.WARNING, 3, "loss", "", causes=cause, remedies=remedy)
    later = Finding("diverging_loss", Severity.WARNING, 9, "loss", "", causes=cause, remedies=remedy)
    heard = [registry.Heard(3, first), registry.Heard(9, later)]
    assert measure._advised(program, heard) is later
    assert measure._advised(program, heard[:1]) is first
    assert measure._advised(program, []) is None


def test_the_command_line_chooses():
    """Names with wildcards, families, kinds and halves narrow the choice; each run has a name, a seed and a variant."""
    chosen = diagnosis.choose(diagnosis.arguments(["--only", "gpt_*", "--only", "gan", "--kind", "healthy"]))
    assert {"gpt_characters", "wgan_gradient_penalty"} <= {p.name for p in chosen} and all(p.healthy for p in chosen)
    halves = [len(diagnosis.choose(diagnosis.arguments(["--half", half]))) for half in ("tune", "held")]
    apart = diagnosis.choose(diagnosis.arguments(["--only", registry.APART]))
    assert apart and all(registry.APART in p.families for p in apart) and sum(halves) == len(PROGRAMS) - len(apart)
    ill = registry.Program("x", lambda job: 0.0, False, 0.5, frozenset({"loss_spike"}), "x", repairable=True)
    assert [t[2] for t in diagnosis.tasks([ill], 1, twins=True, repair=True)] == ["itself", "twin", "repaired"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_subset():
    """Programs do what they claim; the guard halts no healthy run, alarms on none, and names most faults that it has rules for."""
    quick = [p for p in PROGRAMS.values() if p.quick]
    outcomes = [measure.measure(p.name, 0) for p in quick]
    assert not [(o.program, o.error or o.score) for o in outcomes if not tally.usable(o)]
    assert not [text for o in outcomes for text in o.broken]
    figures = tally.count(outcomes)
    assert figures.false_halts.hits == 0
    assert [f"{o.program}: {s.diagnosis}" for o, s in figures.alarms] == []
    ruled = [o for o in outcomes if PROGRAMS[o.program].expect & set(DIAGNOSES)]
    recall = tally.count(ruled).recall
    assert recall.hits >= 0.7 * recall.of, [o.program for o in tally.count(ruled).missed]


def test_the_quick_subset_holds_both_kinds():
    """A handful of each kind, so that it fits into a test."""
    for healthy in (True, False):
        assert 4 <= sum(p.quick and p.healthy == healthy for p in PROGRAMS.values()) <= 16
