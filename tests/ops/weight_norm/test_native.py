"""The native norms on every instruction set there is here."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops.weight_norm import WeightNormCache, eager, native, weight_norm
from tests.ops.weight_norm.cases import SCALING, TOLERANCE, error, exact, laid_out, operands

ISAS = library.core().isas()
LAYOUTS = st.sampled_from(("rows", "columns", "strided"))


@pytest.mark.parametrize("isa", ISAS)
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 600),
    r=st.integers(1, 40),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
def test_values_also_where_the_adapter_cancels_the_weight(isa, n, k, r, layouts, seed):
    w, a, b = operands(n, k, r, seed=seed, lost=range(0, n, 5))
    expected = exact(w, a, b)
    laid = [*map(laid_out, (w, a, b), layouts)]
    first, squares = native.forward(*laid, SCALING, None, isa=isa)
    again, same = native.forward(*laid, SCALING, squares, isa=isa)
    assert same is squares and torch.equal(first, again)
    assert error(first, expected) <= TOLERANCE
    torch.testing.assert_close(squares, w.double().square().sum(1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threads_do_not_change_a_bit(isa, layout):
    tensors = operands(300, 700, 12)
    tensors = (laid_out(tensors[0], layout), *tensors[1:])
    was = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.forward(*tensors, SCALING, None, isa=isa)[0])
    finally:
        torch.set_num_threads(was)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


_row_norm = library.core().row_norm


KEPT = "kept"


class Counting(library.core().NormMemory):
    """Records what every call has come to: how many rows were lost, or KEPT."""

    results: ClassVar[list] = []

    def update(self, *arguments):
        norm, version, lost = super().update(*arguments)
        given = any(argument is norm for argument in arguments)
        self.results.append(len(lost) if given else KEPT)
        return norm, version, lost


@pytest.fixture
def updates(monkeypatch):
    monkeypatch.setattr(native, "_core", SimpleNamespace(NormMemory=Counting, row_norm=_row_norm))
    monkeypatch.setattr(Counting, "results", [])
    return Counting.results


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_is_remembered_is_what_would_be_computed(updates, isa, layout):
    w, a, b = operands(70, 300, 5)
    w, cache = laid_out(w, layout), WeightNormCache()
    for change in (None, a, b, w):
        if change is not None:
            change.data[0] *= 1.5  # not recorded
        norm = native.remembered(w, a, b, SCALING, cache, isa=isa)
        assert torch.equal(norm, native.forward(w, a, b, SCALING, None, isa=isa)[0])
        assert error(norm, exact(w, a, b)) <= TOLERANCE
        assert native.remembered(w, a, b, SCALING, cache, isa=isa) is norm
    assert updates == [0, KEPT] * 4


def test_rows_that_cancel_are_remembered_as_they_were_computed_anew(updates):
    tensors = operands(60, 100, 4, lost=range(0, 60, 5))
    cache = WeightNormCache()
    norm = native.remembered(*tensors, SCALING, cache)
    assert error(norm, exact(*tensors)) <= TOLERANCE
    assert native.remembered(*tensors, SCALING, cache) is norm
    assert updates == [12, KEPT]


def test_a_norm_that_was_written_into_is_not_given_again(updates):
    tensors, cache = operands(20, 30, 2), WeightNormCache()
    native.remembered(*tensors, SCALING, cache).mul_(3.0)
    assert error(native.remembered(*tensors, SCALING, cache), exact(*tensors)) <= TOLERANCE
    assert updates == [0, KEPT, 0]


def test_an_interrupted_call_leaves_no_norm_for_another_adapter(monkeypatch):
    w, a, b = operands(60, 100, 4, lost=range(0, 60, 5))
    cache = WeightNormCache()
    native.remembered(w, a, b, SCALING, cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    a.data[0] *= 2
    with monkeypatch.context() as patch:
        patch.setattr(eager, "recompute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            native.remembered(w, a, b, SCALING, cache)
    assert error(native.remembered(w, a, b, SCALING, cache), exact(w, a, b)) <= TOLERANCE


@pytest.fixture
def hasty():
    """Threads take turns after every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("lost", [False, True])
def test_threads_may_share_a_cache(hasty, lost):
    w, *first = operands(60, 80, 3, lost=range(0, 60, 7) if lost else ())
    adapters = [first, *(operands(60, 80, 3, seed=seed)[1:] for seed in (1, 1, 2))]
    expected = [exact(w, *adapter) for adapter in adapters]
    cache = WeightNormCache()

    def worst(index):
        a, b = adapters[index]
        return max(
            error(weight_norm(w, a, b, SCALING, cache=cache, backend="native"), expected[index])
            for _ in range(300)
        )

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(worst, range(4))) <= TOLERANCE


def test_what_the_memory_does_not_serve_goes_the_other_way():
    w, a, b = operands(20, 30, 2)
    strided = laid_out(w, "strided")
    for weight, lora_A, cache in (
        (strided, a, WeightNormCache()),
        (w, laid_out(a, "columns"), WeightNormCache()),
        (w, a, WeightNormCache(trust_versions=True)),
    ):
        assert native.remembered(weight, lora_A, b, SCALING, cache) is None
        for _ in range(2):
            norm = weight_norm(weight, lora_A, b, SCALING, cache=cache, backend="native")
            assert error(norm, exact(w, a, b)) <= TOLERANCE


def test_a_layer_of_another_shape_at_the_same_place_is_another():
    w, a, b = operands(24, 24, 3)
    cache = WeightNormCache()
    for n, k in ((24, 24), (12, 48), (48, 12)):
        view = w.view(-1).view(n, k)
        a, b = operands(n, k, 3)[1:]
        for _ in range(2):
            norm = weight_norm(view, a, b, SCALING, cache=cache, backend="native")
            assert error(norm, exact(view, a, b)) <= TOLERANCE
