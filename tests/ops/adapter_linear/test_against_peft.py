"""peft's own layers of the family beside one call of ``adapter_linear``: values and gradients."""

import pytest
import torch
from torch import nn

from fastlora.ops import adapter_linear
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from tests.ops.adapter_linear.cases import error, operands

peft = pytest.importorskip("peft")

TOLERANCE = 1e-9
K, N, RANK = 24, 20, 4


def base(bias=True):
    t = operands((5,), k=K, n=N, r=RANK, bias=bias, dtype=torch.float64)
    linear = nn.Linear(K, N, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(t["weight"])
        if bias:
            linear.bias.copy_(t["bias"])
    return linear, t


def randomised(config, linear):
    """The one layer of a peft model of ``linear``, its adapter away from where it starts."""
    model = peft.get_peft_model(nn.Sequential(linear), config).double().train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
            assert parameter.requires_grad == ("base_layer" not in name)
    return layer


def dy_of(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def assert_same(pairs):
    for name, (got, wanted) in pairs.items():
        assert got.shape == wanted.shape
        assert error(got, wanted) <= TOLERANCE, name


def dora_layer(linear, dropout=0.0):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=7, target_modules=["0"], use_dora=True, lora_dropout=dropout
    )
    return randomised(config, linear)


def dora_operands(layer):
    """(lora_A, lora_B, magnitude, scaling) and the norm of W + sBA, a constant in backward."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude, scaling = layer.lora_magnitude_vector["default"].weight, layer.scaling["default"]
    norm = (layer.base_layer.weight + scaling * B @ A).norm(dim=1).detach()
    return A, B, magnitude, scaling, norm


@pytest.mark.parametrize("bias", [False, True])
def test_dora(bias):
    linear, t = base(bias)
    layer = dora_layer(linear)
    A, B, magnitude, scaling, norm = dora_operands(layer)
    theirs, ours = leaf(t["x"]), leaf(t["x"])
    y = layer(theirs)
    y.backward(dy_of(y))
    own_A, own_B, own_m = leaf(A), leaf(B), leaf(magnitude)
    own_y = adapter_linear(
        ours, linear.weight, own_A, own_B, scaling, linear.bias, out_scale=own_m / norm
    )
    own_y.backward(dy_of(y))
    assert_same(
        {
            "y": (own_y.detach(), y.detach()),
            "x": (ours.grad, theirs.grad),
            "lora_A": (own_A.grad, A.grad),
            "lora_B": (own_B.grad, B.grad),
            "magnitude": (own_m.grad, magnitude.grad),
        }
    )


class FixedMask(nn.Module):
    """Dropout by a mask that is given."""

    def __init__(self, keep, keep_scale):
        super().__init__()
        self.keep, self.keep_scale = keep, keep_scale

    def forward(self, x):
        return x * self.keep.to(x.dtype) * self.keep_scale


@pytest.mark.parametrize("bias", [False, True])
def test_dora_under_dropout_is_drop_base(bias):
    """peft against the reference for one mask; the call against the reference is tested beside."""
    linear, t = base(bias)
    layer = dora_layer(linear, dropout=0.3)
    keep = torch.rand(t["x"].shape, generator=torch.Generator().manual_seed(2)) > 0.3
    layer.lora_dropout["default"] = FixedMask(keep, 1 / 0.7)
    A, B, magnitude, scaling, norm = dora_operands(layer)
    theirs, ours = leaf(t["x"]), leaf(t["x"])
    y = layer(theirs)
    y.backward(dy_of(y))
    own_A, own_B, own_m = leaf(A), leaf(B), leaf(magnitude)
    own_y = adapter_linear_reference(
        ours,
        linear.weight,
        own_A,
        own_B,
        scaling,
        linear.bias,
        keep,
        1 / 0.7,
        out_scale=own_m / norm,
        drop_base=True,
    )
    own_y.backward(dy_of(y))
    assert_same(
        {
            "y": (own_y.detach(), y.detach()),
            "x": (ours.grad, theirs.grad),
            "lora_A": (own_A.grad, A.grad),
            "lora_B": (own_B.grad, B.grad),
            "magnitude": (own_m.grad, magnitude.grad),
        }
    )


@pytest.mark.parametrize("bias", [False, True])
def test_vera(bias):
    linear, t = base(bias)
    torch.manual_seed(0)
    layer = randomised(peft.VeraConfig(r=RANK, target_modules=["0"]), linear)
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    theirs, ours = leaf(t["x"]), leaf(t["x"])
    y = layer(theirs)
    y.backward(dy_of(y))
    own_d, own_b = leaf(d), leaf(b)
    A, B = layer.vera_A["default"][:, :K], layer.vera_B["default"][:N]
    own_y = adapter_linear(
        ours, linear.weight, A, B, 1.0, linear.bias, mid_scale=own_d, adapter_scale=own_b
    )
    own_y.backward(dy_of(y))
    assert_same(
        {
            "y": (own_y.detach(), y.detach()),
            "x": (ours.grad, theirs.grad),
            "d": (own_d.grad, d.grad),
            "b": (own_b.grad, b.grad),
        }
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_adalora(bias, masked):
    """Also with masked triplets, whose E is zero and still has a gradient."""
    linear, t = base(bias)
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=7, target_modules=["0"], total_step=10, lora_dropout=0.0
    )
    layer = randomised(config, linear)
    A, B, E = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_E"))
    if masked:
        with torch.no_grad():
            E[::2] = 0.0
    scaling = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)
    theirs, ours = leaf(t["x"]), leaf(t["x"])
    y = layer(theirs)
    y.backward(dy_of(y))
    own_A, own_B, own_E = leaf(A), leaf(B), leaf(E)
    own_y = adapter_linear(
        ours, linear.weight, own_A, own_B, scaling, linear.bias, mid_scale=own_E.view(-1)
    )
    own_y.backward(dy_of(y))
    assert_same(
        {
            "y": (own_y.detach(), y.detach()),
            "x": (ours.grad, theirs.grad),
            "lora_A": (own_A.grad, A.grad),
            "lora_B": (own_B.grad, B.grad),
            "lora_E": (own_E.grad, E.grad),
        }
    )
