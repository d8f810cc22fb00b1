"""Numbers on their way: order, nothing lost, nothing invented, and the same findings however late they arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossguard import Guard, History
from lossguard.device.tape import Pulse, Row
from lossguard.device.units import SilentUnits
from lossguard.host.decode import Decoder
from lossguard.host.handover import Handover
from lossguard.host.history import Param, Sample
from lossguard.resume import pack, unpack

CPU = torch.device("cpu")
NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE = st.floats(min_value=2.0**-20, max_value=2.0**20, width=32)
PARTS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.lists(st.tuples(st.integers(-1, 9), NUMBERS), max_size=5)), max_size=6)


def fill(row, parts):
    for name, scalars, pairs in parts:
        sites = np.array([s for s, _ in pairs], dtype=np.intp)
        if scalars:
            row.add_scalars(name, sites, [torch.tensor(v) for _, v in pairs])
        else:
            row.add(name, sites, torch.tensor([v for _, v in pairs], dtype=torch.float32))


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


@settings(deadline=None, max_examples=100)
@given(st.lists(PARTS, min_size=1, max_size=4))
def test_a_row_loses_nothing(rows):
    """What is added to a row comes out decoded, the later of one site's numbers last; rows on one memory do not mix."""
    row = Row(CPU)
    for step, parts in enumerate(rows):
        fill(row, parts)
        numbers, layout = row.lay_down()
        ordered = [p for p in parts if not p[1]] + [p for p in parts if p[1]]
        expected = {}
        for name, _, pairs in ordered:
            expected.setdefault(name, {}).update({s: v for s, v in pairs if s >= 0})
        sample = Decoder().decode(step, [(numbers.numpy(), layout)], {}, [])
        found = {name: dict(zip(sites.tolist(), values.tolist(), strict=True)) for name, (sites, values) in sample.values.items()}
        assert found.keys() == {name for name, of in expected.items() if of}
        for name, of in found.items():
            assert of.keys() == expected[name].keys()
            assert all(same(v, float(np.float32(expected[name][s]))) for s, v in of.items())


def test_a_discarded_row_is_empty():
    """What was collected before a discard does not come out."""
    row = Row(CPU)
    fill(row, [("a", True, [(0, 1.0)]), ("b", False, [(0, 2.0)])])
    row.discard()
    numbers, layout = row.lay_down()
    assert numbers.numel() == 0
    assert layout.segments == ()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30))
def test_a_pulse_keeps_order(rows, numbers):
    """Steps come out of a pulse block in the order they went in, host numbers and tensors alike."""
    pulse, out = Pulse(rows, 2, CPU), []
    for a, b in numbers:
        pulse.put(0, a)
        pulse.put(1, torch.tensor(b, dtype=torch.float64))
        pulse.advance()
        if pulse.full:
            out += pulse.block[: pulse.filled].tolist()
            pulse.clear()
    out += pulse.block[: pulse.filled].tolist()
    assert len(out) == len(numbers)
    assert all(same(x, float(np.float32(y))) for row, pair in zip(out, numbers, strict=True) for x, y in zip(row, pair, strict=True))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 6), st.lists(st.integers(0, 3), min_size=1, max_size=25))
def test_the_handover_delivers_at_fixed_steps(lag, sends):
    """Every row arrives once, in order, exactly ``lag`` steps after it was sent, whatever becomes of the sender's memory."""
    handover, memory, sent, arrived = Handover(lag), torch.zeros(1), [], []
    for step, count in enumerate(sends):
        for k in range(count):
            block = memory if lag else torch.zeros(1)
            block.fill_(100 * step + k)
            handover.send(step, block, (step, k))
            sent.append((step, k))
        arrived += [(step, meaning, float(numbers[0])) for numbers, meaning in handover.receive(step)]
    end = len(sends)
    arrived += [(end, meaning, float(numbers[0])) for numbers, meaning in handover.receive(end, everything=True)]
    assert [m for _, m, _ in arrived] == sent
    assert all(value == 100 * m[0] + m[1] for _, m, value in arrived)
    assert all(step == m[0] + lag for step, m, _ in arrived if step < end)
    assert handover.late == 0


def test_a_device_without_values():
    """On meta the meaning arrives, the numbers do not."""
    handover = Handover(2)
    handover.send(0, torch.zeros(3, device="meta"), "m")
    assert list(handover.receive(1)) == []
    assert list(handover.receive(2)) == [(None, "m")]


