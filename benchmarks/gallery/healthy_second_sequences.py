"""Healthy programs, second set: text and sequences. Rotary blocks, linear recurrences, carried states, samplings, pointers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import CharRNN, warmup_cosine
from gallery.registry import Job, program


def gain(loss: float) -> float:
    """Nats below 4 per character."""
    return 4.0 - loss


class Llama(nn.Module):
    """RMS norms, rotary places, a gated feed-forward, no biases, a tied head."""

    def __init__(self, size: int, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(size, width)
        nn.init.normal_(self.embed.weight, 0.0, 0.02)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(nn.ModuleDict({
                "n1": nn.RMSNorm(width), "qkv": nn.Linear(width, 3 * width, bias=False), "o": nn.Linear(width, width, bias=False),
                "n2": nn.RMSNorm(width), "up": nn.Linear(width, 4 * width, bias=False), "down": nn.Linear(2 * width, width, bias=False),
            }))  # fmt: skip
        self.norm = nn.RMSNorm(width)

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        """Rotates pairs of features by their place."""
        t, half = x.shape[-2], x.shape[-1] // 2
        angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, size)."""
        h = self.embed(x)
        for m in self.layers:
            b, t, w = h.shape
            q, k, v = m["qkv"](m["n1"](h)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            h = h + m["o"](F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True).transpose(1, 2).reshape(b, t, w))
            gate, value = m["up"](m["n2"](h)).chunk(2, -1)
            h = h + m["down"](F.silu(gate) * value)
        return F.linear(self.norm(h), self.embed.weight)


@program(healthy=True, bar=1.35, families=("second", "transformer", "text"))
def text_rotary_gated_tied(job: Job) -> float:
    """A small Llama with a z-loss, beta2 0.95, decay 0.1, clipping at 1 and a cosine to a tenth, as language models are trained."""
    stream, size = data.text()
    model = Llama(size)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-3, betas=(0.9, 0.95))
    schedule = warmup_cosine(optimizer, 30, 350, 0.1)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, y) in zip(range(350), data.windows(stream, 48, 16, job.generator)):
        out = model(x)
        loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
        total = loss + 1e-4 * out.logsumexp(-1).square().mean()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        guard.step(total)
        last += loss.item() * (i >= 310) / 40
    return gain(last)


class Recurrence(nn.Module):
    """A diagonal linear recurrence with learned decays, as a convolution by its powers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.log(torch.linspace(0.02, 1.5, width)))
        self.inward, self.out, self.norm = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        u, t = self.inward(self.norm(x)), x.shape[1]
        gap = torch.arange(t)[:, None] - torch.arange(t)[None]
        kernel = torch.exp(-self.rate.exp()[:, None, None] * gap.clamp(min=0)) * (gap >= 0)
        h = torch.einsum("dts,bsd->btd", kernel, u) * (1 - torch.exp(-2 * self.rate.exp())).sqrt()
        a, b = self.out(F.gelu(h)).chunk(2, -1)
        return x + a * torch.sigmoid(b)


@program(healthy=True, bar=1.25, families=("second", "recurrent", "text"))
def text_linear_recurrence(job: Job) -> float:
    """A state-space net; its decays have a tenth of the rate and no weight decay, so their updates are far smaller than the others'."""
    stream, size = data.text()
    model = nn.Sequential(nn.Embedding(size, 48), Recurrence(48), Recurrence(48), nn.LayerNorm(48), nn.Linear(48, size))
    slow = [p for n, p in model.named_parameters() if n.endswith("rate")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("rate")]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": slow, "lr": 5e-4, "weight_decay": 0.0}], lr=5e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i, (x, y) in zip(range(350), guard.batches(data.windows(stream, 40, 16, job.generator))):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 310) / 40
    return gain(last)


