"""torch.func's transforms, forward mode and torch.jit.trace go through a layer with DoRA."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad as fwAD

import fastlora
from fastlora.nn import LoRALinear


@pytest.fixture(params=[True, False], ids=["constant norm", "full"])
def layer(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6))
    config = fastlora.LoRAConfig(r=2, use_dora=True, dora_simple=request.param)
    fastlora.inject(model, config)
    (layer,) = model
    assert isinstance(layer, LoRALinear)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def trained(layer):
    return {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}


def test_gradients_and_slopes(layer):
    x = torch.randn(7, 9)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    expected = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    parameters = trained(layer)
    torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)
    directions = {n: torch.randn_like(p) for n, p in parameters.items()}
    slope = sum((expected[n] * directions[n]).sum() for n in expected)
    torch.testing.assert_close(torch.func.jvp(loss, (parameters,), (directions,))[1], slope)
    with fwAD.dual_level():
        dual = {n: fwAD.make_dual(p, directions[n]) for n, p in parameters.items()}
        torch.testing.assert_close(fwAD.unpack_dual(loss(dual)).tangent, slope)


def test_vmap_over_inputs_and_over_parameters(layer):
    xs = torch.randn(3, 7, 9)
    torch.testing.assert_close(torch.func.vmap(layer)(xs), layer(xs))
    several = {n: torch.stack((p, 2 * p)) for n, p in trained(layer).items()}

    def call(parameters):
        return torch.func.functional_call(layer, parameters, (xs[0],))

    got = torch.func.vmap(call)(several)
    for i in range(2):
        torch.testing.assert_close(got[i], call({n: p[i] for n, p in several.items()}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_layer_that_has_not_run(layer):
    layer.eval()
    traced = torch.jit.trace(layer, (torch.randn(7, 9),))
    for tokens in (7, 5):
        x = torch.randn(tokens, 9)
        torch.testing.assert_close(traced(x), layer(x))
