"""The Triton backend against the formula in float64: on a GPU, or in Triton's interpreter.

Tolerances. fp32: the largest error is at most 1e-5 of the largest element. fp16: at most twice (a
gradient: three times) the error of the same formula written plainly in fp16, plus one unit in the
last place of the largest element. bf16 is left to a GPU: the interpreter's ``tl.dot`` is wrong.
"""

import os
from functools import partial
from unittest import mock

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

triton = pytest.importorskip("triton")
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported without its interpreter", allow_module_level=True)

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastlora.ops import adapter_group  # noqa: E402
from fastlora.ops.adapter_group import triton as backend  # noqa: E402
from fastlora.ops.adapter_linear import tiles  # noqa: E402
from fastlora.ops.adapter_linear import triton as kernels  # noqa: E402
from tests.ops.adapter_group.cases import (  # noqa: E402
    alone,
    exact,
    gradients_for,
    group,
    masks,
    named,
    run,
    shared,
    trained,
)
from tests.ops.adapter_linear.cases import VECTORS, error  # noqa: E402

HALVES = (torch.float16,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
call = partial(adapter_group, backend="triton")


@pytest.fixture(autouse=True, scope="module")
def exact_fp32():
    """No TF32 in cuBLAS or in the kernels, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_device(x, members):
    moved = {}

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        return moved.setdefault(id(value), value.to(DEVICE))

    return move(x), [type(m)(*map(move, m)) for m in members]


def poisoned_empty(*args, make=torch.empty, **kwargs):
    made = make(*args, **kwargs)
    return made.fill_(float("nan")) if made.is_floating_point() else made


def check(x, members, algorithm, names=None, unused=None):
    """Forward and backward on poisoned memory, compared with the formula."""
    x, members = on_device(x, members)
    dys = gradients_for(members, x)
    if unused is not None:
        dys[unused] = None
    keeps = masks(x, members, "triton")
    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(tiles, "algorithm", lambda *_: algorithm),
    ):
        got = run(call, x, members, dys, names)
    expected = exact(x, members, dys, keeps, names)
    plain = exact(x, members, dys, keeps, names, x.dtype)
    tensors = named(x, members)
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == (tensors[name].dtype if name in tensors else x.dtype), name
        allowed = 1e-5
        if x.dtype != torch.float32:
            factor = 2 if name.startswith("y") else 3
            allowed = factor * error(plain[name], value) + torch.finfo(x.dtype).eps
        assert error(got[name], value) <= allowed, name


kinds = st.fixed_dictionaries(
    {
        "n": st.one_of(st.sampled_from((1, 8, 16, 32, 33)), st.integers(1, 70)),
        "r": st.sampled_from((1, 2, 8, 12, 16, 33)),
        "scaling": st.sampled_from((0.75, -2.0)),
        "bias": st.booleans(),
        "p": st.sampled_from((0.0, 0.0, 0.25)),
        "which": st.sampled_from(((), (), VECTORS[:1], VECTORS)),
        "zeros": st.booleans(),
        "keep_output": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    M=st.sampled_from((0, 1, 16, 33, 50)),
    k=st.one_of(st.sampled_from((1, 16, 32, 33)), st.integers(1, 70)),
    kinds=st.lists(kinds, min_size=1, max_size=3),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    same=st.booleans(),
    algorithm=st.sampled_from(tiles.ALGORITHMS),
    names=st.sampled_from((None, None, {"x"}, {"0.lora_A"}, {"0.lora_B"}, {"x", "0.lora_A"})),
    unused=st.sampled_from((None, 0, 1)),
)
def test_any_call_agrees_with_the_formula(M, k, kinds, dtype, same, algorithm, names, unused):
    if same:
        kinds = [kind | {"r": kinds[0]["r"]} for kind in kinds]
    x, members = group(*kinds, leading=(M,), k=k, dtype=dtype)
    members = shared(members) if same else members
    check(x, members, algorithm, names, unused if len(members) > 1 else None)


@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("p", (0.0, 0.25))
@pytest.mark.parametrize("same", (False, True))
@pytest.mark.parametrize("keep", (True, False))
def test_every_gradient_at_once(algorithm, dtype, p, same, keep):
    kinds = [{"n": 45, "r": 12, "bias": True}, {"n": 33, "r": 12, "scaling": 2.0, "p": p}]
    kinds.append({"n": 45, "r": 12, "which": VECTORS, "bias": True, "keep_output": keep})
    x, members = group(*kinds, leading=(37,), k=70, dtype=dtype)
    check(x, shared(members) if same else members, algorithm)


def test_float32_adapters_over_a_half_base():
    kinds = [{"n": 45, "r": r, "which": w} for r, w in ((8, ()), (3, VECTORS), (8, ()))]
    x, members = group(
        *kinds, leading=(2, 9), k=40, dtype=torch.float16, adapter_dtype=torch.float32
    )
    check(x, members, "fused")


def launches(x, members, names):
    """The names of the launchers that a step enters, in order."""
    x, members = trained(*on_device(x, members), names)
    entered = []

    def watched(name):
        own = getattr(kernels, name)
        return lambda *args, **kwargs: entered.append((name, args)) or own(*args, **kwargs)

    launchers = ("shrink", "main", "bwd_dy", "bwd_da")
    with (
        mock.patch.multiple(kernels, **{name: watched(name) for name in launchers}),
        mock.patch.object(tiles, "algorithm", lambda *_: "fused"),
    ):
        sum(y.sum() for y in call(x, members)).backward()
    return entered


def test_x_is_read_once_a_direction():
    """One shrink and one dA for the whole group, of a rank that 16 divides; dY read once each."""
    x, members = group({"r": 8}, {"r": 8}, {"r": 8}, leading=(40,), k=32)
    entered = launches(x, members, None)
    assert [name for name, _ in entered] == [
        *("shrink", "main", "main", "main"),
        *("bwd_dy", "bwd_dy", "bwd_dy", "bwd_da", "main"),
    ]
    by_name = dict(entered)
    assert by_name["shrink"][1].shape == (32, 32)  # ranks 24, and 8 rows of zeros
    assert by_name["bwd_da"][0].shape == (40, 32)


def test_a_shared_lora_A_is_multiplied_once():
    x, members = group({"r": 8}, {"r": 8}, {"r": 8}, leading=(40,), k=32)
    entered = launches(x, shared(members), {"x", "0.lora_B", "1.lora_B"})
    assert [name for name, _ in entered][-1] == "main"
    by_name = dict(entered)
    assert by_name["shrink"][1].shape == (8, 32)
    assert by_name["main"][2].shape == (40, 8) and "bwd_da" not in by_name


def test_masks_are_those_of_separate_calls():
    x, members = group(*[{"n": 40, "p": p} for p in (0.5, 0.0, 0.2)], leading=(3, 5))
    x, members = on_device(x, members)
    got, plain = (run(f, x, members) for f in (call, partial(alone, backend="triton")))
    for name, value in plain.items():
        assert error(got[name], value.double()) <= 1e-6, name


@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
def test_the_same_call_gives_the_same_bits(algorithm, monkeypatch):
    monkeypatch.setattr(tiles, "algorithm", lambda *_: algorithm)
    x, members = on_device(*group({"n": 66, "p": 0.1}, {"n": 50}, {"n": 66}, leading=(70,), k=90))
    first, second = run(call, x, members), run(call, x, members)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_operands_are_left_as_they_were():
    x, members = on_device(*group({"p": 0.2}, {"which": VECTORS}, {}, leading=(9,)))
    before = {name: value.clone() for name, value in named(x, members).items()}
    run(call, x, members)
    assert all(torch.equal(before[name], value) for name, value in named(x, members).items())


def test_ranks_are_padded_only_where_it_helps():
    assert backend._padding([8, 8]) == 0  # one tile of ranks
    assert backend._padding([8, 8, 8]) == 8
    assert backend._padding([16, 16]) == 0
    assert backend._padding([100]) == 0  # nothing is put together, so nothing is copied
