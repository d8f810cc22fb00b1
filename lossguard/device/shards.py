"""Which part of a sharded tensor this rank holds, and how often each part exists. Host facts only; no collective, no read.

DTensors (FSDP2, tensor parallelism) and their meshes flow in; local tensors, weights and process groups flow out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor: asked by name, since the class is costly to import where there is none."""
    return type(tensor).__name__ == "DTensor"


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same memory; any other tensor as it is.

    >>> own(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients it would become a node of the graph
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def engine(parameter: Tensor) -> str | None:
    """The engine that hides a parameter's true values or gradient from ``.grad``, and what to do; None where there is none."""
    if hasattr(parameter, "_fsdp_flattened") or type(parameter).__name__ == "FlatParameter":
        return "FSDP1 keeps it in a flat shard: use torch.distributed.fsdp.fully_shard, whose parameters are measured"
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO keeps its gradient in partitions of its own: only deepspeed.utils.safe_get_full_grad sees it"
    return None


def why_not(parameter: Any) -> str | None:
    """The reason why a DTensor cannot be measured by its parts, or None if it can."""
    if any(placement.is_partial() for placement in parameter.placements):
        return "its parts are terms of a sum that was not taken"
    return None


def alike(parameter: Any, gradient: Any) -> bool:
    """Whether a gradient lies on the ranks as its parameter does, so that its parts are parts and no terms of a sum."""
    same: bool = is_sharded(gradient) and gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh
    return same


def gradient(p: Tensor) -> Tensor | None:
    """This rank's part of a sharded gradient, or None where it lies on the ranks in another way than its parameter."""
    g = p.grad
    return own(g) if g is not None and alike(p, g) else None


def version(p: Tensor) -> tuple[int, int] | None:
    """Which memory the gradient has and how often it was written to; None where there is no gradient."""
    g = p.grad
    if g is None:
        return None
    try:
        if is_sharded(g):  # writes through the whole count there, writes to this rank's part count here
            part = own(g)
            return part.data_ptr(), g._version + part._version
        return g.data_ptr(), g._version
    except RuntimeError:  # a wrapper without memory of its own
        return id(g), g._version


def common(parameters: Sequence[Any]) -> tuple[list[Any], list[float]] | None:
    """The groups over which sums of all of them are complete (one; several for one mesh of several dimensions that is not
    the whole world), and the weight of this rank's part of each. None where no such groups exist.

    A part that exists n times within the groups has weight 1 / n.
    """
    meshes: list[Any] = []
    for p in parameters:
        if p.device_mesh not in meshes:
            meshes.append(p.device_mesh)
    if any(mesh.get_coordinate() is None for mesh in meshes):
        return None
    if len(meshes) == 1:
        members = meshes[0].size()
        whole = members == dist.get_world_size()
        groups = [dist.group.WORLD] if whole and meshes[0].ndim > 1 else [meshes[0].get_group(d) for d in range(meshes[0].ndim)]
    elif max(mesh.size() for mesh in meshes) == dist.get_world_size():
        members, groups = dist.get_world_size(), [dist.group.WORLD]
    else:
        return None
    return groups, [_parts(p) / members for p in parameters]


def _parts(parameter: Any) -> int:
    """Into how many different parts a parameter is cut."""
    sizes: Iterable[int] = (parameter.device_mesh.size(d) for d, placement in enumerate(parameter.placements) if not placement.is_replicate())
    parts = 1
    for size in sizes:
        parts *= size
    return parts
