"""Layers of an accelerated model that read one input are computed together, and nothing differs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.adapters import layers
from fastlora.nn import group as group_module
from tests.integrations.twins import (
    LINEAR,
    assert_close,
    assert_gradients,
    config_of,
    fill,
    gradients,
    values,
)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """q, k and v of one input; k and v of another if there is one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.q_proj = nn.Linear(12, 10)
        self.k_proj = nn.Linear(12, 6, bias=False)
        self.v_proj = nn.Linear(12, 8)

    def forward(self, x, other=None):
        x = self.norm(x)
        other = x if other is None else self.norm(other)
        return torch.cat((self.q_proj(x), self.k_proj(other), self.v_proj(other)), -1)


@pytest.fixture
def together(monkeypatch):
    """How many members each call of the grouped operation had."""
    counted = []
    original = group_module.adapter_group

    def counting(x, members):
        counted.append(len(members))
        return original(x, members)

    monkeypatch.setattr(group_module, "adapter_group", counting)
    return counted


def pair(method="lora", targets=PROJECTIONS, dtype=torch.float64, **more):
    torch.manual_seed(0)
    plain = peft.get_peft_model(Attention().to(dtype), config_of("", method, targets, **more))
    if dtype == torch.float64:
        plain.double()
    fill(plain, method)
    fused = copy.deepcopy(plain)
    assert not fastlora.accelerate(fused).skipped
    return plain, fused


def inner(model):
    return model.base_model.model


def ungrouped(model):
    model = copy.deepcopy(model)
    for layer in layers(model):
        layer.module._fastlora.group = None
    return model


def step(model, *inputs):
    """The output and every gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = model(*leaves)
    y.square().sum().backward()
    found = gradients(model) if isinstance(model, nn.Module) else {}
    return y.detach(), found | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}


def assert_same(got, expected):
    assert_close(got[0], expected[0], 1e-9)
    assert_gradients(got[1], expected[1], 1e-8)


def inputs(count=1, dtype=torch.float64):
    return [torch.randn(2, 5, 12, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("method", LINEAR)
def test_grouped_is_ungrouped_is_peft(together, method):
    plain, fused = pair(method)
    x = inputs()
    expected = step(plain, *x)
    assert_same(step(fused, *x), expected)
    assert together == [3]
    assert_same(step(ungrouped(fused), *x), expected)
    assert together == [3]


@pytest.mark.parametrize("method", LINEAR)
def test_a_layer_with_an_input_of_its_own(together, method):
    plain, fused = pair(method)
    for _ in range(6):
        x = inputs(2)
        assert_same(step(fused, *x), step(plain, *x))
    assert together == [3, 3] * 3 + [2] * 3  # k and v stay together
    x = inputs()
    assert_same(step(fused, *x), step(plain, *x))


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_checkpoints_recompute_the_same_groups(together, method, reentrant, count, twin):
    """Also while layers with inputs of their own leave, and in a copy's first step."""
    plain, fused = pair(method)
    fused = fused if twin is None else twin(fused)
    for _ in range(6):
        x = inputs(count)
        leaves = [each.clone().requires_grad_() for each in x]
        checkpoint(fused, *leaves, use_reentrant=reentrant).square().sum().backward()
        found = gradients(fused) | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        assert_gradients(found, step(plain, *x)[1], 1e-8)
    # two forwards before their backwards
    for model in (plain, fused):
        torch.manual_seed(1)
        losses = []
        for _ in range(3):
            x = [each.requires_grad_() for each in inputs(2)]
            y = model(*x) if model is plain else checkpoint(model, *x, use_reentrant=reentrant)
            losses.append(y.square().sum())
        for loss in losses:
            loss.backward()
    assert_gradients(gradients(fused), gradients(plain), 1e-8)


def test_only_what_is_adapted_is_grouped(together):
    plain, fused = pair(targets=["q_proj", "v_proj"])
    report = fastlora.accelerate(fused)
    assert [row.detail.rpartition(", ")[2] for row in report.fused] == [
        "computed with v_proj",
        "computed with q_proj",
    ]
    x = inputs()
    assert_same(step(fused, *x), step(plain, *x))
    assert together == [2]
    plain, fused = pair(targets=["k_proj"])
    assert "computed with" not in str(fastlora.accelerate(fused))
    assert_same(step(fused, *x), step(plain, *x))
    assert together == [2]


