"""accelerate for every method and kind of layer: what peft computes, in every situation."""

import copy
import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import layers
from fastlora.ops.dropout import draw_seed, keep_scale, stream_keep
from tests.integrations.twins import (
    CASES,
    LINEAR,
    assert_close,
    assert_gradients,
    base_of,
    build,
    config_of,
    fill,
    gradients,
    output,
    twins,
    values,
)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")


@pytest.mark.parametrize("which, method", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_values_and_gradients_are_pefts(tiny_llama, calls, which, method, dtype, tolerance):
    plain, fused, ids = twins(which, method, tiny_llama, dtype)
    y, own = output(plain, ids), output(fused, ids)
    assert len(calls) == len(layers(fused))
    assert_close(own, y, tolerance)
    for each in (y, own):
        each.square().mean().backward()
    expected = gradients(plain)
    assert len(expected) >= len(layers(plain))
    assert_gradients(gradients(fused), expected, tolerance)


@pytest.mark.parametrize("method", ["lora", "dora", "lora_bias"])
def test_bases_that_train_get_pefts_gradients(calls, method):
    plain, fused, ids = twins("sorts", method, None, torch.float64)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.requires_grad_(True)
        output(model, ids).square().mean().backward()
    assert_gradients(gradients(fused), gradients(plain), 1e-8)
    assert len(calls) == len(layers(fused))


# --- dropout -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 10)
        self.k_proj = nn.Linear(12, 6, bias=False)
        self.v_proj = nn.Linear(12, 8)
        self.o_proj = nn.Linear(24, 5)

    def forward(self, x):
        return self.o_proj(torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1))


class Replay(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, keep, p):
        super().__init__()
        self.keep, self.scale = keep, keep_scale(p)

    def forward(self, x):
        return x * self.keep.view(x.shape) * self.scale


@pytest.mark.parametrize("method", LINEAR)
def test_dropout_is_pefts_with_the_mask_that_was_drawn(calls, method):
    p, name = 0.4, "vera_dropout" if "vera" in method else "lora_dropout"
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = peft.get_peft_model(Attention().double(), config_of("", method, targets, **{name: p}))
    plain.double()
    fill(plain, method)
    fused = copy.deepcopy(plain)
    assert not fastlora.accelerate(fused).skipped
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    y = fused(leaf)
    assert len(calls) == 4
    torch.manual_seed(3)
    for target, width in zip(targets, (12, 12, 12, 24), strict=True):  # in the order of the calls
        keep = stream_keep((14, width), p, draw_seed(), torch.device("cpu"))
        module = plain.base_model.model.get_submodule(target)
        getattr(module, name)["default"] = Replay(keep, p)
    expected = plain(twin)
    assert_close(y, expected, 1e-9)
    for each in (y, expected):
        each.square().sum().backward()
    assert_close(leaf.grad, twin.grad, 1e-9)
    assert_gradients(gradients(fused), gradients(plain), 1e-9)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_of_convolutions_draws_pefts_masks(calls, method):
    plain, fused, _ = twins("sorts", method, None, torch.float64, lora_dropout=0.4)
    shapes = {"first": (2, 12, 6), "second": (2, 8, 5, 4), "third": (2, 6, 3, 5, 2)}
    for layer, twin in zip(layers(fused.train()), layers(plain.train()), strict=True):
        if layer.kind != "conv":
            continue
        x = torch.randn(shapes[layer.name], dtype=torch.float64)
        results = []
        for module in (layer.module, twin.module):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(4)
            y = module(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        assert_close(results[0], results[1], 1e-9)
    assert_gradients(gradients(fused), gradients(plain), 1e-9)
    assert len(calls) == 3


def test_dora_drops_only_while_the_layer_trains(tiny_llama):
    """In peft a DoRA layer in eval mode does not ask its dropout, whatever mode that is in."""
    plain, fused, ids = twins("llama", "dora", tiny_llama, lora_dropout=0.5)
    for model in (plain, fused):
        model.eval()
        for layer in layers(model):
            layer.module.lora_dropout.train()
    assert_close(values(fused, ids), values(plain, ids))


# --- states --------------------------------------------------------------------------------------

MERGING = [case for case in CASES if case[1] != "lora_fa"]


@pytest.mark.parametrize("which, method", MERGING)
def test_merging_and_disabling(tiny_llama, calls, which, method):
    more = {}
    if method == "lora_bias":  # which peft merges only where the base has a bias
        names = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "sorts": ["first", "out"]}
        more = {"target_modules": names[which]}
    plain, fused, ids = twins(which, method, tiny_llama, torch.float64, **more)
    both = plain.eval(), fused.eval()
    before = values(fused, ids)
    calls.clear()
    for model in both:
        model.merge_adapter()
    assert torch.equal(values(fused, ids), values(plain, ids)) and not calls
    for model in both:
        model.unmerge_adapter()
    assert_close(values(fused, ids), before, 1e-9)
    assert len(calls) == len(layers(fused))
    calls.clear()
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(values(fused, ids), values(plain, ids)) and not calls
    assert_close(values(fused, ids), before, 1e-9)
    unloaded = [model.merge_and_unload() for model in both]
    assert torch.equal(values(unloaded[1], ids), values(unloaded[0], ids))


