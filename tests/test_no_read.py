"""The no-read harness itself: what must raise does, what must run does, and with the numbers of the CPU."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, CONTEXT, MODELS, VOCABULARY, convnet, criterion, make_batch, mlp, transformer
from no_read import DEVICE, Ghost, HostRead, count_ops, meta_device, no_read_device, reveal
from torch import Tensor, nn
from torch.autograd import Variable

READ: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool(t.sum() > 0),
    "if": lambda t: 1 if t.sum() > 0 else 0,
    "tolist": lambda t: t.tolist(),
    "tolist of a scalar": lambda t: t.sum().tolist(),
    "cpu": lambda t: t.cpu(),
    "to cpu": lambda t: t.to("cpu"),
    "to cpu without blocking, into new memory": lambda t: t.to("cpu", non_blocking=True),
    "blocking copy": lambda t: torch.empty(t.shape).copy_(t),
    "numpy": lambda t: t.numpy(),
    "asarray": lambda t: np.asarray(t),
    "repr": lambda t: repr(t),
    "str": lambda t: str(t),
    "format": lambda t: f"{t.sum():.3f}",
    "percent": lambda t: "%.3f" % t.sum(),  # noqa: UP031
    "nonzero": lambda t: t.nonzero(),
    "where with one argument": lambda t: torch.where(t > 0),
    "boolean mask": lambda t: t[t > 0],
    "boolean mask assignment": lambda t: t.clone().__setitem__(t > 0, torch.ones((), device=t.device)),
    "masked_select": lambda t: torch.masked_select(t, t > 0),
    "equal": lambda t: torch.equal(t, t + 0),
    "allclose": lambda t: torch.allclose(t, t),
    "unique": lambda t: torch.unique(t),
    "unique_consecutive": lambda t: torch.unique_consecutive(t),
    "bincount": lambda t: torch.bincount((t > 0).long()),
    "repeat_interleave": lambda t: torch.repeat_interleave(t, (t > 0).long()),
    "one_hot without classes": lambda t: F.one_hot((t > 0).long()),
    "slice to a tensor": lambda t: t[: (t > 0).sum()],
    "index of a list": lambda t: [1, 2][(t > 0).all()],
    "range": lambda t: range((t > 0).sum()),
    "tensor of tensors": lambda t: torch.tensor([t.sum(), t.sum()]),
    "tensor of tensors on the device": lambda t: torch.tensor([t.sum(), t.sum()], device=t.device),
    "save": lambda t: torch.save(t, io.BytesIO()),
    "iterating in Python": lambda t: sorted(t),
    "storage": lambda t: t.untyped_storage().tolist(),
    "dlpack": lambda t: torch.from_dlpack(t),
}
SAFE: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda t: torch.where(t > 0, t, -t),
    "compare": lambda t: (t == t).all(),
    "isfinite": lambda t: ~torch.isfinite(t).all(),
    "norms": lambda t: torch.stack(torch._foreach_norm([t, t])),
    "float32 norms of halves": lambda t: torch._foreach_norm([t.half()], 2, dtype=torch.float32)[0],
    "aminmax": lambda t: torch.aminmax(t).max,
    "histc with a range": lambda t: torch.histc(t, 8, -3.0, 3.0),
    "median": lambda t: t.median(),
    "sort": lambda t: t.sort().values,
    "topk": lambda t: torch.topk(t, 2).values,
    "masked_fill": lambda t: t.masked_fill(t > 0, 0.0),
    "nan_to_num": lambda t: torch.nan_to_num(t),
    "take by indices": lambda t: t[torch.arange(2, device=t.device)],
    "take by the host's indices": lambda t: t[torch.arange(2)],
    "set a slot": lambda t: t.clone().__setitem__(0, 3.0),
    "assert_async": lambda t: torch._assert_async((t > -1e9).all()),
    "deepcopy": lambda t: copy.deepcopy(t),
    "random": lambda t: torch.rand_like(t) + torch.randn(5, device=t.device),
    "shape": lambda t: (len(t), t.shape, t.stride(), t.numel(), t.element_size(), t.is_contiguous(), t.dtype, hash(t)),
}


@pytest.fixture
def ghost() -> Any:
    with no_read_device() as device:
        yield device


@pytest.mark.parametrize("name", READ)
def test_host_read_raises(name: str, ghost: torch.device) -> None:
    """Whatever would wait for a GPU raises HostRead."""
    t = torch.linspace(-1.0, 1.0, 5, device=ghost)
    with pytest.raises(HostRead):
        READ[name](t)


@pytest.mark.parametrize("name", SAFE)
def test_device_work_does_not_raise(name: str, ghost: torch.device) -> None:
    """What a GPU does without being waited for passes, with the CPU's numbers."""
    on_ghost, on_cpu = SAFE[name](torch.linspace(-1, 1, 5, device=ghost)), SAFE[name](torch.linspace(-1, 1, 5))
    if isinstance(on_ghost, Tensor) and name != "random":
        assert isinstance(on_ghost, Ghost)
        assert torch.equal(reveal(on_ghost), on_cpu)


