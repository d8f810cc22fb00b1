"""Healthy programs: habits of real projects that look like faults to a rule that does not know them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import ConvNet, mlp
from gallery.registry import Job, program


@program(healthy=True, bar=0.93, families=("multitask", "unused"))
def unused_auxiliary_head(job: Job) -> float:
    """A second head of a model taken from elsewhere that this run never calls; its parameters are in the optimizer."""
    d = data.digits()
    model = nn.ModuleDict({"trunk": mlp(64, 96, 64), "head": nn.Linear(64, 10), "auxiliary": nn.Linear(64, 30)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 400)):
        loss = F.cross_entropy(model["head"](F.relu(model["trunk"](x))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return (model["head"](F.relu(model["trunk"](d.test_x))).argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.9, families=("multitask",))
def two_tasks_in_turns(job: Job) -> float:
    """Two data sets in turn, batch by batch, through one trunk: classes of wine and of cancer; the loss alternates."""
    wine, cancer = data.table("wine"), data.table("breast_cancer")
    model = nn.ModuleDict({"in0": nn.Linear(13, 32), "in1": nn.Linear(30, 32), "trunk": mlp(32, 32, 32), "out0": nn.Linear(32, 3), "out1": nn.Linear(32, 2)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sources = [data.endless(data.loader(d.x, d.y, 24, job.generator), 1000) for d in (wine, cancer)]
    guard = job.guard(model, optimizer)

    def forward(x: Tensor, k: int) -> Tensor:
        return model[f"out{k}"](F.relu(model["trunk"](F.relu(model[f"in{k}"](x)))))

    for i in range(600):
        x, y = next(sources[i % 2])
        loss = F.cross_entropy(forward(x, i % 2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return min((forward(d.test_x, k).argmax(1) == d.test_y).float().mean().item() for k, d in enumerate((wine, cancer)))


@program(healthy=True, bar=0.85, families=("continual",))
def stream_without_replay(job: Job) -> float:
    """A stream whose classes drift slowly: each batch holds three neighbouring digits. Scored on the last ones."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = job.guard(model, optimizer)
    for i in range(800):
        middle = i / 800 * 20 % 10
        near = torch.nonzero(((d.y - middle + 5) % 10 - 5).abs() < 1.6).squeeze(1)
        rows = near[torch.randint(len(near), (32,), generator=job.generator)]
        loss = F.cross_entropy(model(d.x[rows]), d.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    rows = torch.nonzero((d.test_y == 9) | (d.test_y == 0)).squeeze(1)
    return data.accuracy(model, d.test_x[rows], d.test_y[rows])


@program(healthy=True, bar=0.8, families=("privacy", "clipping"))
def private_clipped_and_noised(job: Job) -> float:
    """DP-SGD in spirit: each micro-batch's gradient is clipped to 1 by design, summed, and noise is added."""
    d = data.digits()
    model = mlp(64, 48, 10)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 400):
        total, losses = [torch.zeros_like(p) for p in parameters], []
        for xs, ys in zip(x.chunk(8), y.chunk(8), strict=True):
            loss = F.cross_entropy(model(xs), ys)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for t, p in zip(total, parameters, strict=True):
                t.add_(p.grad)
            losses.append(loss.detach())
        for t, p in zip(total, parameters, strict=True):
            p.grad = (t + 0.3 * torch.randn_like(t)) / 8
        optimizer.step()
        guard.step(torch.stack(losses).mean())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("optimizer",))
