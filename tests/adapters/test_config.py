"""LoRAConfig: what it takes, what it refuses."""

import copy
import pickle

import pytest

from fastlora import LoRAConfig


@pytest.mark.parametrize("option", ["use_qalora", "modules_to_save", "bias", "layers_to_transform"])
def test_an_option_we_do_not_have_is_refused_with_a_way_out(option):
    with pytest.raises(TypeError, match=f"no option {option}.*fastlora.accelerate"):
        LoRAConfig(**{option: None})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": "8"}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1}, "lora_dropout must be in"),
        ({"lora_dropout": -0.5}, "lora_dropout must be in"),
        ({"target_modules": []}, "target_modules names no module"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"target_modules": ["a", 3]}, "target_modules must be a list"),
        ({"target_modules": "(q|k"}, "not a regular expression"),
        ({"exclude_modules": "*x"}, "exclude_modules: .* not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "r must be a whole number"),
        ({"rank_pattern": {"(q": 2}}, "rank_pattern: .* not a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern must map expressions"),
        ({"use_rslora": "false"}, "use_rslora must be True or False"),
        ({"alpha_pattern": {"q": float("nan")}}, "lora_alpha must be a finite number"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)


def test_patterns_match_as_in_peft():
    config = LoRAConfig(
        r=4, rank_pattern={"q_proj": 8, r"layers\.1\..*": 2, "^a.b": 16}, alpha_pattern={"v": 1}
    )
    assert config.rank_of("model.layers.1.q_proj") == 8  # the first match counts
    assert config.rank_of("model.layers.1.k_proj") == 2
    assert config.rank_of("model.layers.11.k_proj") == 4
    assert config.rank_of("a.b") == 16 and config.rank_of("xq_proj") == 4
    assert config.alpha_of("m.v") == 1 and config.alpha_of("mv") == 8


def test_it_copies_and_pickles():
    config = LoRAConfig(r=3, target_modules={"b", "a"})
    assert config.target_modules == ["a", "b"]
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
