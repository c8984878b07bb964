"""``adapter_group``: linear layers with low-rank adapters that read one x, as one function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_group.contract import BACKENDS, Member
from fastlora.ops.adapter_group.function import AdapterGroup, tensors
from fastlora.ops.adapter_linear.contract import Scales
from fastlora.ops.adapter_linear.entry import (
    AUTOCAST,
    autocasts,
    cast,
    check,
    check_vectors,
    has_few_rows,
    is_transformed,
)
from fastlora.ops.adapter_linear.op import adapter_linear


def adapter_group(
    x: Tensor, members: Sequence[Member], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Several ``adapter_linear`` layers that read the same x (q, k, v; gate, up) in one call.

    Result i and every gradient are those of ``adapter_linear`` with x and member i; x is read once
    for all products with lora_A, it is kept once, and its gradient is summed in one accumulator.

    Args:
        x: input [..., K]; any leading dimensions, any strides, any number of tokens (0 too).
        members: one or more. They may differ in everything but K. Members without dropout whose
            lora_A is the very same tensor (VeRA: the same memory, if it is frozen) share its
            products with x. With dropout every member draws a mask of its own, in this order.
        backend: 'triton', 'native', 'onednn' or 'eager'; None chooses (see ``fastlora.explain``).

    Only what the gradients asked for need is kept, by the rules of ``adapter_linear``. An output
    that is not used costs nothing in backward and leaves its member without gradients, as a layer
    that is not used would be. The outputs are one node of the graph: to go backward through one
    after the other takes ``retain_graph=True``. No second derivative.

    The members run one by one through ``adapter_linear``, with the same results, under
    torch.compile, torch.func's transforms, forward-mode derivatives and torch.jit.trace, for nested
    and meta tensors, where a member's ``drop_base`` acts (that is, under dropout), where x has so
    few rows that ``adapter_linear`` is plain PyTorch calls, and where each is one call of the
    native core's (a float32 member without vectors on a CPU, of sizes that README.md has).

    Returns:
        y_i [..., N_i] of every member, in the compute dtype.

    Raises:
        ValueError: no member; or what ``adapter_linear`` refuses, the sentence naming the member.
        TypeError: likewise.
        BackendError: the backend asked for cannot run this call.
    """
    if len(members) == 0:
        raise ValueError("adapter_group needs at least one member")
    device = x.device
    autocast = autocasts(x)
    if autocast and x.dtype in AUTOCAST:
        dtype = torch.get_autocast_dtype(device.type)
        x = x.to(dtype)
        members = [_cast(member, dtype) for member in members]
    one_by_one = torch.compiler.is_compiling() or is_transformed(x)
    for index, member in enumerate(members):
        try:
            one_by_one = _check(x, member) or one_by_one
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {index}: {error}") from None
    if one_by_one:
        return tuple(_alone(x, member, backend) for member in members)
    module = _backend.select("adapter_group", BACKENDS, device, x.dtype, backend)
    columns = sum(member.weight.shape[0] for member in members)
    if has_few_rows(x, module, columns // len(members)) or all(
        _is_one_call(x, member, module) for member in members
    ):
        return tuple(_alone(x, member, backend) for member in members)
    members = tuple(members)
    operands = [tensor for member in members for tensor in tensors(member) if tensor is not None]
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        return AdapterGroup.apply(x, members, module, *operands)


def gains_nothing(x: Tensor, member: Member) -> bool:
    """Whether this layer of x is as fast by itself as beside others: it is one call of the native
    core's then, and a group saves no arithmetic. It may be asked before the checks."""
    if x.device.type != "cpu" or _has_vectors(member) or member.weight.dim() != 2 or autocasts(x):
        return False
    module = _backend.select("adapter_group", BACKENDS, x.device, x.dtype)
    return _is_one_call(x, member, module)


def _has_vectors(member: Member) -> bool:
    return any(v is not None for v in (member.out_scale, member.mid_scale, member.adapter_scale))


def _is_one_call(x: Tensor, member: Member, module: ModuleType) -> bool:
    takes_layer = getattr(module, "takes_layer", None)
    if takes_layer is None or _has_vectors(member):
        return False
    n, k = member.weight.shape
    return bool(takes_layer(x.numel() // max(k, 1), k, n, member.lora_A.shape[0]))


def _cast(member: Member, dtype: torch.dtype) -> Member:
    bias = None if member.bias is None else cast(member.bias, dtype)
    return member._replace(weight=cast(member.weight, dtype), bias=bias)


def _check(x: Tensor, member: Member) -> bool:
    """Refuses what ``adapter_linear`` refuses; whether the member's ``drop_base`` acts."""
    weight, lora_A, lora_B, scaling, bias, dropout_p, *vectors, drop_base, _ = member
    check(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    _, drop_base = check_vectors(Scales(*vectors), x, lora_B, dropout_p, drop_base)
    return drop_base


def _alone(x: Tensor, member: Member, backend: str | None) -> Tensor:
    weight, lora_A, lora_B, scaling, bias, dropout_p, *vectors, drop_base, keep_output = member
    out, mid, adapter = vectors
    return adapter_linear(
        x,
        weight,
        lora_A,
        lora_B,
        scaling,
        bias,
        dropout_p,
        out_scale=out,
        mid_scale=mid,
        adapter_scale=adapter,
        drop_base=drop_base,
        keep_output=keep_output,
        backend=backend,
    )
