"""The Triton backend: a list in one launch over a table of addresses.

``update`` walks over chunks of all tensors at once. Where a rate is relative to its tensor, or a
gradient must be finite, ``survey`` looks at the chunks before, and ``finish`` adds up what it saw,
tensor by tensor, in a fixed order; where rates are relative to rows, ``rows`` has made them before.
One launch serves tensors of the same dtypes; kernels are compiled without fused multiply-adds, so
that results equal the other backends' to the bit. bfloat16 is taken apart by its bits, which the
interpreter rounds rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.ops.sign_momentum.contract import Job, Momentum, Number, keys
from fastlora.ops.sign_momentum.eight_bit import EightBit
from fastlora.ops.sign_momentum.strided import row_major, say_written

BLOCK = 2048  # elements a program takes; a multiple of EightBit's block
WARPS = 4
ROW = 1024  # elements of a row that ``rows`` takes at once
_KINDS = {None: 0, "tensor": 1, "rows": 2}  # the kernels' TENSOR and ROWS
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", None: ""}

# --------------------------------------------------------------------------------------- kernels

# Columns of the table: param, grad, momentum, scales, count, first chunk, last chunk + 1, and the
# elements of a row (the last axis)
COLUMNS = tl.constexpr(8)
# What a rate is relative to; 0: nothing
TENSOR, ROWS = tl.constexpr(1), tl.constexpr(2)


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
    kinds_ptr,
    sums_ptr,
    finite_ptr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # sums[chunk] = sum of param^2 (fp64) where the rate is relative to the tensor,
    # finite[chunk] = whether all of grad is
    at = tl.program_id(0).to(tl.int64)
    entry = tl.load(chunks_ptr + at * 2)
    first = tl.multiple_of(tl.load(chunks_ptr + at * 2 + 1), BLOCK)
    row = table_ptr + entry * COLUMNS
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < tl.load(row + 4)
    if P_TYPE != "":
        sized = tl.load(kinds_ptr + entry) == TENSOR
        p = _load(tl.load(row), offsets, mask & sized, P_TYPE, ALIGNED).to(tl.float64)
        tl.store(sums_ptr + at, tl.sum(p * p, axis=0), mask=sized)
    if G_TYPE != "":
        g = _load(tl.load(row + 1), offsets, mask, G_TYPE, ALIGNED)
        bad = (g.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000
        tl.store(finite_ptr + at, 1 - tl.max(bad.to(tl.int32), axis=0))


@triton.jit
def _put_rates(rates_ptr, given_ptr, squares, count, relative):
    # rates: eta, w (fp32) of given: lr, decay, floor (fp64) and the sum of count squares
    eta = tl.load(given_ptr)
    if relative:
        mean = squares / tl.maximum(count, 1).to(tl.float64)
        rms = tl.sqrt(mean).to(tl.float32).to(tl.float64)
        floor = tl.load(given_ptr + 2)
        eta *= tl.where(rms < floor, floor, rms)
    tl.store(rates_ptr, eta.to(tl.float32))
    w = 1.0 - eta * tl.load(given_ptr + 1)
    tl.store(rates_ptr + 1, w.to(tl.float32))


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
    first, last = tl.load(row + 5), tl.load(row + 6)
    if HAS_FINITE:
        finite = tl.full((), 1, tl.int32)
        for at in range(first, last):
            finite = tl.minimum(finite, tl.load(finite_ptr + at))
        tl.store(lost_ptr + entry, (1 - finite).to(tl.int8))
    if HAS_SUMS:
        total = tl.full((), 0.0, tl.float64)
        kind = tl.load(kinds_ptr + entry)
        if kind == TENSOR:
            for at in range(first, last):
                total += tl.load(sums_ptr + at)
        _put_rates(
            rates_ptr + entry * 2, given_ptr + entry * 3, total, tl.load(row + 4), kind == TENSOR
        )


@triton.jit
def sign_momentum_rows_kernel(
    table_ptr,
    entries_ptr,
    starts_ptr,
    given_ptr,
    row_rates_ptr,
    P_TYPE: tl.constexpr,
    ROW: tl.constexpr,
):
    # row_rates[row] = eta, w (fp32) by the row's own size; entries: whose rows these are,
    # starts[entry]: which of them is its first
    at = tl.program_id(0).to(tl.int64)
    entry = tl.load(entries_ptr + at)
    row = table_ptr + entry * COLUMNS
    count = tl.load(row + 7)
    first = (at - tl.load(starts_ptr + entry)) * count
    sums = tl.zeros((ROW,), tl.float64)
    for begin in range(0, count, ROW):
        within = begin + tl.arange(0, ROW)
        p = _load(tl.load(row), first + within, within < count, P_TYPE, False).to(tl.float64)
        sums += p * p
    _put_rates(row_rates_ptr + at * 2, given_ptr + entry * 3, tl.sum(sums, axis=0), count, True)


@triton.jit(do_not_specialize=["a", "b", "c", "d", "shrink"])
def sign_momentum_update_kernel(
    table_ptr,
    chunks_ptr,
    rates_ptr,
    starts_ptr,
    row_rates_ptr,
    masks_ptr,
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
    BY_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    MASKS_MOMENTUM: tl.constexpr,
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
    first_row = first
    rows = tl.arange(0, BLOCK)  # after the first, by element
    if BY_ROW or MASKED:
        length = tl.load(row + 7)
        first_row = first // length
        # of rows as long as the chunk it holds one border at most: 32 bits do for any length
        left = tl.minimum((first_row + 1) * length - first, BLOCK).to(tl.int32)
        short = tl.minimum(length, BLOCK).to(tl.int32)
        rows = (rows + (short - left)) // short
    moving = mask  # what of the parameter may be written
    if MASKED:
        own = tl.load(masks_ptr + entry)
        if own != 0:
            at_row = own.to(tl.pointer_type(tl.int8)) + first_row + rows
            moving = tl.load(at_row, mask=mask, other=0) != 0
    folding = mask  # what is needed of momentum and gradient
    if MASKS_MOMENTUM or G_TYPE == "":
        folding = moving
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
            lost = moving & (tl.load(lost_ptr + entry) != 0)
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
            m = _load(momentum, offsets, folding, M_TYPE, ALIGNED)
        v = m
        if G_TYPE != "":
            g = _load(tl.load(row + 1), offsets, folding, G_TYPE, ALIGNED)
            v = a * m + b * g
            new = c * m + d * g
            if M_TYPE == "q8":
                new = tl.where(folding, new, m)  # what is encoded again gives the same code
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
                _store(momentum, offsets, folding, new, random, M_TYPE, False, ALIGNED)
        if MOVES:
            moves = True
            if HAS_SKIP:
                moves = tl.load(skip_ptr + entry) == 0
            if moves:
                eta = tl.load(rates_ptr + entry * 2)
                w = tl.load(rates_ptr + entry * 2 + 1)
                if BY_ROW:
                    start = tl.load(starts_ptr + entry)
                    by_row = moving & (start >= 0)
                    eta = tl.full((BLOCK,), 0.0, tl.float32) + eta
                    w = tl.full((BLOCK,), 0.0, tl.float32) + w
                    pair = row_rates_ptr + (start + first_row) * 2 + rows * 2
                    eta = tl.where(by_row, tl.load(pair, mask=by_row, other=0.0), eta)
                    w = tl.where(by_row, tl.load(pair + 1, mask=by_row, other=0.0), w)
                u = tl.where(v > 0, eta, tl.where(v < 0, -eta, 0.0))
                p = w * _load(tl.load(row), offsets, moving, P_TYPE, ALIGNED) - u
                _store(tl.load(row), offsets, moving, p, random, P_TYPE, RANDOM, ALIGNED)


# --------------------------------------------------------------------------------------- launches


@dataclass(eq=False)
class Group:
    """The tensors of a list that hold the same dtypes, on the device."""

    types: tuple[str, str, str]  # of params, grads and momenta
    members: list[int]  # places in the list
    aligned: bool
    chunks: Tensor  # [chunks, 2]: place in the list, first element
    entries: Tensor  # [members]
    table: Tensor  # their rows of the whole table
    owners: tuple[list[int], Tensor, Tensor] | None = None  # what ``rows_of`` has found

    def rows_of(self, own: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Of members whose rows have rates of their own: the place of each row's tensor, and by
        tensor which row is its first, -1 for tensors of one rate; ``lengths``: rows by tensor."""
        if self.owners is None or self.owners[0] != own:
            starts = torch.full((len(lengths),), -1, device="cpu")
            rows = torch.tensor([lengths[i] for i in own], device="cpu")
            starts[own] = rows.cumsum(0) - rows
            places = torch.tensor(own, device="cpu").repeat_interleave(rows)
            device = self.chunks.device
            self.owners = own, places.to(device), starts.to(device)
        return self.owners[1:]


