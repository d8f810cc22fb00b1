"""What a preflight says: nothing of healthy tasks of many kinds, the right diagnosis and first cause of ill ones."""

from __future__ import annotations

import dataclasses
import functools
import math

import preflight_tasks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Preflight, Severity, explain, preflight
from lossguard.findings import DIAGNOSES
from lossguard.preflight import CHECKS, Check
from lossguard.preflight.balance import ClassImbalance
from lossguard.preflight.chance import chance, floor
from lossguard.preflight.fit import CannotOverfitBatch
from lossguard.preflight.listen import LastOp, LossCall
from lossguard.preflight.rates import LearningRateRange
from lossguard.preflight.run import ORDER


@functools.cache
def flown_plainly(task):
    return flown(task, mute=())


def flown(task, **words):
    if not words:
        return flown_plainly(task)
    torch.manual_seed(0)
    model, batches, criterion, optimizers, keywords = task()
    return preflight(model, batches, criterion, optimizers, **keywords, **words)


def grave(result):
    return [f.diagnosis for f in result if f.severity > Severity.INFO]


def only(result, name):
    found = [f for f in result if f.diagnosis == name]
    assert found, str(result)
    return found[0]


@pytest.mark.parametrize("task", preflight_tasks.HEALTHY, ids=lambda t: t.__name__)
def test_a_healthy_task_is_cleared(task):
    """Healthy models, data and losses of every kind get no warning, and no check fails by itself."""
    result = flown(task)
    assert grave(result) == [], str(result)
    assert not [reason for reason in result.reasons.values() if "itself failed" in reason], str(result)
    assert list(result.answers) == [name for name in ORDER if name in CHECKS]


@pytest.mark.parametrize(("task", "name", "cause"), preflight_tasks.ILL, ids=lambda t: t.__name__ if callable(t) else None)
def test_an_ill_task_is_heard(task, name, cause):
    """Each fault has its diagnosis, its cause comes first, and the finding says where, by how much and what to do."""
    result = flown(task)
    finding = only(result, name)
    assert finding.causes[0].name == cause, str(result)
    assert finding.step == -1 and finding.where and finding.remedies and 1 <= len(finding.causes) <= 3
    assert all(c.because and 0 < c.confidence <= 1 for c in finding.causes)
    assert result.answers[name] == "fail" and finding.message in result.reasons[name]


@pytest.mark.parametrize(("task", "name", "cause"), preflight_tasks.ILL, ids=lambda t: t.__name__ if callable(t) else None)
def test_the_first_finding_is_the_root(task, name, cause):
    """What follows from a fault stands behind it, and its first cause is the fault's own."""
    result = flown(task)
    assert result[0].causes[0].name == cause, str(result)


@pytest.mark.parametrize("task", [task for task, *_ in preflight_tasks.ILL], ids=lambda t: t.__name__)
def test_one_fault_is_one_event(task):
    """Each ill task has one fault, and one event of warning or above."""
    result = flown(task)
    assert len([f for f in result if f.severity >= Severity.WARNING]) <= 1, str(result)


def test_every_check_is_complete():
    """A check is a frozen dataclass with a documented diagnosis, limits with a source, and an ill specimen."""
    specimens = {name for _, name, _ in preflight_tasks.ILL}
    for name, cls in CHECKS.items():
        assert isinstance(cls(), Check) and cls.diagnosis == name and name in DIAGNOSES and name in ORDER and name in specimens
        assert cls.__doc__.startswith(f"{name}: ")
        assert all(f"    {part}:" in cls.__doc__ for part in ("Why", "Do", "False alarm")), name
        for field, _, why in explain.fields(cls):
            assert why, f"{name}.{field}"
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().name = 1


