"""Healthy programs: fine-tuning in its many forms, several tasks at once, and reduced precision."""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import ConvNet, mlp, warmup_cosine
from gallery.registry import Job, program


@cache
def _pretrained(kind: str) -> nn.Module:
    """A net that knows whether a digit is even and whether it exceeds 4; trained once a process, with its own seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    d = data.digits("image" if kind == "conv" else "flat")
    model = ConvNet(12, classes=4) if kind == "conv" else mlp(64, 128, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for x, y in data.draws(d.x, d.y % 2 + 2 * (d.y > 4).long(), 64, 250, torch.Generator().manual_seed(7)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.random.set_rng_state(state)
    return model


def pretrained(kind: str = "mlp") -> nn.Module:
    """A copy of it."""
    return copy.deepcopy(_pretrained(kind))


@program(healthy=True, bar=0.65, families=("finetune", "conv"))
def finetune_frozen_backbone(job: Job) -> float:
    """Only a new head learns; the trunk is frozen and in eval mode."""
    d = data.digits("image")
    model = pretrained("conv").requires_grad_(False)
    model.head = nn.Linear(24, 10)
    model.eval()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("finetune",))
def finetune_full_tiny_rate(job: Job) -> float:
    """A net that already knows its task goes on at 2e-5 with AdamW; almost nothing changes, and that is right."""
    d = data.digits()
    model = mlp(64, 128, 64, 10)
    first = torch.optim.Adam(model.parameters(), lr=2e-3)
    for x, y in data.draws(d.x, d.y, 64, 150, job.generator):
        first.zero_grad()
        F.cross_entropy(model(x), y).backward()
        first.step()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    loader = data.loader(d.x, d.y, 32, job.generator)
    schedule = warmup_cosine(optimizer, 30, 10 * len(loader))
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(10):
        for x, y in guard.batches(loader):
            loss = criterion(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank addition that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, base.in_features) / rank**0.5), nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + B A x."""
        return self.base(x) + (x @ self.a.T) @ self.b.T


@program(healthy=True, bar=0.9, families=("finetune", "lora"))
def finetune_lora(job: Job) -> float:
    """LoRA on every hidden layer, a new head, warm-up."""
    d = data.digits()
    model = pretrained()
    model[0], model[2], model[4] = LoRA(model[0]), LoRA(model[2]), nn.Linear(64, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = warmup_cosine(optimizer, 20, 500)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("finetune", "conv"))
def finetune_gradual_unfreezing(job: Job) -> float:
    """The head alone, then the trunk too, at a tenth of the rate; all in the optimizer from the start."""
    d = data.digits("image")
    model = pretrained("conv")
    model.head = nn.Linear(24, 10)
    model.body.requires_grad_(False)
    groups = [{"params": model.body.parameters(), "lr": 1e-3}, {"params": model.head.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for i, (x, y) in enumerate(guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 400))):
        if i == 120:
            model.body.requires_grad_(True)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.6, families=("finetune", "fewshot"))
def finetune_head_few_shots(job: Job) -> float:
    """Five digits of each class, a linear head, the whole set as one batch, strong decay."""
    d = data.digits()
    trunk = pretrained()[:4].requires_grad_(False)
    rows = torch.cat([torch.nonzero(d.y == c)[:5, 0] for c in range(10)])
    model, criterion = nn.Sequential(trunk, nn.Linear(64, 10)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    job.preflight(model, [(d.x[rows], d.y[rows])], criterion, optimizer)
    guard = job.guard(model, optimizer)
    for i in range(300):
        optimizer.zero_grad()
        loss = criterion(model(d.x[rows]), d.y[rows])
        loss.backward()
        optimizer.step()
        guard.step(loss)
        if i % 30 == 29:
            guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("multitask",))
def multitask_dict(job: Job) -> float:
    """Three heads on one trunk, weights of the tasks learned by uncertainty; the sum goes below zero."""
    d = data.digits()
    trunk, heads = mlp(64, 96, 64), nn.ModuleDict({"digit": nn.Linear(64, 10), "even": nn.Linear(64, 1), "ink": nn.Linear(64, 1)})
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    model.register_parameter("log_variance", nn.Parameter(torch.zeros(3)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        h = F.relu(trunk(x))
        raw = torch.stack([
            F.cross_entropy(heads["digit"](h), y),
            F.binary_cross_entropy_with_logits(heads["even"](h).squeeze(1), (y % 2 == 0).float()),
            F.mse_loss(heads["ink"](h).squeeze(1), x.mean(1)),
        ])  # fmt: skip
        terms = torch.exp(-model.log_variance) * raw + 0.5 * model.log_variance
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
        guard.step(dict(zip(("digit", "even", "ink"), terms, strict=True)))
    with torch.no_grad():
        return (heads["digit"](F.relu(trunk(d.test_x))).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.9, families=("semisupervised",))
def mean_teacher_pseudo_labels(job: Job) -> float:
    """300 labels; the others are labelled by an EMA teacher where it is sure. The unlabelled term grows at first."""
    d = data.digits()
    model = mlp(64, 128, 10, dropout=0.2)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for i in range(600):
        seen = torch.randint(300, (32,), generator=job.generator)
        free = d.x[torch.randint(300, len(d.x), (64,), generator=job.generator)]
        sure, guess = F.softmax(teacher(free), 1).max(1)
        noisy = model(free + 0.3 * torch.randn(free.shape))
        unlabelled = (F.cross_entropy(noisy, guess, reduction="none") * (sure > 0.95)).mean()
        loss = F.cross_entropy(model(d.x[seen]), d.y[seen]) + min(1.0, i / 200) * unlabelled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.02)
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


# ---- precision


@program(healthy=True, bar=0.9, families=("precision",))
def precision_bf16_weights(job: Job) -> float:
    """Weights, gradients and moments in bfloat16; the rate is large enough to survive rounding."""
    d = data.digits()
    model = mlp(64, 128, 10).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(torch.bfloat16)).float(), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return (model(d.test_x.to(torch.bfloat16)).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.94, families=("precision",))
def precision_autocast(job: Job) -> float:
    """Autocast to bfloat16 with fp32 weights."""
    d = data.digits()
    model = mlp(64, 128, 128, 10, activation=nn.GELU, norm=nn.LayerNorm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("precision", "scaler"))
def precision_fp16_scaler(job: Job) -> float:
    """Half precision under a GradScaler that starts far too high: the first dozen steps are skipped, as they should be."""
    d = data.digits()
    model = mlp(64, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
    guard = job.guard(model, optimizer, scaler=scaler)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("precision",))
def precision_master_weights(job: Job) -> float:
    """A bfloat16 net whose updates are made on fp32 copies that the optimizer holds."""
    d = data.digits()
    model = mlp(64, 96, 10).to(torch.bfloat16)
    master = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.Adam(master, lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        loss = F.cross_entropy(model(x.to(torch.bfloat16)).float(), y)
        model.zero_grad()
        loss.backward()
        for p, q in zip(model.parameters(), master, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(model.parameters(), master, strict=True):
                p.copy_(q)
        guard.step(loss)
    with torch.no_grad():
        return (model(d.test_x.to(torch.bfloat16)).argmax(1) == d.test_y).float().mean().item()
