"""Several adapted linears that read one x (stand-in, to be replaced by the fused operation)."""

from fastlora.ops.adapter_group.contract import Member
from fastlora.ops.adapter_linear import adapter_linear

__all__ = ["Member", "adapter_group"]


def adapter_group(x, members, *, backend=None):
    return tuple(
        adapter_linear(
            x,
            *m[:6],
            out_scale=m.out_scale,
            mid_scale=m.mid_scale,
            adapter_scale=m.adapter_scale,
            drop_base=m.drop_base and m.dropout_p > 0,
            backend=backend,
        )
        for m in members
    )
