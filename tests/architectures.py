"""Families of architectures, small and seeded. In: a name. Out: a `Job`: a model, its optimizers, and the loss of batch i.

Each family is there for something that trips a guard: a shape, an output, a hook, a parameter, a way of calling. Losses are
scaled so that a healthy run of a dozen steps stays healthy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Loss = Callable[[int], Tensor]


@dataclass
class Job:
    """loss(i): the loss of batch i, not yet backward. step: the whole iteration where the plain one does not serve. It returns the loss."""

    model: nn.Module
    loss: Loss | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    step: Callable[[int], Any] | None = None
    unseen: tuple[str, ...] = ()  # what the coverage must list, by its key


JOBS: dict[str, Callable[[], Job]] = {}


def job(make: Callable[[], Job]) -> Callable[[], Job]:
    """Register a family under its function's name."""
    JOBS[make.__name__.strip("_")] = make
    return make


def build(name: str) -> Job:
    """A fresh, seeded job; the same name gives the same bits."""
    torch.manual_seed(0)
    made = JOBS[name]()
    if not made.optimizers:
        made.optimizers = [torch.optim.Adam(made.model.parameters(), lr=1e-3)]
    return made


def draw(i: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + i))


def labels(i: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2000 + i))


def classify(model: nn.Module, *shape: int, classes: int = 5, n: int = 16, **options: Any) -> Job:
    """Cross-entropy on images or vectors whose class shows in their mean."""

    def loss(i: int) -> Tensor:
        y = labels(i, classes, n)
        x = draw(i, n, *shape) + y.view(-1, *[1] * len(shape)) * 0.5
        return F.cross_entropy(model(x), y)

    return Job(model, loss, **options)


def regress(model: Callable[..., Tensor], module: nn.Module, *shape: int, n: int = 16, **options: Any) -> Job:
    """Mean squared error against the tanh of the input's mean."""

    def loss(i: int) -> Tensor:
        x = draw(i, n, *shape)
        out = model(x)
        return F.mse_loss(out, torch.tanh(x.flatten(1).sum(1)).view(-1, *[1] * (out.dim() - 1)).expand_as(out))

    return Job(module, loss, **options)


def tokens(i: int, n: int = 4, t: int = 10, vocabulary: int = 17) -> Tensor:
    start, stride = labels(i, vocabulary, n, 1), labels(i + 500, 3, n, 1) + 1
    return (start + stride * torch.arange(t + 1)) % vocabulary


def next_token(model: nn.Module, **options: Any) -> Job:
    """The next of a counted sequence."""

    def loss(i: int) -> Tensor:
        row = tokens(i)
        return F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())

    return Job(model, loss, **options)


class Lambda(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


# ---- images


@job
def cnn() -> Job:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)]
    return classify(nn.Sequential(*body, nn.LeakyReLU(0.1, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 5)), 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.nb.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


@job
def resnet_zero_gamma() -> Job:
    return classify(nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), 3, 8, 8)


@job
def convnext() -> Job:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
    return classify(nn.Sequential(nn.Conv2d(3, 8, 2, 2), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), 3, 8, 8)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.n1, self.n2, self.qkv, self.out = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.heads, self.causal = mlp(width, 2 * width, width, act=nn.GELU), heads, causal
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True) if cross else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        if self.cross is not None:
            x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        self.blocks, self.norm, self.head = nn.ModuleList(Block(16, 4) for _ in range(2)), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@job
def vit() -> Job:
    return classify(ViT(), 3, 8, 8)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = mlp(1, 16, 8, act=nn.SiLU)
        self.down, self.mid = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out, self.norm = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 3, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.down(x)
        b = F.silu(self.norm(self.mid(a) + self.time(t.view(-1, 1))[:, :, None, None]))
        return self.out(F.silu(self.up(torch.cat([a, b], 1))))


@job
def diffusion_unet() -> Job:
    model = UNet()

    def loss(i: int) -> Tensor:
        x, noise, t = draw(i, 8, 3, 8, 8) * 0.5, draw(i + 99, 8, 3, 8, 8), torch.rand(8, generator=torch.Generator().manual_seed(i))
        mixed = (1 - t).view(-1, 1, 1, 1).sqrt() * x + t.view(-1, 1, 1, 1).sqrt() * noise
        return F.mse_loss(model(mixed, t), noise)

    return Job(model, loss)


