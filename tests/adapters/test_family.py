"""Every method and kind of layer beside peft's own: values, gradients, files both ways."""

import copy

import pytest
import torch

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig, VeRAConfig
from fastlora.adapters import layers
from fastlora.nn import AdaptedLayer
from tests.adapters.family import (
    IDS,
    LORA,
    METHODS,
    PROJECTIONS,
    SORTS,
    SORTS_IDS,
    ours,
    peft_config,
    randomise,
    sorts,
)

peft = pytest.importorskip("peft")


def llama(tiny_llama, dtype):
    return tiny_llama(dtype=dtype, attention_bias=True), PROJECTIONS, IDS


def make(which, tiny_llama, dtype=torch.float32):
    """(a model, the modules to adapt, its input)."""
    if which == "llama":
        return llama(tiny_llama, dtype)
    return sorts(dtype), SORTS, SORTS_IDS


def output(model, ids):
    y = model(input_ids=ids).logits if hasattr(model, "config") and ids is IDS else model(ids)
    return y


def trained(model):
    """The adapter's tensors by (layer, peft's name)."""
    return {(layer.name, part): t for layer in layers(model) for part, t in layer.tensors.items()}


def pair(which, method, tiny_llama, dtype=torch.float32, **more):
    """(peft's model, ours with the same adapter, the input)."""
    base, targets, ids = make(which, tiny_llama, dtype)
    if which == "sorts" and method == "lora_bias":
        targets = targets[1:]  # embeddings have none
    base.eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(method, targets, **more))
    mine = copy.deepcopy(base)
    fastlora.inject(mine, ours(method, targets, **more))
    if dtype == torch.float64:  # peft keeps VeRA's projections and AdaLoRA's factors in float32
        theirs.double()
    from_peft = trained(theirs)
    randomise(from_peft.values())
    with torch.no_grad():
        for key, tensor in trained(mine).items():
            tensor.copy_(from_peft[key])
    assert from_peft.keys() == trained(mine).keys()
    return theirs.eval(), mine.eval(), ids


CASES = [("llama", method) for method in METHODS] + [("sorts", method) for method in LORA]


@pytest.mark.parametrize("which, method", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_values_and_gradients_are_pefts(tiny_llama, which, method, dtype, tolerance):
    theirs, mine, ids = pair(which, method, tiny_llama, dtype)
    y, own = output(theirs, ids), output(mine, ids)
    torch.testing.assert_close(own, y, atol=tolerance, rtol=tolerance)
    for each in (y, own):
        each.square().mean().backward()
    found, expected = trained(mine), trained(theirs)
    for key, tensor in found.items():
        grad = expected[key].grad
        assert grad is not None and grad.abs().max() > 0, key
        scale = max(float(grad.abs().max()), 1e-3)
        error = float((tensor.grad - grad).abs().max()) / scale
        assert error <= tolerance, (key, error)
    trainable = {id(p) for p in mine.parameters() if p.requires_grad}
    assert trainable == {id(t) for t in found.values()}


@pytest.mark.parametrize("which, method", CASES)
def test_what_we_save_peft_loads_and_so_do_we(tiny_llama, tmp_path, which, method):
    _, mine, ids = pair(which, method, tiny_llama)
    fastlora.save_adapter(mine, tmp_path)
    base, _, _ = make(which, tiny_llama)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(theirs, ids), output(mine, ids), atol=1e-5, rtol=1e-5)
        again = copy.deepcopy(base).eval()
        fastlora.load_adapter(again, tmp_path)
        assert torch.equal(output(again, ids), output(mine, ids))
    # into the adapter that is there
    randomise(trained(again).values(), seed=2)
    fastlora.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again, ids), output(mine, ids))


