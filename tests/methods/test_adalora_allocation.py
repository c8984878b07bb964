"""AdaLoRA's allocation of ranks beside peft's, step by step."""

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig
from fastlora.adapters import layers
from fastlora.methods import AdaLoRA
from tests.adapters.family import IDS, PROJECTIONS

peft = pytest.importorskip("peft")

SCHEDULE = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}
SCHEDULES = [
    SCHEDULE,
    SCHEDULE | {"deltaT": 1, "tinit": 0, "tfinal": 0},
    SCHEDULE | {"deltaT": 3, "tinit": 4, "tfinal": 1, "beta1": 0.5, "beta2": 0.9},
    SCHEDULE | {"deltaT": 7, "target_r": 1},
]


def pair(make, schedule, targets=PROJECTIONS):
    """(peft's model, ours) with one and the same adapter, E away from zero."""
    base = make()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.AdaLoraConfig(target_modules=targets, **schedule)
    ).train()
    theirs.to(next(base.parameters()).dtype)
    mine = copy.deepcopy(base).train()
    fastlora.inject(mine, AdaLoRAConfig(target_modules=targets, **schedule))
    with torch.no_grad():
        for layer, other in zip(layers(mine), layers(theirs), strict=True):
            other.tensors["lora_E"].normal_()
            for part, tensor in layer.tensors.items():
                tensor.copy_(other.tensors[part])
    return theirs, mine


def trained(model):
    """Not peft's ranknum, which it makes trainable over a base in float64."""
    return [tensor for layer in layers(model) for tensor in layer.tensors.values()]


def adamw(model):
    return torch.optim.AdamW(trained(model), lr=1e-2)


def random_gradients(model, step):
    """The same for all models of a kind, by the layers' names."""
    generator = torch.Generator().manual_seed(step)
    for layer in layers(model):
        for part in ("lora_A", "lora_B", "lora_E"):
            tensor = layer.tensors[part]
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.grad = noise.to(tensor.dtype)


def pattern_of(theirs):
    pattern = theirs.peft_config["default"].rank_pattern
    return pattern and {key.replace(".default", ""): value for key, value in pattern.items()}


def same_values(one, other):
    for layer, twin in zip(layers(one), layers(other), strict=True):
        for part, tensor in layer.tensors.items():
            assert torch.equal(tensor, twin.tensors[part]), (layer.name, part)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_is_pefts_to_the_bit(tiny_llama, schedule, accelerated):
    """Masks, averages, budget and pattern; with gradients given, so that nothing else differs."""
    theirs, mine = pair(tiny_llama, schedule)
    if accelerated:
        mine = copy.deepcopy(theirs)
        fastlora.accelerate(mine)
    own = adamw(mine)
    method = AdaLoRA().attach(mine, own)
    rival = adamw(theirs)
    allocator = theirs.base_model.rankallocator
    final = schedule["total_step"] - schedule["tfinal"]
    masked = 0
    for step in range(1, schedule["total_step"] + 3):
        random_gradients(theirs, step)
        rival.step()
        theirs.base_model.update_and_allocate(step)
        random_gradients(mine, step)
        own.step()
        same_values(mine, theirs)
        assert method.budget == allocator.budget_schedule(step)[0]
        assert method.rank_pattern == pattern_of(theirs)
        masked += sum(int((layer.tensors["lora_E"] == 0).sum()) for layer in layers(mine))
        averages = method.state_dict()["averages"]
        assert len(averages) == len(allocator.exp_avg_ipt) and bool(averages) == (step < final)
        for name, average in averages.items():
            assert torch.equal(average, allocator.exp_avg_ipt[f"{name}.default"])
            spread = method.state_dict()["spreads"][name]
            assert torch.equal(spread, allocator.exp_avg_unc[f"{name}.default"])
    kept = sum(sum(mask) for mask in method.rank_pattern.values())
    assert kept == schedule["target_r"] * len(layers(mine)) and masked > 0


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_a_training_is_pefts(tiny_llama, schedule):
    """Each with its own gradients, in float64, where no score comes near another by rounding."""
    theirs, mine = pair(lambda: tiny_llama(dtype=torch.float64), schedule)
    optimizers = [adamw(model) for model in (theirs, mine)]
    method = AdaLoRA().attach(mine, optimizers[1])
    for step in range(1, schedule["total_step"] + 1):
        for model, optimizer in zip((theirs, mine), optimizers, strict=True):
            optimizer.zero_grad()
            ids = (IDS + step) % 96
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        assert method.rank_pattern == pattern_of(theirs)
        for layer, other in zip(layers(mine), layers(theirs), strict=True):
            for part, tensor in layer.tensors.items():
                torch.testing.assert_close(tensor, other.tensors[part], atol=1e-8, rtol=1e-8)
    ranks = {sum(mask) for mask in method.rank_pattern.values()}
    assert len(ranks) > 1  # that something was decided


