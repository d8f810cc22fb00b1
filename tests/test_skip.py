"""A bad update is as if its batch had never been shown: weights, moments and counters, bit for bit, for every optimizer and gate."""

from __future__ import annotations

import math
import re

import pytest
import torch
from skip_runs import FUSED, GATES, OTHERS, QUICK, Lion, batch, bits, everything, finite, loss_of, network, run
from torch import nn

from lossguard import Guard, Severity, TrainingHalted
from lossguard.device.spikes import Limit

STEPS = range(14)
BOTH = [*(("found_inf", name) for name in FUSED), *(("restore", name) for name in OTHERS)]


def make(by, name):
    return (FUSED if by == "found_inf" else OTHERS)[name]


def bad_batches(gate):
    """A spike can only be told from the fifth update on."""
    return (7, 10, 11) if gate == "spike" else (0, 7, 10, 11)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("by", "name"), BOTH)
def test_a_bad_batch_is_as_if_never_shown(by, name, gate):
    """A run with bad batches ends where the run without them ends."""
    bad = bad_batches(gate)
    model, optimizer, guard = run(make(by, name), STEPS, bad, gate=gate, skip_by=by)
    reference, other, none = run(make(by, name), [i for i in STEPS if i not in bad], gate=gate, guarded=False)
    assert none is None and finite(model)
    assert everything(model, optimizer) == everything(reference, other)
    reason = "exploding_gradient" if gate == "spike" else "nonfinite_gradient"
    assert guard.skipped[reason] == len(bad) == sum(guard.skipped.values())


@pytest.mark.parametrize(("by", "name"), [pair for pair in BOTH if pair[1] not in ("muon", "adafactor")])
def test_half_precision_weights(by, name):
    """The same with bfloat16 weights. The momentum of torch's fused SGD is left out: without any guard it differs from run to run (2.13, CPU)."""
    bad = (0, 7)
    ends = [
        run(make(by, name), [i for i in STEPS if not less or i not in bad], bad, dtype=torch.bfloat16, skip_by=by, guarded=not less) for less in (False, True)
    ]
    left_out = "momentum_buffer" if by == "found_inf" else "nothing"
    told = [{key: value for key, value in everything(*end[:2]).items() if left_out not in key} for end in ends]
    assert told[0] == told[1] and any("weights" in key for key in told[0])
    assert finite(ends[0][0])


@pytest.mark.parametrize("gate", ["nan", "spike"])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(("by", "name"), [("found_inf", "adamw"), ("restore", "momentum")])
def test_judged_before_clipping_and_with_accumulation(by, name, micro, gate):
    """Clipping, which hides a spike and spreads a NaN, and a bad micro-batch among good ones change nothing."""
    bad = (7, 10)
    model, optimizer, guard = run(make(by, name), STEPS, bad, gate=gate, clip=0.01, micro=micro, skip_by=by)
    reference, other, _ = run(make(by, name), [i for i in STEPS if i not in bad], gate=gate, clip=0.01, micro=micro, guarded=False)
    assert everything(model, optimizer) == everything(reference, other)
    assert sum(guard.skipped.values()) == 2


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("by", "name", "gate"), [("found_inf", "adamw", "nan"), ("found_inf", "adamw", "spike"), ("restore", "momentum", "spike")])
def test_beside_a_loss_scaler(by, name, gate, clip, known):
    """With a GradScaler, told to the guard or not, either flag skips, and a skip of ours leaves the scale alone."""

    def train(batches, guarded):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        model, guard = network(), None
        optimizer = make(by, name)(list(model.parameters()))
        if guarded:
            guard = Guard(model, optimizer, skip=GATES[gate][0], skip_by=by, scaler=scaler if known else None, halt=None)
        for i in batches:
            optimizer.zero_grad()
            loss = loss_of(model, i, GATES[gate][1] if i in (7, 10) else 1.0)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            if guard:
                guard.step(loss.detach())
        if guard:
            guard.close()
        return model, optimizer, guard, scaler.get_scale()

    model, optimizer, guard, scale = train(STEPS, True)
    reference, other, _, _ = train([i for i in STEPS if i not in (7, 10)], False)
    assert everything(model, optimizer) == everything(reference, other)
    assert scale == (64.0 if gate == "nan" else 256.0)
    assert guard.skipped == ({"nonfinite_gradient": 0} if gate == "nan" else {"exploding_gradient": 2})


