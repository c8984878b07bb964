"""The specification itself: its gradients against finite differences, its formula term by term."""

import torch

from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from tests.ops.adapter_linear.cases import operands


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
