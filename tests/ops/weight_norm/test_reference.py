"""The specification itself: its gradients against finite differences, its formula row by row."""

import torch

from fastlora.ops.weight_norm.reference import weight_norm_reference
from tests.ops.weight_norm.cases import operands


def test_gradients_agree_with_finite_differences():
    inputs = [t.requires_grad_() for t in operands(5, 6, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda w, a, b: weight_norm_reference(w, a, b, 1.7), inputs)


def test_it_is_the_norm_of_each_merged_row():
    w, a, b = operands(4, 6, 2, torch.float64)
    merged = w + 0.5 * b @ a
    for row, norm in zip(merged, weight_norm_reference(w, a, b, 0.5), strict=True):
        torch.testing.assert_close(norm, torch.dot(row, row).sqrt())
