"""Several linear layers with low-rank adapters that read one x, forward and backward."""

from fastlora.ops.adapter_group.contract import BACKENDS, Member
from fastlora.ops.adapter_group.op import adapter_group, gains_nothing

__all__ = ["BACKENDS", "Member", "adapter_group", "gains_nothing"]