def test_a_scaler_that_counts_devices_skips_too():
    """A foreign flag of 2.0, as a scaler over two devices gives, leaves the update out: torch itself would take it."""
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with Guard(model, optimizer, skip={"nonfinite_gradient"}):
        loss_of(model, 0).backward()
        before = everything(model)
        optimizer.found_inf = theirs = torch.tensor(2.0)
        optimizer.step()
        assert everything(model) == before
        assert optimizer.found_inf is theirs


def test_a_search_for_the_scale_is_no_skipping_of_ours():
    """A dozen overflows in a row at the start of fp16 are the scaler's own: no skip is counted, nothing is reported, nothing halts."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, growth_interval=10**6)
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, scaler=scaler) as guard:
        for i in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, i)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(loss.detach())
    assert 2.0**10 < scaler.get_scale() <= 2.0**18
    assert guard.skipped == {"nonfinite_gradient": 0}
    assert not [f for f in guard.findings if f.diagnosis in ("skipped_steps", "nonfinite_gradient")]


def test_overflow_for_ever_halts_under_a_scaler():
    """Gradients that no scale makes finite halt the run although each update is left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with pytest.raises(TrainingHalted), Guard(model, optimizer, skip={"nonfinite_gradient"}, scaler=scaler) as guard:
        for i in range(80):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i, math.nan)).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(1.0)
    assert finite(model)


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("sick", ["g", "d"])
@pytest.mark.parametrize("by", ["found_inf", "restore"])
def test_of_several_optimizers_each_decides_for_itself(by, sick):
    """In adversarial training a NaN of one network leaves out its own update only."""
    model = Pair()
    fused = by == "found_inf"
    both = {"d": torch.optim.AdamW(model.d.parameters(), lr=0.01, fused=fused), "g": torch.optim.AdamW(model.g.parameters(), lr=0.01, fused=fused)}
    with Guard(model, [both["d"], both["g"]], skip={"nonfinite_gradient"}, skip_by=by, halt=None, loss_family="adversarial") as guard:
        for i in range(12):
            generator = torch.Generator().manual_seed(i)
            real, noise = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
            for name in ("d", "g"):
                both[name].zero_grad()
                fake = model.g(noise)
                loss = (model.d(fake.detach()).mean() - model.d(real).mean()) if name == "d" else -model.d(fake).mean()
                before = everything(getattr(model, name), both[name])
                (loss * (math.nan if i == 6 and name == sick else 1.0)).backward()
                both[name].step()
                assert (everything(getattr(model, name), both[name]) == before) == (i == 6 and name == sick)
            guard.step({"d": 1.0, "g": 1.0})
    assert finite(model)
    assert guard.history.last("total_skips", 1)[0].tolist() == [float(sick == "d"), float(sick == "g")]


# ---- ways of stepping


