"""Counts the bytes kernels move, with no GPU; run as ``python -m bench.traffic``."""
