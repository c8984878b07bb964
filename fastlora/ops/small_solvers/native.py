"""The same by Jacobi's rotations in the native core.

A thread of the CPU takes one matrix a lane of a register, a CUDA device one matrix a thread block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.library import core, cuda_core
from fastlora.ops.small_solvers.contract import SWEEPS


def symmetric_eigen(
    a: Tensor, sweeps: int = SWEEPS, isa: str = "", backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """As in eager.py. ``isa``, one of the core's instruction sets, and ``backwards``, the order of
    what must not depend on order, are for tests."""
    batch, n, _ = a.shape
    a = a.contiguous()
    w, v = a.new_empty(batch, n), torch.empty_like(a)
    outcomes = torch.empty(batch, dtype=torch.uint8, device=a.device)
    if a.is_cuda:
        kernels, wide = cuda_core(), a.dtype == torch.float64
        with torch.cuda.device(a.device):
            space = _bytes(kernels.symmetric_eigen_workspace(wide, batch, n), a.device)
            kernels.symmetric_eigen(
                a.data_ptr(), wide, batch, n, sweeps, w.data_ptr(), v.data_ptr(),
                outcomes.data_ptr(), space.data_ptr(), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        if outcomes.any():
            _refuse(outcomes, sweeps)
        return w, v
    unsolved = core().symmetric_eigen(
        a.data_ptr(), a.dtype == torch.float64, batch, n, sweeps, w.data_ptr(), v.data_ptr(),
        outcomes.data_ptr(), torch.get_num_threads(), isa, backwards,
    )  # fmt: skip
    if unsolved:
        _refuse(outcomes, sweeps)
    return w, v


def small_svd(
    a: Tensor, sweeps: int = SWEEPS, isa: str = "", backwards: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py, and the rest as above."""
    batch, m, n = a.shape
    a = a.contiguous()
    u, s, vh = torch.empty_like(a), a.new_empty(batch, n), a.new_empty(batch, n, n)
    outcomes = torch.empty(batch, dtype=torch.uint8, device=a.device)
    if a.is_cuda:
        kernels, wide = cuda_core(), a.dtype == torch.float64
        with torch.cuda.device(a.device):
            space = _bytes(kernels.svd_workspace(wide, batch, m, n), a.device)
            kernels.svd(
                a.data_ptr(), wide, batch, m, n, sweeps, u.data_ptr(), s.data_ptr(), vh.data_ptr(),
                outcomes.data_ptr(), space.data_ptr(), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        if outcomes.any():
            _refuse(outcomes, sweeps)
        return u, s, vh
    unsolved = core().svd(
        a.data_ptr(), a.dtype == torch.float64, batch, m, n, sweeps, u.data_ptr(), s.data_ptr(),
        vh.data_ptr(), outcomes.data_ptr(), torch.get_num_threads(), isa, backwards,
    )  # fmt: skip
    if unsolved:
        _refuse(outcomes, sweeps)
    return u, s, vh


def _bytes(count: int, device: torch.device) -> Tensor:
    """A workspace; of none, the address is null, by which the kernels know."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def _refuse(outcomes: Tensor, sweeps: int) -> None:
    """Raises for the first matrix that is not solved."""
    index = int(outcomes.nonzero()[0])
    if outcomes[index] == 1:
        raise ValueError(
            f"matrix {index} of the stack holds NaN or infinity, so it has neither eigenvalues nor "
            "singular values"
        )
    raise RuntimeError(f"matrix {index} of the stack has not converged after {sweeps} sweeps")
