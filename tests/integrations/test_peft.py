"""accelerate and restore: a peft model computes the same and behaves as before in every way."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import layers

peft = pytest.importorskip("peft")

from fastlora.integrations import peft as ours  # noqa: E402

IDS = torch.arange(24).view(2, 12) % 96
TARGETS = ["q_proj", "v_proj", "down_proj"]


def build(tiny_llama, adapter="default", dtype=torch.float32, **options):
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    } | options
    model = peft.get_peft_model(tiny_llama(dtype=dtype), peft.LoraConfig(**options), adapter)
    fill(model, adapter)
    return model


def fill(model, adapter, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model, adapter):
            layer.lora_B.normal_(std=0.1)


def pair(tiny_llama, **options):
    """The same peft model twice, the second accelerated."""
    plain = build(tiny_llama, **options)
    fused = copy.deepcopy(plain)
    return plain, fused, fastlora.accelerate(fused)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 12},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "olora"},
    ],
)
def test_values_and_gradients_are_pefts(tiny_llama, calls, options):
    plain, fused, report = pair(tiny_llama, **options)
    assert len(report.fused) == len(layers(plain)) and not report.skipped
    grads = []
    for model in (plain, fused):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == len(report.fused)
    close(logits(fused), logits(plain))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) >= 2 * len(report.fused)
    for name in grads[0]:
        close(grads[1][name], grads[0][name])


def test_float64_agrees_to_the_last_digits(tiny_llama):
    plain, fused, _ = pair(tiny_llama, dtype=torch.float64)
    close(logits(fused), logits(plain), 1e-12)


def test_dropout_has_the_right_mean_and_only_in_training(tiny_llama, calls):
    plain, fused, _ = pair(tiny_llama, lora_dropout=0.3)
    close(logits(fused.eval()), logits(plain.eval()))
    layer, twin = layers(fused)[0], layers(plain)[0]
    layer.module.train()
    x = torch.randn(1, 48)
    with torch.no_grad():
        drawn = layer.module(x.expand(20000, 48))
        assert drawn.std(0).max() > 1e-3
        torch.testing.assert_close(drawn.mean(0), twin.module.eval()(x)[0], atol=8e-3, rtol=0)


def test_it_is_the_same_peft_model(tiny_llama):
    plain, fused, _ = pair(tiny_llama)
    assert repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert all(isinstance(x.module, peft.tuners.lora.Linear) for x in layers(fused))
    assert [x.name for x in layers(fused)] == [x.name for x in layers(plain)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fastlora.restore(fused) == 6
    assert all(type(x.module) is peft.tuners.lora.Linear for x in layers(fused))
    assert fastlora.restore(fused) == 0
    close(logits(fused), logits(plain))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_unmerge(tiny_llama, calls, safe):
    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        model.merge_adapter(safe_merge=safe)
    before = len(calls)
    assert torch.equal(logits(fused), logits(plain)) and len(calls) == before
    for model in (plain, fused):
        model.unmerge_adapter()
    close(logits(fused), logits(plain))
    assert len(calls) == before + 6
    unloaded = [model.merge_and_unload(safe_merge=safe) for model in (plain, fused)]
    assert torch.equal(logits(unloaded[1]), logits(unloaded[0]))
    assert not layers(unloaded[1])


def test_disable_adapter(tiny_llama, calls):
    plain, fused, _ = pair(tiny_llama)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(logits(fused), logits(plain)) and not calls
    close(logits(fused), logits(plain))
    assert calls


def test_several_adapters(tiny_llama, calls):
    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
        fill(model, "other", 6)
        model.set_adapter("other")
    report = fastlora.accelerate(fused)  # o_proj is new
    assert {r.name.rpartition(".")[2] for r in report.fused} == {"q_proj", "o_proj"}
    assert all("0 adapters are active" in r.detail for r in report.skipped)
    close(logits(fused), logits(plain))
    assert len(calls) == 4
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    close(logits(fused), logits(plain))
    assert len(calls) == 4 + 4 + 2  # q_proj has both active and runs peft's forward
    for model in (plain, fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    close(logits(fused), logits(plain))
    names = ["default", "__base__"]
    close(logits(fused.eval(), adapter_names=names), logits(plain.eval(), adapter_names=names))


def test_scale_changes_are_seen(tiny_llama):
    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        for layer in layers(model):
            layer.module.scale_layer(0.25)
    close(logits(fused), logits(plain))


def test_save_and_load(tiny_llama, tmp_path):
    plain, fused, _ = pair(tiny_llama)
    fused.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert not fastlora.accelerate(again).skipped
    close(logits(again.eval()), logits(plain.eval()))


def test_copies_and_pickles(tiny_llama, calls):
    _, fused, _ = pair(tiny_llama)
    expected = logits(fused.eval())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        before = len(calls)
        assert torch.equal(logits(twin), expected)
        assert len(calls) == before + 6
        groups = [m._fastlora.group for m in twin.modules() if isinstance(m, ours.FusedLinear)]
        assert groups[0] is groups[1] is not groups[3]


def test_hooks_on_a_layer_run_and_hooks_on_its_parts_are_respected(tiny_llama, calls):
    _, fused, _ = pair(tiny_llama)
    seen = []
    module = layers(fused)[0].module
    module.register_forward_hook(lambda *a: seen.append("layer"))
    logits(fused)
    assert seen == ["layer"] and len(calls) == 6
    handle = module.base_layer.register_forward_hook(lambda *a: seen.append("base"))
    logits(fused)
    assert seen == ["layer", "base", "layer"] and len(calls) == 6 + 5
    handle.remove()
    module.lora_A["default"].register_forward_pre_hook(lambda *a: seen.append("A"))
    logits(fused)
    assert seen[-2:] == ["A", "layer"]
    assert any("hook" in row.detail for row in fastlora.accelerate(fused).skipped)


def test_global_hooks_see_every_part(tiny_llama, calls):
    _, fused, _ = pair(tiny_llama)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        logits(fused)
    finally:
        handle.remove()
    assert not calls and layers(fused)[0].module.base_layer in seen
    logits(fused)
    assert len(calls) == 6


def test_a_wrapped_forward_survives_restore(tiny_llama, calls):
    plain, fused, _ = pair(tiny_llama)
    module = layers(fused)[0].module
    inner = module.forward
    module.forward = lambda *a, **k: inner(*a, **k)
    fastlora.restore(fused)
    close(logits(fused), logits(plain))
    assert not calls
    with fused.disable_adapter(), plain.disable_adapter():
        close(logits(fused), logits(plain))


def test_transforms_run_as_in_peft(tiny_llama):
    plain, fused, _ = pair(tiny_llama)
    results = []
    for model in (plain, fused):
        parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}

        def loss(values, model=model):
            return torch.func.functional_call(model, values, kwargs={"input_ids": IDS}).logits.sum()

        results.append(torch.func.grad(loss)(parameters))
    for name in results[0]:
        close(results[1][name], results[0][name])


def test_a_tensor_scaling_runs_pefts_forward(tiny_llama, calls):
    """prepare_model_for_compiled_hotswap turns scalings into tensors."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        prepare_model_for_compiled_hotswap(model)
    close(logits(fused), logits(plain))
    assert not calls
    assert "scaling is a tensor" in fastlora.accelerate(fused).skipped[0].detail


