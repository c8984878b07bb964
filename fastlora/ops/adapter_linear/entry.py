"""What a call goes through before its mathematics: autocast's casts, checks, is it transformed?"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_linear.contract import Scales
from fastlora.ops.dropout import threshold

AUTOCAST = (torch.float32, *_backend.HALF)  # what autocast casts
FEW_ROWS = 4


def autocasts(x: Tensor) -> bool:
    """Whether the call runs under ``torch.autocast`` for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: what is no ordinary float stays, and is refused by the checks."""
    return tensor.to(dtype) if tensor.dtype in AUTOCAST else tensor


def is_transformed(x: Tensor) -> bool:
    """Whether the call runs under something that cannot enter a custom autograd Function."""
    return (
        x.is_meta
        or x.is_nested
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or isinstance(x, FakeTensor)  # which has no memory to read
    )


def has_few_rows(x: Tensor, module: ModuleType, columns: int, rank: int | None = None) -> bool:
    """Whether a backend's ``few_rows`` is taken: on a CPU, where calls cost more than arithmetic.

    ``columns``: N, of a group's layers the mean; ``rank``: of a single layer without vectors.
    One rule for ``adapter_linear`` and ``adapter_group``; README.md has the measurement. A backend
    may have a better way of its own (``takes_few``). Triton's interpreter, which is for tests of
    its kernels, keeps to them.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    depth = x.shape[-1]
    if not 0 < x.numel() <= FEW_ROWS * depth or module.__name__.endswith(".triton"):
        return False
    takes_few = getattr(module, "takes_few", None)
    return takes_few is None or not takes_few(x.numel() // depth, depth, columns, rank)


def check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Refuse, with a sentence, operands that do not go together; after any cast of autocast's."""
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"weight, lora_A and lora_B must be matrices; they have shapes {_shape(weight)}, "
            f"{_shape(lora_A)} and {_shape(lora_B)}"
        )
    n, k = weight.shape
    r = lora_A.shape[0]
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {_shape(x)}; its last dimension must be K = {k} of weight")
    if r < 1 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A has shape {_shape(lora_A)}; it must be [r, {k}] with r ≥ 1")
    if lora_B.shape[0] != n or lora_B.shape[1] != r:
        raise ValueError(f"lora_B has shape {_shape(lora_B)}; it must be [{n}, {r}]")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(f"bias has shape {_shape(bias)}; it must be [{n}]")
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"x must be a floating tensor, not {dtype}")
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        found = f"weight is {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"weight and bias must have x's dtype {dtype}; {found}")
    for name, matrix in (("lora_A", lora_A), ("lora_B", lora_B)):
        if matrix.dtype != dtype and not (matrix.dtype == torch.float32 and dtype in _backend.HALF):
            raise TypeError(
                f"{name} is {matrix.dtype}; over a {dtype} base it must be {dtype}"
                + (" or torch.float32" if dtype in _backend.HALF else "")
            )
    device = x.device
    for name, tensor in (
        ("weight", weight),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling must be a finite number, not {scaling}")


def check_vectors(
    scales: Scales, x: Tensor, lora_B: Tensor, dropout_p: float, drop_base: bool
) -> tuple[Scales | None, bool]:
    """The same for the vectors and ``drop_base``: (scales or None, whether drop_base acts)."""
    given = scales.out is not None or scales.mid is not None or scales.adapter is not None
    if given:
        _check_scales(scales, x, lora_B)
        drop_base = drop_base and threshold(dropout_p) > 0
    if drop_base and scales.out is None:
        raise ValueError("drop_base=True needs an out_scale: without one the base is not scaled")
    return scales if given else None, drop_base


def _check_scales(scales: Scales, x: Tensor, lora_B: Tensor) -> None:
    n, r = lora_B.shape
    for name, vector, size in (
        ("out_scale", scales.out, n),
        ("mid_scale", scales.mid, r),
        ("adapter_scale", scales.adapter, n),
    ):
        if vector is None:
            continue
        if vector.dim() != 1 or vector.shape[0] != size:
            raise ValueError(f"{name} has shape {_shape(vector)}; it must be [{size}]")
        half = x.dtype in _backend.HALF
        if vector.dtype != x.dtype and not (half and vector.dtype == torch.float32):
            raise TypeError(
                f"{name} is {vector.dtype}; over a {x.dtype} base it must be {x.dtype}"
                + (" or torch.float32" if half else "")
            )
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device} but x is on {x.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
