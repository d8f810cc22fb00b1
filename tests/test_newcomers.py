"""What people broke by hand and a guard once missed or misnamed: each law hears its fault, and is silent on what looks like it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_beginnings import small
from test_curves import decay, names, play
from test_evidence import CLASSIFIER, one
from test_rules import ALL, ILL, at, both, fact, loss, run, times, validation
from torch import nn

from lossguard import Guard, Severity, preflight, readings
from lossguard.advice import lr_remedy
from lossguard.findings import DIAGNOSES
from lossguard.host.history import History, Sample
from lossguard.rules import RULES
from lossguard.rules.suspects import suspects
from lossguard.verdict import read


def trained(loss_of, *, model=None, steps=60, autocast=False, lr=0.01, scale=None, **options):
    """A small classifier under a guard, or with ``scale`` what has its inputs, from 0 to it, for targets; the guard."""
    model = small() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(0)
    with Guard(model, optimizer, halt=None, **options) as guard:
        for _ in range(steps):
            x, y = torch.randn(16, 8, generator=draw), torch.randint(3, (16,), generator=draw)
            if scale is not None:
                x = y = scale * torch.rand(16, 8, generator=draw)
            guard.batch(x, y)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = loss_of(model(x), y)
            total = sum(value.values()) if isinstance(value, dict) else value
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(value)
    return guard


def alarms(guard):
    return [(f.diagnosis, f.causes[0].name) for f in guard.findings if f.severity >= Severity.WARNING]


# ---- signs and floors


def test_a_cross_entropy_with_a_minus_sign_is_named_first():
    """The graph says cross entropy, and the loss falls below 0: the sign is the first alarm. With the sign right there is none."""
    assert alarms(trained(lambda out, y: -F.cross_entropy(out, y)))[0] == ("negative_loss", "sign of the loss")
    assert alarms(trained(F.cross_entropy)) == []


def test_a_term_without_a_floor_is_named():
    """Of two terms one has the wrong sign: the loss falls below 0 ever faster, and the term is named."""
    guard = trained(lambda out, y: {"fit": F.cross_entropy(out[:, :3], y), "size": -out.square().mean()}, steps=300)
    found = [f for f in guard.findings if f.diagnosis == "negative_loss"]
    assert [f.causes[0].name for f in found] == ["sign of the loss"] and "'size'" in found[0].causes[0].because
    assert guard.verdict == "diverging"


def test_targets_beyond_one_make_a_binary_cross_entropy_bottomless():
    """Pixels of 0 to 16 where 0 to 1 is expected: the targets are the first cause of whatever is told."""
    guard = trained(autoencoded, model=nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), steps=300, scale=16.0)
    assert guard.history.loss_family == "binary" and not guard.history.notes["loss_is_nonnegative"]
    assert ("negative_loss", "targets out of range") in alarms(guard)


def test_inputs_within_one_speak_for_the_sign():
    """A divergence that is subtracted, beside pixels of 0 to 1: the sign, and not the targets."""
    guard = trained(lambda out, x: F.binary_cross_entropy_with_logits(out, x) - out.square().mean(), model=nn.Linear(8, 8), steps=300, lr=0.1, scale=1.0)
    assert ("negative_loss", "sign of the loss") in alarms(guard)


def autoencoded(out, x):
    """A loss that is not of one make, on targets that are the inputs."""
    return F.binary_cross_entropy_with_logits(out, x) + 0.0 * out.square().sum()


@pytest.mark.parametrize("shape", [lambda t: 3.0 - 400.0 * t / 300, lambda t: 3.0 - 600.0 * np.sqrt(t / 300), lambda t: 3.0 - 1.5 * t / 300])
def test_a_likelihood_that_falls_ever_slower_has_a_floor(shape):
    """Far below 0, but not ever faster: the likelihood of a density. Not far below: any loss."""
    assert one("negative_loss", loss(lambda t, v: shape(t)), steps=300, loss_family="unknown", notes={}) == []


def test_a_loss_without_a_floor_is_what_makes_gradients_explode():
    """Where the loss falls below 0 ever faster, its sign is the cause of large steps, and no learning rate."""

    def run_of(path):
        history = History(loss_family="unknown")
        for step in range(60):
            history.add_loss(step, path(step))
        history.add_sample(Sample(59, {}, {"lr": 0.1}))
        return [cause.name for cause, _ in suspects(history)]

    assert run_of(lambda t: 2.0 - 0.01 * 2.0 ** (t / 3)) == ["sign of the loss", "targets out of range"]
    assert run_of(lambda t: 2.0 - np.sqrt(t)) == [] == run_of(lambda t: 2.0 - 0.001 * 2.0 ** (t / 6))


def test_a_loss_without_a_floor_reads_as_diverging():
    """However it falls, a loss that runs away below 0 learns nothing."""
    history = History()
    for step in range(200):
        history.add_loss(step, 1.0 - 0.01 * step**3)
    assert read(history) == "diverging" and readings.endless(history)


# ---- what the graph shows


@pytest.mark.parametrize("name", ["softmax", "none"])
def test_a_softmax_before_cross_entropy_is_seen_through_casts(name):
    """Under autocast a cast stands between the softmax and the loss."""
    heard = alarms(trained(lambda out, y: F.cross_entropy(out.softmax(1) if name == "softmax" else out, y), steps=12, autocast=True))
    assert heard == ([("wrong_output_activation", "softmax before cross entropy")] if name == "softmax" else [])


def test_a_model_that_trains_in_evaluation_mode_is_called_so():
    """Hooks see no training pass because there is none: coverage says why."""
    model = small().eval()
    why = trained(F.cross_entropy, model=model, steps=20).coverage.not_observed["activations"]
    assert "evaluation mode" in why and "model.train()" in why


# ---- what evaluations tell

GUESSING = both(loss(lambda t, v: 5.0 * (0.7 + 0.3 * np.exp(-t / 200))), validation(lambda t, v: (4.0, 1 / 64, 1 / 64)))


def test_an_accuracy_that_stays_a_guess_while_training_falls_is_an_alarm():
    """Eight evaluations at chance beside a training loss that falls: labels that do not belong to the inputs."""
    assert one("learning_bottleneck", GUESSING, notes=CLASSIFIER) == [("learning_bottleneck", "labels or targets do not belong to the inputs")]


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(lambda t: 0.0, id="whole sequences"),
        pytest.param(lambda t: 3 / 64, id="above chance"),
        pytest.param(lambda t: 1 / 64 if t < 150 else 0.9, id="at last"),
    ],
)
def test_an_accuracy_that_counts_something_else_or_rises_is_none(told):
    """Exact matches of sequences begin at 0; what is above chance has learned; a late start in time is a start."""
    assert one("learning_bottleneck", both(GUESSING, validation(lambda t, v: (4.0, told(t), told(t)))), notes=CLASSIFIER) == []


def test_validation_below_a_training_that_does_not_fall_is_no_overfitting():
    """Validation rises from its best and stands below training, which rose as well: nothing was learned by heart."""
    train, val = (lambda t: decay(t, 0.25, 20) + 2e-5 * t), (lambda t: max(decay(t, 0.02, 20), 0.02 + 9e-4 * (t - 150)))
    assert "overfitting" not in names(play(train, val, steps=360)[1])
    assert "overfitting" in names(play(lambda t: decay(t, 0.01, 60), val, steps=360)[1])


# ---- remedies


def test_a_rate_on_a_schedule_is_changed_by_a_factor():
    """During a warm-up the rate of the moment is not what a user wrote: the remedy says by how much to change what was."""
    history = History()
    for step, lr in enumerate((0.01, 0.02, 0.03)):
        history.add_sample(Sample(step, {}, {"lr": lr}))
    remedy = lr_remedy(history, 0.01)
    assert remedy.text == "divide the learning rate by 100, and with it the whole schedule (now 0.03)" and remedy.change == {"lr_factor": 0.01}
    steady = History()
    for step in range(3):
        steady.add_sample(Sample(step, {}, {"lr": 0.03}))
    assert lr_remedy(steady, 0.01).change == {"lr": pytest.approx(3e-4)}


def test_a_clip_value_that_binds_is_never_made_smaller():
    """The remedy for a clip value that is too low is a larger one, also where the run began with small gradients."""
    seen: list[float] = []

    def total(step, values, facts):
        seen.append(float(np.sqrt(np.nansum(np.square(values["grad_norm"])))))

    grown = both(at("clip_coefficient", 0, 0.02), times("grad_norm", ALL, 1e-3, until=20), fact("adam_eps", None), total)
    finding = run([RULES["clipping_dominates"]()], grown, steps=120)[0][1]
    assert finding.causes[0].name == "clip value too low"
    assert finding.remedies[0].change["max_norm"] > 0.02 * seen[-1]


def test_a_guard_says_how_grave_its_findings_are():
    """A line of information is not counted as an alarm in the one line that everybody prints."""
    assert repr(trained(F.cross_entropy)).endswith("60 steps, no findings>")
    assert "1 finding (1 warning)>" in repr(trained(lambda out, y: -F.cross_entropy(out, y), mute=set(DIAGNOSES) - {"negative_loss"}))


# ---- before the first step


class Wrapped:
    """A loader that has the methods of one with a state, and nothing behind them."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)

    def state_dict(self):
        return self.dl_state_dict

    def load_state_dict(self, state):
        raise AttributeError("no state")


