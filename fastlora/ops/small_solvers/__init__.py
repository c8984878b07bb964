"""Eigenvectors and singular vectors of many small matrices in one call."""

from fastlora.ops.small_solvers.contract import BACKENDS, LARGEST
from fastlora.ops.small_solvers.op import small_svd, symmetric_eigen

__all__ = ["BACKENDS", "LARGEST", "small_svd", "symmetric_eigen"]
