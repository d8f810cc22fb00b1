"""The public face: what is refused and how, what is defined, what a halt, a skip, a record and a resume do."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Finding, Guard, Severity, TrainingHalted
from lossguard.rules import curves
from lossguard.sinks import SCHEMA, read


def fixture(make=lambda p: torch.optim.SGD(p, lr=0.1)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, make(model.parameters())


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def train(model, optimizer, guard, steps, *, first=0, poison=lambda i: 1.0):
    for i in range(first, first + steps):
        x, y = batch(i)
        loss = F.cross_entropy(model(x), y) * poison(i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)


# ---- bad input


MODEL, OPTIMIZER = fixture()

REFUSED = {
    "model without parameters": (lambda: Guard(nn.ReLU(), OPTIMIZER), r"ReLU has no parameters.*give the module that holds the weights"),
    "model no module": (lambda: Guard(lambda x: x, OPTIMIZER), r"expected a torch.nn.Module, got function; give the model itself first"),
    "swapped": (lambda: Guard(OPTIMIZER, MODEL), r"expected a torch.nn.Module, got SGD"),
    "optimizer no optimizer": (lambda: Guard(MODEL, 0.1), r"expected a torch.optim.Optimizer, or a list of them, got float"),
    "no optimizers": (lambda: Guard(MODEL, []), r"optimizer"),
    "model twice": (lambda: Guard(MODEL, MODEL), r"expected a torch.optim.Optimizer.*got Sequential"),
    "halt unknown": (
        lambda: Guard(MODEL, OPTIMIZER, halt={"explodng_gradient"}),
        r"unknown diagnosis 'explodng_gradient' in halt=; did you mean 'exploding_gradient'\?",
    ),
    "mute unknown": (lambda: Guard(MODEL, OPTIMIZER, mute={"los_spike"}), r"in mute=; did you mean 'loss_spike'"),
    "mute unknown string": (lambda: Guard(MODEL, OPTIMIZER, mute="deadrelu"), r"in mute=; did you mean 'dead_relu'"),
    "skip unknown": (lambda: Guard(MODEL, OPTIMIZER, skip={"nonfinite_gradients"}), r"in skip=; did you mean 'nonfinite_gradient'"),
    "skip impossible": (lambda: Guard(MODEL, OPTIMIZER, skip={"loss_spike"}), r"in skip=.*known: exploding_gradient, nonfinite_gradient"),
    "skip unfused": (
        lambda: Guard(MODEL, OPTIMIZER, skip={"nonfinite_gradient"}),
        r"SGD does not honour found_inf; build it with fused=True.*halt= instead of skip=",
    ),
    "skip unable": (
        lambda: Guard(MODEL, torch.optim.RMSprop(MODEL.parameters()), skip={"nonfinite_gradient"}),
        r"RMSprop does not honour found_inf; build it with fused=True",
    ),
    "every negative": (lambda: Guard(MODEL, OPTIMIZER, every=-5), r"every must be an integer of at least 1, got -5"),
    "every zero": (lambda: Guard(MODEL, OPTIMIZER, every=0), r"every must be an integer of at least 1, got 0"),
    "every true": (lambda: Guard(MODEL, OPTIMIZER, every=True), r"every must be an integer.*got True"),
    "every float": (lambda: Guard(MODEL, OPTIMIZER, every=2.5), r"every must be an integer.*got 2.5"),
    "dense": (lambda: Guard(MODEL, OPTIMIZER, dense=-1), r"dense must be an integer of at least 0"),
    "lag": (lambda: Guard(MODEL, OPTIMIZER, lag="8"), r"lag must be an integer.*got '8'"),
    "accumulate": (lambda: Guard(MODEL, OPTIMIZER, accumulate=0), r"accumulate must be an integer of at least 1"),
    "phases": (lambda: Guard(MODEL, OPTIMIZER, phases="lightning"), r"unknown phases 'lightning'; expected 'hooks' or 'explicit'"),
    "rule class": (lambda: Guard(MODEL, OPTIMIZER, rules=[curves.LossSpike]), r"LossSpike.*is no rule object; give instances such as LossSpike\("),
    "rule function": (lambda: Guard(MODEL, OPTIMIZER, rules=[len]), r"is no rule object"),
    "severity": (lambda: Guard(MODEL, OPTIMIZER, halt="wrning"), r"unknown diagnosis 'wrning' in halt="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_in_words(name):
    """Arguments that cannot work raise ValueError that says what was given and what to do, and no warning comes instead."""
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


LOSSES = {
    "vector": (torch.ones(3), r"the loss must be a scalar, got a tensor of shape \(3,\); reduce it first"),
    "none": (None, r"the loss must be a scalar tensor, a float or a dict of them, got NoneType; pass the loss"),
    "true": (True, r"got bool"),
    "text": ("0.5", r"got str"),
    "empty dict": ({}, r"empty dict"),
    "term": ({"a": torch.tensor(1.0), "b": torch.ones(2)}, r"the loss term 'b' must be a scalar"),
    "list": ([1.0], r"got list"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_losses_are_refused_in_words(name):
    """A loss that is no scalar raises ValueError, and the guard goes on with the next."""
    model, optimizer = fixture()
    loss, words = LOSSES[name]
    with Guard(model, optimizer) as guard:
        with pytest.raises(ValueError, match=words):
            guard.step(loss)
        train(model, optimizer, guard, 2)
        assert guard.steps == 2


SCALARS = [torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]], dtype=torch.float64), 2.5, np.float32(2.5), np.float64(2.5), 3]


@pytest.mark.parametrize("value", SCALARS)
def test_scalars_of_many_kinds(value):
    """Any single number is a loss."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        guard.step(value)
    assert guard.history.losses().tolist() == pytest.approx([float(value)])


