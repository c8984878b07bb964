"""``svd_lowrank``: the leading singular triples of many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.backend import Situation, mkl_is_as_fast, needs_onednn
from fastlora.ops.low_rank_svd import eager, native
from fastlora.ops.low_rank_svd.contract import (
    BACKENDS,
    check_list,
    check_matrix,
    exponents,
    result_dtype,
    scaled,
    without_autocast,
)
from fastlora.ops.low_rank_svd.onednn import ONEDNN

# Vector units and tensor cores multiply by so many columns at once.
_COLUMNS = 16
# Frobenius norms within which the squares of a matrix and of its singular values keep float32's
# digits; beyond, the matrix is scaled by a power of two.
_ORDINARY = (1e-12, 1e12)
# ‖X‖² and ΣS² are right to a few units in their last place. Where their difference is less than
# this many of them, the residual is formed instead.
_CANCELLED = 4096.0


class LowRankSVD(NamedTuple):
    """X ≈ U diag(S) Vh, and how far from X that is."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor


@overload
def svd_lowrank(
    matrices: Tensor,
    q: int,
    niter: int = 4,
    *,
    oversample: int | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> LowRankSVD: ...
@overload
def svd_lowrank(
    matrices: Sequence[Tensor],
    q: int,
    niter: int = 4,
    *,
    oversample: int | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> list[LowRankSVD]: ...
def svd_lowrank(
    matrices: Tensor | Sequence[Tensor],
    q: int,
    niter: int = 4,
    *,
    oversample: int | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> LowRankSVD | list[LowRankSVD]:
    """The first q singular triples of matrices, by randomised iterations (README).

    Subspace iteration of Halko, Martinsson and Tropp (arXiv 0909.4061), with the shift of dashSVD
    (arXiv 2404.09276) and Cholesky instead of Householder QR; in the native core block Lanczos
    (Golub, Underwood 1977; Musco, Musco, arXiv 1504.05477).

    Args:
        matrices: a stack [..., N, K], or a list of matrices [N_i, K_i] of any shapes on one device;
            those of one shape and dtype are decomposed together. Any strides.
        q: how many triples, 1 ≤ q ≤ min(N, K).
        niter: as in ``torch.svd_lowrank``, whose error at this niter is about matched or bettered
            (README): ⌈niter/2⌉ shifted iterations, or about as many vectors of a Krylov space. 0
            suffices where q reaches the rank.
        oversample: how many columns beyond q are iterated; None: half of q, at least 8, and up to
            a multiple of 16 in all. With fewer, there are niter iterations without a shift. In the
            native core, by how many vectors more than niter asks for the space is larger, up to a
            multiple of its blocks.
        generator: where the random start comes from; given one, equal calls give equal results
            and the global generator is not touched. It may live on the CPU for any matrices.
        backend: 'native' (float32 and half precision on the CPU; it leaves to 'eager' what it does
            not resolve: steep spectra, rank-deficient matrices, many equal values) or 'eager';
            None takes 'native' where it can run and q is small beside N and K.

    Returns:
        LowRankSVD(U [..., N, q], S [..., q] descending, Vh [..., q, K], error [...]), for a list
        a list of them. float64 matrices are computed and returned in float64, all others in
        float32 with the q × q problems in float64. U and Vh are orthonormal also where S is zero.
        ``error`` estimates ‖X - U diag(S) Vh‖_F: (‖X‖² - ΣS²)^½, and from the residual itself
        where these cancel. Nothing is differentiable: it runs under ``torch.no_grad``.

    Raises:
        ValueError: NaN or infinity in a matrix, an empty list, matrices without elements, on meta
            or on several devices, norms beyond the result's dtype, q, niter or oversample out of
            range.
        TypeError: complex or integer matrices; q, niter or oversample not an integer; a generator
            that is not torch's.
        BackendError: the backend asked for cannot run this call.
    """
    _check_counts(q, niter, oversample)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator, not {generator!r}")
    if isinstance(matrices, Tensor):
        check_matrix("matrices", matrices)
        _check_q(q, "matrices", matrices)
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        names = [f"matrices[{i}]" if matrices.dim() > 2 else "matrices" for i in range(len(flat))]
        whole = _same_shape(list(flat), flat, names, q, niter, oversample, generator, backend)
        batch = matrices.shape[:-2]
        return LowRankSVD(*(t.view((*batch, *t.shape[1:])) for t in whole))
    members = check_list("matrices", matrices)
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, matrix in enumerate(members):
        check_matrix(f"matrices[{i}]", matrix)
        _check_q(q, f"matrices[{i}]", matrix)
        groups.setdefault((matrix.shape, matrix.dtype), []).append(i)
    results: list[LowRankSVD | None] = [None] * len(members)
    for indices in groups.values():
        group = [members[i] for i in indices]
        names = [f"matrices[{i}]" for i in indices]
        whole = _same_shape(group, None, names, q, niter, oversample, generator, backend)
        for i, *parts in zip(indices, *whole, strict=True):
            results[i] = LowRankSVD(*parts)
    return [r for r in results if r is not None]


def _same_shape(
    group: list[Tensor],
    stack: Tensor | None,
    names: list[str],
    q: int,
    niter: int,
    oversample: int | None,
    generator: torch.Generator | None,
    backend: str | None,
) -> LowRankSVD:
    """The decompositions of matrices of one shape and dtype; ``stack`` where they are one."""
    like = group[0] if group else stack
    assert like is not None
    (n, k), dtype = like.shape[-2:], result_dtype(like.dtype)
    if not group:
        shapes = ((0, n, q), (0, q), (0, q, k), (0,))
        return LowRankSVD(*(torch.empty(s, dtype=dtype, device=like.device) for s in shapes))
    with without_autocast(like):
        space = _native_plan(like, dtype, q, niter, oversample, backend)
        if space is not None:
            return _natively(group, names, q, niter, oversample, generator, space)
        return _eagerly(group, stack, names, q, niter, oversample, generator)


def _native_plan(
    like: Tensor,
    dtype: torch.dtype,
    q: int,
    niter: int,
    oversample: int | None,
    backend: str | None,
) -> native.Plan | None:
    """How the native core would do it, if it is to. Only the argument chooses by name: others'
    choices are about the layers' own operations."""
    taken = backend
    if taken is None:
        can = not BACKENDS[0].cannot(Situation(like.device, dtype))
        taken = "native" if can else "eager"
    if _backend.choose("svd_lowrank", BACKENDS, like.device, dtype, taken).name == "eager":
        return None
    n, k = like.shape[-2:]
    space = native.plan(n, k, q, niter, oversample or 0)
    if space is None and backend is not None:
        raise _backend.BackendError(
            f"svd_lowrank cannot run on backend 'native' (asked for by backend=): for q = {q} and "
            f"niter = {niter} a matrix [{n}, {k}] is too small"
        )
    return space


def _natively(
    group: list[Tensor],
    names: list[str],
    q: int,
    niter: int,
    oversample: int | None,
    generator: torch.Generator | None,
    space: native.Plan,
) -> LowRankSVD:
    x = [m.detach().float() for m in group]
    start = _random(space.starts, max(x[0].shape), torch.float32, x[0].device, generator)
    u, s, vh, squares, found = native.forward(x, q, space, start, _ORDINARY)
    if found.all():
        error = _error(x, squares, u, s, vh)
        return LowRankSVD(u, s.float(), vh, error.float())
    parts = LowRankSVD(u, s.float(), vh, u.new_empty(len(x)))
    rest = (~found).nonzero().view(-1).tolist()
    others = _eagerly(
        [x[i] for i in rest], None, [names[i] for i in rest], q, niter, oversample, generator
    )
    for part, other in zip(parts, others, strict=True):
        part[rest] = other
    good = found.nonzero().view(-1)
    if len(good):
        some = [x[i] for i in good.tolist()]
        parts.error[good] = _error(some, squares[good], u[good], s[good], vh[good]).float()
    return parts


def _random(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    where = generator.device if generator is not None else device
    return torch.randn(rows, columns, dtype=dtype, device=where, generator=generator).to(device)


def _eagerly(
    group: list[Tensor],
    stack: Tensor | None,
    names: list[str],
    q: int,
    niter: int,
    oversample: int | None,
    generator: torch.Generator | None,
) -> LowRankSVD:
    like = group[0]
    (n, k), dtype = like.shape, result_dtype(like.dtype)
    products = _products(like.device, dtype)
    x = products.stacked(group if stack is None else stack, dtype)
    squares = _squares(x)
    low, high = (bound**2 for bound in _ORDINARY)
    exponent = None
    if not all(low < value < high for value in squares.tolist()):
        exponent = exponents(torch.stack([m.abs().amax() for m in x]), names)
        x = products.stacked(scaled(torch.stack(list(x)), exponent), dtype)
        squares = _squares(x)
    wide = x if n <= k else x.mT if isinstance(x, Tensor) else [m.mT for m in x]
    width = min(q + (_oversample(q) if oversample is None else oversample), n, k)
    # one start for all: a matrix gives the same alone and in a list
    omega = _random(max(n, k), width, dtype, like.device, generator).expand(len(group), -1, -1)
    # the shift makes one iteration worth about two, and 2·niter + 2 products niter + 2; with fewer
    # columns than it is made for, it would hold up the last of the q
    shifted = oversample is None or oversample >= _oversample(q)
    iterations = (niter + 1) // 2 if shifted else niter
    u, s, vh = eager.forward(wide, omega, q, iterations, products, shifted)
    if n > k:
        u, vh = vh.mT.contiguous(), u.mT.contiguous()
    error = _error(x, squares, u, s, vh)
    if exponent is not None:
        s, error = torch.ldexp(s, exponent[:, None]), torch.ldexp(error, exponent)
        for name, norm in zip(names, torch.maximum(s[:, 0], error).to(dtype).tolist(), strict=True):
            if not norm < float("inf"):
                raise ValueError(f"{name} is too large: its norm is beyond {dtype}; scale it first")
    return LowRankSVD(u, s.to(dtype), vh, error.to(dtype))


def _products(device: torch.device, dtype: torch.dtype) -> eager.Products:
    at = Situation(device, dtype)
    fast = device.type == "cpu" and dtype == torch.float32
    return ONEDNN if fast and not (needs_onednn(at) or mkl_is_as_fast(at)) else eager.ATEN


def _oversample(q: int) -> int:
    """Half as many columns again and at least 8, up to a multiple of what is multiplied at once."""
    return -(-(q + max(q // 2, 8)) // _COLUMNS) * _COLUMNS - q


def _squares(x: Tensor | Sequence[Tensor]) -> Tensor:
    """‖X‖_F² [n] float64; rows are added up in the working precision."""
    if isinstance(x, Tensor):
        return torch.linalg.vector_norm(x, dim=-1).double().square_().sum(-1)
    return torch.stack([_squares(m) for m in x])


def _error(
    x: Tensor | Sequence[Tensor], squares: Tensor, u: Tensor, s: Tensor, vh: Tensor
) -> Tensor:
    """‖X - U diag(S) Vh‖_F [n] float64."""
    left = squares - s.square().sum(-1)
    error = left.clamp_min(0.0).sqrt()
    lost = left < _CANCELLED * torch.finfo(u.dtype).eps * squares
    for i in lost.nonzero().view(-1).tolist():
        residual = torch.addmm(x[i], u[i] * s[i].to(u.dtype), vh[i], alpha=-1.0)
        error[i] = _squares(residual).sqrt()
    return error


def _check_counts(q: int, niter: int, oversample: int | None) -> None:
    for name, value, least in (("q", q, 1), ("niter", niter, 0), ("oversample", oversample, 0)):
        if name == "oversample" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def _check_q(q: int, name: str, matrix: Tensor) -> None:
    if q > min(matrix.shape[-2:]):
        raise ValueError(
            f"q is {q}, but {name} has shape {list(matrix.shape)} and so at most "
            f"{min(matrix.shape[-2:])} singular values"
        )
