"""Calls with scale vectors: their autograd Function.

mid_scale d and adapter_scale b only ever stand beside the small B, so they are folded into it:
with C = diag(b) B diag(d) the operation is the one of C, whose gradient dC is the one of B there,
and dB = diag(b) dC diag(d), dd = Σ_rows (b ∘ B) ∘ dC, db = Σ_columns (B ∘ d) ∘ dC follow from it
without another pass over anything of size M. C is made anew in backward, not kept.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.contract import Needs, Scales, check_mask, rows
from fastlora.ops.dtypes import to
from fastlora.ops.once import once_differentiable


class ScaledNeeds(NamedTuple):
    """Which gradients a call with vectors must produce."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool
    out_scale: bool
    mid_scale: bool
    adapter_scale: bool

    def of_backend(self) -> Needs:
        """What that asks of a backend, in which lora_B is C."""
        folded = self.lora_B or self.mid_scale or self.adapter_scale
        return Needs(self.x, self.weight, self.lora_A, folded, self.bias)


class Kept(NamedTuple):
    """What backward may read: an operand that ``what_to_keep`` does not name is None."""

    x: Tensor | None
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scales: Scales
    t: Tensor | None
    # what the gradient of out_scale is read from: z under drop_base, else y; None without
    # keep_output, and where y has been changed: z is computed again
    read: Tensor | None
    seed: Tensor | None


def what_to_keep(needs: ScaledNeeds, drop_base: bool, keep_output: bool) -> set[str]:
    """The fields of ``Kept`` that these gradients need."""
    keep = {"seed"}  # eight bytes; a backend takes it with any dropout
    if needs.x:
        keep |= {"weight", "lora_A", "lora_B", "scales"}
    if needs.weight:
        keep |= {"x", "scales"}
    if needs.lora_A:
        keep |= {"x", "lora_B", "scales"}
    if needs.lora_B:
        keep |= {"t", "scales"}
    if needs.mid_scale or needs.adapter_scale:
        keep |= {"t", "lora_B", "scales"}
    if needs.out_scale:
        keep |= {"scales"}
        if drop_base and keep_output:
            keep |= {"read"}
        else:  # for columns that y does not show, or for all of them
            keep |= {"x", "weight", "lora_B", "t"}
            if keep_output:
                keep |= {"read", "bias"}
    return keep


