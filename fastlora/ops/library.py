"""The native core, ``fastlora._C``: built from csrc/ when the package is installed, if it can be.

It knows nothing of torch: kernels take addresses, strides and the number of threads. Each is called
from the ``native.py`` of its operation, which sees to dtypes and layouts. Kernels for CUDA are in
a module of their own, ``fastlora._C_cuda``, which is loaded when they are first asked for.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

WITHOUT = {
    "_C": "fastlora was installed without its native core, for which it needs a C++17 compiler",
    "_C_cuda": "fastlora was installed without its CUDA kernels, for which it needs nvcc",
}


@functools.cache
def _load(name: str = "_C") -> ModuleType | str:
    """The module, or why it is not there."""
    try:
        return importlib.import_module(f"fastlora.{name}")
    except ModuleNotFoundError:
        return WITHOUT[name]
    except ImportError as error:
        return f"fastlora's native module {name} does not load: {error}"


def missing() -> str | None:
    """Why there is no native core, in a sentence; None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def cuda_missing() -> str | None:
    """The same of its CUDA kernels; a device to run them on is another matter."""
    found = _load("_C_cuda")
    return found if isinstance(found, str) else None


def core() -> ModuleType:
    """Its functions, those of csrc/bindings.cpp. Raises ImportError where it is missing."""
    return _found("_C")


def cuda_core() -> ModuleType:
    """Those of csrc/cuda_bindings.cpp, which take addresses on a CUDA device."""
    return _found("_C_cuda")


def _found(name: str) -> ModuleType:
    found = _load(name)
    if isinstance(found, str):
        raise ImportError(found)
    return found


def address(tensor: Tensor | None) -> int:
    """Where its elements begin; 0, the null pointer, for None.

    Raises ValueError for a tensor without memory: one whose storage was freed, or a fake one.
    """
    if tensor is None:
        return 0
    start = tensor.data_ptr()
    if not start and tensor.numel():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} has no memory: it was freed")
    return start


def with_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its rows are contiguous: kernels take one stride, between rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
