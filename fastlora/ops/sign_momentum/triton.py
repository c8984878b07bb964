"""The Triton backend: a list in one launch over a table of addresses.

``update`` walks over chunks of all tensors at once. Where a rate is relative to its tensor, or a
gradient must be finite, ``survey`` looks at the chunks before, and ``finish`` adds up what it saw,
tensor by tensor, in a fixed order. One launch serves tensors of the same dtypes; kernels are
compiled without fused multiply-adds, so that results equal the other backends' to the bit. bfloat16
is taken apart by its bits, which the interpreter rounds rightly. Masked rows and rates by row go to
the eager way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.ops.sign_momentum import eager
from fastlora.ops.sign_momentum.contract import Job, Momentum, Number, keys
from fastlora.ops.sign_momentum.eight_bit import EightBit
from fastlora.ops.sign_momentum.strided import row_major, say_written

BLOCK = 2048  # elements a program takes; a multiple of EightBit's block
WARPS = 4
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", None: ""}

# --------------------------------------------------------------------------------------- kernels

# Columns of the table: param, grad, momentum, scales, count, first chunk, last chunk + 1
COLUMNS = tl.constexpr(7)


@triton.jit
def _bf16_to_fp32(halves):
    # halves: uint16
    return (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load(address, offsets, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # fp32 of what is stored as fp32, fp16 or bf16
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    if TYPE == "fp32":
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif TYPE == "fp16":
        halves = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0)
        values = halves.to(tl.float32)
    else:
        words = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        values = _bf16_to_fp32(words)
    return values


@triton.jit
def _store(
    address, offsets, mask, values, random, TYPE: tl.constexpr, RANDOM: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    if TYPE == "fp32":
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, values, mask=mask)
    elif TYPE == "fp16":
        pointers = address.to(tl.pointer_type(tl.float16)) + offsets
        tl.store(pointers, values.to(tl.float16), mask=mask)
    else:
        bits = values.to(tl.uint32, bitcast=True)
        if not RANDOM:
            random = 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits + random) >> 16
        rounded = tl.where(values == values, rounded, (bits >> 16) | 0x40)
        pointers = address.to(tl.pointer_type(tl.uint16)) + offsets
        tl.store(pointers, rounded.to(tl.uint16), mask=mask)


@triton.jit
def sign_momentum_survey_kernel(
    table_ptr,
    chunks_ptr,
    sums_ptr,
    finite_ptr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # sums[chunk] = sum of param^2 (fp64), finite[chunk] = whether all of grad is
    at = tl.program_id(0).to(tl.int64)
    entry = tl.load(chunks_ptr + at * 2)
    first = tl.multiple_of(tl.load(chunks_ptr + at * 2 + 1), BLOCK)
    row = table_ptr + entry * COLUMNS
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < tl.load(row + 4)
    if P_TYPE != "":
        p = _load(tl.load(row), offsets, mask, P_TYPE, ALIGNED).to(tl.float64)
        tl.store(sums_ptr + at, tl.sum(p * p, axis=0))
    if G_TYPE != "":
        g = _load(tl.load(row + 1), offsets, mask, G_TYPE, ALIGNED)
        bad = (g.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000
        tl.store(finite_ptr + at, 1 - tl.max(bad.to(tl.int32), axis=0))


@triton.jit
def sign_momentum_finish_kernel(
    table_ptr,
    sums_ptr,
    finite_ptr,
    given_ptr,
    kinds_ptr,
    rates_ptr,
    lost_ptr,
    HAS_SUMS: tl.constexpr,
    HAS_FINITE: tl.constexpr,
):
    # given [tensors, 3]: lr, decay, floor (fp64) -> rates [tensors, 2]: eta, w (fp32)
    entry = tl.program_id(0).to(tl.int64)
    row = table_ptr + entry * COLUMNS
    total = tl.full((), 0.0, tl.float64)
    finite = tl.full((), 1, tl.int32)
    for at in range(tl.load(row + 5), tl.load(row + 6)):
        if HAS_SUMS:
            total += tl.load(sums_ptr + at)
        if HAS_FINITE:
            finite = tl.minimum(finite, tl.load(finite_ptr + at))
    if HAS_FINITE:
        tl.store(lost_ptr + entry, (1 - finite).to(tl.int8))
    if HAS_SUMS:
        eta = tl.load(given_ptr + entry * 3)
        if tl.load(kinds_ptr + entry) != 0:
            count = tl.maximum(tl.load(row + 4), 1).to(tl.float64)
            rms = tl.sqrt(total / count).to(tl.float32).to(tl.float64)
            floor = tl.load(given_ptr + entry * 3 + 2)
            eta *= tl.where(rms < floor, floor, rms)
        tl.store(rates_ptr + entry * 2, eta.to(tl.float32))
        w = 1.0 - eta * tl.load(given_ptr + entry * 3 + 1)
        tl.store(rates_ptr + entry * 2 + 1, w.to(tl.float32))


@triton.jit(do_not_specialize=["a", "b", "c", "d", "shrink"])
def sign_momentum_update_kernel(
    table_ptr,
    chunks_ptr,
    rates_ptr,
    skip_ptr,
    lost_ptr,
    centers_ptr,
    keys_ptr,
    a,
    b,
    c,
    d,
    shrink,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    MOVES: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SHRINKS: tl.constexpr,
    RANDOM: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    LEVELS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    entry = tl.load(chunks_ptr + at * 2)
    first = tl.multiple_of(tl.load(chunks_ptr + at * 2 + 1), BLOCK)
    row = table_ptr + entry * COLUMNS
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < tl.load(row + 4)
    random = tl.zeros((BLOCK,), tl.uint32)
    if RANDOM:
        random = offsets.to(tl.uint32) + tl.load(keys_ptr + entry * 2).to(tl.uint32)
        random ^= random >> 16
        random *= 0x85EBCA6B
        random ^= random >> 13
        random ^= tl.load(keys_ptr + entry * 2 + 1).to(tl.uint32)
        random *= 0xC2B2AE35
        random ^= random >> 16
        random &= 0xFFFF
    kept = True
    if SHRINKS:
        kept = tl.load(lost_ptr + entry) == 0
        if P_TYPE != "":
            # of a tensor that is not lost nothing is read and nothing written
            lost = mask & (tl.load(lost_ptr + entry) != 0)
            center = tl.load(centers_ptr + entry)
            p = _load(tl.load(row), offsets, lost, P_TYPE, ALIGNED)
            p = (p - center) * shrink + center
            _store(tl.load(row), offsets, lost, p, random, P_TYPE, RANDOM, ALIGNED)
    if kept:
        momentum = tl.load(row + 2)
        if M_TYPE == "q8":
            codes = tl.load(momentum.to(tl.pointer_type(tl.int8)) + offsets, mask=mask, other=0)
            scales_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
            scales = tl.load(scales_ptr + offsets // Q_BLOCK, mask=mask, other=0.0)
            q = codes.to(tl.float32)
            m = q * tl.abs(q) * STEP * scales
        else:
            m = _load(momentum, offsets, mask, M_TYPE, ALIGNED)
        v = m
        if G_TYPE != "":
            g = _load(tl.load(row + 1), offsets, mask, G_TYPE, ALIGNED)
            v = a * m + b * g
            new = c * m + d * g
            if M_TYPE == "q8":
                # a NaN's bits are above those of any number
                size = tl.where(mask, new, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                tiles = tl.reshape(size, (BLOCK // Q_BLOCK, Q_BLOCK))
                top = tl.max(tiles, axis=1)
                scale = tl.where(top < 0x7F800000, top, 0x7FC00000).to(tl.float32, bitcast=True)
                blocks = first // Q_BLOCK + tl.arange(0, BLOCK // Q_BLOCK)
                inside = blocks * Q_BLOCK < tl.load(row + 4)
                tl.store(scales_ptr + blocks, scale, mask=inside)
                sound = (scale > 0)[:, None]
                by = tl.where(sound, scale[:, None], 1.0)
                values = tl.reshape(tl.where(mask, new, 0.0), (BLOCK // Q_BLOCK, Q_BLOCK))
                ratio = tl.div_rn(tl.abs(values), tl.broadcast_to(by, values.shape))
                root = tl.sqrt_rn(ratio) * LEVELS
                root = tl.where(sound, root, 0.0)
                code = (root + 12582912.0) - 12582912.0  # to nearest even
                code = tl.where(values < 0, -code, code)
                flat = tl.reshape(code, (BLOCK,)).to(tl.int8)
                tl.store(momentum.to(tl.pointer_type(tl.int8)) + offsets, flat, mask=mask)
            else:
                _store(momentum, offsets, mask, new, random, M_TYPE, False, ALIGNED)
        if MOVES:
            moves = True
            if HAS_SKIP:
                moves = tl.load(skip_ptr + entry) == 0
            if moves:
                eta = tl.load(rates_ptr + entry * 2)
                w = tl.load(rates_ptr + entry * 2 + 1)
                u = tl.where(v > 0, eta, tl.where(v < 0, -eta, 0.0))
                p = w * _load(tl.load(row), offsets, mask, P_TYPE, ALIGNED) - u
                _store(tl.load(row), offsets, mask, p, random, P_TYPE, RANDOM, ALIGNED)


# --------------------------------------------------------------------------------------- launches


class Table:
    """A list's addresses on its device, and which chunks its programs take, by dtypes."""

    def __init__(self, job: Job) -> None:
        self.key = _key(job)
        self.device = job.momenta[0].device
        self.groups: dict[tuple[str, str, str], tuple[Tensor, bool]] = {}
        counts = [momentum.numel() for momentum in job.momenta]
        chunks: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
        rows: list[list[int]] = []
        spans: list[list[int]] = []
        self.aligned = True
        for i, (momentum, count) in enumerate(zip(job.momenta, counts, strict=True)):
            coded = isinstance(momentum, EightBit)
            kept = momentum.codes if isinstance(momentum, EightBit) else momentum
            param = None if job.params is None else job.params[i]
            grad = None if job.grads is None else job.grads[i]
            kind = (
                _TYPES[None if param is None else param.dtype],
                _TYPES[None if grad is None else grad.dtype],
                "q8" if coded else _TYPES[kept.dtype],
            )
            own = chunks.setdefault(kind, [])
            begin = len(own)
            own += [(i, first) for first in range(0, count, BLOCK)]
            spans.append([begin, len(own)])
            rows.append([
                0 if param is None else param.data_ptr(),
                0 if grad is None else grad.data_ptr(),
                kept.data_ptr(),
                momentum.scales.data_ptr() if isinstance(momentum, EightBit) else 0,
                count,
            ])  # fmt: skip
        self.table = torch.tensor(
            [row + span for row, span in zip(rows, spans, strict=True)], dtype=torch.int64
        ).to(self.device)
        self.groups = {}
        for kind, own in chunks.items():
            if own:
                aligned = all(at % 16 == 0 for i in {i for i, _ in own} for at in rows[i][:3])
                self.groups[kind] = (
                    torch.tensor(own, dtype=torch.int64).to(self.device), aligned
                )  # fmt: skip
        self.rates: tuple[Any, Tensor] | None = None


