"""Adapters cut to fewer ranks, beside the dense SVD of what they add to the weights."""

import copy
import sys

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig, VeRAConfig
from fastlora.adapters import layers
from tests.adapters.family import IDS, PROJECTIONS, SORTS, SORTS_IDS, randomise, sorts

peft = pytest.importorskip("peft")

PATTERNS = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up_proj": 3}}
OPTIONS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    PATTERNS,
    PATTERNS | {"use_rslora": True, "use_dora": True},
]


def fill(model):
    """An adapter as of a training, with spectra that fall off differently from layer to layer."""
    randomise(p for layer in layers(model) for p in layer.tensors.values())
    with torch.no_grad():
        for index, layer in enumerate(layers(model)):
            factor = torch.tensor(1 / (1 + index)) ** torch.arange(layer.r)
            layer.lora_B.mul_(factor.view(-1, *(1,) * (layer.lora_B.dim() - 2)))
    return model


def make_llama(tiny_llama, dtype=torch.float64, **options):
    model = tiny_llama(dtype=dtype).eval()
    config = {"r": 6, "lora_alpha": 7, "target_modules": PROJECTIONS} | options
    fastlora.inject(model, LoRAConfig(**config))
    return fill(model)


def make_sorts(dtype=torch.float64, r=4, **options):
    model = sorts(dtype).eval()
    targets = SORTS[1:] if options.get("lora_bias") else SORTS
    fastlora.inject(model, LoRAConfig(r=r, lora_alpha=7, target_modules=targets, **options))
    return fill(model)


def delta(layer):
    """s·BA [N, K], formed."""
    A, B = layer.lora_A.detach().flatten(1), layer.lora_B.detach().flatten(1)
    return layer.scaling * (B @ A)


