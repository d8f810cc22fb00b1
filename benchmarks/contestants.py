"""What people watch a training loop with today, each as they would write it, and the floor: the same signals by hand.

A contestant is a class with the phases of a step; `NAMES` holds them all. Each says which of lossguard's five signals it
records: L loss, G gradient norm of each layer, U update-to-weight ratio, D dead ReLU units, S softmax logits. A lower-case
letter is a part of it (a total instead of each layer, a histogram instead of a norm).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from jobs import Job
from torch import Tensor, nn

from lossguard import Guard

NAMES: dict[str, type[Contestant]] = {}


class Contestant:
    """Sees the phases of every step. every: the interval at which it records, where it has one."""

    signals = "....."
    always = False  # works at every step, whatever `every` says

    def __init__(self, job: Job, every: int) -> None:
        self.job, self.every, self.done = job, every, 0

    @property
    def due(self) -> bool:
        return self.done % self.every == 0

    def shown(self, x: Tensor, y: Tensor) -> None:
        """The batch, before the forward pass."""

    def differentiated(self) -> None:
        """The backward pass has ended."""

    def stepped(self, loss: Tensor) -> None:
        """The optimizer has stepped."""
        self.done += 1

    def rest(self) -> None:
        """Another contestant's turn: what hangs on the whole process is taken off."""

    def wake(self) -> None:
        """Its turn again."""

    def close(self) -> None:
        """Nothing is left behind."""


def contestant(name: str) -> Callable[[type[Contestant]], type[Contestant]]:
    def register(cls: type[Contestant]) -> type[Contestant]:
        NAMES[name] = cls
        return cls

    return register


@contestant("lossguard")
class Guarded(Contestant):
    """The guard as a user attaches it: all signals, all rules."""

    signals = "LGUDS"

    def __init__(self, job: Job, every: int, **options: Any) -> None:
        super().__init__(job, every)
        self.guard = Guard(job.model, job.optimizer, every=every, **options)

    def shown(self, x: Tensor, y: Tensor) -> None:
        self.guard.batch(x, y)

    def stepped(self, loss: Tensor) -> None:
        self.guard.step(loss)

    def rest(self) -> None:
        self.guard.watch_forward(False)  # its hook sees every module of the process, the others' too

    def wake(self) -> None:
        self.guard.watch_forward(True)

    def close(self) -> None:
        self.guard.close()


@contestant("item_loop")
class ItemLoop(Contestant):
    """The loop found in forums: the norm of each gradient, read one by one."""

    signals = "LG..."

    def stepped(self, loss: Tensor) -> None:
        if self.due:
            self.loss = loss.item()
        super().stepped(loss)

    def differentiated(self) -> None:
        if self.due:
            self.seen = {name: p.grad.norm().item() for name, p in self.job.model.named_parameters() if p.grad is not None}


@contestant("all_by_hand")
class AllByHand(Contestant):
    """All five signals as one would write them first: a hook on each ReLU, a copy of each weight, a read of each number."""

    signals = "LGUDS"

    def __init__(self, job: Job, every: int) -> None:
        super().__init__(job, every)
        self.dead: dict[str, float] = {}
        self.hooks = [m.register_forward_hook(self._hook(name)) for name, m in job.model.named_modules() if isinstance(m, nn.ReLU)]
        self.hooks.append(job.model.register_forward_hook(self._logits))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.due:
                self.dead[name] = (output <= 0).flatten(1).all(dim=0).float().mean().item()

        return hook

    def _logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.due:
            self.peak = output.detach().abs().max().item()

    def differentiated(self) -> None:
        if self.due:
            self.norms = {name: p.grad.norm().item() for name, p in self.job.model.named_parameters() if p.grad is not None}
            self.before = {name: p.detach().clone() for name, p in self.job.model.named_parameters()}

    def stepped(self, loss: Tensor) -> None:
        if self.due:
            new = self.job.model.named_parameters()
            self.ratios = {name: ((p.detach() - self.before[name]).norm() / self.before[name].norm()).item() for name, p in new}
            self.loss = loss.item()
        super().stepped(loss)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@contestant("total_norm")
class TotalNorm(Contestant):
    """`torch.nn.utils.get_total_norm` and a read."""

    signals = "Lg..."

    def differentiated(self) -> None:
        if self.due:
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.job.model.parameters() if p.grad is not None]).item()


@contestant("lightning_grad_norm")
class LightningGradNorm(Contestant):
    """`lightning.pytorch.utilities.grad_norm`, as its documentation logs it."""

    signals = "LG..."

    def __init__(self, job: Job, every: int) -> None:
        from lightning.pytorch.utilities import grad_norm

        super().__init__(job, every)
        self.grad_norm = grad_norm

    def differentiated(self) -> None:
        if self.due:
            self.norms = {name: float(norm) for name, norm in self.grad_norm(self.job.model, norm_type=2).items()}


