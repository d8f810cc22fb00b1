"""Laws of harm: what looks wild and does no harm is information; what does harm warns. Simulated histories, and small real runs."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import ALL, at, both, fact, loss, run, times
from torch import nn

from lossguard import Guard, Severity
from lossguard.rules.rule import RULES

RNG = np.random.default_rng(0)


def heard(name: str, edit: Any, **words: Any) -> list[Severity]:
    return [f.severity for _, f in run([RULES[name]()], edit, **words)]


def relearned(since: int, floor: float) -> Any:
    """Losses that fall from 2.3 to 0.05 in 60 steps, leap to 3 at a step, and fall once more, to a floor."""
    noise = np.random.default_rng(1).standard_normal(2000)

    def value(step: int, _: float) -> float:
        fresh = step - since if step >= since else step
        low, high = (floor, 3.0) if step >= since else (0.05, 2.3)
        return (low + (high - low) * math.exp(-fresh / 12)) * (1 + 0.05 * noise[step])

    return loss(value)


def test_another_task_that_is_learned_is_information() -> None:
    """A loss that leaps to a new level and is learned anew informs; one that stays where the run began warns, once."""
    assert heard("loss_spike", relearned(200, 0.05), steps=500) == [Severity.INFO]
    assert heard("loss_spike", relearned(200, 2.3), steps=500) == [Severity.WARNING]


def test_an_odd_batch_is_heard_at_once() -> None:
    """A spike after which the loss is as before is heard after three steps: a warning above half of the first losses, information below."""
    for size, severity in ((5.0, Severity.WARNING), (0.8, Severity.INFO)):
        calm = 0.05 * (1 + 0.05 * np.random.default_rng(2).standard_normal(400))
        found = run([RULES["loss_spike"]()], loss(lambda t, v, calm=calm, size=size: size if t == 150 else 2.3 if t < 5 else float(calm[t])), steps=220)
        assert [(step, f.severity) for step, f in found] == [(153, severity)]


def test_clipping_that_the_optimizer_undoes_is_information() -> None:
    """A clip that always binds warns under SGD; under Adam it informs, unless what is left nears Adam's epsilon."""
    clipped = at("clip_coefficient", 0, 0.01)
    assert heard("clipping_dominates", both(clipped, fact("adam_eps", None))) == [Severity.WARNING]
    assert heard("clipping_dominates", clipped) == [Severity.INFO]
    assert heard("clipping_dominates", both(at("clip_coefficient", 0, 1e-9), fact("adam_eps", 1e-8))) == [Severity.WARNING]


def test_large_steps_of_a_run_that_learns_are_information() -> None:
    """Updates of 20 % warn while nothing is learned, and inform while the loss is near its best and below half of its start; drastic ones always warn."""
    large, drastic = times("update_norm", ALL, 200.0), times("update_norm", ALL, 2000.0)
    learns, stands = loss(lambda t, v: 2.3 * math.exp(-t / 5) + 0.01), loss(lambda t, v: 2.3)
    assert heard("update_ratio_high", both(large, stands))[0] == Severity.WARNING
    assert set(heard("update_ratio_high", both(large, learns))) == {Severity.INFO}
    assert heard("update_ratio_high", both(drastic, learns))[-1] == Severity.WARNING


def test_gradients_that_grow_without_harm_are_information() -> None:
    """Gradients grow 30 times: information where the loss has come down, does not rise and updates have not grown, else a warning."""
    grown, low = times("grad_norm", ALL, 30.0, since=120), loss(lambda t, v: 0.5 if t > 40 else 2.3)
    assert set(heard("exploding_gradient", both(grown, low))) == {Severity.INFO}
    assert Severity.WARNING in heard("exploding_gradient", both(grown, low, times("update_norm", ALL, 30.0, since=120)))
    assert Severity.WARNING in heard("exploding_gradient", both(grown, loss(lambda t, v: 2.3)))


