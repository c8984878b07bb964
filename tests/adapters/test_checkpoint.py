"""Adapters on disk: our files in peft, peft's here, and every kind of bad file refused whole."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig
from fastlora.adapters import checkpoint, layers

peft = pytest.importorskip("peft")
IDS = torch.arange(24).view(2, 12) % 96


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def randomise(model, adapter=None):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers(model, adapter):
            layer.lora_B.normal_(std=0.1)


CONFIGS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 12, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 4,
        "rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
    {"r": 2, "target_modules": r".*layers\.1\.mlp\.\w+_proj", "lora_dropout": 0.1},
    {"r": 2, "exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    {"r": 2, "target_modules": ["lm_head", "v_proj"]},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_what_we_save_peft_loads_and_so_do_we(tiny_llama, tmp_path, options):
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(**options))
    randomise(model)
    fastlora.save_adapter(model, tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = logits(model)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    ours = tiny_llama()
    report = fastlora.load_adapter(ours, tmp_path / "a")
    assert torch.equal(logits(ours), expected)
    assert len(report.fused) == len(layers(model))
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("options", CONFIGS)
def test_what_peft_saves_we_load(tiny_llama, tmp_path, options):
    options = {"target_modules": "all-linear"} | options
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny_llama()
    fastlora.load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert [x.scaling for x in layers(ours)] == [x.scaling for x in layers(theirs)]
    assert [x.name for x in layers(ours)] == [x.name for x in layers(theirs)]


def test_half_precision_round_trip(tiny_llama, tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    fastlora.save_adapter(model, tmp_path / "a")
    again = tiny_llama(dtype=torch.bfloat16)
    fastlora.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert layers(again)[0].lora_A.dtype == torch.float32


def test_loading_into_the_adapter_that_is_there(tiny_llama, tmp_path):
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4))
    randomise(model)
    fastlora.save_adapter(model, tmp_path / "a")
    other = tiny_llama()
    fastlora.inject(other, LoRAConfig(r=4))
    parameters = [layer.lora_A for layer in layers(other)]
    fastlora.load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert all(a is layer.lora_A for a, layer in zip(parameters, layers(other), strict=True))
    different = tiny_llama()
    fastlora.inject(different, LoRAConfig(r=4, lora_alpha=16))
    with pytest.raises(
        ValueError, match=r"q_proj has lora_alpha=16.0, the file has lora_alpha=8.0"
    ):
        fastlora.load_adapter(different, tmp_path / "a")
    fastlora.merge(other)
    with pytest.raises(ValueError, match="is merged; unmerge"):
        fastlora.load_adapter(other, tmp_path / "a")


class Nested(torch.nn.Module):
    """A name that is also the end of another's path."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})

    def forward(self, x):
        return self.block["fc"](self.fc(x))


@pytest.mark.parametrize(
    "options", [{"target_modules": "fc"}, {"target_modules": ["fc"], "rank_pattern": {"^fc": 3}}]
)
def test_a_saved_config_means_just_the_layers_it_was_saved_from(tmp_path, options):
    model = Nested()
    base = Nested()
    base.load_state_dict(model.state_dict())
    fastlora.inject(model, LoRAConfig(r=2, **options))
    randomise(model)
    fastlora.save_adapter(model, tmp_path / "a")
    x = torch.randn(3, 4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(x), model(x))
    fastlora.load_adapter(base, tmp_path / "a")
    assert [(v.name, v.r) for v in layers(base)] == [(v.name, v.r) for v in layers(model)]
    assert torch.equal(base(x), model(x))


def test_another_dropout_in_the_file_is_reported(tiny_llama, tmp_path):
    folder = saved(tiny_llama, tmp_path / "a")
    edit_config(folder, lora_dropout=0.25)
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    report = fastlora.load_adapter(model, folder)
    assert len(report.fused) == 4 and "the file says 0.25" in report.skipped[0].detail


def saved(tiny_llama, folder):
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    fastlora.save_adapter(model, folder)
    return folder


def edit_config(folder, **changes):
    path = folder / checkpoint.CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_digits(folder):
    path = folder / checkpoint.CONFIG_NAME
    path.write_text(path.read_text().replace('"r": 4', '"r": ' + "4" * 5000))


def edit_weights(folder, change):
    path = folder / checkpoint.WEIGHTS_NAME
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def nan_inside(tensors):
    tensors[KEY][1, 2] = float("nan")


