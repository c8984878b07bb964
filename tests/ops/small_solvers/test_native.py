"""Jacobi's rotations on every instruction set there is here, against LAPACK in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops.small_solvers import native
from fastlora.ops.small_solvers.reference import eigen_errors, svd_errors
from tests.ops.small_solvers.cases import KINDS, SIZES, limit, matrices, symmetric

ISAS = library.core().isas()
DTYPES = (torch.float32, torch.float64)


def check_eigen(a, isa, **options):
    w, v = native.symmetric_eigen(a, isa=isa, **options)
    n = a.shape[-1]
    residual, skewness = eigen_errors(a, w, v)
    assert residual <= limit(a.dtype, n) and skewness <= limit(a.dtype, n)
    expected = torch.linalg.eigvalsh(a.double())
    largest = expected.abs().amax(-1, keepdim=True)
    assert ((w.double() - expected).abs() <= limit(a.dtype, n) * largest).all()
    assert (w.diff(dim=-1) >= 0).all()
    return w, v


def check_svd(a, isa, **options):
    u, s, vh = native.small_svd(a, isa=isa, **options)
    n = a.shape[-1]
    residual, skewness = svd_errors(a, u, s, vh)
    assert residual <= limit(a.dtype, n) and skewness <= limit(a.dtype, n)
    expected = torch.linalg.svdvals(a.double())
    assert ((s.double() - expected).abs() <= limit(a.dtype, n) * expected[:, :1]).all()
    assert (s >= 0).all() and (s.diff(dim=-1) <= 0).all()
    return u, s, vh


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_size(isa, n, kind, poison):
    for dtype in DTYPES:
        check_eigen(symmetric(kind, n, dtype=dtype), isa)
        check_svd(matrices(kind, n, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@given(
    n=st.integers(1, 24),
    more=st.integers(0, 20),
    batch=st.integers(1, 19),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_stack(isa, n, more, batch, kind, dtype, seed):
    check_eigen(symmetric(kind, n, batch, dtype, seed), isa)
    tall = torch.cat([matrices(kind, n, batch, dtype, seed + i) for i in range(2)], dim=1)
    check_svd(tall[:, : n + min(more, n)].mT.contiguous().mT, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_small_singular_values_of_graded_columns_keep_their_digits(isa):
    a = matrices("graded", 24)
    scales = torch.logspace(-12, 0, 24, dtype=torch.float64)
    _, s, _ = check_svd(a, isa)
    # A = B D with B well conditioned: the values follow the columns, relatively
    assert (s.flip(-1) / scales > 1e-2).all() and (s.flip(-1) / scales < 1e2).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [5, 16])
def test_neither_threads_nor_order_nor_neighbours_change_a_bit(isa, n):
    a = matrices("random", n, batch=23)
    g = a + a.mT
    was = torch.get_num_threads()
    eigen, svd = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for backwards in (False, True):
                eigen.append(native.symmetric_eigen(g, isa=isa, backwards=backwards))
                svd.append(native.small_svd(a, isa=isa, backwards=backwards))
    finally:
        torch.set_num_threads(was)
    for solve, results, stack in ((native.symmetric_eigen, eigen, g), (native.small_svd, svd, a)):
        alone = [solve(matrix[None], isa=isa) for matrix in stack]
        results.append([torch.cat(parts) for parts in zip(*alone, strict=True)])
    for results in (eigen, svd):
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_its_number(isa, value):
    a = symmetric("random", 6, batch=11)
    a[7, 4, 2] = value
    for solve in (native.symmetric_eigen, native.small_svd):
        with pytest.raises(ValueError, match=r"matrix 7 .* NaN or infinity"):
            solve(a, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_only_the_lower_triangle_is_read(isa):
    a = symmetric("random", 9)
    upper = torch.ones(9, 9).triu(1).bool()
    expected = native.symmetric_eigen(a, isa=isa)
    for value in (7.0, float("nan")):
        got = native.symmetric_eigen(torch.where(upper, value, a), isa=isa)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("isa", ISAS)
def test_too_few_sweeps_are_an_error_and_only_where_they_are_too_few(isa):
    a = symmetric("diagonal", 12, batch=10)
    a[6] = symmetric("random", 12, batch=1)[0]
    for solve in (native.symmetric_eigen, native.small_svd):
        with pytest.raises(RuntimeError, match=r"matrix 6 .* not converged after 2 sweeps"):
            solve(a, sweeps=2, isa=isa)
        solve(a[:6], sweeps=0, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [16, 64, 128])
def test_convergence_is_quadratic(isa, n):
    check_eigen(symmetric("random", n), isa, sweeps=11)
    check_svd(matrices("random", n), isa, sweeps=13)
    check_eigen(symmetric("graded", n), isa, sweeps=13)
