"""What the cache notices, what it does not, and that it never outlives what it was made from."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastlora.ops.weight_norm import WeightNormCache, eager, weight_norm
from tests.ops.weight_norm.cases import SCALING, TOLERANCE, error, exact, operands


class Layer(nn.Module):
    """What a DoRA layer holds."""

    def __init__(self, n=12, k=20, r=3, trust_versions=False):
        super().__init__()
        weight, a, b = operands(n, k, r)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.cache = WeightNormCache(trust_versions)

    def forward(self, scaling=SCALING):
        return weight_norm(self.weight, self.lora_A, self.lora_B, scaling, cache=self.cache)

    def exact(self, scaling=SCALING):
        return exact(self.weight, self.lora_A, self.lora_B, scaling)


@pytest.fixture
def computed(monkeypatch):
    """One entry per computation: whether ‖W‖² was known."""
    calls = []
    plain = eager.forward

    def counting(weight, a, b, scaling, weight_sq, **options):
        calls.append(weight_sq is not None)
        return plain(weight, a, b, scaling, weight_sq, **options)

    monkeypatch.setattr(eager, "forward", counting)
    monkeypatch.setenv("FASTLORA_BACKEND", "eager")
    return calls


def fresh(layer, scaling=SCALING):
    """The layer's norm is right for its present values."""
    return error(layer(scaling), layer.exact(scaling)) <= TOLERANCE


@pytest.mark.parametrize("trust_versions", [False, True])
def test_a_second_call_is_free(computed, trust_versions):
    layer = Layer(trust_versions=trust_versions)
    first = layer()
    for _ in range(3):
        assert torch.equal(layer(), first)
    with torch.no_grad():
        assert torch.equal(layer(), first)
    with torch.inference_mode():
        assert torch.equal(layer(), first)
    assert computed == [False]


@pytest.mark.parametrize("trust_versions", [False, True])
def test_a_step_costs_one_computation_and_the_weight_is_not_summed_again(computed, trust_versions):
    layer = Layer(trust_versions=trust_versions)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1, foreach=False)
    for _ in range(3):
        for _ in range(2):  # gradient accumulation
            assert fresh(layer)
            (layer.lora_A.sum() + layer.lora_B.sum()).backward()
        optimizer.step()
    assert computed == [False, True, True]


OPTIMIZERS = {
    "for loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_noticed(optimizer):
    layer = Layer()
    parameters = [layer.lora_A, layer.lora_B]
    stepper = OPTIMIZERS[optimizer](parameters)
    for _ in range(3):
        assert fresh(layer)
        (layer.lora_A.square().sum() + layer.lora_B.square().sum()).backward()
        before = layer.lora_A.detach().clone()
        stepper.step()
        assert not torch.equal(before, layer.lora_A)
    assert fresh(layer)


@torch.no_grad()
def through_numpy(p):
    p.detach().numpy()[...] *= 1.5


@torch.no_grad()
def recorded(p):
    p.mul_(1.5)


def through_data(p):
    p.data.mul_(1.5)


def exchanged(p):
    p.data = p.data * 1.5


def one_element(p):
    p.data[-1, -1] += 0.5


@pytest.mark.parametrize("write", [recorded, through_data, through_numpy, exchanged, one_element])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_every_write_to_an_adapter_is_noticed(write, name):
    layer = Layer()
    assert fresh(layer)
    write(getattr(layer, name))
    assert fresh(layer)


@pytest.mark.parametrize("write", [recorded, through_data, through_numpy, exchanged])
def test_writes_to_the_whole_weight_are_noticed(write):
    layer = Layer()
    assert fresh(layer)
    write(layer.weight)
    assert fresh(layer)


def test_what_is_not_noticed_until_the_cache_is_cleared():
    """An unrecorded write to a part of the frozen weight that misses all 64 places looked at."""
    layer = Layer(n=200, k=300)
    assert fresh(layer)
    layer.weight.data[1, 1] += 10.0
    assert not fresh(layer)
    layer.cache.clear()
    assert fresh(layer)
    with torch.no_grad():
        layer.weight[1, 1] += 10.0  # recorded
    assert fresh(layer)


def test_what_trusting_versions_does_not_notice():
    """Precisely this is why it is not the default."""
    layer = Layer(trust_versions=True)
    for write, noticed in {
        recorded: True,
        exchanged: True,
        through_data: False,
        through_numpy: False,
    }.items():
        assert fresh(layer)
        write(layer.lora_B)
        assert fresh(layer) == noticed, write
        layer.cache.clear()
    layer.lora_A.grad = torch.ones_like(layer.lora_A)
    assert fresh(layer)
    torch.optim.AdamW([layer.lora_A], lr=0.1, fused=True).step()
    assert not fresh(layer)  # if this fails, torch's fused optimizers have begun to record


def test_another_scaling_and_other_adapters_are_other_norms(computed):
    layer = Layer()
    assert fresh(layer) and fresh(layer, 2.0) and fresh(layer)
    layer.lora_A = nn.Parameter(torch.randn(7, 20))
    layer.lora_B = nn.Parameter(torch.randn(12, 7))
    assert fresh(layer)
    assert computed == [False, True, True, True]


def test_load_state_dict_dtype_and_layout():
    layer, other = Layer(), Layer()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert fresh(layer)
    layer.load_state_dict(other.state_dict())
    assert fresh(layer)
    layer.bfloat16()
    assert fresh(layer)
    layer.double()
    assert layer().dtype == torch.float64 and fresh(layer)
    layer.float()
    assert fresh(layer)
    layer.weight.data = layer.weight.data.t().contiguous().t() * 2
    assert fresh(layer)
    assert "cache" not in layer.state_dict()


def test_copies_start_empty(computed):
    layer = Layer(trust_versions=True)
    layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.cache is not layer.cache and twin.cache.trust_versions
        with torch.no_grad():
            twin.lora_B.mul_(2)
        assert fresh(twin)
    assert fresh(layer)
    assert computed == [False] * 3


def test_views_of_one_weight_are_recognised(computed):
    layer = Layer()
    for _ in range(2):
        weight_norm(layer.weight.t().t(), layer.lora_A, layer.lora_B, SCALING, cache=layer.cache)
    assert computed == [False]


def test_memory_given_back_and_reused_is_not_mistaken_for_the_old_weight():
    cache = WeightNormCache(trust_versions=True)
    _, a, b = operands(64, 64, 2)
    for seed in range(20):
        w = operands(64, 64, 2, seed=seed)[0]  # often at the address of the one before
        assert error(weight_norm(w, a, b, SCALING, cache=cache), exact(w, a, b)) <= TOLERANCE
        del w


def test_the_weight_is_not_kept_alive():
    layer = Layer()
    layer()
    gone = weakref.ref(layer.weight)
    storage = torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage())
    cache = layer.cache
    del layer
    gc.collect()
    assert gone() is None and storage.expired() and cache is not None


