"""Devices on which nobody can read: proof, without a GPU, that code never waits for one.

`no_read_device()` lends a device named "ghost" whose tensors hold real values: training on it gives the numbers of the
CPU, and whatever would make the host wait for a GPU raises `HostRead`: item, float, bool, tolist, cpu, numpy, repr,
nonzero, boolean masks, equality, a slice whose bound is a tensor, a blocking copy to the host, pickling. Only a
non-blocking copy into an existing CPU tensor leaves it. `reveal(tensor)` is the test's own eye. `meta_device()` is the
same law on `meta`, without values; `count_ops()` counts operations and reads on any device.

    from no_read import no_read_device

    with no_read_device() as device:
        model = mlp(device)            # or torch.zeros(3, device="ghost"), tensor.to(device), nn.Linear(..., device=device)
        ...
        mirror.copy_(tape, non_blocking=True)

Import this module at the top of a test file, never inside a test: the autograd engine counts devices at the process's
first backward, and a device registered after that cannot run one.

A ghost tensor is a wrapper subclass around a CPU tensor; operations arrive in `Ghost.__torch_dispatch__`, and a few
kernels registered for the device serve the calls that have no ghost among their arguments (torch.zeros) or arrive
below the Python key (torch.tensor). Where it differs from a GPU:
- A non-blocking copy lands at once. That nobody reads a mirror before it has arrived must be shown elsewhere.
- Impossible, and refused with NotImplementedError: storage surgery (`set_`, `resize_`, an `out=` that must grow) and
  in-place changes of shape (`t_`, `squeeze_`, `unsqueeze_`, `transpose_`), hence torch.quantile, which uses them.
- `untyped_storage()` gives the CPU storage's size and address only.
- By default an optimizer takes its loop; `foreach=True` and `fused=True` run when asked for. There is no autocast, no
  GradScaler, no torch.compile, no events, no streams, no pinned memory; its random numbers are those of the CPU's generator.
- Reads inside the host code of a CUDA kernel (histc with an automatic range) cannot be seen from here.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "ghost"
aten = torch.ops.aten

# Operations whose result's shape, or whose Python answer, depends on values: each one waits for the device.
READS = frozenset({
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten.allclose.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default,
})  # fmt: skip
INDEXING = frozenset({aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default})
TO_CPU_INDEX = frozenset({*INDEXING, aten.copy_.default, aten._to_copy.default})  # may mix the host's tensors with the device's
# What torch makes by growing an empty tensor, beside the two that make memory; zeros, full, rand and others are made from these.
FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m",
             "randperm", "randperm.generator", "tril_indices", "triu_indices")  # fmt: skip
METADATA_SURGERY = frozenset({"set_", "resize_", "resize_as_", "_resize_output_"})


class HostRead(BaseException):
    """On a GPU, this line would have waited for the device.

    No Exception, so that a guard which turns its own faults into warnings cannot hide it.
    """


def reading(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> str | None:
    """What this call would read from `device`, in words, or None. Adam's `step`, which lives on the host, is no read."""
    here = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type == device]
    if not here:
        return None
    if func in READS:
        return f"{func} reads a value"
    if func in INDEXING and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1])):
        return "indexing with a boolean mask counts its true elements on the host"
    if device == "cpu":
        return None
    target = kwargs.get("device")
    if func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu":
        return "a copy into new host memory waits"
    if func is aten.copy_.default and args[0].device.type == "cpu" and not non_blocking(args, kwargs):
        return "a blocking copy to the host waits"
    return None


def non_blocking(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


# The ghost device


class _Refuse:
    """Set by `no_read_device`: whether a blocking copy from the host to the device is refused too."""

    uploads = False


class _Storage:
    """What may be asked of a ghost's storage without reading it."""

    def __init__(self, inside: torch.UntypedStorage) -> None:
        self.data_ptr, self.nbytes, self.size, self._cdata = inside.data_ptr, inside.nbytes, inside.size, inside._cdata

    def __getattr__(self, name: str) -> NoReturn:
        raise HostRead(f"storage.{name} of a ghost tensor")


def _refuses(what: str) -> Callable[..., Any]:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise HostRead(f"{what} reads a tensor of the device")

    return refuse


class Ghost(torch.Tensor):
    """A tensor that says it lives on the ghost device and computes on the CPU tensor inside."""

    inside: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inside: Tensor) -> Ghost:
        ghost: Ghost = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device(DEVICE, 0),
        )
        ghost.inside = inside
        return ghost

    def __init__(self, inside: Tensor) -> None:
        pass

    __repr__ = _refuses("repr")  # type: ignore[assignment]
    __format__ = _refuses("format")
    __array__ = _refuses("numpy")
    numpy = _refuses("numpy")
    tolist = _refuses("tolist")
    __dlpack__ = __dlpack_device__ = _refuses("dlpack")
    __reduce_ex__ = _refuses("pickling")

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def untyped_storage(self) -> Any:
        return _Storage(self.inside.untyped_storage())

    def __deepcopy__(self, memo: dict[int, Any]) -> Ghost:
        if id(self) in memo:
            known: Ghost = memo[id(self)]
            return known
        copy: Any = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        if self.grad is not None:
            copy.grad = deepcopy(self.grad, memo)
        cloned: Ghost = copy
        return cloned

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inside = value.inside

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    read = reading(func, args, kwargs, DEVICE)
    if read:
        raise HostRead(read)
    _refuse_what_a_gpu_cannot(func, args, kwargs, leaves)
    ghosts = {id(x.inside): x for x in leaves if isinstance(x, Ghost)}
    target = kwargs.get("device")
    lands_on_cpu = target is not None and torch.device(target).type == "cpu"
    out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    for ghost in ghosts.values():
        if ghost.shape != ghost.inside.shape:
            raise NotImplementedError(f"{func} changed the shape of a tensor of the ghost device: allocate it in full")
    _count_foreach_writes(func, args, kwargs)
    if func is aten.copy_.default:
        return args[0]

    def outside(x: Any) -> Any:
        if not isinstance(x, Tensor) or lands_on_cpu:
            return x
        return ghosts[id(x)] if id(x) in ghosts else Ghost(x)

    return tree_map(outside, out)


