"""What the gallery puts in where a user would follow a finding's first remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gallery import registry, repair

from lossguard import Finding, Remedy, Severity


def advice(*changes):
    return Finding("loss_spike", Severity.WARNING, 3, "loss", "", remedies=tuple(Remedy("", c) for c in changes))


@pytest.mark.parametrize("change", [{"look_at": 20}, {"batch_of_step": 7}, {"parameter": "0.weight"}, {"rewind_before": 9}])
def test_a_look_changes_nothing(change):
    """What a person must look at by eye changes no program."""
    assert repair.overrides(advice(change)) == {}


def test_only_the_first_remedy_is_followed():
    """The second remedy is not put in, and no remedy means no change."""
    assert repair.overrides(advice({"lr": 0.1}, {"max_norm": 1.0})) == {"lr": 0.1}
    assert repair.overrides(advice()) == {}


def test_factors_act_on_the_ill_value():
    """A factor multiplies what was planted, by the job or here."""
    assert repair.overrides(advice({"lr_factor": 0.1}), {"lr": 10.0}) == {"lr": 1.0}
    job = registry.Job(overrides=repair.overrides(advice({"head_scale": 0.1})))
    assert job.planted("head_scale", ill=1000.0, healthy=1.0) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"zero_grad_every": 1}, "zero_grad", True),
        ({"add": ["head.weight"]}, "optimizer_parameters", True),
        ({"add": "residual"}, "add", "residual"),
        ({"add": "normalisation"}, "add", "normalization"),
        ({"activation": "LeakyReLU", "slope": 0.01}, "activation", "leaky_relu"),
        ({"batch": 120}, "drop_batch", 120),
        ({"weight_decay": 0.01}, "weight_decay", 0.01),
    ],
)
def test_words_of_remedies_are_words_of_programs(change, key, value):
    """Each change arrives under the key that programs ask for, and nothing else does."""
    assert repair.overrides(advice(change)) == {key: value}


def test_only_what_is_planted_stays():
    """Where the planted keys are known, the others are left out."""
    assert repair.overrides(advice({"lr": 0.1, "max_norm": 1.0}), {"max_norm": None}) == {"max_norm": 1.0}
