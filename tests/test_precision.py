"""Half precision, frozen weights, skipped steps, Adam's epsilon: real small runs, ill and healthy."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from models import criterion, make_batch, mlp
from no_read import no_read_device
from torch import nn

from lossguard import Guard, Severity, TrainingHalted

HALF, BF16 = torch.float16, torch.bfloat16


def train(model, optimizer, *, steps=80, dtype=torch.float32, scale=1.0, before=lambda i: None, after=lambda i: None, clear=True, scaler=None):
    with Guard(model, optimizer, scaler=scaler) as guard:
        for i in range(steps):
            before(i)
            x, y = make_batch("mlp", seed=i, n=16)
            loss = criterion(model(x.to(dtype)).float(), y) * (scale(i) if callable(scale) else scale)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=clear)
            after(i)
            try:
                guard.step(loss if scaler is None else loss.detach().nan_to_num(1.0, 1.0, 1.0))
            except TrainingHalted:
                break
    return guard


def names(guard):
    return [f.diagnosis for f in guard.findings if f.severity >= Severity.WARNING]


def tree(guard):
    return {f.diagnosis for g in guard.findings for f in (g, *g.consequences)}


# ---- frozen weights


def frozen(freeze, *, clear, thaw=10**9, optimizer=torch.optim.AdamW):
    model = mlp()
    weight = model[0].weight
    return train(model, optimizer(model.parameters(), lr=1e-2, weight_decay=0.1), clear=clear,
                 before=lambda i: weight.requires_grad_(not freeze <= i < thaw))  # fmt: skip


def test_a_frozen_weight_that_the_optimizer_moves_is_named():
    """Frozen with a gradient of zeros left, AdamW decays it all the same."""
    (finding,) = frozen(20, clear=False).findings
    assert (finding.diagnosis, finding.where, finding.step, finding.severity) == ("frozen_weights_changed", "0.weight", 20, Severity.WARNING)
    assert finding.remedies[0].change == {"freeze": True, "parameter": "0.weight"}


@pytest.mark.parametrize(
    "healthy",
    [lambda: frozen(20, clear=True), lambda: frozen(20, clear=True, thaw=40), lambda: frozen(20, clear=False, thaw=22)],
    ids=["cleared", "thawed", "for a moment"],
)
def test_a_frozen_weight_that_stays_or_is_thawed_is_silent(healthy):
    """Without a gradient the optimizer leaves it alone; trained again it may move."""
    assert names(healthy()) == []


class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x) + 0.1 * self.teacher(x)


@pytest.mark.parametrize("held", [False, True])
def test_what_other_code_moves_is_its_own_business(held):
    """A teacher's moving average is no fault, held by the optimizer or not."""
    model = Distilled()

    def average(i):
        with torch.no_grad():
            for a, b in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                a.lerp_(b, 0.1)

    assert names(train(model, torch.optim.AdamW((model if held else model.student).parameters(), lr=1e-3), after=average)) == []


# ---- rounding and overflow


def in_half(dtype, lr, *, optimizer=torch.optim.AdamW, steps=80, model=None):
    torch.manual_seed(0)
    model = (model or mlp(width=64)).to(dtype)
    return train(model, optimizer(model.parameters(), lr=lr), dtype=dtype, steps=steps)


@pytest.mark.parametrize(("lr", "optimizer", "steps"), [(1e-6, torch.optim.AdamW, 80), (1e-4, torch.optim.SGD, 80), (1e-4, torch.optim.AdamW, 150)])
def test_updates_that_bfloat16_rounds_away_are_named_so(lr, optimizer, steps):
    """Nearly every element stays as it was although it has a gradient, or nine in ten do in a run that learns nothing by it
    (float32 learns at the same rate): the cause is rounding, the remedy master weights."""
    finding = in_half(BF16, lr, optimizer=optimizer, steps=steps).findings[0]
    assert finding.diagnosis == "update_ratio_low" and finding.causes[0].name == "rounding" and finding.remedies[0].change == {"master_weights": True}


@pytest.mark.parametrize(("dtype", "lr", "optimizer"), [(BF16, 1e-3, torch.optim.AdamW), (HALF, 0.05, torch.optim.SGD)])
def test_halves_that_learn_are_silent(dtype, lr, optimizer):
    """Pure half-precision training whose updates are larger than the spacing raises nothing."""
    assert names(in_half(dtype, lr, optimizer=optimizer, steps=150)) == []


