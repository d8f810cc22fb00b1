"""A preflight changes nothing, loses nothing and never raises for what is not its caller's mistake."""

from __future__ import annotations

import copy
import functools
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import convnet, make_batch, mlp, transformer
from models import criterion as house_loss
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lossguard import preflight
from lossguard.preflight import check
from lossguard.preflight.check import unregister
from lossguard.preflight.keep import Keeper
from lossguard.preflight.listen import Listener


class Recurrent(nn.Module):
    """Dropout between the layers and after them."""

    def __init__(self):
        super().__init__()
        self.rnn, self.drop, self.head = nn.LSTM(8, 16, num_layers=2, dropout=0.4, batch_first=True), nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(self.rnn(x)[0][:, -1]))


class Noisy(Dataset):
    """Draws from every generator there is, counts its calls and opens what it needs late."""

    def __init__(self):
        self.rng, self.own, self.calls, self.seen, self.handle = np.random.default_rng(3), random.Random(4), 0, [], None

    def __len__(self):
        return 80

    def __getitem__(self, i):
        self.handle = self.handle or object()
        self.calls += 1
        self.seen.append(i)
        noise = self.rng.normal() + self.own.random() + random.random() + np.random.rand() + torch.rand(()).item()
        return torch.randn(8) + noise, i % 3


def tensors(seed=0, *shape, classes=3, n=96):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator))


def build(name):
    """Model, loader, criterion, optimizer, all new and seeded."""
    torch.manual_seed(5)
    own = torch.Generator().manual_seed(6)
    if name == "dropout":
        model, data = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)), DataLoader(tensors(0, 8), 16, shuffle=True, generator=own)
    elif name == "batch norm":
        model, data = convnet(), DataLoader(tensors(0, 3, 8, 8, classes=4), 16, shuffle=True)
    elif name == "lstm":
        model, data = Recurrent(), DataLoader(tensors(0, 5, 8), 16, shuffle=True, generator=own)
    elif name == "transformer":
        model, data = transformer(tied=True), [make_batch("transformer", seed=i) for i in range(8)]
        return model, data, house_loss, torch.optim.AdamW(model.parameters(), lr=1e-3)
    elif name == "noisy data":
        model, data = mlp_of_8(), DataLoader(Noisy(), 16, shuffle=True)
    elif name == "uncopyable":
        model, data = Locked(), DataLoader(tensors(0, 8), 16, shuffle=True, generator=own)
    elif name == "frozen":
        model, data = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)), DataLoader(tensors(0, 8), 16, shuffle=True)
        model[0].requires_grad_(False)
        model[1].eval()
    return model, data, nn.CrossEntropyLoss(), torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def mlp_of_8():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Locked(nn.Module):
    """Cannot be copied, counts its calls, and swaps a buffer for a new tensor."""

    def __init__(self):
        super().__init__()
        self.body, self.lock, self.calls, self.log = mlp_of_8(), threading.Lock(), 0, []
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        out = self.body(x)
        self.last = out.detach().mean(0)
        return out


NAMES = ["dropout", "batch norm", "lstm", "transformer", "noisy data", "uncopyable", "frozen"]


