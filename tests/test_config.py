"""Options from a file and from the environment: the same as keywords, checked, and told."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import logging
import os
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import lossguard
from lossguard import Guard, Severity
from lossguard.config import Kept, configured, sample, sources
from lossguard.device.spikes import Limit
from lossguard.recovery import Ladder
from lossguard.rules import RULES
from lossguard.rules.curves import LossSpike
from lossguard.rules.updates import UpdateRatioLow
from lossguard.sinks import findings, read

loads = sources.parser().loads
KNOWN = sources.options(Guard.__init__)
TELLABLE = [name for name, option in KNOWN.items() if option.kind]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No option from the environment of whoever runs the tests."""
    for name in [*os.environ]:
        if name.startswith("LOSSGUARD"):
            monkeypatch.delenv(name)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def train(guard, steps=6, ill=None):
    for i in range(steps):
        loss = guard.model(torch.ones(8, 4) * (i + 1) / 8).square().mean() * (float("nan") if i == ill else 1.0)
        loss.backward()
        guard.optimizers[0].step()
        guard.optimizers[0].zero_grad()
        guard.step(loss)


def file(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def keywords(text, code=None):
    """What Guard gets for a file and the keywords of the code."""
    return configured.merged(KNOWN, code or {}, sources.written(loads(text), KNOWN))


# ---- values

VALUES = {
    "every = 20": {"every": 20},
    "dense = 0": {"dense": 0},
    "halt = 'error'": {"halt": Severity.ERROR},
    "halt = 'none'": {"halt": None},
    "halt = 'loss_spike'": {"halt": {"loss_spike"}},
    "halt = ['nonfinite_loss', 'loss_spike']": {"halt": {"nonfinite_loss", "loss_spike"}},
    "skip = ['nonfinite_gradient']": {"skip": {"nonfinite_gradient"}},
    "skip = { exploding_gradient = { times = 100 } }": {"skip": {"exploding_gradient": Limit(times=100)}},
    "[skip.exploding_gradient]\nsigmas = 8.0": {"skip": {"exploding_gradient": Limit(sigmas=8.0)}},
    "skip_by = 'restore'": {"skip_by": "restore"},
    "mute = ['dead_relu']": {"mute": {"dead_relu"}},
    "record = 'runs/7'": {"record": "runs/7"},
    "record = 'none'": {"record": None},
    "keep_batch = true": {"keep_batch": True},
    "keep_batch = 1000": {"keep_batch": 1000},
    "exit_codes = { nonfinite_loss = 9 }": {"exit_codes": {"nonfinite_loss": 9}},
    "accumulate = 4": {"accumulate": 4},
    "loss_family = 'adversarial'": {"loss_family": "adversarial"},
    "lag = 0": {"lag": 0},
    "agree = false": {"agree": False},
    "stall = true": {"stall": True},
    "stall = 600": {"stall": 600},
    "compiled = true": {"compiled": True},
    "locate = 'none'": {"locate": None},
    "[rules.update_ratio_low]\nratio = 1e-8": {"rules": [UpdateRatioLow(ratio=1e-8)]},
    "[rules.loss_spike]\nsigmas = 10": {"rules": [LossSpike(sigmas=10)]},
    "[recover]": {"recover": Ladder()},
    "[recover]\nrollbacks = 1\nfactor = 0.1\ncures = ['loss_spike']\nplace = 'device'": {
        "recover": Ladder(rollbacks=1, factor=0.1, cures=["loss_spike"], place="device")
    },
}


@pytest.mark.parametrize("text", VALUES)
def test_a_file_says_what_keywords_say(text):
    """Every value arrives as the keyword that the code would have given, with its type."""
    got = keywords(text)
    assert got == VALUES[text]
    assert [type(v) for v in got.values()] == [type(v) if not isinstance(v, set) else frozenset for v in VALUES[text].values()]


def test_every_option_is_tried_or_cannot_be_told():
    """An argument of Guard is among the values above, or it is one that no text can hold; a new one has to be decided on."""
    tried = {name for value in VALUES.values() for name in value} | {"trackers"}
    assert tried == set(TELLABLE)
    assert set(KNOWN) - set(TELLABLE) == {"model", "optimizers", "scaler", "sinks", "phases"}


def test_every_field_of_a_rule_can_be_told():
    """The default of every field of every rule, written as TOML, is read back as that rule."""
    for name, cls in RULES.items():
        rule = cls()
        text = "\n".join(f"{field} = {sample.shown(getattr(rule, field))}" for field, _, _ in sample.explain.fields(cls))
        assert keywords(f"[rules.{name}]\n{text}") == {"rules": [rule]}


ENVIRONMENT = {
    ("every", "20"): 20, ("halt", "error"): Severity.ERROR, ("halt", "none"): None, ("halt", "nonfinite_loss, loss_spike"): {"nonfinite_loss", "loss_spike"},
    ("halt", "loss_spike"): {"loss_spike"}, ("skip", "nonfinite_gradient"): {"nonfinite_gradient"}, ("skip", "none"): set(), ("mute", "none"): set(),
    ("mute", "dead_relu,"): {"dead_relu"}, ("record", "runs/7"): "runs/7", ("record", "none"): None, ("stall", "1"): True, ("stall", "off"): False,
    ("stall", "600"): 600.0, ("agree", "No"): False, ("agree", "none"): None, ("keep_batch", "1000"): 1000, ("compiled", "TRUE"): True,
    ("loss_family", "adversarial"): "adversarial", ("recover", "none"): None, ("locate", "none"): None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), ENVIRONMENT)
