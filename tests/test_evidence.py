"""What a run shows of its own fault: each law hears its fault, and is silent on what looks like it. Simulated and real runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_curves import play
from test_rules import ALL, EVALUATED, at, both, fact, loss, new_history, run, times, validation
from test_suspects import data, events, first, net, train
from torch import nn

from lossguard import Guard, Severity, readings
from lossguard.host.history import History
from lossguard.rules import RULES
from lossguard.rules.suspects import decay, forgets, outweighed

CHANCE = float(np.log(64))  # of the simulated head, which has 64 units
CLASSIFIER = {"head": "head"}


def alarms(heard):
    return [(f.diagnosis, f.causes[0].name) for _, f in heard if f.severity >= Severity.WARNING]


def one(diagnosis, edit, steps=400, **words):
    """The alarms of one rule on a simulated run."""
    return alarms(run([RULES[diagnosis]()], edit, steps=steps, **words))


# ---- what looks like a fault and is none


def test_swings_about_a_validation_that_still_falls_are_information():
    """A large learning rate on its way down: validation swings, and reaches one best after the other. Where it no longer does, it is a warning."""

    def swings(fall):
        return validation(lambda t, v: (2.0 * np.exp(-t / fall) + 0.02) * (1.0 if t // EVALUATED % 2 else 0.4))

    heard = run([RULES["oscillating_validation"]()], swings(60), steps=260)
    assert [f.severity for _, f in heard] == [Severity.INFO]
    assert len(one("oscillating_validation", swings(1e9), steps=260)) == 1


@pytest.mark.parametrize(("samples", "expected"), [(1.0, 0), (32.0, 1), (np.nan, 1)])
def test_a_batch_of_one_sample_scatters_more(samples, expected):
    """The last batch of an epoch may hold one sample: its loss is judged by the scatter of such a mean, as far as sizes are known."""
    leap = both(loss(lambda t, v: 6 * v, since=150, until=151), fact("samples", 32.0), fact("samples", samples, since=150, until=151))
    assert len(one("loss_spike", leap, steps=200)) == expected


def test_a_loss_among_many_that_are_nothing_is_held_against_the_others():
    """Half of the batches hold no event and owe exactly 0: what those with one owe is no spike, what is far above them is."""
    rng = np.random.default_rng(0)
    owed = np.where(rng.random(400) < 0.6, 0.0, 1.0 + 0.2 * rng.standard_normal(400))
    assert one("loss_spike", loss(lambda t, v: owed[t])) == []
    assert len(one("loss_spike", loss(lambda t, v: 30.0 if t == 300 else owed[t]))) == 1


def test_units_that_die_while_the_loss_falls_are_information():
    """A network that prunes itself as it learns is told of; where the loss no longer falls it is warned of."""
    dying = at("dead_fraction", 2, 0.3, since=30)
    dead = at("dead_fraction", 2, 0.6, since=300)
    learns = loss(lambda t, v: 2.0 - 0.004 * t)
    stands = loss(lambda t, v: 1.0 + 1.3 * np.exp(-t / 10) + 0.01 * np.sin(t))
    assert [f.severity for _, f in run([RULES["dead_relu"]()], both(dying, dead, learns), steps=400)] == [Severity.INFO]
    assert one("dead_relu", both(dying, dead, stands)) == [("dead_relu", "learning rate too high")]


def test_experts_that_nothing_is_routed_to_are_information_however_many():
    """Five of eight experts rest while their like run now and then: that is routing. Parts that never run in a model without routing are a warning."""
    torch.manual_seed(0)

    class Parts(nn.Module):
        def __init__(self, routes):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(8))
            self.head, self.routes, self.calls = nn.Linear(8, 3), routes, 0

        def forward(self, x):
            self.calls += 1
            return self.head(sum(self.experts[k](x) for k in self.routes[self.calls % len(self.routes)]))

    def told(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(32, 8), torch.randint(3, (32,))
        with Guard(model, optimizer, every=1) as guard:
            for _ in range(40):
                value = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                guard.step(value)
        return [f.severity for f in guard.findings if f.diagnosis == "unchanged_weights"]

    assert told(Parts([(1, 4, 6), (1, 4)])) == [Severity.INFO]
    assert told(Parts([(1, 4, 6)])) == [Severity.WARNING]


@pytest.mark.parametrize(("slope", "expected"), [(-0.01, 0), (0.01, 1), (0.0, 1)])
def test_gradients_that_grow_as_a_plateau_is_left_are_those_of_learning(slope, expected):
    """A loss that stood for hundreds of steps and comes down now has larger gradients; if it rises or stands they explode."""
    noise = np.random.default_rng(0).standard_normal(600)
    turns = loss(lambda t, v: 1.0 + 0.01 * noise[t] + slope * max(0, t - 300))
    larger = times("grad_norm", ALL, 200.0, since=300)
    assert len(one("exploding_gradient", both(turns, larger), steps=360)) == expected


@pytest.mark.parametrize("period", [1, 5, 24])
def test_a_loop_that_begins_anew_every_few_steps_does_not_bounce(period):
    """A meta-learner's loss leaps at each new task and falls within it: no learning rate does that, so nothing is warned of. Noise is."""
    noise = np.random.default_rng(0).standard_normal(600)
    leaps = loss(lambda t, v: 2.0 * np.exp((0.4 if period == 1 else 0.2) * noise[t] - 1.5 * (t % period) / period))
    fast = times("update_norm", ALL, 30.0)
    assert len(one("oscillating_loss", both(leaps, fast), steps=500)) == (period == 1)
    assert len(one("loss_plateau", both(leaps, fast), steps=500)) == (period == 1)