def train(model, data, criterion, optimizer, epochs=2):
    """Losses of a plain loop, to the bit."""
    losses = []
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def randoms():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state()


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_after_a_preflight_is_bit_identical(name):
    """Losses, weights, buffers, optimizer state and random states of a run are those of a run without a preflight."""
    runs = []
    for fly in (False, True):
        random.seed(1)
        np.random.seed(2)
        model, data, criterion, optimizer = build(name)
        if fly:
            result = preflight(model, data, criterion, optimizer)
            assert not [reason for reason in result.reasons.values() if "itself failed" in reason], str(result)
            assert result.answers["cannot_overfit_batch"] != "cannot tell" or name == "noisy data", str(result)
        losses = train(model, data, criterion, optimizer)
        runs.append((losses, model.state_dict(), optimizer.state_dict(), randoms(), getattr(model, "log", None)))
    (a, wa, oa, ra, la), (b, wb, ob, rb, lb) = runs
    assert a == b and same(wa.values(), wb.values()) and same(ra, rb) and la == lb
    assert all(same(x.values(), y.values()) for x, y in zip(oa["state"].values(), ob["state"].values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_as_it_was(name):
    """In the middle of a run: weights, gradients (the same objects), modes, flags, optimizer state, data set and sampler are untouched."""
    model, data, criterion, optimizer = build(name)
    train(model, data, criterion, optimizer, epochs=1)
    model.eval() if name == "dropout" else None
    before = copy.deepcopy([list(model.state_dict().values()), [p.grad for p in model.parameters()], optimizer.state_dict()["state"]])
    grads = [p.grad for p in model.parameters()]
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    noisy = getattr(data, "dataset", None)
    counted = (noisy.calls, list(noisy.seen), noisy.handle, str(noisy.rng.bit_generator.state)) if isinstance(noisy, Noisy) else None
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = randoms()
    own = data.generator.get_state() if getattr(data, "generator", None) is not None else torch.zeros(1)
    preflight(model, data, criterion, optimizer)
    assert same(before[0], model.state_dict().values())
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all(g is None or torch.equal(g, old) for g, old in zip(grads, before[1], strict=True))
    for old, new in zip(before[2].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert same(old.values(), new.values())
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert same(state, randoms())
    assert getattr(data, "generator", None) is None or torch.equal(own, data.generator.get_state())
    if counted:
        assert counted == (noisy.calls, list(noisy.seen), noisy.handle, str(noisy.rng.bit_generator.state))


def test_a_forward_that_uses_the_model_outside_is_put_back_too():
    """A forward that ignores the model it is given runs on the original, which is put back; it is no reason for an alarm."""
    model, data, criterion, optimizer = build("dropout")
    before = copy.deepcopy(model.state_dict())
    result = preflight(model, data, criterion, optimizer, forward=lambda _, batch: (model(batch[0]), batch[1]))
    assert same(before.values(), model.state_dict().values()) and all(p.grad is None for p in model.parameters())
    assert result.answers["unchanged_weights"] == "pass" and result.answers["cannot_overfit_batch"] == "pass", str(result)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, MemoryError, AssertionError])
@pytest.mark.parametrize("when", [0, 1, 7, 40, 120])
def test_a_fault_of_the_users_code_becomes_cannot_tell(error, when):
    """Whenever the model raises, no exception leaves the preflight, and everything is as it was."""

    class Fails(Locked):
        def forward(self, x):
            if self.calls >= when:
                raise error("out of order")
            return super().forward(x)

    torch.manual_seed(0)
    model = Fails()
    before, state = copy.deepcopy(model.body.state_dict()), randoms()
    result = preflight(model, DataLoader(tensors(0, 8), 16), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    assert same(before.values(), model.body.state_dict().values()) and same(state, randoms()) and model.calls == 0
    if when == 0:
        assert "out of order" in result.reasons["initial_loss_off"] and "cannot tell" in result.answers.values()


def test_an_interrupt_goes_through_and_everything_is_put_back():
    """A keyboard interrupt is the user's: it is not swallowed, and the model is as it was."""

    class Interrupted(Locked):
        def forward(self, x):
            if self.calls > 30:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted()
    before, state = copy.deepcopy(model.body.state_dict()), randoms()
    with pytest.raises(KeyboardInterrupt):
        preflight(model, DataLoader(tensors(0, 8), 16), nn.CrossEntropyLoss())
    assert same(before.values(), model.body.state_dict().values()) and same(state, randoms()) and model.calls == 0


def test_a_check_that_fails_by_itself_cannot_tell():
    """A broken check of one's own is answered in words, and the others still answer."""
    from dataclasses import dataclass

    try:

        @check
        @dataclass(frozen=True)
        class Broken:
            """broken_check: it always fails."""

            diagnosis = "broken_check"

            def look(self, bench):
                raise ZeroDivisionError("no luck")

        model, data, criterion, _ = build("dropout")
        result = preflight(model, data, criterion)
        assert result.answers["broken_check"] == "cannot tell" and "no luck" in result.reasons["broken_check"]
        assert result.answers["initial_loss_off"] == "pass"
    finally:
        unregister("broken_check")


def test_an_iterator_loses_nothing():
    """Of an iterator that can be read once, what was taken stands in front of the rest again."""
    batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(20)]
    result = preflight(mlp_of_8(), iter(batches), nn.CrossEntropyLoss())
    rest = list(result.batches)
    assert len(rest) == 20 and all(a is b for a, b in zip(rest, batches, strict=True))


def test_a_loader_is_handed_back_as_it_is():
    """A loader that can be read again is what .batches is."""
    model, data, criterion, _ = build("dropout")
    assert preflight(model, data, criterion).batches is data


def test_a_loader_under_way_goes_on():
    """An iterator of the same loader that is half read goes on with the batch it would have given."""
    taken = []
    for fly in (False, True):
        model, data, criterion, _ = build("dropout")
        under_way = iter(data)
        next(under_way)
        if fly:
            preflight(model, data, criterion)
        taken.append([x.sum().item() for x, _ in under_way])
    assert taken[0] == taken[1]


def test_a_loader_with_a_state_of_its_own_is_put_back():
    """A loader with state_dict and load_state_dict continues where it was."""

    class Stateful:
        def __init__(self):
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

        def __iter__(self):
            while self.at < 12:
                self.at += 1
                generator = torch.Generator().manual_seed(self.at)
                yield torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator)

    loader = Stateful()
    next(iter(loader))
    preflight(mlp_of_8(), loader, nn.CrossEntropyLoss())
    assert loader.at == 1


