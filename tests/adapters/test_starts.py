"""PiSSA: its identities in float64, peft's factors, what is refused, and saved differences."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.adapters import layers, starts
from fastlora.adapters.starts import stacks
from fastlora.nn import LoRALinear

peft = pytest.importorskip("peft")
INITS = ["pissa", "pissa_niter_4", "pissa_niter_16"]
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def plain(dtype=torch.float64):
    """Two linears of one shape and two others; spectra that fall by half, as one can truncate."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20, bias=False),
        nn.Tanh(), nn.Linear(20, 31),
    ).double()  # fmt: skip
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                U, S, Vh = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_(U * 2 * 0.5 ** torch.arange(len(S)) @ Vh)
    return model.to(dtype)


def started(init="pissa", dtype=torch.float64, **options):
    model = plain(dtype)
    options = {"r": 4, "lora_alpha": 6} | options
    fastlora.inject(model, LoRAConfig(init_lora_weights=init, **options))
    return model


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(7, 24, generator=generator, dtype=torch.float64).to(dtype)


def move(model):
    """What training does to an adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers(model):
            for tensor in layer.tensors.values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.1 * noise.to(tensor.device, tensor.dtype))
    return model


def weights(model):
    return [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]


def product(layer):
    return layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_weight_and_start_are_the_weight_and_its_leading_part(init, rslora):
    model = started(init, use_rslora=rslora)
    # four iterations of a spectrum that falls by half a step leave 2^-5 to the ninth and less
    near = {"atol": 1e-9, "rtol": 1e-9}
    for layer, W in zip(layers(model), weights(plain()), strict=True):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(layer.weight + product(layer), W, **EXACT)
        residual = torch.linalg.matrix_norm(layer.weight, 2)
        torch.testing.assert_close(residual, S[4], **near)
        torch.testing.assert_close(product(layer), (U[:, :4] * S[:4]) @ Vh[:4], **near)
        # balanced: both hold √(S/s)
        A, B = layer.lora_A, layer.lora_B
        torch.testing.assert_close(A @ A.T, torch.diag(S[:4] / layer.scaling), **near)
        torch.testing.assert_close(B.T @ B, torch.diag(S[:4] / layer.scaling), **near)
        assert A.requires_grad and B.requires_grad and not layer.weight.requires_grad


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("init", INITS)
def test_the_output_stays(init, options):
    model = started(init, rank_pattern={"2": 7}, alpha_pattern={"4": 1.5}, **options)
    assert [layer.r for layer in layers(model)] == [4, 7, 4, 4]
    expected = plain()(batch())
    torch.testing.assert_close(model(batch()), expected, **EXACT)
    move(model)
    assert not torch.allclose(model(batch()), expected, atol=1e-2)
    with fastlora.disabled(model):
        torch.testing.assert_close(model(batch()), expected, **EXACT)
    fastlora.unload(model)
    torch.testing.assert_close(model(batch()), expected, **EXACT)


def test_whole_and_randomised_decompositions_agree():
    for whole, random in zip(layers(started()), layers(started("pissa_niter_8")), strict=True):
        torch.testing.assert_close(product(whole), product(random), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("init", INITS)
def test_two_starts_are_equal_whatever_the_global_generator(init):
    one = started(init)
    torch.manual_seed(99)
    model = plain()
    torch.manual_seed(98)
    fastlora.inject(model, LoRAConfig(r=4, lora_alpha=6, init_lora_weights=init))
    for a, b in zip(one.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_drawn_from_the_global_generator():
    """A and B are written by the decomposition, and not first at random."""
    model = plain()
    before = torch.get_rng_state()
    fastlora.inject(model, LoRAConfig(r=4, init_lora_weights="pissa_niter_4"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_is_rounded_once(dtype):
    model = started("pissa_niter_4", dtype)
    for layer, W in zip(layers(model), weights(plain(dtype)), strict=True):
        assert layer.lora_A.dtype == torch.float32 and layer.weight.dtype == dtype
        exact = W.double() - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        # half a unit in the last place, and float32's own error before it
        half = torch.finfo(dtype).eps / 2
        error = (layer.weight.double() - exact).abs()
        assert (error <= half * exact.abs() + 1e-6 * W.double().abs().max()).all()


def test_layers_of_one_shape_are_decomposed_together_within_the_limit(monkeypatch):
    model = plain()
    fastlora.inject(model, LoRAConfig(r=4))
    found = {layer.name: layer.module for layer in layers(model)}
    assert list(stacks(found)) == [["0"], ["2", "4"], ["6"]]
    monkeypatch.setattr(starts, "_STACK", 20 * 20 * 8 * 2 - 1)
    assert list(stacks(found)) == [["0"], ["2"], ["4"], ["6"]]
    small = started("pissa_niter_4")
    monkeypatch.undo()
    for a, b in zip(layers(small), layers(started("pissa_niter_4")), strict=True):
        torch.testing.assert_close(product(a), product(b), **EXACT)


# --- peft's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_the_factors_are_pefts_up_to_signs(init, rslora):
    options = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "init_lora_weights": init}
    names = ["0", "2", "4", "6"]
    model = plain(torch.float32)
    fastlora.inject(model, LoRAConfig(target_modules=names, **options))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        plain(torch.float32), peft.LoraConfig(target_modules=names, **options)
    )
    for mine, other in zip(layers(model), layers(theirs), strict=True):
        signs = torch.sign((mine.lora_A * other.lora_A).sum(1))
        assert (signs != 0).all()
        near = {"atol": 2e-6, "rtol": 2e-6}  # float32, entries below 1, gaps of a half
        torch.testing.assert_close(mine.lora_A * signs[:, None], other.lora_A, **near)
        torch.testing.assert_close(mine.lora_B * signs, other.lora_B, **near)
        torch.testing.assert_close(mine.weight, other.weight, **near)


@pytest.mark.parametrize("use_dora", [False, True])
def test_doras_magnitudes_are_pefts(use_dora):
    options = {"r": 4, "lora_alpha": 6, "use_dora": use_dora, "init_lora_weights": "pissa"}
    names = ["0", "2", "4", "6"]
    model = plain(torch.float32)
    fastlora.inject(model, LoRAConfig(target_modules=names, **options))
    theirs = peft.get_peft_model(
        plain(torch.float32), peft.LoraConfig(target_modules=names, **options)
    )
    x = batch(torch.float32)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-6, rtol=1e-6)
    for mine, other in zip(layers(model), layers(theirs), strict=True):
        assert mine.tensors.keys() == other.tensors.keys()
        if use_dora:
            m = "lora_magnitude_vector"
            torch.testing.assert_close(mine.tensors[m], other.tensors[m], atol=1e-6, rtol=1e-6)


# --- on disk -----------------------------------------------------------------------------------

SAVED = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"rank_pattern": {"2": 7}, "alpha_pattern": {"4": 1.5}},
    # which peft's own conversion refuses
    {"use_rslora": True, "rank_pattern": {"2": 7}, "alpha_pattern": {"4": 1.5}},
]


@pytest.mark.parametrize("options", SAVED)
def test_what_is_saved_gives_the_model_over_the_untouched_base(options, tmp_path):
    # with lora_bias peft says of the linear without a bias that it cannot be merged
    targets = ["0", "2", "6"] if "lora_bias" in options else ["0", "2", "4", "6"]
    options = {k: v for k, v in options.items() if k != "alpha_pattern" or "4" in targets}
    model = move(started(target_modules=targets, **options))
    fastlora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    expected = model(batch())
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(batch()), expected, **EXACT)
    again = plain()
    fastlora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(batch()), expected, **EXACT)
    for mine, loaded in zip(layers(model), layers(again), strict=True):
        assert loaded.r == 2 * mine.r and loaded.scaling == pytest.approx(mine.scaling, rel=1e-12)
        assert loaded.module.start is None


def test_the_conversion_is_the_difference(tmp_path):
    """methods.md: W₀ + s(BA − B₀A₀) = W_res + sBA; right after the start nothing is left."""
    model = started()
    for layer in layers(model):
        saved = layer.module.saved()
        whole = saved["lora_B.weight"] @ saved["lora_A.weight"]
        assert whole.abs().max() < 1e-12 and saved["lora_A.weight"].shape[0] == 8
    move(model)
    for layer, W in zip(layers(model), weights(plain()), strict=True):
        saved = layer.module.saved()
        change = layer.scaling * saved["lora_B.weight"] @ saved["lora_A.weight"]
        torch.testing.assert_close(W + change, layer.weight + product(layer), **EXACT)


def test_pefts_own_conversion_loads_here(tmp_path):
    names = ["0", "2", "4", "6"]
    theirs = peft.get_peft_model(
        plain(torch.float32), peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=names)
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    move(theirs)
    theirs.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    model = plain(torch.float32)
    fastlora.load_adapter(model, tmp_path / "out")
    x = batch(torch.float32)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert all(layer.r == 8 for layer in layers(model))


def test_saved_while_merged_and_after_resizing(tmp_path):
    model = move(started())
    expected = model(batch())
    fastlora.merge(model)
    fastlora.save_adapter(model, tmp_path / "merged")
    again = plain()
    fastlora.load_adapter(again, tmp_path / "merged")
    torch.testing.assert_close(again(batch()), expected, **EXACT)
    fastlora.unmerge(model)
    fastlora.resize(model, 3)
    fastlora.save_adapter(model, tmp_path / "resized")
    again = plain()
    fastlora.load_adapter(again, tmp_path / "resized")
    assert all(layer.r == 7 for layer in layers(again))
    torch.testing.assert_close(again(batch()), model(batch()), **EXACT)


def test_a_file_is_not_loaded_over_what_a_start_left(tmp_path):
    other = plain()
    fastlora.inject(other, LoRAConfig(r=4, lora_alpha=6))
    fastlora.save_adapter(other, tmp_path)
    model = started()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="0's base weight is what its start"):
        fastlora.load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- what users do with a model ----------------------------------------------------------------


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda m: torch.load(torched(m), weights_only=False)]
)
def test_a_copy_saves_the_same(through, tmp_path):
    model = move(started())
    expected = model(batch())
    fastlora.save_adapter(through(model), tmp_path)
    again = plain()
    fastlora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(batch()), expected, **EXACT)


def torched(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_0", True])
def test_a_resumed_run_saves_the_same(init, tmp_path):
    """Also where it was injected with another start than the state has, or with none."""
    model = move(started("pissa_niter_4"))
    state = torch.load(torched(model.state_dict()))
    resumed = started(init)
    assert resumed.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    for name, one in model.named_modules():
        if hasattr(one, "start"):
            assert all(map(torch.equal, one.start, resumed.get_submodule(name).start))
    fastlora.save_adapter(resumed, tmp_path)
    again = plain()
    fastlora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(batch()), model(batch()), **EXACT)


def test_a_state_without_a_start_or_with_a_wrong_one_is_reported():
    model, other = started(), started(True)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_A_start"):
        model.load_state_dict(other.state_dict())
    state = model.state_dict()
    assert not any("start" in key for key in other.state_dict())
    state["0.lora_A_start"] = torch.zeros(4, 23)
    with pytest.raises(RuntimeError, match="no factors of a weight"):
        other.load_state_dict(state)
    del state["0.lora_A_start"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_A_start"):
        other.load_state_dict(state)


@pytest.mark.parametrize("init", ["pissa", True])
def test_a_start_comes_with_its_weight_only(init):
    """What another weight has lost would be put into this one, which has not."""
    state = {k: v for k, v in move(started("pissa_niter_0")).state_dict().items() if "lora_" in k}
    model = started(init)
    before = [layer.module.start for layer in layers(model)]
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert unexpected == [key for key in state if "start" in key]
    assert all(layer.module.start is own for layer, own in zip(layers(model), before, strict=True))
    with fastlora.disabled(model):
        torch.testing.assert_close(model(batch()), plain()(batch()), **EXACT)
    fastlora.unload(model)
    torch.testing.assert_close(model(batch()), plain()(batch()), **EXACT)


def test_it_is_no_parameter_and_no_buffer_and_stays_on_the_cpu():
    model, other = started(), started(True)
    for kind in ("named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(model, kind)()] == [n for n, _ in getattr(other, kind)()]
    model.to("meta")
    assert all(t.device.type == "cpu" for layer in layers(model) for t in layer.module.start)


# --- what is refused, and interruptions --------------------------------------------------------


def refused(model, match, error=ValueError, **options):
    before = copy.deepcopy(model.state_dict())
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        fastlora.inject(model, LoRAConfig(**({"r": 4, "init_lora_weights": "pissa"} | options)))
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0))
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not layers(model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(init, value):
    model = plain()
    with torch.no_grad():
        model[4].weight[3, 5] = value
    refused(model, "the weight of 4 has NaN or infinity", init_lora_weights=init)


def test_ranks_scalings_tied_weights_and_other_layers():
    refused(plain(), r"0 \[20, 24\] has only 20 singular values, and r is 21", r=21)
    refused(plain(), "0 has a scaling of 0", lora_alpha=0)
    refused(plain(), "0 has a scaling of -2", lora_alpha=-8)
    tied = plain()
    tied[4].weight = tied[2].weight
    refused(tied, "2 shares its weight with 4")
    embedded = nn.Sequential(nn.Embedding(20, 24), plain()[0])
    refused(embedded, "PiSSA starts linears only", target_modules=["0", "1"])
    head = nn.Sequential(nn.Embedding(31, 20), plain()[6])
    head[0].weight = head[1].weight
    refused(head, "1 shares its weight with 0")
    convolved = nn.Sequential(nn.Conv1d(8, 8, 3), plain()[0])
    refused(convolved, "PiSSA starts linears only", target_modules=["0", "1"])


def test_a_model_without_values():
    with pytest.raises(ValueError, match="the weight of 0 is on the meta device"):
        fastlora.inject(plain().to("meta"), LoRAConfig(r=4, init_lora_weights="pissa"))


@pytest.mark.parametrize("name", ["olora", "pissa_niter_", "pissa_niter_x", "PiSSA", 1, None])
def test_other_starts_are_refused(name):
    with pytest.raises(ValueError, match="init_lora_weights must be True, 'pissa' or"):
        LoRAConfig(init_lora_weights=name)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interruption_leaves_the_model_as_it_was(at, monkeypatch):
    """While decomposing, and while writing."""
    for where in ("principal", "Start"):
        calls, original = [], getattr(starts, where)

        def interrupting(*args, calls=calls, original=original):
            calls.append(args)
            if len(calls) > at:
                raise KeyboardInterrupt
            return original(*args)

        if where == "principal":
            monkeypatch.setattr(starts, where, interrupting)
        else:
            monkeypatch.setattr(starts.Start, "of", staticmethod(interrupting))
        if (where, at) != ("principal", 3):  # there are three shapes only
            refused(plain(torch.bfloat16), None, KeyboardInterrupt)
            assert len(calls) == at + 1
        monkeypatch.undo()


def test_an_interruption_between_the_modules_too():
    model = plain()
    layer = model[4]
    original = nn.Sequential.__setattr__

    class Stubborn(nn.Sequential):
        def __setattr__(self, name, value):
            if name == "4" and value is not layer and self.armed:
                raise KeyboardInterrupt
            original(self, name, value)

    model.armed = True
    model.__class__ = Stubborn
    refused(model, None, KeyboardInterrupt)
    assert model[4] is layer and type(model[2]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_finite(dtype):
    """Also where squares leave the range."""
    largest = torch.full((3, 40), torch.finfo(dtype).max, dtype=dtype)
    assert starts._is_finite(largest)
    for value in (math.inf, -math.inf, math.nan):
        spoilt = torch.ones(3, 40, dtype=dtype)
        spoilt[1, 17] = value
        assert not starts._is_finite(spoilt)


MOST = torch.finfo(torch.float16).max


def taken(weight, product, dtype, known=True):
    """A layer whose weight is ``weight`` throughout, and factors with sBA = ``product``."""
    linear = nn.Linear(4, 3, bias=False).to(dtype)
    nn.init.constant_(linear.weight, weight)
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=2)
    A, B = torch.ones(2, 4), torch.full((3, 2), product / 2)
    return starts.Taken("layer", layer, A, B, weight_is_finite=known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_usual_factors_are_known_to_leave_finite_weights(dtype, monkeypatch):
    one = taken(0.5, 0.25, dtype)
    monkeypatch.setattr(starts, "_is_finite", lambda tensor: pytest.fail("it is read"))
    assert one.leaves_finite(one.residual())


@pytest.mark.parametrize(
    ("weight", "product", "known"),
    [
        (MOST, -7.9, True),  # not read: half a last place is 16
        (MOST, -20.0, True),
        (-MOST, 20.0, True),
        (MOST, 20.0, True),
        (1.0, float("nan"), True),
        (1.0, float("inf"), True),
        (float("nan"), 0.1, False),
        (float("inf"), 0.1, False),
        (1.0, 0.1, False),
    ],
)
def test_what_is_not_known_is_read(weight, product, known):
    one = taken(weight, product, torch.float16, known)
    residual = one.residual()
    assert one.leaves_finite(residual) == bool(torch.isfinite(residual).all())