@pytest.mark.parametrize("kind", ["independent", "walk", "exponential"])
def test_noise_has_no_rhythm(kind):
    """Losses without a rhythm are found to have none, whatever their distribution, but for 1 in 100."""
    rng = np.random.default_rng(1)
    draws = [{"independent": rng.standard_normal, "exponential": rng.exponential}.get(kind, rng.standard_normal)(size=256) for _ in range(200)]
    made = [np.exp(0.1 * np.cumsum(x)) if kind == "walk" else np.exp(0.3 * x) if kind == "independent" else x for x in draws]
    assert sum(readings.rhythm(x) > 0 for x in made) <= 2


def heard_of(module):
    """What a guard says, above information, of 240 steps of a small classifier; whatever is frozen thaws at step 100."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    with Guard(module, optimizer, every=2) as guard:
        for step in range(240):
            if step == 100:
                module.requires_grad_(True)
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            value = F.cross_entropy(module(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            guard.step(value)
    return [(f.diagnosis, f.causes[0].name, f.step) for f in guard.findings if f.severity >= Severity.WARNING]


def test_parameters_that_thaw_and_are_in_no_optimizer_are_named():
    """The optimizer was built from what was trainable at first: what is unfrozen later never moves, and is named soon after."""
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    module[0].requires_grad_(False)
    [(diagnosis, cause, step)] = heard_of(module)
    assert (diagnosis, cause) == ("unchanged_weights", "not given to the optimizer") and 98 <= step <= 120
    assert heard_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))) == []


@pytest.mark.parametrize("keep", [list, tuple, lambda parts: dict(enumerate(parts))])
def test_modules_in_a_plain_list_are_named(keep):
    """torch registers no module of a plain container: the loss depends on it and nothing trains it. A teacher kept so on purpose has no part in the loss."""

    class Model(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.parts = keep([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.head, self.teacher = nn.Linear(8, 3), [nn.Linear(8, 3)]

        def forward(self, x):
            parts = self.parts.values() if isinstance(self.parts, dict) else self.parts
            for part in parts:
                x = torch.relu(part(x))
            with torch.no_grad():
                self.taught = self.teacher[0](x)
            return self.head(x)

    [(diagnosis, cause, step)] = heard_of(Model(keep))
    assert (diagnosis, cause, step) == ("unchanged_weights", "not given to the optimizer", 0)
    assert heard_of(Model(nn.ModuleList)) == []


def test_an_optimizer_that_never_steps_is_no_accumulation_for_ever():
    """Gradients that add up excuse missing steps for a while, and not for 256 of them."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    with Guard(model, torch.optim.SGD(model.parameters(), lr=0.1)) as guard:
        for step in range(300):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
            loss.backward()
            guard.step(loss)
            told = [f.causes[0].name for f in guard.findings if f.diagnosis == "unchanged_weights" and f.severity >= Severity.WARNING]
            assert step >= 256 or not told
    assert told == ["optimizer.step() is never called"]