def _count_foreach_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Foreach kernels of the CPU and of CUDA count their writes themselves; fused optimizers do not, there or here."""
    if func._schema.name.startswith("aten::_foreach_"):
        for i, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                torch._C._increment_version(args[i] if i < len(args) else kwargs[argument.name])


def _unwrap(x: Any) -> Any:
    if isinstance(x, Ghost):
        return x.inside
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == DEVICE else x


def _refuse_what_a_gpu_cannot(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> None:
    name = func._schema.name.removeprefix("aten::")
    if name in METADATA_SURGERY or torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} is impossible on the ghost device (see the docstring of no_read.py)")
    if func is aten.copy_.default and isinstance(args[0], Ghost) and not isinstance(args[1], Ghost):
        _upload(non_blocking(args, kwargs))
    strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Ghost) and x.dim() > 0]
    if strangers and func not in TO_CPU_INDEX:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and {strangers[0].device}")


def _upload(without_waiting: bool) -> None:
    if _Refuse.uploads and not without_waiting:
        raise HostRead("a blocking copy from pageable host memory to the device waits")


def _factory(func: Any) -> Callable[..., Tensor]:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return Ghost(func(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """The copy of torch.tensor(..., device="ghost"), which runs below the Python key."""
    if isinstance(source, Ghost) and not isinstance(target, Ghost):
        raise HostRead("a copy to the host below the Python key")
    if not isinstance(source, Ghost):
        _upload(non_blocking)
    _unwrap(target).copy_(_unwrap(source))
    return target


def _item(tensor: Tensor) -> NoReturn:
    raise HostRead("item below the Python key")  # torch.tensor([a_ghost_scalar])


class _Backend(_DummyBackendModule):
    """The module torch.ghost: torch asks it for random state, which is the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # activation checkpoints ask for it, whatever device they are on
        return [torch.float16, torch.bfloat16]

    device = contextlib.nullcontext
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


def _register() -> Any:
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=_Backend())
    kernels: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        kernels.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    kernels.impl("_local_scalar_dense", _item, "PrivateUse1")
    return kernels


_KERNELS = _register()  # held: the kernels leave with it


@functools.cache
def _check_engine() -> None:
    try:
        torch.autograd.backward(torch.ones((), device=DEVICE, requires_grad=True).mul(2))
    except RuntimeError as error:
        raise RuntimeError("no_read was imported after this process's first backward: import it at the top of the test file") from error


@contextlib.contextmanager
def no_read_device(*, uploads: bool = True) -> Iterator[torch.device]:
    """The ghost device. With `uploads=False` a blocking copy from the host to it raises `HostRead` too, as it waits on a GPU."""
    _check_engine()
    before = _Refuse.uploads
    _Refuse.uploads = not uploads
    try:
        yield torch.device(DEVICE, 0)
    finally:
        _Refuse.uploads = before


def reveal(tensor: Tensor) -> Tensor:
    """The values of a tensor on any device, for the assertions of a test: a copy on the CPU."""
    return (tensor.inside if isinstance(tensor, Ghost) else tensor).detach().to("cpu", copy=True)


# The meta device


class _MetaMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        read = reading(func, args, kwargs, "meta")
        if read:
            raise HostRead(read)
        if func is aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "meta":
            return args[0]  # non-blocking: the values never arrive
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_device() -> Iterator[torch.device]:
    """The meta device under the same law: host reads raise, a non-blocking copy into a CPU tensor leaves it unchanged.

    repr, deepcopy and data_ptr pass here unseen.
    """
    with _MetaMode():  # type: ignore[no-untyped-call]
        yield torch.device("meta")


# Counting


@dataclass
class OpCount:
    """What ran inside `count_ops`. Counters subtract: `guarded.ops - bare.ops`."""

    ops: Counter[str] = field(default_factory=Counter)  # by name with overload, "add.Tensor"; views and empty allocations too
    computing: Counter[str] = field(default_factory=Counter)  # those of `ops` that touch memory: what a GPU would launch
    reads: Counter[str] = field(default_factory=Counter)  # those of `ops` after which a host waits

    @property
    def total(self) -> int:
        return self.ops.total()


class _CountMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, count: OpCount) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.count.ops[name] += 1
        if not (func.is_view or name.startswith(("empty", "new_empty", "profiler"))):
            self.count.computing[name] += 1
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if any(reading(func, args, kwargs, device) is not None for device in devices):
            self.count.reads[name] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def count_ops() -> Iterator[OpCount]:
    """Counts aten operations, and the host reads among them, on any device.

    A foreach call is one operation. On CPU tensors tolist, numpy, cpu, repr, deepcopy and save pass unseen, for they do
    not dispatch: the ghost device is there for those.
    """
    count = OpCount()
    with _CountMode(count):
        yield count