def test_the_severities_are_the_catalogues():
    """Non-finite input halts, the learning rate's range is an info, the rest warns."""
    found = {name: DIAGNOSES[name][0] for name in CHECKS}
    assert found.pop("nonfinite_input") is Severity.HALT and found.pop("learning_rate_range") is Severity.INFO
    assert set(found.values()) == {Severity.WARNING}


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("words", [{}, {"label_smoothing": 0.2}, {"ignore_index": 1}, {"reduction": "sum"}])
def test_chance_of_cross_entropy_is_ln_c(classes, words):
    """Chance is ln(classes) for each label that counts, whatever the arguments."""
    target = torch.arange(20) % 2
    call = LossCall("cross_entropy", F.cross_entropy, {"input": torch.randn(20, classes), "target": target, **words}, LastOp(), torch.tensor(1.0))
    count = (20 if "ignore_index" not in words else 10) if words.get("reduction") == "sum" else 1
    assert chance(call) == pytest.approx(count * math.log(classes), rel=1e-5)


def test_chance_of_the_other_losses():
    """ln 2 for yes or no, the variance of the targets for squared error."""
    target = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    at = lambda family, function, x, y: chance(LossCall(family, function, {"input": x, "target": y}, LastOp(), torch.tensor(1.0)))  # noqa: E731
    assert at("bce_logits", F.binary_cross_entropy_with_logits, torch.randn(4, 1), target) == pytest.approx(math.log(2))
    assert at("bce", F.binary_cross_entropy, torch.rand(4, 1), target) == pytest.approx(math.log(2))
    y = torch.randn(100, 1) * 3 + 5
    assert at("mse", F.mse_loss, torch.randn(100, 1), y) == pytest.approx(float(y.var(unbiased=False)), rel=1e-5)
    assert at("nll", F.nll_loss, torch.randn(4, 7), torch.arange(4)) == pytest.approx(math.log(7))


def test_the_floor_of_a_loss():
    """Soft labels and smoothing have a least loss above zero, hard ones none."""
    target = torch.arange(8) % 4
    hard = LossCall("cross_entropy", F.cross_entropy, {"input": torch.randn(8, 4), "target": target}, LastOp())
    assert floor(hard) == 0.0
    hard.given["label_smoothing"] = 0.1
    q = torch.full((4,), 0.025)
    q[0] += 0.9
    assert floor(hard) == pytest.approx(float(-(q * q.log()).sum()), rel=1e-3)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(8, 3)


def plain(n=6, size=16):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=generator), torch.randint(3, (size,), generator=generator)) for _ in range(n)]


def test_a_printed_preflight_has_one_line_per_check():
    """The text has a head, one line for each check, and then the findings."""
    result = flown(preflight_tasks.pixels)
    lines = str(result).splitlines()
    assert "14 checks" in lines[0] and "1 finding" in lines[0]
    assert [line.replace("cannot tell", "cannot-tell").split()[1] for line in lines[1:15]] == list(result.answers)
    assert lines[15] == "lossguard: warning unnormalized_input before the first step"
    assert 'silence: preflight(..., mute={"unnormalized_input"})' in str(result)


def test_findings_of_a_preflight_go_to_json_and_back():
    """A finding made before the first step survives its dictionary."""
    for finding in flown(preflight_tasks.missing_value):
        assert type(finding).from_dict(finding.to_dict()) == finding


def test_limits_can_be_set_and_checks_left_out():
    """checks= replaces a check's limits, mute= leaves it out."""
    assert grave(flown(preflight_tasks.rare_class, checks=[ClassImbalance(ratio=1e4)])) == []
    assert "class_imbalance" not in flown(preflight_tasks.rare_class, mute={"class_imbalance"}).answers


def test_the_bad_samples_are_named():
    """NaN in one sample, Inf in another: batch and sample numbers are the loader's, and the count is of both."""
    finding = only(flown(preflight_tasks.missing_value), "nonfinite_input")
    assert finding.where.startswith("batch 2,") and finding.causes[0].because.startswith("2 of 1797")
    assert "sample 77 " in finding.remedies[0].text


def test_missing_values_that_the_model_copes_with_are_no_fault():
    """A batch with NaN whose loss is finite is not reported."""

    class Copes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x):
            return self.layer(torch.nan_to_num(x))

    batches = plain()
    batches[2][0][3, 3] = math.nan
    result = preflight(Copes(), batches, nn.CrossEntropyLoss())
    assert result.answers["nonfinite_input"] == "pass" and "finite" in result.reasons["nonfinite_input"]


