"""The update of Lion and Tiger over many tensors at once."""

from fastlora.ops.sign_momentum.contract import BACKENDS
from fastlora.ops.sign_momentum.eight_bit import EightBit
from fastlora.ops.sign_momentum.op import (
    SignMomentumCache,
    apply_momentum,
    fold_gradients,
    sign_momentum,
)

__all__ = [
    "BACKENDS",
    "EightBit",
    "SignMomentumCache",
    "apply_momentum",
    "fold_gradients",
    "sign_momentum",
]
