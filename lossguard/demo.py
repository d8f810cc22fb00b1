"""The demo: real models on real data that comes with installed packages, healthy and ill side by side.

Each run is a plain loop with a guard; what is printed is what a user sees. Data: scikit-learn's digits, and the text of
the standard library's help topics.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lossguard.actions import TrainingHalted, logger
from lossguard.findings import Finding, Severity
from lossguard.guard import Guard

LEAST = 70  # steps of each run: the corrupt batch is the 61st

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """One run: what it is, how to build it, what is wrong with it (empty: nothing), whether it must be halted."""

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    fault: str = ""
    halts: bool = False
    loss: Loss = F.cross_entropy
    clears: bool = True


class CharacterModel(nn.Module):
    """A small causal transformer over characters: (B, T) indices -> (B, vocabulary, T) logits."""

    def __init__(self, vocabulary: int, context: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(context, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next character at every place."""
        hidden: Tensor = self.blocks(self.embed(x) + self.place, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


def digits() -> Batches:
    """Endless batches of 64 handwritten digits, pixels in [0, 1]."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    while True:
        chosen = torch.randint(len(labels), (64,))
        yield pixels[chosen], labels[chosen]


def corrupt_digits() -> Batches:
    """The same, but the 61st batch holds one NaN pixel."""
    for i, (x, y) in enumerate(digits()):
        if i == 60:
            x[3, 17] = float("nan")
        yield x, y


TEXT = "\n".join(topics[k] for k in sorted(topics))[:200_000]
CHARACTERS = sorted(set(TEXT))
CONTEXT = 64


def text() -> Batches:
    """Endless batches of 16 pieces of the standard library's help text, and the characters that follow."""
    index = {c: i for i, c in enumerate(CHARACTERS)}
    codes = torch.tensor([index[c] for c in TEXT])
    while True:
        starts = torch.randint(len(codes) - CONTEXT - 1, (16,))
        pieces = torch.stack([codes[s : s + CONTEXT + 1] for s in starts])
        yield pieces[:, :-1], pieces[:, 1:]


def mlp(bias: float = 0.0) -> nn.Module:
    """Three layers for the digits; ``bias`` shifts the hidden units."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if bias:
        nn.init.constant_(net[2].bias, bias)  # type: ignore[arg-type]
    return net


def unsafe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy by hand: the logarithm of a probability that becomes exactly 0."""
    return -torch.log(torch.softmax(logits * 20.0, dim=1)).gather(1, labels.unsqueeze(1)).mean()


def character_model() -> nn.Module:
    """The language model of the demo."""
    return CharacterModel(len(CHARACTERS), CONTEXT)


def jobs() -> list[Job]:
    """All runs of the demo."""

    def sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda m: torch.optim.SGD(m.parameters(), lr=lr)

    def adamw(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda m: torch.optim.AdamW(m.parameters(), lr=lr)

    return [
        Job("digits, MLP", mlp, digits, sgd(0.1)),
        Job("text, transformer", character_model, text, adamw(1e-3)),
        Job("digits, MLP, learning rate 20", mlp, digits, sgd(20.0), "the learning rate is 200 times too high"),
        Job("digits, MLP, hidden bias -10", lambda: mlp(-10.0), digits, sgd(0.1), "every unit of the second layer is dead"),
        Job("digits, MLP, no zero_grad", mlp, digits, sgd(0.02), "gradients are never cleared", clears=False),
        Job("digits, MLP, loss by hand", mlp, digits, sgd(0.5), "the loss takes the logarithm of 0", halts=True, loss=unsafe_loss),
        Job("digits, MLP, corrupt batch", mlp, corrupt_digits, sgd(0.1), "one pixel of one batch is NaN", halts=True),
    ]


def run(job: Job, steps: int, folder: Path, progress: Callable[[int, Tensor], None]) -> tuple[list[Finding], bool, int]:
    """Train one job under a guard. Returns its findings, whether it was halted, and the steps taken."""
    torch.manual_seed(0)
    model = job.model()
    optimizer = job.optimizer(model)
    with Guard(model, optimizer, record=folder) as guard:
        try:
            for step, (x, y) in enumerate(guard.batches(job.batches())):
                loss = job.loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if job.clears:
                    optimizer.zero_grad()
                guard.step(loss)
                progress(step + 1, loss)
                if step + 1 == steps:
                    break
        except TrainingHalted:
            return guard.findings, True, guard.steps
    return guard.findings, False, guard.steps


def main(folder: Path, steps: int) -> int:
    """Run all jobs; returns 0 if the guard said what it should: something on every ill run, nothing on the healthy."""
    torch.set_num_threads(1)
    began, level = time.perf_counter(), logger.level
    logger.setLevel(logging.CRITICAL)  # findings are printed below, each behind its run
    try:
        right = sum(_told(number, job, folder, steps) for number, job in enumerate(jobs(), 1))
    finally:
        logger.setLevel(level)
    print(f"{right} of {len(jobs())} runs judged as they should be, in {time.perf_counter() - began:.0f} s; the records are in {folder}/")
    return 0 if right == len(jobs()) else 1


def _told(number: int, job: Job, folder: Path, steps: int) -> bool:
    """Run one job and print what was found; whether that is what should have been."""
    place = folder / f"{number}-{job.name.replace(',', '').replace(' ', '-')}"
    found, halted, taken = run(job, steps, place, _progress(job, steps))
    loud = [f for f in found if f.severity >= Severity.WARNING]
    outcome = "halted" if halted else "finished"
    state = f"ill: {job.fault}" if job.fault else "healthy"
    _clear_line()
    print(f"{job.name:<34} {state}; {outcome} after {taken} steps, {len(loud) or 'no'} finding{'' if len(loud) == 1 else 's'}")
    for finding in loud:
        print(finding)
    print()
    return bool(loud) == bool(job.fault) and halted == job.halts


def _clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")


def _progress(job: Job, steps: int) -> Callable[[int, Tensor], None]:
    def show(step: int, loss: Tensor) -> None:
        if sys.stdout.isatty() and (step % 10 == 0 or step == steps):
            _clear_line()
            print(f"{job.name:<34} step {step}/{steps}, loss {loss.item():.3f}", end="", flush=True)

    return show