@pytest.mark.parametrize(
    ("kind", "by", "name"),
    [
        ("step", "found_inf", "adamw"),
        ("function", "restore", "adamw foreach"),
        *(pytest.param("whole", *how, marks=pytest.mark.slow) for how in [("found_inf", "nesterov"), ("restore", "adamw foreach")]),
    ],
)
def test_a_compiled_step(kind, by, name):
    """A compiled optimizer step, and a compiled function of forward, backward and step, honour the gate."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model = network()
    optimizer = make(by, name)(list(model.parameters()))
    update = torch.compile(optimizer.step, backend="eager") if kind == "step" else torch.compile(lambda: optimizer.step(), backend="eager")

    def body(x, y, factor):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) * factor
        loss.backward()
        optimizer.step() if kind == "whole" else update()
        return loss

    train = torch.compile(body, backend="eager") if kind == "whole" else body
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by, halt=None, dense=0, every=100) as guard:
        for i in range(6):
            before = everything(model, optimizer)
            loss = train(*batch(i), torch.tensor(math.nan if i in (0, 3) else 1.0))
            assert finite(model)
            assert (i == 3) == (everything(model, optimizer) == before) or i == 0
            guard.step(loss.detach())
        assert guard._skipping.gates[0].totals.tolist() == [2.0, 0.0, 6.0]
        assert "skip" not in guard.coverage.not_observed


@pytest.mark.parametrize(("by", "name"), [("found_inf", "adamw"), ("restore", "nadam"), ("restore", "lion")])
def test_a_step_with_a_closure(by, name):
    """Where the backward pass runs inside of the step, what it ends in is judged."""
    build = make(by, name)
    ends = []
    for bad, skip in (((0, 5), ()), ((), (0, 5))):
        model = network()
        optimizer = build(list(model.parameters()))
        with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by, halt=None) as guard:
            for i in (i for i in range(10) if i not in skip):

                def closure(model=model, optimizer=optimizer, i=i, bad=bad):
                    optimizer.zero_grad()
                    loss = loss_of(model, i, math.nan if i in bad else 1.0)
                    loss.backward()
                    return loss

                optimizer.step(closure)
                guard.step(1.0)
        ends.append(everything(model, optimizer))
    assert ends[0] == ends[1]


def test_an_update_whose_backward_pass_nobody_saw_is_judged_at_the_step():
    """Gradients that come from elsewhere are judged when the optimizer steps, and coverage says what that misses."""
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with Guard(model, optimizer, skip={"exploding_gradient"}, phases="explicit", halt=None) as guard:
        for i in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan if i == 2 else 0.1)
            before = everything(model, optimizer)
            optimizer.step()
            assert (everything(model, optimizer) == before) == (i == 2)
            guard.step(1.0)
        assert "after clipping" in guard.coverage.not_observed["exploding gradients before clipping"]


# ---- spikes


def norms_of(values, limit, by="found_inf"):
    """An optimizer that is given these gradient norms, one after the other. Which updates were left out?"""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, fused=True)
    left = []
    with Guard(model, optimizer, skip={"exploding_gradient": limit}, halt=None) as guard:
        for value in values:
            optimizer.zero_grad()
            (model.weight.sum() * value).backward()
            before = model.weight.detach().clone()
            optimizer.param_groups[0]["lr"] = 1.0 / abs(value) if value else 1.0
            optimizer.step()
            left.append(bool(torch.equal(before, model.weight.detach())))
            guard.step(1.0)
        gate = guard._skipping.gates[0]
    return left, gate


def test_nothing_is_a_spike_before_the_warmup():
    """The first norms, however far apart, are all taken."""
    left, _ = norms_of([10.0 ** (k % 5) for k in range(63)], Limit())
    assert not any(left)


def test_the_statistics_are_those_of_the_accepted_norms():
    """The running mean and deviation are those of the logarithms of accepted norms, and a spike enters neither."""
    values = [math.exp(0.3 * math.sin(k)) for k in range(40)]
    _, with_spikes = norms_of([*values[:20], 1e4, 1e6, *values[20:]], Limit(warmup=8))
    _, without = norms_of(values, Limit(warmup=8))
    assert with_spikes.totals.tolist() == [2.0, 2.0, 42.0]
    assert bits(with_spikes.spikes.numbers) == bits(without.spikes.numbers)
    logs = torch.tensor([math.log(v) for v in values], dtype=torch.float64)
    torch.testing.assert_close(without.spikes.mean.double(), logs.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without.spikes.variance.double(), logs.var(unbiased=False), rtol=1e-3, atol=1e-6)


def test_a_level_that_shifts_for_good_is_learnt():
    """A norm that grows a thousandfold for good is left out ten times, then taken; the gate never locks itself out."""
    left, gate = norms_of([1.0] * 20 + [1e3] * 100, Limit(warmup=8))
    assert left == [False] * 20 + [True] * 10 + [False] * 90
    assert float(gate.spikes.mean) == pytest.approx(math.log(1e3), abs=1e-3)


def test_wide_norms_have_a_wide_limit():
    """Where norms vary over decades the deviation, and not the factor, is the limit."""
    values = [10.0 ** (1.5 * math.sin(2.4 * k)) for k in range(100)]
    left, _ = norms_of([*values, 40.0 * 10**1.5, 1e12], Limit(warmup=16))
    assert left == [False] * 101 + [True]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e38, -1e38])
def test_odd_norms_leave_the_statistics_alone(value):
    """Zero, non-finite and overflowing norms enter no statistics; all but zero are left out."""
    left, gate = norms_of([1.0] * 12 + [value] * 3 + [1.0] * 3, Limit(warmup=4))
    assert left[12:15] == [value != 0.0] * 3 or value == 0.0
    assert not any(left[15:])
    assert float(gate.spikes.mean) == 0.0 and torch.isfinite(gate.spikes.numbers).all()


# ---- what is kept from the weights ends no run


@pytest.mark.parametrize("by", ["found_inf", "restore"])
def test_a_bad_batch_ends_no_run(by):
    """With skip= a batch of NaN is told as a warning and training goes on; without it the run halts there."""

    def train(**words):
        model = network()
        optimizer = make(by, "adamw" if by == "found_inf" else "rmsprop")(list(model.parameters()))
        heard = []
        with Guard(model, optimizer, sinks=[heard.append], **words) as guard:
            for i in range(40):
                x, y = batch(i)
                x = x * math.nan if i in (12, 31) else x
                guard.batch(x, y)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                guard.step(loss)
        return guard, heard, finite(model)

    guard, heard, sound = train(skip={"nonfinite_gradient"}, skip_by=by)
    assert sound and guard.steps == 40 and guard.skipped["nonfinite_gradient"] == 2
    assert heard and all(f.diagnosis == "nonfinite_input" and f.severity == Severity.WARNING for f in heard)
    assert "skipped on the device" in heard[0].note
    with pytest.raises(TrainingHalted):
        train()


def test_weights_that_turn_ill_by_themselves_end_the_run_all_the_same():
    """With skip= a NaN that is written to a weight halts, also while a bad batch is told of as a warning."""
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    guard = Guard(model, optimizer, skip={"nonfinite_gradient"})
    with pytest.raises(TrainingHalted) as caught:
        for i in range(60):
            x, y = batch(i)
            guard.batch(x * math.nan if i == 12 else x, y)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x * math.nan if i == 12 else x), y)
            loss.backward()
            optimizer.step()
            if i == 20:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = math.nan
            guard.step(loss)
    assert caught.value.finding.diagnosis == "nonfinite_weight"
    guard.close()


# ---- the bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("by", "name"), [("found_inf", "adamw"), ("found_inf", "nesterov"), ("restore", "rmsprop"), ("restore", "lion")])
def test_the_halt_at_the_bound_leaves_the_last_good_weights(by, name, dtype):
    """Twenty updates left out in a row halt the run, and everything is as the last good step left it."""
    model = network(dtype)
    optimizer = make(by, name)(list(model.parameters()))
    guard = Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by, mute={"nonfinite_loss"})
    good = None
    with pytest.raises(TrainingHalted) as caught:
        for i in range(60):
            optimizer.zero_grad()
            loss_of(model, i, math.nan if i >= 12 else 1.0).backward()
            optimizer.step()
            if i == 11:
                good = everything(model, optimizer)
            guard.step(1.0)
    assert everything(model, optimizer) == good
    assert caught.value.finding.diagnosis == "skipped_steps" and caught.value.finding.step == 12
    assert guard.steps == 12 + 20
    guard.close()


def test_what_becomes_non_finite_after_the_backward_pass_is_left_out():
    """A gradient that turns NaN between the backward pass and the step, in whatever way, does not reach the weights."""
    for by, name in (("found_inf", "adamw"), ("restore", "momentum")):
        model = network()
        optimizer = make(by, name)(list(model.parameters()))
        with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by, halt=None) as guard:
            for i in range(6):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                if i == 2:
                    model[0].bias.grad.div_(0.0)
                if i == 4:
                    model[2].bias.grad = torch.full((3,), math.inf)
                before = everything(model, optimizer)
                optimizer.step()
                assert (everything(model, optimizer) == before) == (i in (2, 4))
                guard.step(1.0)


def test_skips_between_good_updates_halt_too():
    """A run that leaves out every second update halts in the end, though never two are left out in a row."""
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with pytest.raises(TrainingHalted) as caught, Guard(model, optimizer, skip={"nonfinite_gradient"}) as guard:
        for i in range(400):
            optimizer.zero_grad()
            loss_of(model, i, 1.0).backward()
            if i % 2:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
            guard.step(1.0)
    assert caught.value.finding.diagnosis == "skipped_steps"
    assert caught.value.finding.evidence[0].value >= 100


def test_counters_survive_a_resume():
    """A run that is resumed amid skips halts where the uninterrupted one does, with the same counts."""

    def train(model, optimizer, guard, steps):
        for i in steps:
            optimizer.zero_grad()
            loss_of(model, i, math.nan if i >= 12 else 1.0).backward()
            optimizer.step()
            guard.step(1.0)

    words = {
        "skip": {"nonfinite_gradient": None, "exploding_gradient": QUICK},
        "mute": {"nonfinite_loss", "nonfinite_gradient"},
    }
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with Guard(model, optimizer, **words) as guard:
        train(model, optimizer, guard, range(22))
        state, weights, moments = guard.state_dict(), model.state_dict(), optimizer.state_dict()
        torch.save(state, buffer := __import__("io").BytesIO())
        statistics = bits(guard._skipping.gates[0].spikes.numbers)
        limit = bits(guard._skipping.gates[0].spikes.limit)
    buffer.seek(0)
    again = network(seed=1)
    again.load_state_dict(weights)
    other = FUSED["adamw"](list(again.parameters()))
    other.load_state_dict(moments)
    guard = Guard(again, other, **words)
    guard.load_state_dict(torch.load(buffer, weights_only=True))
    assert bits(guard._skipping.gates[0].spikes.numbers) == statistics
    assert bits(guard._skipping.gates[0].spikes.limit) == limit
    with pytest.raises(TrainingHalted):
        train(again, other, guard, range(22, 60))
    assert guard.steps == 32
    assert guard.skipped == {"nonfinite_gradient": 20, "exploding_gradient": 0}
    guard.close()


def test_an_older_state_begins_the_counters_anew():
    """A checkpoint without counters, or of a run without skip=, is taken."""
    model = network()
    optimizer = FUSED["adamw"](list(model.parameters()))
    with Guard(model, optimizer) as guard:
        state = guard.state_dict()
    with Guard(model, optimizer, skip={"nonfinite_gradient"}) as guard:
        guard.load_state_dict(state)
        guard.load_state_dict({k: v for k, v in state.items() if k != "skipping"})
        assert guard._skipping.gates[0].totals[:2].tolist() == [0.0, 0.0]


# ---- what cannot be


class Counting(Lion):
    """A host counter in the state."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.state:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1


