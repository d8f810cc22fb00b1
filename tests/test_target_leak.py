"""The check that no target can be read off the input: masks, shifts, columns. What is asked for what it sees by design is let pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import preflight
from lossguard.preflight.targets import COLUMN, FUTURE, MIXED, TWICE, UNSHIFTED

VOCABULARY = 12
OTHERS = ("initial_loss_off", "cannot_overfit_batch", "validation_mismatch", "learning_rate_range", "class_imbalance", "unshuffled_data", "unnormalized_input",
          "poor_initialization")  # fmt: skip


class Attention(nn.Module):
    """A small language model, whose mask may be forgotten; labels are shifted inside if they are given."""

    def __init__(self, causal=True, dropout=0.0):
        super().__init__()
        self.causal = causal
        self.embed, self.place = nn.Embedding(VOCABULARY, 16), nn.Embedding(32, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1) if self.causal else None
        return self.head(self.block(self.embed(tokens) + self.place.weight[:length], src_mask=mask))


class Recurrent(nn.Module):
    def __init__(self, both_ways=False, features=None):
        super().__init__()
        self.features = features
        self.embed = nn.Embedding(VOCABULARY, 16) if features is None else nn.Linear(features, 16)
        self.rnn = nn.GRU(16, 16, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(32 if both_ways else 16, VOCABULARY if features is None else 1)

    def forward(self, x):
        out = self.head(self.rnn(self.embed(x))[0])
        return out if self.features is None else out.squeeze(-1)


def text(samples=48, length=11):
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))


def flat(out, y):
    return F.cross_entropy(out.reshape(-1, VOCABULARY), y.reshape(-1))


def fly(model, x, y, criterion=flat, **keywords):
    batches = DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True)
    return preflight(model, batches, criterion, torch.optim.Adam(model.parameters(), lr=1e-3), mute=OTHERS, **keywords)


def cause(result):
    return [(f.diagnosis, f.causes[0].name) for f in result]


NEXT = (slice(None), slice(None, -1)), (slice(None), slice(1, None))


@pytest.mark.parametrize(
    ("model", "criterion"),
    [
        (lambda: Attention(causal=False), flat),
        (lambda: Attention(causal=False, dropout=0.2), lambda out, y: F.cross_entropy(out.transpose(1, 2), y)),
        (lambda: Recurrent(both_ways=True), flat),
    ],
)
def test_a_model_that_sees_the_next_token_is_named(model, criterion):
    """No mask, or a recurrence from both ends, where the next token is asked for; with dropout as well, and in either shape of the loss."""
    result = fly(model(), text()[NEXT[0]], text()[NEXT[1]], criterion)
    assert cause(result) == [("target_leak", FUTURE)]
    assert result[0].remedies[0].change == {"mask": "causal"} and result[0].evidence[0].value > result[0].evidence[0].limit


@pytest.mark.parametrize("model", [Attention, Recurrent])
def test_a_model_that_looks_back_passes(model):
    result = fly(model(), text()[NEXT[0]], text()[NEXT[1]])
    assert cause(result) == [] and result.answers["target_leak"] == "pass"
    assert "1 places on in 0" in result.reasons["target_leak"]


def test_targets_that_are_the_tokens_themselves_are_named():
    """A model that looks back only and is asked for what it was just given; an autoencoder, which looks both ways, is let pass."""
    result = fly(Attention(), text(), text())
    assert cause(result) == [("target_leak", UNSHIFTED)] and "tokens[:, 1:]" in result[0].remedies[0].text
    assert cause(fly(Attention(causal=False), text(), text())) == []


@pytest.mark.parametrize("given", ["dict", "tokens alone"])
def test_a_shift_inside_of_the_model_is_followed(given):
    """Labels that the loss shifts by itself pass as they are; shifted by the loop as well they are named."""

    def shifting(out, y):
        return F.cross_entropy(out[:, :-1].reshape(-1, VOCABULARY), y[:, 1:].reshape(-1))

    tokens = text(length=14)
    batches = [{"input_ids": t, "labels": t.clone()} for t in tokens.split(12)] if given == "dict" else list(tokens.split(12))
    forward = (lambda m, b: (m(b["input_ids"]), b["labels"])) if given == "dict" else (lambda m, b: (m(b), b))
    twice = (lambda m, b: (m(b["input_ids"])[:, :-1], b["labels"][:, 1:])) if given == "dict" else (lambda m, b: (m(b[:, :-1]), b[:, 1:]))
    words = {"forward": forward, "mute": OTHERS}
    assert cause(preflight(Attention(), batches, shifting, **words)) == []
    assert cause(preflight(Attention(), batches, shifting, **{**words, "forward": twice})) == [("target_leak", TWICE)]
    assert cause(preflight(Attention(causal=False), batches, shifting, **words)) == [("target_leak", FUTURE)]


@pytest.mark.parametrize("turn", [lambda out: out.transpose(0, 1), lambda out: out.transpose(0, 1).contiguous().view(out.shape)])
def test_samples_and_places_that_are_mixed_are_named(turn):
    """Logits that are turned before they are held against the targets: outputs meet other samples' targets, and no mask is to blame."""
    result = fly(Attention(), text()[NEXT[0]], text()[NEXT[1]], lambda out, y: flat(turn(out).contiguous(), y))
    assert cause(result) == [("target_leak", MIXED)] and "transpose" in result[0].remedies[0].text