class Loud(nn.Module):
    """Its middle layer gives about as much as it is told."""

    def __init__(self, loudness):
        super().__init__()
        self.inner, self.loud, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.loudness = loudness

    def forward(self, x):
        wide = self.loud(self.inner(x).tanh() * self.loudness)
        return self.head(wide / self.loudness)


def loud(loudness, dtype):
    torch.manual_seed(0)
    model = Loud(loudness).to(dtype)
    return train(model, torch.optim.SGD(model.parameters(), lr=0.01), dtype=dtype, steps=30)


def test_an_output_near_the_end_of_float16_is_named_before_it_overflows():
    """The module whose output passes half of 65504 is named, and no other."""
    guard = loud(42000.0, HALF)
    finding = next(f for f in guard.findings if f.diagnosis == "overflow_risk")
    assert finding.where == "loud (forward)" and 0.5 < finding.evidence[0].value < 1.0


@pytest.mark.parametrize(("loudness", "dtype"), [(100.0, HALF), (42000.0, BF16), (42000.0, torch.float32)])
def test_there_is_no_overflow_ahead_elsewhere(loudness, dtype):
    """Moderate outputs, and dtypes that reach further, are silent; float32 is not even measured."""
    guard = loud(loudness, dtype)
    assert "overflow_risk" not in tree(guard)
    assert ("activation_reach" in guard.coverage.observed) == (dtype == HALF)
    assert ("rounded_away" in guard.coverage.observed) == (dtype != torch.float32)


def test_the_gradients_of_a_scaled_loss_are_near_the_limit_by_design():
    """Gradients in float16 are looked at only where no loss scaler is at work."""
    torch.manual_seed(0)
    model = mlp().to(HALF)
    guard = train(model, torch.optim.SGD(model.parameters(), lr=0.01), dtype=HALF, steps=5)
    assert 0 < guard.history.last("gradient_reach", 1)[0].max() < 0.1


# ---- Adam's epsilon


@pytest.mark.parametrize(("scale", "found"), [(1e-12, ["vanishing_gradient"]), (1e-5, [])])
def test_gradients_below_adams_epsilon(scale, found):
    """A loss so small that epsilon swallows its gradients is named; a small one that Adam can still scale is not."""
    torch.manual_seed(0)
    model = mlp()
    guard = train(model, torch.optim.Adam(model.parameters(), lr=1e-3), scale=scale)
    assert names(guard) == found
    for finding in guard.findings:
        assert finding.causes[0].name == "adam epsilon" and 0 < finding.remedies[0].change["eps"] < 1e-8


@pytest.mark.parametrize(("eps", "found"), [(1e-8, [("nonfinite_weight", "adam epsilon")]), (1e-4, [])])
def test_an_epsilon_that_is_nothing_in_float16(eps, found):
    """Weights kept in float16: Adam's 1e-8 is 0 there, and where a gradient is 0 as well the update is 0/0. 1e-4 is not."""
    torch.manual_seed(0)
    model = mlp().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps)
    with Guard(model, optimizer, halt=None) as guard:
        for _ in range(30):
            x = torch.randn(16, 16)
            x[:, 0] = 0.0  # an input that is always 0
            loss = F.cross_entropy(model(x.half()).float(), x[:, 1:5].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    told = [(f.diagnosis, f.causes[0].name) for f in guard.findings if f.severity >= Severity.HALT]
    assert told[:1] == found
    assert all(f.remedies[0].change["eps"] == 1e-4 for f in guard.findings if f.causes[0].name == "adam epsilon")


# ---- skipped steps


class Engine(torch.optim.Optimizer):
    """Gradient descent that leaves out the steps that ``skips`` says."""

    def __init__(self, params, skips):
        super().__init__(params, {"lr": 0.1})
        self.skips, self.steps = skips, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups if not self.skips(self.steps) else ():
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


def engine(skips, steps=150):
    torch.manual_seed(0)
    model = mlp()
    return train(model, Engine(model.parameters(), skips), steps=steps)


def test_an_engine_that_skips_by_itself_is_named():
    """A third of the updates left out, or all from some step on, are skipped steps; the weights that stand still follow from them."""
    draw = random.Random(0)
    assert names(engine(lambda n: draw.random() < 0.3)) == ["skipped_steps"]
    (finding,) = engine(lambda n: n > 20).findings
    assert finding.diagnosis == "skipped_steps" and finding.step == 20
    assert finding.causes[0].name == "an engine skips updates"


@pytest.mark.parametrize("period", [2, 3, 4, 7])
def test_accumulation_inside_an_optimizer_is_no_skip(period):
    """Updates in a fixed rhythm are meant, and a rare skip is no alarm."""
    assert "skipped_steps" not in tree(engine(lambda n: n % period != 0))
    assert names(engine(lambda n: n % 97 == 0)) == []


def scaled(bad, *, steps=150, growth=2000):
    torch.manual_seed(0)
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=growth)
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler, steps=steps, scale=lambda i: float("inf") if bad(i) else 1.0)


