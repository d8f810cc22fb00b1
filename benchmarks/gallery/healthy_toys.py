"""Healthy programs: the field's toy tasks, many of which wait at a plateau before they fall."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import Block, mlp, warmup_cosine
from gallery.registry import Job, program


@program(healthy=True, bar=0.99, families=("mlp", "toy"))
def xor_small(job: Job) -> float:
    """Eight tanh units, plain SGD; near ln 2 for a good while."""
    x, y = data.xor(400, job.generator)
    model = mlp(2, 8, 2, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    job.preflight(model, data.loader(x, y, 32), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for xb, yb in data.draws(x, y, 32, 1000, job.generator):
        loss = F.cross_entropy(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, x, y)


@program(healthy=True, bar=0.98, families=("mlp", "toy", "plateau"))
def parity_plateau(job: Job) -> float:
    """Parity of five of ten bits: a long plateau at ln 2, then everything at once."""
    x, y = data.parity(2000, 10, job.generator)
    y = (x[:, :5] > 0).sum(1) % 2
    model = mlp(10, 128, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    job.preflight(model, data.loader(x, y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for xb, yb in data.draws(x, y, 64, 1200, job.generator):
        loss = F.cross_entropy(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, x, y)


@program(healthy=True, bar=0.97, families=("mlp", "toy"))
def moons_deep_tanh(job: Job) -> float:
    """Five narrow tanh layers on the moons, weight decay, validation."""
    d = data.moons()
    model, criterion = mlp(2, *[24] * 5, 1, activation=nn.Tanh), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    loader = data.loader(d.x, d.y.float()[:, None], 32, job.generator)
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(40):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y.float()[:, None]))
    with torch.no_grad():
        return ((model(d.test_x).squeeze(1) > 0) == d.test_y.bool()).float().mean().item()


@program(healthy=True, bar=-0.02, families=("recurrent", "toy", "plateau"))
def adding_problem_gru(job: Job) -> float:
    """Twenty steps: stays at the variance of the target, 0.167, until the marks are understood."""
    rnn, head = nn.GRU(2, 48, batch_first=True), nn.Linear(48, 1)
    model = nn.ModuleList([rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(700):
        x, y = data.adding(64, 20, job.generator)
        loss = F.mse_loss(head(rnn(x)[0][:, -1]), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 650) / 50
    return -last


@program(healthy=True, bar=0.9, families=("recurrent", "toy"))
def copy_task_lstm(job: Job) -> float:
    """Five symbols, three blanks, the symbols again; only the end is scored, the rest is ignored."""
    embed, rnn, head = nn.Embedding(9, 32), nn.LSTM(32, 96, batch_first=True), nn.Linear(96, 9)
    model = nn.Sequential()
    model.add_module("embed", embed)
    model.add_module("rnn", rnn)
    model.add_module("head", head)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(700):
        x, y = data.copying(64, 4, 2, 8, job.generator)
        out = head(rnn(embed(x))[0])
        loss = F.cross_entropy(out.transpose(1, 2), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
        right += (out.argmax(-1) == y)[y >= 0].float().mean().item() * (i >= 650) / 50
    return right


@program(healthy=True, bar=0.95, families=("mlp", "toy", "plateau"))
def modular_addition_grokking(job: Job) -> float:
    """Known by heart first, understood later: strong weight decay, the whole table as one batch. Scored on what it saw."""
    d = data.modular(23)
    model = nn.Sequential(nn.Embedding(23, 48), nn.Flatten(), nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 23))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0)
    job.preflight(model, [(d.x, d.y)], criterion, optimizer)
    guard = job.guard(model, optimizer)
    for i in range(800):
        loss = criterion(model(d.x), d.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if i % 50 == 49:
            guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.x, d.y)


@program(healthy=True, bar=0.9, families=("transformer", "toy", "plateau"))
def reversal_transformer(job: Job) -> float:
    """Eight digits are written backwards by a bidirectional transformer."""
    model = nn.Sequential(nn.Embedding(10, 32), nn.Identity(), Block(32, 4, causal=False), Block(32, 4, causal=False), nn.LayerNorm(32), nn.Linear(32, 10))
    place = nn.Parameter(0.1 * torch.randn(8, 32))
    model[0].register_parameter("place", place)
    model[0].register_forward_hook(lambda module, _, out: out + module.place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = warmup_cosine(optimizer, 50, 600)
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(600):
        x = torch.randint(10, (32, 8), generator=job.generator)
        out = model(x)
        loss = F.cross_entropy(out.flatten(0, 1), x.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
        right += (out.argmax(-1) == x.flip(1)).float().mean().item() * (i >= 570) / 30
    return right


@program(healthy=True, bar=0.85, families=("recurrent", "toy", "attention"))
def reversal_seq2seq_attention(job: Job) -> float:
    """Encoder and decoder GRUs with dot-product attention and teacher forcing; lengths grow over the run (a curriculum)."""
    embed, encoder, cell, head = nn.Embedding(11, 32), nn.GRU(32, 48, batch_first=True), nn.GRUCell(80, 48), nn.Linear(96, 10)
    model = nn.ModuleDict({"embed": embed, "encoder": encoder, "cell": cell, "head": head})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(500):
        length = 3 + i // 150
        x = torch.randint(10, (32, length), generator=job.generator)
        y = x.flip(1)
        memory, state = encoder(embed(x))
        h, said, outs = state[0], torch.full((32,), 10), []
        context = torch.zeros(32, 48)
        for t in range(length):
            h = cell(torch.cat([embed(said), context], 1), h)
            context = (torch.softmax((memory @ h[:, :, None]).squeeze(2), 1)[:, :, None] * memory).sum(1)
            outs.append(head(torch.cat([h, context], 1)))
            said = y[:, t]
        out = torch.stack(outs, 1)
        loss = F.cross_entropy(out.transpose(1, 2), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        guard.step(loss)
        right += (out.argmax(-1) == y).float().mean().item() * (i >= 470) / 30
    return right


@program(healthy=True, bar=0.9, families=("recurrent", "toy"))
def rows_ctc(job: Job) -> float:
    """CTC: a strip of two digits side by side is read without alignment; the blank wins for a long time at first."""
    d = data.digits("image")
    rnn, head = nn.GRU(8, 64, batch_first=True, bidirectional=True), nn.Linear(128, 11)
    model = nn.ModuleList([rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ctc = nn.CTCLoss(blank=10, zero_infinity=True)
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(450):
        chosen = torch.randint(len(d.x), (32, 2), generator=job.generator)
        strip = torch.cat(list(d.x[chosen][:, :, 0].unbind(1)), 2).transpose(1, 2)
        log_p = head(rnn(strip)[0]).log_softmax(-1)
        loss = ctc(log_p.transpose(0, 1), d.y[chosen], torch.full((32,), 16), torch.full((32,), 2))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        guard.step(loss)
        if i >= 420:
            said = [torch.unique_consecutive(row) for row in log_p.argmax(-1)]
            right += sum([int(c) for c in s if c != 10] == y.tolist() for s, y in zip(said, d.y[chosen], strict=True)) / 32 / 30
    return right


@program(healthy=True, bar=0.95, families=("mlp", "toy", "ranking"))
def ranking_pairs(job: Job) -> float:
    """Pairs are ranked by a margin loss, which is exactly 0 for many batches in the end."""
    x = torch.randn(1000, 8, generator=job.generator)
    worth = x[:, 0] * x[:, 1] + x[:, 2]
    model = mlp(8, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.MarginRankingLoss(margin=0.1)
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(700):
        a, b = torch.randint(1000, (2, 64), generator=job.generator)
        sign = torch.sign(worth[a] - worth[b])
        left, other = model(x[a]).squeeze(1), model(x[b]).squeeze(1)
        loss = criterion(left, other, sign)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        right += ((left - other) * sign > 0).float().mean().item() * (i >= 650) / 50
    return right


@program(healthy=True, bar=0.9, families=("linear", "toy"))
def hinge_reaches_zero(job: Job) -> float:
    """A separable problem by the hinge loss: soon the loss is 0 and nothing moves any more."""
    x = torch.randn(600, 6, generator=job.generator)
    side = torch.sign(x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 1.0]) + 0.1)
    x = x + 0.5 * side[:, None] * torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 1.0])
    model = mlp(6, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = job.guard(model, optimizer)
    for xb, s in data.draws(x, side, 32, 600, job.generator):
        loss = F.relu(1 - s * model(xb).squeeze(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return (model(x).squeeze(1) * side > 0).float().mean().item()


class Tied(nn.Module):
    """One cell applied many times: a deep equilibrium net in spirit."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.cell, self.norm, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        h, x = torch.zeros_like(x), self.inject(x)
        for _ in range(10):
            h = torch.tanh(self.norm(self.cell(h) + x))
        return self.head(h)


@program(healthy=True, bar=0.93, families=("recurrent", "deep"))
def digits_weight_shared(job: Job) -> float:
    """Ten passes through the same weights."""
    d = data.digits()
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 400)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)
