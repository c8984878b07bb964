"""The optimizers that take the sign of a momentum: Lion, Tiger, and what goes with them."""

from fastlora.optim.accumulate import MomentumAccumulation, accumulate_in_momentum
from fastlora.optim.kinds import kinds, param_groups
from fastlora.optim.lion import Lion
from fastlora.optim.schedules import piecewise_linear
from fastlora.optim.tiger import Tiger

__all__ = [
    "Lion",
    "MomentumAccumulation",
    "Tiger",
    "accumulate_in_momentum",
    "kinds",
    "param_groups",
    "piecewise_linear",
]
