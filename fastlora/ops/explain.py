"""Which backend runs an operation on given tensors, and why the others do not."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from fastlora.ops.adapter_group.contract import BACKENDS as ADAPTER_GROUP
from fastlora.ops.adapter_linear.op import BACKENDS as ADAPTER_LINEAR
from fastlora.ops.backend import Backend, Situation, table
from fastlora.ops.sign_momentum.contract import BACKENDS as SIGN_MOMENTUM
from fastlora.ops.weight_norm.contract import BACKENDS as WEIGHT_NORM

OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "adapter_linear": ADAPTER_LINEAR,
    "adapter_group": ADAPTER_GROUP,
    "weight_norm": WEIGHT_NORM,
    "sign_momentum": SIGN_MOMENTUM,
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
        for name, taken, sentence in table(op, OPERATIONS[op], at):
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