MAKES: list[tuple[dict[str, Any], str]] = [({"largest_dropout": 0.95}, "dropout too high"), ({"linear_chain": ("0", "2")}, "no nonlinearity")]


@pytest.mark.parametrize(("notes", "cause"), MAKES)
def test_what_a_network_is_made_of_speaks_where_the_loss_stands(notes: dict[str, Any], cause: str) -> None:
    """A plateau warns with the network's make as its cause; the same make is silent while the loss falls, and a plateau alone informs."""
    stands = loss(lambda t, v: 2.3 + 0.01 * math.sin(t))
    found = run([RULES["loss_plateau"]()], stands, steps=260, notes=notes)
    assert found[0][1].severity == Severity.WARNING and found[0][1].causes[0].name == cause
    assert run([RULES["loss_plateau"]()], steps=260, notes=notes) == []
    assert heard("loss_plateau", stands, steps=260) == [Severity.INFO]


def test_restless_losses_at_large_steps_warn() -> None:
    """A loss that swings by half at a height and no longer falls warns at updates of 5 %, and is silent at healthy ones."""
    noise = np.random.default_rng(3).uniform(0.3, 0.9, 600)
    restless = loss(lambda t, v: float(noise[t]) if t > 20 else 2.3)
    assert heard("oscillating_loss", both(restless, times("update_norm", ALL, 60.0)), steps=400)[0] == Severity.WARNING
    assert heard("oscillating_loss", restless, steps=400) == []


def test_a_warm_up_that_moves_nothing() -> None:
    """A learning rate that rises excuses updates of nothing for 200 steps, and no longer."""

    def rising(step: int, values: Any, facts: dict[str, Any]) -> None:
        facts["lr"] = 1e-12 * (step + 1)

    slow = both(times("update_norm", ALL, 1e-5), rising)
    assert run([RULES["update_ratio_low"]()], slow, steps=200) == []
    assert run([RULES["update_ratio_low"]()], slow, steps=260)


def train(model: nn.Module, criterion: Any, steps: int = 12, act: bool = False) -> Guard:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(model, optimizer, halt=None)
    for _ in range(steps):
        x = torch.randn(8, 4)
        if act:
            with torch.no_grad():
                model(x)
        optimizer.zero_grad()
        value = criterion(model(x))
        value.backward()
        optimizer.step()
        guard.step(value)
    guard.close()
    return guard


def test_moving_targets_and_the_losses_of_others_are_known() -> None:
    """A network that runs without gradients before its loss has moving targets, unless it classifies; so has a loss through another trainable network."""
    from lossguard.advice import informational

    torch.manual_seed(0)
    net, judge = nn.Linear(4, 4), nn.Linear(4, 1)
    distance = lambda out: F.mse_loss(out, torch.zeros(8, 4))  # noqa: E731
    assert informational(train(copy.deepcopy(net), distance, act=True)._history)
    assert not informational(train(copy.deepcopy(net), distance)._history)
    labels = torch.zeros(8, dtype=torch.long)
    assert not informational(train(copy.deepcopy(net), lambda out: F.cross_entropy(out, labels), act=True)._history)
    assert informational(train(copy.deepcopy(net), lambda out: F.softplus(-judge(out)).mean())._history)
    judge.requires_grad_(False)
    frozen = train(copy.deepcopy(net), lambda out: F.softplus(-judge(out)).mean())
    assert not informational(frozen._history)


def test_linear_layers_in_a_row_are_read_from_the_graph() -> None:
    """Two linear layers with nothing between are known; with an activation between them they are not."""
    torch.manual_seed(0)
    labels = torch.zeros(8, dtype=torch.long)
    plain, bent = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert train(plain, lambda out: F.cross_entropy(out, labels))._history.notes["linear_chain"] == ("0", "1")
    assert train(bent, lambda out: F.cross_entropy(out, labels))._history.notes["linear_chain"] == ("", "")
