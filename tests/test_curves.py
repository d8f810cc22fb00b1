"""The curves, fed by hand and by real trainings: what is ill is heard, what is healthy is not, and the verdict says the same."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import ALL, ILL, at, both, loss, run, times, validation
from torch import nn

from lossguard import Guard, History, Severity
from lossguard.readings import curves as read_curves
from lossguard.readings import spread
from lossguard.rules import RULES
from lossguard.rules.judge import FOLLOWS, Judge
from lossguard.verdict import read

CURVE_RULES = ["overfitting", "validation_mismatch", "learning_bottleneck", "validation_below_training", "oscillating_validation",
               "loss_plateau", "oscillating_loss", "negative_loss", "loss_spike", "diverging_loss", "constant_loss"]  # fmt: skip


def play(train, val, *, every=20, noise=0.02, steps=400, seed=0, scale=1.0, told=None, names=CURVE_RULES, **words):
    """A run given by two functions of the step; the history at its end and the judge that saw it."""
    rng, history = np.random.default_rng(seed), History(**words)
    judge = Judge([RULES[name]() for name in names])
    for step in range(steps):
        history.add_loss(step, scale * train(step) * (1 + noise * rng.standard_normal()))
        if val is not None and step % every == every - 1:
            history.add_validation(step, scale * val(step), *(told(step) if told else ()))
        judge.observe(history, new_sample=False)
    return history, judge


def names(judge, least=Severity.WARNING):
    return [f.diagnosis for f in judge.findings if f.severity >= least]


def decay(step, floor=0.5, pace=60.0):
    return floor + 1.8 * math.exp(-step / pace)


# ---- the catalogue, A1 to A11

SHAPES = {
    "A1 learning": (lambda t: decay(t, 0.1, 200), lambda t: decay(t, 0.12, 200), "learning", []),
    "A2 validation stands": (lambda t: decay(t, 0.05, 150), lambda t: max(decay(t, 0.05, 150), 1.2), "overfitting begins", ["overfitting"]),
    "A3 validation turns": (lambda t: decay(t, 0.05, 150), lambda t: decay(t, 0.2, 100) + 0.006 * max(0, t - 200), "overfitting", ["overfitting"]),
    "A4 validation alone": (lambda t: 2.3, lambda t: 2.3 * math.exp(-t / 300), "validation mismatch", ["validation_mismatch"]),
    "A5 both stand high": (lambda t: 2.0, lambda t: 2.05, "bottleneck", []),
    "A6 done": (lambda t: decay(t, 0.2, 20), lambda t: decay(t, 0.25, 20), "done", []),
    "A7 both rise": (lambda t: 1.0 + t / 100, lambda t: 1.0 + t / 100, "diverging", ["diverging_loss"]),
    "A8 below": (lambda t: decay(t, 0.5, 200), lambda t: 0.7 * decay(t, 0.5, 200), "learning", []),
    "A9 swings": (lambda t: decay(t, 0.3, 100), lambda t: decay(t, 0.3, 100) * (1.8 if t // 20 % 2 else 1.0), "oscillating validation",
                  ["oscillating_validation"]),
    "A11 wobble": (lambda t: decay(t, 0.3, 150) * (1 + 0.2 * math.sin(t / 4)), lambda t: decay(t, 0.35, 150), "learning", []),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_pair_of_curves_has_its_word_and_its_alarm(shape, scale):
    """Every row of the catalogue reads as it says, and warns as it says, whatever the scale of the loss."""
    train, val, word, alarms = SHAPES[shape]
    history, judge = play(train, val, scale=scale)
    assert read(history) == word
    assert names(judge) == alarms


def test_the_turning_point_is_named():
    """Overfitting names the step of the best evaluation, and so does the verdict."""
    train, val, *_ = SHAPES["A3 validation turns"]
    history, judge = play(train, val)
    best = int(history.validations()[history.validations()[:, 1].argmin(), 0])
    assert [(f.diagnosis, f.step) for f in judge.findings if f.severity >= Severity.WARNING] == [("overfitting", best)]
    assert read(history).best_step == best
    assert next(f for f in judge.findings if f.diagnosis == "overfitting").remedies[0].change == {"steps": best}


def test_validation_below_training_is_said_besides():
    """A run that learns with dropout reads as learning, with a line of information about the lower curve."""
    train, val, *_ = SHAPES["A8 below"]
    history, judge = play(train, val)
    assert read(history).also == ("validation below training",)
    assert names(judge, Severity.INFO) == ["validation_below_training"]


def test_a_verdict_is_a_word_that_can_be_copied():
    """It compares, prints, copies and pickles as a string, and keeps what it knows."""
    word = read(play(SHAPES["A3 validation turns"][0], SHAPES["A3 validation turns"][1])[0])
    for same in (copy.deepcopy(word), pickle.loads(pickle.dumps(word))):
        assert (same, same.best_step, same.training, same.validation) == ("overfitting", word.best_step, "falling", "rising")
    assert f"{word}" == "overfitting"
    assert {"overfitting": 1}[word] == 1


def test_accuracies_tell_overfitting_and_excuse_a_drifting_loss():
    """A gap of accuracies warns from 0.25 and informs from 0.1; a loss that turns while the accuracy still rises informs."""
    gap = lambda size: lambda step: (0.9 - size, 0.9)  # noqa: E731
    for size, severity in ((0.3, [Severity.WARNING]), (0.15, [Severity.INFO]), (0.05, [])):
        _, judge = play(decay, decay, told=gap(size), names=["overfitting"])
        assert [f.severity for f in judge.findings] == severity, size
    train, val, *_ = SHAPES["A3 validation turns"]
    _, judge = play(train, val, told=lambda step: (0.5 + step / 1000, math.nan), names=["overfitting"])
    assert [f.severity for f in judge.findings] == [Severity.INFO]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (decay, lambda t: decay(t, 0.6) * (1 + 0.06 * math.sin(t * 7.1))),  # validation noisier than training
        (lambda t: decay(t, 0.01, 40), lambda t: 0.036 + 1e-4 * t + decay(t, 0, 40)),  # a converged run: 0.036 -> 0.07
        (lambda t: decay(t, 1.05), lambda t: decay(t, 1.05)),  # the floor of label noise
        (lambda t: decay(t, 0.3) + (0.5 if t > 300 else 0), lambda t: decay(t, 0.3) + (0.5 if t > 300 else 0)),  # a warm restart: both rise
        (lambda t: decay(t, 0.2, 80), lambda t: 2.5 - 2.2 * (1 - math.exp(-t / 160))),  # averaged weights lag behind
    ],
)
def test_healthy_curves_raise_no_validation_alarm(train, val):
    """What looks odd in good health is never more than information."""
    for seed in range(3):
        _, judge = play(train, val, seed=seed, names=[n for n in CURVE_RULES if "validation" in RULES[n].reads])
        assert names(judge) == []


def test_late_generalisation_is_no_mismatch():
    """Validation that falls long after training is at 0 has been called overfitting until then, and is nothing worse."""
    _, judge = play(lambda t: 2.3 * math.exp(-t / 15), lambda t: 2.3 * math.exp(-max(0, t - 250) / 40))
    assert set(names(judge)) <= {"overfitting"}


def test_few_evaluations_are_not_judged():
    """Fewer than six evaluations raise no alarm, however they run."""
    _, judge = play(lambda t: decay(t, 0.05), lambda t: 1 + t / 50, every=80, names=[n for n in CURVE_RULES if "validation" in RULES[n].reads])
    assert names(judge) == []


@pytest.mark.parametrize("words", [{"optimizers": 2}, {"loss_family": "adversarial"}])
@pytest.mark.parametrize("shape", ["A2 validation stands", "A3 validation turns", "A4 validation alone", "A9 swings"])
def test_validation_of_losses_without_order_informs_only(shape, words):
    """Adversarial and reinforcement runs get information, never a warning, from the validation curve."""
    train, val, *_ = SHAPES[shape]
    _, judge = play(train, val, names=[n for n in CURVE_RULES if "validation" in RULES[n].reads], **words)
    assert judge.findings
    assert names(judge) == []


def test_a_negative_loss_has_a_turning_point_too():
    """Where losses are negative, differences are held against what was learned."""
    history, judge = play(lambda t: decay(t, -2, 100), lambda t: decay(t, -1.8, 80) + 0.005 * max(0, t - 200))
    assert read(history) == "overfitting"
    assert names(judge) == ["overfitting"]


def test_validation_losses_that_are_not_finite_warn_and_never_break():
    """Two non-finite evaluations beside finite training are a mismatch, a single one is not; the verdict says so at once."""
    rules = [n for n in CURVE_RULES if n != "learning_bottleneck"]
    for many, expected in ((1, []), (2, ["validation_mismatch"])):
        history, judge = play(decay, lambda t, many=many: math.nan if t >= 400 - 20 * many else decay(t), names=rules)
        assert read(history) == "not a number"
        assert names(judge) == expected
    for number in (math.nan, math.inf, -math.inf, 0.0, 1e38, -1e38, 1e-38):
        for fed in (lambda t, number=number: number, decay):
            for told in (lambda t, number=number: number, decay, None):
                history, judge = play(fed, told, steps=120)
                assert isinstance(read(history), str)
                assert all(str(f) for f in judge.findings)


def test_validation_rules_are_asked_once_an_evaluation():
    """Between evaluations they rest; evaluations that arrive together are each judged."""
    asked = []

    class Counting(RULES["overfitting"]):
        def check(self, history):
            asked.append(len(history.validations()))

    model = nn.Linear(2, 1)
    with Guard(model, torch.optim.SGD(model.parameters(), 0.01), rules=[Counting()], lag=6) as guard:
        for step in range(40):
            model.zero_grad()
            value = model(torch.ones(4, 2)).square().mean()
            value.backward()
            guard.step(value)
            if step % 2:
                guard.validation(1.0, accuracy=torch.tensor(0.5), train_accuracy=0.75)
    assert asked == list(range(1, 21))
    assert guard.history.validations()[0, 1:4].tolist() == [1.0, 0.5, 0.75]


def test_wrong_accuracies_are_answered_in_words():
    """An accuracy that is no scalar is refused by name."""
    model = nn.Linear(2, 1)
    with (
        Guard(model, torch.optim.SGD(model.parameters(), 0.01)) as guard,
        pytest.raises(ValueError, match=r"accuracy.*must be a scalar, got a tensor of shape"),
    ):
        guard.validation(1.0, accuracy=torch.ones(3))


def test_the_beginning_is_never_forgotten():
    """First losses and evaluations survive the ring of losses and a resumed run, so that a long run is still held against its start."""
    history = History(losses=64)
    for step in range(300):
        history.add_loss(step, 5.0 if step < 20 else 1.0)
        if step % 50 == 49:
            history.add_validation(step, 1.0, 0.5)
    assert history.first_losses(20).tolist() == [5.0] * 20
    resumed = History(losses=64)
    resumed.load_state_dict(history.state_dict())
    assert resumed.first_losses().tolist() == history.first_losses().tolist()
    assert np.array_equal(resumed.validations(), history.validations(), equal_nan=True)
    assert read_curves(history).first == 5.0


def test_noise_is_told_from_shape():
    """The noise of a curve is that of its second differences: a straight or slowly bent curve has none."""
    rng, x = np.random.default_rng(0), np.arange(40.0)
    assert spread(np.exp(-x / 20)) < 0.01
    found = [spread(np.exp(-x / 20) + 0.1 * rng.standard_normal(40)) for _ in range(200)]
    assert 0.08 < float(np.mean(found)) < 0.12


# ---- the training loss alone

LN10 = math.log(10)
FAULTS = {
    "B1 never falls": (both(loss(lambda t, v: 2.3 + 0.05 * math.sin(t)), times("update_norm", ALL, 2e-3)), "loss_plateau", "learning rate too low"),
    "B2 slow and steady": (both(loss(lambda t, v: 2.3 * (1 - 2e-4 * t)), times("update_norm", ALL, 2e-4)), "update_ratio_low", "learning rate too low"),
    "B3 bounces": (both(loss(lambda t, v: 1 + 0.4 * (-1) ** t, since=20), times("update_norm", ALL, 25.0)), "oscillating_loss", "learning rate too high"),
    "B4 rises": (loss(lambda t, v: v * 1.03 ** (t - 80), since=80), "diverging_loss", "learning rate too high"),
    "B5 once": (loss(lambda t, v: 60.0, since=133, until=134), "loss_spike", "odd batch"),
    "B6 negative": (loss(lambda t, v: -0.5), "negative_loss", "no log-softmax before nll_loss"),
    "B7 underflow": (loss(lambda t, v: 87.3365), "constant_loss", "softmax underflow"),
    "B8 chance": (loss(lambda t, v: LN10), "constant_loss", "same output for every sample"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_shape_of_the_training_loss_has_its_diagnosis_and_cause(fault):
    """Every row of the catalogue about the training loss is heard under its name, with its first cause."""
    edit, name, cause = FAULTS[fault]
    heard = run([RULES[name]()], edit, steps=300)
    assert [f.diagnosis for _, f in heard] == [name]
    assert heard[0][1].causes[0].name == cause


def test_a_plateau_is_an_alarm_by_evidence_only():
    """A loss that never falls informs while all else is healthy, and warns with the first cause that a signal names."""
    flat = loss(lambda t, v: 2.3 + 0.05 * math.sin(t))
    plain = run([RULES["loss_plateau"]()], flat)
    assert [f.severity for _, f in plain] == [Severity.INFO]
    faults = {
        "learning rate too low": times("update_norm", ALL, 2e-3), "learning rate too high": times("update_norm", ALL, 25.0),
        "dead units": at("dead_fraction", 2, 0.6, since=30), "saturated units": at("saturated_fraction", 5, 0.7),
        "same output for every sample": at("sample_variance", 8, 1e-5), "vanishing gradient": times("grad_norm", 1, 1e-5),
        "no gradient": times("grad_norm", ALL, 0.0), "logits out of scale": at("logit_peak", 0, 400.0),
    }  # fmt: skip
    for cause, fault in faults.items():
        heard = run([RULES["loss_plateau"]()], both(flat, fault))
        assert heard, cause
        assert (heard[-1][1].severity, heard[-1][1].causes[0].name) == (Severity.WARNING, cause)
        assert heard[-1][1].remedies[0].change


def test_a_long_plateau_warns_a_classifier_that_knew_nothing():
    """After 1500 steps even a plateau without visible fault is a warning, but not of a network that was trained before."""
    flat = loss(lambda t, v: 2.3 + 0.05 * math.sin(t))
    blank, rule = at("confident_fraction", 0, 0.0), [RULES["loss_plateau"]()]
    assert {f.severity for _, f in run(rule, both(flat, blank), steps=1480)} == {Severity.INFO}
    assert [f.severity for _, f in run(rule, both(flat, blank), steps=1700)] == [Severity.INFO, Severity.WARNING]
    assert {f.severity for _, f in run(rule, flat, steps=1700)} == {Severity.INFO}  # 40 % of its rows were certain in the first batch
    assert {f.severity for _, f in run(rule, both(flat, blank), steps=1700, loss_family="mse")} == {Severity.INFO}


def test_a_plateau_is_counted_from_the_end_of_the_warm_up():
    """While the learning rate rises, and for 100 steps after, nothing is said."""
    flat, rule = loss(lambda t, v: 2.3 + 0.05 * math.sin(t)), [RULES["loss_plateau"]()]
    rising = lambda t, v, f: f.__setitem__("lr", 1e-3 * min(1.0, t / 300))  # noqa: E731
    assert run(rule, both(flat, rising), steps=360) == []
    heard = run(rule, both(flat, rising), steps=500)
    assert [f.severity for _, f in heard] == [Severity.INFO]
    assert 370 <= heard[0][1].step <= heard[0][0]


def test_a_bottleneck_is_no_word_for_a_warm_up():
    """Two curves that stand while the learning rate still rises are not judged."""
    edit, rule = ILL["learning_bottleneck"][0], [RULES["learning_bottleneck"]()]
    assert run(rule, edit, steps=500)
    assert run(rule, both(edit, lambda t, v, f: f.__setitem__("lr", 1e-3 * (t + 1) / 600)), steps=500) == []


def test_standstill_is_a_consequence_of_its_cause():
    """One event: a learning rate far too low has the plateau and the bottleneck below it."""
    flat = both(loss(lambda t, v: 2.3 + 0.05 * math.sin(t)), validation(lambda t, v: 2.3), times("update_norm", ALL, 1e-5))
    heard = run([make() for make in RULES.values()], flat, steps=400)
    assert [f.diagnosis for _, f in heard] == ["update_ratio_low"]
    for symptom in ("loss_plateau", "learning_bottleneck"):
        assert {"dead_relu", "vanishing_gradient", "unchanged_weights", "update_ratio_high", "update_ratio_low", "saturated_softmax"} <= {
            root for root, follow in FOLLOWS.items() if symptom in follow
        }


def test_alternating_data_is_no_alarm_without_large_steps():
    """Neighbouring losses that are opposite inform while updates are healthy, for two data sources do that."""
    odd_even = loss(lambda t, v: 1 + 0.4 * (-1) ** t)
    assert {f.severity for _, f in run([RULES["oscillating_loss"]()], odd_even, steps=300)} == {Severity.INFO}


def test_a_loss_that_bounces_back_is_heard():
    """A loss that fell to 0.3 and stays at 0.9 with large updates is an alarm; after a warm restart it is not."""
    back = both(loss(lambda t, v: 0.3 + 2 * math.exp(-t / 30) + (0.6 if t > 200 else 0)), times("update_norm", ALL, 25.0))
    heard = run([RULES["oscillating_loss"]()], back, steps=500)
    assert [f.severity for _, f in heard] == [Severity.WARNING]
    assert "bounces about 0.9" in heard[0][1].message
    restart = both(back, lambda t, v, f: f.__setitem__("lr", 1e-3 if t > 200 else 1e-4))
    assert run([RULES["oscillating_loss"]()], restart, steps=500) == []


@pytest.mark.parametrize("family", ["unknown", "adversarial", "reinforcement", "gaussian_nll", "elbo", "contrastive"])
def test_a_negative_loss_is_legal_for_many_families(family):
    """Only families that cannot be negative are judged."""
    assert run([RULES["negative_loss"]()], loss(lambda t, v: -1.0), loss_family=family) == []
    assert run([RULES["negative_loss"]()], loss(lambda t, v: -1.0), notes={"loss_is_nonnegative": False}) == []


# ---- real trainings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    load = pytest.importorskip("sklearn.datasets").load_digits
    x, y = load(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def train(model, optimizer, batch, criterion, steps, val=None, every=20):
    """A real run on CPU, watched; the closed guard."""
    with Guard(model, optimizer, halt=None) as guard:
        for step in range(steps):
            x, y = batch(step)
            optimizer.zero_grad()
            value = criterion(model(x), y)
            value.backward()
            optimizer.step()
            guard.step(value)
            if val is not None and step % every == every - 1:
                model.eval()
                with torch.no_grad():
                    guard.validation(criterion(model(val[0]), val[1]))
                model.train()
    return guard


def mlp(inputs=64, outputs=10, width=64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def drawn(x, y, size, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def batch(step):
        rows = torch.randint(len(x), (size,), generator=rng)
        return x[rows], y[rows]

    return batch


def alarms(guard):
    return [f.diagnosis for f in guard.findings if f.severity >= Severity.WARNING]


@pytest.mark.parametrize("size", [4, 32])
def test_a_healthy_run_on_digits_is_silent(digits, size):
    """A network that learns digits from small batches raises no alarm with an evaluation every 20 steps."""
    x, y = digits
    model = mlp()
    guard = train(model, torch.optim.SGD(model.parameters(), 0.05), drawn(x[:1400], y[:1400], size), F.cross_entropy, 700, (x[1400:], y[1400:]))
    assert alarms(guard) == []
    assert guard.verdict in ("learning", "done")


def test_learning_by_heart_is_heard_on_real_data(digits):
    """200 samples, a third of them with random labels: the turning point is found, and the weights of that step were the best."""
    x, y = digits
    rng = torch.Generator().manual_seed(1)
    noisy = torch.where(torch.rand(200, generator=rng) < 0.3, torch.randint(10, (200,), generator=rng), y[:200])
    model = mlp(width=128)
    guard = train(model, torch.optim.Adam(model.parameters(), 1e-3), drawn(x[:200], noisy, 20), F.cross_entropy, 700, (x[1000:], y[1000:]))
    assert "overfitting" in alarms(guard)
    finding = next(f for f in guard.findings if f.diagnosis == "overfitting")
    rows = guard.history.validations()
    assert guard.verdict == "overfitting"
    assert finding.step == int(rows[rows[:, 1].argmin(), 0]) == guard.verdict.best_step


def test_xor_and_parity_stand_still_without_alarm():
    """Tasks that learn nothing for hundreds of steps and then everything raise no alarm."""
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    guard = train(model, torch.optim.SGD(model.parameters(), 0.2), lambda step: (x, y), F.binary_cross_entropy_with_logits, 1500)
    assert alarms(guard) == []
    rng = torch.Generator().manual_seed(0)

    def parity(step):
        bits = torch.randint(0, 2, (64, 20), generator=rng).float() * 2 - 1
        return bits, (bits[:, :3].prod(1) > 0).long()

    model = mlp(20, 2, 128)
    guard = train(model, torch.optim.SGD(model.parameters(), 0.05), parity, F.cross_entropy, 700)
    assert alarms(guard) == []


@pytest.mark.parametrize(
    ("criterion", "target", "heard"),
    [
        (lambda out, y: F.nll_loss(out.softmax(1), y), None, ["negative_loss"]),
        (F.binary_cross_entropy_with_logits, -20.0, ["negative_loss"]),
        (lambda out, y: (F.cross_entropy(out, y, reduction="none") * torch.linspace(-1, 0.5, len(y))).mean(), None, []),  # a policy gradient
        (lambda out, y: F.cross_entropy(out, y) - 5 * torch.distributions.Categorical(logits=out).entropy().mean(), None, []),  # an entropy bonus
        (lambda out, y: -F.cosine_similarity(out, torch.ones_like(out)).mean(), None, []),
    ],
)
def test_a_negative_loss_is_judged_by_its_graph(digits, criterion, target, heard):
    """What cannot be negative is heard where the graph shows nothing else; what may be negative is not."""
    x, y = digits
    y = y if target is None else torch.full((len(y), 10), target)
    model = mlp()
    guard = train(model, torch.optim.SGD(model.parameters(), 1e-3), drawn(x, y, 32), criterion, 60)
    assert [n for n in alarms(guard) if n == "negative_loss"] == heard


def test_an_evaluation_stays_on_its_device():
    """Loss and accuracies of an evaluation are put together where they are, without a read: on meta every read raises."""
    from lossguard.pulses import evaluation

    told = evaluation(torch.ones((), device="meta"), 0.5, torch.ones(1, device="meta", dtype=torch.float16))
    assert (told.device.type, told.shape, told.dtype) == ("meta", (3,), torch.float32)
    assert evaluation(1, torch.tensor(0.25), None).tolist()[:2] == [1.0, 0.25]
