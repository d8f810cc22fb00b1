"""Every signal: runs where nobody can read, gives float32 of its width, lets NaN through, and equals a naive reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lossguard import Guard, signal
from lossguard.device import signals
from lossguard.device.logits import logits_numbers, together
from lossguard.device.signals import SIGNALS
from lossguard.device.tape import Row
from lossguard.host import softmaxes
from lossguard.host.decode import Decoder
from lossguard.host.history import History, Sample

SHAPES = {"gradient": (3, 40), "weight": (3, 40), "update": (3, 40), "activation": (3, 16, 5), "logits": (16, 5)}
K = 3


def specimen(tap, device="cpu"):
    torch.manual_seed(0)
    return torch.randn(SHAPES[tap]).to(device)


@pytest.mark.parametrize("name", list(SIGNALS))
def test_runs_without_values(name):
    """Every signal runs on the meta device, where any read raises, and gives one float32 number per site."""
    chosen = SIGNALS[name]
    given = chosen.measure(specimen(chosen.tap, "meta"))
    assert given.device.type == "meta"
    assert given.dtype == torch.float32
    assert given.shape == (() if chosen.tap == "logits" else (K,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [n for n, s in SIGNALS.items() if s.tap in ("gradient", "weight", "update")])
def test_norms_of_halves_do_not_overflow(name, dtype):
    """Norms of halves are taken in float32: 300 elements of 1000 have a norm beyond a half's range for squares."""
    if dtype == torch.float64:
        pytest.skip("rows are gathered in float32")
    given = SIGNALS[name].measure(torch.full((2, 300), 1000.0, dtype=dtype))
    assert given.tolist() == pytest.approx([1000.0 * math.sqrt(300)] * 2, rel=1e-2)


SILENT_ON_NAN = ("zero_fraction", "saturated_fraction", "saturated_fraction_tanh", "confident_fraction")  # shares: a NaN is no zero, no rail, not confident


@pytest.mark.parametrize("name", list(SIGNALS))
def test_nan_passes_through(name):
    """A NaN in a site's numbers makes that site's signal NaN, and no other's; a share counts it as not in the share."""
    chosen = SIGNALS[name]
    x = specimen(chosen.tap)
    x[(0,) * x.dim()] = math.nan
    given = np.atleast_1d(chosen.measure(x).numpy())
    if name in SILENT_ON_NAN:
        assert np.isfinite(given).all()
    else:
        assert np.isnan(given[0])
        assert np.isfinite(given[1:]).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["grad_norm", "weight_norm", "update_norm"])
def test_infinity_passes_through(name, value):
    """An infinite element makes the norm infinite."""
    x = specimen("gradient")
    x[1, 7] = value
    assert SIGNALS[name].measure(x).isinf().tolist() == [False, True, False]


# ---- naive references, float64, written for reading


def naive_norm(rows):
    return [math.sqrt(sum(v * v for v in row)) for row in rows.double().tolist()]


def naive_spread(samples):
    return [math.sqrt(sum(((column - column.mean()) ** 2).sum() for column in site.T)) for site in samples.double().numpy()]


def naive_size(samples):
    return naive_norm(samples.flatten(1))


def naive_zero(samples):
    return [np.mean([v == 0 for v in site.flatten().tolist()]) for site in samples]


def naive_rails(derivative):
    def rails(samples):
        found = []
        for site in samples.double().numpy():
            found.append(np.mean([np.mean([derivative(v) < 0.02 for v in unit]) > 0.95 for unit in site.T]))
        return found

    return rails


def softmax(row):
    high = max(row)
    total = sum(math.exp(v - high) for v in row)
    return [math.exp(v - high) / total for v in row]


def naive_peak(logits):
    return max(abs(v) for row in logits.tolist() for v in row if v != -math.inf)


def naive_confident(logits):
    return np.mean([max(softmax(row)) > 0.99 for row in logits.double().tolist()])


def naive_normalizer(logits):
    return abs(np.mean([math.log(sum(math.exp(v) for v in row)) for row in logits.double().tolist()]))


NAIVE = {
    "grad_norm": naive_norm,
    "weight_norm": naive_norm,
    "update_norm": naive_norm,
    "sample_spread": naive_spread,
    "sample_size": naive_size,
    "zero_fraction": naive_zero,
    "saturated_fraction": naive_rails(lambda s: 4 * s * (1 - s)),
    "saturated_fraction_tanh": naive_rails(lambda t: 1 - t * t),
    "logit_peak": naive_peak,
    "confident_fraction": naive_confident,
    "log_normalizer": naive_normalizer,
}


def numbers(tap, name, seed):
    """Values of the range that a signal is made for."""
    generator = torch.Generator().manual_seed(seed)
    if name == "zero_fraction":
        return torch.randn(4, 16, 9, generator=generator).relu()
    if name == "saturated_fraction":
        return torch.sigmoid(torch.randn(4, 16, 9, generator=generator) + 12 * torch.randn(4, 1, 9, generator=generator))
    if name == "saturated_fraction_tanh":
        return torch.tanh(torch.randn(4, 16, 9, generator=generator) + 8 * torch.randn(4, 1, 9, generator=generator))
    if tap == "activation":
        return torch.randn(4, 16, 9, generator=generator) + 3 * torch.randn(4, 1, 9, generator=generator)
    if tap == "logits":
        return 4 * torch.randn(32, 6, generator=generator)
    return torch.randn(4, 100, generator=generator)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(SIGNALS))