class CountingAside(Lion):
    """A host counter beside the state."""

    updates = 0

    def step(self, closure=None):
        super().step()
        self.updates += 1


class FromGradient(Lion):
    """Begins its state from the first gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                previous = self.state[p].setdefault("previous", p.grad.clone())
                p.sub_(0.01 * (p.grad + previous))
                previous.copy_(p.grad)


class Aside(Lion):
    """Keeps tensors beside the state."""

    def step(self, closure=None):
        super().step()
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


class Around(Lion):
    """Wraps another optimizer."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.base = sgd_of(params)


def sgd_of(params):
    return torch.optim.SGD(params, lr=0.1)


class Broken(Lion):
    """Cannot run on a CPU."""

    def step(self, closure=None):
        raise RuntimeError("needs a kernel that is not there")


class Liar(Lion):
    """Says that it honours found_inf."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params)
        for group in self.param_groups:
            group["fused"] = True


MODEL = network()
REFUSED = {
    "host counter": (Counting, "restore", r"Counting counts on the host \('count'\), which cannot know of a skip.*keep the counter as a tensor"),
    "counter aside": (CountingAside, "restore", r"counts on the host \('updates'\)"),
    "from gradient": (FromGradient, "restore", r"begins its state from the first gradient.*make the guard after the first update"),
    "tensors aside": (Aside, "restore", r"keeps tensors outside of its state \(\.slow\)"),
    "wrapper": (Around, "restore", r"Around wraps another optimizer \(\.base\); give that one to the guard"),
    "broken": (Broken, "restore", r"could not be tried on a small copy on the CPU \(RuntimeError: needs a kernel"),
    "lbfgs": (lambda p: torch.optim.LBFGS(p), "restore", r"LBFGS could not be tried"),
    "unfused": (sgd_of, "found_inf", r"SGD does not honour found_inf.*skip_by='restore', which keeps a copy of weights and state.*halt= instead of skip="),
    "liar": (Liar, "found_inf", r"Liar says that it honours found_inf, and moves its weights all the same"),
    "unknown way": (sgd_of, "rollback", r"unknown skip_by 'rollback'; expected 'found_inf'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_left_out_exactly_is_refused(name):
    """An optimizer whose updates cannot be left out exactly is refused in words, and stays as it was."""
    build, by, words = REFUSED[name]
    optimizer = build(list(MODEL.parameters()))
    before, random = everything(MODEL, optimizer), torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        Guard(MODEL, optimizer, skip={"nonfinite_gradient"}, skip_by=by)
    assert everything(MODEL, optimizer) == before and torch.equal(random, torch.get_rng_state())
    assert not optimizer._optimizer_step_pre_hooks and not hasattr(optimizer, "found_inf")


def test_state_that_begins_from_a_gradient_is_sound_later():
    """After its first update such an optimizer's updates are put back exactly."""
    ends = []
    for bad, skip in (((4,), ()), ((), (4,))):
        model = network()
        optimizer = FromGradient(list(model.parameters()))
        loss_of(model, 0).backward()
        optimizer.step()
        with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by="restore", halt=None) as guard:
            for i in (i for i in range(1, 9) if i not in skip):
                optimizer.zero_grad()
                loss_of(model, i, math.nan if i in bad else 1.0).backward()
                optimizer.step()
                guard.step(1.0)
        ends.append(everything(model, optimizer))
    assert ends[0] == ends[1]


