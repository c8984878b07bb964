"""The Triton backend of ``weight_norm``: two kernels and their launchers.

``rows`` walks over tiles of W, makes the tile's part of BA with tensor cores in registers, and adds
up (W + s·BA)²: each element of W is read once, BA is never written, and no expansion is there to
cancel. ``finish`` adds the parts in a fixed order, takes the root, and computes anew in float64 the
rows whose adapter nearly cancels W. No value travels to the host in between.
W [N, K], A [r, K], B [N, r], all of one dtype (fp32, fp16 or bf16) with any strides.
"""

from __future__ import annotations

from ctypes import c_float
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.ops.adapter_linear.tiles import INTERPRETER, Arch, Tile, arch_of, cdiv
from fastlora.ops.weight_norm import eager, tiles
from fastlora.ops.weight_norm.contract import CANCELLATION, FLOOR

# --------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["STEPS", "scaling"])
def weight_norm_fwd_rows_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    sums_ptr,
    ranks_ptr,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    N,
    K,
    R,
    STEPS,
    scaling,
    ONE_RANK_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # sums[0, split, n] = sum over the split's k of (W + scaling BA)[n, k]^2   (fp32)
    # sums[1, split, n] = the same of W[n, k]^2; sums [2, splits, N]
    # ranks[split, r] = the same of A[r, k]^2, by one more row of programs; ranks [splits, R]
    pid_n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    # a multiple of BLOCK_K that the compiler can see: else it loads element by element
    first = tl.program_id(1) * STEPS * BLOCK_K
    last = tl.minimum(K, first + STEPS * BLOCK_K)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)  # [BK]
    a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak

    if pid_n * BLOCK_N >= N:
        for r0 in range(0, R, BLOCK_R):
            ranks = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
            rank_mask = ranks < R
            a_ptrs = a_ptr + ranks[:, None] * stride_ar + (first + ks)[None, :] * stride_ak
            squares = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for k0 in range(first, last, BLOCK_K):
                mask = rank_mask[:, None] & (ks < K - k0)[None, :]
                a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BR, BK]
                squares += a * a
                a_ptrs += a_step
            tl.store(ranks_ptr + split * R + ranks, tl.sum(squares, axis=1), mask=rank_mask)
    else:
        rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        row_mask = rows < N
        ranks = tl.arange(0, BLOCK_R).to(tl.int64)  # [BR]
        w_ptrs = w_ptr + rows[:, None] * stride_wn + (first + ks)[None, :] * stride_wk
        a_ptrs = a_ptr + ranks[:, None] * stride_ar + (first + ks)[None, :] * stride_ak
        b_ptrs = b_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br
        w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk
        a_rank_step = tl.full((), BLOCK_R, tl.int64) * stride_ar
        b_rank_step = tl.full((), BLOCK_R, tl.int64) * stride_br
        if ONE_RANK_TILE:
            rank_mask = ranks < R
            b = tl.load(b_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)  # [BN, BR]
            merged_sq = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            weight_sq = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            # asked for by name, stages fetch W ahead too, though it goes into no dot
            for k0 in tl.range(first, last, BLOCK_K, num_stages=STAGES):
                k_mask = ks < K - k0
                w = tl.load(w_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
                a = tl.load(a_ptrs, mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
                w = w.to(tl.float32)  # [BN, BK]
                merged = w + scaling * tl.dot(b, a, input_precision="ieee")
                merged_sq += merged * merged
                weight_sq += w * w
                w_ptrs += w_step
                a_ptrs += a_step
            merged_sum = tl.sum(merged_sq, axis=1)  # [BN]
            weight_sum = tl.sum(weight_sq, axis=1)
        else:
            merged_sum = tl.zeros((BLOCK_N,), tl.float32)
            weight_sum = tl.zeros((BLOCK_N,), tl.float32)
            for k0 in range(first, last, BLOCK_K):
                k_mask = ks < K - k0
                # asked for early, so that it arrives while the product is made
                w = tl.load(w_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
                product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                a_at, b_at = a_ptrs, b_ptrs
                for r0 in range(0, R, BLOCK_R):
                    rank_mask = ranks < R - r0
                    a = tl.load(a_at, mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
                    b = tl.load(b_at, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
                    product = tl.dot(b, a, product, input_precision="ieee")
                    a_at += a_rank_step
                    b_at += b_rank_step
                w = w.to(tl.float32)
                merged = w + scaling * product
                merged_sum += tl.sum(merged * merged, axis=1)
                weight_sum += tl.sum(w * w, axis=1)
                w_ptrs += w_step
                a_ptrs += a_step
        tl.store(sums_ptr + split * N + rows, merged_sum, mask=row_mask)
        tl.store(sums_ptr + (splits + split) * N + rows, weight_sum, mask=row_mask)


@triton.jit(do_not_specialize=["SPLITS", "scaling", "scaling_low"])
def weight_norm_fwd_finish_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    sums_ptr,
    ranks_ptr,
    out_ptr,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    N,
    K,
    R,
    SPLITS,
    scaling,
    scaling_low,
    CANCELLATION: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # out[n] = max(sqrt(sum over splits of sums[0, split, n]), FLOOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    row_mask = rows < N
    squared = tl.zeros((BLOCK_N,), tl.float32)
    terms = tl.zeros((BLOCK_N,), tl.float32)
    merged_ptrs = sums_ptr + rows
    weight_ptrs = merged_ptrs + tl.full((), 1, tl.int64) * SPLITS * N
    for _ in range(0, SPLITS):
        squared += tl.load(merged_ptrs, mask=row_mask, other=0.0)
        terms += tl.load(weight_ptrs, mask=row_mask, other=0.0)
        merged_ptrs += N
        weight_ptrs += N
    adapter = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        ranks = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
        rank_mask = ranks < R
        rank_sq = tl.zeros((BLOCK_R,), tl.float32)
        rank_ptrs = ranks_ptr + ranks
        for _ in range(0, SPLITS):
            rank_sq += tl.load(rank_ptrs, mask=rank_mask, other=0.0)
            rank_ptrs += R
        b_ptrs = b_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br
        b = tl.load(b_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0).to(tl.float32)
        b *= scaling
        adapter += b * b * rank_sq[None, :]
    terms += tl.sum(adapter, axis=1)
    norm = tl.maximum(tl.sqrt(squared), FLOOR)

    # the rows that lost digits, or overflowed, are computed anew: true also where squared is NaN
    sound = (squared >= CANCELLATION * terms) & (squared < float("inf"))
    lost = row_mask & (sound == 0)
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        s = tl.cast(scaling, tl.float64) + tl.cast(scaling_low, tl.float64)
        total = tl.zeros((BLOCK_N,), tl.float64)
        for k0 in range(0, K, BLOCK_K):
            ks = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BK]
            k_mask = ks < K
            w_ptrs = w_ptr + rows[:, None] * stride_wn + ks[None, :] * stride_wk
            merged = tl.load(w_ptrs, mask=lost[:, None] & k_mask[None, :], other=0.0).to(tl.float64)
            b_at = b_ptr + rows * stride_bn
            a_at = a_ptr + ks * stride_ak
            for _ in range(0, R):
                b_column = tl.load(b_at, mask=lost, other=0.0).to(tl.float64) * s
                a_row = tl.load(a_at, mask=k_mask, other=0.0).to(tl.float64)
                merged += b_column[:, None] * a_row[None, :]
                b_at += stride_br
                a_at += stride_ar
            total += tl.sum(merged * merged, axis=1)
        exact = tl.maximum(tl.sqrt(total).to(tl.float32), FLOOR)
        norm = tl.where(lost, exact, norm)
    tl.store(out_ptr + rows, norm, mask=row_mask)


# ------------------------------------------------------------------------------------- launchers


@cache
def _arch(device: torch.device) -> Arch:
    if device.type == "cpu":
        return INTERPRETER
    facts = torch.cuda.get_device_properties(device)
    return arch_of(10 * facts.major + facts.minor, facts.multi_processor_count, facts.name)


def _options(tile: Tile) -> dict[str, int]:
    """The keyword arguments with which a kernel is launched in ``tile``."""
    return {
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": tile.BLOCK_R,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _regular(N: int, K: int, r: int, *matrices: Tensor) -> bool:
    """Whether ``tiles.choose`` may count on 16-byte reads of these matrices."""
    if N % 16 or K % 16 or (r > 16 and r % 16):
        return False
    for matrix in matrices:
        down, along = matrix.stride()
        if not ((along == 1 and down % 16 == 0) or (down == 1 and along % 16 == 0)):
            return False
        if matrix.data_ptr() % 16:
            return False
    return True


def forward(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_sq: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(n [N] fp32, None): ‖W‖² is not needed, so ``weight_sq`` is neither read nor returned.

    weight [N, K], lora_A [r, K], lora_B [N, r] of one dtype.
    """
    (N, K), r = weight.shape, lora_A.shape[0]
    device = weight.device
    out = torch.empty(N, dtype=torch.float32, device=device)
    if N == 0:
        return out, None
    arch = _arch(device)
    small = (lora_B,) if r > 16 else ()  # up to 16 the rank's own stride does no harm
    regular = _regular(N, K, r, weight, lora_A, *small)
    tile = tiles.choose("rows", weight.dtype, r, arch, regular)
    splits, steps = tiles.splits(tile, N, K, arch)
    sums = torch.empty((2, splits, N), dtype=torch.float32, device=device)
    ranks = torch.empty((splits, r), dtype=torch.float32, device=device)
    operands = (weight, lora_A, lora_B, sums, ranks)
    strides = (*weight.stride(), *lora_A.stride(), *lora_B.stride())
    with _on_device(weight):
        weight_norm_fwd_rows_kernel[(cdiv(N, tile.BLOCK_N) + 1, splits)](
            *operands,
            *strides,
            N,
            K,
            r,
            steps,
            scaling,
            ONE_RANK_TILE=tiles.one_rank_tile(tile, r),
            STAGES=tile.num_stages,
            **_options(tile),
        )
        tile = tiles.choose("finish", weight.dtype, r, arch)
        high = c_float(scaling).value  # what a float argument becomes
        weight_norm_fwd_finish_kernel[(cdiv(N, tile.BLOCK_N),)](
            *operands,
            out,
            *strides,
            N,
            K,
            r,
            splits,
            high,
            scaling - high,
            CANCELLATION=CANCELLATION,
            FLOOR=FLOOR,
            **_options(tile),
        )
    return out, None


# A rare option (the full gradient), which cuBLAS serves well a chunk of rows at a time.
backward = eager.backward


def _on_device(tensor: Tensor) -> Any:
    """Makes the tensor's device the current one, where Triton launches."""
    # an index below zero leaves the current device alone, which is all that a CPU tensor asks for
    return torch.cuda.device(tensor.get_device() if tensor.is_cuda else -1)
