"""The Triton backend of ``adapter_linear``: kernels for the skinny products, and their launchers.

Five kernels: ``shrink`` (t = drop(x) Aᵀ), ``main`` (a GEMM whose accumulator starts as a rank-r
product; forward y and dx), ``bwd_dy`` (one read of dY gives H and dB), ``bwd_da``, and ``sum``,
which adds partial results in a fixed order. Two more for calls with an out_scale: ``bwd_dg`` (its
gradient, for columns that y does not show or all of them) and ``drop``, an input under its mask.
Derivation and traffic: this folder's README.
x [M, K], W [N, K], A [r, K], B [N, r], y and dY [M, N], t and H [M, r], all of one compute dtype
(fp32, fp16 or bf16) with any strides; products accumulate in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.ops import dropout
from fastlora.ops.adapter_linear import eager, tiles
from fastlora.ops.adapter_linear.contract import Needs, doubtful
from fastlora.ops.triton_dropout import philox_keep_tile

# --------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["M", "scale", "threshold", "STEPS"])
def adapter_linear_fwd_shrink_kernel(
    x_ptr,
    a_ptr,
    t_ptr,
    seed_ptr,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    M,
    K,
    R,
    STEPS,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # t[split, m, r] = scale * sum over the split's k of drop(x)[m, k] A[r, k]; t [splits, M, R]
    tiles_r = tl.cdiv(R, BLOCK_R)
    # rank tiles are neighbours, so that they find x in the cache
    pid_m = (tl.program_id(0) // tiles_r).to(tl.int64)
    pid_r = tl.program_id(0) % tiles_r
    split = tl.program_id(1)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    ranks = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
    row_mask = rows < M
    rank_mask = ranks < R
    # a multiple of BLOCK_K that the compiler can see: else it loads element by element
    first = split * STEPS * BLOCK_K
    last = tl.minimum(K, first + STEPS * BLOCK_K)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)  # [BK]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + (first + ks)[None, :] * stride_xk
    a_ptrs = a_ptr + ranks[None, :] * stride_ar + (first + ks)[:, None] * stride_ak
    x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
    a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        k_mask = ks < K - k0
        x = tl.load(x_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BM, BK]
        a = tl.load(a_ptrs, mask=k_mask[:, None] & rank_mask[None, :], other=0.0)  # [BK, BR]
        if DROPOUT:
            keep = philox_keep_tile(seed, rows, k0, K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(x, a, acc, input_precision=INPUT_PRECISION)
        x_ptrs += x_step
        a_ptrs += a_step
    t_ptrs = t_ptr + (split.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
    value = (acc * scale).to(t_ptr.dtype.element_ty)
    tl.store(t_ptrs, value, mask=row_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def adapter_linear_main_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    seed_ptr,
    out_ptr,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_tm,
    stride_tr,
    stride_br,
    stride_bn,
    stride_bias,
    stride_om,
    stride_on,
    M,
    N,
    K,
    R,
    threshold,
    HAS_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_IN: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # out[m, n] = keep[m, n] * sum_r t[m, r] b[r, n] + sum_k x[m, k] w[k, n] + bias[n]
    # forward: x, Wᵀ, t, Bᵀ -> y [M, N]; backward: dY, W, H, A -> dx, whose width K is this N
    # SCALE_OUT: out = scale[n] * (...) + bias[n]; SCALE_IN: x[m, k] scale[k] in place of x[m, k]
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # GROUP_M row tiles walk along n together, so that their x and w tiles stay in the L2 cache
    group = pid // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    pid_m = (group * GROUP_M + within % group_rows).to(tl.int64)
    pid_n = (within // group_rows).to(tl.int64)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    row_mask = rows < M
    column_mask = columns < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
        rank_mask = ranks < R
        t_ptrs = t_ptr + rows[:, None] * stride_tm + ranks[None, :] * stride_tr
        b_ptrs = b_ptr + ranks[:, None] * stride_br + columns[None, :] * stride_bn
        t = tl.load(t_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=rank_mask[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(t, b, acc, input_precision=INPUT_PRECISION)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = philox_keep_tile(seed, rows, pid_n * BLOCK_N, N, threshold, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)

    if HAS_PRODUCT:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)  # [BK]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
        w_ptrs = w_ptr + ks[:, None] * stride_wk + columns[None, :] * stride_wn
        x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
        w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)  # [BM, BK]
                w = tl.load(w_ptrs, mask=column_mask[None, :], other=0.0)  # [BK, BN]
            else:
                k_mask = ks < K - k0
                x = tl.load(x_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
            if SCALE_IN:
                scale = tl.load(scale_ptr + k0 + ks, mask=ks < K - k0, other=0.0)  # [BK]
                x = (x.to(tl.float32) * scale[None, :].to(tl.float32)).to(x.dtype)
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
            x_ptrs += x_step
            w_ptrs += w_step

    if SCALE_OUT:
        scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0)
        acc *= scale[None, :].to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=column_mask, other=0.0)
        acc += bias[None, :].to(tl.float32)
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["M", "ROWS_PER_CHUNK", "scale"])
def adapter_linear_bwd_dy_kernel(
    dy_ptr,
    b_ptr,
    t_ptr,
    h_ptr,
    db_ptr,
    y_ptr,
    bias_ptr,
    dots_ptr,
    squares_ptr,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_tm,
    stride_tr,
    stride_ym,
    stride_yn,
    stride_bias,
    M,
    N,
    R,
    ROWS_PER_CHUNK,
    scale,
    NEED_H: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # h[n-tile, m, r] = scale * sum over the tile's n of dY[m, n] B[n, r]; h [n-tiles, M, R]
    # db[chunk, n, r] = sum over the chunk's m of dY[m, n] t[m, r]; db [chunks, N, R]
    # dots[chunk, n] = sum over the chunk's m of dY[m, n] (y[m, n] - bias[n]); dots [chunks, N]
    # squares[chunk, n], with a bias, = that of (y[m, n] - bias[n])²
    tiles_r = tl.cdiv(R, BLOCK_R)
    # rank tiles are neighbours, so that they find dY in the cache
    pid_n = (tl.program_id(0) // tiles_r).to(tl.int64)
    pid_r = tl.program_id(0) % tiles_r
    chunk = tl.program_id(1)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    ranks = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
    column_mask = columns < N
    rank_mask = ranks < R
    if NEED_H:
        b_ptrs = b_ptr + columns[:, None] * stride_bn + ranks[None, :] * stride_br
        b = tl.load(b_ptrs, mask=column_mask[:, None] & rank_mask[None, :], other=0.0)  # [BN, BR]
    first = chunk * ROWS_PER_CHUNK
    last = tl.minimum(M, first + ROWS_PER_CHUNK)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if NEED_DOTS:
        dots = tl.zeros((BLOCK_N,), tl.float32)
        own_mask = column_mask & (pid_r == 0)  # one rank tile reads y for all of them
        if HAS_BIAS:
            squares = tl.zeros((BLOCK_N,), tl.float32)
            bias = tl.load(bias_ptr + columns * stride_bias, mask=own_mask, other=0.0)
    for m0 in range(first, last, BLOCK_M):
        rows = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
        row_mask = rows < last
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + columns[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=row_mask[:, None] & column_mask[None, :], other=0.0)  # [BM, BN]
        if NEED_H:
            h = tl.dot(dy, b, input_precision=INPUT_PRECISION) * scale  # [BM, BR]
            h_ptrs = h_ptr + (pid_n * M + rows[:, None]) * R + ranks[None, :]
            h_mask = row_mask[:, None] & rank_mask[None, :]
            tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=h_mask)
        if NEED_DB:
            t_ptrs = t_ptr + rows[:, None] * stride_tm + ranks[None, :] * stride_tr
            t = tl.load(t_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)  # [BM, BR]
            db = tl.dot(tl.trans(dy), t, db, input_precision=INPUT_PRECISION)
        if NEED_DOTS:
            y_ptrs = y_ptr + rows[:, None] * stride_ym + columns[None, :] * stride_yn
            y = tl.load(y_ptrs, mask=row_mask[:, None] & own_mask[None, :], other=0.0)  # [BM, BN]
            y = y.to(tl.float32)
            if HAS_BIAS:
                y = tl.where(row_mask[:, None], y - bias[None, :].to(tl.float32), 0.0)
                squares += tl.sum(y * y, axis=0)
            dots += tl.sum(dy.to(tl.float32) * y, axis=0)
    if NEED_DOTS:
        tl.store(dots_ptr + chunk.to(tl.int64) * N + columns, dots, mask=own_mask)
        if HAS_BIAS:
            tl.store(squares_ptr + chunk.to(tl.int64) * N + columns, squares, mask=own_mask)
    if NEED_DB:
        db_ptrs = db_ptr + (chunk.to(tl.int64) * N + columns[:, None]) * R + ranks[None, :]
        tl.store(db_ptrs, db, mask=column_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["M", "ROWS_PER_CHUNK", "threshold"])
def adapter_linear_bwd_da_kernel(
    h_ptr,
    x_ptr,
    da_ptr,
    seed_ptr,
    stride_hm,
    stride_hr,
    stride_xm,
    stride_xk,
    M,
    K,
    R,
    ROWS_PER_CHUNK,
    threshold,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # da[chunk, r, k] = sum over the chunk's m of H[m, r] keep[m, k] x[m, k]; da [chunks, R, K]
    tiles_r = tl.cdiv(R, BLOCK_R)
    # rank tiles are neighbours, so that they find x in the cache
    pid_k = (tl.program_id(0) // tiles_r).to(tl.int64)
    pid_r = tl.program_id(0) % tiles_r
    chunk = tl.program_id(1)
    ks = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    ranks = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BR]
    k_mask = ks < K
    rank_mask = ranks < R
    first = chunk * ROWS_PER_CHUNK
    last = tl.minimum(M, first + ROWS_PER_CHUNK)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m0 in range(first, last, BLOCK_M):
        rows = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
        row_mask = rows < last
        h_ptrs = h_ptr + rows[None, :] * stride_hm + ranks[:, None] * stride_hr
        x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
        h = tl.load(h_ptrs, mask=rank_mask[:, None] & row_mask[None, :], other=0.0)  # [BR, BM]
        x = tl.load(x_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BM, BK]
        if DROPOUT:
            keep = philox_keep_tile(seed, rows, pid_k * BLOCK_K, K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(h, x, acc, input_precision=INPUT_PRECISION)
    da_ptrs = da_ptr + (chunk.to(tl.int64) * R + ranks[:, None]) * K + ks[None, :]
    tl.store(da_ptrs, acc, mask=rank_mask[:, None] & k_mask[None, :])


@triton.jit(do_not_specialize=["M"])
def adapter_linear_bwd_dg_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    asked_ptr,
    dg_ptr,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    M,
    N,
    K,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dg[k-tile, n] = sum over the tile's k of W[n, k] sum_m dY[m, n] x[m, k]; dg [k-tiles, N]
    # zero in a column tile in which no column is asked for, as nearly always in all of them where
    # the rest of dg is read off y
    pid_n = tl.program_id(0).to(tl.int64)
    pid_k = tl.program_id(1).to(tl.int64)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    ks = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    column_mask = columns < N
    k_mask = ks < K
    asked = tl.load(asked_ptr + columns, mask=column_mask, other=0).to(tl.int32)
    dg = tl.zeros((BLOCK_N,), tl.float32)
    if tl.max(asked, axis=0) > 0:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            rows = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
            row_mask = rows < M
            dy_ptrs = dy_ptr + rows[None, :] * stride_dym + columns[:, None] * stride_dyn
            x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
            dy = tl.load(dy_ptrs, mask=column_mask[:, None] & row_mask[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BM, BK]
            acc = tl.dot(dy, x, acc, input_precision=INPUT_PRECISION)
        w_ptrs = w_ptr + columns[:, None] * stride_wn + ks[None, :] * stride_wk
        w = tl.load(w_ptrs, mask=column_mask[:, None] & k_mask[None, :], other=0.0)  # [BN, BK]
        dg = tl.sum(acc * w.to(tl.float32), axis=1)
    tl.store(dg_ptr + pid_k * N + columns, dg, mask=column_mask)


@triton.jit(do_not_specialize=["M", "scale", "threshold"])
def adapter_linear_drop_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    stride_xm,
    stride_xk,
    M,
    K,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out[m, k] = keep[m, k] ? scale * x[m, k] : 0; out [M, K] contiguous, may be x itself
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_m = (tl.program_id(0) // tiles_k).to(tl.int64)
    pid_k = (tl.program_id(0) % tiles_k).to(tl.int64)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    ks = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    mask = (rows < M)[:, None] & (ks < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk, mask=mask, other=0.0)
    keep = philox_keep_tile(tl.load(seed_ptr), rows, pid_k * BLOCK_K, K, threshold, BLOCK_K)
    kept = tl.where(keep, x.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + rows[:, None] * K + ks[None, :], kept.to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["PARTS"])
def adapter_linear_sum_kernel(
    parts_ptr,
    out_ptr,
    PARTS,
    COUNT,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # out[i] = sum over p of parts[p, i]; parts [PARTS, COUNT] fp32, added in an order that is fixed
    items = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    mask = items < COUNT
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for p0 in range(0, PARTS, BLOCK_M):
        parts = (p0 + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
        ptrs = parts_ptr + parts[:, None] * COUNT + items[None, :]
        acc += tl.load(ptrs, mask=(parts < PARTS)[:, None] & mask[None, :], other=0.0)
    tl.store(out_ptr + items, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------- launchers


def draw_seed(device: torch.device | str) -> Tensor:
    """The seed [1] int64 of one call's dropout, on ``device``: kernels read it there by pointer."""
    return dropout.draw_seed(device).view(1)


