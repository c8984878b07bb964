"""``symmetric_eigen`` and ``small_svd``: torch.linalg's, by the faster of two ways."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.small_solvers import eager
from fastlora.ops.small_solvers.contract import BACKENDS, DTYPES, LARGEST, is_faster_native
from fastlora.ops.small_solvers.contract import available as _native_runs


def symmetric_eigen(a: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(w, v) with A = v diag(w) vᵀ, as by ``torch.linalg.eigh``.

    Args:
        a: [..., r, r], float32 or float64, of which the lower triangles are read; any strides.
        backend: 'native' (r ≤ 128) or 'eager'; None takes the faster (README, "Which is faster").

    Returns:
        w [..., r] ascending and v [..., r, r], eigenvectors in columns, in a's dtype. Signs, and
        bases of eigenspaces, are arbitrary, but the same for the same stack whatever the number of
        threads.

    Raises:
        ValueError: shapes that do not fit; NaN or infinity; a gradient asked for (there is none).
        TypeError: a dtype that is neither float32 nor float64.
        RuntimeError: an iteration that does not converge.
        BackendError: the backend asked for cannot run this call.
    """
    _check("symmetric_eigen", a)
    r = a.shape[-1]
    if a.shape[-2] != r:
        raise ValueError(f"symmetric_eigen takes square matrices; a has shape {list(a.shape)}")
    stack = a.detach().reshape(a.shape[:-2].numel(), r, r)
    if not stack.numel():
        return a.new_empty(a.shape[:-1]), a.new_empty(a.shape)
    w, v = _module("symmetric_eigen", stack, backend).symmetric_eigen(stack)
    return w.reshape(a.shape[:-1]), v.reshape(a.shape)


def small_svd(a: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) with A = U diag(S) Vh, as by ``torch.linalg.svd(a, full_matrices=False)``.

    Args:
        a: [..., m, n], float32 or float64; any strides.
        backend: as for ``symmetric_eigen``; 'native' takes m and n up to 128.

    Returns:
        U [..., m, p], S [..., p] descending and Vh [..., p, n] with p = min(m, n), in a's dtype.
        U and Vh are orthonormal also where singular values are zero.

    Raises:
        As ``symmetric_eigen``.
    """
    _check("small_svd", a)
    m, n = a.shape[-2:]
    batch, p = a.shape[:-2], min(m, n)
    if not a.numel():
        # with the other side empty, any orthonormal basis of no vectors will do
        return a.new_empty(*batch, m, p), a.new_empty(*batch, p), a.new_empty(*batch, p, n)
    stack = a.detach().reshape(batch.numel(), m, n)
    module = _module("small_svd", stack, backend)
    if m >= n:
        u, s, vh = module.small_svd(stack)
    else:
        v, s, uh = module.small_svd(stack.mT)
        u, vh = uh.mT, v.mT
    return u.reshape(*batch, m, p), s.reshape(*batch, p), vh.reshape(*batch, p, n)


def _module(operation: str, stack: Tensor, backend: str | None) -> ModuleType:
    """Only the argument chooses by name: others' choices are about the layers' own operations."""
    largest = max(stack.shape[-2:])
    if backend is None:
        if largest > LARGEST or not is_faster_native(len(stack), min(stack.shape[-2:])):
            return eager
        if not _native_runs(stack.device, stack.dtype):
            return eager
        backend = "native"
    if backend == "native" and largest > LARGEST:
        raise _backend.BackendError(
            f"{operation} cannot run on backend 'native' (asked for by backend=): it takes at most "
            f"{LARGEST} rows and columns, not {largest}."
        )
    return _backend.select(operation, BACKENDS, stack.device, stack.dtype, backend)


def _check(operation: str, a: Tensor) -> None:
    if a.dim() < 2:
        raise ValueError(f"{operation} takes matrices; a has shape {list(a.shape)}")
    if a.dtype not in DTYPES:
        raise TypeError(f"{operation} takes float32 and float64, not {a.dtype}")
    if a.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operation} has no gradient: pass a.detach(), or use torch.linalg")
