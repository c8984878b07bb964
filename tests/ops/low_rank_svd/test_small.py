"""The dense q × q problems against torch.linalg in float64."""

import pytest
import torch

from fastlora.ops.low_rank_svd import small
from tests.ops.low_rank_svd.cases import matrix, off_orthogonal

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("decay", [0.9, 0.1, 1e-6])
def test_svd_keeps_small_values_and_orthogonality(shape, decay):
    """Backward stable: every value is right to a few units of the largest one, where the
    eigenvalues of M Mᵀ would have lost half their digits."""
    m = torch.stack([matrix(*shape, lambda i: decay**i, torch.float64, seed) for seed in range(3)])
    u, s, v = small.svd(m)
    torch.testing.assert_close(s, torch.linalg.svdvals(m), rtol=0, atol=50 * EPS)
    torch.testing.assert_close((u * s.unsqueeze(-2)) @ v.mT, m, rtol=0, atol=50 * EPS)
    assert off_orthogonal(u) <= 50 * EPS and off_orthogonal(v) <= 50 * EPS


def test_svd_of_nothing_and_of_repeated_values():
    for m in (torch.zeros(5, 5), torch.eye(5), torch.diag(torch.tensor([2.0, 2, 2, 0, 0]))):
        u, s, v = small.svd(m.double())
        torch.testing.assert_close((u * s) @ v.mT, m.double())
        assert off_orthogonal(u) <= 50 * EPS and off_orthogonal(v) <= 50 * EPS


def test_whitening_whitens_what_it_was_told_to_add_to():
    y = torch.randn(2, 20, 6, dtype=torch.float64)
    gram = y.mT @ y
    shift = torch.tensor([0.0, 3.0], dtype=torch.float64)
    t, failed = small.whitening(gram, shift)
    eye = torch.eye(6, dtype=torch.float64)
    shifted = gram + shift[:, None, None] * eye
    torch.testing.assert_close(t.mT @ shifted @ t, eye.expand(2, 6, 6))
    assert not failed.any()
    torch.testing.assert_close(t, t.triu())


def test_whitening_says_where_it_failed():
    gram = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    assert small.whitening(gram)[1].tolist() == [False, True]


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-12])
def test_the_smallest_eigenvalue_is_bounded_from_below_and_closely(smallest):
    q = 40
    for values in (lambda i: torch.where(i < q - 1, 1.0, smallest), lambda i: smallest ** (i / q)):
        basis = torch.linalg.qr(torch.randn(q, q, dtype=torch.float64)).Q
        gram = (basis * values(torch.arange(q, dtype=torch.float64))) @ basis.T
        exact = torch.linalg.eigvalsh(gram)[0]
        bound = small.smallest_eigenvalue(small.whitening(gram.unsqueeze(0))[0])[0]
        assert exact / q ** (1 / 32) * 0.999 <= bound <= exact * 1.001