BAD_LIMITS = {
    "times": (lambda: Limit(times=0.9), r"Limit\(times=0\.9\) would leave out usual updates"),
    "nan": (lambda: Limit(times=math.nan), r"would leave out usual updates"),
    "sigmas": (lambda: Limit(sigmas=-1.0), r"Limit\(sigmas=-1\.0\) must be a positive number"),
    "warmup": (lambda: Limit(warmup=0), r"Limit\(warmup=0\) must be an integer of at least 2"),
    "setting": (
        lambda: Guard(MODEL, FUSED["sgd"](MODEL.parameters()), skip={"exploding_gradient": 30.0}),
        r"gives exploding_gradient the setting 30\.0; expected",
    ),
}


@pytest.mark.parametrize("name", BAD_LIMITS)
def test_a_limit_that_cannot_be_meant_is_refused(name):
    """Settings of the spike gate that make no sense are refused in words."""
    call, words = BAD_LIMITS[name]
    with pytest.raises(ValueError, match=words):
        call()


class FullyShardedDataParallel(nn.Module):
    """Shards gradients without saying so; told by its name."""

    def __init__(self):
        super().__init__()
        self.inner = network()


def test_gradients_that_are_parts_without_saying_so_are_refused():
    """Under an engine that hides its shards each rank would decide by itself: refused."""
    model = FullyShardedDataParallel()
    with pytest.raises(ValueError, match=r"cannot judge under FullyShardedDataParallel.*would decide by itself; use fully_shard"):
        Guard(model, FUSED["adamw"](model.parameters()), skip={"nonfinite_gradient"})