def fold(lora_B: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """C = diag(b) B diag(d) [N, r] in ``dtype``, rounded once."""
    if scales.adapter is None and scales.mid is None:
        return to(lora_B, dtype)
    wide = to(lora_B, torch.promote_types(dtype, torch.float32))
    if scales.adapter is not None:
        wide = wide * scales.adapter[:, None]
        return to(wide if scales.mid is None else wide.mul_(scales.mid), dtype)
    assert scales.mid is not None
    return to(wide * scales.mid, dtype)


def unfold(
    dC: Tensor | None,
    lora_B: Tensor | None,
    scales: Scales,
    need_B: bool,
    need_mid: bool,
    need_adapter: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dB [N, r], dd [r], db [N]) from the gradient dC of ``fold``'s C; None if not needed.

    lora_B is read for dd and db only.
    """
    b, d = scales.adapter, scales.mid
    if dC is None or (b is None and d is None):
        return dC if need_B else None, None, None
    dd = db = own_B = None
    dC = dC.to(torch.promote_types(dC.dtype, torch.float32))
    b = None if b is None else b.to(dC.dtype)
    d = None if d is None else d.to(dC.dtype)
    if need_mid or need_adapter:
        assert lora_B is not None
        own_B = dC.mul(lora_B) if need_B else dC.mul_(lora_B)
    if need_mid:
        assert own_B is not None
        dd = own_B.sum(0) if b is None else own_B.t().mv(b)
    if need_adapter:
        assert own_B is not None
        db = own_B.sum(1) if d is None else own_B.mv(d)
    dB = None
    if need_B:
        dB = dC if b is None else dC * b[:, None]
        dB = dB if d is None else dB * d
    return dB, dd, db


def forward(
    module: ModuleType,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scales: Scales,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    drop_base: bool,
    *,
    need_t: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [..., N], t [M, r], z [M, N]) by ``module``; t and z only if asked for."""
    z = None
    small = (to(lora_A, x.dtype), fold(lora_B, scales, x.dtype))
    if scales.out is None:
        y, t = module.forward(
            rows(x), weight, *small, scaling, bias, dropout_p, seed, need_t=need_t
        )
    else:
        y, t, z = module.scaled_forward(
            rows(x),
            weight,
            *small,
            scaling,
            bias,
            dropout_p,
            seed,
            out_scale=scales.out,
            drop_base=drop_base,
            need_t=need_t,
            need_z=need_z,
        )
    if x.dim() != 2:
        # not a view: autograd has its own rules for views, and this may be saved and returned
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return y, t, z


def backward(
    module: ModuleType,
    dy: Tensor,
    kept: Kept,
    scaling: float,
    dropout_p: float,
    drop_base: bool,
    needs: ScaledNeeds,
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of ``ScaledNeeds``, not yet in their operands' dtypes."""
    scales, lora_B = kept.scales, kept.lora_B
    asked = needs.of_backend()
    operands = (
        rows(dy),
        None if kept.x is None else rows(kept.x),
        kept.weight,
        None if kept.lora_A is None else to(kept.lora_A, dy.dtype),
        None if lora_B is None else fold(lora_B, scales, dy.dtype),
        kept.t,
        scaling,
        dropout_p,
        kept.seed,
    )
    dg = None
    if scales.out is None:
        dx, dweight, dA, dC, dbias = module.backward(*operands, asked)
    else:
        read = None
        if needs.out_scale and kept.read is not None:
            read = rows(kept.read)
        dx, dweight, dA, dC, dbias, dg = module.scaled_backward(
            *operands,
            asked,
            out_scale=scales.out,
            drop_base=drop_base,
            bias=kept.bias,
            read=read,
            need_out_scale=needs.out_scale,
        )
    dB, dd, db = unfold(dC, lora_B, scales, needs.lora_B, needs.mid_scale, needs.adapter_scale)
    return dx, dweight, dA, dB, dbias, dg, dd, db


class Watch(NamedTuple):
    """Whether an output kept for backward has been changed in place meanwhile."""

    counter: Tensor  # empty, with the output's version counter
    version: int

    def has_seen_a_change(self) -> bool:
        return self.counter._version != self.version


def watched(y: Tensor) -> tuple[Tensor, Watch]:
    """What to give to ``save_for_backward`` for y [..., N], an output, and its watch.

    Autograd would refuse to give back a y that the model has changed. So what is saved, and goes
    through the hooks of checkpoints and offloading, is y's memory under a version counter of its
    own; and the watch has y's counter without its memory. Neither holds y, whose graph holds them.
    """
    counter = y.detach()
    counter.data = y.new_empty(0)
    return y.data, Watch(counter, 0 if y.is_inference() else y._version)


class ScaledAdapterLinear(torch.autograd.Function):
    """``adapter_linear`` with one to three vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        out_scale: Tensor | None,
        mid_scale: Tensor | None,
        adapter_scale: Tensor | None,
        scaling: float,
        dropout_p: float,
        drop_base: bool,
        keep_output: bool,
        module: ModuleType,
    ) -> Tensor:
        needs = ScaledNeeds(*ctx.needs_input_grad[:8])
        keep = what_to_keep(needs, drop_base, keep_output)
        scales = Scales(out_scale, mid_scale, adapter_scale)
        seed = module.draw_seed(x.device) if dropout_p > 0.0 else None
        y, t, z = forward(
            module,
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            scales,
            scaling,
            dropout_p,
            seed,
            drop_base,
            need_t="t" in keep,
            need_z="read" in keep,
        )
        read, watch = z, None
        if "read" in keep and not drop_base:
            read, watch = watched(y)
        own = {
            "x": x,
            "weight": weight,
            "lora_A": lora_A,
            "lora_B": lora_B,
            "bias": bias,
            "t": t,
            "read": read,
            "seed": seed,
        }
        vectors = scales if "scales" in keep else (None, None, None)
        ctx.save_for_backward(
            *(tensor if name in keep else None for name, tensor in own.items()), *vectors
        )
        ctx.seed_dim = None if seed is None else seed.dim()
        ctx.static = (x.shape, scaling, dropout_p, drop_base, module, needs, watch)
        operands = (x, weight, lora_A, lora_B, bias, *scales)
        ctx.dtypes = tuple(None if operand is None else operand.dtype for operand in operands)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, bias, t, read, seed, *vectors = ctx.saved_tensors
        shape, scaling, dropout_p, drop_base, module, needs, watch = ctx.static
        check_mask(seed, ctx.seed_dim)
        if watch is not None and watch.has_seen_a_change():
            read = bias = None  # as without keep_output
        kept = Kept(x, weight, lora_A, lora_B, bias, Scales(*vectors), t, read, seed)
        gradients = backward(module, dy, kept, scaling, dropout_p, drop_base, needs)
        owned = tuple(
            None if gradient is None else to(gradient, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        dx = owned[0]
        return (None if dx is None else dx.view(shape), *owned[1:], *[None] * 5)