@pytest.mark.parametrize(("height", "expected"), [(0.5, []), (2.0, [("unchanged_weights", "learning rate schedule")])])
def test_a_schedule_that_ends_what_has_learned_leaves_weights_alone(height, expected):
    """Updates that round to nothing at the end of a schedule are its business; where nothing was learned before, the schedule is the fault."""

    def ends(step, values, facts):
        facts["lr"] = 1e-3 if step < 300 else 1e-9

    still = both(at("update_norm", ALL, 0.0, since=300), at("weight_norm", ALL, 1.0), loss(lambda t, v: height + (2.3 - height) * np.exp(-t / 30)))
    assert one("unchanged_weights", both(still, ends), steps=500) == expected


@pytest.mark.parametrize(("stands", "expected"), [(3.9, ["overfitting"]), (2.4, [])])
def test_a_wide_gap_needs_less_of_a_further_fall(stands, expected):
    """Validation stands, training falls on to half: overfitting where the gap is half of what was learned, not where it is a quarter."""
    falls = loss(lambda t, v: 8.0 * np.exp(-t / 8) + 0.4 * np.exp(-max(0, t - 60) / 200))
    holds = validation(lambda t, v: stands + 1.2 * np.exp(-t / 8))
    assert [name for name, _ in one("overfitting", both(falls, holds), steps=300)] == expected


def test_what_runs_inside_of_torch_func_is_passed_over(recwarn):
    """Per-sample gradients by vmap call the model and its criterion with tensors of the transform's own: no recorder fails, and it is listed."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def owed(weights, x, y):
        return criterion(torch.func.functional_call(model, weights, (x[None],)), y[None])

    with Guard(model, optimizer) as guard:
        for step in range(60):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            y = x[:, :3].argmax(1)
            torch.func.vmap(torch.func.grad(owed), in_dims=(None, 0, 0))(dict(model.named_parameters()), x, y)
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    assert [str(w.message) for w in recwarn if "lossguard" in str(w.message)] == [] and guard.findings == []
    assert {"activation_rms", "logit_peak", "grad_norm", "update_norm"} <= set(guard.coverage.observed)
    assert "inside of torch.func" in guard.coverage.not_observed["0"]


def test_a_rate_at_which_nothing_can_come_far_is_too_low():
    """After 200 steps all updates together are below 1 % of the weights and the loss stands. A loss that moves, or weights that do, are left alone."""
    slow = both(times("update_norm", ALL, 5e-3), at("confident_fraction", 0, 0.0))
    stands = loss(lambda t, v: 2.1 - 0.0002 * t + 0.01 * np.sin(t))
    assert one("update_ratio_low", both(slow, stands)) == [("update_ratio_low", "learning rate too low")]
    assert one("update_ratio_low", slow) == one("update_ratio_low", stands) == []


# ---- a loss that stands


def test_a_loss_that_came_down_to_chance_stands_there():
    """A classifier that begins above ln C and settles at it has learned nothing: a warning with a fault of its make, else information."""
    settled = both(loss(lambda t, v: CHANCE + 0.6 * np.exp(-t / 20) + 0.01 * np.sin(t)), at("confident_fraction", 0, 0.0))
    heard = run([RULES["loss_plateau"]()], settled, notes=CLASSIFIER)
    assert [f.severity for _, f in heard] == [Severity.INFO]
    assert one("loss_plateau", settled, notes=CLASSIFIER | {"linear_chain": ("layers.1", "layers.2")}) == [("loss_plateau", "no nonlinearity")]


@pytest.mark.parametrize(("speed", "expected"), [(1e-2, [("loss_plateau", "learning rate too low")]), (0.2, [])])
def test_weights_that_cannot_have_come_far_explain_a_plateau(speed, expected):
    """A loss that stands while all updates together are below 1 % of the weights: the rate is too low. Healthy updates leave it information."""
    stands = both(loss(lambda t, v: 2.1 + 0.01 * np.sin(t)), times("update_norm", ALL, speed), at("confident_fraction", 0, 0.0))
    assert one("loss_plateau", stands, steps=200) == expected


def test_validation_that_never_leaves_chance_is_no_overfitting():
    """Training creeps below chance and validation rises above it: labels that belong to other inputs, learned by heart."""
    creeps = loss(lambda t, v: CHANCE * (1.04 * np.exp(-t / 10) + 1 - 0.0003 * t))
    rises = validation(lambda t, v: CHANCE * (1.0 + 0.0004 * t))
    quiet = at("confident_fraction", 0, 0.0)
    expected = [("learning_bottleneck", "labels or targets do not belong to the inputs")]
    assert one("learning_bottleneck", both(creeps, rises, quiet), steps=220, notes=CLASSIFIER) == expected
    assert one("overfitting", both(creeps, rises, quiet), steps=220, notes=CLASSIFIER) == []
    learns = validation(lambda t, v: CHANCE * (1.0 - 0.0004 * t))
    assert one("learning_bottleneck", both(creeps, learns, quiet), steps=220, notes=CLASSIFIER) == []


SGD = both(fact("optimizer_name", "SGD"), fact("weight_decay", 0.07), fact("decay_is_decoupled", 0.0), fact("lr", 0.05))


@pytest.mark.parametrize(("momentum", "floor", "expected"), [(0.9, 0.6, [("learning_bottleneck", "weight decay too high")]), (0.0, 0.6, []), (0.9, 0.02, [])])
def test_a_decay_that_takes_back_what_is_learned_holds_the_loss(momentum, floor, expected):
    """Decay that forgets the weights within 100 steps holds a loss; a slower one does not, and a loss that comes down all the same is fine."""
    curves = both(loss(lambda t, v: floor + 1.8 * np.exp(-t / 30)), validation(lambda t, v: (floor + 0.1) * (1 + 0.3 * np.sin(t))))
    edit = both(SGD, fact("momentum", momentum), curves, times("update_norm", ALL, 5.0))
    assert one("learning_bottleneck", edit) == expected


def test_a_decay_as_large_as_a_healthy_update_is_the_cause_of_large_steps():
    """Momentum adds decay up as it does gradients; adaptive optimizers divide it by the gradient's size, and are not judged by it."""
    history = new_history()
    rule = both(SGD, fact("momentum", 0.9), times("update_norm", ALL, 20.0), times("grad_norm", ALL, 100.0))
    run_into(history, rule)
    assert forgets(history) == pytest.approx(0.05 * 0.07 / 0.1)
    assert decay(history)[0].name == "weight decay too high" and "in each step" in decay(history)[0].because
    run_into(history, both(rule, fact("optimizer_name", "Adam")))
    assert forgets(history) == 0.0 and decay(history) is None