def three():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))


SMALL = ["0", "1", "2"]


def test_ties_fall_together_as_in_peft():
    """Two layers are equal in every number, so that each score stands there twice."""
    schedule = SCHEDULE | {"deltaT": 1, "tinit": 0}
    theirs, mine = pair(three, schedule, SMALL)
    method = AdaLoRA().attach(mine, own := adamw(mine))
    rival = adamw(theirs)
    for model in (theirs, mine):
        first, second, _ = layers(model)
        with torch.no_grad():
            for part, tensor in second.tensors.items():
                tensor.copy_(first.tensors[part])
    fewer = 0
    for step in range(1, 13):
        for model, optimizer in ((theirs, rival), (mine, own)):
            random_gradients(model, step)
            first, second, _ = layers(model)
            for part, tensor in second.tensors.items():
                tensor.grad = first.tensors[part].grad.clone()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        same_values(mine, theirs)
        assert method.rank_pattern == pattern_of(theirs)
        kept = sum(sum(mask) for mask in method.rank_pattern.values())
        assert kept <= method.budget
        fewer += kept < method.budget
    assert fewer  # a tie at the threshold took both
    assert method.rank_pattern["0.lora_E"] == method.rank_pattern["1.lora_E"]


def test_equal_scores_all_fall():
    """Gradients of zero give scores of zero, all at the threshold; as in peft, none is left."""
    theirs, mine = pair(three, SCHEDULE | {"tinit": 0, "deltaT": 1}, SMALL)
    method = AdaLoRA().attach(mine, optimizer := torch.optim.SGD(trained(mine), lr=0.1))
    for model in (theirs, mine):
        for parameter in trained(model):
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    theirs.base_model.update_and_allocate(1)
    same_values(mine, theirs)
    assert method.rank_pattern == pattern_of(theirs)
    assert not any(map(any, method.rank_pattern.values()))


def test_a_target_of_all_ranks_masks_nothing():
    """Where peft asks for the 0-th smallest score and raises."""
    theirs, mine = pair(three, SCHEDULE | {"target_r": 5}, SMALL)
    method = AdaLoRA().attach(mine, optimizer := adamw(mine))
    for step in range(1, 14):
        random_gradients(mine, step)
        optimizer.step()
        assert method.budget == 15 and all(layer.tensors["lora_E"].all() for layer in layers(mine))
    assert method.rank_pattern == {f"{name}.lora_E": [True] * 5 for name in SMALL}
    random_gradients(theirs, 1)
    with pytest.raises(RuntimeError, match="out of range"):
        for step in (1, 4):
            theirs.base_model.update_and_allocate(step)


def test_the_budget_falls_from_all_ranks_to_the_target():
    _, mine = pair(three, SCHEDULE | {"deltaT": 1}, SMALL)
    method = AdaLoRA().attach(mine, optimizer := adamw(mine))
    budgets = [method.budget]
    for step in range(1, 13):
        random_gradients(mine, step)
        optimizer.step()
        budgets.append(method.budget)
    # 6 + 9 (1 − (t − 2) / 7)³, rounded down
    assert budgets == [15, 15, 15, 11, 9, 7, 6, 6, 6, 6, 6, 6, 6]