@job
def segmentation_channels_last() -> Job:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)

    def loss(i: int) -> Tensor:
        x = draw(i, 4, 3, 8, 8).to(memory_format=torch.channels_last)
        return nn.CrossEntropyLoss()(model(x), (x.sum(1) > 0).long() + (x[:, 0] > 0).long())

    return Job(model, loss)


@job
def both_memory_orders() -> Job:
    """Outputs of one shape, channels first, one of them transposed in memory."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.act, self.head = nn.Conv1d(6, 6, 3, padding=1), nn.GELU(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            a = self.line(x)
            b, a = self.act(a.transpose(1, 2).contiguous().transpose(1, 2)), self.act(a)
            return self.head((a + b).mean(2))

    return classify(Net(), 6, 7)


@job
def volumes_and_lines() -> Job:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cube, self.line, self.head = nn.Conv3d(1, 4, 3), nn.Conv1d(4, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.elu(self.line(F.elu(self.cube(x)).flatten(2))).mean(2))

    return classify(Both(), 1, 5, 5, 5)


# ---- sequences


class GPT(nn.Module):
    def __init__(self, *, tied: bool = False, saves: str = "", layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(17, 16), nn.Embedding(16, 16)
        self.blocks = nn.ModuleList(Block(16, 4, causal=True) for _ in range(layers))
        self.norm, self.head, self.saves = nn.LayerNorm(16), nn.Linear(16, 17, bias=False), saves
        nn.init.normal_(self.tokens.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.saves == "reentrant") if self.saves else block(x)
        return self.head(self.norm(x))


@job
def gpt() -> Job:
    return next_token(GPT())


@job
def weight_tied() -> Job:
    return next_token(GPT(tied=True))


@job
def checkpointed() -> Job:
    return next_token(GPT(saves="other"))


@job
def checkpointed_reentrant() -> Job:
    return next_token(GPT(saves="reentrant"))


@job
def bfloat16_autocast() -> Job:
    model = GPT()

    def loss(i: int) -> Tensor:
        row = tokens(i)
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())

    return Job(model, loss)


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = nn.Embedding(17, 16), Block(16, 4), Block(16, 4, causal=True, cross=True)
        self.head = nn.Linear(16, 17)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.decoder(self.shared(y), self.encoder(self.shared(x))))


@job
def encoder_decoder() -> Job:
    model = Seq2Seq()

    def loss(i: int) -> Tensor:
        row = tokens(i)
        return F.cross_entropy(model(row[:, :-1], row[:, :-1].flip(1)).transpose(1, 2), row[:, 1:], label_smoothing=0.1)

    return Job(model, loss)


@job
def transformer_encoder() -> Job:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return classify(nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(80, 5)), 5, 6)


@job
def multihead_attention_with_weights() -> Job:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.attend = nn.Parameter(torch.randn(1, 1, 16) * 0.1), nn.MultiheadAttention(16, 2, batch_first=True, kdim=6, vdim=6)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attend(self.query.expand(len(x), -1, -1), x, x, key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))
            return self.head(out[:, 0])

    return classify(Pool(), 5, 6)


class Scan(nn.Module):
    """A selective state space, step by step."""

    def __init__(self, width: int = 8, state: int = 4) -> None:
        super().__init__()
        self.embed, self.decay = nn.Embedding(17, width), nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(width, 1))
        self.step, self.bc, self.conv = nn.Linear(width, width), nn.Linear(width, 2 * state), nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.skip, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 17)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, (b, c) = F.softplus(self.step(x)), self.bc(x).chunk(2, -1)
        h, out = x.new_zeros(len(x), x.shape[2], b.shape[-1]), []
        for t in range(x.shape[1]):
            h = h * torch.exp(-dt[:, t, :, None] * self.decay.exp()) + dt[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
            out.append((h * c[:, t, None]).sum(-1) + self.skip * x[:, t])
        return self.head(torch.stack(out, 1))


@job
def mamba() -> Job:
    return next_token(Scan())


class Experts(nn.Module):
    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Embedding(17, width), nn.Linear(width, experts), nn.Linear(width, 17)
        self.experts = nn.ModuleList(mlp(width, 2 * width, width, act=nn.SiLU) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, slot, None])
        return self.head(x + out.view_as(x))


@job
def mixture_of_experts() -> Job:
    return next_token(Experts())


def recurrent(kind: Any, **options: Any) -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(17, 8), kind(8, 12, batch_first=True, **options)
            self.head = nn.Linear(24 if options.get("bidirectional") else 12, 17)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x))[0])

    return next_token(Net())


@job
def lstm() -> Job:
    return recurrent(nn.LSTM, num_layers=2, dropout=0.1)


@job
def gru_bidirectional() -> Job:
    return recurrent(nn.GRU, bidirectional=True)


@job
def rnn_packed() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 5, 4, 2] * 4), batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][-1])

    return classify(Net(), 6, 4)


@job
def lstm_cell() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(4, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return self.head(state[0])

    return classify(Net(), 6, 4)


@job
def ctc() -> Job:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6), nn.LogSoftmax(-1))

    def loss(i: int) -> Tensor:
        target = labels(i, 5, 4, 3) + 1
        return F.ctc_loss(model(draw(i, 12, 4, 4)), target, torch.full((4,), 12), torch.full((4,), 3))

    return Job(model, loss)


# ---- generative


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(12, 16, 8), mlp(4, 16, 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return {"out": self.decode(z), "mean": mean, "log_variance": log_variance}


@job
def vae() -> Job:
    model = VAE()

    def loss(i: int) -> Tensor:
        x = draw(i, 16, 12)
        y = model(x)
        divergence = -0.5 * (1 + y["log_variance"] - y["mean"].square() - y["log_variance"].exp()).sum(1).mean()
        return F.mse_loss(y["out"], x) + 0.01 * divergence

    return Job(model, loss)


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


@job
def gan() -> Job:
    pair = Pair(mlp(4, 16, 8), mlp(8, 16, 1, act=lambda: nn.LeakyReLU(0.2)))
    g, d = (torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (pair.first, pair.second))

    def step(i: int) -> Any:
        fake = pair.first(draw(i, 16, 4))
        loss_d = F.softplus(-pair.second(draw(i + 50, 16, 8) + 1)).mean() + F.softplus(pair.second(fake.detach())).mean()
        d.zero_grad()
        loss_d.backward()
        d.step()
        loss_g = F.softplus(-pair.second(fake)).mean()
        g.zero_grad()
        loss_g.backward()
        g.step()
        return {"generator": loss_g.detach(), "critic": loss_d.detach()}

    return Job(pair, optimizers=[g, d], step=step)


@job
def gradient_penalty() -> Job:
    model = mlp(8, 16, 1, act=lambda: nn.Softplus())

    def loss(i: int) -> Tensor:
        x = draw(i, 16, 8).requires_grad_()
        score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return F.softplus(score).mean() + (slope.norm(dim=1) - 1).square().mean()

    return Job(model, loss)


class Coupling(nn.Module):
    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.net, self.flip = mlp(3, 16, 6, act=nn.Tanh), flip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        a, b = (b, a) if self.flip else (a, b)
        scale, shift = self.net(a).chunk(2, 1)
        b = b * torch.tanh(scale).exp() + shift
        return torch.cat((b, a) if self.flip else (a, b), 1), torch.tanh(scale).sum(1)


@job
def realnvp() -> Job:
    model = nn.ModuleList(Coupling(bool(k % 2)) for k in range(3))

    def loss(i: int) -> Tensor:
        x, density = draw(i, 32, 6) * 2 + 1, torch.zeros(32)
        for layer in model:
            x, more = layer(x)
            density = density + more
        return (0.5 * x.square().sum(1) - density).mean()

    return Job(model, loss)


class Planar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.w, self.b = nn.Parameter(torch.randn(2) * 0.1), nn.Parameter(torch.randn(2)), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(z @ self.w + self.b)
        return z + self.u * h[:, None], torch.log((1 + (1 - h.square()) * (self.u @ self.w)).abs() + 1e-6)


@job
def planar_flow() -> Job:
    model = nn.ModuleList(Planar() for _ in range(4))

    def loss(i: int) -> Tensor:
        z, density = draw(i, 64, 2), torch.zeros(64)
        for layer in model:
            z, more = layer(z)
            density = density + more
        return ((z - 1).square().sum(1) / 2 - density).mean()

    return Job(model, loss)


# ---- pairs, sets, graphs, policies


@job
def siamese_contrastive() -> Job:
    model = mlp(8, 16, 8)

    def loss(i: int) -> Tensor:
        x = draw(i, 16, 8)
        a, b = F.normalize(model(x), dim=1), F.normalize(model(x + 0.1 * draw(i + 70, 16, 8)), dim=1)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(16))

    return Job(model, loss)


@job
def triplet() -> Job:
    model, criterion = mlp(8, 16, 8), nn.TripletMarginLoss(margin=1.0)
    return Job(model, lambda i: criterion(*(model(draw(i, 16, 8) + shift) for shift in (0.0, 0.3, 1.0))))


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            message = layer(x)[edges[0]]
            summed = torch.zeros(len(x), message.shape[1]).scatter_add(0, edges[1][:, None].expand_as(message), message)
            x = F.relu(summed / 3)
        return self.head(x)


@job
def graph() -> Job:
    model = GraphNet()

    def loss(i: int) -> Tensor:
        x = draw(i, 20, 4)
        return F.cross_entropy(model(x, labels(i, 20, 2, 60)), x[:, :3].argmax(1))

    return Job(model, loss)


@job
def actor_critic() -> Job:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor, self.critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh()), nn.Linear(16, 3), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[Any, Tensor]:
            h = self.trunk(x)
            return torch.distributions.Categorical(logits=self.actor(h)), self.critic(h).squeeze(-1)

    model = Agent()

    def loss(i: int) -> Tensor:
        x = draw(i, 32, 4)
        policy, value = model(x)
        action = policy.sample()
        reward = (action == (x[:, 0] > 0)).float()
        advantage = reward - value.detach()
        return -(policy.log_prob(action) * advantage).mean() + 0.5 * F.mse_loss(value, reward) - 0.01 * policy.entropy().mean()

    return Job(model, loss)


@job
def distillation_with_a_frozen_teacher() -> Job:
    pair = Pair(mlp(8, 16, 5), mlp(8, 32, 5).requires_grad_(False))

    def loss(i: int) -> Tensor:
        x = draw(i, 16, 8)
        return F.kl_div(F.log_softmax(pair.first(x), -1), F.softmax(pair.second(x) * 3, -1), reduction="batchmean")

    return Job(pair, loss, [torch.optim.Adam(pair.first.parameters(), lr=1e-3)], unseen=())


@job
def byol_with_a_moving_target() -> Job:
    online = mlp(8, 16, 8)
    target = torch.optim.swa_utils.AveragedModel(online, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-3)

    def step(i: int) -> Tensor:
        x = draw(i, 16, 8)
        with torch.no_grad():
            goal = F.normalize(target(x), dim=1)
        loss = 2 - 2 * (F.normalize(online(x + 0.1 * draw(i + 9, 16, 8)), dim=1) * goal).sum(1).mean() + 0.0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update_parameters(online)
        return loss

    return Job(online, optimizers=[optimizer], step=step)


# ---- odd modules and parameters


@job
def lazy() -> Job:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    return classify(model, 2, 6, 6, optimizers=[torch.optim.SGD(model.parameters(), lr=0.01)])


@job
def parametrized() -> Job:
    wn, sn, ortho = parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal
    model = nn.Sequential(wn(nn.Linear(8, 16)), nn.ReLU(), sn(nn.Linear(16, 16)), nn.ReLU(), ortho(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 5))
    return classify(model, 8)


@job
def old_weight_norm() -> Job:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    return classify(model, 3, 8)


class FakeQuantised(nn.Linear):
    """Quantisation-aware training with a straight-through estimate."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax() / 127
        return F.linear(x, self.weight + ((self.weight / scale).round() * scale - self.weight).detach(), self.bias)


