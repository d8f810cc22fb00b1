"""Attention logits, head by head, against a naive float64 product: fused, grouped, masked, scaled, explicit, and of the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard

HEADS, WIDTH, TIME = 4, 16, 12


class Attend(nn.Module):
    """Query and key of each call are kept for the reference."""

    def __init__(self, kind, groups=HEADS):
        super().__init__()
        self.kind, self.groups, d = kind, groups, WIDTH // HEADS
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * groups * d), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():  # the third head is the loudest
            self.q.weight[2 * d : 3 * d] *= 6

    def forward(self, x):
        n, t, _ = x.shape
        d = WIDTH // HEADS
        q = self.q(x).view(n, t, HEADS, d).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, self.groups, d).permute(2, 0, 3, 1, 4).unbind(0)
        self.seen, future = (q.detach(), k.detach()), torch.ones(t, t, dtype=torch.bool).triu(1)
        if self.kind == "explicit":
            k, v = (z.repeat_interleave(HEADS // self.groups, 1) for z in (k, v))
            mixed = (q @ k.transpose(-2, -1) / d**0.5).masked_fill(future, float("-inf")).softmax(-1) @ v
        else:
            options = {"plain": {}, "causal": {"is_causal": True}, "boolean mask": {"attn_mask": ~future}, "scale": {"scale": 0.05},
                       "float mask": {"attn_mask": torch.zeros(t, t).masked_fill(future, float("-inf"))}}[self.kind]  # fmt: skip
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups != HEADS, **options)
        return self.out(mixed.transpose(1, 2).reshape(n, t, WIDTH))

    def naive(self):
        """The largest logit of each head of the first sequence."""
        q, k = (z[0].double() for z in self.seen)
        scale = 0.05 if self.kind == "scale" else (WIDTH // HEADS) ** -0.5
        return [max(abs(float(a @ b)) * scale for a in q[h] for b in k[h * len(k) // HEADS]) for h in range(HEADS)]


def record(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Guard(model, optimizer, halt=None) as guard:
        for _ in range(steps):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert not guard._faults.silenced
    return guard


def measured(guard):
    """(largest logit, its head)."""
    logits, heads = guard.history.last("attention_logit", 1)[0], guard.history.last("attention_head", 1)[0]
    (site,) = np.flatnonzero(np.isfinite(logits))
    return float(logits[site]), int(heads[site])


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean mask", "float mask", "scale", "explicit"])
def test_equals_the_naive_product_of_every_head(kind, groups):
    """The largest logit of the first sequence and its head are those of the plain product, whatever the kernel, the mask, the groups."""
    torch.manual_seed(0)
    model = Attend(kind, groups)
    guard = record(model, torch.randn(3, TIME, WIDTH))
    logit, head = measured(guard)
    expected = model.naive()
    assert logit == pytest.approx(max(expected), rel=1e-5)
    assert head == int(np.argmax(expected)) == 2


@pytest.mark.parametrize("weights", [True, False])
def test_of_the_library(weights):
    """nn.MultiheadAttention, with and without returned weights, is measured over the heads of the first sequence."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=weights)[0]

    torch.manual_seed(0)
    model, x = Net(), torch.randn(1, TIME, WIDTH)
    logit, head = measured(record(model, x))
    q, k, _ = F.linear(x[0], model.mha.in_proj_weight, model.mha.in_proj_bias).double().chunk(3, -1)
    each = [(q[:, s] @ k[:, s].T).abs().max().item() * (WIDTH // HEADS) ** -0.5 for s in (slice(h * 4, h * 4 + 4) for h in range(HEADS))]
    assert logit == pytest.approx(max(each), rel=1e-5)
    assert head == int(np.argmax(each))


def test_not_a_number_is_not_passed_over():
    """One head that is not a number makes the attention's logit not a number; the other heads do not hide it."""
    torch.manual_seed(0)
    model = Attend("plain")
    with torch.no_grad():
        model.q.weight[5] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Guard(model, optimizer, halt=None) as guard:
        loss = model(torch.randn(2, TIME, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    logits, heads = guard.history.last("attention_logit", 1)[0], guard.history.last("attention_head", 1)[0]
    seen = guard.history.seen("attention_logit", 1)[0]
    assert np.isnan(logits[seen]).all() and seen.any()
    assert heads[seen].tolist() == [1.0]


def test_the_finding_names_the_head():
    """Logits that run away are reported with the head that has the largest."""
    torch.manual_seed(0)
    model = Attend("causal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(3, TIME, WIDTH)
    with Guard(model, optimizer, halt=None) as guard:
        for i in range(60):
            with torch.no_grad():
                model.q.weight[4 * (i % 2) : 4 * (i % 2) + 4] *= 1.25  # the first two heads in turn
            loss = model(x).square().mean() + 1.0
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    found = [f for f in guard.findings if f.diagnosis == "attention_logit_growth"]
    assert found and found[0].where.startswith("attention before out, head "), guard.findings
