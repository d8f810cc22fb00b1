"""Of what is large a sample is looked at: it is spread over the whole, and large enough to tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lossguard import Guard
from lossguard.device import logits, outputs
from lossguard.device.logits import logits_numbers
from lossguard.device.tape import Row
from lossguard.host.decode import Decoder


def test_samples_of_sequences_are_taken_at_all_places():
    """16 rows of 64 sequences are not all their first places, and the columns of a feature map are not all one: a token that begins every
    sequence is no collapse."""
    for batch, length in ((16, 20), (64, 21), (128, 32), (32, 197)):
        places = torch.arange(length, dtype=torch.float32).repeat(batch).view(1, -1, 1)
        seen = outputs.sample(places)[0, :, 0].long()
        assert len(set(seen.tolist())) >= min(length, len(seen)) // 2, (batch, length, seen)
        columns = outputs.sample(torch.arange(batch * length, dtype=torch.float32).view(1, 1, -1))[0, 0].long() % length
        assert len(set(columns.tolist())) >= min(length, len(columns)) // 2, (batch, length)


@pytest.mark.parametrize("batch", [17, 18, 20, 24, 28, 30, 42, 60, 90, 210])
def test_batches_of_any_size_give_enough_samples(batch):
    """A size with many divisors leaves as many samples as are needed to see a collapse."""
    assert outputs.sample(torch.zeros(1, batch, 32)).shape[1] >= outputs.MIN_SAMPLES
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        loss = model(torch.randn(batch, 4)).square().mean()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    assert np.isfinite(guard.history.last("sample_variance", 1)).sum() == 3


@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=4), channels_first=st.booleans())
def test_the_sample_of_one_output_is_that_of_its_matrix(shape, channels_first):
    """In one operation, or row by row, and whether or not its memory has gaps."""
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    for output in (x, x.transpose(0, -1), x.expand(2, *shape)[1]):
        assert torch.equal(outputs.few(output, channels_first), outputs.sample(outputs.matrix(output, channels_first).unsqueeze(0)))


@pytest.mark.parametrize("length", [32, 128, 64 * 128])
def test_logits_of_sequences_are_looked_at_at_all_places(length):
    """Of 64 sequences a few rows are looked at, and not the first place of each."""
    marked = torch.zeros(64, length, 4)
    marked[:, 0, 1] = 100.0  # certain at the first place of each sequence only
    row = Row(torch.device("cpu"))
    logits_numbers(0, marked, -1, None, row)
    values = Decoder().decode(0, [(numbers.numpy(), layout) for numbers, layout in [row.lay_down()]], {}, []).values
    assert values["confident_fraction"][1][0] < 0.1


def test_few_rows_of_a_large_vocabulary_are_looked_at():
    """Of 512 rows of 4096 classes 64 at most, and no less than half of that; of 100 classes four times as many."""
    looked = []
    row = Row(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "together", lambda rows, labels: looked.append(tuple(rows.shape)) or {})
        logits_numbers(0, torch.zeros(512, 4096), -1, None, row)
        logits_numbers(0, torch.zeros(512, 100), -1, None, row)
    assert 32 <= looked[0][0] <= 64 and 128 <= looked[1][0] <= 256, looked


class Block(nn.Module):
    """Each product stands before or behind a norm, and what leaves it is added to what came in."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()
        self.norm, self.linear, self.out = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x))).flatten(1)
        return self.out(x + self.linear(self.norm(x)))


def test_modules_that_the_next_one_shows_are_looked_at_in_the_beginning_only():
    """A convolution behind whose norm an activation follows, and a norm before a product, are shown by these; a sum shows nothing."""
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, every=2, dense=4) as guard:
        for _ in range(7):
            loss = nn.functional.cross_entropy(model(torch.randn(16, 2, 4, 4)), torch.zeros(16, dtype=torch.long))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    seen = guard.history.seen("activation_rms", 6)
    names = [unit.name for unit in guard.history.units]
    assert names == ["conv", "bn", "relu", "norm", "linear", "out"] and seen[0].all()
    assert [name for name, looked in zip(names, seen[-1], strict=True) if looked] == ["conv", "relu", "linear", "out"]  # the first is given the batch


@pytest.mark.parametrize(("dtype", "shown"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_a_product_in_float16_is_looked_at_itself(dtype, shown):
    """Its own scale may come to the end of float16, which a norm behind it would hide."""
    assert outputs.shown_by("Conv2d", torch.zeros(1, dtype=dtype), "BatchNorm2d") is shown
    assert outputs.shown_by("Linear", torch.zeros(1, dtype=dtype), "ReLU") and not outputs.shown_by("Linear", torch.zeros(1, dtype=dtype), "Linear")