def test_a_variable_says_what_a_keyword_says(name, text):
    """A plain value in the environment arrives as the keyword that the code would have given."""
    settings = sources.outside(KNOWN, {f"LOSSGUARD_{name.upper()}": text})
    assert configured.merged(KNOWN, {}, settings) == {name: ENVIRONMENT[name, text]}


def test_an_empty_variable_says_nothing(monkeypatch, parts):
    """A variable that is set to nothing is as one that is not set, and those of the rest of the house are left alone."""
    for name in ("LOSSGUARD", "LOSSGUARD_EVERY", "LOSSGUARD_CONFIG", "LOSSGUARD_MUTE"):
        monkeypatch.setenv(name, " ")
    monkeypatch.setenv("LOSSGUARD_TERMINATION_LOG", "pod")
    with Guard(*parts, every=7) as guard:
        assert guard.every == 7
        assert guard.configured == {}


# ---- errors

WRONG = {
    "evry = 20": r"unknown key 'evry' in .*run.toml; did you mean 'every'\? known: accumulate, agree",
    "[lossguard]\nmutes = []": r"unknown key 'mutes' in lossguard in .*run.toml; did you mean 'mute'",
    "[tool.lossguard]\nhatl = 1": r"unknown key 'hatl' in tool.lossguard in .*run.toml; did you mean 'halt'",
    "every = 20\n[lossguard.rules.loss_spike]\nsigmas = 9.0": r"every in .*run.toml is not in the table \[lossguard\] and would not be heeded; move it",
    "every = 'often'": r"every in .*run.toml: expected an integer, got \"often\"; leave it out for 10",
    "every = true": r"every in .*run.toml: expected an integer, got true",
    "every = 20.5": r"every in .*run.toml: expected an integer, got 20.5",
    "every = 0": r"every must be an integer of at least 1, got 0 \(set by every in .*run.toml\)",
    "skip_by = 'magic'": r"unknown skip_by 'magic'.*\(set by skip_by in .*run.toml\)",
    "keep_batch = true": r"keep_batch= needs a folder.*\(set by keep_batch in",
    "halt = 3": r"halt in .*: expected a severity \(info, warning, error, halt\), a list of diagnoses or 'none', got 3; leave it out for \"halt\"",
    "halt = 'eror'": r"unknown severity 'eror'; did you mean 'error'\? known: info, warning, error, halt",
    "halt = ['loss_spke']": r"unknown diagnosis 'loss_spke' in halt in .*run.toml; did you mean 'loss_spike'",
    "mute = [1]": r"mute in .*: expected a list of diagnoses, got \[1\]; leave it out for \[\]",
    "skip = ['loss_spike']": r"in skip=.*known: exploding_gradient, nonfinite_gradient.*\(set by skip in .*run.toml\)",
    "[skip.exploding_gradient]\ntime = 3": r"unknown field 'time' in skip.exploding_gradient in .*; did you mean 'times'\? known: horizon, patience",
    "[skip.exploding_gradient]\ntimes = 0.5": r"skip.exploding_gradient in .*: Limit\(times=0.5\) would leave out usual updates",
    "[skip.nonfinite_gradient]\ntimes = 3": r"skip= gives nonfinite_gradient a setting.*only exploding_gradient has any",
    "[skip]\nexploding_gradient = true": r"skip.exploding_gradient in .*: expected a table of fields of Limit or 'none', got true",
    "record = 7": r"record in .*: expected a path or 'none', got 7",
    "record = 2026-01-01": r"record in .*: expected a path or 'none', got datetime.date",
    "exit_codes = 9": r"exit_codes in .*: expected a table from a name to an integer or 'none', got 9",
    "exit_codes = { nonfinite_loss = 'x' }": r"exit_codes.nonfinite_loss in .*: expected an integer, got \"x\"",
    "exit_codes = { nonfinite_los = 9 }": r"unknown diagnosis 'nonfinite_los' in exit_codes=; did you mean 'nonfinite_loss'.*set by exit_codes in",
    "exit_codes = { nonfinite_loss = 0 }": r"exit_codes\['nonfinite_loss'\] must be.*\(set by exit_codes in .*run.toml\)",
    "rules = ['loss_spike']": r"rules in .*: expected a table of rules by diagnosis, each a table of its fields, got \[\"loss_spike\"\]",
    "[rules.los_spike]\nsigmas = 3": r"unknown diagnosis 'los_spike' in rules in .*; did you mean 'loss_spike'",
    "[rules.update_ratio_low]\nration = 1e-8": r"unknown field 'ration' in rules.update_ratio_low in .*; did you mean 'ratio'\? known: drained",
    "[rules.update_ratio_low]\nratio = 'low'": r"rules.update_ratio_low.ratio in .*: expected a number, got \"low\"; leave it out for 1e-06",
    "[rules.update_ratio_low]\nratio = nan": r"rules.update_ratio_low.ratio in .*: NaN is no limit",
    "[rules]\nupdate_ratio_low = 1e-8": r"rules.update_ratio_low in .*: expected a table of fields of UpdateRatioLow, got 1e-08",
    "[rules.unchanged_weights]\nfloors = 1.0": r"floors in .*: expected a list, each of it a number, got 1.0; leave it out for \[",
    "recover = true": r"recover in .*: expected a table of fields of Ladder or 'none', got true; leave it out for \"none\"",
    "[recover]\nfactor = 2.0": r"recover in .*: Ladder\(factor=\) must be above 0 and at most 1, got 2.0",
    "[recover]\nroll_backs = 2": r"unknown field 'roll_backs' in recover in .*; did you mean 'rollbacks'",
    "[recover]\nalso = []": r"recover.also in .*: this cannot be told in a file; give it in code: Ladder\(also=...\)",
    "[trackers]\nxsv = 'a'": r"unknown tracker 'xsv' in trackers in .*; did you mean 'csv'\? known: csv, mlflow, tensorboard, wandb",
    "[trackers]\ncsv = 3": r"trackers.csv in .*: expected its path or a table of its arguments, got 3",
    "[trackers.csv]\nfolder = 'x'": r"unknown argument 'folder' in trackers.csv in .*known: path",
    "[trackers.tensorboard]\nlayers = true": r"trackers.tensorboard in .*: folder is missing; tell where it goes, as in tensorboard.folder = \"run\"",
    "[trackers.tensorboard]\nfolder = 'x'\nlayers = 1": r"trackers.tensorboard.layers in .*: expected true or false, got 1",
    "model = 'resnet'": r"model cannot be told in .*run.toml: no text can hold it; give it in code: Guard\(..., model=...\)",
    "scaler = true": r"scaler cannot be told in .*run.toml: no text can hold it; give it in code",
    "sinks = []": r"sinks cannot be told in",
    "phases = 'explicit'": r"phases cannot be told in .*: it says how the code calls the guard; give it in code",
    "locate = 'lambda'": r"locate in .*: expected 'none', got \"lambda\"; leave it out for \"none\"",
    "every =": r"run.toml is no TOML file: Invalid value.*python -m lossguard config prints one",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_an_error_that_says_what_to_do(tmp_path, parts, text):
    """What was given, where it stands, what was expected: for every kind of mistake, before anything is attached."""
    with pytest.raises(ValueError, match=WRONG[text]):
        Guard.from_config(*parts, file(tmp_path, text))
    assert not parts[1]._optimizer_step_pre_hooks


def test_a_file_that_is_not_there(parts, tmp_path):
    """A missing file is named."""
    with pytest.raises(ValueError, match=r"no options can be read from .*no.toml \(No such file or directory\); give a TOML file"):
        Guard.from_config(*parts, tmp_path / "no.toml")


def test_python_without_a_parser(parts, tmp_path, monkeypatch):
    """Where Python has no TOML parser the error says which package to install."""
    monkeypatch.setattr(sources.sys, "version_info", (3, 10, 1))
    monkeypatch.setitem(sources.sys.modules, "tomli", None)
    with pytest.raises(ImportError, match=r"Python 3.10 needs tomli to read a TOML file; pip install tomli"):
        Guard.from_config(*parts, file(tmp_path, "every = 20"))


WRONG_VARIABLES = {
    ("EVRY", "20"): r"unknown variable 'LOSSGUARD_EVRY' in the environment; did you mean 'LOSSGUARD_EVERY'\? known: LOSSGUARD, LOSSGUARD_ACCUMULATE",
    ("CONFG", "a"): r"unknown variable 'LOSSGUARD_CONFG' in the environment; did you mean 'LOSSGUARD_CONFIG'",
    ("every", "20"): r"unknown variable 'LOSSGUARD_every' in the environment; did you mean 'LOSSGUARD_EVERY'",
    ("EVERY", "often"): r"LOSSGUARD_EVERY: expected an integer, got \"often\"; unset it for what the code says",
    ("EVERY", "0"): r"every must be an integer of at least 1, got 0 \(set by LOSSGUARD_EVERY\)",
    ("HALT", "loss_spke"): r"unknown diagnosis 'loss_spke' in LOSSGUARD_HALT; did you mean 'loss_spike'",
    ("HALT", "eror"): r"LOSSGUARD_HALT: unknown severity 'eror'; did you mean 'error'",
    ("AGREE", "maybe"): r"LOSSGUARD_AGREE: expected true or false or 'none', got \"maybe\"",
    ("RULES", "loss_spike"): r"LOSSGUARD_RULES: a table can be told in a file only: name it in LOSSGUARD_CONFIG, and write \[lossguard.rules\] there",
    ("RECOVER", "on"): r"LOSSGUARD_RECOVER: expected a table.*got \"on\"; a table can be told in a file only: .*\[lossguard.recover\]",
    ("TRACKERS", "run.csv"): r"LOSSGUARD_TRACKERS: a table can be told in a file only",
    ("SCALER", "on"): r"LOSSGUARD_SCALER cannot be told in the environment: no text can hold it",
    ("PHASES", "hooks"): r"LOSSGUARD_PHASES cannot be told in the environment: it says how the code calls the guard",
    ("CONFIG", "nowhere.toml"): r"no options can be read from nowhere.toml",
}


@pytest.mark.parametrize(("name", "text"), WRONG_VARIABLES)
def test_a_wrong_variable_is_an_error_that_says_what_to_do(monkeypatch, parts, name, text):
    """A variable of ours that is not known, or says what it cannot mean, ends the job before it trains on other options than were meant."""
    monkeypatch.setenv(f"LOSSGUARD_{name}", text)
    with pytest.raises(ValueError, match=WRONG_VARIABLES[name, text]):
        Guard(*parts)
    assert not parts[1]._optimizer_step_pre_hooks


def test_every_variable_of_the_house_is_known():
    """Every variable that is named somewhere in the package is one that is read."""
    known = {sources.FILE, *sources.HOUSE, *(f"LOSSGUARD_{name.upper()}" for name in TELLABLE)}
    named = {word for path in Path(lossguard.__file__).parent.rglob("*.py") for word in re.findall(r"\bLOSSGUARD_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert named <= known, named - known
    assert set(sources.HOUSE) <= named - {sources.FILE}


# ---- precedence

LAYERS = ("code", "file", "variable")


@pytest.mark.parametrize("said", [c for n in range(4) for c in itertools.combinations(LAYERS, n)])
def test_the_environment_goes_before_its_file_and_this_before_the_code(monkeypatch, tmp_path, parts, said):
    """Of a variable, the file that LOSSGUARD_CONFIG names, and a keyword in the code, the first that says something holds."""
    number = {"code": 11, "file": 12, "variable": 13}
    if "file" in said:
        monkeypatch.setenv("LOSSGUARD_CONFIG", str(file(tmp_path, "[lossguard]\nevery = 12")))
    if "variable" in said:
        monkeypatch.setenv("LOSSGUARD_EVERY", "13")
    with Guard(*parts, **({"every": 11} if "code" in said else {})) as guard:
        assert guard.every == (number[said[-1]] if said else 10)
        assert set(guard.configured) == ({"every"} if set(said) - {"code"} else set())


@pytest.mark.parametrize("variable", [False, True])
def test_a_file_named_in_code_is_part_of_the_code(monkeypatch, tmp_path, parts, variable):
    """A keyword beside ``from_config`` goes before its file; the environment goes before both."""
    if variable:
        monkeypatch.setenv("LOSSGUARD_EVERY", "13")
    path = file(tmp_path, "every = 12\ndense = 3\nmute = ['dead_relu']")
    with Guard.from_config(*parts, path, every=11) as guard:
        assert (guard.every, guard.dense, guard._muted) == (13 if variable else 11, 3, {"dead_relu"})
        assert guard.configured["dense"] == f"3 (dense in {path})"
        assert guard.configured.get("every") == ("13 (LOSSGUARD_EVERY)" if variable else None)


def test_a_table_is_merged_into_what_the_code_says():
    """Fields that a file does not name stay those of the code: what only code can hold is not lost to an operator's one number."""
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    own = LossSpike(sigmas=11.0)
    code = {"recover": Ladder(also=(scheduler,), cuts=5), "rules": [own], "exit_codes": {"loss_spike": 7}, "skip": {"nonfinite_gradient"}}
    got = keywords(
        """
        exit_codes = { nonfinite_loss = 9 }
        [recover]
        rollbacks = 1
        [rules.loss_spike]
        patience = 4
        [rules.update_ratio_low]
        ratio = 1e-8
        [skip.exploding_gradient]
        times = 64.0
        """,
        code,
    )
    assert got["recover"] == Ladder(also=(scheduler,), cuts=5, rollbacks=1)
    assert got["rules"] == [LossSpike(sigmas=11.0, patience=4), UpdateRatioLow(ratio=1e-8)]
    assert got["exit_codes"] == {"loss_spike": 7, "nonfinite_loss": 9}
    assert got["skip"] == {"nonfinite_gradient": None, "exploding_gradient": Limit(times=64.0)}
    assert (own, code["exit_codes"]) == (LossSpike(sigmas=11.0), {"loss_spike": 7})  # nothing of the code's own is changed


def test_a_list_takes_the_place_of_what_the_code_says():
    """A list replaces a list, and a table; names that an integration needs stay."""
    assert keywords("mute = ['dead_relu']", {"mute": {"loss_spike"}}) == {"mute": {"dead_relu"}}
    assert keywords("skip = []", {"skip": {"exploding_gradient": Limit(times=100)}}) == {"skip": set()}
    assert keywords("mute = ['dead_relu']", {"mute": Kept({"unchanged_weights"})}) == {"mute": {"dead_relu", "unchanged_weights"}}


def test_a_rule_of_the_codes_own_can_be_tuned(parts):
    """A rule that only the code knows is found by its diagnosis."""

    @dataclasses.dataclass(frozen=True)
    class LossAboveTen:
        """The loss is above ten."""

        diagnosis: typing.ClassVar[str] = "loss_above_ten"
        reads: typing.ClassVar[tuple[str, ...]] = ("loss",)
        limit: float = 10.0
        grace: int = 0
        patience: int = 1

        def check(self, history):
            return None

    assert keywords("[rules.loss_above_ten]\nlimit = 20", {"rules": [LossAboveTen()]}) == {"rules": [LossAboveTen(limit=20)]}
    with pytest.raises(ValueError, match="unknown diagnosis 'loss_above_ten' in rules"):
        keywords("[rules.loss_above_ten]\nlimit = 20")


def test_a_file_may_have_the_options_of_others_too():
    """Where a file has a table of ours, the rest is not ours; without one, all of it is."""
    ours = "[lossguard]\nevery = 20\n[ruff]\nline = 3"
    assert keywords(ours) == keywords(ours.replace("[lossguard]", "[tool.lossguard]")) == {"every": 20}
    with pytest.raises(ValueError, match="unknown key 'ruff'"):
        keywords("every = 20\n[ruff]\nline = 3")


# ---- what is told


def test_what_is_set_from_outside_is_told_once(monkeypatch, tmp_path, parts, caplog):
    """An override is one line in the log, one in the record and stands among the run's facts, with what the code had said."""
    monkeypatch.setenv("LOSSGUARD_EVERY", "3")
    monkeypatch.setenv("LOSSGUARD_CONFIG", str(path := file(tmp_path, "every = 4\nhalt = 'none'\nrules = { loss_spike = { sigmas = 9.0 } }")))
    with caplog.at_level(logging.INFO, "lossguard"), Guard(*parts, every=5, record=tmp_path / "run") as guard:
        train(guard)
    lines = [line for line in caplog.messages if " by " in line]
    assert lines == [
        "lossguard: every = 3 by LOSSGUARD_EVERY, in the place of 5",
        f'lossguard: halt = "none" by halt in {path}, in the place of "halt"',
        f"lossguard: rules = {{ loss_spike = {{ sigmas = 9.0 }} }} by rules in {path}",
    ]
    record = list(read(tmp_path / "run"))
    assert [f"lossguard: {line['what']}" for line in record if line["kind"] == "event"] == lines
    (summary,) = (line for line in record if line["kind"] == "summary")
    assert summary["facts"]["configured"] == guard.configured
    assert guard.configured["every"] == "3 (LOSSGUARD_EVERY)"
    assert next(rule for rule in guard._judge.rules if rule.diagnosis == "loss_spike").sigmas == 9.0


def test_without_settings_nothing_is_told(parts, caplog, tmp_path):
    """A guard that is set up in code only says nothing of it."""
    with caplog.at_level(logging.INFO, "lossguard"), Guard(*parts, every=5, record=tmp_path) as guard:
        train(guard)
    assert (caplog.messages, guard.configured) == ([], {})


def test_one_variable_speaks_to_all_guards(monkeypatch, tmp_path, parts):
    """Two networks that train together under one LOSSGUARD_RECORD have a record each; a guard that comes after another continues it."""
    monkeypatch.setenv("LOSSGUARD_RECORD", str(tmp_path / "run"))
    other = nn.Linear(4, 2)
    with Guard(model=parts[0], optimizers=parts[1]) as one, Guard(other, torch.optim.SGD(other.parameters(), lr=0.01), halt=None) as two:
        train(one)
        train(two, ill=3)
    assert two.configured["record"] == f'"{tmp_path}/run/guard2" (LOSSGUARD_RECORD)'
    assert [f.diagnosis for f in findings(tmp_path / "run")] == []
    assert [f.diagnosis for f in findings(tmp_path / "run" / "guard2")] == ["nonfinite_gradient"]
    with Guard(*parts) as third:
        assert third._record.folder == tmp_path / "run"
        with pytest.warns(UserWarning, match="watched by another Guard"), Guard(*parts) as fourth:
            assert fourth._record.folder == tmp_path / "run"


def test_trackers_of_a_file_join_those_of_the_code(tmp_path, parts, monkeypatch):
    """A file adds trackers, with their arguments; on a cluster only the first rank writes them."""
    heard = []
    options = {"trackers": {"csv": str(tmp_path / "run.csv"), "tensorboard": {"folder": str(tmp_path / "board"), "layers": True}}}
    if importlib.util.find_spec("tensorboard") is None:
        options["trackers"].pop("tensorboard")
    monkeypatch.setenv("LOSSGUARD_CONFIG", str(file(tmp_path, f"trackers = {sample.shown(options['trackers'])}")))
    with Guard(*parts, trackers=lambda step, numbers: heard.append(step)) as guard:
        train(guard)
    assert heard == [0, 1, 2, 3, 4, 5]
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 7
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOSSGUARD_CONFIG")
    (tmp_path / "run.csv").unlink()
    with Guard.from_config(*parts, {"trackers": {"csv": str(tmp_path / "run.csv")}}) as guard:
        train(guard)
    assert not (tmp_path / "run.csv").exists()


# ---- the constructor stays what it was


def test_the_signature_stays():
    """Tools, trainers and help() see Guard's own arguments, defaults and words."""
    plain = inspect.signature(inspect.unwrap(Guard.__init__))
    assert list(inspect.signature(Guard).parameters.values()) == list(plain.parameters.values())[1:]
    assert Guard.__init__.__name__ == "__init__"
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        Guard(nn.Linear(1, 1), None, evry=3)


# ---- the file to start from


def test_the_printed_file_is_that_of_the_defaults(parts, tmp_path):
    """As it is printed the file says nothing; with every '#' taken it is valid and says the defaults, and every option is in it."""
    page = sample.page(Guard)
    assert loads(page) == {"lossguard": {}}
    text = re.sub(r"^# (?=[a-z_]+ = |\[lossguard)", "", page, flags=re.MULTILINE)
    held = re.sub(r"\[lossguard.skip.*?(?=\n\n)", "", text, flags=re.DOTALL)
    table = loads(held)["lossguard"]
    assert set(table) | {"locate"} == set(TELLABLE)
    assert set(table.pop("trackers")) <= {"csv", "tensorboard"}
    got = configured.merged(KNOWN, {}, sources.written({"lossguard": table}, KNOWN))
    assert (got.pop("rules"), got.pop("recover"), got.pop("exit_codes")) == ([UpdateRatioLow()], Ladder(), {"nonfinite_loss": 9})
    for name, value in got.items():
        assert value == (frozenset() if KNOWN[name].default == () else KNOWN[name].default), name
    skipping = loads(re.search(r"\[lossguard.skip.*?(?=\n\n)", text, re.DOTALL).group())
    assert configured.merged(KNOWN, {}, sources.written(skipping, KNOWN)) == {"skip": {"exploding_gradient": Limit()}}


def test_every_option_has_a_meaning():
    """Each argument of Guard is explained in its docstring, so that the printed file can say what it is."""
    told = sample.meanings(Guard)
    assert set(told) == set(KNOWN)
    assert all(len(words) > 10 for words in told.values()), told


@pytest.mark.parametrize("name", [*RULES, "recover", "skip"])
def test_the_printed_table_is_that_of_the_defaults(name):
    """With every '#' taken a table is read back as the default rule, ladder or limit."""
    default = {"rules": [RULES[name]()]} if name in RULES else {"recover": Ladder()}
    default = {"skip": {"exploding_gradient": Limit()}} if name == "skip" else default
    text = re.sub(r"^# (?=[a-z_]+ = )", "", sample.table(Guard, name), flags=re.MULTILINE)
    assert keywords(text) == default


def test_the_page_of_an_unknown_rule():
    """A misspelt diagnosis is answered with the nearest."""
    with pytest.raises(ValueError, match="unknown table 'dead_rlu' in the options; did you mean 'dead_relu'"):
        sample.table(Guard, "dead_rlu")
