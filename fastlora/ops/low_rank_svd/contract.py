"""What both operations ask of their operands, and how they bring them into range."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fastlora.ops.backend import FLOATS, Backend, needs_native, only_devices, only_dtypes

# Of ``svd_lowrank``. What is given is the dtype that is computed in. The eager form multiplies by
# oneDNN where that is faster.
BACKENDS = (
    Backend(
        "native",
        "fastlora.ops.low_rank_svd.native",
        refuses=(only_devices("cpu"), only_dtypes(torch.float32), needs_native),
        where="where q is small beside N and K, unless a matrix is beyond it",
    ),
    Backend("eager", "fastlora.ops.low_rank_svd.eager"),
)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in and returned: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_list(name: str, value: object) -> list[Tensor]:
    """The matrices of a list. Raises TypeError, or ValueError where it is empty or mixed."""
    if not isinstance(value, Sequence) or not all(isinstance(m, Tensor) for m in value):
        raise TypeError(f"{name} must be a tensor [..., N, K] or a list of matrices")
    matrices = list(value)
    if not matrices:
        raise ValueError(f"{name} is an empty list")
    for i, matrix in enumerate(matrices):
        if matrix.dim() != 2:
            raise ValueError(f"{name}[{i}] has shape {list(matrix.shape)}; it must be a matrix")
        if matrix.device != matrices[0].device:
            raise ValueError(
                f"{name}[{i}] is on {matrix.device} but {name}[0] is on {matrices[0].device}"
            )
    return matrices


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raises TypeError where ``matrix`` is not real and floating, ValueError where it has no
    rows, no columns or no values."""
    if matrix.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{name} is {matrix.dtype}; it must be real and floating")
    if matrix.dim() < 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; it must be [..., N, K]")
    if 0 in matrix.shape[-2:]:
        raise ValueError(f"{name} has shape {list(matrix.shape)}: it has no elements")
    if matrix.is_meta:
        raise ValueError(f"{name} is on meta: it has no values")


def exponents(largest: Tensor, names: Sequence[str]) -> Tensor:
    """e [n] int32 with largest · 2^-e in [½, 1), 0 for a zero; ``largest`` [n] holds max|x|.

    Raises ValueError, naming the operand, where one is NaN or infinite.
    """
    for name, value in zip(names, largest.tolist(), strict=True):
        if not value < float("inf"):
            raise ValueError(f"{name} holds NaN or infinity")
    return torch.frexp(largest.double()).exponent


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """x [n, …] · 2^-e exactly, e [n]: in two steps, since 2^149 is no float32."""
    half = (exponent // 2).view(-1, *[1] * (x.dim() - 1))
    rest = exponent.view(half.shape) - half
    return torch.ldexp(torch.ldexp(x, -half), -rest)


def without_autocast(tensor: Tensor) -> ExitStack:
    """A context without autocast and without autograd."""
    kind = tensor.device.type
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(
        torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)
    )
    return stack