@job
def quantisation_aware() -> Job:
    return classify(nn.Sequential(FakeQuantised(8, 16), nn.ReLU(), FakeQuantised(16, 5)), 8)


@job
def torch_fake_quantise() -> Job:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    fake = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8)
    return classify(nn.Sequential(nn.Linear(8, 16), fake, nn.ReLU(), nn.Linear(16, 5)), 8)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.a, self.b = base.requires_grad_(False), nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


@job
def lora() -> Job:
    model = nn.Sequential(Lora(nn.Linear(8, 32)), nn.GELU(), Lora(nn.Linear(32, 32)), nn.GELU(), Lora(nn.Linear(32, 5)))
    return classify(model, 8, optimizers=[torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)])


@job
def hypernetwork() -> Job:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.make = nn.Parameter(torch.randn(4)), mlp(4, 16, 8 * 5 + 5)

        def forward(self, x: Tensor) -> Tensor:
            made = self.make(self.code)
            return torch.func.functional_call(TEMPLATE, {"weight": made[:40].view(5, 8) * 0.3, "bias": made[40:]}, (x,))

    TEMPLATE = nn.Linear(8, 5)
    return classify(Hyper(), 8)


@job
def functional_ensemble() -> Job:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.member = [mlp(8, 16, 5)]
            self.w = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(torch.stack([p, p + 0.1])) for k, p in self.member[0].named_parameters()})

        def forward(self, x: Tensor) -> Tensor:
            call = lambda w: torch.func.functional_call(self.member[0], w, (x,))  # noqa: E731
            return torch.vmap(call)({k: self.w[k.replace(".", "_")] for k, _ in self.member[0].named_parameters()}).mean(0)

    return classify(Ensemble(), 8)


