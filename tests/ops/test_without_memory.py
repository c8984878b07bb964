"""Tensors that have no memory, and memory that runs out: nothing native reads or aborts then."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops.weight_norm import WeightNormCache, eager, native, weight_norm


def operands(n=480, k=320, r=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (n, k), (r, k), (n, r)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("cached", [False, True])
def test_freed_memory_is_refused_by_weight_norm(which, cached):
    tensors = operands()
    cache = WeightNormCache() if cached else None
    weight_norm(*tensors, 2.0, cache=cache, backend="native")
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory: it was freed"):
        weight_norm(*tensors, 2.0, cache=cache, backend="native")


@pytest.mark.parametrize("dora", [False, True])
def test_fake_tensors_go_through_a_layer(dora):
    layer = fastlora.nn.LoRALinear.from_linear(torch.nn.Linear(48, 32), r=4, use_dora=dora)
    state = layer.state_dict()
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
        y = torch.func.functional_call(layer, state, torch.randn(200, 48))
    assert y.shape == (200, 32)


@pytest.mark.parametrize("n, k", [(0, 16), (16, 0), (0, 0)])
def test_layers_without_features(n, k):
    """Enough rows for every instruction set to share them among threads."""
    x, B = torch.randn(200, k, requires_grad=True), torch.randn(n, 4, requires_grad=True)
    A = torch.randn(4, k, requires_grad=True)
    y = fastlora.adapter_linear(x, torch.randn(n, k), A, B, 2.0, backend="native")
    assert y.shape == (200, n)
    y.sum().backward()
    assert x.grad.shape == x.shape and A.grad.shape == A.shape and B.grad.shape == B.shape


def test_a_norm_is_right_after_one_that_failed():
    tensors, cache = operands(), WeightNormCache()
    with pytest.raises(ValueError, match="nonsense"):
        native.remembered(*tensors, 2.0, cache, isa="nonsense")
    expected, _ = eager.forward(*tensors, 2.0, None)
    torch.testing.assert_close(native.remembered(*tensors, 2.0, cache), expected)


RUNS_OUT = """
import resource, torch
from fastlora.ops import svd_lowrank
torch.set_num_threads(2)
svd_lowrank(torch.randn(2, 300, 300), 8, backend="native")
x = list(torch.randn(2, 3000, 3000))
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = int(size.split()[1]) * 1024 + (30 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    svd_lowrank(x, 8, backend="native")
except MemoryError:
    print("raised")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_memory_that_runs_out_in_a_thread_is_an_error():
    done = subprocess.run([sys.executable, "-c", RUNS_OUT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "raised\n"), done.stderr[-500:]
