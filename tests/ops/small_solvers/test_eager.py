"""torch.linalg where its float32 iteration does not converge."""

import pytest
import torch

from fastlora.ops.small_solvers import small_svd, symmetric_eigen
from fastlora.ops.small_solvers.reference import eigen_errors, svd_errors
from tests.ops.small_solvers.cases import limit, symmetric


@pytest.mark.parametrize("name, errors", [("eigh", eigen_errors), ("svd", svd_errors)])
def test_float64_takes_over(monkeypatch, name, errors):
    """LAPACK's syevd fails on some float32 matrices of low rank, not alike on all machines."""
    plain = getattr(torch.linalg, name)

    def fails(a, **options):
        if a.dtype == torch.float32 or (a == 0).all():
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return plain(a, **options)

    monkeypatch.setattr(torch.linalg, name, fails)
    solve = symmetric_eigen if name == "eigh" else small_svd
    a = symmetric("deficient", 40).float()
    result = solve(a, backend="eager")
    assert all(t.dtype == torch.float32 for t in result)
    assert max(errors(a, *result)) <= limit(torch.float32, 40)
    with pytest.raises(RuntimeError, match="failed to converge"):
        solve(torch.zeros(2, 40, 40, dtype=torch.float64), backend="eager")