# --- on disk -----------------------------------------------------------------------------------


def finished(make, schedule, targets, peaked=None):
    """Both models after all steps, with equal values; the layer ``peaked`` loses all its ranks."""
    theirs, mine = pair(make, schedule, targets)
    method = AdaLoRA().attach(mine, own := adamw(mine))
    rival = adamw(theirs)
    for step in range(1, schedule["total_step"] + 1):
        for model, optimizer in ((theirs, rival), (mine, own)):
            random_gradients(model, step)
            for layer in layers(model):
                if layer.name == peaked:
                    for tensor in layer.tensors.values():
                        tensor.grad.mul_(1e-6)
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
    same_values(mine, theirs)
    return theirs, mine, method


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_what_is_saved_is_what_peft_saves_and_loads(tiny_llama, tmp_path, schedule):
    peaked = "model.layers.0.self_attn.q_proj"
    theirs, mine, method = finished(tiny_llama, schedule, PROJECTIONS, peaked)
    pattern = method.rank_pattern
    assert not any(pattern[f"{peaked}.lora_E"])  # a layer without ranks is among them
    fastlora.save_adapter(mine, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    ]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key])
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    ]
    for option in ("rank_pattern", *schedule):
        assert configs[0][option] == configs[1][option]
    expected = mine.eval()(input_ids=IDS).logits
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    again = tiny_llama()
    fastlora.load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert sum(layer.r for layer in layers(again)) == sum(map(sum, pattern.values()))
    with pytest.raises(ValueError, match=r"cut already, to \d of 5"):
        AdaLoRA().attach(again, adamw(again))


def test_an_accelerated_model_saves_its_ranks(tiny_llama, tmp_path):
    theirs, _ = pair(tiny_llama, SCHEDULE)
    fastlora.accelerate(theirs)
    AdaLoRA().attach(theirs, optimizer := adamw(theirs))
    for step in range(1, 13):
        random_gradients(theirs, step)
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    again = tiny_llama()
    fastlora.load_adapter(again, tmp_path)
    assert {layer.r for layer in layers(again)} != {5}
    torch.testing.assert_close(
        again.eval()(input_ids=IDS).logits,
        theirs.eval()(input_ids=IDS).logits,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("alpha", [0, -1])
def test_an_alpha_that_stands_for_the_rank_is_saved_as_the_initial_one(alpha, tmp_path):
    """peft would put the ranks that are left in its place."""
    _, mine = pair(three, SCHEDULE | {"lora_alpha": alpha}, SMALL)
    AdaLoRA().attach(mine, optimizer := adamw(mine))
    for step in range(1, 13):
        random_gradients(mine, step)
        optimizer.step()
    fastlora.save_adapter(mine, tmp_path)
    x = torch.randn(3, 6)
    theirs, again = peft.PeftModel.from_pretrained(three(), tmp_path), three()
    fastlora.load_adapter(again, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for model in (theirs, again):
        torch.testing.assert_close(model(x), mine(x), atol=1e-5, rtol=1e-5)


def test_an_alpha_that_stands_for_the_rank_loads_into_the_model_that_saved_it(tmp_path):
    _, mine = pair(three, SCHEDULE | {"lora_alpha": 0}, SMALL)
    fastlora.save_adapter(mine, tmp_path)
    assert len(fastlora.load_adapter(mine, tmp_path).fused) == len(layers(mine))


def test_before_the_last_mask_all_ranks_are_saved(tmp_path):
    """A masked E may have grown back between two masks: cutting it would change the model."""
    _, mine = pair(three, SCHEDULE, SMALL)
    AdaLoRA().attach(mine, optimizer := adamw(mine))
    for step in range(1, 8):
        random_gradients(mine, step)
        optimizer.step()
    x = torch.randn(3, 6)
    fastlora.save_adapter(mine, tmp_path)
    again = three()
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), mine(x)) and all(layer.r == 5 for layer in layers(again))