def test_factories(ghost: torch.device) -> None:
    """Every usual way to make a tensor makes it on the device, with or without the context's own device object."""
    made = [torch.zeros(2, device=DEVICE), torch.tensor([1.0, 2.0], device=ghost), torch.arange(2, device=ghost), torch.ones(2).to(ghost),
            torch.randn(2, device=ghost), torch.full((2,), 3.0, device=ghost), torch.as_tensor([1, 2], device=ghost), torch.eye(2, device=ghost),
            torch.empty(2, device=ghost).new_zeros(3), nn.Linear(2, 2, device=ghost).weight, nn.Linear(2, 2).to(ghost).weight]  # fmt: skip
    assert all(isinstance(t, Ghost) and t.device == ghost for t in made)
    assert reveal(made[1]).tolist() == [1.0, 2.0]


def test_non_blocking_copy_into_host_memory(ghost: torch.device) -> None:
    """The one way out: an enqueued copy into host memory that exists."""
    mirror = torch.zeros(3)
    assert mirror.copy_(torch.arange(3.0, device=ghost), non_blocking=True) is mirror
    assert mirror.tolist() == [0.0, 1.0, 2.0]


def test_blocking_uploads_are_refused_on_request() -> None:
    """A copy from pageable host memory waits too; code that must not is run with uploads=False."""
    with no_read_device(uploads=False) as device:
        for upload in (lambda: torch.ones(2).to(device), lambda: torch.tensor(1.0, device=device), lambda: torch.zeros(2, device=device).copy_(torch.ones(2))):
            with pytest.raises(HostRead, match="pageable"):
                upload()
        t = torch.zeros(2, device=device).copy_(torch.ones(2), non_blocking=True)
        t[0] = 3.0
        t.fill_(2.0).add_(1.0)
    with no_read_device() as device:
        torch.ones(2).to(device)


def test_tensors_of_two_devices_do_not_mix(ghost: torch.device) -> None:
    """As on a GPU, a host tensor is no operand, unless it is a scalar."""
    t = torch.ones(2, device=ghost)
    assert reveal(t + torch.tensor(1.0)).tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="one device"):
        t + torch.ones(2)
    with pytest.raises(RuntimeError, match="one device"):
        torch.stack([t[0], torch.zeros(1)[0].expand(1)])


def test_storage_surgery_is_refused(ghost: torch.device) -> None:
    """What the wrapper cannot follow fails loudly instead of giving wrong shapes."""
    t = torch.ones(2, 3, device=ghost)
    for surgery in (lambda: t.t_(), lambda: t.resize_(7), lambda: torch.cat([t, t], out=torch.empty(0, device=ghost))):
        with pytest.raises(NotImplementedError):
            surgery()


