"""inject and unload on whole models, the view, merging and switching off."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig, VeRAConfig
from fastlora.adapters import layers
from fastlora.nn import LoRALinear

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) % 96


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B.normal_(std=0.1)


def test_all_linear_adapts_all_but_the_head(tiny_llama):
    model = tiny_llama().eval()
    base, keys = logits(model), set(model.state_dict())
    report = fastlora.inject(model, LoRAConfig(r=4))
    assert len(report.fused) == 14 and {row.name.rpartition(".")[2] for row in report.fused} == set(
        PROJECTIONS
    )
    assert [
        (r.name, "output embedding" in r.detail) for r in report.skipped if "head" in r.name
    ] == [("lm_head", True)]
    assert torch.equal(logits(model), base)
    assert keys < set(model.state_dict())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 28 and all("lora_" in n for n in trained)
    text = str(report)
    assert "14 layers fused" in text and "model.layers.*.mlp.up_proj (2×): r=4" in text
    assert len(report.to_dict()["fused"]) == 14


@pytest.mark.parametrize(
    "target, count",
    [
        (["q_proj", "v_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*layers\.0\.self_attn\.[qk]_proj", 2),
        (["lm_head"], 1),
        ("ALL-LINEAR", 14),
    ],
)
def test_targets(tiny_llama, target, count):
    report = fastlora.inject(tiny_llama(), LoRAConfig(target_modules=target))
    assert len(report.fused) == count
    linears = [r for r in report.skipped if "Linear," in r.detail or r.name == "lm_head"]
    assert len(report.fused) + len(linears) == 15


@pytest.mark.parametrize(
    "exclude", [["q_proj", "layers.0.mlp.up_proj"], r".*(q_proj|0\.mlp\.up_proj)"]
)
def test_exclusions_are_left_and_reported(tiny_llama, exclude):
    report = fastlora.inject(tiny_llama(), LoRAConfig(exclude_modules=exclude))
    left = {r.name for r in report.skipped if r.detail == "named by exclude_modules"}
    assert len(report.fused) == 11 and len(left) == 3 and "model.layers.0.mlp.up_proj" in left


def test_patterns_set_rank_and_alpha(tiny_llama):
    model = tiny_llama()
    fastlora.inject(
        model,
        LoRAConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 4}),
    )
    found = {layer.name: (layer.r, layer.scaling) for layer in layers(model)}
    assert found["model.layers.0.self_attn.q_proj"] == (16, 0.25)
    assert found["model.layers.0.self_attn.k_proj"] == (4, 2.0)


def test_one_module_at_two_places_stays_one():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.ModuleDict({"a": block, "b": nn.ModuleList([block[0]])})
    report = fastlora.inject(model, LoRAConfig())
    assert len(report.fused) == 1
    assert model["a"][0] is model["b"][0] and isinstance(model["a"][0], LoRALinear)
    fastlora.unload(model)
    assert model["a"][0] is model["b"][0] and type(model["a"][0]) is nn.Linear


def test_an_entry_without_a_match_is_reported(tiny_llama):
    config = LoRAConfig(target_modules=["q_proj", "query"], exclude_modules=["k_prj"])
    report = fastlora.inject(tiny_llama(), config)
    assert ("query", "an entry of target_modules that matches no module") in report.skipped
    assert ("k_prj", "an entry of exclude_modules that matches no module") in report.skipped


def test_conv1d_is_named_with_the_way_to_adapt_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    for targets in (["c_attn"], "all-linear"):
        with pytest.raises(ValueError, match=r"Conv1D.*fastlora\.accelerate|is a Conv1D"):
            fastlora.inject(model, LoRAConfig(target_modules=targets))


class Wrapped(nn.Linear):
    pass


@pytest.mark.parametrize(
    "config, words",
    [
        (LoRAConfig(target_modules=["q_prj"]), "matches no nn.Linear; did you mean q_proj"),
        (LoRAConfig(target_modules=".*query"), "matches no nn.Linear"),
        (
            LoRAConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]),
            "after exclude_modules",
        ),
        (LoRAConfig(target_modules=["input_layernorm"]), "LlamaRMSNorm, not a torch.nn.Linear"),
        (VeRAConfig(target_modules=["embed_tokens"]), "is a Embedding"),
        (LoRAConfig(target_modules=".*mlp.*"), "LlamaMLP"),
        (
            LoRAConfig(rank_pattern={"q_prj": 2}),
            "rank_pattern: 'q_prj' matches no adapted layer; did",
        ),
        (LoRAConfig(target_modules=["k_proj"], alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    ],
)
def test_bad_targets_are_refused_and_change_nothing(tiny_llama, config, words):
    model = tiny_llama()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        fastlora.inject(model, config)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "model, words",
    [
        (nn.Linear(3, 3), "from_linear"),
        (nn.Sequential(nn.ReLU()), "holds no torch.nn.Linear"),
    ],
)
def test_models_that_cannot_be_injected(model, words):
    with pytest.raises(ValueError, match=words):
        fastlora.inject(model, LoRAConfig())


def test_one_adapter_a_model(tiny_llama):
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig())
    with pytest.raises(ValueError, match="has an adapter already"):
        fastlora.inject(model, LoRAConfig())
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"use fastlora.accelerate"):
        fastlora.inject(wrapped, LoRAConfig())


def test_layers_whose_weight_is_read_past_them_are_left():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
    model.add_module("head", nn.Linear(8, 2))
    report = fastlora.inject(model, LoRAConfig())
    assert [row.name for row in report.fused] == ["head"]
    reasons = {row.name: row.detail for row in report.skipped}
    assert "fast path" in reasons["layers.0.linear1"]
    assert "NonDynamicallyQuantizableLinear" in reasons["layers.0.self_attn.out_proj"]


def test_the_view_shows_live_parameters(tiny_llama):
    model = tiny_llama()
    assert layers(model) == []
    fastlora.inject(model, LoRAConfig(r=4, lora_dropout=0.1, use_rslora=True))
    for layer in layers(model):
        module = model.get_submodule(layer.name)
        assert layer.module is module and layer.weight is module.weight
        assert layer.lora_A is module.lora_A.weight and layer.lora_B is module.lora_B.weight
        assert (layer.r, layer.scaling, layer.lora_dropout, layer.adapter) == (
            4,
            4.0,
            0.1,
            "default",
        )
        assert list(layer.tensors) == ["lora_A.weight", "lora_B.weight"]
        assert not layer.transposed and not layer.merged and layer.method == "LORA"
    with pytest.raises(ValueError, match="no layer of the model has an adapter named 'other'"):
        layers(model, "other")


def test_merge_unmerge_disabled_unload(tiny_llama):
    model = tiny_llama().eval()
    base = logits(model)
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    with fastlora.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    fastlora.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="is merged"), fastlora.disabled(model):
        pass
    with pytest.raises(RuntimeError, match="is merged already"):
        fastlora.merge(model)
    fastlora.unmerge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    fastlora.merge(model)
    fastlora.unload(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)


def test_disabled_puts_things_back_after_an_error(tiny_llama):
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4))
    with pytest.raises(KeyError), fastlora.disabled(model):
        raise KeyError
    assert all(layer.module.enabled for layer in layers(model))


def test_a_merge_that_fails_half_way_is_undone(tiny_llama):
    model = tiny_llama(dtype=torch.float16)
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for part in (layers(model)[-1].lora_A, layers(model)[-1].lora_B):
            part.fill_(1000.0)
    with pytest.raises(ValueError, match="non-finite"):
        fastlora.merge(model)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            torch.testing.assert_close(parameter.data, before[name], atol=2e-3, rtol=0)
    assert not any(layer.merged for layer in layers(model))
    with torch.no_grad():
        layers(model)[-1].lora_A.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"mlp.down_proj holds non-finite values"):
        fastlora.merge(model)


def test_unload_leaves_an_embedding_tied_to_its_head(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    assert model.model.embed_tokens.weight is weight
    fastlora.inject(model, LoRAConfig(r=4, target_modules=["embed_tokens"]))
    fastlora.unload(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.model.embed_tokens.weight is model.lm_head.weight is weight


def test_a_tied_weight_is_not_merged(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    fastlora.inject(model, LoRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        fastlora.merge(model)


def test_a_tied_bias_is_not_merged_into():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    copied = copy.deepcopy(model)
    fastlora.inject(model, LoRAConfig(r=2, lora_bias=True, target_modules=["0"]))
    with pytest.raises(ValueError, match="0 shares its bias with 1"):
        fastlora.merge(model)
    fastlora.inject(copied, LoRAConfig(r=2, target_modules=["0"]))
    fastlora.merge(copied)  # which leaves the bias as it is


def test_a_layer_that_is_the_whole_model_is_not_unloaded():
    layer = fastlora.nn.LoRALinear.from_linear(nn.Linear(4, 4), r=2)
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="itself an adapted layer"):
        fastlora.unload(layer)
    assert "" not in layer._modules
    fastlora.merge(layer)
    assert torch.equal(layer(x), layer.plain()(x))


@pytest.mark.parametrize("call", [fastlora.merge, fastlora.unmerge, fastlora.unload])
def test_a_model_without_adapter_is_refused(tiny_llama, call):
    with pytest.raises(ValueError, match="no fastlora adapter"):
        call(tiny_llama())


def test_wrappers_do_not_show_in_names(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    names = [layer.name for layer in layers(model)]
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    parallel = nn.DataParallel(copy.deepcopy(model))
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    for number, wrapped in enumerate((compiled, parallel, model)):
        assert [layer.name for layer in layers(wrapped)] == names
        folder = tmp_path / str(number)
        fastlora.save_adapter(wrapped, folder)
        again = tiny_llama().eval()
        fastlora.load_adapter(again, folder)
        torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_an_injected_model_copies(tiny_llama):
    model = tiny_llama().eval()
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert layers(twin)[0].lora_A is not layers(model)[0].lora_A