def test_a_loader_without_the_state_that_it_promises_is_looked_at():
    """A prepared loader whose state_dict() fails is judged as any other."""
    data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
    model = small()
    assert preflight(model, Wrapped(data), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)).answers["invalid_labels"] == "pass"


def test_columns_of_many_units_are_normalised_one_by_one():
    """One number for all columns would leave most of them tiny: where their spreads differ, each is divided by its own."""
    columns = torch.tensor([1e3, 300.0, 2.0, 1.0, 0.5, 1.0, 2.0, 1.0])
    data = [(columns * torch.randn(16, 8, generator=torch.Generator().manual_seed(i)), torch.randint(3, (16,))) for i in range(8)]
    (finding,) = [f for f in preflight(small(), data, nn.CrossEntropyLoss()) if f.diagnosis == "unnormalized_input"]
    assert finding.causes[0].name == "features in different units" and "each feature" in finding.remedies[0].text


def test_a_rate_below_the_range_is_not_said_to_lie_within():
    """A rate that works but is not among the fastest is told so."""
    data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
    model = small()
    lines = str(preflight(model, data, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1e-3)))
    (line,) = [text for text in lines.splitlines() if "learning_rate_range" in text][:1]
    assert "within the good range" not in line


# ---- networks that act, sequences seen place by place, optimizers that rest