class _Written(Contestant):
    """Contestants that write into a folder."""

    def __init__(self, job: Job, every: int) -> None:
        super().__init__(job, every)
        self.folder = tempfile.mkdtemp(prefix="lossguard-cost-")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _TensorBoard(_Written):
    def __init__(self, job: Job, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(job, every)
        self.writer = SummaryWriter(self.folder)

    def close(self) -> None:
        self.writer.close()
        super().close()


@contestant("tensorboard_scalars")
class TensorBoardScalars(_TensorBoard):
    """The loss and the norm of each gradient as TensorBoard scalars."""

    signals = "LG..."

    def differentiated(self) -> None:
        if self.due:
            for name, p in self.job.model.named_parameters():
                self.writer.add_scalar(f"grad/{name}", p.grad.norm(), self.done)  # type: ignore[union-attr]

    def stepped(self, loss: Tensor) -> None:
        if self.due:
            self.writer.add_scalar("loss", loss, self.done)
        super().stepped(loss)


@contestant("tensorboard_histograms")
class TensorBoardHistograms(_TensorBoard):
    """Histograms of all weights and gradients."""

    signals = ".g..."

    def differentiated(self) -> None:
        if self.due:
            for name, p in self.job.model.named_parameters():
                self.writer.add_histogram(f"weight/{name}", p, self.done)
                self.writer.add_histogram(f"grad/{name}", p.grad, self.done)


@contestant("wandb_watch")
class WandbWatch(_Written):
    """`wandb.watch(log="all")` in an offline run."""

    signals = "Lg..."
    always = True  # its hooks stay between the steps it logs at

    def __init__(self, job: Job, every: int) -> None:
        import wandb

        super().__init__(job, every)
        self.run = wandb.init(mode="offline", dir=self.folder, settings=wandb.Settings(silent=True, console="off"))
        self.run.watch(job.model, log="all", log_freq=every)

    def stepped(self, loss: Tensor) -> None:
        self.run.log({"loss": loss}, commit=True)
        super().stepped(loss)

    def close(self) -> None:
        self.run.unwatch(self.job.model)
        self.run.finish()
        super().close()


@contestant("anomaly_mode")
class AnomalyMode(Contestant):
    """`torch.autograd.set_detect_anomaly`: finds NaN in a backward pass, records nothing."""

    always = True

    def shown(self, x: Tensor, y: Tensor) -> None:
        torch.autograd.set_detect_anomaly(True)

    def stepped(self, loss: Tensor) -> None:
        torch.autograd.set_detect_anomaly(False)
        super().stepped(loss)

    def close(self) -> None:
        torch.autograd.set_detect_anomaly(False)


@contestant("floor")
class Floor(Contestant):
    """All five signals in as few operations as we could find, without rules, names, odd tensors or a hand-over.

    Tensors of one size are rows of one buffer (large ones by the whole: a sample would be cheaper), so that a norm of all of
    them is one operation; the outputs of ReLUs of one shape are stacked once.
    """

    signals = "LGUDS"
    KEPT = 256  # recorded steps that are kept

    def __init__(self, job: Job, every: int) -> None:
        super().__init__(job, every)
        self.parameters = sorted(job.model.parameters(), key=lambda p: p.numel())
        sizes = [p.numel() for p in self.parameters]
        device = self.parameters[0].device
        self.buffer = torch.zeros(3, sum(sizes), device=device)
        self.groups: list[tuple[slice, int, int]] = []
        first = 0
        for size in dict.fromkeys(sizes):
            count = sizes.count(size)
            self.groups.append((slice(first, first + count * size), count, size))
            first += count * size
        self.views = list(self.buffer[0].split(sizes))
        self.tape = torch.zeros(self.KEPT, 3 * len(sizes) + 2, device=device)
        self.relus = [m for m in job.model.modules() if isinstance(m, nn.ReLU)]
        self.outputs: list[Tensor] = []
        self.hooks: list[Any] = []
        self.silent: dict[Any, Tensor] = {}

    def shown(self, x: Tensor, y: Tensor) -> None:
        if self.due:
            self.hooks = [m.register_forward_hook(self._keep) for m in self.relus]
            self.hooks.append(self.job.model.register_forward_hook(self._logits))

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.append(output.detach())

    def _logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.extremes = output.detach().aminmax()

    @torch.no_grad()
    def differentiated(self) -> None:
        if self.due:
            torch._foreach_copy_(self.views, [p.grad.view(-1) for p in self.parameters if p.grad is not None])
            torch.cat([p.view(-1) for p in self.parameters], out=self.buffer[1])

    @torch.no_grad()
    def stepped(self, loss: Tensor) -> None:
        if self.due:
            for hook in self.hooks:
                hook.remove()
            torch.cat([p.view(-1) for p in self.parameters], out=self.buffer[2])
            self.buffer[2].sub_(self.buffer[1])
            row = self.tape[self.done // self.every % self.KEPT]
            norms = [torch.linalg.vector_norm(self.buffer[:, part].view(3, count, size), dim=2).view(-1) for part, count, size in self.groups]
            torch.cat([*norms, torch.stack([loss.detach(), *self.extremes])[:2]], out=row)
            by_shape: dict[Any, list[Tensor]] = {}
            for output in self.outputs:
                by_shape.setdefault(output.shape, []).append(output)
            for shape, outputs in by_shape.items():
                stacked = torch.stack(outputs)
                peaks = stacked.amax(dim=[1, *range(3, stacked.dim())])
                counters = self.silent.setdefault(shape, torch.zeros_like(peaks))
                counters.add_(1.0).mul_(peaks <= 0)
            self.outputs.clear()
        super().stepped(loss)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
