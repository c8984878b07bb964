"""The native core, ``fastlora._C``: built from csrc/ when the package is installed, if it can be.

It knows nothing of torch: kernels take addresses, strides and the number of threads. Each is called
from the ``native.py`` of its operation, which sees to dtypes and layouts.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor


@functools.cache
def _load() -> ModuleType | str:
    """The module, or why it is not there."""
    try:
        return importlib.import_module("fastlora._C")
    except ModuleNotFoundError:
        return (
            "fastlora was installed without its native core, for which it needs a C++17 compiler"
        )
    except ImportError as error:
        return f"fastlora's native core does not load: {error}"


def missing() -> str | None:
    """Why there is no native core, in a sentence; None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def core() -> ModuleType:
    """Its functions, those of csrc/bindings.cpp. Raises ImportError where it is missing."""
    found = _load()
    if isinstance(found, str):
        raise ImportError(found)
    return found


def address(tensor: Tensor | None) -> int:
    """Where its elements begin; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def with_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its rows are contiguous: kernels take one stride, between rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