@job
def complex_valued() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 16, dtype=torch.complex64), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(torch.fft.fft(x) / 3).abs())

    return classify(Net(), 8)


@job
def sparse_embedding() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 8, sparse=True), nn.Linear(8, 5)

    model = Net()
    optimizers: list[Any] = [torch.optim.SparseAdam([model.table.weight], lr=1e-2), torch.optim.Adam(model.head.parameters(), lr=1e-2)]

    def loss(i: int) -> Tensor:
        words = labels(i, 40, 16)
        return F.cross_entropy(model.head(model.table(words)), words % 5)

    return Job(model, loss, optimizers, unseen=("table.weight",))


@job
def embedding_bag() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(40, 8, mode="mean"), nn.Linear(8, 5)

    model = Net()

    def loss(i: int) -> Tensor:
        words = labels(i, 40, 48)
        return F.cross_entropy(model.head(model.bag(words, torch.arange(0, 48, 3))), words[::3] % 5)

    return Job(model, loss)


class Root(torch.autograd.Function):
    """The fixed point of z = tanh(Wz + x), with the implicit gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.tanh(z @ w.T + x)
        ctx.save_for_backward(w, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        w, z = ctx.saved_tensors
        slope = 1 - z.square()
        u = grad
        for _ in range(30):
            u = grad + (u * slope) @ w
        return (u * slope).T @ z, u * slope


@job
def deep_equilibrium() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.inject, self.head = nn.Parameter(torch.randn(12, 12) * 0.05), nn.Linear(8, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Root.apply(self.w, self.inject(x)))

    return classify(Net(), 8)


@job
def neural_ode() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field, self.head = mlp(8, 16, 8, act=nn.Tanh), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10):  # more calls than are told apart
                x = x + 0.1 * self.field(x + 0.05 * self.field(x))
            return self.head(x)

    return classify(Net(), 8, unseen=("field.0",))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@job
def custom_function() -> Job:
    return classify(nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), Lambda(Straight.apply), nn.Linear(32, 5)), 8)


@job
def shared_module() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.act, self.head = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x + self.act(self.cell(x))
            return self.head(x)

    return classify(Net(), 8)


@job
def module_dict_and_list() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"in.put".replace(".", "_"): nn.Linear(8, 16), "norm": nn.LayerNorm(16)})
            self.heads, self.scales = nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 5)]), nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.parts["norm"](self.parts["in_put"](x)))
            return sum(s * head(h) for s, head in zip(self.scales, self.heads, strict=True))

    return classify(Net(), 8)


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


def packed(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8, 16, 5)

        def forward(self, x: Tensor) -> Any:
            return pack(self.body(x))

    model = Net()
    made = classify(Lambda(lambda x: unpack(model(x))), 8)
    return Job(model, made.loss)


@job
def output_dict() -> Job:
    return packed(lambda y: {"logits": y, "aux": None}, lambda out: out["logits"])


@job
def output_tuple() -> Job:
    return packed(lambda y: (y, "text", [y.detach()]), lambda out: out[0])


@job
def output_dataclass() -> Job:
    return packed(lambda y: Answer(y, (y,)), lambda out: out.logits)


@job
def scalars_only() -> Job:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.offset = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.slope * x + self.offset

    model = Line()
    return regress(model, model, 1)


@job
def double_precision() -> Job:
    model = mlp(8, 16, 5).double()
    made = classify(Lambda(lambda x: model(x.double())), 8)
    return Job(model, made.loss)


@job
def mixed_dtypes() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16, dtype=torch.bfloat16), nn.Linear(16, 16, dtype=torch.float64), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x.bfloat16())).double())).float())

    return classify(Net(), 8)


@job
def half_frozen() -> Job:
    model = mlp(8, 16, 16, 5)
    model[0].requires_grad_(False)
    model[0].eval()
    return classify(model, 8, optimizers=[torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)])


@job
def scripted_part() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.jit.script(mlp(8, 16, 16)), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.body(x)))

    return classify(Net(), 8)


@job
def scripted_whole() -> Job:
    return classify(torch.jit.script(mlp(8, 16, 5)), 8)


@job
def fx_traced() -> Job:
    return classify(torch.fx.symbolic_trace(mlp(8, 16, 5)), 8)


@job
def data_parallel_on_cpu() -> Job:
    with mock.patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):  # whatever back-end other tests have registered
        return classify(nn.DataParallel(mlp(8, 16, 5)), 8)


@job
def user_hooks() -> Job:
    model = mlp(8, 16, 5)
    model[0].register_forward_hook(lambda m, a, out: out * 1.5)
    model[1].register_full_backward_hook(lambda m, gi, go: None)
    model[2].weight.register_hook(lambda g: g.clamp(-1, 1))
    return classify(model, 8)


@job
def slots_and_getattr() -> Job:
    class Proxy(nn.Module):
        """Forwards unknown names to what it wraps, as trainers' wrappers do."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return classify(Proxy(mlp(8, 16, 5)), 8)