@pytest.mark.parametrize("which, method", CASES)
def test_what_peft_saves_we_load(tiny_llama, tmp_path, which, method):
    theirs, _, ids = pair(which, method, tiny_llama)
    theirs.save_pretrained(tmp_path)
    mine, _, _ = make(which, tiny_llama)
    fastlora.load_adapter(mine.eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(output(mine, ids), output(theirs, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which, method", CASES)
def test_merge_and_unmerge(tiny_llama, which, method):
    _, mine, ids = pair(which, method, tiny_llama)
    if method == "lora_bias":  # layers without a bias have no place for the adapter's
        with pytest.raises(ValueError, match="lora_bias"):
            fastlora.merge(mine)
        assert not any(layer.merged for layer in layers(mine))
        return
    before = {n: p.clone() for n, p in mine.named_parameters()}
    with torch.no_grad():
        adapted = output(mine, ids)
        with fastlora.disabled(mine):
            base = output(mine, ids)
        assert (adapted - base).abs().max() > 1e-3
        fastlora.merge(mine)
        torch.testing.assert_close(output(mine, ids), adapted, atol=2e-5, rtol=2e-5)
        fastlora.unmerge(mine)
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.data, before[name], atol=1e-6, rtol=1e-5)
        fastlora.merge(mine)
        fastlora.unload(mine)
        assert not any(isinstance(m, AdaptedLayer) for m in mine.modules())
        torch.testing.assert_close(output(mine, ids), adapted, atol=2e-5, rtol=2e-5)


def test_a_merged_bias_of_the_adapter():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    fastlora.inject(model, LoRAConfig(r=2, lora_bias=True))
    randomise(trained(model).values())
    x, biases = torch.randn(3, 6), [layer.bias.clone() for layer in model]
    y = model(x)
    fastlora.merge(model)
    torch.testing.assert_close(model(x), y)
    assert not torch.equal(model[0].bias, biases[0])
    fastlora.unmerge(model)
    assert all(torch.equal(layer.bias, b) for layer, b in zip(model, biases, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_starts_as_its_base(tiny_llama, method):
    model, targets, ids = make("llama", tiny_llama)
    with torch.no_grad():
        before = output(model.eval(), ids)
        report = fastlora.inject(model, ours(method, targets))
        torch.testing.assert_close(output(model, ids), before, atol=1e-5, rtol=1e-5)
    assert len(report.fused) == 14
    said = {row.name: row.detail for row in report.fused}
    assert "computed with k_proj and v_proj" in said["model.layers.0.self_attn.q_proj"]
    assert "computed with gate_proj" in said["model.layers.1.mlp.up_proj"]
    assert "computed with" not in said["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(tiny_llama, tmp_path, method, dtype):
    model, targets, ids = make("llama", tiny_llama, dtype)
    fastlora.inject(model.eval(), ours(method, targets))
    assert {t.dtype for t in trained(model).values()} == {torch.float32}
    randomise(trained(model).values())
    with torch.no_grad():
        y = output(model, ids)
        wide = copy.deepcopy(model).float()
        error = (y.float() - output(wide, ids)).abs().max()
        assert y.dtype == dtype and error <= 64 * torch.finfo(dtype).eps * y.abs().max()
    fastlora.save_adapter(model, tmp_path)
    again, _, _ = make("llama", tiny_llama, dtype)
    fastlora.load_adapter(again.eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again, ids), y)


# --- DoRA --------------------------------------------------------------------------------------


def dora(k=9, n=7, dtype=torch.float64, **options):
    torch.manual_seed(0)
    linear = torch.nn.Linear(k, n, dtype=dtype)
    layer = fastlora.nn.LoRALinear.from_linear(linear, r=3, use_dora=True, **options)
    randomise(layer.tensors().values())
    return layer


def test_the_full_gradient_of_dora_is_that_of_the_formula():
    layer, x = dora(dora_simple=False), torch.randn(4, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.tensors().items()}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.tensors().items()}
    A, B, m = leaves.values()
    V = layer.weight + layer.scaling * B @ A
    V.retain_grad()
    y = x @ (V * (m / V.norm(dim=1))[:, None]).T + layer.bias
    y.square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.grad, atol=1e-9, rtol=1e-9)
    along = (V.grad * V.detach()).sum(1) / V.detach().norm(dim=1)
    assert along.abs().max() <= 1e-10 * V.grad.norm()


def test_simple_and_full_dora_agree_in_all_but_the_factors():
    x = torch.randn(4, 9, dtype=torch.float64)
    grads = []
    for simple in (True, False):
        layer, own = dora(dora_simple=simple), x.clone().requires_grad_()
        layer(own).square().sum().backward()
        grads.append({"x": own.grad} | {n: p.grad for n, p in layer.tensors().items()})
    for name in ("x", "lora_magnitude_vector"):
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-12, rtol=1e-12)
    for name in ("lora_A.weight", "lora_B.weight"):
        assert (grads[0][name] - grads[1][name]).abs().max() > 1e-3


@pytest.mark.parametrize("keep", [True, False, ["down_proj"], ["model.layers.0.self_attn.q_proj"]])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_outputs_are_kept_where_asked_or_where_the_model_does(tiny_llama, tmp_path, keep, p):
    model, _, _ = make("llama", tiny_llama)
    config = LoRAConfig(r=4, use_dora=True, dora_keep_output=keep, lora_dropout=p)
    fastlora.inject(model.train(), config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, fastlora.nn.LoRALinear)}
    for name, layer in linears.items():
        # the model keeps y, but under dropout it is not y that is kept
        kept = p == 0.0 and name.endswith(("gate_proj", "up_proj", "v_proj"))
        asked = any(name.endswith(entry) for entry in keep) if isinstance(keep, list) else keep
        assert layer.operands(dropout=False).keep_output == (asked or kept), name
    x = torch.randn(30, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        layer = linears["model.layers.0.self_attn.o_proj"]
        layer.group = None
        layer(x)
    of_tokens = [shape for shape in kept if 30 in shape]
    assert sorted(of_tokens) == [(30, 4), (30, 48)] + [(30, 48)] * (keep is True)
    fastlora.save_adapter(model, tmp_path)
    assert "dora_keep_output" not in (tmp_path / "adapter_config.json").read_text()


def test_a_row_of_norm_zero_is_finite_and_can_be_merged():
    linear = torch.nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[2] = 0.0
    weight = linear.weight.clone()
    layer = fastlora.nn.LoRALinear.from_linear(linear, r=2, use_dora=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, linear.bias))
    with torch.no_grad():
        layer.lora_B.weight[:2].normal_()
        layer.lora_B.weight[2] = torch.randn(2)  # its norm is 1e12 times its magnitude now
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(
        torch.isfinite(p.grad).all() for p in layer.tensors().values()
    )
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    torch.testing.assert_close(layer.weight.data, weight)


