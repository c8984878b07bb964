"""The copies of VeRA's projections that layers share."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import VeRAConfig
from fastlora.adapters import layers
from tests.adapters.family import randomise


def make(dtype=torch.float32):
    """Layers of unequal width, so that the narrower takes a copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)
    fastlora.inject(model, VeRAConfig(r=5))
    randomise(t for layer in layers(model) for t in layer.tensors.values())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_after_a_first_call_in_inference_mode(dtype):
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)
    fastlora.inject(model, VeRAConfig(r=5))
    x = torch.randn(8, 6, dtype=dtype, requires_grad=True)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_another_projection_in_the_same_memory_is_another():
    model, x = make(), torch.randn(8, 6)
    layer, projection = model[0], model[0].projection
    memory = projection.vera_A.numpy().copy()
    for factor in (1, 3):
        memory *= factor
        projection.vera_A = torch.from_numpy(memory)
        A, B = projection.vera_A[:, :6], projection.vera_B
        adapter = ((x @ A.T) * layer.vera_lambda_d) @ B.T * layer.vera_lambda_b
        torch.testing.assert_close(layer(x), layer.base_forward(x) + adapter)


def test_it_compiles_into_one_graph_and_is_exported():
    model, x = make(), torch.randn(8, 6)
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)
    )
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    "dtype, wide", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_autocast_over_a_base_of_another_half(dtype, wide):
    model, x = make(dtype), torch.randn(8, 6)
    with torch.autocast("cpu", wide):
        y = model(x)
    assert y.dtype == wide
    expected = make(torch.float32)(x)
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
