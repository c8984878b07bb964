"""The native steps against their formulas in float64, on every instruction set there is here."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops.adapter_linear import eager, native
from fastlora.ops.adapter_linear.contract import Needs
from fastlora.ops.dropout import keep_scale, philox_keep

ISAS = library.core().isas()
ROWS = st.sampled_from([0, 1, 3, 64, 65, 200])
COLUMNS = st.sampled_from([0, 1, 5, 16, 31, 96, 97, 250])
RANKS = st.sampled_from([1, 4, 16, 17, 64])
SMALL = 2e-6  # of the sum of the terms' sizes


def draw(*shape, seed=0, columns=False):
    """Values of size one; ``columns``: with contiguous columns."""
    generator = torch.Generator().manual_seed(seed)
    if columns:
        return torch.randn(*shape[::-1], generator=generator).t()
    return torch.randn(*shape, generator=generator)


def close(got, exact, size):
    """Within rounding of float32 sums whose terms' sizes add up to ``size``."""
    return got.dtype == torch.float32 and bool(((got - exact).abs() <= SMALL * size + 1e-30).all())


@pytest.mark.parametrize("isa", ISAS)
@given(m=ROWS, n=COLUMNS, r=RANKS, scale=st.booleans(), bias=st.booleans(), layout=st.booleans())
def test_update(isa, m, n, r, scale, bias, layout):
    out, a, b = draw(m, n), draw(m, r, seed=1, columns=layout), draw(r, n, seed=2, columns=layout)
    g = draw(n, seed=3) if scale else None
    shift = draw(n, seed=4) if bias else None
    factor = 1.0 if g is None else g.double()
    added = 0.0 if shift is None else shift.double()
    exact = (out.double() + a.double() @ b.double()) * factor + added
    size = (out.double().abs() + a.double().abs() @ b.double().abs()) * abs(factor) + abs(added)
    native.update(out, a, b, g, shift, isa=isa)
    assert close(out, exact, size)