def test_equals_the_naive_reference(name, seed):
    """Every built-in signal equals a reference in plain Python."""
    chosen = SIGNALS[name]
    x = numbers(chosen.tap, name, seed)
    assert chosen.measure(x).tolist() == pytest.approx(NAIVE[name](x), rel=1e-4, abs=1e-6)


def test_shares_span_their_range():
    """The specimens for shares hold values strictly between none and all, else the references prove little."""
    for name in ("zero_fraction", "saturated_fraction", "saturated_fraction_tanh", "confident_fraction"):
        shares = np.atleast_1d(SIGNALS[name].measure(numbers(SIGNALS[name].tap, name, 0)).numpy())
        assert ((shares > 0) & (shares < 1)).any(), name


def test_sample_variance_edges():
    """The same output for every sample reads 0, also where it is zero; independent noise reads 1; NaN stays NaN."""
    constant = torch.ones(1, 16, 5) * torch.arange(1.0, 6.0)
    torch.manual_seed(0)
    sick = torch.randn(1, 16, 5)
    sick[0, 3, 2] = math.nan
    assert variance(torch.cat([constant, torch.zeros(1, 16, 5)])).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert variance(torch.randn(1, 4000, 5)).item() == pytest.approx(1.0, abs=0.01)
    assert np.isnan(variance(sick)).all()


def variance(samples):
    """What the history makes of the two norms."""
    history, sites = History(), np.arange(len(samples))
    history.add_sample(Sample(0, {name: (sites, SIGNALS[name].measure(samples).numpy()) for name in signals.SPREAD}))
    return history.last("sample_variance", 1)[0]


def test_padding_adds_nothing():
    """Zeros behind a row leave its norm as it was."""
    x = torch.randn(3, 20)
    assert torch.allclose(signals.grad_norm(torch.cat([x, torch.zeros(3, 44)], dim=1)), signals.grad_norm(x))


def test_masked_logits():
    """A mask of -inf is no large logit and takes no probability; +inf and NaN show."""
    logits = torch.tensor([[1.0, -7.0, -math.inf], [2.0, -math.inf, 3.0]])
    assert signals.logit_peak(logits).item() == 7.0
    assert named(logits, torch.tensor([0, 2]))["nll_part"] == pytest.approx(-np.mean([math.log(max(softmax(row))) for row in ([1.0, -7.0], [2.0, 3.0])]))
    assert math.isfinite(signals.log_normalizer(logits).item())
    assert signals.logit_peak(torch.tensor([[1.0, math.inf]])).item() == math.inf
    assert math.isnan(signals.logit_peak(torch.tensor([[1.0, math.nan]])).item())