def test_an_accelerated_model_compiles_whole(tiny_llama):
    plain, fused, _ = pair(tiny_llama)
    torch._dynamo.reset()
    expected = plain(input_ids=IDS).logits
    got = torch.compile(fused, backend="aot_eager", fullgraph=True)(input_ids=IDS).logits
    close(got, expected)
    for out in (expected, got):
        out.square().mean().backward()
    pairs = zip(plain.named_parameters(), fused.named_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(q.grad, p.grad)


def test_the_view_leaves_out_what_it_has_no_form_for():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.attention = nn.MultiheadAttention(8, 2)
            self.linear = nn.Linear(8, 8)

    model = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["conv", "attention", "linear"]), Mixed()
    )
    assert {x.name: x.kind for x in layers(model)} == {
        "conv": "conv",
        "attention.base_layer.out_proj": "linear",
        "linear": "linear",
    }
    report = fastlora.accelerate(model)
    assert [r.name for r in report.fused] == ["conv", "linear"]
    assert {r.name for r in report.skipped} == {"attention", "attention.base_layer.out_proj"}


def test_a_forward_replaced_on_the_instance_is_left_alone(tiny_llama, calls):
    model = build(tiny_llama)
    module = layers(model)[0].module
    inner = module.forward
    module.forward = lambda *a, **k: inner(*a, **k) + 1.0
    expected = logits(model)
    report = fastlora.accelerate(model)
    assert [(r.name, "replaced on the instance" in r.detail) for r in report.skipped] == [
        (layers(model)[0].name, True)
    ]
    close(logits(model), expected)


