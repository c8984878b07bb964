"""The specification itself: nothing of rank q is nearer, and its error is what is left."""

import torch

from fastlora.ops.low_rank_svd.reference import svd_lowrank_reference, svd_product_reference
from tests.ops.low_rank_svd.cases import SPECTRA, matrix, residual, seeded, sound


def test_it_is_the_matrix_but_for_the_values_left_out():
    x = matrix(9, 14, SPECTRA["power"], torch.float64)
    result = svd_lowrank_reference(x, 4)
    assert sound(result, 1e-13)
    torch.testing.assert_close(residual(x, result), result[3])
    exact = (torch.arange(4, 9, dtype=torch.float64) + 1).pow(-2).sum().sqrt()
    torch.testing.assert_close(result[3], exact)


def test_no_other_subspace_is_nearer():
    x = matrix(9, 14, SPECTRA["slow"], torch.float64)
    best = svd_lowrank_reference(x, 4)[3]
    for seed in range(20):
        q = torch.linalg.qr(torch.randn(9, 4, generator=seeded(seed), dtype=torch.float64)).Q
        assert torch.linalg.matrix_norm(x - q @ (q.T @ x)) > best


def test_a_product_has_as_many_values_as_its_thinnest_side():
    b, a = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    u, s, vh = svd_product_reference(b, a)
    assert s.shape == (3,)
    torch.testing.assert_close((u * s) @ vh, b @ a)