def test_labels():
    """Labels outside the classes do not count; without any label that counts the answer is 0, not NaN."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [1.0, 1.0, 1.0]])
    targets = torch.tensor([0, 2, -100, 1])
    rows = [-math.log(softmax(row)[t]) for row, t in zip(logits.tolist(), targets.tolist(), strict=True) if t >= 0]
    nll, wrong = over_labels(logits, targets)
    assert nll == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert nll == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert wrong == pytest.approx(1 / 3)
    assert over_labels(logits, torch.full((4,), -100)) == (0.0, 0.0)


def named(logits, targets):
    return {name: float(number) for names, numbers in together(logits, targets).items() for name, number in zip(names, numbers, strict=True)}


def over_labels(logits, targets):
    """What the history makes of the parts."""
    history = History()
    history.add_sample(Sample(0, {name: (np.zeros(1, dtype=np.intp), np.array([number])) for name, number in named(logits, targets).items()}))
    return history.last("label_nll", 1)[0, 0], history.last("confident_wrong", 1)[0, 0]


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_shared_softmax(scale):
    """Measured together, the softmax signals are what each is by itself; nothing is read."""
    logits, targets = scale * torch.randn(32, 7, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 7
    alone = {"confident_fraction": signals.confident_fraction(logits).item(), "log_normalizer": signals.log_normalizer(logits).item()}
    assert named(logits, None) == pytest.approx(alone, rel=1e-5)
    assert {name: named(logits, targets)[name] for name in alone} == pytest.approx(alone, rel=1e-5)
    assert all(len(names) == len(numbers) for names, numbers in together(logits.to("meta"), targets.to("meta")).items())


@pytest.fixture
def registry():
    before = dict(SIGNALS)
    yield SIGNALS
    SIGNALS.clear()
    SIGNALS.update(before)
    signals.BROKEN.clear()


def train(model, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model, optimizer)
    with guard:
        for i in range(steps):
            torch.manual_seed(i)
            loss = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
    return guard


@pytest.mark.parametrize("tap", signals.TAPS)
def test_a_custom_signal_is_complete_where_it_stands(tap, registry):
    """One decorated function is enough: its numbers are in the history, right for every site, and in the coverage."""

    @signal(tap, unit="largest magnitude")
    def peak(numbers):
        return numbers.abs().amax(dim=tuple(range(1, numbers.dim()))) if tap != "logits" else numbers.abs().amax()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2100), nn.Linear(2100, 3))
    guard = train(model)
    width = {"activation": 4, "logits": 1}.get(tap, 6)
    assert guard.coverage.observed["peak"] == width
    newest = guard.history.last("peak", 1)[0]
    assert newest.shape == (width,)
    assert (newest > 0).all()
    if tap == "gradient":
        exact = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.numel() <= 16384}
        found = {p.name: v for p, v in zip(guard.history.params, newest, strict=True)}
        assert {n: found[n] for n in exact} == pytest.approx(exact, rel=1e-5)


def test_a_custom_activation_signal_measures_its_kinds_only(registry):
    """A signal for some module classes is taken of these, wherever they stand among others of the same shape."""

    @signal("activation", unit="mean", kinds=("GELU", "SiLU"))
    def level(samples):
        return samples.mean(dim=(1, 2))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, y.detach().mean().item()))
    guard = train(model)
    found = {u.name: v for u, v in zip(guard.history.units, guard.history.last("level", 1)[0], strict=False) if not math.isnan(v)}
    assert found == pytest.approx({n: seen[n] for n in ("1", "5")}, rel=1e-4)


def test_bad_signals_are_refused_when_registered(registry):
    """An unknown tap, a read of a value, or a result of another width is refused at once, in words."""
    with pytest.raises(ValueError, match="unknown tap 'gradients'"):
        signal("gradients", unit="")
    with pytest.raises(ValueError, match=r"reads a value.*device"):
        signal("gradient", unit="")(lambda rows: torch.tensor(rows.sum().item()))
    with pytest.raises(ValueError, match=r"one number per site.*got shape \(\)"):
        signal("gradient", unit="")(lambda rows: rows.sum())


def test_a_failing_signal_is_one_warning(registry):
    """A custom signal that fails at run time does not end the run."""

    @signal("activation", unit="")
    def broken(samples):
        if samples.device.type != "meta":
            raise ArithmeticError("no")
        return samples.mean(dim=(1, 2))

    with pytest.warns(RuntimeWarning, match="ArithmeticError: no") as caught:
        guard = train(nn.Sequential(nn.Linear(4, 3)))
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert guard.coverage.observed["grad_norm"] == guard.coverage.observed["activation_rms"] * 2 == 2
    assert "ArithmeticError" in guard.coverage.not_observed["signal broken"]


ODD_LOGITS = {
    "masked": lambda x: x.masked_fill(x > 4, -math.inf),
    "all masked in one row": lambda x: torch.cat([x[:-1], torch.full((1, x.shape[1]), -math.inf)]),
    "a NaN": lambda x: x.index_fill(0, torch.tensor([3]), math.nan),
    "infinite": lambda x: x.index_fill(0, torch.tensor([3]), math.inf),
    "far from zero": lambda x: x - 500.0,
    "certain": lambda x: 40 * x,
    "as they are": lambda x: x,
}


@pytest.mark.parametrize("labels", [None, torch.arange(32) % 7, torch.arange(32) % 9 - 1], ids=["alone", "labels", "labels that are no class"])
@pytest.mark.parametrize("name", ODD_LOGITS)
def test_softmax_on_either_side(name, labels):
    """What the host makes of logits that came whole is what the device makes of larger ones."""
    logits = ODD_LOGITS[name](4 * torch.randn(32, 7, generator=torch.Generator().manual_seed(1)))
    expected = {"logit_peak": signals.logit_peak(logits).item(), **(named(logits, labels))}
    with np.errstate(all="ignore"):
        found = softmaxes.measure(logits.double().numpy(), None if labels is None else labels.double().numpy())
    assert dict(zip(softmaxes.NAMES + softmaxes.LABELLED, found, strict=False)) == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_logits_of_several_heads():
    """Whole logits of several heads, and measured ones of others, come to one number a head; labels count beside logits of as many rows."""
    heads = {0: torch.randn(6, 4), 2: torch.randn(3, 5)}
    row = Row(torch.device("cpu"))
    for head, logits in heads.items():
        logits_numbers(head, logits, -1, torch.arange(6) % 4 if head == 0 else None, row)
    logits_numbers(1, torch.full((8, 1000), 2.0), -1, None, row)
    numbers, layout = row.lay_down()
    sample = Decoder().decode(0, [(numbers.numpy(), layout)], {}, [])
    assert {name: dict(zip(*map(list, of), strict=True)) for name, of in sample.values.items()}["logit_peak"] == pytest.approx(
        {0: float(heads[0].abs().max()), 1: 2.0, 2: float(heads[2].abs().max())}, rel=1e-6
    )
    assert {name: sorted(sites.tolist()) for name, (sites, _) in sample.values.items()} == {
        name: [0, 1, 2] if name in softmaxes.NAMES else [0] for name in softmaxes.NAMES + softmaxes.LABELLED
    }