@pytest.mark.parametrize("which, method", [c for c in CASES if "adalora" not in c[1]])
def test_switching_adapters(tiny_llama, calls, which, method):
    """A second adapter of the same method, then one of plain LoRA's form."""
    plain, fused, ids = twins(which, method, tiny_llama)
    _, targets, _ = base_of(which, tiny_llama)
    for model in (plain.eval(), fused.eval()):
        torch.manual_seed(8)
        model.add_adapter("other", config_of(which, method, targets[2:]))
        fill(model, method, "other", seed=5)
        model.set_adapter("other")
    report = fastlora.accelerate(fused)
    assert not [row for row in report.skipped if "0 adapters are active" not in row.detail]
    calls.clear()
    assert_close(values(fused, ids), values(plain, ids))
    assert len(calls) == len(layers(plain, "other"))
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    assert_close(values(fused, ids), values(plain, ids))
    for model in (plain, fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    assert_close(values(fused, ids), values(plain, ids))


@pytest.mark.parametrize("which", ["llama", "sorts"])
@pytest.mark.parametrize("method", ["lora", "lora_bias"])
def test_mixed_batches(tiny_llama, calls, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    names = {"adapter_names": ["__base__", "default"]}
    assert_close(values(fused.eval(), ids, **names), values(plain.eval(), ids, **names))
    assert not calls


def half_more(module, args, y):
    return tuple(part * 1.5 for part in y) if isinstance(y, tuple) else y * 1.5


@pytest.mark.parametrize(
    "which, method, part",
    [
        ("llama", "vera", lambda m: m.model.layers[0].self_attn.q_proj.base_layer),
        ("llama", "adalora", lambda m: m.model.layers[0].self_attn.k_proj.base_layer),
        ("llama", "lora_bias", lambda m: m.model.layers[0].mlp.up_proj.lora_B["default"]),
        ("sorts", "dora", lambda m: m.q_proj.lora_magnitude_vector["default"]),
        ("sorts", "dora", lambda m: m.words.lora_magnitude_vector["default"]),
        ("sorts", "dora", lambda m: m.first.lora_magnitude_vector["default"]),
        ("sorts", "lora", lambda m: m.words.base_layer),
        ("sorts", "lora", lambda m: m.second.lora_A["default"]),
    ],
)
def test_hooks_on_parts_run_as_in_peft(tiny_llama, calls, which, method, part):
    plain, fused, ids = twins(which, method, tiny_llama)
    for model in (plain, fused):
        part(model.base_model.model).register_forward_hook(half_more)
    assert_close(values(fused, ids), values(plain, ids))
    assert len(calls) == len(layers(fused)) - 1
    (row,) = fastlora.accelerate(fused).skipped
    assert "it carries hooks" in row.detail


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which, method", CASES)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(tiny_llama, calls, which, method, base):
    """bf16 bases with fp32 adapters, and autocast over fp32: no further off than twice peft's."""
    plain, fused, ids = twins(which, method, tiny_llama, base)
    exact = values(copy.deepcopy(plain).double(), ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        a, b = values(fused.eval(), ids), values(plain.eval(), ids)
    assert a.dtype == b.dtype and len(calls) == len(layers(fused))
    bound = 2 * (b - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (a - exact).abs().max() <= bound


@pytest.mark.parametrize("which, method", CASES)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_every_layer_gives_pefts_dtype(tiny_llama, which, method, base):
    plain, fused, ids = twins(which, method, tiny_llama, base)
    inputs = {}
    for layer in layers(plain):
        layer.module.register_forward_hook(lambda m, i, y, n=layer.name: inputs.update({n: (i, y)}))
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        values(plain, ids)
        for layer in layers(fused):
            given, expected = inputs[layer.name]
            with torch.no_grad():
                y = layer.module(*given)
            assert y.dtype == expected.dtype and y.shape == expected.shape, layer.name
            assert_close(y, expected, 0.1)


def test_a_zero_row_is_nan_in_peft_and_finite_here():
    plain, _ = build("sorts", "dora", None)
    with torch.no_grad():
        for layer in layers(plain):
            zero = layer.weight[:, 1] if layer.kind == "embedding" else layer.weight[1]
            for tensor in (
                zero,
                layer.lora_B[1],
                layer.tensors["lora_magnitude_vector"].view(-1)[1],
            ):
                tensor.zero_()
    fused = copy.deepcopy(plain)
    fastlora.accelerate(fused)
    for layer, twin in zip(layers(fused), layers(plain), strict=True):
        x = torch.randn((2, layer.weight.shape[1], 5, 5, 5)[: layer.weight.dim()])
        x = torch.tensor([1, 2]) if layer.kind == "embedding" else x
        y, expected = layer.module(x), twin.module(x)
        channels = -1 if layer.kind != "conv" else 1
        y, expected = y.movedim(channels, 0), expected.movedim(channels, 0)
        assert expected[1].isnan().all() and y.isfinite().all()
        assert_close(y[2:], expected[2:])
        y.square().mean().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(fused).values())


def test_dora_follows_weights_that_change(tiny_llama, calls):
    """The remembered norm does not outlive what it was computed from."""
    plain, fused, ids = twins("sorts", "dora", None)
    for step in range(3):
        for model in (plain, fused):
            with torch.no_grad():
                for layer in layers(model):
                    layer.lora_B.add_(0.05)
                    if step == 1:
                        layer.weight.mul_(1.1)
                    if step == 2:
                        layer.module.scale_layer(0.5)
        assert_close(values(fused, ids), values(plain, ids))


# --- whole models --------------------------------------------------------------------------------


def losses(model, ids, method, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(1, steps + 1):
        loss = output(model, ids).square().mean()
        loss.backward()
        optimizer.step()
        if method.startswith("adalora"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("which, method", CASES)
def test_training_gives_pefts_losses(tiny_llama, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    expected = losses(plain.train(), ids, method)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses(fused.train(), ids, method), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_llama, method, reentrant):
    plain, fused, ids = twins("llama", method, tiny_llama)
    expected = losses(plain.train(), ids, method, 3)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    fused.config.use_cache = False
    got = losses(fused.train(), ids, method, 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_replay_dropout(tiny_llama, method, reentrant):
    name = "vera_dropout" if method == "vera" else "lora_dropout"
    found = []
    for checkpointed in (False, True):
        _, fused, ids = twins("llama", method, tiny_llama, **{name: 0.3})
        if checkpointed:
            fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
            fused.enable_input_require_grads()
            fused.config.use_cache = False
        torch.manual_seed(2)
        output(fused.train(), ids).square().mean().backward()
        found.append(gradients(fused))
    assert_gradients(found[1], found[0], 1e-6)


@pytest.mark.parametrize("which, method", CASES)
def test_saving_and_loading(tiny_llama, tmp_path, calls, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    tensors, configs = (
        [(tmp_path / folder / name).read_bytes() for folder in ("plain", "fused")]
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert tensors[0] == tensors[1]
    # peft writes its set of targets in any order
    configs = [json.loads(config) for config in configs]
    configs = [config | {"target_modules": set(config["target_modules"])} for config in configs]
    assert configs[0] == configs[1]
    base, _, _ = base_of(which, tiny_llama)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "fused").eval()
    report = fastlora.accelerate(again, strict=True)
    assert len(report.fused) == len(layers(fused))
    assert_close(values(again, ids), values(plain.eval(), ids))
    assert len(calls) == len(layers(fused))


@pytest.mark.parametrize("which, method", CASES)
def test_it_prints_and_restores_as_peft(tiny_llama, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    assert repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    values(fused, ids)
    assert fastlora.restore(fused) == len(layers(plain))
    pairs = zip(plain.modules(), fused.modules(), strict=True)
    for one, other in pairs:
        assert type(one) is type(other) and one.__dict__.keys() == other.__dict__.keys()
    assert torch.equal(values(fused, ids), values(plain, ids))


COMPILED = [("sorts", "dora"), ("llama", "vera"), ("llama", "adalora"), ("sorts", "lora_bias")]


@pytest.mark.parametrize("which, method", COMPILED)
def test_accelerated_models_compile_whole(tiny_llama, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    y, expected = output(compiled, ids), output(plain, ids)
    assert_close(y, expected)
    for each in (y, expected):
        each.square().mean().backward()
    assert_gradients(gradients(fused), gradients(plain), 1e-4)


@pytest.mark.parametrize(
    "which, method", [("sorts", "dora"), ("llama", "vera"), ("llama", "adalora")]
)
def test_transforms_run_as_in_peft(tiny_llama, which, method):
    plain, fused, ids = twins(which, method, tiny_llama)
    results = []
    for model in (plain, fused):
        before = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, model=model):
            given = ((), {"input_ids": ids}) if which == "llama" else (ids, {})
            y = torch.func.functional_call(model, parameters, *given)
            return getattr(y, "logits", y).square().mean()

        results.append(torch.func.grad(loss)(before))
    assert_gradients(results[1], results[0])
    assert_close(values(fused, ids), values(plain, ids))  # nothing of the transform is remembered


# --- LoRA-FA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_lora_fa_keeps_no_input(frozen):
    """With A frozen nothing of an input's size [M, K] is saved, K being nobody else's width."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(Attention(), config)
    fill(model, "lora_fa" if frozen else "lora")
    report = fastlora.accelerate(model)
    assert all(("A frozen" in row.detail) == frozen for row in report.fused)
    x = torch.randn(9, 12, requires_grad=True) * 1.0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    sizes = [tuple(t.shape) for t in saved]
    assert ((9, 12) in sizes, (9, 24) in sizes) == (not frozen, not frozen)
    y.sum().backward()


# --- what is left to peft ------------------------------------------------------------------------


def test_adalora_without_ranks_runs_pefts_forward(tiny_llama, tmp_path, calls):
    plain, ids = build("llama", "adalora", tiny_llama)
    names = [
        n for n, _ in plain.base_model.model.named_parameters() if n.endswith("lora_E.default")
    ]
    plain.peft_config["default"].rank_pattern = {
        name: [("q_proj" not in name) and i % 2 == 0 for i in range(5)] for name in names
    }
    with torch.no_grad():
        for name, parameter in plain.base_model.model.named_parameters():
            if name in names:
                mask = torch.tensor(plain.peft_config["default"].rank_pattern[name])
                parameter.mul_(mask[:, None])
    plain.save_pretrained(tmp_path)
    base, _, _ = base_of("llama", tiny_llama)
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    twin = copy.deepcopy(again)
    report = fastlora.accelerate(again, strict=True)
    said = {row.name.rpartition(".")[2]: row.detail for row in report.fused}
    assert "r=0: the base alone" in said["q_proj"] and "AdaLoRA, r=3" in said["k_proj"]
    y, expected = output(again, ids), output(twin, ids)
    assert len(calls) == len(layers(plain)) - 2
    assert_close(y, expected)
    for each in (y, expected):
        each.square().mean().backward()
    ours, theirs = gradients(again), gradients(twin)
    empty = [n for n, g in theirs.items() if g.numel() == 0]
    assert empty and all(n in ours for n in empty)
    for name in empty:
        del ours[name], theirs[name]
    assert_gradients(ours, theirs)


def test_adalora_trains_its_ranknum_where_peft_does(tiny_llama):
    """Casting the parts of a layer over a bfloat16 base, peft makes ranknum trainable."""
    plain, fused, ids = twins("llama", "adalora", tiny_llama, torch.bfloat16)
    name = next(n for n, p in plain.named_parameters() if "ranknum" in n and p.requires_grad)
    for model in (plain, fused):
        output(model, ids).float().square().mean().backward()
    mine, theirs = (dict(m.named_parameters())[name].grad.float() for m in (fused, plain))
    torch.testing.assert_close(mine, theirs, rtol=0.1, atol=1e-6)


def test_ranknum_is_read_from_a_gpu_only_when_it_may_have_changed():
    """By a stand-in, as there may be no GPU: reading it waits for the device."""

    class Number:
        is_cpu, _version, reads = False, 0, 0

        def is_inference(self):
            return False

        def data_ptr(self):
            return 7

        def item(self):
            self.reads += 1
            return 4.0

    model = peft.inject_adapter_in_model(config_of("", "adalora", ["q_proj"]), Attention())
    fastlora.accelerate(model)
    layer, number = model.q_proj, Number()
    for _ in range(3):
        assert layer._rank("default", number) == pytest.approx(4.00001)
    assert number.reads == 1
    number._version = 1
    layer._rank("default", number)
    layer._rank("other", number)
    assert number.reads == 3


def test_fan_in_fan_out_of_every_linear(calls):
    transformers = pytest.importorskip("transformers")
    for method in ("lora", "dora", "lora_bias", "vera", "adalora"):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32
        )
        base = transformers.GPT2LMHeadModel(config).eval()
        targets = ["c_attn", "c_proj"]
        plain = peft.get_peft_model(base, config_of("", method, targets, fan_in_fan_out=True))
        fill(plain, method)
        fused = copy.deepcopy(plain)
        assert not fastlora.accelerate(fused).skipped
        ids = torch.arange(24).view(2, 12)
        calls.clear()
        y, expected = output(fused, ids), output(plain, ids)
        assert len(calls) == 6
        assert_close(y, expected)
        for each in (y, expected):
            each.square().mean().backward()
        assert_gradients(gradients(fused), gradients(plain), 1e-4)


def adapted(module, config=None, **options):
    model = nn.ModuleDict({"layer": module})
    config = config or peft.LoraConfig(r=2, target_modules=["layer"], **options)
    return peft.inject_adapter_in_model(config, model)


class Scaled(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def scaled_by_attribute():
    base = nn.Embedding(9, 6)
    base.embed_scale = torch.tensor(2.0)
    return base


LEFT = [
    (lambda: adapted(Scaled(9, 6)), "its base is a Scaled, not an nn.Embedding"),
    (lambda: adapted(scaled_by_attribute()), "scales what it looks up"),
    (lambda: adapted(nn.Embedding(9, 6, max_norm=1.0)), "max_norm"),
    (lambda: adapted(nn.Embedding(9, 6, sparse=True)), "gradients of its base are sparse"),
    (lambda: adapted(nn.Embedding(9, 6), init_lora_weights="mica"), "MiCAEmbeddingVariant"),
    (lambda: adapted(nn.Linear(6, 6), init_lora_weights="mica"), "MiCALinearVariant"),
    (lambda: adapted(nn.Conv2d(4, 4, 3, dilation=2, padding="same")), "dilated"),
    (lambda: adapted(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "'circular'"),
    (lambda: adapted(nn.Conv2d(4, 4, 3, groups=2), use_dora=True), "grouped convolution"),
    (
        lambda: adapted(
            nn.Conv2d(4, 4, 3),
            peft.AdaLoraConfig(target_modules=["layer"], total_step=9, init_r=2, target_r=1),
        ),
        "adalora.layer.SVDConv2d has no fused form",
    ),
    (
        lambda: adapted(
            nn.Linear(6, 6), peft.IA3Config(target_modules=["layer"], feedforward_modules=[])
        ),
        "ia3.layer.Linear has no fused form",
    ),
]


@pytest.mark.parametrize("make, reason", LEFT)
def test_what_is_left_to_peft_says_why(calls, make, reason):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and "ranknum" not in name:
                parameter.normal_(std=0.3)
    layer, base = model["layer"], model["layer"].base_layer
    if isinstance(base, nn.Embedding):
        x = torch.tensor([[1, 2, 8]])
    else:
        x = (
            torch.randn(2, 6)
            if isinstance(base, nn.Linear)
            else torch.randn((2, 4, 8, 8)[: base.weight.dim()])
        )
    with torch.no_grad():
        expected = layer(x)
        (row,) = fastlora.accelerate(model).skipped
        assert reason in row.detail
        assert torch.equal(layer(x), expected) and not calls
    with pytest.raises(ValueError, match="strict: 1 adapted layers cannot be fused"):
        fastlora.accelerate(model, strict=True)


def test_grouped_convolutions(calls):
    torch.manual_seed(0)
    plain = adapted(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding="valid"), lora_bias=True)
    fill(plain, "lora")
    fused = copy.deepcopy(plain)
    assert not fastlora.accelerate(fused).skipped
    x = torch.randn(2, 4, 9, 9)
    y, expected = fused["layer"](x), plain["layer"](x)
    assert_close(y, expected)
    for each in (y, expected):
        each.square().mean().backward()
    assert_gradients(gradients(fused), gradients(plain))
    assert len(calls) == 1
    assert_close(fused["layer"](x[0]), plain["layer"](x[0]))  # without a batch: peft's
    assert len(calls) == 1


def test_vera_layers_of_one_width_share_their_projections(tiny_llama):
    """Over a bf16 base the model's one pair is cast once for each width, not by every layer."""
    _, fused, ids = twins("llama", "vera", tiny_llama, torch.bfloat16)
    modules = {layer.name: layer.module for layer in layers(fused)}

    def parts(name, x):
        layer = modules[f"model.layers.{name}"]
        member = layer.operands(layer.look(layer, x), x)
        assert member.lora_A.is_contiguous() and member.lora_A.dtype == torch.bfloat16
        return member.lora_A, member.lora_B

    x, wide = torch.randn(1, 48).bfloat16(), torch.randn(1, 80).bfloat16()
    first, other = parts("0.self_attn.q_proj", x), parts("1.self_attn.o_proj", x)
    assert first[0] is other[0] is parts("0.mlp.up_proj", x)[0] and first[1] is other[1]
    assert parts("0.mlp.down_proj", wide)[0] is parts("1.mlp.down_proj", wide)[0] is not first[0]
    again = parts("0.self_attn.q_proj", x)
    assert again[0] is first[0] and again[1] is first[1]
    with torch.no_grad():
        modules["model.layers.1.mlp.down_proj"].vera_A["default"].mul_(2.0)
    changed = parts("0.self_attn.q_proj", x)
    assert torch.equal(changed[0], 2 * first[0]) and changed[1] is first[1]
    y = values(fused, ids)
    fastlora.restore(fused)
    assert (values(fused, ids) - y).abs().max() < 0.05


@pytest.mark.parametrize(
    "which, method", [("sorts", "dora"), ("llama", "vera"), ("llama", "adalora")]
)
def test_training_after_inference_mode(tiny_llama, which, method):
    """What is remembered there (norms, projections) serves the training that follows."""
    plain, fused, ids = twins(which, method, tiny_llama, torch.bfloat16)
    with torch.inference_mode():
        output(fused, ids)
    for model in (plain, fused):
        output(model, ids).float().square().mean().backward()
    expected, found = gradients(plain), gradients(fused)
    assert expected.keys() == found.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
