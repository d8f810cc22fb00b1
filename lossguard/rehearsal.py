"""Whether an optimizer's update can be left out exactly, tried on a copy of it with a few numbers on the CPU.

An optimizer flows in, the reason against it flows out, or None. The optimizer itself, its parameters and the random state are not touched,
and nothing is read of the device.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.device import gate, means

SIDE = 4  # elements a dimension of the copies; enough for every kind of state, nothing to wait for
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def why_not(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer can neither skip by ``found_inf`` nor have its updates put back exactly, or None."""
    name = type(optimizer).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            return _cannot_put_back(optimizer, name)
    except Exception as error:
        return f"{name} could not be tried on a small copy on the CPU ({type(error).__name__}: {error}), so that nobody knows what its step changes"


def honours(optimizer: Optimizer) -> bool:
    """Whether an optimizer that is not torch's own, but says so, leaves everything as it was where ``found_inf`` is 1."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            copy, parameters = _copy(optimizer, keep=("fused",))
            copy.found_inf = torch.zeros(())
            _step(copy, parameters, 1)
            before = _everything(copy)
            copy.found_inf.fill_(1.0)
            _step(copy, parameters, 2)
            return _same(before, _everything(copy))
    except Exception:
        return False


def _cannot_put_back(optimizer: Optimizer, name: str) -> str | None:
    aside = _on_host(optimizer)
    if aside is not None:
        known = any("capturable" in group for group in optimizer.param_groups)
        cure = "build it with capturable=True" if known else "no setting of it changes that"
        return f"{name} keeps {aside!r} on the host, which cannot know of a skip in time; {cure}"
    inner = next((k for k, v in vars(optimizer).items() if isinstance(v, Optimizer)), None)
    if inner is not None:
        return f"{name} wraps another optimizer (.{inner}); give that one to the guard"
    copy, parameters = _copy(optimizer)
    _step(copy, parameters, 1)
    once, numbers = _everything(copy), _numbers(copy)
    _step(copy, parameters, 2)
    counted = next((k for k, n in _numbers(copy).items() if k in numbers and n != numbers[k]), None)
    if counted is not None:
        return f"{name} counts on the host ({counted[-1]!r}), which cannot know of a skip in time; keep the counter as a tensor"
    strange = next((k for k, v in vars(copy).items() if k not in ("param_groups", "state", "defaults", "found_inf") and _holds_tensors(v)), None)
    if strange is not None:
        return f"{name} keeps tensors outside of its state (.{strange}), where they cannot be put back; keep them in optimizer.state"
    if optimizer.state:
        return None  # its first update is over
    later, others = _copy(optimizer)
    _step(later, others, 1, flag=1.0)
    _step(later, others, 1)
    if not _same(once, _everything(later)):
        return f"{name} begins its state from the first gradient, which cannot be put back; make the guard after the first update"
    return None


def _on_host(optimizer: Optimizer) -> str | None:
    """What of the state of parameters on a device would lie on the host. A copy on meta shows where new state goes."""
    if all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"]):
        return None
    states = [(p, state) for p, state in optimizer.state.items() if isinstance(p, Tensor) and p.device.type != "cpu"]
    if not states:
        copy, parameters = _copy(optimizer, keep=("capturable",), device="meta")
        for p in parameters:
            p.grad = torch.empty_like(p)
        try:
            means.begin(copy, closure=False)
            if not copy.state:
                copy.step()
        except Exception:  # a step that cannot run without values: its state shows at the first update
            pass
        states = list(copy.state.items())
    return next((str(key) for _, state in states for key, t in state.items() if isinstance(t, Tensor) and t.device.type == "cpu"), None)


def _copy(optimizer: Optimizer, keep: tuple[str, ...] = (), device: str = "cpu") -> tuple[Any, list[nn.Parameter]]:
    """The same class with the same settings on small parameters of the same kinds and dtypes, without a state and without hooks."""
    other: Any = object.__new__(type(optimizer))
    vars(other).update({k: v for k, v in vars(optimizer).items() if k not in ("step", "found_inf", "grad_scale")})
    vars(other).update({name: OrderedDict() for name in HOOKS})
    other.state, other.param_groups = defaultdict(dict), []
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        kinds = {(p.dim(), p.dtype): p for p in group["params"]}
        small = [_small(p, device) for p in kinds.values()]
        new = {k: _setting(k, v, keep) for k, v in group.items() if k != "params"}
        other.param_groups.append({**new, "params": small})
        parameters += small
        if isinstance(optimizer, torch.optim.Adagrad):  # older torch makes its state in the constructor, and none later
            other.state.update({p: {"step": torch.zeros(()), "sum": torch.full_like(p, new["initial_accumulator_value"])} for p in small})
    return other, parameters


def _small(p: Tensor, device: str) -> nn.Parameter:
    shape = [min(n, SIDE) for n in p.shape]
    return nn.Parameter(torch.linspace(-1.0, 1.0, math.prod(shape), device=device).reshape(shape).to(p.dtype), requires_grad=True)


def _setting(key: str, value: Any, keep: tuple[str, ...]) -> Any:
    """A group's setting, such as it can be on a CPU; rates on the device become numbers."""
    if key in ("capturable", "fused", "foreach") and key not in keep and value is not None:
        return False
    return 1e-2 if isinstance(value, Tensor) and value.dim() == 0 and key == "lr" else value


def _step(copy: Any, parameters: list[nn.Parameter], seed: int, flag: float | None = None) -> None:
    """One update with gradients of our own; flag: as if the gate had decided so."""
    for k, p in enumerate(parameters):
        p.grad = torch.linspace(-0.7 - k, 1.3 * seed, p.numel(), device="cpu").reshape(p.shape).to(p.dtype)
    if flag is None:
        copy.step()
        return
    way = means.PutBack(copy)
    way.arm(torch.full((), flag))
    with torch.no_grad():
        way.before(closure=False)
        copy.step()
        way.after()


def _everything(copy: Any) -> dict[Any, Tensor]:
    """All tensors, by their place among the parameters rather than by identity."""
    order = {id(p): (i, k) for i, group in enumerate(copy.param_groups) for k, p in enumerate(group["params"])}
    tensors, _ = means.held(copy)
    return {(path[0], order.get(path[1], path[1]), *path[2:]): t.clone() for path, t in tensors.items()}


def _numbers(copy: Any) -> dict[Any, float]:
    """All host numbers: in the state, in the groups, and beside them."""
    own = {("beside", k): v for k, v in vars(copy).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {**means.held(copy)[1], **own}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


def refuse(optimizer: Optimizer, by: str) -> tuple[bool, str | None]:
    """Whether ``found_inf`` will do, and else the reason why nothing does, or None where putting back does."""
    reason = gate.why_not(optimizer)
    if reason is None and not honours(optimizer):
        reason = f"{type(optimizer).__name__} says that it honours found_inf, and moves its weights all the same"
    if reason is None:
        return True, None
    return False, reason if by == "found_inf" else why_not(optimizer)
