"""Plain loops under Accelerate: prepared models, optimizers and loaders are watched as bare ones are."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from lossguard import Guard, Severity, TrainingHalted  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.filterwarnings("error::RuntimeWarning:lossguard")]


def fresh():
    """Accelerate keeps its state in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def clean():
    yield
    fresh()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def loader(batch=8, n=256, poison: int | None = None):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    if poison is not None:
        x[poison, 1] = math.nan
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


def accelerated(*, watch=True, accumulate=1, clip: float | None = None, precision="no", scaler=None, poison=None, make=torch.optim.AdamW, lr=1e-2, **options):
    """An epoch as Accelerate's documentation writes it, with a guard around it."""
    fresh()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    accelerator.scaler = scaler
    model = network()
    model, optimizer, data = accelerator.prepare(model, make(model.parameters(), lr=lr), loader(poison=poison))
    if scaler is not None:  # Accelerate refuses fp16 on a CPU, torch does not; so that clipping unscales first
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    guard = Guard(model, optimizer, accumulate=accumulate, **options) if watch else None
    with guard or contextlib.nullcontext():
        for x, y in guard.batches(data) if guard else data:
            with accelerator.accumulate(model):
                with torch.autocast("cpu", torch.float16) if scaler else contextlib.nullcontext():
                    loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            if guard:
                guard.step(loss)
    return guard, model


def bare(*, accumulate=1, clip: float | None = None):
    """The same epoch without Accelerate."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Guard(model, optimizer, accumulate=accumulate) as guard:
        for i, (x, y) in enumerate(guard.batches(loader())):
            loss = F.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            guard.step(loss)
    return guard


CASES = {"plain": {}, "clipped": {"clip": 0.2}, "accumulating": {"accumulate": 4}, "accumulating and clipped": {"accumulate": 4, "clip": 0.2}}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_a_bare_loop(name):
    """Losses, unclipped gradient norms, updates and clip coefficients are, bit for bit, those of the loop without Accelerate."""
    ours, plain = accelerated(**CASES[name])[0], bare(**CASES[name])
    assert ours.history.steps().tolist() == plain.history.steps().tolist()
    for signal in ("grad_norm", "update_norm", "weight_norm", "activation_rms", "clip_coefficient", "label_nll"):
        np.testing.assert_array_equal(ours.history.last(signal), plain.history.last(signal), err_msg=signal)
    np.testing.assert_array_equal(ours.history.losses(), plain.history.losses())
    assert ours.coverage.not_observed == {}
    assert [f for f in ours.findings if f.severity >= Severity.WARNING] == []


@pytest.mark.parametrize("options", [*CASES.values(), {"precision": "bf16"}], ids=[*CASES, "bf16"])
def test_weights_are_bit_identical_with_and_without(options):
    """A guarded epoch ends with the very weights of a bare one."""
    for a, b in zip(accelerated(**options)[1].parameters(), accelerated(watch=False, **options)[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16():
    """Mixed precision is watched whole and found healthy."""
    guard, _ = accelerated(precision="bf16", clip=1.0)
    assert guard.coverage.observed["grad_norm"] == guard.coverage.observed["update_norm"] == 4
    assert [f for f in guard.findings if f.severity >= Severity.WARNING] == []


def test_the_loss_scaler_is_found():
    """Under fp16 the scaler that Accelerate steps with is found by itself, so that gradient norms have their true scale."""
    ours, _ = accelerated(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), clip=0.2)
    true, _ = accelerated(clip=0.2)
    assert (ours.history.fact("scaler") == 1.0).all()
    np.testing.assert_allclose(ours.history.last("grad_total"), true.history.last("grad_total"), rtol=0.1)
    np.testing.assert_allclose(ours.history.last("clip_coefficient"), true.history.last("clip_coefficient"), rtol=0.1)


def test_a_bad_batch_halts_and_a_bad_update_is_skipped():
    """A NaN in the data halts and is named; armed to skip, the prepared fused optimizer leaves that update out on the device."""
    with pytest.raises(TrainingHalted) as halt:
        accelerated(poison=85)
    assert (halt.value.finding.diagnosis, halt.value.finding.step) == ("nonfinite_input", 10)
    fused = lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)  # noqa: E731
    _, model = accelerated(poison=85, skip={"nonfinite_gradient"}, halt=None, make=fused)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_ill_run_is_named():
    """A learning rate far too high is found through the wrappers."""
    guard, _ = accelerated(lr=30.0, halt=None)
    assert any("learning rate" in cause.name for f in guard.findings for cause in f.causes)


def test_a_data_parallel_wrapper_is_looked_through(tmp_path):
    """Under DistributedDataParallel parameters have the model's own names, and all is seen."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Guard(model, optimizer) as guard:
            for x, y in loader():
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
    finally:
        torch.distributed.destroy_process_group()
    assert [p.name for p in guard.history.params] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert guard.coverage.observed["grad_norm"] == guard.coverage.observed["update_norm"] == 4
    assert guard.coverage.observed["activation_rms"] == 3