def test_a_host_counter_that_comes_later_takes_the_gate_off():
    """A state that begins to count on the host in the middle of a run cannot be put back: one warning, and training goes on."""

    class Late(Lion):
        late = False

        def step(self, closure=None):
            super().step()
            if self.late:
                for p in self.state:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1

    model = network()
    optimizer = Late(list(model.parameters()))
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by="restore", halt=None) as guard:
        with pytest.warns(RuntimeWarning, match=r"skip= failed and leaves no update out from now on.*counts on the host: 'count'"):
            for i in range(6):
                optimizer.late = i > 2
                optimizer.zero_grad()
                loss_of(model, i).backward()
                optimizer.step()
                guard.step(1.0)
        assert re.search(r"switched off.*counts on the host", guard.coverage.not_observed["skip"])
        assert guard._skipping.gates[0].means.nbytes == 0


# ---- cost and manners


def test_memory_is_told():
    """Putting back costs a copy of weights and state, which guard.memory holds; found_inf costs a few numbers."""
    model = network()
    held = {}
    for by, optimizer in (("found_inf", FUSED["adamw"](model.parameters())), ("restore", torch.optim.AdamW(model.parameters(), lr=0.01))):
        with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by) as guard:
            loss_of(model, 0).backward()
            optimizer.step()
            guard.step(1.0)
            held[by] = guard._skipping.nbytes
            assert guard.memory >= held[by]
            size = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values()) + sum(p.numel() * 4 for p in model.parameters())
    assert held["found_inf"] < 64
    assert size <= held["restore"] < size + 64


@pytest.mark.parametrize(("by", "name"), BOTH)
def test_a_healthy_run_is_bit_identical_with_all_gates_armed(by, name):
    """Where nothing is bad, armed gates change nothing."""
    armed = run(make(by, name), STEPS, gate="nan under both", skip_by=by)
    bare = run(make(by, name), STEPS, guarded=False)
    assert everything(*armed[:2]) == everything(*bare[:2])
    assert not any(armed[2].skipped.values())


