"""Singular value decompositions: the leading part of many matrices; products BA from factors."""

from fastlora.ops.low_rank_svd.op import LowRankSVD, svd_lowrank
from fastlora.ops.low_rank_svd.product import ProductSVD, svd_product

__all__ = ["LowRankSVD", "ProductSVD", "svd_lowrank", "svd_product"]
