"""The whole list in one native call: one pass over memory, on all threads.

The core reads the lists itself and checks them, in well under a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.library import address, core
from fastlora.ops.sign_momentum.contract import Job, Momentum, Number, keys
from fastlora.ops.sign_momentum.eight_bit import EightBit

_core = core()
_KINDS = {None: 0, "tensor": 1, "rows": 2}


def read(job: Job, kept: Any = None) -> Any:
    """The job's lists, checked, as the core takes them; None where it does not.

    ``kept`` is what an earlier call has returned: its memory is used again.
    """
    table = kept
    if table is None:
        # torch 2.10 and newer; the core asks each tensor's attributes where there is none
        exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        table = _core.SignMomentumTable(Tensor, exchange)
    by_row = None
    if job.rows is not None or (job.relative is not None and "rows" in job.relative):
        by_row = bytes(_needs_rows(job, i) for i in range(len(job.momenta)))
    return table if table.read(job.params, job.grads, job.momenta, by_row) else None


def update(job: Job, table: Any = None, isa: str = "") -> Tensor | None:
    """As in eager.py. ``table``: of ``read``; without it, tensors may have any strides.
    ``isa``: one of the core's instruction sets, for tests."""
    if table is None:
        return _update_strided(job, isa)
    n = len(job.momenta)
    lost = None if job.shrink is None else torch.zeros(n, dtype=torch.bool)
    rows = [] if job.rows is None else [address(mask) for mask in job.rows]
    drawn: list[int] = []
    if job.seed is not None:
        drawn = [key for i in range(n) for key in keys(job.seed, i)]
    table.run(
        job.a, job.b, job.c, job.d,
        *_numbers(job.lr, job.weight_decay, job.floor),
        None if job.relative is None else bytes(_KINDS[kind] for kind in job.relative),
        rows, job.mask_momentum, job.shrink, job.centers or [], address(job.skip),
        address(lost), job.moves, drawn, torch.get_num_threads(), isa,
    )  # fmt: skip
    _say_written(job)
    return lost


def _update_strided(job: Job, isa: str) -> Tensor | None:
    """The update of row-major copies, which then are copied back."""
    plain = replace(
        job,
        params=None if job.params is None else [_plain(param) for param in job.params],
        grads=None if job.grads is None else [_plain(grad) for grad in job.grads],
        momenta=[m if isinstance(m, EightBit) else _plain(m) for m in job.momenta],
    )
    table = read(plain)
    assert table is not None, "op.py has checked the lists"
    lost = update(plain, table, isa)
    with torch.no_grad():
        pairs: list[tuple[Momentum, Momentum]] = list(
            zip(job.momenta, plain.momenta, strict=True)
        ) + list(zip(job.params or (), plain.params or (), strict=True))
        for own, copy in pairs:
            if own is not copy and isinstance(own, Tensor) and isinstance(copy, Tensor):
                own.copy_(copy)
    return lost


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def _needs_rows(job: Job, i: int) -> bool:
    return (job.rows is not None and job.rows[i] is not None) or (
        job.relative is not None and job.relative[i] == "rows"
    )


def _numbers(*lists: Sequence[Number]) -> list[list[float]]:
    """Each as numbers, one for all tensors where no list has more."""
    if all(not one or one.count(one[0]) == len(one) for one in lists):
        return [[float(one[0])] if one else [0.0] for one in lists]
    return [[float(value) for value in one] for one in lists]


def _say_written(job: Job) -> None:
    """So that autograd notices a tensor that it had saved."""
    momenta = [m for m in job.momenta if not isinstance(m, EightBit)]
    torch.autograd.graph.increment_version([*(job.params or ()), *momenta])