def truncated(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- spectra -----------------------------------------------------------------------------------


def test_spectra_are_those_of_the_dense_update():
    for model in (make_sorts(), make_sorts(use_dora=True, use_rslora=True)):
        found = fastlora.spectra(model)
        assert list(found) == [layer.name for layer in layers(model)]
        for layer in layers(model):
            dense = torch.linalg.svdvals(delta(layer))[: layer.r]
            torch.testing.assert_close(found[layer.name], dense, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoRAConfig(init_r=4, rank_pattern={"0.lora_E": [True, False, True, True]}),
        AdaLoRAConfig(init_r=2, rank_pattern={"0.lora_E": [False, False]}),
        VeRAConfig(r=5),
        VeRAConfig(r=24),
        LoRAConfig(r=24, lora_alpha=-3),
    ],
)
def test_spectra_of_the_other_methods(config):
    """Beside the layer's own change of its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7)).double()
    fastlora.inject(model, config)
    randomise(p for layer in layers(model) for p in layer.tensors.values())
    found = fastlora.spectra(model)
    for layer in layers(model):
        dense = torch.linalg.svdvals(layer.module.delta_weight())[: layer.r]
        torch.testing.assert_close(found[layer.name], dense, atol=1e-12, rtol=1e-9)


def test_spectra_of_a_grouped_convolution_are_its_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False)).double()
    fastlora.inject(model, LoRAConfig(r=4, target_modules=["0"]))
    layer = layers(model)[0]
    randomise(layer.tensors.values())
    # what the adapter does, as a matrix: one unit impulse for each of its inputs
    impulses = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
    with fastlora.disabled(model):
        base = model(impulses)
    dense = (model(impulses) - base).squeeze(-1)
    found = fastlora.spectra(model)["0"]
    torch.testing.assert_close(found, torch.linalg.svdvals(dense.detach())[:4])
    with pytest.raises(ValueError, match="grouped convolution"):
        fastlora.resize(model, 2)


def test_spectra_of_a_peft_model():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    randomise(p for layer in layers(model, "second") for p in layer.tensors.values())
    assert not fastlora.spectra(model)["0"].any()
    dense = model.base_model.model[0].get_delta_weight("second").detach().double()
    found = fastlora.spectra(model, "second")["0"]
    torch.testing.assert_close(found, torch.linalg.svdvals(dense)[:2], atol=1e-6, rtol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="two adapters are active"):
        fastlora.spectra(model)
    with pytest.raises(ValueError, match="no adapter"):
        fastlora.spectra(nn.Linear(2, 2))


# --- resize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_each_update_is_the_nearest_of_its_rank(tiny_llama, options):
    model = make_llama(tiny_llama, **options)
    before = {layer.name: (delta(layer), layer.scaling, layer.r) for layer in layers(model)}
    others = {
        (layer.name, part): tensor.detach().clone()
        for layer in layers(model)
        for part, tensor in layer.tensors.items()
        if part in ("lora_B.bias", "lora_magnitude_vector")
    }
    ranks = fastlora.resize(model, 4)
    assert ranks == {name: 4 for name in before}
    for layer in layers(model):
        dense, scaling, _ = before[layer.name]
        torch.testing.assert_close(delta(layer), truncated(dense, 4), atol=1e-12, rtol=1e-9)
        assert layer.scaling == pytest.approx(scaling, rel=1e-15)
        assert layer.r == layer.module.r == 4 and layer.lora_B.shape[1] == 4
        assert layer.lora_A.requires_grad and layer.lora_A.dtype == torch.float64
        # both factors of one size
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B)
    for (name, part), tensor in others.items():
        layer = next(layer for layer in layers(model) if layer.name == name)
        assert torch.equal(layer.tensors[part], tensor)
    assert others or not (options.get("use_dora") or options.get("lora_bias"))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_saved_file_is_loaded_by_peft_with_equal_logits(tiny_llama, tmp_path, options):
    model = make_llama(tiny_llama, torch.float32, **options)
    before = logits(model)
    ranks = fastlora.resize(model, energy=0.8)
    assert len(set(ranks.values())) > 1 and max(ranks.values()) < 9
    own = logits(model)
    assert not torch.allclose(own, before, atol=1e-5, rtol=1e-5)  # something was cut
    fastlora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), own, atol=1e-5, rtol=1e-5)
    assert {layer.name: layer.r for layer in layers(theirs)} == ranks
    again = tiny_llama()
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), own)
    fastlora.load_adapter(model, tmp_path)  # into the resized layers themselves
    assert torch.equal(logits(model), own)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_embeddings_and_convolutions(tmp_path, options):
    model = make_sorts(torch.float32, **options)
    before = {layer.name: delta(layer) for layer in layers(model)}
    fastlora.resize(model, 2)
    for layer in layers(model):
        expected = truncated(before[layer.name].double(), 2).float()
        torch.testing.assert_close(delta(layer), expected, atol=1e-6, rtol=1e-5)
    y = model(SORTS_IDS)
    fastlora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(sorts(), tmp_path).eval()
    torch.testing.assert_close(theirs(SORTS_IDS), y, atol=1e-5, rtol=1e-5)
    y.sum().backward()  # and it trains on
    assert all(p.grad is not None for layer in layers(model) for p in layer.tensors.values())
    if "lora_bias" in options:
        return  # two of the layers have no bias to merge it into
    again = copy.deepcopy(model)
    fastlora.merge(again)
    torch.testing.assert_close(again(SORTS_IDS), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.999, 1.0])
def test_the_rank_is_the_smallest_that_holds_the_energy(energy):
    model = make_sorts(r=5)
    squares = {
        layer.name: torch.linalg.svdvals(delta(layer))[: layer.r].square()
        for layer in layers(model)
    }
    ranks = fastlora.resize(model, energy=energy)
    for name, own in squares.items():
        share = own.cumsum(0) / own.sum()
        r = ranks[name]
        assert share[r - 1] >= energy - 1e-12
        assert r == 1 or share[r - 2] < energy
    assert len(set(ranks.values())) > 1 or energy == 1.0


def test_dora_keeps_its_rows_norms():
    model = make_sorts(use_dora=True)
    fastlora.resize(model, 1)
    merged = copy.deepcopy(model)
    fastlora.merge(merged)
    for layer, twin in zip(layers(model), layers(merged), strict=True):
        weight = twin.weight.T if layer.kind == "embedding" else twin.weight.flatten(1)
        norms = layer.tensors["lora_magnitude_vector"].abs().view(-1)
        torch.testing.assert_close(weight.norm(dim=1), norms, atol=1e-9, rtol=1e-9)


def test_a_layer_that_is_not_above_the_rank_stays_to_the_bit(tiny_llama):
    model = make_llama(tiny_llama, **PATTERNS)
    before = copy.deepcopy(model)
    assert set(fastlora.resize(model, 6).values()) == {6}
    for layer, old in zip(layers(model), layers(before), strict=True):
        if old.r == 6:
            assert all(torch.equal(t, old.tensors[part]) for part, t in layer.tensors.items())
            assert layer.lora_alpha == old.lora_alpha and layer.scaling == old.scaling
    assert any(layer.r == 9 for layer in layers(before))


def test_more_ranks_than_the_layer_has_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 3)).double()
    fastlora.inject(model, LoRAConfig(r=8))
    randomise(p for layer in layers(model) for p in layer.tensors.values())
    x = torch.randn(4, 12, dtype=torch.float64)
    y = model(x)
    assert fastlora.resize(model, 6) == {"0": 3}
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=1e-12)


def test_an_untrained_adapter_can_still_be_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 3)).double()
    fastlora.inject(model, LoRAConfig(r=8))
    x = torch.randn(4, 12, dtype=torch.float64)
    y = model(x)
    fastlora.resize(model, energy=0.5)
    assert torch.equal(model(x), y) and layers(model)[0].r == 1
    model(x).square().sum().backward()
    assert layers(model)[0].lora_B.grad.any()


def test_an_optimizer_made_before_fails_and_does_not_train_nothing(tiny_llama):
    model = make_llama(tiny_llama)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)

    def step(optimizer):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()

    step(optimizer)
    fastlora.resize(model, 2)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
    assert all(layer.lora_A.grad is None for layer in layers(model))
    with pytest.raises(RuntimeError, match="size"):
        step(optimizer)
    optimizer.zero_grad()
    before = layers(model)[0].lora_A.detach().clone()
    step(torch.optim.AdamW(parameters))
    assert not torch.equal(layers(model)[0].lora_A, before)


# --- refused -----------------------------------------------------------------------------------


def snapshot(model):
    facts = [(x.name, x.r, x.scaling, x.lora_alpha) for x in layers(model)]
    return facts, [p.detach().clone() for p in model.parameters()]


def spoil_merge(model):
    fastlora.merge(model)


def spoil_value(model):
    with torch.no_grad():
        layers(model)[-1].lora_A[0, 0] = float("nan")


@pytest.mark.parametrize(
    "config, spoil, error, words",
    [
        (LoRAConfig(r=3), spoil_merge, RuntimeError, "0 is merged"),
        (LoRAConfig(r=3), spoil_value, ValueError, "of 1 cannot be resized: it holds non-finite"),
        (AdaLoRAConfig(init_r=3), None, ValueError, "allotted in training"),
        (VeRAConfig(r=3), None, ValueError, "shared by all layers"),
    ],
)
def test_what_cannot_be_resized_is_not_changed(config, spoil, error, words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7))
    fastlora.inject(model, config)
    if spoil:
        spoil(model)
    facts, values = snapshot(model)
    with pytest.raises(error, match=words):
        fastlora.resize(model, 2)
    after, now = snapshot(model)
    assert after == facts
    torch.testing.assert_close(now, values, atol=0, rtol=0, equal_nan=True)


def interrupted_at(count, model):
    """Whether ``resize`` ran through, a KeyboardInterrupt coming at its ``count``-th line."""
    seen, file = 0, sys.modules["fastlora.adapters.resize"].__file__

    def line(frame, event, _):
        nonlocal seen
        seen += event == "line"
        if seen == count and event == "line":
            raise KeyboardInterrupt
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == file else None)
    try:
        fastlora.resize(model, 2)
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


def test_an_interruption_at_any_line_leaves_the_model_as_it_was():
    base = nn.Sequential(nn.Linear(12, 10), nn.Unflatten(1, (2, 5)), nn.Conv1d(2, 6, 3))
    fastlora.inject(base, LoRAConfig(r=4, target_modules=["0", "2"], use_rslora=True))
    fill(base)
    x, count, done = torch.randn(3, 12), 0, False
    while not done:
        count += 1
        model = copy.deepcopy(base)
        model(x).sum().backward()
        facts, values = snapshot(model)
        gradients = [p.grad for p in model.parameters()]
        done = interrupted_at(count, model)
        if not done:
            after, now = snapshot(model)
            assert after == facts and all(map(torch.equal, now, values))
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert str(model) == str(base)
    assert count > 30 and all(layer.r == 2 for layer in layers(model))


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "either a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": float("nan")}, r"energy must be in \(0, 1\]"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        fastlora.resize(make_sorts(), **options)


def test_a_peft_model_is_told_the_way():
    config = peft.LoraConfig(r=3, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
    for unadapted in (model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"load it with fastlora\.load_adapter"):
            fastlora.resize(unadapted, 2)
