"""Times every operation over the shapes of named models; run as ``python -m bench.throughput``."""