@pytest.mark.parametrize("isa", ISAS)
@given(
    m=ROWS,
    n=COLUMNS,
    p=st.sampled_from([0.0, 1e-5, 0.1, 0.999999]),
    seed=st.sampled_from([0, 1, -1, 2**62 + 12345, -(2**63)]),
    layout=st.booleans(),
    bits_first=st.booleans(),
)
def test_draw_is_the_philox_mask(isa, m, n, p, seed, layout, bits_first):
    x, key = draw(m, n, columns=layout), torch.tensor([seed])
    keep = native.draw((m, n), p, key, torch.device("cpu"), isa=isa)
    expected = philox_keep((m, n), p, key)
    bits = keep.bits() if bits_first else None
    for _ in range(2):  # drawn, and from its bits
        assert torch.equal(keep(x), torch.where(expected, x, 0.0))
    assert bits is None or bits is keep.bits()
    places = torch.arange(n)
    words = keep.bits()[:, places // 16].int() >> (places % 16).int()
    assert torch.equal((words & 1).bool(), expected)


@pytest.mark.parametrize("isa", ISAS)
@given(m=ROWS, n=COLUMNS, r=RANKS, p=st.sampled_from([0.1, 0.7]), stride=st.booleans())
def test_update_past_a_mask(isa, m, n, r, p, stride):
    wide = draw(m, n + 7)
    out, a, b = (
        wide[:, :n] if stride else wide[:, :n].clone(),
        draw(m, r, seed=1),
        draw(r, n, seed=2),
    )
    key = torch.tensor([n])
    keep = philox_keep((m, n), p, key)
    product = torch.where(keep, a.double() @ b.double(), 0.0)
    exact, size = out.double() + product, out.double().abs() + a.double().abs() @ b.double().abs()
    before, beside = out.clone(), wide[:, n:].clone()
    native.update(out, a, b, keep=native.draw((m, n), p, key, out.device, isa=isa), isa=isa)
    assert close(out, exact, size)
    assert torch.equal(out[~keep], before[~keep])  # to the bit
    assert torch.equal(wide[:, n:], beside)


def products(m, n, depths, straight, scale):
    """(a, b, scale along the depth) for every depth; every second b lies the other way."""
    made = []
    for index, k in enumerate(depths):
        a = draw(m, k + 3, seed=3 * index)[:, :k]
        if straight == (index % 2 == 0):
            b = draw(k, n + 5, seed=3 * index + 1)[:, :n]
        else:
            b = draw(n, k + 5, seed=3 * index + 1)[:, :k].t()
        made.append((a, b, draw(k, seed=3 * index + 2) if scale else None))
    return made


# at most eight rows are few (four without AVX-512); of these the last two have several chunks, the
# very last blocks of columns. The last but one of many rows has several slices, the last blocks of
# rows (without AVX-512)
SIZES = [
    (1, 1, 1), (5, 17, 3), (2, 34, 18), (3, 65, 40), (6, 7, 16), (8, 33, 20), (7, 130, 1029),
    (4, 2100, 300),
    (9, 17, 3), (256, 192, 576), (12, 64, 128), (13, 79, 300), (11, 75, 1000), (400, 70, 40),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m, n, k", [*SIZES, (3, 5, 0), (0, 5, 3), (3, 0, 5)])
@pytest.mark.parametrize("also", [(), (5,), (16, 257)])
def test_sum_of_products(isa, m, n, k, also):
    """Of all layouts; what lies about ``out`` keeps its bytes, and what lies in it is not read."""
    for straight, scale, g, shift in itertools.product((False, True), repeat=4):
        terms = products(m, n, (k, *also), straight, scale)
        factor = draw(n, seed=90) if g else None
        bias = draw(n, seed=91) if shift else None
        exact = size = torch.zeros(m, n, dtype=torch.float64)
        for a, b, along in terms:
            left = a.double() if along is None else a.double() * along
            exact, size = exact + left @ b.double(), size + left.abs() @ b.double().abs()
        if factor is not None:
            exact, size = exact * factor, size * factor.abs()
        if bias is not None:
            exact, size = exact + bias, size + bias.abs()
        wide = torch.full((m + 4, n + 9), 7.5)
        out = wide[2 : m + 2, 4 : n + 4]
        out.fill_(float("nan"))
        native.sum_of_products(out, terms, factor, bias, isa=isa)
        assert close(out, exact, size)
        out.fill_(7.5)
        assert bool((wide == 7.5).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("straight", [False, True])
def test_a_sum_is_the_same_on_any_number_of_threads(isa, m, n, k, straight, monkeypatch):
    terms, sums = products(m, n, (k, 17), straight, True), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(native, "_threads", lambda work, threads=threads: threads)
        sums.append(torch.empty(m, n))
        native.sum_of_products(sums[-1], terms, draw(n), isa=isa)
    assert all(torch.equal(other, sums[0]) for other in sums[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [4, 50])
def test_a_long_sum_is_made_of_shorter_ones(isa, rows):
    """A single sum of 4096 terms in float32 is off by 6e-7 and more of the results' size."""
    a, b = draw(rows, 4096), draw(100, 4096, seed=1).t()
    out, exact = torch.empty(rows, 100), a.double() @ b.double()
    native.sum_of_products(out, [(a, b, None)], isa=isa)
    assert (out - exact).square().mean().sqrt() <= 4e-7 * exact.square().mean().sqrt()


def test_an_operand_in_no_order_is_copied():
    a, b = draw(9, 10)[:, ::2], draw(10, 14)[::2, ::2]
    out = torch.empty(9, 7)
    native.sum_of_products(out, [(a, b, None)])
    assert close(out, a.double() @ b.double(), a.double().abs() @ b.double().abs())


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no products"):
        native.sum_of_products(torch.empty(2, 3), [])


@pytest.mark.parametrize("mixed", [False, True])
def test_terms_of_dx_that_no_sum_takes_are_added(monkeypatch, mixed):
    """Where only some of a group's sizes are measured to be better off."""
    monkeypatch.setattr(native, "takes_sum", lambda m, n, k, **_: not mixed or n != 20)
    sizes, g, h, lora_A = (20, 30, 20, 12), draw(30, seed=1), draw(6, 3, seed=2), draw(3, 10)
    keep = native.draw((6, 10), 0.3, torch.tensor([4]), g.device)
    exact = h.double() @ lora_A.double() + keep(h @ lora_A).double()
    gradient = native.Gathered(eager.aten_linear, native.update)
    for seed, n in enumerate(sizes):
        dy, weight = draw(6, n, seed=seed), draw(n, 10, seed=seed + 10)
        scale = g if n == 30 else None
        gradient.add(dy, weight, scale)
        exact += (dy.double() if scale is None else dy.double() * scale) @ weight.double()
    gradient.update(h, lora_A)
    gradient.update(h, lora_A, keep)
    torch.testing.assert_close(gradient.total().double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m, n, r", [(33, 101, 5), (70, 192, 16), (20, 30, 65)])
@pytest.mark.parametrize("has", ["h", "dC", "both"])
def test_output_pass_need_not_write_the_product(isa, m, n, r, has, poison):
    dy, g = draw(m, n), draw(n, seed=1)
    c = draw(n, r, seed=2) if has != "dC" else None
    t = draw(m, r, seed=3) if has != "h" else None
    options = {"out_scale": g, "read": draw(m, n, seed=4)}
    got, full = (
        native.output_pass(dy, c, t, 0.7, eager.aten_linear, **options, need_dy=need, isa=isa)
        for need in (False, True)
    )
    assert (got.dy is dy) == (r <= 64)
    for one, other in ((got.h, full.h), (got.dC, full.dC), (got.dg, full.dg)):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert (got.h is None) == (c is None) and (got.dC is None) == (t is None)


@pytest.mark.parametrize("need_weight", [False, True])
def test_one_sum_takes_dy_as_it_comes(monkeypatch, need_weight):
    """Without a product dY ∘ g, unless the weight's gradient is to be made from it."""
    monkeypatch.setattr(native, "takes_sum", lambda *sizes, **kinds: True)
    written, own = [], native._core.output_pass
    x, weight, lora_A, lora_B = draw(9, 24), draw(40, 24), draw(4, 24), draw(40, 4)
    g, t = draw(40).abs() + 0.5, draw(9, 4)

    def watch(*arguments):
        written.append(arguments[5] != 0)
        return own(*arguments)

    monkeypatch.setattr(native, "_core", CoreWith(output_pass=watch))
    needs = Needs(True, need_weight, True, True, False)
    options = {"out_scale": g, "drop_base": False, "bias": None, "read": None}
    arguments = (draw(9, 40), x, weight, lora_A, lora_B, t, 0.7, 0.0, None, needs)
    got = native.scaled_backward(*arguments, **options, need_out_scale=False)
    plain = eager.scaled_backward(*arguments, **options, need_out_scale=False)
    assert written == [need_weight]
    for one, other in zip(got, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


class CoreWith:
    """The native core, some of it replaced."""

    def __init__(self, **own):
        self.__dict__.update(own)

    def __getattr__(self, name):
        return getattr(library.core(), name)


def rules(monkeypatch, vendor, isa, threads=2):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "_sums", native._SUMS.get((vendor, isa)))


def test_a_sum_is_taken_only_as_measured_on_intel(monkeypatch):
    rules(monkeypatch, "GenuineIntel", "avx512")
    assert native.takes_sum(256, 576, 576) and native.takes_sum(8, 1536, 576, turned=True)
    assert native.takes_sum(128, 576, 576) and not native.takes_sum(127, 576, 576)
    assert native.takes_sum(64, 2048, 2048, turned=True)
    assert not native.takes_sum(128, 1024, 2048)  # dY W of a W that leaves the caches
    assert native.takes_sum(256, 1536, 576, scaled=True)  # dY ∘ g costs a pass besides
    assert not native.takes_sum(256, 1536, 576)
    assert not native.takes_sum(7, 576, 576, turned=True) and not native.takes_sum(2048, 576, 576)


def test_a_sum_is_taken_only_as_measured_on_amd(monkeypatch):
    rules(monkeypatch, "AuthenticAMD", "avx2")
    assert native.takes_sum(8, 576, 576) and native.takes_sum(8, 576, 576, turned=True)
    assert not native.takes_sum(7, 576, 576) and not native.takes_sum(7, 576, 576, turned=True)
    assert native.takes_sum(1024, 4096, 4096) and not native.takes_sum(1025, 576, 576)
    assert not native.takes_few(4, 2048, 2048)
    rules(monkeypatch, "AuthenticAMD", "avx512")
    assert native.takes_sum(1, 576, 576) and native.takes_sum(1, 576, 576, turned=True)
    assert native.takes_few(1, 2048, 512) and native.takes_few(2, 576, 1536)
    assert not native.takes_few(1, 576, 1536) and native.takes_few(1, 576, 1536, rank=64)
    assert not native.takes_few(1, 576, 1536, rank=65) and native.takes_few(2, 576, 1536, rank=65)
    assert not native.takes_few(1, 576, 64, rank=16)  # a thread would have half a strip
    assert native.takes_sum(256, 4096, 4096) and not native.takes_sum(257, 576, 576)


@pytest.mark.parametrize("vendor, isa", [("GenuineIntel", "avx512"), ("AuthenticAMD", "avx2")])
def test_a_sum_is_not_taken_where_a_thread_would_have_little_of_a_strip(monkeypatch, vendor, isa):
    rules(monkeypatch, vendor, isa, threads=64)
    assert not native.takes_sum(256, 576, 576)


@pytest.mark.parametrize(
    "vendor, isa", [("GenuineIntel", "avx2"), ("AuthenticAMD", "baseline"), ("", "avx2")]
)
def test_a_sum_is_not_taken_where_it_was_not_measured(monkeypatch, vendor, isa):
    rules(monkeypatch, vendor, isa)
    assert not native.takes_sum(256, 576, 576)


@pytest.mark.parametrize("isa", ISAS)
@given(
    m=st.sampled_from([1, 3, 8, 9, 65, 200]),
    n=st.sampled_from([1, 5, 31, 97, 250]),
    k=COLUMNS,
    r=RANKS,
    p=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    needs=st.builds(Needs, st.booleans(), st.just(False), *[st.booleans()] * 3),
    layout=st.booleans(),
)
def test_a_layer_in_one_call(isa, m, n, k, r, p, bias, needs, layout):
    shapes = (m, k), (n, k), (r, k), (n, r), (m, n)
    x, w, a, b, dy = (draw(*s, seed=i, columns=layout) for i, s in enumerate(shapes))
    seed = torch.tensor([7]) if p else None
    shift = draw(n, seed=6) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        calls = watched(patch)
        patch.setattr(native, "takes_sum", lambda *_, **__: True)
        y, t = native.forward(x, w, a, b, 0.7, shift, p, seed, need_t=True, isa=isa)
        kept = (x if needs.lora_A else None, w if needs.x else None, a if needs.x else None,
                b if needs.x or needs.lora_A else None, t if needs.lora_B else None)  # fmt: skip
        got = native.backward(dy, *kept, 0.7, p, seed, needs, isa=isa)
    ours = k > 0 and any((needs.x, needs.lora_A))
    assert calls == ["adapter_linear_forward", "adapter_linear_backward"][: 1 + ours]
    x, w, a, b, dy = (tensor.double() for tensor in (x, w, a, b, dy))
    mask = torch.ones(m, k, dtype=torch.float64)
    if p:
        mask = philox_keep((m, k), p, seed) * keep_scale(p)
    dropped, exact_t = x * mask, 0.7 * (x * mask) @ a.T
    h = 0.7 * dy @ b
    added = torch.zeros(n) if shift is None else shift
    expected = {
        "y": (
            y,
            x @ w.T + exact_t @ b.T + added,
            abs(x) @ abs(w).T + n_size(x * mask, a, b) + abs(added),
        ),
        "t": (t, exact_t, abs(dropped) @ abs(a).T),
        "dx": (got[0], dy @ w + h @ a * mask, abs(dy) @ abs(w) + abs(dy) @ abs(b) @ abs(a) * mask),
        "dA": (got[2], h.T @ dropped, (abs(dy) @ abs(b)).T @ abs(dropped)),
        "dB": (got[3], dy.T @ exact_t, abs(dy).T @ (abs(dropped) @ abs(a).T)),
        "dbias": (got[4], dy.sum(0), abs(dy).sum(0)),
    }
    asked = {"y": True, "t": True, "dx": needs.x, "dA": needs.lora_A, "dB": needs.lora_B}
    for name, (value, exact, size) in expected.items():
        if asked.get(name, needs.bias):
            assert close(value, exact, size), name
        else:
            assert value is None, name


def n_size(x, a, b):
    return abs(x) @ abs(a).T @ abs(b).T


def watched(patch):
    """The names of a layer's calls of the core, as they come."""
    names = "adapter_linear_forward", "adapter_linear_backward"
    calls = []

    def noting(name):
        def call(*arguments):
            calls.append(name)
            return getattr(library.core(), name)(*arguments)

        return call

    patch.setattr(native, "_core", CoreWith(**{name: noting(name) for name in names}))
    return calls


@pytest.mark.parametrize("rank, rows, weight", [(65, 9, False), (16, 300, False), (16, 9, True)])
def test_what_is_no_single_call(monkeypatch, rank, rows, weight):
    """Ranks the native products leave, rows the sum leaves, a weight that trains."""
    rules(monkeypatch, "AuthenticAMD", "avx512")
    calls = watched(monkeypatch)
    x, w, a, b = draw(rows, 130), draw(140, 130), draw(rank, 130), draw(140, rank)
    _, t = native.forward(x, w, a, b, 1.0, None, 0.0, None, need_t=True)
    assert len(calls) == weight
    native.backward(
        draw(rows, 140), x, w, a, b, t, 1.0, 0.0, None, Needs(True, weight, True, True, False)
    )
    assert len(calls) == weight


@pytest.mark.parametrize("isa", ISAS)
@given(
    m=ROWS,
    n=COLUMNS,
    r=RANKS,
    has=st.sampled_from(["h", "dC", "both", "neither"]),
    scale=st.sampled_from(["none", "y", "y and bias", "z", "no dg"]),
    layout=st.booleans(),
)
def test_output_pass(isa, m, n, r, has, scale, layout):
    if has == "neither" and scale == "none":
        return
    dy, y = draw(m, n, columns=layout), draw(m, n, seed=1, columns=layout)
    c = draw(n, r, seed=2, columns=layout) if has in ("h", "both") else None
    t = draw(m, r, seed=3, columns=layout) if has in ("dC", "both") else None
    g = None if scale == "none" else draw(n, seed=4).abs() + 0.5
    bias = draw(n, seed=5) if scale == "y and bias" else None
    read = y if scale in ("y", "y and bias", "z") else None
    options = {"out_scale": g, "read": read, "bias": bias, "is_y": scale != "z"}
    before = dy.clone()
    got = native.output_pass(dy, c, t, 0.7, eager.aten_linear, **options, isa=isa)
    assert torch.equal(dy, before)
    own = dy.double() if g is None else dy.double() * g
    assert (got.h is None) == (c is None) and (got.dC is None) == (t is None)
    assert (got.dg is None) == (read is None)
    assert got.unread is None or m == 0  # where y says nothing of a bias
    assert torch.equal(got.dy, dy) if g is None else close(got.dy, own, own.abs())
    if c is not None:
        assert close(got.h, 0.7 * own @ c.double(), own.abs() @ c.double().abs())
    if t is not None:
        assert close(got.dC, own.t() @ t.double(), own.abs().t() @ t.double().abs())
    if read is not None:
        z = y.double() - (0.0 if bias is None else bias)
        over = 1.0 if scale == "z" else g.double()
        size = (dy.double() * z).abs().sum(0) + (dy.double() * y).abs().sum(0)
        assert close(got.dg, (dy.double() * z).sum(0) / over, size / over)


@pytest.mark.parametrize("isa", ISAS)
def test_columns_that_y_does_not_show_are_named_as_by_the_eager_form(isa):
    m, n = 70, 101
    g = torch.ones(n)
    g[[3, 50, 99]] = torch.tensor([0.0, float("nan"), float("inf")])
    g[[7, 100]] = torch.tensor([2.0**-61, -(2.0**61)])
    bias = torch.zeros(n)
    bias[[20, 98]] = torch.tensor([1e6, -1e4])
    for shift in (None, bias):
        y = draw(m, n, seed=1) + (0.0 if shift is None else shift)
        options = {"out_scale": g, "read": y, "bias": shift}
        dy = draw(m, n)
        got = native.output_pass(dy, None, None, 1.0, eager.aten_linear, **options, isa=isa)
        expected = eager.read_output(dy, None, None, 1.0, eager.aten_linear, **options)
        assert torch.equal(got.unread, expected.unread)
        assert got.unread.sum() == (5 if shift is None else 7)


@pytest.mark.parametrize("isa", ISAS)
def test_no_unwritten_memory_is_read(isa, poison):
    dy, c, t = draw(33, 101), draw(101, 5, seed=1), draw(33, 5, seed=2)
    options = {"out_scale": draw(101, seed=3), "read": draw(33, 101, seed=4)}
    got = native.output_pass(dy, c, t, 1.0, eager.aten_linear, **options, isa=isa)
    for tensor in got[:4]:
        assert torch.isfinite(tensor).all()


def test_a_rank_beyond_the_native_products_goes_to_the_library(monkeypatch):
    used = []

    def linear(a, b, bias=None):
        used.append(b.shape)
        return eager.aten_linear(a, b, bias)

    dy, c, t, g = draw(20, 30), draw(30, 65, seed=1), draw(20, 65, seed=2), draw(30, seed=3)
    got = native.output_pass(dy, c, t, 2.0, linear, out_scale=g)
    assert len(used) == 2
    own = dy.double() * g
    assert close(got.h, 2 * own @ c.double(), own.abs() @ c.double().abs() * 2)
    assert close(got.dC, own.t() @ t.double(), own.abs().t() @ t.double().abs())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_sums(threads):
    was = torch.get_num_threads()
    dy, c, t = draw(150, 700), draw(700, 16, seed=1), draw(150, 16, seed=2)
    exact = dy.double() @ c.double()
    torch.set_num_threads(threads)
    try:
        first = native.output_pass(dy, c, t, 1.0, eager.aten_linear)
        second = native.output_pass(dy, c, t, 1.0, eager.aten_linear)
    finally:
        torch.set_num_threads(was)
    assert torch.equal(first.h, second.h) and torch.equal(first.dC, second.dC)
    assert close(first.h, exact, dy.double().abs() @ c.double().abs())


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="cannot run 'sse9'"):
        native.update(draw(2, 3), draw(2, 1), draw(1, 3), isa="sse9")