@pytest.mark.parametrize("bad", [lambda i: False, lambda i: i < 12, lambda i: i % 60 == 59])
def test_a_loss_scaler_that_searches_is_silent(bad):
    """A dozen skips at the start and one at each growth are how a loss scaler works."""
    assert names(scaled(bad, growth=20)) == []


def test_a_collapsing_loss_scale_is_heard_before_it_halts():
    """Overflows from step 60 on are skipped steps, then a halt; and nobody says that the optimizer is never called."""
    guard = scaled(lambda i: i >= 60)
    assert names(guard)[0] == "skipped_steps" and 50 < guard.findings[0].step <= 61
    assert "nonfinite_gradient" in names(guard) and "unchanged_weights" not in tree(guard)


def test_every_third_step_skipped_is_a_collapse():
    """No eight skips come in a row, and still the scale falls for ever."""
    guard = scaled(lambda i: i % 3 == 0, steps=120, growth=10**6)
    assert names(guard) == ["skipped_steps"]
    assert "loss scale" in guard.findings[0].message


def test_a_constant_loss_scale_is_no_collapse():
    """A scale that somebody holds fixed never falls."""
    guard = scaled(lambda i: False, steps=60, growth=10**9)
    assert names(guard) == [] and set(guard.history.fact("loss_scale")) == {65536.0}


def test_the_halves_side_reads_nothing():
    """Half precision, a frozen weight and fused attention run on meta, where nothing can be read."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).to(HALF).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with Guard(model, optimizer) as guard:
        for i in range(5):
            model[0].weight.requires_grad_(i < 2)
            F.cross_entropy(model(torch.empty(8, 16, dtype=HALF, device="meta")).float(), torch.zeros(8, dtype=torch.long, device="meta")).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            guard.step(torch.empty((), device="meta"))
    assert guard.findings == [] and guard.steps == 5
    assert not [why for why in guard.coverage.not_observed.values() if "failed" in why]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_halves_and_frozen_weights_are_measured_without_a_read(dtype):
    """On a device where every read raises, a half-precision run with a frozen weight goes through with all its signals."""
    with no_read_device() as device:
        torch.manual_seed(0)
        model = mlp().to(dtype).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with Guard(model, optimizer, lag=2) as guard:
            for i in range(8):
                model[0].weight.requires_grad_(i < 3)
                x, y = make_batch("mlp", device, seed=i)
                loss = criterion(model(x.to(dtype)), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                guard.step(loss.float())
    seen = guard.coverage.observed
    assert "frozen_update" in seen and "weight_range" in seen
    assert ("activation_reach" in seen, "rounded_away" in seen) == (dtype == torch.float16, dtype != torch.float32)
    assert names(guard) == ["frozen_weights_changed"]


def test_a_hinge_loss_that_reached_zero_has_weights_that_rest():
    """Without a loss there is no gradient and no update: success, neither skipped nor unchanged."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = x[:, 0].sign()
    x[:, 0] += 3 * y
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Guard(model, optimizer) as guard:
        for i in range(400):
            rows = torch.arange(8 * i, 8 * i + 8) % 256
            loss = F.relu(1 - y[rows] * model(x[rows])[:, 0]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert guard.history.losses()[-50:].max() == 0.0
    assert names(guard) == []