def test_workers_are_not_started_and_not_lost():
    """A loader with workers is read without them, and has them afterwards."""

    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(64):
                yield torch.full((8,), float(i % 5)) + torch.arange(8), i % 3

    data = DataLoader(Stream(), batch_size=8, num_workers=2, prefetch_factor=3, persistent_workers=True)
    result = preflight(mlp_of_8(), data, nn.CrossEntropyLoss())
    assert (data.num_workers, data.prefetch_factor, data.persistent_workers, data._iterator) == (2, 3, True, None)
    assert result.answers["invalid_labels"] == "pass"


def test_batches_are_not_spoiled():
    """A model that works in place on its input does so on a copy."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp_of_8()

        def forward(self, x):
            return self.body(x.mul_(0.5).add_(1))

    batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(5)]
    before = copy.deepcopy(batches)
    preflight(InPlace(), batches, nn.CrossEntropyLoss())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, before, strict=True))


def test_a_scheduler_on_the_optimizer_is_left_alone():
    """The copy of an optimizer that a scheduler has patched never steps the original."""
    model, data, criterion, optimizer = build("dropout")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    result = preflight(model, data, criterion, optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.0 and scheduler.last_epoch == 0
    assert result.answers["learning_rate_range"] != "cannot tell", result.reasons["learning_rate_range"]


def test_the_same_question_has_the_same_answer():
    """Whatever was drawn before, the answers are the same."""
    texts = []
    for seed in (1, 2):
        model, _, criterion, optimizer = build("dropout")
        torch.manual_seed(seed)
        result = preflight(model, DataLoader(tensors(0, 8), 16), criterion, optimizer)
        texts.append((result.answers, result.reasons))
    assert texts[0] == texts[1]


def test_inside_no_grad_and_inference_mode():
    """It works where gradients are switched off, and leaves them off."""
    for mode in (torch.no_grad, torch.inference_mode):
        model, data, criterion, _ = build("dropout")
        with mode():
            assert preflight(model, data, criterion).answers["cannot_overfit_batch"] == "pass"
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model": "net"}, "expected a torch.nn.Module, got str"),
        ({"model": nn.ReLU()}, "has no parameters"),
        ({"batches": (torch.ones(2, 8), torch.ones(2))}, "a single batch"),
        ({"batches": 3}, "cannot be iterated"),
        ({"criterion": 3}, "expected a function of (outputs, targets)"),
        ({"forward": 3}, "expected a function of (model, batch)"),
        ({"optimizers": 3}, "expected a torch.optim.Optimizer"),
        ({"seconds": 0}, "seconds must be a positive number, got 0"),
        ({"mute": {"unshufled_data"}}, "did you mean 'unshuffled_data'"),
        ({"checks": [int]}, "which is no check object"),
    ],
)
def test_wrong_use_is_answered_in_words(words, said):
    """Bad arguments raise a ValueError that says what was given and what to do."""
    good = {"model": mlp_of_8(), "batches": [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))], "criterion": nn.CrossEntropyLoss()}
    with pytest.raises(ValueError, match=r"\w") as caught:
        preflight(**{**good, **words})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "batches", [[], iter(()), [torch.randn(4, 8)], [{"x": torch.randn(4, 8)}], [None], ["text"]], ids=["none", "empty", "tensor", "dict", "null", "text"]
)
def test_batches_of_no_use_are_answered_in_words(batches):
    """Nothing to look at, or batches that the default forward cannot use: cannot tell, with the reason."""
    result = preflight(mlp_of_8(), batches, nn.CrossEntropyLoss())
    assert result.answers["initial_loss_off"] == "cannot tell" and list(result) == []
    assert "no batches" in result.reasons["initial_loss_off"] or "forward=lambda" in result.reasons["initial_loss_off"]


def test_odd_models_are_taken():
    """Lazy modules, tied weights, half precision, double precision, complex inputs and a compiled wrapper all get answers."""
    x = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(6)]
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    tied[2].weight = tied[0].weight
    models = [
        nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3)),
        tied,
        mlp_of_8().bfloat16(),
        mlp_of_8().double(),
        torch.compile(mlp_of_8()),
    ]
    for model in models:
        dtype = next((p.dtype for p in model.parameters() if not nn.parameter.is_lazy(p)), torch.float32)
        result = preflight(model, [(a.to(dtype), b) for a, b in x], nn.CrossEntropyLoss())
        assert result.answers["initial_loss_off"] == "pass", str(result)
        assert all(nn.parameter.is_lazy(p) for p in models[0].parameters())


def test_dropout_is_off_while_the_listener_is_quiet():
    """Every kind of dropout of torch is the identity: modules, functions, recurrent layers, attention."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    kinds = [
        nn.Dropout(0.5),
        nn.Dropout1d(0.5),
        nn.AlphaDropout(0.5),
        nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True),
        nn.GRU(8, 8, 2, dropout=0.5),
        functools.partial(F.dropout, p=0.5),
        lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5),
        lambda t: F.scaled_dot_product_attention(t, t, t, None, 0.5),
        lambda t: attention(t, t, t),
        nn.TransformerEncoderLayer(8, 2, dropout=0.5, batch_first=True),
    ]
    for kind in kinds:
        first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
        with Listener(quiet=True):
            assert torch.equal(first(kind(x)), first(kind(x))), kind
        assert not torch.equal(first(kind(x)), first(kind(x))), kind


def test_a_keeper_puts_back_what_it_can():
    """A part that cannot be put back is told in a warning, and the rest is put back."""

    class Stubborn:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise OSError("gone")

    layer, stubborn = nn.Linear(2, 2), Stubborn()
    before = layer.weight.detach().clone()
    keeper = Keeper([layer, stubborn])
    layer.weight.data.zero_()
    layer.extra = 1
    with pytest.warns(RuntimeWarning, match="could not put back 1 of"):
        keeper.restore()
    assert torch.equal(layer.weight, before) and not hasattr(layer, "extra")


def test_mlp_of_the_house_is_cleared():
    """The small models of the other tests pass as well."""
    batches = [make_batch("mlp", n=32, seed=i) for i in range(20)]
    model = mlp()
    result = preflight(model, batches, house_loss, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert list(result) == [], str(result)
