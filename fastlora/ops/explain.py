"""Which backend runs an operation on given tensors, and why the others do not."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops.adapter_group.contract import BACKENDS as ADAPTER_GROUP
from fastlora.ops.adapter_linear.op import BACKENDS as ADAPTER_LINEAR
from fastlora.ops.backend import Backend, Situation, table
from fastlora.ops.low_rank_svd.contract import BACKENDS as SVD_LOWRANK
from fastlora.ops.low_rank_svd.contract import result_dtype
from fastlora.ops.sign_momentum.contract import BACKENDS as SIGN_MOMENTUM
from fastlora.ops.small_solvers.contract import BACKENDS as SMALL_SOLVERS
from fastlora.ops.weight_norm.contract import BACKENDS as WEIGHT_NORM


@dataclass(frozen=True)
class Operation:
    """An operation's backends, and what its choice between them depends on.

    ``only_by_argument``: neither ``use_backend`` nor the environment chooses for it. ``computes``:
    the dtype it computes operands of a dtype in, by which it chooses.
    """

    backends: tuple[Backend, ...]
    only_by_argument: bool = False
    computes: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype

    def table(self, op: str, at: Situation) -> list[tuple[str, bool, str]]:
        """Rows (backend, would be taken now, sentence), in order of preference."""
        return table(op, self.backends, self._computing(at), self.only_by_argument)

    def runnable(self, at: Situation) -> list[str]:
        """Those that can run operands of this device and dtype."""
        within = self._computing(at)
        return [backend.name for backend in self.backends if not backend.cannot(within)]

    def _computing(self, at: Situation) -> Situation:
        return Situation(at.device, self.computes(at.dtype))


OPERATIONS: dict[str, Operation] = {
    "adapter_linear": Operation(ADAPTER_LINEAR),
    "adapter_group": Operation(ADAPTER_GROUP),
    "weight_norm": Operation(WEIGHT_NORM),
    "sign_momentum": Operation(SIGN_MOMENTUM),
    "svd_lowrank": Operation(SVD_LOWRANK, True, result_dtype),
    "symmetric_eigen": Operation(SMALL_SOLVERS, True),
    "small_svd": Operation(SMALL_SOLVERS, True),
}


def explain(op: str, *tensors: Tensor) -> str:
    """A table, one line a backend, of who could run ``op`` on these tensors and why not.

    ``tensors`` are the call's operands; the first one's device and dtype decide. With none, the
    table is for float32 on the CPU and, where there is one, bfloat16 on the current GPU.

    Raises ValueError for an operation that does not exist, naming near misses.
    """
    if op not in OPERATIONS:
        near = difflib.get_close_matches(op, OPERATIONS, cutoff=0.3) or list(OPERATIONS)
        raise ValueError(f"unknown operation '{op}'; did you mean {' or '.join(near)}?")
    if tensors:
        situations = [Situation(tensors[0].device, tensors[0].dtype)]
    else:
        situations = default_situations()
    lines = []
    for at in situations:
        lines.append(f"{op} for {str(at.dtype).removeprefix('torch.')} on {at.device}")
        for name, taken, sentence in OPERATIONS[op].table(op, at):
            lines.append(f"  {'->' if taken else '  '} {name:<8}{sentence}")
    return "\n".join(lines)


def default_situations() -> list[Situation]:
    """float32 on the CPU and, where there is a GPU, bfloat16 on it."""
    situations = [Situation(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        situations.append(
            Situation(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        )
    return situations