def test_no_grad_inference_mode_and_autocast(together):
    plain, fused = pair(dtype=torch.float32)
    (x,) = inputs(dtype=torch.float32)
    assert_close(values(fused, x), values(plain, x))
    with torch.inference_mode():
        assert_close(fused(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), plain(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert_close(y, expected, 0.05)
    assert together == [3, 3, 3]
    assert fused(x).requires_grad


def test_nothing_is_kept_once_all_have_been_called():
    _, fused = pair()
    fused(*inputs())
    memories = [layer.module._fastlora for layer in layers(fused)]
    assert memories[0].group._pending is None
    assert all(memory.given is None and memory.now is None for memory in memories)


# --- states that change between the calls of a group's members ------------------------------------


def merge(model):
    inner(model).k_proj.merge()


def disable(model):
    inner(model).k_proj.enable_adapters(False)


def hook_a_part(model):
    inner(model).k_proj.base_layer.register_forward_hook(lambda m, i, y: y + 1)


def hook_the_layer(model):
    inner(model).k_proj.register_forward_hook(lambda m, i, y: y + 1)


def hook_its_input(model):
    inner(model).k_proj.register_forward_pre_hook(lambda m, i: (i[0] + 1,))


def replace_the_forward(model):
    k_proj = inner(model).k_proj
    forward = k_proj.forward
    k_proj.forward = lambda x: forward(x) + 1


def scale(model):
    inner(model).k_proj.scale_layer(0.3)


def write(model):
    for layer in layers(model):
        for tensor in layer.tensors.values():
            with torch.no_grad():
                tensor.mul_(1.5)


def replace_a_tensor(model):
    for layer in layers(model):
        for name, tensor in layer.tensors.items():
            module, _, last = name.rpartition(".")
            owner = getattr(layer.module, module or last)
            fresh = nn.Parameter(tensor.detach() * 2)
            if module or isinstance(owner, nn.ModuleDict):
                owner["default"].weight = fresh
            else:
                owner["default"] = fresh


def add_and_switch(model):
    torch.manual_seed(4)
    method = model.peft_config["default"].peft_type
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = "ADALORA" in str(method)
    model.add_adapter("other", config)
    fill(model, "lora", "other", seed=9)
    model.set_adapter("other")


CHANGES = [
    merge,
    disable,
    hook_a_part,
    hook_the_layer,
    hook_its_input,
    replace_the_forward,
    scale,
    write,
    replace_a_tensor,
    add_and_switch,
]


@pytest.mark.parametrize(
    "method, change",
    [
        (method, change)
        for method in ("lora", "dora", "vera", "adalora")
        for change in CHANGES
        if change is not scale or method in ("lora", "dora")  # the others have none to set
    ],
)
def test_a_change_is_seen_by_the_members_that_have_not_been_called(method, change):
    """In mid-group, and by the next call of the whole."""
    plain, fused = pair(method)
    (x,) = inputs()
    with torch.no_grad():
        for model in (plain, fused):
            inner(model).q_proj(x)
            change(model)
        assert_close(inner(fused).k_proj(x), inner(plain).k_proj(x), 1e-9)
        assert_close(inner(fused).v_proj(x), inner(plain).v_proj(x), 1e-9)
        assert_close(fused(x), plain(x), 1e-9)
        assert_close(fused(x), plain(x), 1e-9)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_keeps_the_rest_together(together, change):
    plain, fused = pair()
    (x,) = inputs()
    fused(x)
    for model in (plain, fused):
        change(model)
    together.clear()
    if change is hook_its_input:
        assert_close(values(fused, x), values(plain, x), 1e-9)
    else:
        assert_same(step(fused, x), step(plain, x))
    alone = change in (merge, disable, hook_a_part, hook_the_layer, hook_its_input)
    assert together == [2 if alone or change is replace_the_forward else 3]


def test_dropout_switched_off_in_mid_group():
    plain, fused = pair(lora_dropout=0.5)
    (x,) = inputs()
    with torch.no_grad():
        inner(fused.train()).q_proj(x)
        fused.eval()
        assert_close(inner(fused).k_proj(x), inner(plain.eval()).k_proj(x), 1e-9)


def test_restore_takes_the_groups_away(together):
    plain, fused = pair()
    (x,) = inputs()
    with torch.no_grad():
        inner(fused).q_proj(x)
        assert fastlora.restore(fused) == 3
        assert torch.equal(inner(fused).k_proj(x), inner(plain).k_proj(x))
    assert not any("_fastlora" in module.__dict__ for module in fused.modules())
    together.clear()
    assert torch.equal(values(fused, x), values(plain, x)) and not together
    fastlora.accelerate(fused)
    assert_same(step(fused, x), step(plain, x))
    assert together == [3]


def test_one_layer_restored(together):
    plain, fused = pair()
    assert fastlora.restore(inner(fused).k_proj) == 1
    x = inputs()
    assert_same(step(fused, *x), step(plain, *x))
    assert together == [2]


def test_backward_through_one_layer_before_the_next_is_called():
    plain, fused = pair()
    (x,) = inputs()
    for model in (plain, fused):
        leaf = x.clone().requires_grad_()
        for name in PROJECTIONS:
            getattr(inner(model), name)(leaf).square().sum().backward()
    assert_gradients(gradients(fused), gradients(plain), 1e-8)


def test_a_shallow_copy_does_not_take_the_originals_place(together):
    plain, fused = pair()
    shallow = copy.copy(inner(fused).q_proj)
    x = inputs()
    assert_same(step(fused, *x), step(plain, *x))
    assert together == [3]
    assert_close(values(shallow, *x), values(inner(plain).q_proj, *x), 1e-9)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_groups_its_own_layers(together, twin):
    plain, fused = pair()
    other = twin(fused)
    own = [layer.module._fastlora.group for layer in layers(other)]
    assert own[0] is own[1] is own[2] is not layers(fused)[0].module._fastlora.group
    x = inputs()
    assert_same(step(other, *x), step(plain, *x))
    assert together == [3]
    with torch.no_grad():
        layers(other)[1].lora_B.add_(1.0)
    assert_same(step(fused, *x), step(plain, *x))
    alone = twin(inner(fused).q_proj)
    assert_close(values(alone, *x), values(inner(plain).q_proj, *x), 1e-9)


def test_accelerating_again_groups_what_has_come(together):
    plain, fused = pair(targets=["q_proj", "v_proj"])
    for model in (plain, fused):
        torch.manual_seed(4)
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=PROJECTIONS))
        model.double()
        fill(model, "lora", "other", seed=2)
        model.set_adapter("other")
    x = inputs()
    assert_same(step(fused, *x), step(plain, *x))
    report = fastlora.accelerate(fused)
    assert (
        report.fused[0].detail == "adapter 'other', LoRA, r=3, scaling=2.66667, computed with "
        "k_proj and v_proj"
    )
    assert_same(step(fused, *x), step(plain, *x))
    assert together == [2, 3]


# --- gated products -------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(6, 14)
        self.up_proj = nn.Linear(6, 14)
        self.down_proj = nn.Linear(14, 6)
        self.product = None

    def forward(self, x):
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        self.product = StorageWeakRef(h.untyped_storage())
        return self.down_proj(h)


@pytest.mark.parametrize("method", LINEAR)
def test_gated_products_are_not_kept(together, method):
    torch.manual_seed(0)
    targets = ["gate_proj", "up_proj", "down_proj"]
    plain = peft.get_peft_model(Gated().double(), config_of("", method, targets)).double()
    fill(plain, method)
    fused = copy.deepcopy(plain)
    assert not fastlora.accelerate(fused).skipped
    x = torch.randn(7, 6, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = fused(leaf)
    assert inner(fused).product.expired()
    y.square().sum().backward()
    expected = step(plain, x)
    assert_close(y.detach(), expected[0], 1e-9)
    assert_gradients(gradients(fused) | {"input 0": leaf.grad}, expected[1], 1e-8)
    assert together == [2]
