"""The ground floor: the mathematics, as differentiable functions on tensors."""

from fastlora.ops.adapter_group import Member, adapter_group
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.explain import OPERATIONS, explain
from fastlora.ops.low_rank_svd import LowRankSVD, ProductSVD, svd_lowrank, svd_product
from fastlora.ops.sign_momentum import (
    EightBit,
    SignMomentumCache,
    apply_momentum,
    fold_gradients,
    sign_momentum,
)
from fastlora.ops.weight_norm import WeightNormCache, weight_norm

__all__ = [
    "OPERATIONS",
    "EightBit",
    "LowRankSVD",
    "Member",
    "ProductSVD",
    "SignMomentumCache",
    "WeightNormCache",
    "adapter_group",
    "adapter_linear",
    "apply_momentum",
    "explain",
    "fold_gradients",
    "sign_momentum",
    "svd_lowrank",
    "svd_product",
    "weight_norm",
]
