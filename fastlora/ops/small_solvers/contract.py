"""What the backends agree on, which there are, and which of them is the faster."""

from __future__ import annotations

import torch

from fastlora.ops import library
from fastlora.ops.backend import Backend, Situation, needs_native, only_devices, only_dtypes

LARGEST = 128  # rows and columns of a matrix that the native kernels take
DTYPES = (torch.float32, torch.float64)

# Sweeps over all pairs before a matrix is given up: several times what any matrix of the tests
# takes, for convergence is quadratic at the end.
SWEEPS = 40


def _needs_its_module(at: Situation) -> str | None:
    return library.cuda_missing() if at.device.type == "cuda" else needs_native(at)


def _not_measured(at: Situation) -> str | None:
    if at.device.type == "cuda":
        return "its CUDA kernels have not been run against cuSOLVER yet"
    return None


# (fewest matrices in the stack, largest n) for which the native kernels are the faster, of both
# operations: a register holds one matrix a lane, and threads share the rest. Measured with
# ``python -m bench.small_solvers``; README, "Which is faster".
_WITH_AVX512, _WITHOUT = ((1, 8), (4, 16), (8, 32)), ((1, 16), (4, 32), (8, 48))
NATIVE_UP_TO = _WITH_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else _WITHOUT


# Each module has ``symmetric_eigen`` and ``small_svd``, of stacks [batch, m, n] with m ≥ n.
BACKENDS = (
    Backend(
        "native",
        "fastlora.ops.small_solvers.native",
        refuses=(only_devices("cpu", "cuda"), only_dtypes(*DTYPES), _needs_its_module),
        leaves=(_not_measured,),
        where="for "
        + ", ".join(f"{fewest} or more of up to {n} columns" for fewest, n in NATIVE_UP_TO),
    ),
    Backend("eager", "fastlora.ops.small_solvers.eager", refuses=(only_dtypes(*DTYPES),)),
)


def is_faster_native(batch: int, n: int) -> bool:
    """Whether the native kernels beat LAPACK for a stack of ``batch`` matrices of n columns."""
    return any(batch >= fewest and n <= largest for fewest, largest in NATIVE_UP_TO)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native kernels can run there, and may without being asked for."""
    at = Situation(device, dtype)
    return not BACKENDS[0].cannot(at) and not BACKENDS[0].rather_not(at)
