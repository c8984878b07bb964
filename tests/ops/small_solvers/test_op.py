"""The public functions: shapes, checks, and the choice between the two ways."""

import pytest
import torch

from fastlora.ops import library
from fastlora.ops.backend import BackendError, Situation
from fastlora.ops.small_solvers import BACKENDS, eager, op, small_svd, symmetric_eigen
from fastlora.ops.small_solvers.contract import NATIVE_UP_TO, is_faster_native
from fastlora.ops.small_solvers.reference import eigen_errors, svd_errors
from tests.ops.small_solvers.cases import KINDS, limit, matrices, symmetric

# LAPACK's SVD of a graded matrix is off by 37 units here; what is ours keeps to ``limit``
LAPACK_UNITS = 64

WAYS = [None, "eager"] + ([] if library.missing() else ["native"])


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_solve(backend, kind):
    a = symmetric(kind, 12, batch=6)
    most = limit(a.dtype, 12)
    if backend != "native":
        most = LAPACK_UNITS * torch.finfo(a.dtype).eps
    w, v = symmetric_eigen(a.view(2, 3, 12, 12), backend=backend)
    assert w.shape == (2, 3, 12) and v.shape == (2, 3, 12, 12)
    assert max(eigen_errors(a.view_as(v), w, v)) <= most
    b = matrices(kind, 12, batch=6)
    for part in (b, b[:, :, :7], b[:, :5], b.mT, b[::2], b[0]):
        u, s, vh = small_svd(part, backend=backend)
        p = min(part.shape[-2:])
        assert u.shape == (*part.shape[:-1], p) and vh.shape == (
            *part.shape[:-2],
            p,
            part.shape[-1],
        )
        assert s.shape == (*part.shape[:-2], p)
        assert max(svd_errors(part, u, s, vh)) <= most


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3, 3), (3, 0, 0)])
def test_empty(backend, shape):
    a = torch.empty(shape)
    w, v = symmetric_eigen(a, backend=backend)
    expected = torch.linalg.eigh(a)
    assert w.shape == expected[0].shape and v.shape == expected[1].shape
    for part in (a, a[..., :1]):
        got, wanted = small_svd(part, backend=backend), torch.linalg.svd(part, full_matrices=False)
        assert [t.shape for t in got] == [t.shape for t in wanted]


@pytest.mark.parametrize("backend", WAYS)
def test_what_cannot_be_solved_is_refused(backend):
    bad = torch.full((4, 3, 3), float("nan"))
    for solve in (symmetric_eigen, small_svd):
        with pytest.raises(ValueError, match="NaN or infinity"):
            solve(bad, backend=backend)
        with pytest.raises(ValueError, match="takes matrices"):
            solve(torch.ones(3), backend=backend)
        with pytest.raises(TypeError, match=r"not torch\.float16"):
            solve(torch.ones(3, 3).half(), backend=backend)
        with pytest.raises(ValueError, match="no gradient"):
            solve(torch.ones(3, 3, requires_grad=True), backend=backend)
    with pytest.raises(ValueError, match="square"):
        symmetric_eigen(torch.ones(3, 2), backend=backend)


def test_more_than_the_native_kernels_take():
    a = symmetric("random", 130, batch=64, dtype=torch.float32)
    assert max(eigen_errors(a, *symmetric_eigen(a))) <= limit(a.dtype, 130)
    with pytest.raises(BackendError, match="at most 128"):
        small_svd(a, backend="native")
    with pytest.raises(BackendError, match="no backend 'triton'"):
        small_svd(a[:, :3, :3], backend="triton")


def test_the_choice(monkeypatch):
    small = torch.ones(64, 4, 4)
    taken = op._module("symmetric_eigen", small, None).__name__
    assert taken.endswith("eager" if library.missing() else "native")
    assert op._module("small_svd", torch.ones(64, 64, 64), None) is eager
    for fewest, largest in NATIVE_UP_TO:
        assert is_faster_native(fewest, largest) and is_faster_native(10**6, largest)
        assert not is_faster_native(fewest, largest + 1)
    monkeypatch.setattr(op, "_native_runs", lambda device, dtype: False)
    assert op._module("symmetric_eigen", small, None) is eager
    assert [b.name for b in BACKENDS] == ["native", "eager"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 16, 17, 64, 127, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_cuda(kind, n, dtype):
    if reason := library.cuda_missing():
        pytest.skip(reason)
    a = symmetric(kind, n, batch=5, dtype=dtype)
    w, v = symmetric_eigen(a.cuda(), backend="native")
    assert max(eigen_errors(a, w.cpu(), v.cpu())) <= limit(dtype, n)
    assert all(map(torch.equal, (w, v), symmetric_eigen(a.cuda(), backend="native")))
    b = matrices(kind, n, batch=5, dtype=dtype)
    for part in (b, b[:, :, : n // 2 + 1]):
        assert max(
            svd_errors(part, *(t.cpu() for t in small_svd(part.cuda(), backend="native")))
        ) <= limit(dtype, n)
    a[3, n - 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"matrix 3 .* NaN"):
        symmetric_eigen(a.cuda(), backend="native")


def test_cuda_is_left_to_cusolver_until_it_is_measured():
    native = BACKENDS[0]
    at = Situation(torch.device("cuda", 0), torch.float64)
    assert native.rather_not(at)
    assert native.cannot(at) == [r for r in [library.cuda_missing()] if r]