def test_what_grew_back_after_detaching_is_not_cut_silently(tmp_path):
    theirs, mine, method = finished(three, SCHEDULE, SMALL)
    method.detach()
    optimizer = adamw(mine)
    random_gradients(mine, 0)
    fastlora.save_adapter(mine, tmp_path / "before")
    optimizer.step()
    with pytest.raises(ValueError, match=r"cannot be saved.*no longer zero"):
        fastlora.save_adapter(mine, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    # a new allocation starts from all of them
    AdaLoRA().attach(copied := copy.deepcopy(mine), adamw(copied))
    fastlora.save_adapter(copied, tmp_path / "anew")
    # a whole adapter put into the layers is saved whole
    theirs.peft_config["default"].rank_pattern = None
    theirs.save_pretrained(tmp_path / "whole")
    fastlora.load_adapter(mine, tmp_path / "whole")
    fastlora.save_adapter(mine, tmp_path / "after")
    assert load_file(tmp_path / "after" / "adapter_model.safetensors")[
        "base_model.model.0.lora_A"
    ].shape == (5, 6)


# --- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5, 9, 11])
def test_an_interrupted_run_goes_on_exactly(at, tmp_path):
    def steps(model, optimizer, numbers):
        for step in numbers:
            random_gradients(model, step)
            optimizer.step()

    def start():
        _, model = pair(three, SCHEDULE, SMALL)
        optimizer = adamw(model)
        return model, optimizer, AdaLoRA().attach(model, optimizer)

    whole, optimizer, uninterrupted = start()
    steps(whole, optimizer, range(1, 14))
    first, optimizer, method = start()
    steps(first, optimizer, range(1, at + 1))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict(), method.state_dict()), file)
    file.seek(0)
    states = torch.load(file)
    second, optimizer, method = start()
    for target, state in zip((second, optimizer, method), states, strict=True):
        target.load_state_dict(state)
    if at >= 9:  # it can be saved at once
        fastlora.save_adapter(second, tmp_path)
    steps(second, optimizer, range(at + 1, 14))
    same_values(whole, second)
    assert method.rank_pattern == uninterrupted.rank_pattern
    assert [x.module.kept for x in layers(whole)] == [x.module.kept for x in layers(second)]


def test_a_state_that_does_not_fit_changes_nothing():
    _, mine = pair(three, SCHEDULE, SMALL)
    method = AdaLoRA().attach(mine, optimizer := adamw(mine))
    for step in range(1, 7):
        random_gradients(mine, step)
        optimizer.step()
    before = copy.deepcopy(method.state_dict())

    def other_schedule(state):
        state["schedule"]["tfinal"] = 1

    def missing(state):
        del state["spreads"]["1.lora_B"]

    def shape(state):
        state["spreads"]["2.lora_B"] = torch.zeros(2, 2)

    def short(state):
        state["rank_pattern"]["0.lora_E"] = [True] * 4

    def unmasked(state):
        state.update(step=10, averages={}, spreads={}, rank_pattern=None)

    for spoil, words in (
        (other_schedule, "tfinal=1, this run tfinal=3"),
        (missing, "1.lora_B is not in both"),
        (shape, r"spreads of 2.lora_B have shape \[2, 2\]"),
        (short, "layers with other ranks"),
        (unmasked, "lacks the mask of step 9"),
        (lambda state: state.pop("spreads"), "the state has no spreads"),
        (lambda state: state["schedule"].pop("beta1"), "the state's schedule has no beta1"),
    ):
        state = copy.deepcopy(before)
        for tensor in state["averages"].values():
            tensor.fill_(7.0)
        spoil(state)
        with pytest.raises(ValueError, match=words):
            method.load_state_dict(state)
        after = method.state_dict()
        assert after["step"] == 6 and after["rank_pattern"] == before["rank_pattern"]
        for what in ("averages", "spreads"):
            torch.testing.assert_close(after[what], before[what], atol=0, rtol=0)
    method.detach()
    with pytest.raises(RuntimeError, match="attach it first"):
        method.load_state_dict(before)