def test_writing_into_a_result_does_not_spoil_the_next():
    layer = Layer()
    layer().mul_(3.0)
    assert fresh(layer)


def test_a_differentiable_call_shares_it(computed):
    layer = Layer()
    layer()
    for _ in range(2):
        norm = weight_norm(
            layer.weight, layer.lora_A, layer.lora_B, SCALING, cache=layer.cache,
            differentiable=True,
        )  # fmt: skip
        norm.sum().backward()
    assert layer().grad_fn is None
    assert computed == [False]


def test_remembered_in_inference_mode_and_used_in_training():
    layer = Layer()
    with torch.inference_mode():
        layer()
    norm = layer()
    x = torch.randn(12, requires_grad=True)
    (x / norm).sum().backward()  # an inference tensor could not be saved for this
    assert not norm.is_inference()


def test_inference_tensors_are_computed_each_time(computed):
    cache = WeightNormCache()
    with torch.inference_mode():
        w, a, b = operands(5, 6, 2)
        for _ in range(2):
            first = weight_norm(w, a, b, SCALING, cache=cache).clone()
            w.mul_(2.0)
            assert not torch.equal(first, weight_norm(w, a, b, SCALING, cache=cache))
    assert len(computed) == 4


def test_nan_is_never_remembered():
    layer = Layer()
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    assert layer()[0].isnan()
    layer.lora_B.data[0, 0] = 1.0
    assert fresh(layer)


def test_off_the_cpu_only_parameters_that_do_not_train_are_remembered(monkeypatch):
    """The rule for devices where values cannot be compared, tried on CPU tensors."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    layer = Layer()
    cache, operands_ = layer.cache, (layer.weight, layer.lora_A, layer.lora_B, SCALING)
    norm, sums = torch.ones(12), torch.ones(12)
    cache.keep(*operands_, norm, sums)
    assert cache.find(*operands_)[0] is None and cache.find(*operands_)[1] is sums
    layer.requires_grad_(False)
    cache.keep(*operands_, norm, sums)
    assert cache.find(*operands_)[0] is not None
    with torch.no_grad():
        layer.lora_A.mul_(1.0)
    assert cache.find(*operands_)[0] is None
    cache.keep(*operands_, norm, sums)
    detached = (layer.weight.detach(), *operands_[1:])
    cache.keep(*detached, norm, sums)
    assert cache.find(*detached) == (None, None, None)  # a detached copy hides whether it trains
    layer.requires_grad_(True)
    cache.trust_versions = True
    cache.keep(*operands_, norm, sums)
    assert cache.find(*operands_)[0] is not None