@pytest.mark.parametrize("call", [lambda g: g.step(0.0), lambda g: g.batch(0), lambda g: g.batches([]), lambda g: g.load_state_dict({})])
def test_a_closed_guard_says_so(call):
    """A closed guard refuses new data and keeps its findings."""
    model, optimizer = fixture()
    guard = Guard(model, optimizer, halt=None)
    guard.step(math.nan)
    guard.close()
    assert [f.diagnosis for f in guard.findings] == ["nonfinite_loss"]
    with pytest.raises(ValueError, match=r"this guard is closed; make a new one"):
        call(guard)
    assert "closed" in repr(guard)


# ---- defined behaviours


def test_an_optimizer_of_another_model():
    """An optimizer that holds only another model's parameters is found out within a few steps, and is the first cause."""
    model, _ = fixture()
    _, foreign = fixture()
    with Guard(model, foreign, halt=None) as guard:
        train(model, foreign, guard, 60)
    found = {f.diagnosis: f for f in guard.findings}
    assert (found["unchanged_weights"].severity, found["unchanged_weights"].step) == (Severity.ERROR, 0)
    assert found["unchanged_weights"].causes[0].name == "the optimizer holds another model's parameters"
    assert str(found["unchanged_weights"]).startswith("lossguard: error unchanged_weights at step 0\n")  # no count: it began at no later step again
    assert guard.coverage.not_observed["0.weight"] == "held by no optimizer"


def test_copies_of_all_weights_that_are_written_back():
    """Where the optimizer moves copies of every weight, which are written back, nothing is found."""
    model, _ = fixture()
    copies = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(copies, lr=0.1)
    with Guard(model, optimizer, halt=None) as guard:
        for i in range(60):
            model.zero_grad()
            loss = F.cross_entropy(model(batch(i)[0]), batch(i)[1])
            loss.backward()
            for copy, p in zip(copies, model.parameters(), strict=True):
                copy.grad = p.grad
            optimizer.step()
            with torch.no_grad():
                for copy, p in zip(copies, model.parameters(), strict=True):
                    p.copy_(copy)
            guard.step(loss)
    assert [f for f in guard.findings if f.severity > Severity.INFO] == []