# --- gradients that are missing or not numbers -------------------------------------------------


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda t: None, "lora_B of 1 has no gradient"),
        (lambda t: t.fill_(float("nan")), "gradient of lora_B of 1 is not finite"),
        (lambda t: t.index_fill(0, torch.tensor(0), float("inf")), "of lora_B of 1 is not finite"),
    ],
)
def test_a_step_without_all_gradients_changes_nothing(spoil, words):
    _, mine = pair(three, SCHEDULE, SMALL)
    method = AdaLoRA().attach(mine, optimizer := adamw(mine))
    random_gradients(mine, 1)
    optimizer.step()
    random_gradients(mine, 2)
    tensor = layers(mine)[1].tensors["lora_B"]
    good = tensor.grad.clone()
    tensor.grad = spoil(tensor.grad)
    values = [p.detach().clone() for p in trained(mine)]
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert all(map(torch.equal, trained(mine), values))
    torch.testing.assert_close(method.state_dict()["averages"], before["averages"], atol=0, rtol=0)
    tensor.grad = good
    optimizer.step()
    assert method.step == 2
    # after the last mask nothing is scored any more, and nothing is asked for
    for step in range(3, 10):
        random_gradients(mine, step)
        optimizer.step()
    tensor.grad = None
    optimizer.step()
    assert method.step == 10


def test_a_closure_may_compute_the_gradients():
    runs = []
    for closure in (False, True):
        _, mine = pair(three, SCHEDULE, SMALL)
        method = AdaLoRA().attach(mine, optimizer := adamw(mine))
        for step in range(1, 11):
            if closure:
                optimizer.zero_grad()
                optimizer.step(lambda step=step, mine=mine: random_gradients(mine, step))
            else:
                random_gradients(mine, step)
                optimizer.step()
        runs.append((mine, method.rank_pattern))
    same_values(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# --- attaching ---------------------------------------------------------------------------------


def test_it_attaches_once_and_lets_go():
    _, mine = pair(three, SCHEDULE, SMALL)
    method = AdaLoRA().attach(mine, optimizer := adamw(mine))
    with pytest.raises(RuntimeError, match="attached already"):
        method.attach(mine, optimizer)
    method.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        method.detach()
    optimizer.step()
    assert method.step == 0
    method.attach(mine, optimizer)
    random_gradients(mine, 1)
    optimizer.step()
    assert method.step == 1


def test_a_configuration_may_be_given():
    torch.manual_seed(0)
    model = nn.Sequential(fastlora.nn.AdaLoRALinear.from_linear(nn.Linear(6, 6), init_r=3))
    with pytest.raises(ValueError, match="without a configuration"):
        AdaLoRA().attach(model, adamw(model))
    config = AdaLoRAConfig(init_r=3, target_r=1, total_step=2)
    method = AdaLoRA(config).attach(model, optimizer := adamw(model))
    for step in (1, 2):
        random_gradients(model, step)
        optimizer.step()
    assert sum(method.rank_pattern["0.lora_E"]) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"total_step": None}, "needs the configuration's total_step"),
        ({"total_step": 4}, "no step before the last mask"),
        ({"target_r": 6}, "target_r 6 is above the 5 ranks"),
    ],
)
def test_schedules_that_cannot_be(options, words):
    model = three()
    fastlora.inject(model, AdaLoRAConfig(**(SCHEDULE | {"tinit": 0} | options)))
    with pytest.raises(ValueError, match=words):
        AdaLoRA().attach(model, adamw(model))


def test_models_it_is_not_made_for():
    model = three()
    fastlora.inject(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="no AdaLoRA layers"):
        AdaLoRA().attach(model, adamw(model))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3, 3)),
        peft.AdaLoraConfig(target_modules=["0", "2"], **SCHEDULE),
    )
    with pytest.raises(ValueError, match="no linear layer"):
        AdaLoRA().attach(theirs, adamw(theirs))
