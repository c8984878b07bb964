"""The best PyTorch-only form: a pass over W, in pieces where its elements must be widened.

n² = ‖W_j‖² + s · B_j · (2 (W Aᵀ)_j + s (B A Aᵀ)_j): the pass gives W Aᵀ [N, r] and, where it is not
known yet, ‖W_j‖²; the rest is of size [N, r] and in float64. Rows where these terms cancel are
computed anew, element by element in float64. Every product with W is written as ``linear(a, b) =
a bᵀ`` so that another GEMM library can be put under the same code (see onednn.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastlora.ops.backend import HALF
from fastlora.ops.weight_norm.contract import CANCELLATION, FLOOR, result_dtype

Linear = Callable[[Tensor, Tensor], Tensor]

# Elements of W taken at a time where a piece is copied: on a CPU its 4 MiB of float32 stay in the
# cache; elsewhere larger pieces keep the device busy.
_CPU_CHUNK = 1 << 20
_CHUNK = 1 << 24
_MIN_ROWS = 16

# Squares summed in float32 before the sum continues in float64: W's rows may be long.
_RUN = 1024


def aten_linear(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] · b [n, k]ᵀ."""
    return torch.nn.functional.linear(a, b)


def forward(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_sq: Tensor | None,
    *,
    linear: Linear = aten_linear,
) -> tuple[Tensor, Tensor | None]:
    """(n [N] float32, or float64 for a float64 weight; ‖W_j‖² [N] float64).

    weight [N, K], lora_A [r, K] and lora_B [N, r] in one dtype; ``weight_sq`` as an earlier call
    returned it for this weight, or None.
    """
    dtype = result_dtype(weight.dtype)
    a, b = lora_A.to(dtype), lora_B.double()
    p, fresh = _read(weight, lora_A, a, linear, weight_sq is None)
    sums = fresh if weight_sq is None else weight_sq
    assert sums is not None
    wide = lora_A.double()
    gram = wide @ wide.t()  # [r, r]
    inner = torch.addmm(p.double(), b, gram, beta=2.0, alpha=scaling)  # 2 W Aᵀ + s B (A Aᵀ)
    squared = (b * inner).sum(1).mul_(scaling).add_(sums)
    terms = torch.mv(b * b, gram.diagonal()).mul_(scaling**2).add_(sums)
    norm = squared.clamp_min(FLOOR**2).sqrt_().to(dtype)
    lost = ~((squared >= CANCELLATION * terms) & (squared < torch.inf))  # also where NaN
    recompute(norm, lost.nonzero().view(-1), weight, lora_A, lora_B, scaling)
    return norm, sums


def _read(
    weight: Tensor, lora_A: Tensor, a: Tensor, linear: Linear, need_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """The pass over W: (W Aᵀ [N, r] in the dtype of ``a`` = lora_A, ‖W_j‖² [N] float64)."""
    (n, k), dtype, device = weight.shape, a.dtype, weight.device
    if weight.is_cpu and weight.stride(0) == 1 and weight.stride(1) >= n > 1:
        # transposed, as Conv1D and Embedding pass it: what is contiguous is a run of columns
        pt = torch.zeros((a.shape[0], n), dtype=dtype, device=device)
        sums = torch.zeros(n, dtype=torch.float64, device=device) if need_sums else None
        for columns in _chunks(k, n, weight):
            w = weight[:, columns].to(dtype)
            pt += linear(a[:, columns], w)
            if sums is not None:
                sums += w.t().square().sum(0)
        return pt.t(), sums
    p = torch.empty((n, a.shape[0]), dtype=dtype, device=device)
    sums = torch.empty(n, dtype=torch.float64, device=device) if need_sums else None
    tensor_cores = weight.is_cuda and weight.dtype in HALF
    # read as it is, W needs no pieces: each would cost two parallel regions more
    in_place = weight.is_cpu and weight.dtype == dtype and weight.stride(1) == 1
    for rows in (slice(0, n),) if in_place else _chunks(n, k, weight):
        w = weight[rows]
        if tensor_cores:  # reads half precision, accumulates and returns float32
            p[rows] = torch.mm(w, lora_A.t(), out_dtype=torch.float32)
        else:
            w = w.to(dtype)
            p[rows] = linear(w, a)
        if sums is not None:
            sums[rows] = _row_squares(w, dtype)
    return p, sums


def _row_squares(w: Tensor, dtype: torch.dtype) -> Tensor:
    """‖w_j‖² [rows] float64, each run of 1024 squares added up in ``dtype``."""
    k = w.shape[1]
    even = k - k % _RUN
    norms = []
    if even:
        runs = w[:, :even].unflatten(1, (-1, _RUN))
        norms.append(torch.linalg.vector_norm(runs, dim=2, dtype=dtype))
    if even < k or not even:
        norms.append(torch.linalg.vector_norm(w[:, even:], dim=1, keepdim=True, dtype=dtype))
    return torch.cat(norms, dim=1).double().square_().sum(1)


def recompute(
    norm: Tensor, rows: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> None:
    """Overwrites norm[rows] by ‖W_j + s (BA)_j‖ from float64 elements, a few rows at a time."""
    if rows.numel() == 0:
        return
    a = lora_A.double()
    for some in rows.split(max(_CPU_CHUNK // max(weight.shape[1], 1), 1)):
        merged = torch.addmm(
            weight.index_select(0, some).double(),
            lora_B.index_select(0, some).double(),
            a,
            alpha=scaling,
        )
        exact = torch.linalg.vector_norm(merged, dim=1).clamp_min_(FLOOR)
        norm.index_copy_(0, some, exact.to(norm.dtype))


def backward(
    dnorm: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    need_A: bool,
    need_B: bool,
    *,
    linear: Linear = aten_linear,
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dB) in ``norm``'s dtype, None where not needed, for dnorm [N].

    With V = W + s·BA and c = s · dn/n: dB_j = c_j V_j Aᵀ and dA = (c∘B)ᵀ V. V is formed for one
    chunk of rows at a time, which keeps its cancellation out of the sums.
    """
    dtype = norm.dtype
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    # at the floor the norm is a constant
    c = torch.where(norm > FLOOR, dnorm.to(dtype) / norm, 0.0).mul_(scaling).unsqueeze(1)
    dA = torch.zeros_like(a) if need_A else None
    dB = torch.empty_like(b) if need_B else None
    for rows in _chunks(weight.shape[0], weight.shape[1], weight):
        merged = torch.addmm(weight[rows].to(dtype), b[rows], a, alpha=scaling)
        if dB is not None:
            torch.mul(linear(merged, a), c[rows], out=dB[rows])
        if dA is not None:
            dA.addmm_((b[rows] * c[rows]).t(), merged)
    return dA, dB


def _chunks(count: int, length: int, weight: Tensor) -> Iterator[slice]:
    """``count`` rows (or columns) of ``length`` elements of weight, cut into pieces."""
    step = max((_CPU_CHUNK if weight.is_cpu else _CHUNK) // max(length, 1), _MIN_ROWS)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))