def test_masked_tokens_are_no_leak():
    """A model that looks both ways is asked for a few tokens that were hidden from it, the rest being ignored."""
    tokens, hidden = text(), torch.rand(48, 11, generator=torch.Generator().manual_seed(1)) < 0.2
    x, y = tokens.masked_fill(hidden, 0), tokens.masked_fill(~hidden, -100)
    assert cause(fly(Attention(causal=False), x, y)) == []


def test_a_series_of_numbers_is_followed_too():
    """A forecast of the next value from both ends sees it; from the past it does not."""
    series = torch.randn(48, 21, 3, generator=torch.Generator().manual_seed(0))
    x, y = series[:, :-1], series[:, 1:, 1]
    assert cause(fly(Recurrent(both_ways=True, features=3), x, y, F.mse_loss)) == [("target_leak", FUTURE)]
    assert cause(fly(Recurrent(features=3), x, y, F.mse_loss)) == []


def test_a_feature_that_is_the_target_is_named():
    """Of a table, for classes and for numbers; features that only go with the target pass."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=draw), torch.randint(3, (200,), generator=draw)
    leaky = torch.cat([x[:, :2], y[:, None].float(), x[:, 3:]], dim=1)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    result = fly(model, leaky, y, F.cross_entropy)
    assert cause(result) == [("target_leak", COLUMN)]
    assert result[0].where == "column 2" and result[0].remedies[0].change == {"drop_column": 2}
    noisy = leaky.clone()
    noisy[::7, 2] += 1
    assert cause(fly(model, noisy, y, F.cross_entropy)) == []
    line = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    assert cause(fly(line, x, x[:, 3].clone(), F.mse_loss)) == [("target_leak", COLUMN)]
    assert cause(fly(line, x, 2 * x[:, 3] + 1, F.mse_loss)) == []  # the first line that everybody fits


def test_a_random_model_cannot_be_told():
    class Random(Attention):
        def forward(self, tokens):
            return super().forward(tokens) + torch.randn(())

    result = fly(Random(), text()[NEXT[0]], text()[NEXT[1]])
    assert result.answers["target_leak"] == "cannot tell" and "random" in result.reasons["target_leak"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, z):
        return self.one(x) + self.two(z)


def test_a_model_of_two_inputs_is_given_both():
    """Batches of ((x, z), y) are unpacked for a model that asks for two; of (x, z, y) the answer says how to tell."""
    draw = torch.Generator().manual_seed(0)
    x, z, y = torch.randn(96, 4, generator=draw), torch.randn(96, 2, generator=draw), torch.randint(3, (96,), generator=draw)
    batches = [((x[k : k + 16], z[k : k + 16]), y[k : k + 16]) for k in range(0, 96, 16)]
    assert preflight(TwoInputs(), batches, nn.CrossEntropyLoss()).answers["initial_loss_off"] == "pass"
    result = preflight(TwoInputs(), [(*inputs, targets) for inputs, targets in batches], nn.CrossEntropyLoss())
    assert "forward=lambda model, batch" in result.reasons["initial_loss_off"] and "cannot tell" in str(result).splitlines()[0]