@program(healthy=True, bar=1.4, families=("second", "recurrent", "text"))
def text_state_carried_over(job: Job) -> float:
    """Truncated backpropagation: the text is read in order in 16 lanes, the LSTM's state goes from batch to batch, nothing is shuffled."""
    stream, size = data.text()
    lanes = stream[: len(stream) // 16 * 16].view(16, -1)
    model = CharRNN(size, 72)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    start, state, last = int(torch.randint(40, (), generator=job.generator)), None, 0.0
    for i in range(350):
        x, y = lanes[:, start : start + 32], lanes[:, start + 1 : start + 33]
        start += 32
        h, state = model.rnn(model.embed(x), state)
        state = tuple(s.detach() for s in state)
        loss = F.cross_entropy(model.head(h).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        guard.step(loss)
        last += loss.item() * (i >= 300) / 50
    return gain(last)


class Translator(nn.Module):
    """A GRU reads digits; another says them in reverse. share: how often the decoder sees the truth instead of its own guess."""

    def __init__(self, symbols: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(symbols + 1, width), nn.Linear(width, symbols)
        self.reader, self.cell, self.symbols = nn.GRU(width, width, batch_first=True), nn.GRUCell(width, width), symbols

    def forward(self, x: Tensor, y: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """(B, T), (B, T) -> (B, T, symbols)."""
        h, told, out = self.reader(self.embed(x))[1][0], torch.full((len(x),), self.symbols), []
        for t in range(y.shape[1]):
            h = self.cell(self.embed(told), h)
            out.append(self.head(h))
            truth = torch.rand(len(x), generator=generator) < share
            told = torch.where(truth, y[:, t], out[-1].argmax(-1))
        return torch.stack(out, 1)


@program(healthy=True, bar=0.65, families=("second", "recurrent", "curriculum"))
def reversal_scheduled_sampling(job: Job) -> float:
    """Teacher forcing falls from 1 to 0 over the run: the task grows harder while the loss falls, and may rise for a while."""
    model = Translator(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    for i in range(600):
        x = torch.randint(8, (48, 5), generator=job.generator)
        y = x.flip(1)
        loss = F.cross_entropy(model(x, y, max(0.0, 1 - i / 400), job.generator).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        x = torch.randint(8, (300, 5), generator=job.generator)
        return (model(x, x.flip(1), 0.0, job.generator).argmax(-1) == x.flip(1)).float().mean().item()


@program(healthy=True, bar=1.0, families=("second", "text", "softmax"))
def words_adaptive_softmax(job: Job) -> float:
    """2000 words through an adaptive softmax with two tails: clusters of rare words have no gradient in many steps. Scored by the fall."""
    stream, size = data.words()
    model = nn.ModuleDict({
        "embed": nn.Embedding(size, 48), "rnn": nn.GRU(48, 48, batch_first=True), "out": nn.AdaptiveLogSoftmaxWithLoss(48, size, [100, 700], div_value=2.0),
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    first, last = 0.0, 0.0
    for i, (x, y) in zip(range(300), data.windows(stream, 16, 16, job.generator)):
        h, _ = model["rnn"](model["embed"](x))
        loss = model["out"](h.flatten(0, 1), y.flatten()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        first, last = first + loss.item() * (i < 3) / 3, last + loss.item() * (i >= 260) / 40
    return first - last


@program(healthy=True, bar=0.5, families=("second", "text", "factorization"))
def words_glove_adagrad(job: Job) -> float:
    """GloVe: log counts by inner products, pairs weighed by (n / 50)^0.75, Adagrad at 0.1. Scored by the explained variance of log counts."""
    stream, _ = data.words(keep=400)
    counts = torch.zeros(400, 400)
    for shift in (1, 2, 3):
        counts.index_put_((stream[:-shift], stream[shift:]), torch.full((len(stream) - shift,), 1.0 / shift), accumulate=True)
    i, j = counts.nonzero(as_tuple=True)
    target, weight = counts[i, j].log(), (counts[i, j] / 50).clamp(max=1) ** 0.75
    model = nn.ModuleDict({"a": nn.Embedding(400, 24), "b": nn.Embedding(400, 24), "ca": nn.Embedding(400, 1), "cb": nn.Embedding(400, 1)})
    for p in model.parameters():
        nn.init.uniform_(p, -0.02, 0.02)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    guard = job.guard(model, optimizer)

    def guess(rows: Tensor) -> Tensor:
        a, b = i[rows], j[rows]
        return (model["a"](a) * model["b"](b)).sum(1) + model["ca"](a).squeeze(1) + model["cb"](b).squeeze(1)

    for rows in torch.randint(len(i), (700, 512), generator=job.generator):
        loss = (weight[rows] * (guess(rows) - target[rows]).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        every = torch.arange(len(i))
        left = (weight * (guess(every) - target).square()).sum() / weight.sum()
    mean = (weight * target).sum() / weight.sum()
    return 1 - (left / ((weight * (target - mean).square()).sum() / weight.sum())).item()


@program(healthy=True, bar=0.8, families=("second", "transformer", "toy"))
def sorting_with_torch_transformer(job: Job) -> float:
    """Torch's own encoder-decoder sorts six numbers with teacher forcing; dropout 0.1, warm-up; padding is ignored by the loss."""
    symbols, length = 12, 6
    model = nn.ModuleDict({
        "embed": nn.Embedding(symbols + 1, 48), "place": nn.Embedding(length, 48), "head": nn.Linear(48, symbols),
        "net": nn.Transformer(48, 4, 1, 2, 96, 0.1, batch_first=True, norm_first=True),
    })  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = warmup_cosine(optimizer, 40, 300)
    mask, place = nn.Transformer.generate_square_subsequent_mask(length), torch.arange(length)
    guard = job.guard(model, optimizer)

    def answer(x: Tensor, told: Tensor) -> Tensor:
        embed = lambda t: model["embed"](t) + model["place"](place)  # noqa: E731
        return model["head"](model["net"](embed(x), embed(told), tgt_mask=mask, tgt_is_causal=True))

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randint(symbols, (n, length), generator=job.generator)
        y = x.sort(1).values
        return x, torch.cat([torch.full((n, 1), symbols), y[:, :-1]], 1), y

    for _ in range(300):
        x, told, y = draw(64)
        loss = F.cross_entropy(answer(x, told).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        guard.step(loss)
    model.eval()
    with torch.no_grad():
        x, told, y = draw(400)
        return (answer(x, told).argmax(-1) == y).float().mean().item()


class Pointer(nn.Module):
    """Scores each place of a sequence; the places already taken are masked with minus infinity."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.reader, self.cell = nn.LSTM(1, width, batch_first=True, bidirectional=True), nn.LSTMCell(2 * width, width)
        self.keys, self.query, self.v = nn.Linear(2 * width, width), nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """(B, T), (B, T) right places -> (B, T, T) logits."""
        seen, _ = self.reader(x[..., None])
        keys, taken, given, state, out = self.keys(seen), torch.zeros_like(x, dtype=torch.bool), seen.mean(1), None, []
        for t in range(x.shape[1]):
            state = self.cell(given, state)
            out.append(self.v(torch.tanh(keys + self.query(state[0])[:, None])).squeeze(-1).masked_fill(taken, float("-inf")))
            taken = taken.scatter(1, order[:, t : t + 1], True)
            given = seen[torch.arange(len(x)), order[:, t]]
        return torch.stack(out, 1)


@program(healthy=True, bar=0.7, families=("second", "recurrent", "attention"))
def pointer_network_sorts(job: Job) -> float:
    """A pointer network sorts five reals: logits hold minus infinity by design, and the last choice is certain, its loss zero."""
    model = Pointer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for _ in range(350):
        x = torch.rand(64, 5, generator=job.generator)
        order = x.argsort(1)
        loss = F.cross_entropy(model(x, order).flatten(0, 1), order.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        x = torch.rand(500, 5, generator=job.generator)
        return (model(x, x.argsort(1)).argmax(-1) == x.argsort(1)).float().mean().item()


@program(healthy=True, bar=0.8, families=("second", "recurrent", "frozen"))
def sine_echo_state_readout(job: Job) -> float:
    """An echo state network: a random recurrence of spectral radius 0.95 is never trained, only its linear readout, by plain SGD."""
    rnn = nn.RNN(1, 96, batch_first=True).requires_grad_(False)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(0.95 / torch.linalg.eigvals(rnn.weight_hh_l0).abs().max())
        rnn.weight_ih_l0.mul_(5.0)
    model = nn.ModuleDict({"reservoir": rnn, "readout": nn.Linear(96, 1)})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9)
    guard = job.guard(model, optimizer)

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            t = torch.arange(61) * 0.25 + 20 * torch.rand(24, 1, generator=job.generator)
            wave = torch.sin(t) + 0.5 * torch.sin(math.sqrt(3) * t)
            yield wave[:, :-4, None], wave[:, 4:, None]

    for i, (x, y) in zip(range(401), draw()):
        out = model["readout"](model["reservoir"](x)[0])[:, 15:]
        if i == 400:
            return 1 - (F.mse_loss(out, y[:, 15:]) / y.var()).item()
        loss = F.mse_loss(out, y[:, 15:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return 0.0
