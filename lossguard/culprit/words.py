"""What an origin means and what to change: an ``Origin`` flows in, a reason and a remedy with a number flow out. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lossguard.culprit.states import Range
from lossguard.culprit.trace import FUSED_ATTENTION, SOFTMAX, Origin
from lossguard.findings import Remedy, number

EPS = {"float16": 1e-4, "bfloat16": 1e-8, "float32": 1e-8, "float64": 1e-8}  # added to arguments; 1e-8 is 0 in float16, and 1e-4 is a normal number there
INSIDE = {
    "float16": 1e-3,
    "bfloat16": 1e-2,
    "float32": 1e-6,
    "float64": 1e-12,
}  # distance to +-1: some units in the last place there, so that it is not rounded away
FILL = -1e4  # a mask that float16 can hold and whose exp is 0
NO_INFINITY = Remedy(f"use torch.where or masked_fill with a finite number such as {FILL:g}, and do not compute with the infinity", {"clamp": FILL})

_Told = tuple[str, Remedy]


def told(origin: Origin) -> _Told:
    """Why the value is not finite, in words with the range that did it, and what to change."""
    if origin.leaf:
        return _of_leaf(origin)
    name, seen, eps = base(origin.op), _seen(origin), _eps(origin)
    if origin.hidden:
        reason = f"its result is thrown away where it is out of range, but its derivative is not: 0 times infinity is NaN{seen}"
        cure = f"mask the argument, not the result: x = torch.where(mask, x, 1.0) before {name}, so that it never sees what is masked"
        return reason, Remedy(cure, {"eps": eps})
    if origin.masked and (name in SOFTMAX or name.startswith(FUSED_ATTENTION)):
        cure = f"leave one position of each row unmasked, or fill with {FILL:g} in the place of -inf"
        return "a row holds nothing but -inf, so every position is masked: 0/0", Remedy(cure, {"clamp": FILL})
    if origin.masked:
        reason = f"it turned an infinity that was put there on purpose into NaN, such as 0 times infinity or infinity minus infinity{seen}"
        return reason, NO_INFINITY
    if origin.legal:
        cure = f"leave the target's own position unmasked, or fill with {FILL:g} in the place of -inf"
        return "an infinity that was put there on purpose (a mask) reaches the loss: a target is masked, or nothing is left", Remedy(cure, {"clamp": FILL})
    if origin.given:
        return f"a number that is not finite stands in the code, in the place of an argument{seen}", NO_INFINITY
    if not origin.op.startswith("aten."):
        cure = f"check {origin.op}.backward with torch.autograd.gradcheck, and guard its divisors by {eps:g}"
        return f"a derivative that is written by hand gives such values{seen}", Remedy(cure, {"eps": eps})
    if origin.phase == "backward":
        return _BACKWARD.get(name, _derivative)(origin)
    return _FORWARD.get(name, _other)(origin)


def base(op: str) -> str:
    """The operation's bare name.

    >>> base("aten.log_")
    'log'
    """
    return op.rpartition(".")[2].rstrip("_") or op


# ---- leaves


def _of_leaf(origin: Origin) -> _Told:
    nans, infinite, size = origin.outputs
    what = f"{nans + infinite} of {size} values are not finite, the first at {list(origin.first)}"
    if origin.leaf in ("weight", "buffer"):
        cure = "go back to a checkpoint in which torch.isfinite(p).all() holds for every parameter and buffer"
        return f"the {origin.leaf} {origin.name} was not finite before the step: {what}", Remedy(cure, {"parameter": origin.name})
    if origin.leaf == "input":
        cure = f"drop or repair sample {origin.first[0] if origin.first else 0} of this batch, and check the data with torch.isfinite(x).all()"
        return f"the batch was not finite before any operation ({origin.name}): {what}", Remedy(cure, {"look_at": 1})
    cure = "look at where it is made; check it with torch.isfinite(x).all()"
    return f"the tensor {origin.name} came into the step with such values: {what}", Remedy(cure, {"look_at": 1})


# ---- operations, forward


def _log(origin: Origin) -> _Told:
    eps = _eps(origin)
    return f"the logarithm of 0 or less{_seen(origin)}", Remedy(f"{base(origin.op)}(x.clamp(min={eps:g}))", {"eps": eps})


def _root(origin: Origin) -> _Told:
    eps = _eps(origin)
    return f"a root of a number that is not positive{_seen(origin)}", Remedy(f"{base(origin.op)}(x.clamp(min=0) + {eps:g})", {"eps": eps})


def _division(origin: Origin) -> _Told:
    eps, divisor = _eps(origin), _argument(origin, "other", "self" if base(origin.op) == "reciprocal" else "other")
    if divisor is not None and divisor.least > 0:
        reason = f"a quotient beyond the range of {divisor.dtype}: the smallest divisor is {number(divisor.least)}{_seen(origin)}"
    else:
        reason = f"a division by 0{_seen(origin)}"
    return reason, Remedy(f"divide by x.clamp(min={eps:g}), or by x + {eps:g}", {"eps": eps})


def _exponential(origin: Origin) -> _Told:
    limit = math.floor(math.log(_largest(origin)))
    high = max((r.high for r in origin.ranges), default=math.nan)
    reason = f"exp overflows {_dtype(origin)} beyond {limit}, and its argument reaches {number(high)}"
    return reason, Remedy(f"subtract the maximum first (logsumexp, log_softmax), or x.clamp(max={limit})", {"clamp": float(limit)})


def _power(origin: Origin) -> _Told:
    if origin.outputs[0]:
        eps = _eps(origin)
        return f"a power of a negative number with a broken exponent{_seen(origin)}", Remedy(f"x.clamp(min={eps:g}) before pow", {"eps": eps})
    return f"a power beyond the range of {_dtype(origin)}, or a negative power of 0{_seen(origin)}", Remedy(
        f"x.clamp(min={_eps(origin):g}, max=1e3) before pow", {"clamp": 1e3}
    )


def _unit(origin: Origin) -> _Told:
    inside = _inside(origin)
    cure = f"x.clamp(-1 + {inside:g}, 1 - {inside:g}) before {base(origin.op)}"
    return f"its argument must lie in [-1, 1]{_seen(origin)}", Remedy(cure, {"clamp": 1 - inside})


def _logit(origin: Origin) -> _Told:
    eps = _inside(origin)
    return f"the logit of 0 or 1 is infinite, and outside of them there is none{_seen(origin)}", Remedy(f"torch.logit(x, eps={eps:g})", {"eps": eps})


def _labels(origin: Origin) -> _Told:
    if not origin.outputs[0]:
        return _other(origin)
    cure = "leave such a batch out, or divide by the count yourself: cross_entropy(..., reduction='sum') / max(count, 1)"
    return "the mean over no label at all, 0/0: every target is ignored, or its class weight is 0", Remedy(cure, {"labels": "repair"})


def _overflow(origin: Origin) -> _Told:
    dtype, reach = _dtype(origin), max((max(abs(r.low), abs(r.high)) for r in origin.ranges), default=math.nan)
    reason = f"a result beyond {_largest(origin):g}, the end of {dtype}: its arguments reach {number(reach)}{_seen(origin)}"
    if dtype == "float16":
        return reason, Remedy("run this module in bfloat16 or float32 (they end at 3.4e38), or scale its input down", {"dtype": "bfloat16"})
    return reason, Remedy("learning rate divided by 10, clip the gradient norm at 1.0, and look at where its arguments grow", {"lr_factor": 0.1})


def _running(origin: Origin) -> _Told:
    cure = "take it in logarithms: x.log().cumsum(dim), and exp at the end; or scale x to about 1"
    return _overflow(origin)[0], Remedy(cure, {"clamp": 1.0})


def _product(origin: Origin) -> _Told:
    if origin.outputs[0] and not origin.outputs[1]:
        return f"infinity times 0{_seen(origin)}", NO_INFINITY
    return _overflow(origin)


def _cast(origin: Origin) -> _Told:
    source = origin.ranges[0] if origin.ranges else None
    reach = max(abs(source.low), abs(source.high)) if source else math.nan
    reason = f"values up to {number(reach)} do not fit into the smaller type that they were turned into (float16 ends at 65504)"
    return reason, Remedy("keep this in bfloat16 or float32, or scale it down before", {"dtype": "bfloat16"})


def _empty(origin: Origin) -> _Told:
    return "memory is read that nothing was written to", Remedy("torch.zeros or torch.full in the place of torch.empty", {"eps": 0.0})


def _other(origin: Origin) -> _Told:
    eps = _eps(origin)
    cure = f"clamp its arguments to where it is defined, at least {eps:g} away from the edge"
    return f"its result is not finite for finite arguments{_seen(origin)}", Remedy(cure, {"eps": eps})


# ---- operations, backward


def _edge(text: str, cure: str) -> Callable[[Origin], _Told]:
    def of(origin: Origin) -> _Told:
        eps = _eps(origin)
        return f"{text}{_seen(origin)}", Remedy(cure.format(eps=f"{eps:g}"), {"eps": eps})

    return of


def _unit_derivative(origin: Origin) -> _Told:
    _, remedy = _unit(origin)
    return f"its derivative is infinite at -1 and 1{_seen(origin)}", remedy


def _derivative(origin: Origin) -> _Told:
    if _dtype(origin) == "float16" or any(max(abs(r.low), abs(r.high)) > math.sqrt(_largest(origin)) for r in origin.ranges):
        reason, remedy = _overflow(origin)
        return f"its derivative: {reason}", remedy
    eps = _eps(origin)
    cure = f"keep its arguments at least {eps:g} away from where the derivative has no finite value"
    return f"its derivative is not finite for these arguments{_seen(origin)}", Remedy(cure, {"eps": eps})


_FORWARD: dict[str, Callable[[Origin], _Told]] = {
    **dict.fromkeys(("log", "log2", "log10", "log1p", "xlogy", "special_xlog1py"), _log),
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
    **dict.fromkeys(("div", "true_divide", "reciprocal", "remainder", "fmod", "addcdiv"), _division),
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exponential),
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv", "special_erfinv"), _unit),
    **dict.fromkeys(("logit", "special_logit"), _logit),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward", "nll_loss", "mean"), _labels),
    **dict.fromkeys(("cumprod", "prod"), _running),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "convolution", "_convolution", "linear", "mv", "addmv", "dot", "add", "sub", "sum", "cumsum", "square",
                     "pow_square", "native_layer_norm", "var", "std", "linalg_vector_norm"), _overflow),
    **dict.fromkeys(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize"), _empty),
    "pow": _power, "mul": _product, "_to_copy": _cast, "copy": _cast,
}  # fmt: skip

_EDGES = {  # operations: (why the derivative is not finite, what to write in their place)
    ("sqrt",): ("the derivative of a root is infinite at 0", "torch.sqrt(x + {eps})"),
    ("rsqrt",): ("the derivative of 1/sqrt is infinite at 0", "torch.rsqrt(x + {eps})"),
    ("pow",): ("the derivative of a power below 1 is infinite at 0", "(x + {eps}).pow(...)"),
    ("linalg_vector_norm", "norm"): (
        "the derivative of a norm does not exist at the zero vector",
        "(x.square().sum(dim) + {eps}).sqrt() in the place of the norm",
    ),
    ("std", "std_mean"): (
        "the derivative of a standard deviation is 0/0 where all values are equal",
        "(x.var(dim, unbiased=False) + {eps}).sqrt() in the place of std",
    ),
    ("div", "reciprocal"): ("the derivative of a quotient overflows for divisors this small", "divide by x.clamp(min={eps})"),
    ("log", "log2", "log10", "log1p", "xlogy"): ("the derivative of a logarithm overflows for arguments this small", "log(x.clamp(min={eps}))"),
    ("_linalg_eigh", "linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_svd"): (
        "the derivative of eigenvectors and singular vectors is infinite where two of the values are equal",
        "add {eps} times distinct numbers to the diagonal",
    ),
    ("atan2",): ("the derivative of atan2 does not exist at (0, 0)", "torch.atan2(y, x + {eps}) where both may be 0"),
    ("_cdist_forward", "_euclidean_dist"): ("the derivative of a distance does not exist where two points are equal", "(d.square() + {eps}).sqrt()"),
    ("cumprod", "prod"): (
        "the derivative of the product is not finite for these factors",
        "take it in logarithms: x.clamp(min={eps}).log().cumsum(dim).exp()",
    ),
}

_BACKWARD: dict[str, Callable[[Origin], _Told]] = {
    **{name: _edge(*words) for names, words in _EDGES.items() for name in names},
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv"), _unit_derivative),
}


# ---- helpers


def _argument(origin: Origin, *names: str) -> Range | None:
    return next((r for r in origin.ranges if r.name in names), None)


def _seen(origin: Origin) -> str:
    """The ranges of the arguments, in words."""
    return " (" + "; ".join(str(r) for r in origin.ranges[:3]) + ")" if origin.ranges else ""


def _dtype(origin: Origin) -> str:
    """The narrowest type among the arguments."""
    present = [r.dtype for r in origin.ranges]
    return next((d for d in ("float16", "bfloat16", "float32") if d in present), present[0] if present else "float32")


def _largest(origin: Origin) -> float:
    dtype = getattr(torch, _dtype(origin), torch.float32)
    return float(torch.finfo(dtype).max) if dtype.is_floating_point else float(torch.finfo(torch.float32).max)


def _eps(origin: Origin) -> float:
    return EPS.get(_dtype(origin), 1e-8)


def _inside(origin: Origin) -> float:
    return INSIDE.get(_dtype(origin), 1e-6)