def test_a_step_without_backward():
    """Steps without any backward pass are listed in the coverage; no finding is invented."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        for i in range(12):
            guard.step(F.cross_entropy(model(batch(i)[0]), batch(i)[1]))
        assert "no backward pass" in guard.coverage.not_observed["gradients"]
        assert "grad_norm" not in guard.coverage.observed
    assert "not observed" in str(guard.coverage)


def test_no_step_of_the_optimizer():
    """Backward passes without updates are measured, and the missing updates listed."""
    model, optimizer = fixture()
    with Guard(model, optimizer, halt=None) as guard:
        for i in range(12):
            loss = F.cross_entropy(model(batch(i)[0]), batch(i)[1])
            loss.backward()
            guard.step(loss)
        assert guard.coverage.observed["grad_norm"] == 4
        assert "no step of an optimizer" in guard.coverage.not_observed["updates"]


def test_coverage_before_the_first_step():
    """A guard that has seen nothing claims nothing."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        assert guard.coverage.observed == {}
        assert guard.findings == []
        assert "0 steps" in repr(guard)


# ---- halt, mute, policy


@pytest.mark.parametrize("halt", [Severity.HALT, "halt", {"nonfinite_loss"}, "nonfinite_loss", ["nonfinite_loss"], Severity.WARNING])
def test_a_nan_loss_halts(halt):
    """A NaN loss raises TrainingHalted at its step, with the finding and the exit code, whichever way it was asked for."""
    model, optimizer = fixture()
    with pytest.raises(TrainingHalted) as caught, Guard(model, optimizer, halt=halt) as guard:
        train(model, optimizer, guard, 10, poison=lambda i: math.nan if i == 5 else 1.0)
    assert caught.value.finding.step == 5
    assert caught.value.exit_code == 83
    assert str(caught.value).startswith("lossguard: halt nonfinite_")
    assert guard.steps == 6


@pytest.mark.parametrize("halt", [None, set(), {"dead_relu"}])
def test_no_halt_where_none_is_asked_for(halt):
    """Without a halt the finding is listed and training goes on."""
    model, optimizer = fixture()
    with Guard(model, optimizer, halt=halt) as guard:
        train(model, optimizer, guard, 20, poison=lambda i: math.nan if i == 5 else 1.0)
    assert guard.steps == 20
    assert guard.findings[0].diagnosis.startswith("nonfinite")
    assert guard.findings[0].step == 5


def test_muted_is_not_heard():
    """A muted diagnosis is not listed, not logged and does not halt."""
    model, optimizer = fixture()
    mute = {"nonfinite_loss", "nonfinite_gradient", "nonfinite_weight", "nonfinite_activation"}
    with Guard(model, optimizer, mute=mute) as guard:
        train(model, optimizer, guard, 12, poison=lambda i: math.nan if i == 5 else 1.0)
    assert not mute & {f.diagnosis for f in guard.findings}


def test_one_event_an_episode(caplog):
    """A lasting fault is one event with a count, and one line in the log for each severity it reaches."""
    model, optimizer = fixture()
    with caplog.at_level(logging.INFO, logger="lossguard"), Guard(model, optimizer, halt=None, mute={"nonfinite_gradient"}) as guard:
        for i in range(30):
            guard.step(math.nan if i >= 10 else 1.0 + 0.1 * (i % 3))
    events = [f for f in guard.findings if f.diagnosis == "nonfinite_loss"]
    assert len(events) == 1
    assert events[0].count > 1
    lines = [r.levelname for r in caplog.records if "nonfinite_loss at" in r.getMessage()]
    assert lines in (["ERROR"], ["WARNING", "ERROR"])  # once more when it turns out to be graver


def test_users_rules_replace_and_join():
    """A rule object takes the place of the default of its diagnosis, or joins."""

    class Always:
        diagnosis, reads, grace, patience = "always", ("loss",), 0, 1

        def check(self, history):
            return Finding("always", Severity.INFO, history.step, "loss", "there is a loss")

    model, optimizer = fixture()
    with Guard(model, optimizer, rules=[Always(), curves.LossSpike(sigmas=1e9)]) as guard:
        train(model, optimizer, guard, 3)
    assert [f.diagnosis for f in guard.findings] == ["always"]
    assert len([r for r in guard._judge.rules if r.diagnosis == "loss_spike"]) == 1


# ---- skip


MAKES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}
if not getattr(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], fused=True), "_step_supports_amp_scaling", False):
    del MAKES["adagrad"]  # an older torch, whose fused Adagrad is refused