def test_a_network_that_acts_on_single_states_is_judged_by_no_level_of_its_loss():
    """Values that grow make a loss that grows: of a loop that asks the network for single states between its batches that is information, and
    the input's scale is that of the batch. The same rise without acting is a warning."""
    found = {}
    for acting in (True, False):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        draw = torch.Generator().manual_seed(0)
        with Guard(model, optimizer) as guard:
            for step in range(500):
                for _ in range(3 * acting):
                    model(torch.zeros(8)).argmax()
                x = torch.randn(32, 8, generator=draw)
                guard.batch(x, x)
                loss = F.smooth_l1_loss(model(x)[:, 0], torch.full((32,), 0.5 + 1e-2 * step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
        found[acting] = {f.diagnosis: f.severity for f in guard.findings}
        assert guard.history.last("input_rms").min() > 0.8 and guard.history.last("input_rms").max() < 1.2
    assert found[True]["diverging_loss"] is Severity.INFO and found[False]["diverging_loss"] is Severity.WARNING


@pytest.mark.parametrize(
    ("family", "height", "grave"), [("huber", 3.0, Severity.WARNING), ("huber", 300.0, Severity.HALT), ("cross_entropy", 3.0, Severity.HALT)]
)
def test_a_regression_that_stays_above_its_start_halts_only_where_it_is_lost(family, height, grave):
    """Targets may grow by design: calm updates and a loss of the same magnitude are a warning. A classifier below its start is lost."""
    edit = both(loss(lambda t, v: 1.0 if t < 50 else height), at("update_norm", ALL, 1e-4))
    heard = run([RULES["diverging_loss"]()], edit, steps=500, loss_family=family)
    assert max(f.severity for _, f in heard) is grave


class Places(nn.Module):
    """A network that is given one place of a sequence at a time."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        state = 0.0
        for place in x.unbind(1):
            state = torch.tanh(self.into(place) + state)
        return self.out(state)


def test_of_a_sequence_the_whole_is_the_input_and_not_its_first_place():
    """Where the batch is shown its scale is measured; where it is not, a change of the first place is no cause."""
    for shown in (True, False):
        model = Places()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        draw = torch.Generator().manual_seed(0)
        with Guard(model, optimizer, every=1) as guard:
            for step in range(120):
                x = torch.randn(16, 5, 4, generator=draw)
                x[:, 0] *= 1.0 if step < 100 else 0.01
                if shown:
                    guard.batch(x)
                loss = F.cross_entropy(model(x), torch.zeros(16, dtype=torch.long))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
        assert not any(cause.name in ("input changed", "odd batch") for cause, _ in suspects(guard.history))
        assert (guard.history.last("input_rms", 1).item() > 0.5) is shown


def test_what_changed_after_the_loss_rose_is_not_its_cause():
    """A learning rate that is raised later did not make the loss rise now."""
    history = History()
    for step in range(40):
        history.add_sample(Sample(step, {}, {"lr": 0.1 if step < 30 else 1.0}))
    assert [cause.name for cause, _ in suspects(history)] == ["learning rate too high"] and suspects(history, until=20) == []


def test_an_optimizer_that_has_met_its_own_bar_rests():
    """LBFGS returns at once where the gradient is as small as it was asked for: no weight that it moved before is frozen."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=draw)
    y, model = x @ torch.randn(4, 1, generator=draw), nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", tolerance_grad=1e-3)
    with Guard(model, optimizer) as guard:
        for _ in range(60):

            def closure():
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            guard.step(optimizer.step(closure))
    assert "unchanged_weights" not in [f.diagnosis for f in guard.findings]


def test_without_any_gradient_no_rate_is_to_blame():
    """Where weight decay alone moves weights a larger rate would help nothing: the missing gradient is told, and nothing else."""
    edit = both(times("grad_norm", ALL, 0.0), times("update_norm", ALL, 1e-4), loss(lambda t, v: 2.0))
    assert one("update_ratio_low", edit) == []
    assert one("update_ratio_low", both(times("update_norm", ALL, 1e-4), loss(lambda t, v: 2.0))) != []


def test_curves_of_two_formulas_are_not_held_against_each_other():
    """Training below 0 and validation above it, from the first evaluation on: no gap between them is overfitting."""
    train, val = (lambda t: -11.0 - 2.0 * (1 - decay(t, 0.0, 60))), (lambda t: 2.0 + max(0.0, 1e-3 * (t - 150)))
    assert "overfitting" not in names(play(train, val, steps=360)[1])


def test_several_players_have_no_order():
    """A loss that rises where two optimizers play against each other is no divergence."""
    history = History(optimizers=2)
    for step in range(200):
        history.add_loss(step, 0.5 + 0.01 * step)
    assert read(history) == "no order"
    history.optimizers = 1
    assert read(history) == "diverging"


# ---- curricula and routers


@pytest.mark.parametrize(("grows", "heard"), [(True, Severity.INFO), (False, Severity.WARNING)])
def test_a_curriculum_of_longer_samples_is_information(grows, heard):
    """A loss that climbs above its start while sequences grow longer than they were at its best; with sequences of one length it is an alarm."""
    torch.manual_seed(0)
    cell, head = nn.GRUCell(2, 8), nn.Linear(8, 1)
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, halt=None) as guard:
        for step in range(160):
            x = torch.randn(16, 4 + 4 * (step // 40) if grows else 8, 2)
            state = torch.zeros(16, 8)
            for t in range(x.shape[1]):
                state = cell(x[:, t], state)
            loss = F.mse_loss(head(state).squeeze(-1), (1 + 2 * (step // 40)) * torch.randn(16))  # harder as it goes, either way
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    found = [f.severity for f in guard.findings if f.diagnosis == "diverging_loss"]
    assert found == [heard], guard.findings
    assert guard.history.fact("sample_elements")[[0, -1]].tolist() == ([4 * 8, 16 * 8] if grows else [64, 64])


class Routed(nn.Module):
    """Each sample goes to the expert of the largest score; the last one has a bias that no score overcomes."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(8, 4), nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU()) for _ in range(4)), nn.Linear(16, 3)
        self.gate.bias.data[:] = torch.tensor([0.0, 0.0, 0.0, -50.0])

    def forward(self, x):
        scores = self.gate(x).softmax(1)
        best, chosen = scores.max(1)
        out = torch.zeros(len(x), 16)
        for k, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == k)[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * best[rows, None])
        return self.head(out)


def test_an_expert_that_nothing_is_routed_to_is_named_as_such():
    """It is not detached from the loss: the router never chooses it."""
    guard = trained(F.cross_entropy, model=Routed(), steps=300)
    (found,) = [f for f in guard.findings if f.diagnosis == "unchanged_weights"]
    assert found.where.startswith("experts.3") and found.causes[0].name == "nothing is routed to it"
    assert "router" in found.remedies[0].text


# ---- a code that tells nothing


def variational(weight, rises=False):
    """A variational autoencoder on points of two kinds, its terms told by name; the guard."""
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 8))
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    centres = 2 * torch.randn(5, 8)
    with Guard(model, optimizer, halt=None) as guard:
        for step in range(600):
            x = centres[torch.randint(5, (32,))] + 0.3 * torch.randn(32, 8)
            mean, spread = encoder(x).chunk(2, dim=1)
            out = decoder(mean + torch.randn_like(mean) * (spread / 2).exp())
            divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1).mean()
            terms = {"reconstruction": (out - x).square().sum(1).mean(), "kl": weight * (min(1.0, step / 400) if rises else 1.0) * divergence}
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(terms)
    return guard


def test_a_posterior_that_collapses_is_named():
    """A divergence that outweighs the reconstruction empties the code. At its usual weight, and at one that rises from 0, nothing is said."""
    (found,) = [f for f in variational(20.0).findings if f.severity >= Severity.WARNING and f.diagnosis == "collapsed_activation"]
    assert (found.where, found.causes[0].name) == ("term 'kl'", "posterior collapse")
    assert "tenth of the divergence's weight" in found.remedies[0].text
    for healthy in (variational(1.0), variational(1.0, rises=True), variational(0.01)):
        assert alarms(healthy) == []


# ---- dead units and frozen layers, by their cause


def test_layers_that_are_frozen_by_mistake_are_named_where_nothing_is_learned():
    """A classifier whose loss stands at that of a guess while most of its weights are frozen: they are the cause; not so where they are free."""

    def causes(frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        model[0].requires_grad_(not frozen)
        found = [f for f in trained(F.cross_entropy, model=model, steps=300, lr=1e-4).findings if f.diagnosis == "loss_plateau"]
        return [(f.severity, f.causes[0].name) for f in found]

    assert causes(True) == [(Severity.WARNING, "frozen by mistake")]
    assert "frozen by mistake" not in [name for _, name in causes(False)]


@pytest.mark.parametrize(
    ("notes", "edit", "cause"),
    [({"largest_dropout": 0.95}, None, "dropout too high"), ({}, both(fact("weight_decay", 50.0), fact("decay_is_decoupled", 1.0)), "weight decay too high")],
)
def test_dead_units_have_the_cause_that_the_run_shows(notes, edit, cause):
    """A dropout that leaves nothing, or a decay that makes the updates, comes before the learning rate."""
    ill = ILL["dead_relu"][0]
    found = [f for _, f in run([RULES["dead_relu"]()], ill if edit is None else both(ill, edit), notes=notes)]
    assert found and found[-1].causes[0].name == cause
