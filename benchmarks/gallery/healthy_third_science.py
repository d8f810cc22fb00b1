"""Healthy programs, third set: science and engineering. Operators, inverse problems, circuits, splats, point processes, physical units."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from gallery import data
from gallery.models import mlp
from gallery.registry import Job, program


def explained(guess: Tensor, truth: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - ((guess - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights on the lowest modes, beside a pointwise map."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight, self.modes = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width), modes
        self.point = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, N) -> (B, W, N)."""
        low = torch.einsum("bin,ion->bon", torch.fft.rfft(x)[..., : self.modes], self.weight)
        return torch.fft.irfft(low, n=x.shape[-1]) + self.point(x)


@program(healthy=True, bar=0.85, families=("third", "operator"))
def burgers_fourier_operator(job: Job) -> float:
    """A Fourier neural operator learns Burgers' equation: its spectral weights are complex numbers."""
    k = torch.fft.rfftfreq(64, 1 / 64)
    shape = torch.randn(480, 33, dtype=torch.cfloat, generator=job.generator) * 64 * (k < 6) / (1 + k)
    start = now = torch.fft.irfft(shape)
    for _ in range(150):
        hat = torch.fft.rfft(now - 0.002 * now * torch.fft.irfft(1j * k * torch.fft.rfft(now)))
        now = torch.fft.irfft(hat * torch.exp(-0.05 * 0.002 * k**2) * (k < 22))
    d = data.split(start, now)
    model = nn.Sequential(nn.Conv1d(1, 16, 1), Spectral(16, 12), nn.GELU(), Spectral(16, 12), nn.GELU(), nn.Conv1d(16, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 380)):
        loss = ((model(x[:, None])[:, 0] - y).norm(dim=1) / y.norm(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return 1 - ((model(d.test_x[:, None])[:, 0] - d.test_y).norm(dim=1) / d.test_y.norm(dim=1)).mean().item()


@program(healthy=True, bar=0.9, families=("third", "physics"))
def pendulum_hamiltonian(job: Job) -> float:
    """A Hamiltonian net: motion is the gradient of an energy, so the last bias never has a gradient. Scored by the motion it explains."""
    state = 4 * torch.rand(700, 2, generator=job.generator) - 2
    motion = torch.stack([state[:, 1], -torch.sin(state[:, 0])], 1)
    d = data.split(state, motion + 0.05 * torch.randn(700, 2, generator=job.generator))
    energy = mlp(2, 48, 48, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(energy.parameters(), lr=2e-3)

    def field(s: Tensor) -> Tensor:
        s = s.clone().requires_grad_()
        slope = torch.autograd.grad(energy(s).sum(), s, create_graph=True)[0]
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)

    guard = job.guard(energy, optimizer)
    for s, m in data.endless(data.loader(d.x, d.y, 64, job.generator), 600):
        loss = F.mse_loss(field(s), m)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return explained(field(d.test_x).detach(), d.test_y)


class Prey(nn.Module):
    """Lotka and Volterra's equations with four unknown rates, kept positive by an exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.5, 0.1, 0.3, 0.2]).log())

    def flow(self, s: Tensor) -> Tensor:
        """The derivative of (prey, foxes)."""
        a, b, c, e = self.logs.exp()
        return torch.stack([s[:, 0] * (a - b * s[:, 1]), s[:, 1] * (e * s[:, 0] - c)], 1)

    def forward(self, s: Tensor, steps: int = 10) -> Tensor:
        """Half a year later, by Runge and Kutta."""
        h = 0.5 / steps
        for _ in range(steps):
            k1 = self.flow(s)
            k2 = self.flow(s + h / 2 * k1)
            k3 = self.flow(s + h / 2 * k2)
            s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.flow(s + h * k3))
        return s


@program(healthy=True, bar=0.85, families=("third", "inverse"))
def foxes_and_rabbits_inverse(job: Job) -> float:
    """Four rates of a population model are all there is to learn; animals are counted, so losses begin in the hundreds. Scored by the worst rate."""
    true, model = Prey(), Prey()
    rates = torch.tensor([1.1, 0.04, 0.4, 0.01])
    with torch.no_grad():
        true.logs.copy_(rates.log())
        model.logs.copy_(torch.tensor([0.5, 0.02, 0.8, 0.02]).log())
        path = [torch.tensor([[30.0, 8.0]])]
        for _ in range(50):
            path.append(true(path[-1], 50))
    seen = torch.cat(path) * (1 + 0.02 * torch.randn(51, 2, generator=job.generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = job.guard(model, optimizer)
    for _ in range(250):
        loss = F.mse_loss(model(seen[:-1]), seen[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return 1 - (model.logs.detach().exp() / rates - 1).abs().max().item()


class Circuit(nn.Module):
    """Four qubits, layers of rotations and controlled signs; ``forward`` is the energy of an Ising chain in a transverse field."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.angles = nn.Parameter(0.1 * torch.randn(layers, 4, dtype=torch.float64))
        x, z, one = torch.tensor([[0.0, 1], [1, 0]]).double(), torch.tensor([[1.0, 0], [0, -1]]).double(), torch.eye(2).double()

        def kron(parts: list[Tensor]) -> Tensor:
            whole = parts[0]
            for part in parts[1:]:
                whole = torch.kron(whole, part)
            return whole

        self.kron = kron
        pairs = [kron([z if j in (i, i + 1) else one for j in range(4)]) for i in range(3)]
        energy = -sum(pairs) - sum(kron([x if j == i else one for j in range(4)]) for i in range(4))
        both = [kron([(one - z) / 2 if j in (i, i + 1) else one for j in range(4)]) for i in range(3)]
        self.register_buffer("energy", energy)
        self.register_buffer("signs", torch.prod(torch.stack([1 - 2 * b.diagonal() for b in both]), 0))

    def forward(self) -> Tensor:
        """The energy."""
        state = torch.zeros(16, dtype=torch.complex128)
        state[0] = 1
        for angles in self.angles:
            c, s = torch.cos(angles / 2), torch.sin(angles / 2)
            turns = [torch.stack([torch.stack([c[i], -s[i]]), torch.stack([s[i], c[i]])]) for i in range(4)]
            state = self.signs * (self.kron(turns).to(torch.complex128) @ state)
        return (state.conj() @ (self.energy.to(torch.complex128) @ state)).real


@program(healthy=True, bar=0.93, families=("third", "physics"))
def spins_variational_circuit(job: Job) -> float:
    """A variational quantum eigensolver: no data, a deterministic energy in double precision that is negative from the start."""
    model = Circuit()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    guard = job.guard(model, optimizer)
    for _ in range(250):
        loss = model()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return (loss / torch.linalg.eigvalsh(model.energy)[0]).item()


@cache
def photo(name: str, size: int) -> Tensor:
    """A bundled photograph in gray, (size, 1.5 size), in [0, 1]."""
    whole = torch.tensor(datasets.load_sample_image(name)).float().mean(2)[None, None] / 255
    return F.interpolate(whole, (size, size * 3 // 2), mode="area")[0, 0]


@program(healthy=True, bar=8.0, families=("third", "denoising"))
def photo_noise_to_noise(job: Job) -> float:
    """Noise2Noise: the target is as noisy as the input, so the loss hardly leaves the noise's power. Scored in decibels gained on the clean image."""
    clean = photo("flower.jpg", 200)
    model = nn.Sequential(nn.Conv2d(1, 20, 5, padding=2), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 1, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for _ in range(240):
        rows, columns = torch.randint(0, 168, (8,), generator=job.generator), torch.randint(0, 268, (8,), generator=job.generator)
        crops = torch.stack([clean[r : r + 32, c : c + 32] for r, c in zip(rows.tolist(), columns.tolist())])[:, None]
        x, y = (crops + 0.2 * torch.randn(crops.shape, generator=job.generator) for _ in range(2))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=job.generator)
    with torch.no_grad():
        return 10 * math.log10(F.mse_loss(noisy, clean).item() / F.mse_loss(model(noisy[None, None])[0, 0], clean).item())


class Splats(nn.Module):
    """Gaussian blobs on a plane."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(count, 2, generator=generator))
        self.scale = nn.Parameter(torch.full((count, 2), -2.5))
        self.angle = nn.Parameter(math.pi * torch.rand(count, generator=generator))
        self.shade = nn.Parameter(torch.zeros(count))

    def forward(self, grid: Tensor) -> Tensor:
        """The shade at each point of (N, 2)."""
        away = grid[:, None] - self.place
        c, s = torch.cos(self.angle), torch.sin(self.angle)
        along = torch.stack([c * away[..., 0] + s * away[..., 1], c * away[..., 1] - s * away[..., 0]], -1)
        return torch.exp(-0.5 * (along / self.scale.exp()).square().sum(-1)) @ self.shade


@program(healthy=True, bar=0.93, families=("third", "rendering"))
def photo_gaussian_splats(job: Job) -> float:
    """Gaussian splatting of one picture: four groups with rates from 0.005 to 0.1, shades that start at 0 so that the rest has no gradient."""
    image = photo("china.jpg", 28)
    ys, xs = torch.meshgrid(torch.linspace(0, 1, 28), torch.linspace(0, 1, 42), indexing="ij")
    grid, target = torch.stack([ys, xs], -1).reshape(-1, 2), image.flatten() - image.mean()
    model = Splats(90, job.generator)
    rates = {"place": 5e-3, "scale": 2e-2, "angle": 5e-2, "shade": 0.1}
    optimizer = torch.optim.Adam([{"params": [getattr(model, k)], "lr": rate, "name": k} for k, rate in rates.items()], eps=1e-15)
    guard = job.guard(model, optimizer)
    for _ in range(300):
        loss = F.mse_loss(model(grid), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return explained(model(grid).detach(), target)


class Flat(nn.Module):
    """A place on the plane for each sample."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.places = nn.Parameter(1e-2 * torch.randn(count, 2, generator=generator))

    def forward(self) -> Tensor:
        """Student's similarities, which sum to one."""
        near = 1 / (1 + torch.cdist(self.places, self.places, compute_mode="donot_use_mm_for_euclid_dist").square())
        near = near * (1 - torch.eye(len(near)))
        return near / near.sum()


@program(healthy=True, bar=0.85, families=("third", "embedding"))
def digits_tsne_early_exaggeration(job: Job) -> float:
    """t-SNE by SGD at a rate of 100: similarities are exaggerated twelvefold for 100 steps, so the loss is an order larger until then."""
    d = data.digits()
    x, y = d.x[:400], d.y[:400]
    far = torch.cdist(x, x).square()
    p = torch.zeros(400, 400)
    low, high = torch.full((400, 1), 1e-4), torch.full((400, 1), 10.0)
    for _ in range(40):
        middle = (low * high).sqrt()
        p = torch.exp(-(far - far.fill_diagonal_(math.inf).amin(1, keepdim=True)) * middle)
        p = p / p.sum(1, keepdim=True)
        wide = -(p * (p + 1e-12).log()).sum(1, keepdim=True) > math.log(20)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = ((p + p.T) / 800).clamp(min=1e-12)
    model = Flat(400, job.generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0, momentum=0.5)
    guard = job.guard(model, optimizer)
    for i in range(400):
        if i == 100:
            optimizer.param_groups[0]["momentum"] = 0.8
        known = p * (12 if i < 100 else 1)
        loss = (known * (known.log() - model().clamp(min=1e-12).log())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    places = model.places.detach()
    return (y[torch.cdist(places, places).fill_diagonal_(math.inf).argmin(1)] == y).float().mean().item()


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate of the squared mean discrepancy under three widths; around zero for equal samples."""
    a2, b2, ab = (torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square() for u, v in ((a, a), (b, b), (a, b)))
    n, total = len(a), torch.zeros(())
    for width in (0.1, 0.5, 2.0):
        same = sum((torch.exp(-k / width).sum() - n) / (n * (n - 1)) for k in (a2, b2))
        total = total + same - 2 * torch.exp(-ab / width).mean()
    return total


@program(healthy=True, bar=0.9, families=("third", "generative"))
def moons_moment_matching(job: Job) -> float:
    """A generator trained by an unbiased distance of samples: the loss goes to zero and is often negative. Scored by the distance gone."""
    d = data.moons()
    model = mlp(2, 64, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    far = squared_mmd(model(torch.randn(120, 2, generator=job.generator)), d.test_x).item()
    guard = job.guard(model, optimizer)
    for x, _ in data.endless(data.loader(d.x, d.y, 120, job.generator), 600):
        loss = squared_mmd(model(torch.randn(120, 2, generator=job.generator)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        left = [squared_mmd(model(torch.randn(120, 2, generator=job.generator)), d.test_x).item() for _ in range(10)]
    return 1 - sum(left) / 10 / far


@program(healthy=True, bar=0.65, families=("third", "events"))
def rare_events_in_empty_batches(job: Job) -> float:
    """One row in thirty has a target: every other batch of 20 has none, and its loss and gradients are exactly zero."""
    x = torch.randn(12_000, 4, generator=job.generator)
    y = torch.tanh(2 * x[:, 0]) + x[:, 1].abs()
    known = torch.rand(12_000, generator=job.generator) < 1 / 30
    model = mlp(4, 64, 1, activation=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    for rows, mask in data.draws(torch.arange(12_000), known, 20, 1500, job.generator):
        loss = ((model(x[rows]).squeeze(1) - y[rows]).square() * mask).sum() / mask.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return explained(model(x[~known]).detach().squeeze(1), y[~known])