def test_the_numbers_to_normalise_by_are_the_datas():
    """The remedy holds the mean and the standard deviation that were measured."""
    batches = [(x * 50 + 300, y) for x, y in plain(40)]
    finding = only(preflight(linear(), batches, nn.CrossEntropyLoss()), "unnormalized_input")
    evidence = {e.what: e.value for e in finding.evidence}
    assert evidence["mean"] == pytest.approx(300, rel=0.02) and evidence["standard deviation"] == pytest.approx(50, rel=0.1)
    assert finding.remedies[0].change == {"normalize_input": True} and "subtract" in finding.remedies[0].text


def test_a_normalisation_layer_first_clears_the_input():
    """Inputs of any scale are fine in front of a batch-norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert preflight(model, [(x * 50 + 300, y) for x, y in plain(20)], nn.CrossEntropyLoss()).answers["unnormalized_input"] == "pass"


def test_a_weighted_loss_answers_for_the_rare_class():
    """Class weights in the loss are the remedy, so the imbalance is no finding."""
    torch.manual_seed(0)
    model, batches, _, _, _ = preflight_tasks.rare_class()
    result = preflight(model, batches, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 100.0])))
    assert result.answers["class_imbalance"] == "pass"


def test_moderate_imbalance_is_an_info():
    """Forty to one is worth a line, not a warning."""
    x = torch.randn(2000, 8)
    y = (torch.arange(2000) % 41 == 0).long()
    torch.manual_seed(0)
    result = preflight(linear(), preflight_tasks.loader(x, y), nn.CrossEntropyLoss())
    assert only(result, "class_imbalance").severity is Severity.INFO


def test_log_softmax_before_cross_entropy_is_harmless():
    """Log-probabilities pass cross entropy unchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3), nn.LogSoftmax(1))
    assert preflight(model, plain(), nn.CrossEntropyLoss()).answers["wrong_output_activation"] == "pass"


def test_a_bounded_output_fits_targets_within_its_bounds():
    """A sigmoid before a regression on [0, 1], and a scaled tanh, are right."""
    torch.manual_seed(0)
    batches = [(x, x[:, :1].sigmoid()) for x, _ in plain()]
    assert preflight(nn.Sequential(nn.Linear(8, 1), nn.Sigmoid()), batches, nn.MSELoss()).answers["wrong_output_activation"] == "pass"

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x):
            return 10 * torch.tanh(self.layer(x))

    wide = [(x, 3 * x[:, :1]) for x, _ in plain()]
    assert preflight(Scaled(), wide, nn.MSELoss()).answers["wrong_output_activation"] == "pass"


def test_a_chosen_rate_within_the_range_is_no_finding():
    """The sweep says the range, and finds nothing where the rate lies in it."""
    result = flown(preflight_tasks.digits_mlp, checks=[LearningRateRange(steps=20)])
    assert result.answers["learning_rate_range"] == "pass" and " to " in result.reasons["learning_rate_range"]


def test_the_rate_to_try_works():
    """The rate that is advised for one far too high lowers the loss."""
    remedy = only(flown(preflight_tasks.too_fast), "learning_rate_range").remedies[0]
    torch.manual_seed(0)
    model, batches, criterion, _, _ = preflight_tasks.too_fast()
    optimizer = torch.optim.SGD(model.parameters(), lr=remedy.change["lr"])
    losses = []
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_an_optimizer_the_rest_is_still_answered():
    """Optimizers are optional: only the learning rate cannot be told."""
    result = preflight(linear(), plain(), nn.CrossEntropyLoss())
    assert result.answers["learning_rate_range"] == "cannot tell" and result.answers["unchanged_weights"] == "pass"


def test_time_that_is_over_is_said():
    """A check for which no time is left cannot tell, and says so."""
    result = preflight(linear(), plain(), nn.CrossEntropyLoss(), seconds=1e-9)
    assert set(result.answers.values()) == {"cannot tell"} and "time budget" in result.reasons["initial_loss_off"]
    assert isinstance(result, Preflight) and list(result) == []


def test_a_gray_zone_is_no_verdict():
    """A loss that fell, but not to the floor, is neither passed nor failed."""
    result = flown(preflight_tasks.blurred, checks=[CannotOverfitBatch(far=2.0)])
    assert result.answers["cannot_overfit_batch"] == "cannot tell"