def test_what_is_closed_leaves_nothing_behind():
    """After close() the optimizer has no hooks, no flag and no copies of ours."""
    for by, name in (("found_inf", "adamw"), ("restore", "adam")):
        model, optimizer, guard = run(make(by, name), range(3), skip_by=by)
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        assert not hasattr(optimizer, "found_inf") and guard._skipping.gates[0].means.nbytes == 0
        loss_of(model, 3, math.nan).backward()
        optimizer.step()
        assert not finite(model)


def test_state_that_was_loaded_is_guarded_too():
    """Momentum that a checkpoint lacks, or moments that it brings, are left out exactly."""
    model = network()
    optimizer = FUSED["momentum"](list(model.parameters()))
    fresh = optimizer.state_dict()
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, halt=None) as guard:
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            guard.step(1.0)
        optimizer.load_state_dict(fresh)
        before = bits(model[0].weight)
        optimizer.zero_grad()
        loss_of(model, 3, math.nan).backward()
        optimizer.step()
        assert bits(model[0].weight) == before
        assert all(float(s["momentum_buffer"].abs().sum()) == 0.0 for s in optimizer.state.values())


# ---- what the forward pass writes


class Averaged(nn.Module):
    """Batch-norm, a queue written by the forward pass, an average of weights kept as a buffer, and a layer without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("queue", torch.zeros(6, 8))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3, 8))
        self.register_buffer("mask", torch.ones(1, 1).expand(5, 5))

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        if self.training:
            self.queue.copy_(torch.cat([h.detach().mean(0, keepdim=True), self.queue[:-1]]))
            self.at += 1
        return self.last(h)


@pytest.mark.parametrize(("by", "name"), [("found_inf", "adamw"), ("found_inf", "momentum"), ("restore", "nadam")])
def test_buffers_that_the_forward_pass_writes_are_as_if_never_written(by, name):
    """Running statistics, queues and counters of a bad batch are put back with its update; an average of weights loses nothing."""

    def train(batches, bad, guarded):
        model = Averaged()
        optimizer = make(by, name)(list(model.parameters()))
        guard = Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by=by, halt=None) if guarded else None
        for i in batches:
            generator = torch.Generator().manual_seed(i)
            x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x * (math.nan if i in bad else 1.0)), y).backward()
            optimizer.step()
            if i not in bad:
                model.average.lerp_(model.last.weight.detach(), 0.1)
            if guard:
                guard.step(1.0)
        if guard:
            assert guard.memory > guard._skipping.nbytes > model.queue.numel() * 4
            guard.close()
        return everything(model, optimizer)

    bad = (0, 5, 6)
    assert train(range(12), bad, True) == train([i for i in range(12) if i not in bad], (), False)
    assert train(range(6), (), True) == train(range(6), (), False)


def test_buffers_of_a_graph_that_waits_are_not_called_changed():
    """A backward pass through an evaluated batch-norm works after an update between, as it does without the guard."""
    model = Averaged()
    optimizer = FUSED["adamw"](model.first.parameters())
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, agree=False):
        model.norm.eval()
        x = torch.randn(4, 8, requires_grad=True)
        waiting = model.norm(x).sum()
        model.first(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        waiting.backward()
    assert torch.isfinite(x.grad).all()


def test_a_large_buffer_is_listed():
    """A buffer too large to be kept is named in the coverage."""
    model = network()
    model.register_buffer("table", torch.zeros(2**20 + 1))
    optimizer = FUSED["sgd"](model.parameters())
    with Guard(model, optimizer, skip={"nonfinite_gradient"}) as guard:
        loss_of(model, 0).backward()
        optimizer.step()
        guard.step(1.0)
        assert "too large to be kept" in guard.coverage.not_observed["table"]


def test_sparse_gradients_are_left_out_when_put_back():
    """An embedding with sparse gradients is put back exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, skip_by="restore", halt=None):
        for i in range(4):
            optimizer.zero_grad()
            before = everything(model)
            (model(torch.tensor([i, 3, 3])).square().sum() * (math.nan if i == 2 else 1.0)).backward()
            optimizer.step()
            assert (everything(model) == before) == (i == 2)
