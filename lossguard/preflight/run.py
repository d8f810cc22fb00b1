"""The public call: arguments flow in and are checked, every check answers in turn, findings flow out, all is put back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device.taps import unwrap
from lossguard.findings import Finding, check_names
from lossguard.preflight.alone import OutOfTime, alone
from lossguard.preflight.bench import Bench, Forward, told
from lossguard.preflight.cascade import cascade
from lossguard.preflight.check import CHECKS, Answer, Check, unknown
from lossguard.preflight.keep import Keeper
from lossguard.preflight.take import take

SCAN = 0.25  # share of the time budget for going through the loader
# Roots before what follows from them; checks of your own come last.
ORDER = (
    "nonfinite_input",
    "invalid_labels",
    "unnormalized_input",
    "wrong_output_activation",
    "poor_initialization",
    "unchanged_weights",
    "cross_sample_leak",
    "target_leak",
    "unshuffled_data",
    "initial_loss_off",
    "validation_mismatch",
    "cannot_overfit_batch",
    "class_imbalance",
    "learning_rate_range",
)


class Preflight(list[Finding]):
    """The findings, roots first with what follows from them as ``.consequences``, and what each check answered.

    ``answers``: check -> "pass", "fail" or "cannot tell"; ``reasons``: check -> why. ``batches``: where an iterator was given that can be
    read only once, the batches that were taken and then the rest; else the loader itself. ``seconds``: how long it took.

    >>> Preflight([], {"class_imbalance": Answer("pass", "no class is rare")}).answers
    {'class_imbalance': 'pass'}
    """

    def __init__(self, findings: Iterable[Finding], answers: dict[str, Answer], batches: Iterable[Any] = (), seconds: float = 0.0) -> None:
        super().__init__(findings)
        self.answers: dict[str, str] = {name: answer.verdict for name, answer in answers.items()}
        self.reasons: dict[str, str] = {name: answer.reason for name, answer in answers.items()}
        self.batches, self.seconds = batches, seconds

    def __str__(self) -> str:
        width = max(map(len, self.answers), default=0)
        blind = sum(answer == "cannot tell" for answer in self.answers.values())
        head = f"lossguard: preflight, {len(self.answers)} checks in {self.seconds:.1f} s: {len(self) or 'no'} finding{'s' if len(self) != 1 else ''}"
        head += f", {blind} cannot tell" if blind > len(self.answers) / 2 else ""
        lines = [f"  {self.answers[name]:<11}  {name:<{width}}  {_short(self.reasons[name])}" for name in self.answers]
        return "\n".join([head, *lines, *map(str, self)])


def preflight(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: Any,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    *,
    forward: Forward | None = None,
    checks: Iterable[Check] = (),
    mute: Iterable[str] = (),
    seconds: float = 45.0,
) -> Preflight:
    """Look at a model, its data and its loss before the first step. Nothing is changed: what comes after is bit-identical.

    batches: a DataLoader or any iterable of batches. Up to 1000 batches are looked through, 8 are kept; of an iterator that can be read
    only once 8 are taken, and ``.batches`` of the result gives them back before the rest. criterion(outputs, targets) gives the loss.
    forward(model, batch) gives (outputs, targets), by default (model(batch[0]), batch[1]) on the model's device. checks: objects in the place
    of those of the same diagnosis, or behind them. mute: names of checks to leave out. seconds: the time budget; what does not fit in
    is answered "cannot tell". It may run over by one training step, or by one batch of a slow loader.

    Where processes are joined (torch.distributed) nothing waits for the others: a check that would is answered "cannot tell".

    Memory: one copy of the model, its gradients and Adam's moments on its device, and one copy of weights and optimizer state on the CPU.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(10)]
    >>> result = preflight(model, batches, torch.nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3))
    >>> list(result), result.answers["initial_loss_off"]
    ([], 'pass')
    """
    model, held = _a_model(model), _optimizers(optimizers)
    _usable(batches, criterion, forward, seconds)
    muted = check_names(mute, "mute", CHECKS)
    chosen = [c for c in _chosen(checks) if c.diagnosis not in muted]
    started = time.monotonic()
    roots = [model, criterion, *held, batches, forward]
    keeper = Keeper(roots)
    answers: dict[str, Answer] = {}
    findings: list[Finding] = []
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), alone():
            warnings.simplefilter("ignore")  # what the user's code warns of, it warns of again in training
            sample = take(batches, SCAN * seconds)
            bench = Bench(model, criterion, held, forward, sample, seconds, roots, started)
            for one in chosen:
                answers[one.diagnosis] = _ask(one, bench)
                bench.found += answers[one.diagnosis].findings
            findings = cascade(bench.found)
    finally:
        keeper.restore()
    return Preflight(findings, answers, sample.rest, time.monotonic() - started)


def _ask(one: Check, bench: Bench) -> Answer:
    """A check's own fault is no fault of the user's."""
    over = unknown(f"the time budget of {bench.seconds:g} s was used up")
    try:
        return one.look(bench) if bench.left > 0 else over
    except OutOfTime:
        return over
    except Exception as error:
        return unknown(f"the check itself failed: {told(error)}")


def _chosen(given: Iterable[Check]) -> list[Check]:
    chosen: dict[str, Check] = {name: cls() for name, cls in sorted(CHECKS.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER))}
    for one in given:
        if isinstance(one, type) or not isinstance(one, Check):
            raise ValueError(f"checks= holds {one!r}, which is no check object; give instances such as ClassImbalance(ratio=50.0)")
        chosen[one.diagnosis] = one
    return list(chosen.values())


def _a_model(model: Any) -> nn.Module:
    """The module itself, out of compilers' and replicas' wrappers."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}; give the model first: preflight(model, loader, criterion)")
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    assert isinstance(model, nn.Module)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is no training to prepare; give the module that holds the weights")
    return model


def _optimizers(given: Any) -> list[Optimizer]:
    if given is None:
        return []
    return [unwrap(o) for o in (given if isinstance(given, (list, tuple)) else [given])]


def _usable(batches: Any, criterion: Any, forward: Any, seconds: float) -> None:
    if isinstance(batches, (Tensor, str, dict)) or (isinstance(batches, tuple) and batches and all(isinstance(part, Tensor) for part in batches)):
        raise ValueError(f"batches is a single batch ({type(batches).__name__}); give a DataLoader, or a list of batches: [batch]")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise ValueError(f"batches is a {type(batches).__name__}, which cannot be iterated; give a DataLoader or a list of batches")
    if not callable(criterion):
        raise ValueError(f"criterion is a {type(criterion).__name__}; expected a function of (outputs, targets) that gives the loss")
    if forward is not None and not callable(forward):
        raise ValueError(f"forward is a {type(forward).__name__}; expected a function of (model, batch) that gives (outputs, targets)")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")


def _short(reason: str, width: int = 120) -> str:
    return reason if len(reason) <= width else reason[: width - 4] + " ..."