def run_into(history, edit, steps=60):
    """Feed a history the simulated run, without judging it."""
    from test_rules import feed, healthy_step

    rng, begun = np.random.default_rng(0), history.step + 1
    for step in range(begun, begun + steps):
        values, facts = healthy_step(step, rng, 1.0)
        edit(step, values, facts)
        values.pop("validation", None)
        feed(history, step, values, facts)


# ---- the validation curve


def test_validation_that_drifts_upwards_beneath_its_noise_is_heard():
    """A rise that single evaluations hide shows in means of many; the same noise without a rise is silent."""
    rng = np.random.default_rng(3)
    swing = {t: 1 + 0.05 * rng.standard_normal() for t in range(1000)}
    _, judge = play(lambda t: 0.9 - 2e-4 * t, lambda t: (0.94 + 2.5e-4 * t) * swing[t], steps=800, names=["overfitting"])
    assert [f.diagnosis for f in judge.findings] == ["overfitting"] and "drifts from" in judge.findings[0].message
    _, judge = play(lambda t: 0.9 - 2e-4 * t, lambda t: (0.94 - 1e-4 * t) * swing[t], steps=800, names=["overfitting"])
    assert judge.findings == []


def swings(step, value):
    return value * (1.6 if step // EVALUATED % 2 else 1.0)


def test_statistics_that_stand_still_explain_a_validation_that_swings():
    """At a momentum of 1e-5 evaluation runs on batch-norm's initial statistics; at 0.1 it does not."""
    for momentum, name in ((1e-5, "batch norm statistics"), (0.1, "validation set too small or drawn anew"), (None, "validation set too small or drawn anew")):
        assert one("oscillating_validation", validation(swings), steps=300, notes={"least_norm_momentum": momentum})[0][1] == name


def test_a_training_loss_that_falls_does_not_swing():
    """Only what training does about its own trend speaks for the learning rate."""
    falls = loss(lambda t, v: 2.3 * np.exp(-t / 60))
    restless = loss(lambda t, v: 2.3 * np.exp(-t / 60) * (1.7 if t // EVALUATED % 2 else 1.0))
    assert one("oscillating_validation", both(falls, validation(swings)), steps=300)[0][1] == "validation set too small or drawn anew"
    assert one("oscillating_validation", both(restless, validation(swings)), steps=300)[0][1] == "learning rate too high"


@pytest.mark.parametrize("back", [True, False])
def test_training_in_evaluation_mode_is_told_at_once(back):
    """train() is not called after the first evaluation: named by the third sampled step; called, nothing is said. A guard's batches tell no mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer) as guard:
        for i in range(120):
            x, y = data(i)
            value = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            guard.step(value)
            if i % 20 == 19:
                model.eval()
                with torch.no_grad():
                    told = F.cross_entropy(model(x), y)
                model.train(back)
                guard.validation(told)
    found = [f for f in guard.findings if f.diagnosis == "validation_mismatch"]
    assert [(f.step, f.causes[0].name) for f in found] == ([] if back else [(20, "train() is not called")])


# ---- data and labels


def test_the_same_batch_for_ever_is_told_where_validation_suffers():
    """One batch that is handed out anew each time: a warning beside a gap to validation; silent without one, or where the loader has one batch."""
    again = fact("fingerprint", 7.0)
    gap = both(again, loss(lambda t, v: 2.3 * np.exp(-t / 20)), validation(lambda t, v: 0.9))
    assert one("duplicate_batches", gap, steps=120) == [("duplicate_batches", "the same samples again")]
    assert one("duplicate_batches", gap, steps=120, notes={"loader_batches": 1}) == []
    assert one("duplicate_batches", again, steps=120) == []


def labels_of_minus_one(weight):
    """A likelihood by hand, in which padding (-1) has a weight made from the label."""

    def loss_of(out, y):
        each = -out.log_softmax(-1).gather(-1, y.unsqueeze(-1) % out.shape[-1]).squeeze(-1)
        return (each * weight(y)).mean()

    def batch(i):
        x, y = data(i)
        return x, torch.where(torch.arange(len(y)) % 4 == 0, -1, y)

    return loss_of, batch


@pytest.mark.parametrize(("weight", "ill"), [(torch.sign, True), (lambda y: (y >= 0).float(), False)])
def test_padding_that_pulls_a_loss_below_zero_is_named(weight, ill):
    """Labels of -1 that count with their sign make a loss without a floor; with a weight of 0 they do no harm."""
    loss_of, batch = labels_of_minus_one(weight)
    guard = train(batch=batch, loss_of=loss_of, lr=2e-3, optimizer=torch.optim.Adam)
    found = [f for f in guard.findings if f.diagnosis == "negative_loss"]
    assert [f.causes[0].name for f in found] == (["padding value"] if ill else [])


def test_a_term_that_was_brought_to_nothing_alone_outweighs_the_others():
    """A term that led at first and is solved, while the others stand, has too large a weight; where the others came down it has not."""

    def ended(rest):
        history = History()
        for step in range(60):
            terms = {"penalty": 30.0 * np.exp(-step / 3), "fit": 1.0 + (rest - 1.0) * step / 60}
            history.add_loss(step, sum(terms.values()), terms)
        return outweighed(history)

    assert ended(0.9)[0].name == "a loss term outweighs the others" and "'penalty'" in ended(0.9)[0].because
    assert ended(0.2) is None and outweighed(History()) is None


# ---- the beginning


class Tied(nn.Module):
    """A head that is its embedding."""

    def __init__(self, std):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(50, 48), nn.Linear(48, 48), nn.LayerNorm(48)
        nn.init.normal_(self.embed.weight, 0.0, std)

    def forward(self, x):
        h = self.embed(x)
        return F.linear(self.norm(h + self.mix(h)) * 8, self.embed.weight)


@pytest.mark.parametrize(("std", "loss_of", "ill"), [
    (1.0, F.cross_entropy, True), (0.02, F.cross_entropy, False), (0.02, lambda out, y: F.cross_entropy(out, y, reduction="sum") / 2, False),
    (1.0, lambda out, y: F.cross_entropy(out, y) * 0.1, False),
])  # fmt: skip
def test_a_first_cross_entropy_above_any_number_of_classes_is_told(std, loss_of, ill):
    """A tied embedding of deviation 1 owes more than any softmax can by chance. Sums, and losses that are scaled, are not judged."""

    def batch(i):
        x = torch.randint(50, (64,), generator=torch.Generator().manual_seed(i))
        return x, (x * 7 + 3) % 50

    guard = train(lambda: Tied(std), batch=batch, loss_of=loss_of, lr=1e-3, steps=30, optimizer=torch.optim.Adam)
    found = [f for f in events(guard) if f.diagnosis == "initial_loss_off"]
    assert [(f.step, f.causes[0].name) for f in found] == ([(0, "logits out of scale")] if ill else [])


def test_a_state_that_grows_before_the_head_is_not_laid_to_the_head():
    """A first loss far above chance is the head's doing only where what the head is given is of moderate size."""
    high = loss(lambda t, v: 60.0 + v)
    assert one("initial_loss_off", high, steps=20) == [("initial_loss_off", "logits out of scale")]
    assert one("initial_loss_off", both(high, at("activation_rms", 4, 50.0)), steps=20) == []


class Gain(nn.Module):
    """A parameter of its own kind."""

    def __init__(self, value):
        super().__init__()
        self.gain = nn.Parameter(torch.full((32,), value))

    def forward(self, x):
        return x * self.gain


def test_a_parameter_that_was_never_filled_is_named():
    """NaN in the first forward pass, out of a module with parameters of its own: bad weights, and which."""
    guard = train(lambda: nn.Sequential(nn.Linear(16, 32), Gain(float("nan")), nn.ReLU(), nn.Linear(32, 4)), steps=5)
    finding = first(guard, "nonfinite_activation")
    assert finding.causes[0].name == "bad weights" and "1 (Gain)" in finding.causes[0].because
    assert finding.remedies[0].change["parameter"] == "1.gain"


@pytest.mark.parametrize("written_back", [True, False])
def test_an_optimizer_that_holds_nothing_of_the_model_is_told_from_master_weights(written_back):
    """All parameters are in no optimizer: if they move they are copied back, else the optimizer is that of another model."""
    torch.manual_seed(0)
    model = net()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with Guard(model, optimizer) as guard:
        for i in range(30):
            x, y = data(i)
            value = F.cross_entropy(model(x), y)
            value.backward()
            for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                its.grad = mine.grad.clone()
                mine.grad = None
            optimizer.step()
            if written_back:
                with torch.no_grad():
                    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                        mine.copy_(its)
            guard.step(value)
    names = [f.causes[0].name for f in guard.findings if f.diagnosis == "unchanged_weights"]
    assert names == ([] if written_back else ["the optimizer holds another model's parameters"])


# ---- outputs that become the same


def views(apart):
    """Two noisy views of each sample are drawn together, with or without a term that holds samples apart."""

    def loss_of(out, y):
        a, b = out
        return F.mse_loss(a, b) + apart * F.relu(1 - (torch.cat([a, b]).var(0) + 1e-4).sqrt()).mean()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))

        def forward(self, x):
            noise = torch.Generator().manual_seed(0)
            return tuple(self.net(x + 0.3 * torch.randn(x.shape, generator=noise)) for _ in range(2))

    return train(Twice, loss_of=loss_of, lr=3e-3, optimizer=torch.optim.Adam, steps=600)


def test_views_that_agree_because_all_samples_do_are_a_collapse():
    """Nothing holds the views of different samples apart: the loss is solved by one point. A variance term holds them apart."""
    finding = first(views(0.0), "collapsed_activation")
    assert finding.causes[0].name == "same output for every sample" and finding.where.startswith("net.2")
    assert not [f for f in events(views(1.0)) if f.severity >= Severity.WARNING]


@pytest.mark.parametrize(("speed", "name"), [(30.0, "learning rate too high"), (1.0, "dead, saturated or constant weights")])
def test_a_layer_that_collapsed_behind_large_steps_was_driven_there(speed, name):
    """Samples differed, steps were large, and then all outputs are the same: the rate. Behind small steps the weights are to blame."""
    stands = loss(lambda t, v: 2.3)
    edit = both(stands, at("sample_variance", slice(5, 9), 1e-9, since=60), times("update_norm", ALL, speed, until=70))
    assert one("collapsed_activation", edit, steps=150) == [("collapsed_activation", name)]


def test_a_relu_that_began_silent_began_so():
    """Its first outputs were all 0: its bias or its initialisation."""
    silent = both(at("activation_rms", 2, 0.0), at("sample_variance", slice(2, 9), 1e-9), at("activation_rms", slice(3, 9), 0.5), loss(lambda t, v: 2.3))
    assert one("collapsed_activation", silent, steps=60) == [("collapsed_activation", "bias or initialisation")]