def truncate(folder):
    path = folder / checkpoint.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder):
    (folder / checkpoint.WEIGHTS_NAME).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    "spoil, error, words",
    [
        (lambda f: (f / checkpoint.CONFIG_NAME).unlink(), FileNotFoundError, "adapter's folder"),
        (
            lambda f: (f / checkpoint.WEIGHTS_NAME).unlink(),
            FileNotFoundError,
            "holds no adapter_model",
        ),
        (only_pickle, FileNotFoundError, "a pickle, which is not opened"),
        (truncate, ValueError, "truncated or no safetensors"),
        (lambda f: (f / checkpoint.WEIGHTS_NAME).write_bytes(b""), ValueError, "truncated or no"),
        (lambda f: (f / checkpoint.CONFIG_NAME).write_text("{"), ValueError, "not readable JSON"),
        (
            lambda f: (f / checkpoint.CONFIG_NAME).write_bytes(b"\xff\xfe"),
            ValueError,
            "not readable",
        ),
        (
            lambda f: (f / checkpoint.CONFIG_NAME).write_text("[]"),
            ValueError,
            "must hold an object",
        ),
        (lambda f: edit_config(f, peft_type="VERA"), ValueError, "lora_alpha=8 is an option"),
        (lambda f: edit_config(f, peft_type=["LORA"]), ValueError, r"\['LORA'\] is none of LORA"),
        (lambda f: edit_config(f, lora_alpha=10**400), ValueError, "lora_alpha must be"),
        (lambda f: edit_digits(f), ValueError, "not readable JSON: .*digits"),
        (lambda f: edit_config(f, peft_type="IA3"), ValueError, "'IA3' is none of LORA, ADALORA"),
        (lambda f: edit_config(f, use_dora=True), ValueError, "lacks .*lora_magnitude_vector"),
        (lambda f: edit_config(f, lora_bias=True), ValueError, "lacks .*lora_B.bias"),
        (
            lambda f: edit_config(f, use_dora=True, lora_bias=True),
            ValueError,
            "lora_bias does not go with use_dora",
        ),
        (lambda f: edit_config(f, bias="all"), ValueError, "bias='all' is an option"),
        (lambda f: edit_config(f, layers_to_transform=[0]), ValueError, "layers_to_transform"),
        (
            lambda f: edit_config(f, init_lora_weights="pissa"),
            ValueError,
            "belongs with base weights or layers changed",
        ),
        (lambda f: edit_config(f, target_modules=None), ValueError, "target_modules is missing"),
        (lambda f: edit_config(f, target_modules=["nope"]), ValueError, "matches no nn.Linear"),
        (lambda f: edit_config(f, r=0), ValueError, "r must be a whole number"),
        (lambda f: edit_config(f, r=5), ValueError, r"q_proj.lora_A.weight has shape \[4, 48\]"),
        (lambda f: edit_weights(f, lambda t: t.pop(KEY)), ValueError, f"lacks {KEY}"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"more": torch.ones(2)})),
            ValueError,
            "without a place in this model, more",
        ),
        (lambda f: edit_weights(f, nan_inside), ValueError, f"{KEY} holds non-finite"),
        (
            lambda f: edit_weights(f, lambda t: t.update({KEY: t[KEY].int()})),
            ValueError,
            "holds torch.int32",
        ),
    ],
)
def test_a_bad_file_is_refused_and_changes_nothing(tiny_llama, tmp_path, spoil, error, words):
    folder = saved(tiny_llama, tmp_path / "a")
    spoil(folder)
    model = tiny_llama()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        fastlora.load_adapter(model, folder)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "spoil, words",
    [
        (truncate, "truncated or no safetensors"),
        (lambda f: edit_weights(f, nan_inside), "non-finite"),
        (lambda f: edit_weights(f, lambda t: t.pop(KEY)), "lacks"),
        (lambda f: edit_config(f, use_rslora=True), "load it into a model without adapter"),
    ],
)
def test_a_bad_file_leaves_the_adapter_in_place_as_it_was(tiny_llama, tmp_path, spoil, words):
    folder = saved(tiny_llama, tmp_path / "a")
    spoil(folder)
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        fastlora.load_adapter(model, folder)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_base_weights_that_peft_adds_must_be_the_models_own(tiny_llama, tmp_path):
    """peft stores the output embedding beside an adapter on it."""
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    fastlora.load_adapter(tiny_llama(), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"lm_head.base_layer.weight, which differs from the model"
    ):
        fastlora.load_adapter(tiny_llama(seed=7), tmp_path / "a")


def test_a_file_for_another_model(tiny_llama, tmp_path):
    folder = saved(tiny_llama, tmp_path / "a")
    with pytest.raises(ValueError, match="has shape"):
        fastlora.load_adapter(tiny_llama(hidden_size=64), folder)
    with pytest.raises(ValueError, match=r"lacks .*layers.2.*and 3 more"):
        fastlora.load_adapter(tiny_llama(num_hidden_layers=3), folder)
    with pytest.raises(ValueError, match="without a place in this model"):
        fastlora.load_adapter(tiny_llama(num_hidden_layers=1), folder)
    with pytest.raises(FileNotFoundError, match="is it an adapter's folder"):
        fastlora.load_adapter(tiny_llama(), tmp_path / "nowhere")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="peft's own methods"):
        fastlora.load_adapter(wrapped, folder)


@pytest.mark.parametrize("there", [False, True])
def test_a_model_without_memory_is_refused(tiny_llama, tmp_path, there):
    folder = saved(tiny_llama, tmp_path / "a")
    model = tiny_llama().to("meta")
    if there:
        fastlora.inject(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="the model is on the meta device"):
        fastlora.load_adapter(model, folder)
    assert bool(layers(model)) == there


def test_saving_what_cannot_be_saved(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no fastlora adapter"):
        fastlora.save_adapter(tiny_llama(), tmp_path / "a")
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        fastlora.save_adapter(model, tmp_path / "file")
    with torch.no_grad():
        layers(model)[3].lora_B[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"lora_B.weight holds non-finite values; nothing was written"
    ):
        fastlora.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_crash_while_saving_leaves_the_old_files_whole(tiny_llama, tmp_path, monkeypatch):
    folder = saved(tiny_llama, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def crash(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    model = tiny_llama()
    fastlora.inject(model, LoRAConfig(r=8))
    with pytest.raises(OSError, match="disk full"):
        fastlora.save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