class Table:
    """A list's addresses on its device, and which chunks its programs take, by dtypes."""

    def __init__(self, job: Job) -> None:
        self.key = _key(job)
        self.device = job.momenta[0].device
        self.rates: tuple[Any, Tensor] | None = None
        self.rows: list[int] = []  # of each tensor
        chunks: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
        lines: list[list[int]] = []
        for i, momentum in enumerate(job.momenta):
            coded = isinstance(momentum, EightBit)
            kept = momentum.codes if isinstance(momentum, EightBit) else momentum
            param = None if job.params is None else job.params[i]
            grad = None if job.grads is None else job.grads[i]
            types = (
                _TYPES[None if param is None else param.dtype],
                _TYPES[None if grad is None else grad.dtype],
                "q8" if coded else _TYPES[kept.dtype],
            )
            count, row = kept.numel(), kept.shape[-1] if kept.dim() else 1
            own = chunks.setdefault(types, [])
            begin = len(own)
            own += [(i, first) for first in range(0, count, BLOCK)]
            lines.append([
                0 if param is None else param.data_ptr(),
                0 if grad is None else grad.data_ptr(),
                kept.data_ptr(),
                momentum.scales.data_ptr() if isinstance(momentum, EightBit) else 0,
                count, begin, len(own), row,
            ])  # fmt: skip
            self.rows.append(count // row if count else 0)
        self.table = torch.tensor(lines, dtype=torch.int64).to(self.device)
        self.groups: list[Group] = []
        for types, own in chunks.items():
            members = sorted({i for i, _ in own})
            if not members:  # all are empty
                continue
            aligned = all(at % 16 == 0 for i in members for at in lines[i][:3])
            entries = torch.tensor(members, device=self.device)
            on_device = torch.tensor(own, dtype=torch.int64, device=self.device)
            self.groups.append(
                Group(types, members, aligned, on_device, entries, self.table[entries])
            )


def read(job: Job, kept: Any = None, checked: bool = False) -> Table | None:
    """As the contract has it; a kept table serves the same tensors at the same addresses."""
    if kept is not None and kept.key == _key(job):
        return kept
    if not checked or not all(tensor.is_contiguous() for tensor in _tensors(job)):
        return None
    return Table(job)


def update(job: Job, table: Table | None = None) -> Tensor | None:
    """As in eager.py. ``table``: of ``read``; without it, tensors may have any strides."""
    if table is None:
        return row_major(job, lambda plain: update(plain, Table(plain)))
    n, device = len(job.momenta), table.device
    lost = None if job.shrink is None else torch.zeros(n, dtype=torch.bool, device=device)
    rates = given = kinds = drawn = centers = masks = None
    relative = _relative(job)
    if relative is not None:
        given = torch.stack([
            _vector(values, device) for values in (job.lr, job.weight_decay, job.floor)
        ], dim=1).contiguous()  # fmt: skip
        kinds = torch.tensor(relative, dtype=torch.int8).to(device)
        rates = _plain_rates(given)  # of those that no kernel makes
    elif job.moves:
        rates = _rates(job, table)
    if job.seed is not None:
        words = [keys(job.seed, i) for i in range(n)]
        drawn = torch.tensor(words, dtype=torch.int64, device=device)
    if job.centers is not None:
        centers = torch.tensor(job.centers, dtype=torch.float32, device=device)
    if job.rows is not None:
        pointers = [0 if mask is None else mask.data_ptr() for mask in job.rows]
        masks = torch.tensor(pointers, device=device)
    for group in table.groups:
        p, g, m = group.types
        count = len(group.chunks)
        own = [] if relative is None else [relative[i] for i in group.members]
        sizes = TENSOR.value in own
        if sizes or lost is not None:
            sums = torch.empty(count, dtype=torch.float64, device=device)
            finite = torch.empty(count, dtype=torch.int32, device=device)
            sign_momentum_survey_kernel[(count,)](
                table.table, group.chunks, kinds, sums, finite,
                P_TYPE=p if sizes else "", G_TYPE="" if lost is None else g,
                ALIGNED=group.aligned, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            part_rates = (
                torch.empty(len(own), 2, dtype=torch.float32, device=device) if sizes else None
            )
            part_lost = torch.empty(len(group.members), dtype=torch.int8, device=device)
            sign_momentum_finish_kernel[(len(group.members),)](
                group.table, sums, finite,
                given[group.entries] if sizes and given is not None else None,
                kinds[group.entries] if sizes and kinds is not None else None,
                part_rates, part_lost,
                HAS_SUMS=sizes, HAS_FINITE=lost is not None, enable_fp_fusion=False,
            )  # fmt: skip
            if part_rates is not None and rates is not None:
                rates[group.entries] = part_rates
            if lost is not None:
                lost[group.entries] = part_lost.bool()
        starts = row_rates = None
        if ROWS.value in own:
            by_row = [i for i, kind in zip(group.members, own, strict=True) if kind == ROWS.value]
            places, starts = group.rows_of(by_row, table.rows)
            row_rates = torch.empty(len(places), 2, dtype=torch.float32, device=device)
            sign_momentum_rows_kernel[(len(places),)](
                table.table, places, starts, given, row_rates,
                P_TYPE=p, ROW=ROW, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        sign_momentum_update_kernel[(count,)](
            table.table, group.chunks, rates, starts, row_rates, masks,
            None if job.skip is None else job.skip.view(torch.int8),
            None if lost is None else lost.view(torch.int8), centers, drawn,
            job.a, job.b, job.c, job.d, job.shrink or 0.0,
            **constants(
                p, g, m, moves=job.moves, skips=job.skip is not None, shrinks=lost is not None,
                random=job.seed is not None and p == "bf16", by_row=starts is not None,
                masked=masks is not None, masks_momentum=masks is not None and job.mask_momentum,
                aligned=group.aligned,
            ),
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    say_written(job)
    return lost


def constants(
    p: str,
    g: str,
    m: str,
    *,
    moves: bool = True,
    skips: bool = False,
    shrinks: bool = False,
    random: bool = False,
    by_row: bool = False,
    masked: bool = False,
    masks_momentum: bool = False,
    aligned: bool = True,
) -> dict[str, Any]:
    """What the update kernel is compiled for."""
    return {
        "P_TYPE": p, "G_TYPE": g, "M_TYPE": m, "MOVES": moves, "HAS_SKIP": skips,
        "SHRINKS": shrinks, "RANDOM": random, "BY_ROW": by_row, "MASKED": masked,
        "MASKS_MOMENTUM": masks_momentum, "ALIGNED": aligned, "STEP": 1 / 127**2,
        "LEVELS": 127.0, "Q_BLOCK": 256, "BLOCK": BLOCK,
    }  # fmt: skip


def _relative(job: Job) -> list[int] | None:
    """What each tensor's rate is relative to; None where none is."""
    if not job.moves or job.relative is None:
        return None
    return [_KINDS[kind] for kind in job.relative]


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