def test_what_has_no_fused_form_keeps_pefts_and_is_reported(tiny_llama, calls):
    model = build(tiny_llama, init_lora_weights="mica")
    expected = logits(model)
    report = fastlora.accelerate(model)
    assert not report.fused and len(report.skipped) == 6
    assert all("MiCALinearVariant" in row.detail for row in report.skipped)
    assert all(type(x.module) is peft.tuners.lora.Linear for x in layers(model))
    assert torch.equal(logits(model), expected) and not calls
    ia3 = peft.get_peft_model(
        tiny_llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    report = fastlora.accelerate(ia3)
    assert [row.detail for row in report.skipped] == ["ia3.layer.Linear has no fused form"] * 2


def test_a_variant_added_later_runs_as_it_can(tiny_llama, calls):
    """DoRA fused, another by peft's forward."""
    plain, fused, _ = pair(tiny_llama)
    for name, options in (("dora", {"use_dora": True}), ("mica", {"init_lora_weights": "mica"})):
        for model in (plain, fused):
            torch.manual_seed(5)
            model.add_adapter(name, peft.LoraConfig(r=2, target_modules=TARGETS, **options))
            fill(model, name, 6)
            model.set_adapter(name)
        calls.clear()
        close(logits(fused), logits(plain))
        assert len(calls) == (6 if name == "dora" else 0)


def test_the_report_names_the_method_and_the_partners(tiny_llama):
    model = build(tiny_llama, target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True)
    assert fastlora.accelerate(model).fused[0] == (
        "model.layers.0.self_attn.q_proj",
        "adapter 'default', DoRA, r=4, scaling=2, computed with k_proj and v_proj",
    )


def test_conv1d_of_gpt2(calls):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config),
        peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    )
    fill(model, "default")
    expected = logits(model.eval())
    report = fastlora.accelerate(model)
    assert len(report.fused) == 6 and not report.skipped
    assert {(x.transposed, x.lora_A.shape[1]) for x in layers(model)} == {(True, 32), (True, 128)}
    close(logits(model), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(tiny_llama, calls, base):
    plain, fused, _ = pair(tiny_llama, dtype=base)
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        a, b = logits(fused), logits(plain)
    assert a.dtype == b.dtype and len(calls) == 6
    exact = logits(copy.deepcopy(plain).double())
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + torch.finfo(a.dtype).eps


def test_adapters_of_another_dtype_run_pefts_forward(tiny_llama, calls):
    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        for layer in layers(model):
            layer.module.lora_A.to(torch.bfloat16)
            layer.module.lora_B.to(torch.bfloat16)
    assert torch.equal(logits(fused), logits(plain)) and not calls
    assert "torch.bfloat16 over a computation in" in fastlora.accelerate(fused).skipped[0].detail


def test_strict_refuses_and_changes_nothing(tiny_llama):
    model = build(tiny_llama, target_modules=["embed_tokens", "q_proj"])
    model.get_input_embeddings().base_layer.max_norm = 1.0
    with pytest.raises(ValueError, match=r"strict: 1 adapted layers cannot be fused.*embed_tokens"):
        fastlora.accelerate(model, strict=True)
    assert not any(isinstance(m, ours.FusedLinear) for m in model.modules())
    assert fastlora.accelerate(build(tiny_llama), strict=True).skipped == []


def test_models_without_peft_layers_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"no peft layers.*fastlora.inject"):
        fastlora.accelerate(tiny_llama())
    injected = tiny_llama()
    fastlora.inject(injected, fastlora.LoRAConfig())
    with pytest.raises(ValueError, match=r"no peft layers"):
        fastlora.accelerate(injected)


def test_a_bare_module_with_peft_layers_works_too(tiny_llama, calls):
    """peft's inject_adapter_in_model gives no PeftModel."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS), tiny_llama())
    report = fastlora.accelerate(model)
    assert len(report.fused) == 6 and report.fused[0].name == "model.layers.0.self_attn.q_proj"
    logits(model)
    assert len(calls) == 6


def test_only_the_first_use_imports_peft():
    assert fastlora.accelerate is ours.accelerate and fastlora.restore is ours.restore
    with pytest.raises(AttributeError, match="no attribute 'accelerated'"):
        fastlora.accelerated  # noqa: B018


def test_a_layer_inside_a_wrapper(tiny_llama, calls):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    plain, fused, _ = pair(tiny_llama)
    for model in (plain, fused):
        attention = model.base_model.model.model.layers[0].self_attn
        attention.q_proj = Wrapper(attention.q_proj)
    close(logits(fused), logits(plain))
    assert len(calls) == 6