def muon_orthogonal_updates(job: Job) -> float:
    """Matrices are moved by orthogonalised momentum, vectors by AdamW: two optimizers, updates of fixed size."""
    d = data.digits()
    model = mlp(64, 96, 96, 10)
    matrices = [p for p in model.parameters() if p.dim() == 2]

    class Muon(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                x = m / (m.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.add_(x, alpha=-self.param_groups[0]["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    optimizers = [Muon(matrices, {"lr": 0.02}), torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2], lr=3e-3)]
    guard = job.guard(model, optimizers)
    for i, (x, y) in enumerate(guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500))):
        for o, rate in zip(optimizers, (0.02, 3e-3), strict=True):
            o.param_groups[0]["lr"] = rate * min(1.0, (500 - i) / 200)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.75, families=("recurrent", "regression", "forecast"))
def forecast_season_and_trend(job: Job) -> float:
    """A series with season, trend and noise is forecast by an LSTM, windows in order of time, validation on the end."""
    t = torch.arange(1200.0)
    series = torch.sin(t * 2 * math.pi / 24) + 0.5 * torch.sin(t * 2 * math.pi / 168) + t / 600 + 0.2 * torch.randn(1200, generator=job.generator)
    series = (series - series[:900].mean()) / series[:900].std()
    windows = series.unfold(0, 49, 1)
    x, y, vx, vy = windows[:850, :48, None], windows[:850, 48:], windows[900:, :48, None], windows[900:, 48:]
    rnn, head = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 1)
    model = nn.ModuleList([rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    for _ in range(12):
        for k in range(0, 850, 34):
            loss = F.l1_loss(x[k : k + 34, -1] + head(rnn(x[k : k + 34])[0][:, -1]), y[k : k + 34])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        with torch.no_grad():
            guard.validation(F.l1_loss(vx[:, -1] + head(rnn(vx)[0][:, -1]), vy))
    with torch.no_grad():
        error = (vx[:, -1] + head(rnn(vx)[0][:, -1]) - vy).square().mean()
        return 1 - (error / vy.var()).item()


@program(healthy=True, bar=0.85, families=("conv", "sampling"))
def weighted_sampler_augmented(job: Job) -> float:
    """A weighted sampler, augmentation, dropout, label smoothing and weight decay at once: the training loss stays high."""
    d = data.digits("image")
    sampler = torch.utils.data.WeightedRandomSampler((1.0 + d.y.float()).tolist(), len(d.y), generator=job.generator)
    loader = data.loader(d.x, d.y, 64, sampler=sampler, shuffle=False)
    model = nn.Sequential(ConvNet(12, classes=64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12, 16], 0.1)
    guard = job.guard(model, optimizer)
    for _ in range(18):
        model.train()
        for x, y in guard.batches(loader):
            x = torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (2, 3))
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        schedule.step()
        guard.validation(data.mean_loss(model, nn.CrossEntropyLoss(), d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp", "resume"))
def resumed_in_the_middle(job: Job) -> float:
    """The run is saved, and goes on in new objects under a new guard: it starts with a small loss and full moments."""
    d = data.digits()
    saved: dict[str, dict] = {}
    for _ in range(2):
        model = mlp(64, 64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        with job.guard(model, optimizer) as guard:
            for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 300)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                guard.step(loss)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=-2.2, families=("recurrent", "text"))
def sums_over_unequal_lengths(job: Job) -> float:
    """Character loss summed over sentences of 5 to 60 characters, as some code does: the loss varies twelvefold by length."""
    stream, letters = data.text()
    embed, rnn, head = nn.Embedding(letters, 48), nn.GRU(48, 64, batch_first=True), nn.Linear(64, letters)
    model = nn.ModuleList([embed, rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    last = 0.0
    for i in range(450):
        length = int(torch.randint(5, 60, (1,), generator=job.generator))
        x, y = next(data.windows(stream, length, 16, job.generator))
        loss = F.cross_entropy(head(rnn(embed(x))[0]).transpose(1, 2), y, reduction="sum") / 16
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
        guard.step(loss)
        last += loss.item() / length * (i >= 400) / 50
    return -last


@program(healthy=True, bar=0.93, families=("mlp", "sampling"))
def hard_example_mining(job: Job) -> float:
    """Only the hardest quarter of each batch counts: the loss stays high and jumps."""
    d = data.digits()
    model = mlp(64, 96, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        each = F.cross_entropy(model(x), y, reduction="none")
        loss = each.topk(len(each) // 4 or 1).values.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("conv", "normalization", "finetune"))
def float_loss_and_functional_relu(job: Job) -> float:
    """The loss is read with ``.item()`` each step, activations are functional, and gradients are set to zero in place."""
    d = data.digits()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.dropout(F.relu(self.b(F.leaky_relu(self.a(x)))), 0.1, self.training))

    model = Net()
    optimizer = torch.optim.Adamax(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 50, job.generator), 450):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss.item())
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.85, families=("mlp", "adversarial"))
def adversarial_training_fgsm(job: Job) -> float:
    """Each batch is attacked first: an extra backward pass that leaves gradients in the weights, cleared afterwards."""
    d = data.digits()
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in data.endless(data.loader(d.x, d.y, 64, job.generator), 400):
        attacked = x.clone().requires_grad_()
        F.cross_entropy(model(attacked), y).backward()
        attacked = (x + 0.2 * attacked.grad.sign()).detach()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(attacked), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)
