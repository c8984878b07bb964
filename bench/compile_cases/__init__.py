"""What the compile matrix compiles: a module per operation that has kernels.

Each has KERNELS, the names of its kernels, and ``cases(kernel, dtype, arch, reduced)``, every way
in which one may be launched; ``reduced`` keeps the one that asks most of the compiler. csrc's
kernels, which are compiled otherwise, are in cuda.py.
"""

from bench.compile_cases import adapter_linear, sign_momentum, weight_norm

PROVIDERS = {
    kernel: module
    for module in (adapter_linear, weight_norm, sign_momentum)
    for kernel in module.KERNELS
}

__all__ = ["PROVIDERS"]
