"""A parameter's saved momentum, as fastlora, lion-pytorch or bitsandbytes wrote it.

lion-pytorch keeps ``exp_avg`` in the parameter's shape. bitsandbytes' Lion keeps ``state1``:
float32 in the parameter's shape, or, at 8 bits, uint8 codes in that shape with ``qmap1``, the 256
values that codes stand for, and ``absmax1``, the largest magnitude of each block of the flattened
tensor (256 elements a block, 2048 in older versions); some versions wrap all of these into one
dictionary. fastlora keeps ``exp_avg``, a tensor or, at 8 bits, the dictionary of an ``EightBit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.sign_momentum import EightBit

_WRAPPED = "__bnb_optimizer_quant_state__"
_BLOCKS = (256, 2048, 64, 128, 512, 1024, 4096)


def unwrapped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """bitsandbytes' inner dictionary laid beside the rest."""
    flat = {key: value for key, value in saved.items() if key != _WRAPPED}
    return flat | dict(saved.get(_WRAPPED, {}))


def take_momentum(saved: dict[str, Any], shape: torch.Size, where: str) -> Tensor | EightBit:
    """The momentum in ``saved``, whose keys it takes out.

    Raises ValueError, with ``where`` in it, for a state without momentum, of another shape, or of
    bitsandbytes' 8-bit form before it had blocks.
    """
    if "exp_avg" in saved:
        found = saved.pop("exp_avg")
        if isinstance(found, EightBit):
            momentum: Tensor | EightBit = found
        elif isinstance(found, Mapping):
            momentum = EightBit.from_state_dict(dict(found))
        else:
            momentum = found
    elif "state1" in saved:
        momentum = _from_bitsandbytes(saved, where)
    else:
        keys = ", ".join(map(str, saved)) or "nothing"
        raise ValueError(f"the state of {where} has no momentum (exp_avg or state1), but {keys}")
    if not isinstance(momentum, (Tensor, EightBit)):
        raise ValueError(f"the momentum of {where} is a {type(momentum).__name__}, not a tensor")
    if momentum.shape != shape:
        raise ValueError(
            f"the momentum of {where} has shape {list(momentum.shape)}, the parameter {list(shape)}"
        )
    return momentum


def _from_bitsandbytes(saved: dict[str, Any], where: str) -> Tensor:
    codes = saved.pop("state1")
    values, scales = saved.pop("qmap1", None), saved.pop("absmax1", None)
    for other in ("step", "unorm_vec", "gnorm_vec"):  # which Lion does not read
        saved.pop(other, None)
    if codes.dtype != torch.uint8:
        return codes
    if values is None or scales is None:
        raise ValueError(
            f"the 8-bit state of {where} has no blocks (qmap1 and absmax1): it is of an old "
            "bitsandbytes, or of block_wise=False"
        )
    n = codes.numel()
    block = next((size for size in _BLOCKS if -(-n // size) == scales.numel()), None)
    if block is None or values.numel() != 256:
        raise ValueError(
            f"the 8-bit state of {where} has {scales.numel()} scales and {values.numel()} values "
            f"for {n} elements, which is no size of block that is known"
        )
    flat = values.to(torch.float32)[codes.reshape(-1).long()]
    return (flat * scales.to(torch.float32).repeat_interleave(block)[:n]).view(codes.shape)