def test_a_fused_optimizer_that_cannot_skip_is_refused():
    """Where a fused optimizer does not honour found_inf, as Adagrad in torch 2.11, the refusal says that fused=True will not help."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adagrad([parameter], fused=True)
    optimizer._step_supports_amp_scaling = False
    with pytest.raises(ValueError, match=r"Adagrad of torch .* does not honour found_inf although it is fused; use another of"):
        Guard(nn.ParameterList([parameter]), optimizer, skip={"nonfinite_gradient"})


def everything(model, optimizer):
    state = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in {**model.state_dict(), **state}.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dense", [0, 50])
@pytest.mark.parametrize("name", MAKES)
def test_a_poisoned_update_is_left_out_exactly(name, dense, bad):
    """The update of a poisoned batch leaves weights, moments and counters bit for bit; the run then equals one without that batch."""
    model, optimizer = fixture(MAKES[name])
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, dense=dense, every=100) as guard:
        train(model, optimizer, guard, 7)
        before = everything(model, optimizer)
        train(model, optimizer, guard, 1, first=7, poison=lambda i: bad)
        assert same(everything(model, optimizer), before)
        train(model, optimizer, guard, 7, first=8)
        assert not same(everything(model, optimizer), before)
    reference, other = fixture(MAKES[name])
    with Guard(reference, other, skip={"nonfinite_gradient"}) as plain:
        train(reference, other, plain, 7)
        train(reference, other, plain, 7, first=8)
    assert same(everything(model, optimizer), everything(reference, other))
    event = next(f for f in guard.findings if f.diagnosis in ("nonfinite_gradient", "nonfinite_loss"))
    assert event.step == 7
    assert event.severity <= Severity.WARNING
    assert "skipped" in event.note
    assert "skipped" in str(event)


@pytest.mark.parametrize("name", MAKES)
def test_the_very_first_update_can_be_left_out(name):
    """When the first update is skipped the run equals one that began a batch later."""
    model, optimizer = fixture(MAKES[name])
    with Guard(model, optimizer, skip={"nonfinite_gradient"}) as guard:
        train(model, optimizer, guard, 6, poison=lambda i: math.nan if i == 0 else 1.0)
    reference, other = fixture(MAKES[name])
    for i in range(1, 6):
        other.zero_grad()
        F.cross_entropy(reference(batch(i)[0]), batch(i)[1]).backward()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_later_group_with_momentum_can_be_left_out():
    """Parameters that joined later are skipped exactly too, at their first step."""
    model, _ = fixture()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9, fused=True)
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, halt=None) as guard:
        train(model, optimizer, guard, 3)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        train(model, optimizer, guard, 1, first=3, poison=lambda i: math.nan)
        assert all(s["momentum_buffer"].isfinite().all() for s in optimizer.state.values())
        assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in model[2].parameters())


def test_skips_are_counted_per_update():
    """Four micro-batches with one bad one among them are one skipped update."""
    model, optimizer = fixture(MAKES["adamw"])
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, halt=None) as guard:
        for i in range(8):
            for k in range(4):
                loss = F.cross_entropy(model(batch(4 * i + k)[0]), batch(4 * i + k)[1]) * (math.nan if (i, k) == (3, 0) else 1.0)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(1.0)
        assert guard.history.last("total_skips", 1)[0, 0] == 1.0
        assert guard.history.last("consecutive_skips")[:, 0].max() == 1.0


def test_a_skip_works_beside_a_scaler():
    """With a GradScaler either flag skips, and the scaler's own machinery works on."""
    model, optimizer = fixture(MAKES["adamw"])
    scaler = torch.amp.GradScaler(device="cpu", init_scale=16.0)
    with Guard(model, optimizer, skip={"nonfinite_gradient"}, scaler=scaler, halt=None) as guard:
        for i in range(6):
            before = everything(model, optimizer)
            loss = F.cross_entropy(model(batch(i)[0]), batch(i)[1]) * (math.nan if i == 3 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.step(loss)
            assert same(everything(model, optimizer), before) == (i == 3)
    assert scaler.get_scale() == 8.0


# ---- resume


def test_a_resumed_run_gives_the_same_alarms():
    """State through torch.save and a weights-only load: the resumed run's findings equal the uninterrupted one's."""

    def poison(i):
        return 40.0 if i in (70, 71, 130) else 1.0

    def run(cut):
        model, optimizer = fixture()
        guard = Guard(model, optimizer, halt=None)
        train(model, optimizer, guard, 100, poison=poison)
        buffer = io.BytesIO()
        torch.save({"guard": guard.state_dict()}, buffer)
        buffer.seek(0)
        if cut:
            guard.close()
            guard = Guard(model, optimizer, halt=None)
            guard.load_state_dict(torch.load(buffer, weights_only=True)["guard"])
        train(model, optimizer, guard, 80, first=100, poison=poison)
        guard.close()
        return guard

    cut, whole = run(True), run(False)
    assert [f.to_dict() for f in cut.findings] == [f.to_dict() for f in whole.findings]
    assert "loss_spike" in {f.diagnosis for event in cut.findings for f in (event, *event.consequences)}
    assert cut.steps == whole.steps == 180
    assert cut.history.losses().tolist() == whole.history.losses().tolist()
    np.testing.assert_allclose(cut.history.last("grad_norm"), whole.history.last("grad_norm"), rtol=1e-5)


def test_state_before_the_first_step():
    """A guard saved before any step loads into a fresh one."""
    model, optimizer = fixture()
    guard = Guard(model, optimizer)
    state = guard.state_dict()
    guard.close()
    with Guard(model, optimizer) as fresh:
        fresh.load_state_dict(state)
        train(model, optimizer, fresh, 3)


def test_state_of_another_model_is_refused():
    """The state of a model with other parameters is refused, with names."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        train(model, optimizer, guard, 3)
        state = guard.state_dict()
    other = nn.Linear(2, 2)
    refused = pytest.raises(ValueError, match=r"parameters \['0.weight'.*this one has \['weight'")
    with Guard(other, torch.optim.SGD(other.parameters(), lr=0.1)) as fresh, refused:
        fresh.load_state_dict(state)


def test_a_checkpoint_is_written_before_a_halt():
    """A halt that becomes known while the state is saved is raised by the next step, not by the saving."""
    model, optimizer = fixture()
    guard = Guard(model, optimizer, lag=5)
    train(model, optimizer, guard, 4, poison=lambda i: math.nan if i == 2 else 1.0)
    assert guard.state_dict()["steps"] == 4
    with pytest.raises(TrainingHalted):
        guard.step(1.0)
    guard.close()


# ---- record


def test_the_record_on_disk(tmp_path):
    """Every loss, every sample and every finding stands in the record, in order and as plain JSON."""
    model, optimizer = fixture()
    with Guard(model, optimizer, halt=None, record=tmp_path / "run") as guard:
        train(model, optimizer, guard, 75, poison=lambda i: math.nan if i == 60 else 1.0)
    rows = list(read(tmp_path / "run", "rows"))
    assert rows[0]["kind"] == "header"
    assert rows[0]["schema"] == SCHEMA
    losses = [float(v) for line in rows if line["kind"] == "losses" for v in line["total"]]
    assert losses == pytest.approx(guard.history.losses().tolist(), rel=1e-5, nan_ok=True)
    samples = [line for line in rows if line["kind"] == "sample"]
    assert [s["step"] for s in samples] == guard.history.steps().tolist()
    assert next(line["names"] for line in rows if line["kind"] == "parameters") == [n for n, _ in model.named_parameters()]
    sites, values = samples[3]["values"]["grad_norm"]
    assert dict(zip(sites, values, strict=True)) == pytest.approx(dict(enumerate(guard.history.last("grad_norm")[3].tolist())), rel=1e-5)
    found = [Finding.from_dict(line) for line in read(tmp_path / "run") if line["kind"] == "finding"]
    assert {f.diagnosis for f in guard.findings} == {f.diagnosis for f in found}
    json.dumps(rows, allow_nan=False)


def test_a_truncated_record_is_read_and_appended(tmp_path):
    """A record cut in the middle of a line gives its whole lines; a run opened on it again stands behind a new header."""
    for _ in range(2):
        model, optimizer = fixture()
        with Guard(model, optimizer, halt=None, record=tmp_path) as guard:
            train(model, optimizer, guard, 15)
        path = tmp_path / "rows.jsonl"
        whole = list(read(tmp_path, "rows"))
        path.write_bytes(path.read_bytes()[:-20])
        assert list(read(tmp_path, "rows")) == whole[:-1]
    rows = list(read(tmp_path, "rows"))
    assert [r["kind"] for r in rows].count("header") == 2


def test_records_that_cannot_be_read(tmp_path):
    """A folder without a record, and a record of a newer version, are refused in words."""
    with pytest.raises(ValueError, match=r"no record at .*give the folder that was passed as Guard\(record="):
        list(read(tmp_path))
    (tmp_path / "findings.jsonl").write_text(json.dumps({"kind": "header", "schema": SCHEMA + 1}) + "\n")
    with pytest.raises(ValueError, match=r"has schema \d+, this version reads up to \d+; update lossguard"):
        list(read(tmp_path))


# ---- batches and loss terms


def test_batches_pass_through():
    """The wrapped loader keeps its length, its batches and its repeatability; a NaN batch is named."""
    model, optimizer = fixture()
    data = [batch(i) for i in range(5)]
    data[3][0][0, 0] = math.nan
    with Guard(model, optimizer, halt=None) as guard:
        loader = guard.batches(data)
        assert len(loader) == 5
        for _ in range(2):
            for given, (x, y) in zip(data, loader, strict=True):
                assert given[0] is x
                assert given[1] is y
                loss = F.cross_entropy(model(x), y)
                guard.step(loss)
        with pytest.raises(TypeError):
            len(guard.batches(iter(data)))
        assert list(guard.batches(x for x in ({"x": torch.ones(2), "labels": torch.ones(2)}, [torch.ones(1)], torch.ones(1), "text", None)))[-1] is None
    # on a CPU, where the loss is at hand, a batch is looked at when its loss is not finite
    assert (guard.history.inputs() == 0).tolist() == [False, False, False, True, False] * 2
    assert "nonfinite_input" in {f.diagnosis for f in guard.findings} | {c.diagnosis for f in guard.findings for c in f.consequences}


def test_loss_terms():
    """A dict of terms is recorded by name, its sum is the loss, and a change of names is taken up."""
    model, optimizer = fixture()
    with Guard(model, optimizer) as guard:
        for i in range(12):
            guard.step({"a": torch.tensor(float(i)), "b": 0.5})
        for _ in range(3):
            guard.step({"a": 1.0, "c": 2.0})
        guard.step(7.0)
    assert guard.history.losses().tolist() == [i + 0.5 for i in range(12)] + [3.0] * 3 + [7.0]
    assert guard.history.term("a")[:12].tolist() == list(range(12))
    assert guard.history.term("c")[-4:-1].tolist() == [2.0] * 3
    assert guard.history.term("c")[:12].tolist() == pytest.approx([math.nan] * 12, nan_ok=True)


def test_terms_that_rest_do_not_repeat_old_numbers():
    """After the ring has come round, a term that is no longer given reads NaN."""
    from lossguard.host.history import History

    history = History(losses=4)
    for i in range(4):
        history.add_loss(i, 1.0, {"a": float(i)})
    for i in range(4, 7):
        history.add_loss(i, 1.0)
    assert history.term("a").tolist() == pytest.approx([3.0, math.nan, math.nan, math.nan], nan_ok=True)


def test_sampling_interval():
    """The first ``dense`` steps are all sampled, then every ``every``-th, and after a non-finite number all again for a while."""
    model, optimizer = fixture()
    with Guard(model, optimizer, halt=None, dense=5, every=10) as guard:
        train(model, optimizer, guard, 40, poison=lambda i: math.nan if i == 33 else 1.0)
    steps = guard.history.steps().tolist()
    assert steps[:8] == [0, 1, 2, 3, 4, 10, 20, 30]
    assert steps[8:] == list(range(33, 40))


def test_no_warnings_on_a_healthy_run():
    """A healthy run is silent: no finding, no warning, no log."""
    model, optimizer = fixture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Guard(model, optimizer) as guard:
            train(model, optimizer, guard, 120)
    assert guard.findings == []
