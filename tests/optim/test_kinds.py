"""Kinds by module type, by name, and the groups made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora.optim import Tiger, kinds, param_groups


def by_kind(model):
    found = {}
    for name, kind in kinds(model).items():
        found.setdefault(kind, set()).add(name)
    return found


def test_torchs_modules():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 3),
            "linear": nn.Linear(3, 3),
            "layer": nn.LayerNorm(3),
            "rms": nn.RMSNorm(3),
            "batch": nn.BatchNorm1d(3),
            "group": nn.GroupNorm(1, 3),
            "conv": nn.Conv1d(3, 3, 2),
        }
    )
    model["linear"].bias.requires_grad_(False)
    assert by_kind(model) == {
        "embedding": {"embedding.weight"},
        "gamma": {f"{name}.weight" for name in ("layer", "rms", "batch", "group")},
        "beta": {f"{name}.bias" for name in ("layer", "batch", "group", "conv")},
        "other": {"linear.weight", "conv.weight"},
    }


def test_a_transformers_model_and_its_tied_head(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    found = by_kind(model)
    assert found["embedding"] == {"model.embed_tokens.weight"}
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= found["gamma"]
    assert "model.layers.1.mlp.up_proj.weight" in found["other"] and "beta" not in found
    # a head that is met before the embedding it shares is one all the same
    first = nn.ModuleDict({"head": nn.Linear(3, 4, bias=False), "embed": nn.Embedding(4, 3)})
    first["head"].weight = first["embed"].weight
    assert kinds(first) == {"head.weight": "embedding"}


@pytest.mark.parametrize("peft", [False, True])
def test_adapters(peft, tiny_llama):
    model = tiny_llama()
    if peft:
        library = pytest.importorskip("peft")
        config = library.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"])
        model = library.get_peft_model(model, config)
    else:
        fastlora.inject(
            model,
            fastlora.LoRAConfig(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
        )
    for name, kind in kinds(model).items():
        assert kind == ("beta" if "magnitude" in name else "other"), name


def test_groups_cover_each_parameter_once_with_overrides(tiny_llama):
    model = tiny_llama()
    groups = param_groups(
        model,
        by_name={
            "lm_head.*": "embedding",
            "*.q_proj.weight": {"lr": 5e-3, "floor": 0.1},
            "*.k_proj.weight": {"kind": "gamma"},
        },
        embedding={"algorithm": "adamw", "lr": 1e-2},
        other={"weight_decay": 0.5},
    )
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    of = {name: group for group in groups for name, _ in group["params"]}
    assert of["lm_head.weight"] is of["model.embed_tokens.weight"]
    assert of["lm_head.weight"]["algorithm"] == "adamw"
    q = of["model.layers.0.self_attn.q_proj.weight"]
    assert (q["kind"], q["lr"], q["floor"]) == ("other", 5e-3, 0.1) and len(q["params"]) == 2
    assert of["model.layers.1.self_attn.k_proj.weight"]["kind"] == "gamma"
    assert of["model.layers.0.mlp.up_proj.weight"]["weight_decay"] == 0.5
    optimizer = Tiger(groups, weight_decay=0.25)
    decays = {group["kind"]: group["weight_decay"] for group in optimizer.param_groups[:1]}
    assert decays
    for group in optimizer.param_groups:
        if group["kind"] in ("gamma", "beta"):
            assert group["weight_decay"] == 0.0


def test_refusals():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no kind 'norm'"):
        param_groups(model, norm={})
    with pytest.raises(ValueError, match="no kind 'bias'"):
        param_groups(model, by_name={"bias": "bias"})
    with pytest.raises(ValueError, match=r"name like '\*\.weight'"):
        param_groups(model, by_name={"*.weight": "other"})
    with pytest.raises(ValueError, match="no parameters to be trained"):
        param_groups(model.requires_grad_(False))
    with pytest.raises(ValueError, match="no parameters to be trained"):
        param_groups(torch.nn.ReLU())