@cache
def arch_of(device: torch.device) -> tiles.Arch:
    if device.type == "cpu":
        return tiles.INTERPRETER
    facts = torch.cuda.get_device_properties(device)
    return tiles.arch_of(10 * facts.major + facts.minor, facts.multi_processor_count, facts.name)


def _input_precision(dtype: torch.dtype) -> str:
    """How a dot treats its operands: for fp32, TF32 only where torch's matmul may use it too."""
    if dtype != torch.float32:
        return "ieee"
    # reading the older allow_tf32 raises once a program has set the newer fp32_precision
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


def _options(tile: tiles.Tile, *names: str) -> dict[str, int]:
    """The keyword arguments with which a kernel is launched in ``tile``."""
    blocks = {name: getattr(tile, name) for name in names}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _regular(
    r: int, sizes: tuple[int, ...], rows: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> bool:
    """Whether ``tiles.choose`` may count on 16-byte reads.

    sizes: the widths N, K the kernel masks; rows: its operands of M rows, which must be contiguous
    along the other dimension (M is never specialised); others: may be contiguous along either.
    Callers leave out what has the rank as a stride while r <= 16: so little does no harm.
    """
    if (r > 16 and r % 16) or any(size % 16 for size in sizes):
        return False
    for matrix in rows:
        down, along = matrix.stride()
        if along != 1 or down % 16 or matrix.data_ptr() % 16:
            return False
    for matrix in others:
        down, along = matrix.stride()
        if not ((along == 1 and down % 16 == 0) or (down == 1 and along % 16 == 0)):
            return False
        if matrix.data_ptr() % 16:
            return False
    return True


def level_of(dropout_p: float, seed: Tensor | None) -> int:
    """The 16-bit level below which an element drops; 0 where nothing can."""
    level = dropout.threshold(dropout_p) if dropout_p > 0.0 else 0
    if level and seed is None:
        raise ValueError(f"dropout_p = {dropout_p} needs a seed: take one from draw_seed(device)")
    return level


def total_scale(scaling: float, level: int) -> float:
    return float(scaling) * dropout.LEVELS / (dropout.LEVELS - level)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts [P, ...] fp32 contiguous -> [...] ``dtype``, added in a fixed order."""
    if parts.shape[0] == 1 and parts.dtype == dtype:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    count = out.numel()
    tile = tiles.choose("sum", torch.float32, 1, 1, 1, 1, arch_of(parts.device))
    adapter_linear_sum_kernel[(tiles.cdiv(count, tile.BLOCK_N),)](
        parts, out, parts.shape[0], count, **_options(tile, "BLOCK_M", "BLOCK_N")
    )
    return out


def shrink(x: Tensor, lora_A: Tensor, scaling: float, level: int, seed: Tensor | None) -> Tensor:
    """t [M, r] = s * keep_scale * drop(x) Aᵀ in x's dtype. x [M, K], lora_A [r, K]."""
    (M, K), r = x.shape, lora_A.shape[0]
    arch = arch_of(x.device)
    regular = _regular(r, (K,), (x,), (lora_A,))
    tile = tiles.choose("shrink", x.dtype, M, 0, K, r, arch, regular)
    splits, steps = tiles.shrink_splits(tile, M, K, r, arch)
    dtype = x.dtype if splits == 1 else torch.float32
    parts = torch.empty((splits, M, r), dtype=dtype, device=x.device)
    grid = (tiles.cdiv(M, tile.BLOCK_M) * tiles.cdiv(r, tile.BLOCK_R), splits)
    adapter_linear_fwd_shrink_kernel[grid](
        x,
        lora_A,
        parts,
        seed if level else None,
        *x.stride(),
        *lora_A.stride(),
        M,
        K,
        r,
        steps,
        total_scale(scaling, level),
        level,
        DROPOUT=level > 0,
        INPUT_PRECISION=_input_precision(x.dtype),
        **_options(tile, "BLOCK_M", "BLOCK_K", "BLOCK_R"),
    )
    return _sum(parts, x.dtype)


def main(
    x: Tensor | None,
    w: Tensor | None,
    t: Tensor,
    b: Tensor,
    bias: Tensor | None,
    level: int,
    seed: Tensor | None,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> Tensor:
    """out [M, N] = keep ∘ (t b) + x w + bias; x [M, K] and w [K, N] both None leave the seed alone.

    t [M, r], b [r, N], bias [N]; the mask (level > 0) is that of a matrix of out's shape. With
    scale_in [K] it is x ∘ scale_in that is multiplied; scale_out [N] multiplies all but the bias.
    One of the two at most.
    """
    (M, r), N = t.shape, b.shape[1]
    K = 0 if x is None else x.shape[1]
    arch = arch_of(t.device)
    rows = (t,) if r > 16 else ()
    others = (b,) if r > 16 else ()
    if x is not None and w is not None:
        rows, others = (*rows, x), (*others, w)
    regular = _regular(r, (N, K), rows, others)
    kernel = "seed" if x is None else "main"
    if scale_in is not None or scale_out is not None:
        kernel = "main_scaled"
    tile = tiles.choose(kernel, t.dtype, M, N, K, r, arch, regular)
    out = torch.empty((M, N), dtype=t.dtype, device=t.device)
    adapter_linear_main_kernel[(tiles.cdiv(M, tile.BLOCK_M) * tiles.cdiv(N, tile.BLOCK_N),)](
        x,
        w,
        t,
        b,
        bias,
        scale_in if scale_out is None else scale_out,
        seed if level else None,
        out,
        *((0, 0) if x is None else x.stride()),
        *((0, 0) if w is None else w.stride()),
        *t.stride(),
        *b.stride(),
        0 if bias is None else bias.stride(0),
        *out.stride(),
        M,
        N,
        K,
        r,
        level,
        HAS_PRODUCT=x is not None,
        HAS_BIAS=bias is not None,
        SCALE_IN=scale_in is not None,
        SCALE_OUT=scale_out is not None,
        DROPOUT=level > 0,
        EVEN_K=K % tile.BLOCK_K == 0,
        INPUT_PRECISION=_input_precision(t.dtype),
        GROUP_M=tile.GROUP_M,
        **_options(tile, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"),
    )
    return out


def bwd_dy(
    dy: Tensor,
    lora_B: Tensor | None,
    t: Tensor | None,
    scale: float,
    y: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
    """(H, dB, dots) from one read of dY; each None if what it takes is.

    H [M, r] = scale * dY B in dY's dtype, dB [N, r] fp32 = dYᵀ t. dots = [Σ_rows dY ∘ y], or with
    a bias [Σ_rows dY ∘ (y − bias), Σ_rows (y − bias)²], each [N] fp32.
    """
    M, N = dy.shape
    need_h = lora_B is not None
    given = [matrix for matrix in (lora_B, t) if matrix is not None]
    r = given[0].shape[1] if given else 1
    if 0 in (M, N):  # nothing to launch
        h = dy.new_zeros((M, r)) if need_h else None
        db = None if t is None else dy.new_zeros((N, r), dtype=torch.float32)
        wanted = 1 if bias is None else 2
        return h, db, None if y is None else [dy.new_zeros(N, dtype=torch.float32)] * wanted
    arch = arch_of(dy.device)
    rows = (dy,) if r <= 16 or t is None else (dy, t)
    rows = rows if y is None else (*rows, y)
    others = (lora_B,) if r > 16 and lora_B is not None else ()
    regular = _regular(r, (N,), rows, others)
    kernel = "bwd_dy" if y is None else "bwd_dots"
    tile = tiles.choose(kernel, dy.dtype, M, N, 0, r, arch, regular)
    tiles_n = tiles.cdiv(N, tile.BLOCK_N)
    programs = tiles_n * tiles.cdiv(r, tile.BLOCK_R)
    chunks, per_chunk = tiles.row_chunks(tile.BLOCK_M, M, programs, arch)
    h_parts = db_parts = dots_parts = None
    if need_h:
        dtype = dy.dtype if tiles_n == 1 else torch.float32
        h_parts = torch.empty((tiles_n, M, r), dtype=dtype, device=dy.device)
    if t is not None:
        db_parts = torch.empty((chunks, N, r), dtype=torch.float32, device=dy.device)
    if y is not None:
        wanted = 1 if bias is None else 2
        dots_parts = torch.empty((wanted, chunks, N), dtype=torch.float32, device=dy.device)
    adapter_linear_bwd_dy_kernel[(programs, chunks)](
        dy,
        lora_B,
        t,
        h_parts,
        db_parts,
        y,
        bias,
        None if dots_parts is None else dots_parts[0],
        None if dots_parts is None or bias is None else dots_parts[1],
        *dy.stride(),
        *((0, 0) if lora_B is None else lora_B.stride()),
        *((0, 0) if t is None else t.stride()),
        *((None, None) if y is None else y.stride()),  # None: no argument of the compiled kernel
        None if bias is None else bias.stride(0),
        M,
        N,
        r,
        per_chunk,
        scale,
        NEED_H=need_h,
        NEED_DB=t is not None,
        NEED_DOTS=y is not None,
        HAS_BIAS=bias is not None,
        INPUT_PRECISION=_input_precision(dy.dtype),
        **_options(tile, "BLOCK_M", "BLOCK_N", "BLOCK_R"),
    )
    h = None if h_parts is None else _sum(h_parts, dy.dtype)
    db = None if db_parts is None else _sum(db_parts, torch.float32)
    dots = None if dots_parts is None else [_sum(parts, torch.float32) for parts in dots_parts]
    return h, db, dots


def bwd_da(h: Tensor, x: Tensor, level: int, seed: Tensor | None) -> Tensor:
    """dA [r, K] fp32 = Hᵀ (keep ∘ x). h [M, r], x [M, K]."""
    (M, K), r = x.shape, h.shape[1]
    if 0 in (M, K):  # nothing to launch
        return h.new_zeros((r, K), dtype=torch.float32)
    arch = arch_of(x.device)
    regular = _regular(r, (K,), (x, h) if r > 16 else (x,), ())
    tile = tiles.choose("bwd_da", x.dtype, M, 0, K, r, arch, regular)
    programs = tiles.cdiv(K, tile.BLOCK_K) * tiles.cdiv(r, tile.BLOCK_R)
    chunks, per_chunk = tiles.row_chunks(tile.BLOCK_M, M, programs, arch)
    parts = torch.empty((chunks, r, K), dtype=torch.float32, device=x.device)
    adapter_linear_bwd_da_kernel[(programs, chunks)](
        h,
        x,
        parts,
        seed if level else None,
        *h.stride(),
        *x.stride(),
        M,
        K,
        r,
        per_chunk,
        level,
        DROPOUT=level > 0,
        INPUT_PRECISION=_input_precision(x.dtype),
        **_options(tile, "BLOCK_M", "BLOCK_K", "BLOCK_R"),
    )
    return _sum(parts, torch.float32)


def _bwd_dg(dy: Tensor, x: Tensor, weight: Tensor, asked: Tensor) -> Tensor:
    """Σ_rows dY ∘ (x Wᵀ) [N] fp32 where asked [N] bool; elsewhere anything finite.

    It never waits to learn whether a column is asked for: the kernel looks, and nearly always ends.
    """
    (M, K), N = x.shape, weight.shape[0]
    arch = arch_of(x.device)
    regular = _regular(16, (N, K), (dy, x), (weight,))
    tile = tiles.choose("bwd_dg", x.dtype, M, N, K, 16, arch, regular)
    tiles_k = tiles.cdiv(K, tile.BLOCK_K)
    parts = torch.empty((tiles_k, N), dtype=torch.float32, device=x.device)
    adapter_linear_bwd_dg_kernel[(tiles.cdiv(N, tile.BLOCK_N), tiles_k)](
        dy,
        x,
        weight,
        asked,
        parts,
        *dy.stride(),
        *x.stride(),
        *weight.stride(),
        M,
        N,
        K,
        INPUT_PRECISION=_input_precision(x.dtype),
        **_options(tile, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )
    return _sum(parts, torch.float32)


def out_scale_gradient(
    dy: Tensor,
    dots: list[Tensor] | None,
    product: Tensor,
    out_scale: Tensor,
    bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lora_B: Tensor,
) -> Tensor:
    """dg [N] fp32 of y = g ∘ (x Wᵀ + t Bᵀ) + bias, from what ``bwd_dy`` read off y.

    product [N, r] is its dYᵀ t, from which the columns that y does not show are computed; all of
    them, if it has read no y.
    """
    if dots is None:
        every = torch.ones(dy.shape[1], dtype=torch.bool, device=dy.device)
        return (product * lora_B).sum(1).add_(_bwd_dg(dy, x, weight, every))
    mean_square = None if bias is None else dots[1] / dy.shape[0]
    unread = doubtful(out_scale, bias, mean_square, dy.dtype)
    exact = (product * lora_B).sum(1).add_(_bwd_dg(dy, x, weight, unread))
    return torch.where(unread, exact, dots[0] / out_scale)


def _drop(
    x: Tensor, scale: float, level: int, seed: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """scale * drop(x) [M, K], contiguous; into ``out`` if given, which may be x."""
    M, K = x.shape
    if out is None:
        out = torch.empty((M, K), dtype=x.dtype, device=x.device)
    regular = _regular(16, (K,), (x,), ())
    tile = tiles.choose("drop", x.dtype, M, 0, K, 16, arch_of(x.device), regular)
    adapter_linear_drop_kernel[(tiles.cdiv(M, tile.BLOCK_M) * tiles.cdiv(K, tile.BLOCK_K),)](
        x,
        out,
        seed,
        *x.stride(),
        M,
        K,
        scale,
        level,
        **_options(tile, "BLOCK_M", "BLOCK_K"),
    )
    return out


def on_device(x: Tensor) -> Any:
    """Makes x's device the current one, where Triton launches."""
    # an index below zero leaves the current device alone, which is all that a CPU tensor asks for
    return torch.cuda.device(x.get_device() if x.is_cuda else -1)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    need_t: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] = x Wᵀ + bias + t Bᵀ with t [M, r] = s * keep_scale * drop(x) Aᵀ, both x's dtype.

    x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N]; ``seed`` from ``draw_seed`` if
    dropout_p > 0. Returns (y, t), with None for t unless ``need_t``.
    """
    (M, K), (N, r) = x.shape, lora_B.shape
    if 0 in (M, N, K):  # nothing to launch, or nothing to sum over
        base = weight.t()
        y = torch.mm(x, base) if bias is None else torch.addmm(bias, x, base)
        return y, (x.new_zeros((M, r)) if need_t else None)
    level = level_of(dropout_p, seed)
    with on_device(x):
        t = shrink(x, lora_A, scaling, level, seed)
        if tiles.algorithm("forward", x.dtype, M, N, K, r, arch_of(x.device)) == "fused":
            y = main(x, weight.t(), t, lora_B.t(), bias, 0, None)
        else:
            up = lora_B.t()
            y = torch.mm(t, up) if bias is None else torch.addmm(bias, t, up)
            y.addmm_(x, weight.t())
    return y, (t if need_t else None)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA, dB, dbias), None for what ``needs`` leaves out.

    dy [M, N]. Operands that no gradient asked for needs may be None: x [M, K] serves dweight and
    dA; weight and lora_A serve dx; lora_B dx and dA; t [M, r] of ``forward`` dB. dx and dweight
    come in dy's dtype; dA, dB and dbias in fp32.
    """
    M, N = dy.shape
    if 0 in dy.stride():  # an expanded scalar, as from y.sum(): cheaper to write than to read so
        dy = dy.contiguous()
    dx = dweight = da = db = h = None
    if needs.weight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
    dbias = dy.sum(0, dtype=torch.float32) if needs.bias else None
    level = level_of(dropout_p, seed)
    with on_device(dy):
        if needs.x or needs.lora_A:
            assert lora_B is not None
            own_t = t if needs.lora_B else None
            h, db, _ = bwd_dy(dy, lora_B, own_t, total_scale(scaling, level))
        elif needs.lora_B:
            assert t is not None
            _, db, _ = bwd_dy(dy, None, t, 1.0)
        if needs.lora_A:
            assert x is not None and h is not None
            da = bwd_da(h, x, level, seed)
        if needs.x:
            assert weight is not None and lora_A is not None and h is not None
            r, K = lora_A.shape
            if 0 in (M, N, K):
                dx = torch.mm(dy, weight)
            elif tiles.algorithm("dx", dy.dtype, M, N, K, r, arch_of(dy.device)) == "fused":
                dx = main(dy, weight, h, lora_A, None, level, seed)
            else:
                dx = main(None, None, h, lora_A, None, level, seed) if level else h @ lora_A
                dx.addmm_(dy, weight)
    return dx, dweight, da, db, dbias


def up(x: Tensor, w: Tensor, t: Tensor, b: Tensor, bias: Tensor | None, part: str) -> Tensor:
    """t b + x w + bias [M, N] by the algorithm of ``part``. x [M, K], w [K, N], t, b [r, N]."""
    (M, K), (r, N) = x.shape, b.shape
    own = (N, K) if part == "forward" else (K, N)
    if tiles.algorithm(part, x.dtype, M, *own, r, arch_of(x.device)) == "fused":
        return main(x, w, t, b, bias, 0, None)
    out = torch.mm(t, b) if bias is None else torch.addmm(bias, t, b)
    return out.addmm_(x, w)


def scaled_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    out_scale: Tensor,
    drop_base: bool,
    need_t: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N] = g ∘ (x Wᵀ + t Bᵀ) + bias, t as in ``forward``, and None.

    With ``drop_base`` y = x Wᵀ + t Bᵀ + bias + (g − 1) ∘ z; z = drop(x) Wᵀ + t Bᵀ [M, N] is the
    third result if ``need_z``. out_scale g [N] in x's dtype or fp32.
    """
    (M, K), (N, r) = x.shape, lora_B.shape
    if 0 in (M, N, K):  # nothing to launch, or nothing to sum over
        return eager.scaled_forward(
            x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed,
            out_scale=out_scale, drop_base=drop_base, need_t=need_t, need_z=need_z,
        )  # fmt: skip
    level = level_of(dropout_p, seed)
    out_scale = out_scale.contiguous()
    z = None
    with on_device(x):
        t = shrink(x, lora_A, scaling, level, seed)
        if drop_base:
            y = up(x, weight.t(), t, lora_B.t(), bias, "forward")
            dropped = _drop(x, total_scale(1.0, level), level, seed)
            z = up(dropped, weight.t(), t, lora_B.t(), None, "forward")
            y.addcmul_(z, eager.less_one(out_scale, x.dtype))
        elif tiles.algorithm("forward", x.dtype, M, N, K, r, arch_of(x.device)) == "fused":
            y = main(x, weight.t(), t, lora_B.t(), bias, 0, None, scale_out=out_scale)
        else:
            y = torch.mm(t, lora_B.t()).addmm_(x, weight.t())
            eager.scale_columns(y, out_scale, bias)
    return y, t if need_t else None, z if need_z else None


def scaled_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
    *,
    out_scale: Tensor,
    drop_base: bool,
    bias: Tensor | None,
    read: Tensor | None,
    need_out_scale: bool,
) -> tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """(dx, dweight, dA, dB, dbias, dg) of ``scaled_forward``, None for what is not asked for.

    dg [N] is read from ``read``: y, for which x, weight, lora_B, t and the bias (if there was one)
    must come too; with ``drop_base`` z, which suffices. Without either, x, weight, lora_B and t do,
    from which it is computed. The rest is as in ``backward``; dg comes in fp32.
    """
    M, N = dy.shape
    wide = x if x is not None else lora_A
    if 0 in (M, N) or (wide is not None and wide.shape[1] == 0):
        return eager.scaled_backward(
            dy, x, weight, lora_A, lora_B, t, scaling, dropout_p, seed, needs,
            out_scale=out_scale, drop_base=drop_base, bias=bias, read=read,
            need_out_scale=need_out_scale,
        )  # fmt: skip
    if 0 in dy.stride():
        dy = dy.contiguous()
    out_scale = out_scale.contiguous()
    dx = dweight = da = db = dbias = dg = h = product = None
    of_z = need_out_scale and not drop_base  # dg is that of a z which is not at hand
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.float32)
    level = level_of(dropout_p, seed)
    # what the adapter's part is multiplied with: dYg B = dY (g ∘ B)
    scaled_B = None
    if needs.x or needs.lora_A:
        assert lora_B is not None
        scaled_B = eager.times(lora_B, out_scale[:, None])
    with on_device(dy):
        if drop_base and need_out_scale and read is None:
            assert x is not None and weight is not None and lora_B is not None and t is not None
            dropped = _drop(x, total_scale(1.0, level), level, seed)
            read = up(dropped, weight.t(), t, lora_B.t(), None, "forward")
        own_t = t if needs.lora_B or of_z else None
        if scaled_B is not None or own_t is not None or need_out_scale:
            own_read = read if need_out_scale else None
            own_bias = bias if of_z and read is not None else None
            h, product, dots = bwd_dy(
                dy, scaled_B, own_t, total_scale(scaling, level), own_read, own_bias
            )
            dg = dots[0] if dots is not None else None
            if of_z:
                assert x is not None and weight is not None and lora_B is not None
                assert product is not None
                dg = out_scale_gradient(dy, dots, product, out_scale, bias, x, weight, lora_B)
        if needs.lora_B:
            assert product is not None
            db = product * out_scale[:, None]
        if needs.lora_A:
            assert x is not None and h is not None
            da = bwd_da(h, x, level, seed)
        if needs.weight:
            assert x is not None
            dweight = torch.mm(dy.t(), x)
            if drop_base:
                past = torch.mm(dy.t(), _drop(x, total_scale(1.0, level), level, seed))
                dweight.addcmul_(past, eager.less_one(out_scale, dy.dtype)[:, None])
            else:
                dweight.mul_(out_scale[:, None])
        if needs.x:
            assert weight is not None and lora_A is not None and h is not None
            r, K = lora_A.shape
            if drop_base:
                extra = eager.less_one(out_scale, torch.float32) * total_scale(1.0, level)
                dx = up(eager.times(dy, extra), weight, h, lora_A, None, "dx")
                dx = _drop(dx, 1.0, level, seed, out=dx).addmm_(dy, weight)
            elif tiles.algorithm("dx", dy.dtype, M, N, K, r, arch_of(dy.device)) == "fused":
                dx = main(dy, weight, h, lora_A, None, level, seed, scale_in=out_scale)
            else:
                dx = main(None, None, h, lora_A, None, level, seed) if level else h @ lora_A
                dx.addmm_(eager.times(dy, out_scale), weight)
    return dx, dweight, da, db, dbias, dg
