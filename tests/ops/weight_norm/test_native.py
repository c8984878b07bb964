"""The native norms on every instruction set there is here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops.weight_norm import native
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