SITES = st.dictionaries(st.integers(0, 4), NUMBERS, min_size=1)
SAMPLES = st.lists(st.dictionaries(st.sampled_from(["grad_norm", "weight_norm", "update_norm", "x", "y"]), SITES, max_size=4), max_size=14)
SOME = st.dictionaries(st.integers(0, 2), FINITE)
NORMS = st.fixed_dictionaries({"update_norm": SOME, "weight_norm": SOME, "grad_norm": SOME})
ILLS = {"healthy": lambda i: 1.0, "spike": lambda i: 60.0 if i in (80, 81) else 1.0, "diverging": lambda i: 300.0 if i > 90 else 1.0}


def sample(step, signals):
    return Sample(step, {n: (np.array(list(of)), np.array(list(of.values()), dtype=np.float32)) for n, of in signals.items()}, {"lr": 0.1 * step})


@settings(deadline=None, max_examples=100)
@given(SAMPLES, st.integers(1, 6))
def test_the_ring_holds_the_newest_samples(samples, capacity):
    """The window is the last samples in order: measured numbers where seen, NaN where not, widened as sites appear."""
    history = History(losses=4, samples=capacity, params=[Param(f"p{i}", 4) for i in range(5)])
    for step, signals in enumerate(samples):
        history.add_sample(sample(step, signals))
    kept = samples[-capacity:] if samples else []
    assert history.samples == len(kept)
    assert history.steps().tolist() == list(range(len(samples)))[-capacity:]
    assert history.fact("lr").tolist() == pytest.approx([0.1 * s for s in history.steps()])
    for name in ("grad_norm", "weight_norm", "update_norm", "x", "y"):
        values, seen = history.last(name), history.seen(name)
        assert values.shape == seen.shape
        if name in ("grad_norm", "weight_norm", "update_norm") and values.size:
            assert values.shape[1] == 5
        for row, signals in enumerate(kept if values.size else []):
            of = signals.get(name, {})
            assert np.flatnonzero(seen[row]).tolist() == sorted(of)
            assert all(same(values[row, s], float(np.float32(v))) for s, v in of.items())
            assert np.isnan(values[row, ~seen[row]]).all()
        for n in (1, 3):
            np.testing.assert_array_equal(history.last(name, n), values[max(0, len(values) - n) :])


@settings(deadline=None, max_examples=50)
@given(SAMPLES)
def test_the_first_finite_number_is_remembered(samples):
    """``born`` is the first finite number of each site, however long ago it left the window."""
    history = History(samples=2, params=[Param(f"p{i}", 4) for i in range(5)])
    expected = {}
    for step, signals in enumerate(samples):
        history.add_sample(sample(step, signals))
        for s, v in signals.get("x", {}).items():
            if math.isfinite(v):
                expected.setdefault(s, float(np.float32(v)))
    born = history.born("x")
    assert {i: float(v) for i, v in enumerate(born) if math.isfinite(v)} == expected
    assert history.observed().get("x", 0) == len(expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(NORMS, min_size=1, max_size=6))
def test_derived_signals(samples):
    """The update ratio is update over weight where both were seen; the total is the root of the squares' sum; nothing else appears."""
    history = History(samples=8, params=[Param(f"p{i}", 4 * (i + 1)) for i in range(3)])
    for step, signals in enumerate(samples):
        signals = {n: of for n, of in signals.items() if of}
        history.add_sample(sample(step, signals))
        update, weight, grads = (signals.get(n, {}) for n in ("update_norm", "weight_norm", "grad_norm"))
        both = sorted(update.keys() & weight.keys())
        ratio = history.last("update_ratio", 1)
        assert np.flatnonzero(history.seen("update_ratio", 1)).tolist() == both if ratio.size else not both
        assert all(ratio[0, s] == pytest.approx(update[s] / weight[s], rel=1e-5) for s in both)
        total = history.last("grad_total", 1)
        if grads:
            assert total[0, 0] == pytest.approx(math.sqrt(sum(v * v for v in grads.values())), rel=1e-5)
            assert all(history.last("grad_rms", 1)[0, s] == pytest.approx(v / math.sqrt(4 * (s + 1)), rel=1e-5) for s, v in grads.items())
        elif total.size:
            assert np.isnan(total).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(NUMBERS, st.sampled_from([1.0, 0.0, math.nan])), max_size=20), st.integers(1, 6))
def test_losses_stay_in_order(losses, capacity):
    """The last losses, oldest first, with what was seen of their batches."""
    history = History(losses=capacity)
    for step, (loss, finite) in enumerate(losses):
        history.add_loss(step, loss, {"a": loss}, finite)
    kept = losses[-capacity:]
    assert history.loss_steps().tolist() == list(range(len(losses)))[-capacity:]
    assert all(same(x, y) for x, (y, _) in zip(history.losses(), kept, strict=True))
    assert all(same(x, y) for x, (_, y) in zip(history.inputs(), kept, strict=True))
    assert history.fresh_losses == min(len(losses), capacity)
    if losses:
        assert all(same(x, y) for x, (y, _) in zip(history.term("a"), kept, strict=True))