VARIANTS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "mlp": ("mlp", mlp),
    "mlp with dropout": ("mlp", lambda device: mlp(device, dropout=0.3)),
    "convnet": ("convnet", convnet),
    "transformer": ("transformer", transformer),
    "transformer, tied": ("transformer", lambda device: transformer(device, tied=True)),
    "transformer, library attention, ReLU": ("transformer", lambda device: transformer(device, attention="library", activation="relu")),
}
# An epsilon above rounding: Adam would blow up the noise in the gradient of attention's key bias, whose true value is 0.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD momentum loop": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "SGD momentum foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, foreach=True),
    "SGD momentum fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True),
    "AdamW loop": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-5, foreach=False),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-5, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-5, fused=True),
}


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, device: Any, steps: int = 3, foreach: bool = False) -> Tensor:
    """A few bare steps with clipping; the last loss."""
    torch.manual_seed(0)
    loss = torch.zeros(())
    for step in range(steps):
        x, y = make_batch(name, device, 8, seed=step)
        loss = criterion(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=foreach)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bare_step_gives_the_weights_of_the_cpu(variant: str, optimizer: str, ghost: torch.device) -> None:
    """Forward, loss, backward, clipping and update run unread, and end where the CPU ends."""
    name, build = VARIANTS[variant]
    foreach = "loop" not in optimizer
    here, there = build("cpu"), build(ghost)
    loss_here = train(name, here, OPTIMIZERS[optimizer](here), "cpu", foreach=foreach)
    loss_there = train(name, there, OPTIMIZERS[optimizer](there), ghost, foreach=foreach)
    assert torch.allclose(reveal(loss_there), loss_here)
    for (key, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert torch.allclose(reveal(b), a, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_runs(variant: str, ghost: torch.device) -> None:
    """The fast paths of evaluation run as well: buffers of batch-norm, attention without gradients."""
    name, build = VARIANTS[variant]
    outputs = []
    for device in ("cpu", ghost):
        model = build(device).eval()
        with torch.no_grad():
            outputs.append(reveal(model(make_batch(name, device)[0])))
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("out", ["cat", "stack", "vector_norm", "sub", "amax", "view"])
def test_out_into_preallocated_memory(out: str, ghost: torch.device) -> None:
    """Operations write into memory of the device that exists, and into views of it."""
    a, b, memory = torch.arange(3.0, device=ghost), torch.ones(3, device=ghost), torch.zeros(2, 3, device=ghost)
    before = memory._version
    if out == "cat":
        torch.cat([a, b], out=memory.view(-1))
        expected = [[0, 1, 2], [1, 1, 1]]
    elif out == "stack":
        torch.stack([a, b], out=memory)
        expected = [[0, 1, 2], [1, 1, 1]]
    elif out == "vector_norm":
        torch.linalg.vector_norm(torch.stack([3 * a, 4 * b]), dim=0, out=memory[1])
        expected = [[0, 0, 0], [4, 5, 52**0.5]]
    elif out == "sub":
        torch.sub(a, b, out=memory[0])
        expected = [[-1, 0, 1], [0, 0, 0]]
    elif out == "amax":
        torch.amax(torch.stack([a, b]), dim=0, out=memory[0])
        expected = [[1, 1, 2], [0, 0, 0]]
    else:
        memory[:1].copy_(a.view(1, 3))
        memory[1, :2].fill_(7.0)
        expected = [[0, 1, 2], [7, 7, 0]]
    assert torch.allclose(reveal(memory), torch.tensor(expected, dtype=torch.float32))
    assert memory._version > before


def test_foreach(ghost: torch.device) -> None:
    """Lists of tensors are measured and written by one call."""
    ones, kept = [torch.ones(4, device=ghost), torch.ones(9, device=ghost)], [torch.zeros(4, device=ghost), torch.zeros(9, device=ghost)]
    before = kept[0]._version
    torch._foreach_copy_(kept, ones)
    torch._foreach_mul_(kept, 2.0)
    assert [float(reveal(n)) for n in torch._foreach_norm(kept)] == [4.0, 6.0]
    assert [float(reveal(n)) for n in torch._foreach_norm(torch._foreach_sub(kept, ones), 2, dtype=torch.float32)] == [2.0, 3.0]
    assert kept[0]._version > before


def test_views_share_memory_versions_and_addresses(ghost: torch.device) -> None:
    """A view sees what is written to its base; both count the write; addresses tell tensors apart."""
    base = torch.arange(12.0, device=ghost).view(3, 4)
    spread = torch.as_strided(base, (2, 2), (8, 1), 1)
    detached, before = base.detach(), base._version
    assert reveal(spread).tolist() == [[1, 2], [9, 10]]
    base.add_(1.0)
    assert reveal(spread).tolist() == [[2, 3], [10, 11]]
    assert base._version == detached._version == spread._version == before + 1
    spread.zero_()
    assert reveal(base)[0].tolist() == [1, 0, 0, 4]
    assert base.data_ptr() == detached.data_ptr() != base.clone().data_ptr()
    assert spread.data_ptr() == base.data_ptr() + 4 * spread.storage_offset()
    assert base.untyped_storage().data_ptr() == spread.untyped_storage().data_ptr()
    assert base.untyped_storage().nbytes() == 48


def test_data_is_followed(ghost: torch.device) -> None:
    """Replacing a parameter's data moves its values and its address."""
    p = nn.Parameter(torch.zeros(2, device=ghost))
    new = torch.ones(2, device=ghost)
    p.data = new
    assert p.data_ptr() == new.data_ptr()
    assert reveal(p * 3).tolist() == [3.0, 3.0]
    p.data.mul_(5.0)
    assert reveal(p).tolist() == [5.0, 5.0]


def test_post_accumulate_hook_and_engine_callback(ghost: torch.device) -> None:
    """A hook on a parameter queues one callback, which sees all gradients once per backward."""
    model = mlp(ghost)
    seen: list[list[bool]] = []
    queued: list[bool] = []

    def at_the_end() -> None:
        queued.clear()
        seen.append([p.grad is not None for p in model.parameters()])
        torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None]))

    def hook(parameter: Tensor) -> None:
        if not queued:
            queued.append(True)
            Variable._execution_engine.queue_callback(at_the_end)  # type: ignore[attr-defined]

    handles = [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    x, y = make_batch("mlp", ghost)
    for _ in range(2):
        criterion(model(x), y).backward()
    assert seen == [[True] * len(handles)] * 2


def test_no_handler_of_faults_hides_a_read(ghost: torch.device) -> None:
    """Code that survives its own faults still fails on a host read."""

    def careful(t: Tensor) -> None:
        with contextlib.suppress(Exception):
            t.item()

    with pytest.raises(HostRead):
        careful(torch.ones((), device=ghost))


def test_callback_that_reads_raises(ghost: torch.device) -> None:
    """A read on the engine's thread is caught too, and reaches the caller of backward."""
    model = mlp(ghost)

    def hook(parameter: Tensor) -> None:
        Variable._execution_engine.queue_callback(lambda: float(parameter.grad.sum()))  # type: ignore[attr-defined, union-attr]

    model[0].weight.register_post_accumulate_grad_hook(hook)  # type: ignore[index]
    x, y = make_batch("mlp", ghost)
    with pytest.raises(HostRead):
        criterion(model(x), y).backward()


def test_forward_hooks_fire(ghost: torch.device) -> None:
    """Hooks see ghosts and may reduce them, after an in-place ReLU too."""
    model = convnet(ghost)
    tape = torch.zeros(8, device=ghost)
    fired: list[str] = []
    for i, (name, module) in enumerate(model.named_children()):

        def hook(module: nn.Module, args: Any, output: Tensor, i: int = i, name: str = name) -> None:
            fired.append(name)
            tape[i].copy_((output == 0).to(torch.float32).mean())

        module.register_forward_hook(hook)
    x, y = make_batch("convnet", ghost)
    criterion(model(x), y).backward()
    assert fired == ["stem", "norm", "act", "body", "body_norm", "head"]
    assert 0 < float(reveal(tape)[2]) < 1


def test_a_model_is_copied_and_restored(ghost: torch.device) -> None:
    """deepcopy makes independent parameters; a state_dict loads; neither reads."""
    model = transformer(ghost, tied=True)
    twin = copy.deepcopy(model)
    assert [type(p) for p in twin.parameters()] == [type(p) for p in model.parameters()]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in twin.parameters())
    assert twin.head.weight is twin.tokens.weight
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert float(reveal(next(model.parameters())).abs().sum()) > 0
    twin.load_state_dict(model.state_dict())
    assert torch.equal(reveal(next(twin.parameters())), reveal(next(model.parameters())))