def test_merged_rows_have_the_magnitudes_as_norms():
    layer = dora()
    magnitude = layer.lora_magnitude_vector.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer.weight.norm(dim=1), magnitude.abs())


def test_a_magnitude_that_is_not_finite_is_neither_merged_nor_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    fastlora.inject(model, LoRAConfig(r=2, use_dora=True))
    weight = model[0].weight.clone()
    with torch.no_grad():
        model[0].lora_magnitude_vector.weight[1] = float("inf")
    with pytest.raises(ValueError, match="non-finite"):
        fastlora.merge(model)
    with pytest.raises(ValueError, match="lora_magnitude_vector holds non-finite"):
        fastlora.save_adapter(model, tmp_path)
    assert torch.equal(model[0].weight, weight) and not list(tmp_path.iterdir())


# --- LoRA-FA -----------------------------------------------------------------------------------


def test_lora_fa_keeps_no_input_and_never_moves_A(tiny_llama):
    model, _, ids = make("llama", tiny_llama)
    fastlora.inject(model, LoRAConfig(r=4, use_lora_fa=True))
    randomise(layer.tensors["lora_B.weight"] for layer in layers(model))
    frozen = {layer.name: layer.lora_A.clone() for layer in layers(model)}
    x = torch.randn(30, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        y = model.model.layers[0].self_attn.q_proj(x)
    assert (30, 4) in kept and (30, 48) not in kept
    y.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for layer in layers(model):
        assert not layer.lora_A.requires_grad and torch.equal(layer.lora_A, frozen[layer.name])


# --- VeRA --------------------------------------------------------------------------------------


def test_vera_projections_are_pefts_and_shared(tiny_llama):
    model, targets, _ = make("llama", tiny_llama)
    fastlora.inject(model, VeRAConfig(r=7, projection_prng_key=5, target_modules=targets))
    theirs = peft.get_peft_model(
        make("llama", tiny_llama)[0],
        peft.VeraConfig(r=7, projection_prng_key=5, target_modules=targets),
    )
    projections = {layer.module.projection for layer in layers(model)}
    assert len(projections) == 1
    (projection,) = projections
    assert torch.equal(projection.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(projection.vera_B, theirs.base_model.vera_B["default"])
    keys = [key for key in model.state_dict() if "vera_A" in key]
    assert len(keys) == 1
    moved = copy.deepcopy(model).double()
    inside = {layer.module.projection for layer in layers(moved)}
    assert len(inside) == 1 and projection not in inside
    assert inside.pop().vera_A.dtype == torch.float64


@pytest.mark.parametrize(
    "d, r, lora, vera, with_shared",
    [
        (768, 1, 36_864, 18_456, None),
        (768, 256, 9_437_184, 24_576, None),
    ],
)
def test_vera_counts_are_the_papers(d, r, lora, vera, with_shared):
    """24 adapted d × d matrices, the RoBERTa-base rows of the paper's table 1."""
    model = torch.nn.Sequential(*(torch.nn.Linear(d, d, device="meta") for _ in range(24)))
    counts = []
    for config in (LoRAConfig(r=r), VeRAConfig(r=r)):
        own = copy.deepcopy(model)
        fastlora.inject(own, config)
        counts.append(sum(p.numel() for p in own.parameters() if p.requires_grad))
    assert counts == [lora, vera]


def test_vera_with_another_key_is_not_loaded_over(tiny_llama, tmp_path):
    model, targets, _ = make("llama", tiny_llama)
    fastlora.inject(model, VeRAConfig(r=7, projection_prng_key=5, target_modules=targets))
    fastlora.save_adapter(model, tmp_path)
    other, _, _ = make("llama", tiny_llama)
    fastlora.inject(other, VeRAConfig(r=7, projection_prng_key=6, target_modules=targets))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"projection_prng_key=6, the file has .*=5"):
        fastlora.load_adapter(other, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


# --- AdaLoRA -----------------------------------------------------------------------------------


def allocated(tiny_llama):
    """peft's AdaLoRA model after an allocation that has cut triplets, some layers down to none."""
    base, targets, ids = make("llama", tiny_llama)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, total_step=6, tfinal=2, lora_alpha=7, target_modules=targets,
        orth_reg_weight=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval(), ids


def test_ranks_that_peft_allocated_are_loaded_and_saved_again(tiny_llama, tmp_path):
    theirs, ids = allocated(tiny_llama)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, _, _ = make("llama", tiny_llama)
    fastlora.load_adapter(mine.eval(), tmp_path / "theirs")
    ranks = [layer.r for layer in layers(mine)]
    assert len(set(ranks)) > 1 and sum(ranks) == 14
    with torch.no_grad():
        torch.testing.assert_close(output(mine, ids), output(theirs, ids), atol=1e-5, rtol=1e-5)
    fastlora.save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(make("llama", tiny_llama)[0], tmp_path / "mine").eval()
    with torch.no_grad():
        torch.testing.assert_close(output(again, ids), output(theirs, ids), atol=1e-5, rtol=1e-5)
    fastlora.merge(mine)
    with torch.no_grad():
        torch.testing.assert_close(output(mine, ids), output(theirs, ids), atol=1e-5, rtol=1e-5)


def test_a_layer_without_ranks_computes_its_base_and_trains():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    config = AdaLoRAConfig(init_r=3, rank_pattern={"1.lora_E": [False] * 3})
    fastlora.inject(model, config)
    randomise(trained(model).values())
    x = torch.randn(2, 6)
    own = model[1]
    y = model[0](x)
    torch.testing.assert_close(own(y), torch.nn.functional.linear(y, own.weight, own.bias))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    fastlora.merge(model)
    fastlora.unmerge(model)


@pytest.mark.parametrize(
    "pattern, words",
    [
        ({"1.lora_E": [True]}, "has 1 entries, init_r is 3"),
        ({"1.lora_E": [1, 0, 1]}, "must be a list of True and False"),
        ({"1": [True] * 3}, "does not end in .lora_E"),
        ([True] * 3, "rank_pattern must map"),
    ],
)
def test_a_rank_pattern_that_does_not_fit(pattern, words):
    with pytest.raises(ValueError, match=words):
        AdaLoRAConfig(init_r=3, rank_pattern=pattern)


def test_a_rank_pattern_for_a_layer_that_is_not_there():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"rank_pattern: .* matches no adapted layer"):
        fastlora.inject(model, AdaLoRAConfig(init_r=2, rank_pattern={"7.lora_E": [True, False]}))
    assert all(p.requires_grad for p in model.parameters())


# --- refusals ----------------------------------------------------------------------------------


def test_a_name_to_keep_that_is_no_adapted_layer_is_refused(tiny_llama):
    model, _, _ = make("llama", tiny_llama)
    before = [name for name, _ in model.named_modules()]
    config = LoRAConfig(r=4, use_dora=True, dora_keep_output=["down_prj"])
    with pytest.raises(ValueError, match="'down_prj' names no adapted layer; did you mean down_pr"):
        fastlora.inject(model, config)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    "kind, options, words",
    [
        (LoRAConfig, {"use_dora": True, "lora_bias": True}, "lora_bias does not go with use_dora"),
        (LoRAConfig, {"dora_simple": False}, "set use_dora"),
        (
            LoRAConfig,
            {"dora_keep_output": False},
            "dora_keep_output=False says what DoRA keeps for backward; set use_dora",
        ),
        (
            LoRAConfig,
            {"use_dora": True, "dora_keep_output": 0},
            "dora_keep_output must be True or False",
        ),
        (LoRAConfig, {"dora_keep_output": ["o_proj"]}, "set use_dora"),
        (LoRAConfig, {"use_dora": True, "dora_keep_output": [1]}, "must be a list of module names"),
        (LoRAConfig, {"use_lora_fa": 1}, "use_lora_fa must be True or False"),
        (VeRAConfig, {"r": 0}, "r must be a whole number"),
        (VeRAConfig, {"vera_dropout": 1.0}, "vera_dropout must be in"),
        (VeRAConfig, {"projection_prng_key": "x"}, "projection_prng_key must be"),
        (VeRAConfig, {"d_initial": float("nan")}, "d_initial must be a finite"),
        (AdaLoRAConfig, {"init_r": 0}, "r must be a whole number"),
        (AdaLoRAConfig, {"total_step": 5, "tinit": 3, "tfinal": 2}, "leave no step"),
        (AdaLoRAConfig, {"beta1": 1.0}, "beta1 must be between"),
        (AdaLoRAConfig, {"orth_reg_weight": -1}, "orth_reg_weight must not be negative"),
    ],
)
def test_options_that_do_not_go_together(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


@pytest.mark.parametrize(
    "layer, config, words",
    [
        (torch.nn.Embedding(4, 3), LoRAConfig(lora_bias=True, target_modules=["0"]), "lora_bias"),
        (torch.nn.Embedding(4, 3), LoRAConfig(use_lora_fa=True, target_modules=["0"]), "LoRA-FA"),
        (torch.nn.Embedding(4, 3, max_norm=1.0), LoRAConfig(target_modules=["0"]), "max_norm"),
        (torch.nn.Embedding(4, 3, sparse=True), LoRAConfig(target_modules=["0"]), "sparse"),
        (torch.nn.Conv1d(2, 3, 3, dilation=2), LoRAConfig(target_modules=["0"]), "dilated"),
        (
            torch.nn.Conv1d(2, 3, 3, padding_mode="circular"),
            LoRAConfig(target_modules=["0"]),
            "circular",
        ),
        (torch.nn.Conv1d(4, 4, 3, groups=4), LoRAConfig(r=2, target_modules=["0"]), "4 groups do"),
        (
            torch.nn.Conv1d(4, 4, 3, groups=4),
            LoRAConfig(r=4, use_dora=True, target_modules=["0"]),
            "grouped convolution",
        ),
        (torch.nn.Conv1d(4, 4, 3), AdaLoRAConfig(target_modules=["0"]), "it is a Conv1d"),
        (torch.nn.Embedding(4, 4), VeRAConfig(target_modules=["0"]), "it is a Embedding"),
    ],
)
def test_layers_that_cannot_be_adapted_change_nothing(layer, config, words):
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match=words):
        fastlora.inject(model, config)
    assert model[0] is layer and all(p.requires_grad for p in model.parameters())


