"""Benchmarks and checks of what the compilers make; run as ``python -m bench.<name>``."""