def read(job: Job, kept: Any = None, checked: bool = False) -> Table | None:
    """As the contract has it; a kept table serves the same tensors at the same addresses."""
    if kept is not None and kept.key == _key(job):
        return kept
    if not checked or not all(tensor.is_contiguous() for tensor in _tensors(job)):
        return None
    return Table(job)


def update(job: Job, table: Table | None = None) -> Tensor | None:
    """As in eager.py. ``table``: of ``read``; without it, tensors may have any strides."""
    if job.rows is not None or (job.relative is not None and "rows" in job.relative):
        return eager.update(job)
    if table is None:
        return row_major(job, lambda plain: update(plain, Table(plain)))
    n, device = len(job.momenta), table.device
    lost = None if job.shrink is None else torch.zeros(n, dtype=torch.bool, device=device)
    relative = job.moves and job.relative is not None
    rates = _rates(job, table) if job.moves and not relative else None
    given = kinds = None
    if relative and job.relative is not None:
        rates = torch.empty(n, 2, device=device)
        given = torch.stack([
            _vector(values, device) for values in (job.lr, job.weight_decay, job.floor)
        ], dim=1).contiguous()  # fmt: skip
        flags = [kind is not None for kind in job.relative]
        kinds = torch.tensor(flags, dtype=torch.int8).to(device)
        if not all(flags):  # the others' rates, which no chunk need be looked at for, come along
            rates.copy_(_plain_rates(given))
    drawn = centers = None
    if job.seed is not None:
        words = [keys(job.seed, i) for i in range(n)]
        drawn = torch.tensor(words, dtype=torch.int64).to(device)
    if job.centers is not None:
        centers = torch.tensor(job.centers, dtype=torch.float32).to(device)
    for (p, g, m), (chunks, aligned) in table.groups.items():
        count = len(chunks)
        if relative or lost is not None:
            sums = torch.empty(count, dtype=torch.float64, device=device)
            finite = torch.empty(count, dtype=torch.int32, device=device)
            sign_momentum_survey_kernel[(count,)](
                table.table, chunks, sums, finite,
                P_TYPE=p if relative else "", G_TYPE="" if lost is None else g,
                ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            entries = chunks[:, 0].unique_consecutive()
            sub = table.table[entries].contiguous()
            part_rates = torch.empty(len(entries), 2, device=device)
            part_lost = torch.zeros(len(entries), dtype=torch.bool, device=device)
            sign_momentum_finish_kernel[(len(entries),)](
                sub, sums, finite,
                None if given is None else given[entries].contiguous(),
                None if kinds is None else kinds[entries].contiguous(),
                part_rates, part_lost.view(torch.int8),
                HAS_SUMS=relative, HAS_FINITE=lost is not None, enable_fp_fusion=False,
            )  # fmt: skip
            if relative and rates is not None:
                rates[entries] = part_rates
            if lost is not None:
                lost[entries] = part_lost
        sign_momentum_update_kernel[(count,)](
            table.table, chunks, rates,
            None if job.skip is None else job.skip.view(torch.int8),
            None if lost is None else lost.view(torch.int8), centers, drawn,
            job.a, job.b, job.c, job.d, job.shrink or 0.0,
            **constants(p, g, m, job.moves, job.skip is not None, lost is not None,
                        job.seed is not None and p == "bf16", aligned),
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    say_written(job)
    return lost


def constants(
    p: str, g: str, m: str, moves: bool, skips: bool, shrinks: bool, random: bool, aligned: bool
) -> dict[str, Any]:
    """What the update kernel is compiled for."""
    return {
        "P_TYPE": p, "G_TYPE": g, "M_TYPE": m, "MOVES": moves, "HAS_SKIP": skips,
        "SHRINKS": shrinks, "RANDOM": random, "ALIGNED": aligned, "STEP": 1 / 127**2,
        "LEVELS": 127.0, "Q_BLOCK": 256, "BLOCK": BLOCK,
    }  # fmt: skip


def _tensors(job: Job) -> list[Tensor]:
    momenta = [m.codes if isinstance(m, EightBit) else m for m in job.momenta]
    return [*(job.params or ()), *(job.grads or ()), *momenta]


def _key(job: Job) -> Any:
    """What a table holds for."""
    tensors = _tensors(job)
    shape = [None if part is None else len(part) for part in (job.params, job.grads)]
    return (
        shape,
        [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors],
        [m.scales.data_ptr() for m in job.momenta if isinstance(m, EightBit)],
    )


def _vector(values: Sequence[Number], device: torch.device) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    return torch.tensor(values, dtype=torch.float64).to(device)


def _rates(job: Job, table: Table) -> Tensor:
    """(η, w) of every tensor, float32; uploaded again only when they have changed."""
    plain = not any(isinstance(v, Tensor) for values in (job.lr, job.weight_decay) for v in values)
    key = (list(job.lr), list(job.weight_decay)) if plain else None
    if key is not None and table.rates is not None and table.rates[0] == key:
        return table.rates[1]
    device = table.device
    given = torch.stack([_vector(values, device) for values in (job.lr, job.weight_decay)], dim=1)
    rates = _plain_rates(given)
    table.rates = (key, rates)
    return rates


def _plain_rates(given: Tensor) -> Tensor:
    w = 1 - given[:, 0] * given[:, 1]
    return torch.stack([given[:, 0], w], dim=1).to(torch.float32).contiguous()


__all__ = ["BLOCK", "Momentum", "Table", "constants", "read", "update"]
