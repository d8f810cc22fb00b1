"""How runs begin, and attention that runs away: real small runs, ill and healthy; attention is observed without a touch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Transformer, convnet, criterion, drawn_with, make_batch, mlp, transformer
from torch import nn

from lossguard import Guard, Severity


def train(model, *, steps=30, which="mlp", optimizer=None, lr=0.05, n=16, every=10):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    with Guard(model, optimizer, halt=None, every=every) as guard:
        for i in range(steps):
            x, y = make_batch(which, seed=i, n=n)
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    return guard


def heard(guard, name):
    return [f for g in guard.findings for f in (g, *g.consequences) if f.diagnosis == name]


def initialised(set_weight, model=None):
    """Ten hidden layers of 64 (or the model), each layer's weight set, biases 0."""
    torch.manual_seed(0)
    model = model or mlp(depth=10, width=64)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            with torch.no_grad():
                set_weight(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def he(factor):
    return lambda w: nn.init.kaiming_normal_(w).mul_(factor)


POOR = {
    "He times 3": (he(3.0), "weights too large"),
    "He times 0.3": (he(0.3), "weights too small"),
    "normal of 1": (nn.init.normal_, "weights too large"),
    "all 0.01": (lambda w: w.fill_(0.01), "constant weights"),
    "all 0": (lambda w: w.zero_(), "weights all zero"),
}


@pytest.mark.parametrize("name", POOR)
def test_a_poor_beginning_is_named_in_the_first_steps(name):
    """Weights of a wrong scale, constant ones and zeros are named within 5 steps, with the kind of wrong."""
    guard = train(initialised(POOR[name][0]))
    (finding,) = heard(guard, "poor_initialization")
    assert finding.severity == Severity.WARNING and finding.step < 5 and finding.causes[0].name == POOR[name][1]
    assert finding.remedies[0].change["init"] in ("he", "xavier")


class Adapter(nn.Module):
    """LoRA: a frozen layer and a product of two matrices that begins at 0."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 8, bias=False), nn.Linear(8, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted():
    model = mlp(width=64)
    for i in (0, 2, 4):
        model[i] = Adapter(model[i])
    return model


def with_head(fill):
    model = mlp()
    with torch.no_grad():
        fill(model[-1].weight)
    return model


class Residual(nn.Module):
    """Eight branches whose last layer begins at 0."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(8))
        for branch in self.branches:
            nn.init.zeros_(branch[2].weight)
            nn.init.zeros_(branch[2].bias)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def policy():
    """Two hidden layers and two heads, one of them scaled by 0.01."""
    model = mlp(depth=5, width=64)
    with torch.no_grad():
        model[-1].weight.mul_(0.01)
    return model


def tanh():
    layers = [layer for i in range(8) for layer in (nn.Linear(64 if i else 16, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 4))


SOUND = {
    "He": lambda: initialised(he(1.0)),
    "torch's default": lambda: mlp(depth=6, width=64),
    "orthogonal": lambda: initialised(lambda w: nn.init.orthogonal_(w, 2**0.5)),
    "Xavier and tanh": lambda: initialised(nn.init.xavier_normal_, tanh()),
    "a head of zeros": lambda: with_head(nn.init.zeros_),
    "a constant head": lambda: with_head(lambda w: w.fill_(0.1)),
    "LoRA": adapted,
    "zero-born branches": Residual,
    "a small head": policy,
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_beginning_is_silent(name):
    """Schemes that work, zero-born heads, branches and adapters are no poor initialisation."""
    torch.manual_seed(0)
    assert heard(train(SOUND[name]()), "poor_initialization") == []


@pytest.mark.parametrize("which", ["convnet", "transformer"])
def test_networks_with_normalisations_are_silent(which):
    """A normalisation between layers begins a new chain: the small outputs of attention and branches are no trend."""
    model = convnet() if which == "convnet" else transformer(layers=6, width=64)
    assert heard(train(model, which=which, lr=1e-2), "poor_initialization") == []


# ---- attention


class Fused(nn.Module):
    """Causal self-attention through the fused kernel."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d))


def gpt(kind, layers=2, width=32, heads=4):
    with drawn_with(0):
        model = Transformer(layers, width, heads, "explicit" if kind == "fused" else kind, "gelu", False)
        if kind == "fused":
            for block in model.blocks:
                block.attention = Fused(width, heads)
    return model


def exact(model, x):
    """The largest |q.k| / sqrt(d) of the first sequence in each block, in the plainest way."""
    found = []
    kept = [block.register_forward_pre_hook(lambda b, a: found.append(_logits(b, b.norm1(a[0])))) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in kept:
        handle.remove()
    return found


def _logits(block, x):
    attention = block.attention
    if hasattr(attention, "mha"):
        weight, bias, heads = attention.mha.in_proj_weight, attention.mha.in_proj_bias, attention.mha.num_heads
    else:
        weight, bias, heads = attention.qkv.weight, attention.qkv.bias, attention.heads
    q, k, _ = F.linear(x[0], weight, bias).chunk(3, dim=-1)
    q, k = (z.view(len(z), heads, -1).transpose(0, 1) for z in (q, k))
    return (q @ k.transpose(1, 2)).abs().max().item() * q.shape[-1] ** -0.5


@pytest.mark.parametrize("kind", ["explicit", "library", "fused"])
def test_the_attention_logit_is_that_of_the_first_sequence(kind):
    """What is recorded behind each kind of attention equals the plain product of its query and key."""
    model = gpt(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Guard(model, optimizer) as guard:
        for _ in range(4):
            x, y = make_batch("transformer", seed=3)
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(torch.zeros(()))
    recorded = guard.history.last("attention_logit")
    sites = np.flatnonzero(np.isfinite(recorded).any(axis=0))
    assert [guard.history.units[i].name.split(".")[1] for i in sites] == ["0", "1"]
    assert np.isfinite(recorded).sum(axis=1).tolist() == [1, 1, 1, 1]  # one attention in each sample, in turn
    assert np.nanmax(recorded[:, sites], axis=0).tolist() == pytest.approx(exact(model, x), rel=1e-4)


@pytest.mark.parametrize("kind", ["explicit", "library", "fused"])
def test_attention_logits_that_run_away_are_named(kind):
    """A learning rate thirty times too high shows in the attention of its block; the right one is silent."""
    fast, sound = gpt(kind, 3, 64), gpt(kind, 3, 64)
    guard = train(fast, which="transformer", optimizer=torch.optim.AdamW(fast.parameters(), lr=3e-2), steps=60)
    finding = heard(guard, "attention_logit_growth")[0]
    assert "attention before blocks." in finding.where and finding.evidence[0].value > 50 and finding.severity >= Severity.WARNING
    guard = train(sound, which="transformer", optimizer=torch.optim.AdamW(sound.parameters(), lr=1e-3), steps=150)
    assert heard(guard, "attention_logit_growth") == []


@pytest.mark.parametrize("pack", ["checkpoint", "offload"])
def test_packed_activations_are_left_packed(pack):
    """Under checkpoints or offloading the saved query and key are not asked for: nothing is recomputed, and the run says so."""
    model, unpacked = gpt("fused"), []
    plain = [block.forward for block in model.blocks]
    if pack == "checkpoint":
        for block, forward in zip(model.blocks, plain, strict=True):
            block.forward = lambda x, forward=forward: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer) as guard:
        for i in range(3):
            x, y = make_batch("transformer", seed=i)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t) if pack == "offload" else torch.enable_grad():
                loss = criterion(model(x), y)
            assert not unpacked
            loss.backward()
            unpacked.clear()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert "attention_logit" not in guard.coverage.observed
    assert any("saved-tensor hooks" in why for why in guard.coverage.not_observed.values())


@pytest.mark.parametrize("kind", ["explicit", "library", "fused"])
def test_watching_attention_changes_nothing(kind):
    """Weights with and without the guard are the same bit for bit."""

    def weights(guarded):
        model = gpt(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        guard = Guard(model, optimizer, every=2) if guarded else None
        for i in range(8):
            x, y = make_batch("transformer", seed=i)
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if guard:
                guard.step(loss)
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def test_an_attention_that_nobody_takes_over_is_listed():
    """A fused attention whose output goes to no watched layer is not observed, and coverage says so."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 32)

        def forward(self, x):
            h = self.first(x).view(-1, 1, 4, 8)
            return F.scaled_dot_product_attention(h, h, h).flatten(1)[:, :4]

    guard = train(Bare(), steps=3)
    assert "stay inside the kernel" in guard.coverage.not_observed["attention logits"]


def small(*last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), *last)


def bits(outputs, y):
    return F.one_hot(y, 3).float()


SQUASHED = {
    "softmax": (small(nn.Softmax(dim=1)), lambda o, y: F.cross_entropy(o, y), "3", "softmax before cross entropy"),
    "softmax by hand": (small(), lambda o, y: nn.CrossEntropyLoss()(o.softmax(-1), y), "output", "softmax before cross entropy"),
    "sigmoid": (small(nn.Sigmoid()), lambda o, y: F.cross_entropy(o, y), "3", "sigmoid before cross entropy"),
    "places": (small(nn.Softmax(dim=-1)), lambda o, y: F.cross_entropy(o.view(4, -1, 3).transpose(1, 2), y.view(4, -1)), "3", "softmax before cross entropy"),
    "binary": (small(nn.Sigmoid()), lambda o, y: F.binary_cross_entropy_with_logits(o, bits(o, y)), "3", "sigmoid before BCE with logits"),
}
FITTING = {
    "logits": (small(), lambda o, y: F.cross_entropy(o, y)),
    "log-softmax": (small(nn.LogSoftmax(dim=1)), lambda o, y: F.cross_entropy(o, y)),
    "likelihood": (small(nn.Softmax(dim=1)), lambda o, y: F.nll_loss((o + 1e-8).log(), y)),
    "scaled": (small(nn.Softmax(dim=1)), lambda o, y: F.cross_entropy(10 * o, y)),
    "probabilities": (small(nn.Sigmoid()), lambda o, y: F.binary_cross_entropy(o, bits(o, y))),
    "gate": (small(nn.Softmax(dim=1), nn.Linear(3, 3)), lambda o, y: F.cross_entropy(o, y)),
    "another axis": (small(nn.Softmax(dim=0)), lambda o, y: F.cross_entropy(o, y)),
}


def judged(model, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Guard(model, optimizer, halt=None) as guard:
        for i in range(12):
            with drawn_with(i):
                x, y = torch.randn(16, 8), torch.randint(3, (16,))
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    return heard(guard, "wrong_output_activation")


@pytest.mark.parametrize("name", SQUASHED)
def test_what_the_loss_holds_already_is_named_at_the_first_step(name):
    """A softmax or sigmoid before a loss on logits is said once, at step 0, at its module, with the remedy of the check before the first step."""
    model, loss_of, where, cause = SQUASHED[name]
    (finding,) = judged(model, loss_of)
    assert (finding.step, finding.where, finding.severity, finding.causes[0].name) == (0, where, Severity.WARNING, cause)
    assert finding.remedies[0].change == {"output_activation": "none"}
    assert [round(e.value, 3) for e in finding.evidence] == ([] if name == "binary" else [0.551])


@pytest.mark.parametrize("name", FITTING)
def test_an_output_that_fits_its_loss_is_silent(name):
    """Log-probabilities, scaled or gated probabilities, and losses on probabilities are what they should be."""
    assert judged(*FITTING[name]) == []
