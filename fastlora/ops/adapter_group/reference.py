"""The specification: each member by itself, by plain autograd. Only tests and benches import it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.ops.adapter_group.contract import Member
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.dropout import keep_scale


def adapter_group_reference(
    x: Tensor, members: Sequence[Member], keeps: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """y_i = g ∘ (x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)) + bias of each member, [..., N_i].

    x [..., K]. ``keeps`` holds a dropout mask in x's shape for each member that drops. Computes in
    the operands' own dtypes, so float64 in gives float64 out.
    """
    return tuple(
        adapter_linear_reference(
            x,
            member.weight,
            member.lora_A,
            member.lora_B,
            member.scaling,
            member.bias,
            keep,
            1.0 if keep is None else keep_scale(member.dropout_p),
            member.out_scale,
            member.mid_scale,
            member.adapter_scale,
            member.drop_base,
        )
        for member, keep in zip(members, keeps or [None] * len(members), strict=True)
    )
