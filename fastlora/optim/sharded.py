"""Parameters of which a process holds a shard (DTensor): its local part, and facts of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (nn.Parameter, Tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch.distributed is not imported to tell."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def mesh_of(tensor: Any) -> Any:
    """The processes that share a DTensor."""
    return tensor.device_mesh


def local(tensor: Any) -> Tensor:
    """The shard that lies here, over the same memory; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def rms(tensor: Any) -> Tensor:
    """The root mean square of the whole tensor, a float32 scalar, the same in every process."""
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    whole = norm.full_tensor() if is_sharded(norm) else norm
    return whole / max(tensor.numel(), 1) ** 0.5


def is_zero(tensor: Any) -> bool:
    """Whether all of the whole tensor is zero."""
    if is_sharded(tensor):
        return not bool(rms(tensor))
    return not bool(tensor.any())


def splits_rows(tensor: Any) -> bool:
    """Whether processes share the rows (last axis) of a DTensor."""
    last = tensor.dim() - 1
    return any(place.is_shard(last) or place.is_shard(-1) for place in tensor.placements)


def spread_non_finite(mesh: Any, grads: list[Tensor]) -> None:
    """Replace by NaN, in the list, gradients of which another process's shard is not finite.

    ``grads`` are this process's shards over one device mesh; one small reduction serves them all.
    """
    import torch.distributed as dist

    flags = torch.stack([(~g.isfinite()).any() for g in grads]).to(torch.float32)
    for dim in range(mesh.ndim):
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    for i, flag in enumerate(flags.tolist()):
        if flag:
            grads[i] = torch.full_like(grads[i], torch.nan)