def test_late_import_is_explained() -> None:
    """After a first backward the engine knows no new device; the message says what to do."""
    code = (
        "import torch; torch.ones(1, requires_grad=True).sum().backward(); import no_read\n"
        "try:\n    no_read.no_read_device().__enter__()\nexcept RuntimeError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rpartition("/")[0], timeout=120)
    assert "top of the test file" in done.stdout, done.stderr


@pytest.mark.parametrize("name", [n for n in READ if n not in {"repr", "str", "storage", "dlpack", "save", "tensor of tensors on the device"}])
def test_meta_refuses_reads(name: str) -> None:
    """The meta device refuses the same reads, partly in torch's own words."""
    with meta_device() as device, pytest.raises((HostRead, RuntimeError, TypeError, NotImplementedError)):
        READ[name](torch.empty(5, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bare_step_runs_on_meta(variant: str) -> None:
    """Forward to update runs without values; an enqueued copy leaves the host's memory as it was."""
    name, build = VARIANTS[variant]
    with meta_device() as device:
        model = build(device)
        train(name, model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True), device)
        mirror = torch.full((3,), 7.0)
        mirror.copy_(torch.empty(3, device=device), non_blocking=True)
        with pytest.raises(HostRead):
            mirror.copy_(torch.empty(3, device=device))
    assert mirror.tolist() == [7.0] * 3


def test_count_ops() -> None:
    """Operations of forward and backward are counted by name, views apart, and reads among them."""
    x = torch.ones(3, requires_grad=True)
    with count_ops() as count:
        (x * 2).view(1, 3).sum().backward()
    assert count.ops["mul.Tensor"] == 2 and count.ops["sum"] == 1
    assert count.ops["view"] == 2 and count.computing["view"] == 0
    assert count.total == sum(count.ops.values()) > count.computing.total() > 0
    assert not count.reads
    with count_ops() as count:
        float(x.detach().sum())
        x.nonzero()
        x[x > 0]
        x[torch.tensor([0, 1])]
        torch.equal(x, x)
    assert count.reads == {"_local_scalar_dense": 1, "nonzero": 1, "index.Tensor": 1, "equal": 1}


def test_count_ops_on_the_ghost(ghost: torch.device) -> None:
    """The same step takes the same operations on the ghost device as on the CPU, and reads nothing."""
    counts = []
    for device in ("cpu", ghost):
        model = mlp(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        x, y = make_batch("mlp", device)
        train("mlp", model, optimizer, device, steps=1)
        with count_ops() as count:
            criterion(model(x), y).backward()
            optimizer.step()
        counts.append(count)
    assert not counts[0].reads and not counts[1].reads
    assert counts[0].computing == counts[1].computing


@pytest.mark.parametrize("name", MODELS)
def test_builders_are_deterministic_and_learn(name: str) -> None:
    """One seed, one model and batch, whatever the global random state; a healthy run lowers its loss."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, batch = MODELS[name](seed=3), make_batch(name, n=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, again = MODELS[name](seed=3), make_batch(name, n=4, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(batch[0], again[0]) and torch.equal(batch[1], again[1])
    assert not torch.equal(batch[0], make_batch(name, n=4, seed=6)[0])
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), MODELS[name](seed=4).parameters(), strict=True))
    assert first(batch[0]).shape == ((4, CONTEXT, VOCABULARY) if name == "transformer" else (4, CLASSES))
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
    early = float(train(name, first, optimizer, "cpu", steps=1))
    assert float(train(name, first, optimizer, "cpu", steps=60)) < 0.7 * early