@settings(deadline=None, max_examples=50)
@given(SAMPLES, st.integers(1, 4), st.integers(0, 13))
def test_a_history_resumes_anywhere(samples, capacity, cut):
    """State taken after any step, through tensors and back, goes on as if nothing had been."""
    params = [Param(f"p{i}", 4) for i in range(5)]
    whole, first, second = (History(losses=4, samples=capacity, params=params) for _ in range(3))
    for step, signals in enumerate(samples):
        for history in (whole, first if step < cut else second):
            history.add_sample(sample(step, signals))
            history.add_loss(step, float(step))
        if step + 1 == cut:
            second.load_state_dict(unpack(pack(first.state_dict())))
    if cut and cut <= len(samples):
        for name in ("grad_norm", "update_ratio", "x", "y"):
            np.testing.assert_array_equal(second.last(name), whole.last(name))
            np.testing.assert_array_equal(second.born(name), whole.born(name))
        assert second.losses().tolist() == whole.losses().tolist()
        assert second.fact("lr").tolist() == whole.fact("lr").tolist()


@settings(deadline=None, max_examples=100)
@given(FINITE, FINITE, st.sampled_from([1.0, 0.25, 1e-3]), st.booleans())
def test_true_scale(norm, scale, clip, unscaled):
    """Gradient norms come back to their true scale, and the clip coefficient does not depend on the loss scale."""
    row = Row(CPU)
    row.add("grad_norm", np.array([0, 1]), torch.tensor([norm * scale, 2 * norm * scale], dtype=torch.float64))
    row.add("clipped_norm", np.array([0, 1]), torch.tensor([norm, 2 * norm], dtype=torch.float64) * clip * (1 if unscaled else scale))
    row.add_scalars("loss_scale", np.array([0]), [torch.tensor(scale)])
    numbers, layout = row.lay_down()
    if not torch.isfinite(numbers).all():
        return
    found = Decoder().decode(0, [(numbers.numpy(), layout)], {"probes_unscaled": unscaled}, [Param("a", 1), Param("b", 1)])
    assert found.values["grad_norm"][1].tolist() == pytest.approx([norm, 2 * norm], rel=1e-4)
    assert found.values["clip_coefficient"][1].tolist() == pytest.approx([clip], rel=1e-3)
    assert found.facts["loss_scale"] == pytest.approx(scale)
    assert "loss_scale" not in found.values


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_silent_units_count_batches_without_a_break(data):
    """A unit is dead when it was silent in every one of the last window's batches, whichever sites were measured beside it."""
    units, sites, window = SilentUnits(), 3, data.draw(st.integers(1, 4))
    silent = [[0] * 2 for _ in range(sites)]
    seen = [0] * sites
    for _ in range(data.draw(st.integers(1, 12))):
        together = data.draw(st.lists(st.integers(0, sites - 1), min_size=1, unique=True))
        peaks = torch.tensor([[data.draw(st.sampled_from([-1.0, 0.0, 1.0, math.nan])) for _ in range(2)] for _ in together])
        share = units.update(tuple(together), peaks, window)
        for k, site in enumerate(together):
            seen[site] += 1
            for u in range(2):
                silent[site][u] = silent[site][u] + 1 if peaks[k, u] <= 0 else 0
        if min(seen[s] for s in together) < window:
            assert share is None
        else:
            assert share.tolist() == [sum(n >= window for n in silent[s]) / 2 for s in together]


# ---- the whole way


def run(lag, ill):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heard = []
    with Guard(model, optimizer, lag=lag, halt=None, dense=30, every=4, sinks=[lambda f: heard.append((guard.steps, f.diagnosis))]) as guard:
        for i in range(140):
            generator = torch.Generator().manual_seed(i)
            x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
            loss = F.cross_entropy(model(x), y) * ill(i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return guard, heard


@pytest.mark.parametrize("ill", ILLS.values(), ids=list(ILLS))
def test_lag_changes_when_not_what(ill):
    """With the rows arriving five steps later the history and the findings are the same, and are heard five steps later."""
    (now, heard_now), (later, heard_later) = run(0, ill), run(5, ill)
    assert [f.to_dict() for f in now.findings] == [f.to_dict() for f in later.findings]
    np.testing.assert_array_equal(now.history.losses(), later.history.losses())
    assert now.history.steps().tolist() == later.history.steps().tolist()
    for name in ("grad_norm", "update_ratio", "activation_rms", "dead_fraction"):
        np.testing.assert_array_equal(now.history.last(name), later.history.last(name))
    assert [name for _, name in heard_now] == [name for _, name in heard_later]
    assert all(b - a == 5 for (a, _), (b, _) in zip(heard_now, heard_later, strict=True) if b < 140)
    assert later._handover.late == 0
