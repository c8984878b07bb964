"""What the traffic bench runs: a module per operation that has memory-bound kernels.

Each has ``cases(shape)``, what may be run at a shape, and ``on(card)``, a context in which the
operation's launchers take the tiles of that card though they run in the interpreter.
"""

from bench.traffic.cases import adapter_linear, sign_momentum, weight_norm

PROVIDERS = (adapter_linear, weight_norm, sign_momentum)

__all__ = ["PROVIDERS"]
