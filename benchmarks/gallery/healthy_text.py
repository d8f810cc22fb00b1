"""Healthy programs: language models, recurrent nets and sparse words, on Python's own help topics."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import GPT, CharRNN, warmup_cosine
from gallery.registry import Job, program


def next_token(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def held_out(model: nn.Module, stream: Tensor, length: int = 32) -> Tensor:
    """The loss on the last tenth of the stream, with the same windows each time."""
    model.eval()
    x, y = next(data.windows(stream[-len(stream) // 10 :], length, 64, torch.Generator().manual_seed(0)))
    loss = next_token(model(x), y)
    model.train()
    return loss


class SquaredReLU(nn.Module):
    """relu(x) squared."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu(x).square()


@program(healthy=True, bar=-2.6, families=("transformer", "text"))
def gpt_characters(job: Job) -> float:
    """A small GPT: AdamW, warm-up, cosine, clipping at 1."""
    stream, letters = data.text()
    model = GPT(letters, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = warmup_cosine(optimizer, 40, 400, 0.1)
    job.preflight(model, itertools.islice(data.windows(stream, 32, 16, torch.Generator().manual_seed(1)), 20), next_token, optimizer)
    guard = job.guard(model, optimizer)
    source = data.windows(stream[: -len(stream) // 10], 32, 16, job.generator)
    for i in range(400):
        x, y = next(source)
        guard.batch(x, y)
        loss = next_token(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        guard.step(loss)
        if i % 50 == 49:
            guard.validation(held_out(model, stream))
    return -held_out(model, stream).item()


@program(healthy=True, bar=-2.7, families=("transformer", "text", "sparsity"))
def gpt_relu_sparse_tied(job: Job) -> float:
    """ReLU feed-forward (most of it zero at any time), the head tied to the embedding."""
    stream, letters = data.text()
    model = GPT(letters, 32, tied=True, activation=nn.ReLU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    guard = job.guard(model, optimizer)
    source = data.windows(stream, 32, 16, job.generator)
    for _ in range(400):
        x, y = next(source)
        loss = next_token(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
    return -held_out(model, stream).item()


@program(healthy=True, bar=-2.7, families=("transformer", "text", "sparsity"))
def gpt_squared_relu(job: Job) -> float:
    """Squared ReLU, no weight decay on vectors, two parameter groups."""
    stream, letters = data.text()
    model = GPT(letters, 32, activation=SquaredReLU)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=2e-3)
    schedule = warmup_cosine(optimizer, 30, 400)
    guard = job.guard(model, optimizer)
    source = data.windows(stream, 32, 16, job.generator)
    for _ in range(400):
        x, y = next(source)
        loss = next_token(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return -held_out(model, stream).item()


@program(healthy=True, bar=-2.7, families=("transformer", "text"))
def gpt_post_norm_warmup(job: Job) -> float:
    """Norms after the sums, as in 2017: needs the long warm-up that it gets."""
    stream, letters = data.text()
    model = GPT(letters, 32, pre=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 100, (100 / (i + 1)) ** 0.5))
    guard = job.guard(model, optimizer)
    source = data.windows(stream, 32, 16, job.generator)
    for _ in range(500):
        x, y = next(source)
        loss = F.cross_entropy(model(x).transpose(1, 2), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return -held_out(model, stream).item()


@program(healthy=True, bar=-2.6, families=("recurrent", "text", "clipping"))
def lstm_characters_clipped(job: Job) -> float:
    """An LSTM whose clipping at 0.25 is active from the first step on; state carried from window to window."""
    stream, letters = data.text()
    model = CharRNN(letters, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rows = stream[: len(stream) // 16 * 16].reshape(16, -1)
    guard = job.guard(model, optimizer)
    state = None
    for i in range(350):
        at = i * 32 % (rows.shape[1] - 33)
        x, y = rows[:, at : at + 32], rows[:, at + 1 : at + 33]
        hidden, state = model.rnn(model.embed(x), state)
        state = tuple(s.detach() for s in state)
        loss = next_token(model.head(hidden), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        guard.step(loss)
    return -held_out(model, stream).item()


@program(healthy=True, bar=-2.6, families=("recurrent", "text", "clipping"))
def gru_two_layers(job: Job) -> float:
    """Two GRU layers, RMSprop, clipping by value."""
    stream, letters = data.text()
    model = CharRNN(letters, 64, "GRU", 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    job.preflight(model, itertools.islice(data.windows(stream, 32, 16, torch.Generator().manual_seed(1)), 20), next_token, optimizer)
    guard = job.guard(model, optimizer)
    source = data.windows(stream[: -len(stream) // 10], 32, 16, job.generator)
    for i in range(350):
        x, y = next(source)
        loss = next_token(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        guard.step(loss)
        if i % 50 == 49:
            guard.validation(held_out(model, stream))
    return -held_out(model, stream).item()


@program(healthy=True, bar=0.8, families=("text", "sparse"))
def documents_embedding_bag(job: Job) -> float:
    """A bag of words over a Zipf vocabulary: most rows of the embedding are never touched; dense gradients."""
    papers, labels = data.documents()
    cut = int(0.8 * len(papers))
    order = torch.randperm(len(papers), generator=torch.Generator().manual_seed(0)).tolist()
    model = nn.Sequential(nn.EmbeddingBag(1000, 32, mode="mean"), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)

    def logits(chosen: list[int]) -> Tensor:
        lengths = torch.tensor([0] + [len(papers[i]) for i in chosen[:-1]])
        return model[1](model[0](torch.cat([papers[i] for i in chosen]), lengths.cumsum(0))).squeeze(1)

    for _ in range(600):
        chosen = [order[i] for i in torch.randint(cut, (32,), generator=job.generator).tolist()]
        loss = F.binary_cross_entropy_with_logits(logits(chosen), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return ((logits(order[:cut]) > 0) == labels[order[:cut]].bool()).float().mean().item()


@program(healthy=True, bar=0.5, families=("text", "sparse"))
def skipgram_sparse_adam(job: Job) -> float:
    """Skip-gram with negative samples, sparse gradients, SparseAdam; scored by how far the loss falls below its start."""
    stream, size = data.words()
    center, around = nn.Embedding(size, 32, sparse=True), nn.Embedding(size, 32, sparse=True)
    for e in (center, around):
        nn.init.uniform_(e.weight, -0.5 / 32, 0.5 / 32)
    model = nn.ModuleDict({"center": center, "around": around})
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=5e-3)
    guard = job.guard(model, optimizer)
    losses = []
    for _ in range(600):
        at = torch.randint(3, len(stream) - 3, (256,), generator=job.generator)
        offset = torch.randint(1, 4, (256,), generator=job.generator) * (2 * torch.randint(2, (256,), generator=job.generator) - 1)
        noise = stream[torch.randint(len(stream), (256, 5), generator=job.generator)]
        c = center(stream[at])
        good = (c * around(stream[at + offset])).sum(-1)
        bad = torch.einsum("bd,bkd->bk", c, around(noise))
        loss = -(F.logsigmoid(good) + F.logsigmoid(-bad).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        losses.append(loss.item())
    return sum(losses[:20]) / 20 - sum(losses[-50:]) / 50


@program(healthy=True, bar=-5.5, families=("text", "sparse"))
def words_rare_tokens(job: Job) -> float:
    """A word model with 2000 words, most of them rare; the embedding is dense and decays."""
    stream, size = data.words()
    model = nn.Sequential(nn.Embedding(size, 32), nn.Flatten(), nn.Linear(4 * 32, 64), nn.Tanh(), nn.Linear(64, size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(350):
        starts = torch.randint(len(stream) - 5, (64,), generator=job.generator)
        chunk = stream[starts[:, None] + torch.arange(5)]
        loss = F.cross_entropy(model(chunk[:, :4]), chunk[:, 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 300) / 50
    return -last


@program(healthy=True, bar=0.75, families=("recurrent", "text"))
def documents_packed_lstm(job: Job) -> float:
    """Texts of unequal length, padded and packed, sorted into buckets; the last state is classified."""
    papers, labels = data.documents()
    chosen = [i for i in torch.randperm(len(papers), generator=torch.Generator().manual_seed(0)).tolist() if len(papers[i]) <= 60][:600]
    buckets = [sorted(chosen, key=lambda i: len(papers[i]))[k : k + 24] for k in range(0, len(chosen), 24)]
    embed, rnn, head = nn.Embedding(1000, 32, padding_idx=0), nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 1)
    model = nn.ModuleList([embed, rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)

    def logits(rows: list[int]) -> Tensor:
        lengths = torch.tensor([len(papers[i]) for i in rows])
        padded = nn.utils.rnn.pad_sequence([papers[i] for i in rows], batch_first=True)
        packed = nn.utils.rnn.pack_padded_sequence(embed(padded), lengths, batch_first=True, enforce_sorted=False)
        return head(rnn(packed)[1][0][-1]).squeeze(1)

    for _ in range(12):
        for k in torch.randperm(len(buckets), generator=job.generator).tolist():
            loss = F.binary_cross_entropy_with_logits(logits(buckets[k]), labels[buckets[k]])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            guard.step(loss)
    with torch.no_grad():
        return sum(((logits(b) > 0) == labels[b].bool()).float().sum().item() for b in buckets) / len(chosen)


@program(healthy=True, bar=-3.12, families=("transformer", "text"))
def masked_characters_bert(job: Job) -> float:
    """Torch's own encoder with dropout; a random fifth of the characters is masked, the rest is ignored; letter frequencies alone give 3.24."""
    stream, letters = data.text()
    embed, place = nn.Embedding(letters + 1, 48), nn.Parameter(0.02 * torch.randn(32, 48))
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.05, batch_first=True, norm_first=True)
    model = nn.ModuleDict({"embed": embed, "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "head": nn.Linear(48, letters)})
    model.register_parameter("place", place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = warmup_cosine(optimizer, 40, 700)
    guard = job.guard(model, optimizer)
    source = data.windows(stream, 32, 16, job.generator)
    last = 0.0
    for i in range(700):
        x, _ = next(source)
        hidden = torch.rand(x.shape, generator=job.generator) < 0.2
        y = x.masked_fill(~hidden, -100)
        out = model["head"](model["encoder"](embed(x.masked_fill(hidden, letters)) + place))
        loss = F.cross_entropy(out.transpose(1, 2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
        last += loss.item() * (i >= 650) / 50
    return -last
