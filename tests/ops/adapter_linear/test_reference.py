"""The specification itself: its gradients against finite differences, its formula term by term."""

import pytest
import torch

from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from tests.ops.adapter_linear.cases import operands, vectors


def test_gradients_agree_with_finite_differences():
    tensors = operands((3,), k=5, n=4, r=2, dtype=torch.float64)
    keep = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [t.requires_grad_() for t in tensors.values()]

    def call(x, weight, lora_A, lora_B, bias):
        return adapter_linear_reference(x, weight, lora_A, lora_B, 1.7, bias, keep, 1 / 0.7)

    assert torch.autograd.gradcheck(call, inputs)


def test_it_is_the_dense_layer_with_the_merged_weight():
    t = operands((2, 3), dtype=torch.float64)
    merged = t["weight"] + 0.5 * t["lora_B"] @ t["lora_A"]
    dense = torch.nn.functional.linear(t["x"], merged, t["bias"])
    torch.testing.assert_close(adapter_linear_reference(scaling=0.5, **t), dense)


@pytest.mark.parametrize("drop_base", [False, True])
def test_gradients_of_the_vectors_agree_with_finite_differences(drop_base):
    tensors = operands((3,), k=5, n=4, r=2, dtype=torch.float64)
    tensors |= vectors(tensors, zeros=True)
    keep = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [t.requires_grad_() for t in tensors.values()]

    def call(x, weight, lora_A, lora_B, bias, g, d, b):
        return adapter_linear_reference(
            x, weight, lora_A, lora_B, 1.7, bias, keep, 1 / 0.7, g, d, b, drop_base
        )

    assert torch.autograd.gradcheck(call, inputs)


def test_with_vectors_it_is_the_dense_layer_with_the_merged_weight():
    t = operands((2, 3), dtype=torch.float64)
    v = vectors(t)
    g, d, b = v.values()
    delta = 0.5 * b[:, None] * (t["lora_B"] * d) @ t["lora_A"]
    merged = g[:, None] * (t["weight"] + delta)
    dense = torch.nn.functional.linear(t["x"], merged, t["bias"])
    for drop_base in (False, True):  # one formula where nothing is dropped
        y = adapter_linear_reference(scaling=0.5, drop_base=drop_base, **t, **v)
        torch.testing.assert_close(y, dense)
