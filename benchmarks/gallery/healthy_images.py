"""Healthy programs: convolutions, residual nets, normalisations of all kinds, and images as outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gallery import data
from gallery.models import Block, ConvNet, ResNet, mlp, warmup_cosine
from gallery.registry import Job, program


@program(healthy=True, bar=0.95, families=("conv", "schedule"))
def convnet_momentum_cosine(job: Job) -> float:
    """Batch-norm, momentum SGD at 0.1, cosine, shifted images."""
    d = data.digits("image")
    model, criterion = ConvNet(12), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = data.loader(d.x, d.y, 64, job.generator)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16 * len(loader))
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(16):
        model.train()
        for x, y in guard.batches(loader):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = criterion(model(torch.roll(x, shift, (2, 3))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("conv",))
def convnet_without_norm(job: Job) -> float:
    """No norm, pixels in [0, 1], Adam."""
    d = data.digits("image")
    model = ConvNet(16, norm="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 400)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.93, families=("conv", "residual", "schedule"))
def resnet_zero_gamma_one_cycle(job: Job) -> float:
    """Residual branches that start at zero, one cycle."""
    d = data.digits("image")
    model = ResNet(16, 3, zero=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=350)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 350)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.88, families=("conv", "normalization"))
def convnet_group_norm_small_batch(job: Job) -> float:
    """Group norm, four images at a time."""
    d = data.digits("image")
    model = ConvNet(12, norm="group")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 4, job.generator), 1200)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.94, families=("mlp", "normalization"))
def weight_norm_mlp(job: Job) -> float:
    """Weight normalisation as a parametrization: a gain and a direction for each unit."""
    d = data.digits()
    model = mlp(64, 96, 96, 10)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp", "normalization"))
def spectral_norm_mlp(job: Job) -> float:
    """Every hidden layer has a largest singular value of 1."""
    d = data.digits()
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(64, 96)), nn.LeakyReLU(0.2), norm(nn.Linear(96, 96)), nn.LeakyReLU(0.2), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.9, families=("mlp", "deep", "normalization"))
def deep_batchnorm_mlp(job: Job) -> float:
    """Twelve layers, He's initialisation, batch-norm after each."""
    d = data.digits()
    model = mlp(64, *[64] * 12, 10, norm=nn.BatchNorm1d)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    job.preflight(model, data.loader(d.x, d.y, 64), nn.CrossEntropyLoss(), optimizer)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator, drop_last=True), 400)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class ViT(nn.Module):
    """Four by four patches of 2 x 2 pixels, a class token; with checkpointed blocks if asked for."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList([Block(width, 4, causal=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.place
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h)
        return self.head(self.norm(h)[:, 0])


@program(healthy=True, bar=0.9, families=("transformer", "conv"))
def vit_zero_head(job: Job) -> float:
    """A vision transformer whose head and class token start at zero."""
    d = data.digits("image")
    model, criterion = ViT(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    loader = data.loader(d.x, d.y, 64, job.generator)
    schedule = warmup_cosine(optimizer, 40, 20 * len(loader))
    job.preflight(model, loader, criterion, optimizer)
    guard = job.guard(model, optimizer)
    for _ in range(20):
        for x, y in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            guard.step(loss)
        guard.validation(data.mean_loss(model, criterion, d.test_x, d.test_y))
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=0.85, families=("transformer", "checkpointing"))
def vit_checkpointed(job: Job) -> float:
    """Activations are computed again during backward."""
    d = data.digits("image")
    model = ViT()
    model.checkpointed = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 300)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


@program(healthy=True, bar=-0.31, families=("autoencoder",))
def autoencoder_bottleneck(job: Job) -> float:
    """64 - 32 - 8 - 32 - 64 with ReLUs, a sigmoid at the end and BCE on gray pixels, whose entropy keeps the loss up."""
    x = data.digits("image").x.flatten(1)
    model = nn.Sequential(*mlp(64, 32, 8), nn.ReLU(), *mlp(8, 32, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for (xb,) in data.endless(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 64, shuffle=True, generator=job.generator), 1200):
        loss = F.binary_cross_entropy(model(xb), xb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return -data.mean_loss(model, nn.BCELoss(), x, x)


class UNet(nn.Module):
    """One level down and up, with a skip connection."""

    def __init__(self, out: int = 1, width: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, out, 8, 8)."""
        a = self.down(x)
        return self.last(torch.cat([a, self.up(self.deep(a))], 1))


@program(healthy=True, bar=0.5, families=("conv", "denoising"))
def unet_denoiser(job: Job) -> float:
    """Noise of 0.3 is taken out; scored by the share of the noise's power that is gone."""
    d = data.digits("image")
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for clean, _ in data.endless(data.loader(d.x, d.y, 32, job.generator), 350):
        noisy = clean + 0.3 * torch.randn(clean.shape)
        guard.batch(noisy, clean)
        loss = F.mse_loss(model(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    model.eval()
    with torch.no_grad():
        return 1 - F.mse_loss(model(d.test_x + 0.3 * torch.randn(d.test_x.shape)), d.test_x).item() / 0.09


@program(healthy=True, bar=0.9, families=("conv", "segmentation"))
def segmentation_ignore_index(job: Job) -> float:
    """Ink or paper from a noisy image; the border is labelled 255 and ignored, paper is the far commoner class."""
    d = data.digits("image")
    model = UNet(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    labels = (d.x[:, 0] > 0.6).long()
    labels[:, 0], labels[:, -1] = 255, 255
    job.preflight(model, data.loader(d.x, labels, 32), criterion, optimizer)
    guard = job.guard(model, optimizer)
    for clean, y in guard.batches(data.endless(data.loader(d.x, labels, 32, job.generator), 300)):
        loss = criterion(model(clean + 0.15 * torch.randn(clean.shape)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    model.eval()
    with torch.no_grad():
        return (model(d.test_x).argmax(1) == (d.test_x[:, 0] > 0.6)).float().mean().item()


@program(healthy=True, bar=0.9, families=("conv", "gates"))
def convnet_squeeze_excite(job: Job) -> float:
    """Sigmoid gates over channels, depth-wise convolutions, SiLU."""
    d = data.digits("image")

    class Gated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.norm = nn.BatchNorm2d(width)
            self.gate = nn.Sequential(nn.Linear(width, width // 4), nn.SiLU(), nn.Linear(width // 4, width), nn.Sigmoid())
            self.mix = nn.Conv2d(width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.depth(x)))
            return x + self.mix(h * self.gate(h.mean((2, 3)))[:, :, None, None])

    model = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), Gated(24), nn.MaxPool2d(2), Gated(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    optimizer = torch.optim.NAdam(model.parameters(), lr=4e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 400)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)
