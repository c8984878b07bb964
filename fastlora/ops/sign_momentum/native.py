"""The whole list in one native call: one pass over memory, on all threads.

The core reads the lists itself and checks them, in well under a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.library import address, core
from fastlora.ops.sign_momentum.contract import Job, Number, keys
from fastlora.ops.sign_momentum.strided import row_major, say_written

_core = core()
_KINDS = {None: 0, "tensor": 1, "rows": 2}


def read(job: Job, kept: Any = None, checked: bool = False) -> Any:
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
        return row_major(job, lambda plain: update(plain, read(plain), isa))
    n = len(job.momenta)
    lost = None if job.shrink is None else torch.zeros(n, dtype=torch.bool, device="cpu")
    rows = [] if job.rows is None else [address(mask) for mask in job.rows]
    drawn: list[int] = []
    if job.seed is not None:
        drawn = [key for i in range(n) for key in keys(job.seed, i)]
    # before the pass over memory, while the caches have what has just been read of each tensor
    say_written(job)
    table.run(
        job.a, job.b, job.c, job.d,
        *_numbers(job.lr, job.weight_decay, job.floor),
        None if job.relative is None else bytes(map(_KINDS.__getitem__, job.relative)),
        rows, job.mask_momentum, job.shrink, job.centers or [], address(job.skip),
        address(lost), job.moves, drawn, torch.get_num_threads(), isa,
    )  # fmt: skip
    return lost


def _needs_rows(job: Job, i: int) -> bool:
    return (job.rows is not None and job.rows[i] is not None) or (
        job.relative is not None and job.relative[i] == "rows"
    )


def _numbers(*lists: Sequence[Number]) -> list[list[float]]:
    """Each as numbers, one for all tensors where no list has more."""
    if all(not one or one.count(one[0]) == len(one) for one in lists):
        return [[float(one[0])] if one else [0.0] for one in lists]
    return [list(map(float, one)) for one in lists]
