"""The pages: every rule says what it means, how it is measured, why it happens, what to do and when it is a false alarm."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
from test_rules import ILL, LONG, run

from lossguard import explain
from lossguard.cli import main
from lossguard.findings import CHANGES, DIAGNOSES
from lossguard.rules import RULES

ROOT = Path(__file__).parent.parent
TITLES = ("What it means", "How it is measured", "Limits", "Why it happens", "What to do", "When it is a false alarm", "Silence or tune")


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_every_section(name):
    """The first sentence names its sources; law, causes, cures with a number and false alarms are said in more than a few words."""
    text = explain.sections(RULES[name])
    assert text[""].startswith(f"{name}: ")
    assert "survey" in text[""]
    assert len(text["Law"].split()) >= 10
    for section in explain.SECTIONS:
        assert len(text[section].split()) >= 8, section
        assert text[section].endswith("."), section
    assert ";" in text["Why"] or "," in text["Why"]


def test_somewhere_what_to_do_has_a_number():
    """Advice names numbers to try, in nearly every page."""
    without = [name for name in RULES if not any(c.isdigit() for c in explain.sections(RULES[name])["Do"])]
    assert set(without) <= {"missing_zero_grad", "unchanged_weights", "frozen_weights_changed"}  # nothing to count there


@pytest.mark.parametrize("name", sorted(DIAGNOSES))
def test_every_diagnosis_has_a_whole_page(name, capsys):
    """A page has its chapters in order, a meaning for every signal that is read, and a source for every limit."""
    assert main(["explain", name]) == 0
    page = capsys.readouterr().out
    places = [page.find(f"\n{title}") for title in TITLES]
    assert places == sorted(places)
    assert min(places) > 0
    for cls in explain.finders(name):
        assert all(explain.measured(cls).values()), explain.measured(cls)
        assert all(why for _, _, why in explain.fields(cls))


def test_families_hold_every_diagnosis_once():
    """The list is grouped, and nothing is left out or said twice."""
    names = [name for members in explain.families().values() for name in members]
    assert sorted(names) == sorted(DIAGNOSES)
    assert "Other" not in explain.families()


def test_other_registries_are_consulted(monkeypatch):
    """A page tells of a check beside the rule, and of a diagnosis that only a check finds."""

    @dataclasses.dataclass(frozen=True)
    class Check:
        """dead_relu: a check of it (survey).

        A law.

        Why: one; two.
        Do: three.
        False alarm: four.
        """

        diagnosis: ClassVar[str] = "dead_relu"
        reads: ClassVar[tuple[str, ...]] = ("loss",)
        limit: float = 0.25  # share; a source

    monkeypatch.setattr(explain, "registries", lambda: [RULES, {"dead_relu": Check, "untested": Check}])
    monkeypatch.setitem(DIAGNOSES, "untested", DIAGNOSES["dead_relu"])
    assert "What it means (before the first step)" in explain.page("dead_relu")
    assert "limit = 0.25    share; a source" in explain.page("untested")
    assert "What it means\n" in explain.page("untested")


def test_the_written_pages_are_up_to_date(capsys):
    """docs/diagnoses.md is what the command writes."""
    assert main(["explain", "--markdown"]) == 0
    written = (ROOT / "docs" / "diagnoses.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written, "run: python -m lossguard explain --markdown > docs/diagnoses.md"


@pytest.mark.parametrize("name", sorted(ILL))
def test_remedies_speak_one_vocabulary(name):
    """What a remedy changes is said to programs too, in known keys, with numbers and short words."""
    heard = run([RULES[name]()], ILL[name][0], steps=LONG.get(name, 200))
    assert heard
    for _, finding in heard:
        for remedy in finding.remedies:
            assert remedy.change, remedy
            assert set(remedy.change) <= set(CHANGES), remedy
            assert all(isinstance(value, (int, float, str)) for value in remedy.change.values()), remedy