def test_a_grouped_convolution_computes_as_pefts_and_is_not_merged():
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    config = {"r": 2, "target_modules": ["0"]}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), copy.deepcopy(base))
    fastlora.inject(base, LoRAConfig(**config))
    randomise(trained(theirs).values())
    with torch.no_grad():
        for key, tensor in trained(base).items():
            tensor.copy_(trained(theirs)[key])
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(base(x), theirs(x))
    with pytest.raises(ValueError, match="grouped convolution"):
        fastlora.merge(base)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_dropout_on_a_convolution_is_pefts(options):
    """Both draw the mask by torch's own dropout, so that one seed gives both the same."""
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
    config = {"r": 2, "target_modules": ["0"], "lora_dropout": 0.4} | options
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), copy.deepcopy(base)).train()
    fastlora.inject(base.train(), LoRAConfig(**config))
    randomise(trained(theirs).values())
    with torch.no_grad():
        for key, tensor in trained(base).items():
            tensor.copy_(trained(theirs)[key])
    x = torch.randn(2, 4, 5, 5)
    outputs = []
    for model in (base, theirs):
        torch.manual_seed(3)
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for key, tensor in trained(base).items():
        torch.testing.assert_close(tensor.grad, trained(theirs)[key].grad, atol=1e-5, rtol=1e-5)
    single = torch.randn(4, 5, 5)  # without a batch
    torch.testing.assert_close(base.eval()(single), base(single[None])[0])