# ---- ways of stepping


@job
def lbfgs() -> Job:
    model = mlp(8, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    made = regress(model, model, 8)

    def step(i: int) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = made.loss(0)
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    return Job(model, optimizers=[optimizer], step=step)


@job
def several_optimizers() -> Job:
    model = mlp(8, 16, 5)
    return classify(model, 8, optimizers=[torch.optim.SGD(model[0].parameters(), lr=0.05), torch.optim.AdamW(model[2].parameters(), lr=1e-3)])


@job
def accumulated() -> Job:
    model = mlp(8, 16, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    made = classify(model, 8)

    def step(i: int) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        total = torch.zeros(())
        for k in range(3):
            loss = made.loss(3 * i + k) / 3
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return Job(model, optimizers=[optimizer], step=step)


@job
def sharpness_aware() -> Job:
    model = mlp(8, 16, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = classify(model, 8)

    def step(i: int) -> Tensor:
        loss = made.loss(i)
        loss.backward()
        with torch.no_grad():
            moved = [0.01 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), moved)
        optimizer.zero_grad()
        made.loss(i).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moved)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Job(model, optimizers=[optimizer], step=step)


@job
def meta_learning() -> Job:
    model = mlp(4, 16, 1, act=nn.Tanh)

    def loss(i: int) -> Tensor:
        x = draw(i, 16, 4)
        y = x.sum(1, keepdim=True).tanh()
        weights = dict(model.named_parameters())
        inner = F.mse_loss(torch.func.functional_call(model, weights, (x[:8],)), y[:8])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), slopes, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, fast, (x[8:],)), y[8:])

    return Job(model, loss)


@job
def stochastic_depth() -> Job:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for k, block in enumerate(self.blocks):
                if k == 0 or torch.rand(()) < 0.8:
                    x = x + F.gelu(block(x))
            return self.head(x)

    return classify(Net(), 8)


def twin(job: Job) -> nn.Module:
    """A deep copy of a job's model."""
    return copy.deepcopy(job.model)
