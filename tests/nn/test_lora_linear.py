"""LoRALinear: construction, initialisation, forward, merging."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.nn import LoRALinear
from fastlora.nn.lora_linear import undrawn


def make(k=24, n=20, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return linear, LoRALinear.from_linear(linear, **({"r": 4, "lora_alpha": 6} | options))


def train_a_little(layer):
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_its_base(bias):
    linear, layer = make(bias=bias)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.weight",
        "lora_B.weight",
    ]
    assert layer.lora_A.weight.shape == (4, 24) and layer.lora_B.weight.shape == (20, 4)


def test_initialisation_is_kaiming_and_zero():
    _, layer = make(k=400, n=300, r=50)
    assert layer.lora_A.weight.abs().max() <= 1 / math.sqrt(400)
    assert abs(layer.lora_A.weight.std() * math.sqrt(3 * 400) - 1) < 0.03
    assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("use_rslora, scaling", [(False, 6 / 4), (True, 6 / 2)])
def test_it_computes_the_formula(use_rslora, scaling):
    linear, layer = make(use_rslora=use_rslora)
    train_a_little(layer)
    x = torch.randn(3, 24)
    update = scaling * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), linear(x) + update)
    torch.testing.assert_close(
        layer.delta_weight(), scaling * layer.lora_B.weight @ layer.lora_A.weight
    )


def test_dropout_acts_in_training_only():
    _, layer = make(lora_dropout=0.5)
    train_a_little(layer)
    x = torch.randn(3, 24)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(dtype):
    linear, layer = make(dtype=dtype)
    train_a_little(layer)
    x = torch.randn(3, 24, dtype=dtype)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), before, atol=16 * eps, rtol=16 * eps)
    assert layer.weight is linear.weight and not torch.equal(layer.weight, weight)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight.data, weight, atol=4 * eps, rtol=4 * eps)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_a_merge_that_would_not_be_finite_changes_nothing():
    _, layer = make(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A.weight.fill_(300.0)
        layer.lora_B.weight.fill_(300.0)
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="non-finite"):
        layer.merge()
    assert torch.equal(layer.weight, weight) and not layer.merged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_half_base_are_float32(dtype):
    _, layer = make(dtype=dtype)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    assert layer(torch.randn(3, 24, dtype=dtype)).dtype == dtype
    _, layer = make(dtype=dtype, adapter_dtype=dtype)
    assert layer.lora_A.weight.dtype == dtype


def test_it_copies_and_pickles():
    _, layer = make(lora_dropout=0.25)
    train_a_little(layer).eval()
    x = torch.randn(3, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.weight is not layer.weight
        assert repr(twin) == repr(layer) and "r=4" in repr(layer)


def test_training_moves_the_adapter_only():
    _, layer = make(lora_dropout=0.1)
    before = {n: p.clone() for n, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        layer(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"lora_A.weight", "lora_B.weight"}


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    "linear, options, error, words",
    [
        (Custom(3, 3), {}, TypeError, "it is a Custom, not a torch.nn.Linear"),
        (nn.Embedding(3, 3), {}, TypeError, "it is a Embedding"),
        (nn.Linear(3, 3), {"r": 0}, ValueError, "r must be a whole number of at least 1, not 0"),
        (nn.Linear(3, 3), {"r": 1.5}, ValueError, "r must be"),
        (nn.Linear(3, 3), {"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite"),
        (nn.Linear(3, 3), {"lora_dropout": 1.0}, ValueError, "lora_dropout must be in"),
    ],
)
def test_bad_input(linear, options, error, words):
    with pytest.raises(error, match=words):
        LoRALinear.from_linear(linear, **options)
    assert all(p.requires_grad for p in linear.parameters())


def hooked():
    linear = nn.Linear(3, 3)
    linear.register_forward_hook(lambda *a: None)
    return linear


def with_another_forward():
    linear = nn.Linear(3, 3)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    "make, words", [(hooked, "carries hooks"), (with_another_forward, "forward has been replaced")]
)
def test_what_sits_on_the_linear_is_not_dropped_in_silence(make, words):
    with pytest.raises(ValueError, match=words):
        LoRALinear.from_linear(make())
    model = nn.Sequential(make(), nn.Linear(3, 3))
    report = fastlora.inject(model, fastlora.LoRAConfig())
    assert [r.name for r in report.fused] == ["1"] and words in report.skipped[0].detail
    with pytest.raises(ValueError, match=words):
        fastlora.inject(nn.Sequential(make()), fastlora.LoRAConfig(target_modules=["0"]))


def test_a_parametrised_weight_is_refused():
    with pytest.raises(TypeError, match=r"not a torch.nn.Linear"):
        LoRALinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "base, adapter", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)]
)
def test_an_adapter_dtype_that_does_not_go_with_the_base(base, adapter):
    with pytest.raises(TypeError, match="does not go with a base of"):
        LoRALinear.from_linear(nn.Linear(3, 3, dtype=base), adapter_dtype=adapter)


def test_integer_weights_are_refused():
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"its weight is torch.int8"):
        LoRALinear.from_linear(linear)


@pytest.mark.parametrize("bias", [False, True])
def test_undrawn_linears_are_what_skip_init_makes(bias):
    where = {"device": torch.device("cpu"), "dtype": torch.float64}
    state = torch.get_rng_state()
    ours = undrawn(7, 5, bias, where)
    assert torch.equal(torch.get_rng_state(), state)
    theirs = nn.utils.skip_init(nn.Linear, 7, 5, bias=bias, **where)
    assert vars(ours).keys() == vars(theirs).keys()
    assert repr(ours) == repr(theirs) and ours.training == theirs.training
    assert ours._parameters.keys() == theirs._parameters.keys()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and a.requires_grad
