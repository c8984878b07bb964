"""``bench.traffic`` counts what kernels ask for, and says when that is too much."""

import json

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are counted in the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from bench import cards
from bench.traffic import __main__ as traffic
from bench.traffic import cache, gemm
from bench.traffic.cases import adapter_linear as adapter_linear_cases
from bench.traffic.cases.case import Case, Shape
from bench.traffic.counting import counted
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.adapter_linear import triton as kernels

SMALL = ["--m", "160", "--n", "96", "--k", "256", "--no-gemm"]
# chunks of rows and splits of K are those of a card with few multiprocessors: small shapes fill it
CARD = cards.Card("small", "", 80, 2, 1 << 20, cards.CARDS["a100"].roof)


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, READS: tl.constexpr, BLOCK: tl.constexpr):
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + items, mask=items < N, other=0.0)
    for _ in range(READS - 1):
        value += tl.load(x_ptr + items, mask=items < N, other=0.0)
    tl.store(out_ptr + items, value, mask=items < N)


def copied(n, reads=1, block=64):
    x, out = torch.ones(n), torch.zeros(n)

    def run():
        copy_kernel[(-(-n // block),)](x, out, n, READS=reads, BLOCK=block)
        return [out]

    return Case("copy", {"x_ptr": x}, run, {"x_ptr": 1})


def test_only_unmasked_bytes_count():
    case = copied(100)
    with counted() as launches:
        case.run()
    (launch,) = launches
    assert launch.kernel == "copy_kernel" and launch.grid == (2, 1, 1)
    assert launch.size == {"x_ptr": 400, "out_ptr": 400}
    assert launch.asked == {"x_ptr": 400} and launch.stored == {"out_ptr": 400}
    assert [len(program) for program in launch.programs] == [2, 2]


def test_nothing_is_left_behind():
    builder = interpreter.interpreter_builder
    call = interpreter.GridExecutor.__call__
    with pytest.raises(ZeroDivisionError), counted():
        copied(10).run()
        assert "create_masked_load" in vars(builder)
        raise ZeroDivisionError
    assert interpreter.GridExecutor.__call__ is call
    assert not {"create_masked_load", "create_masked_store"} & set(vars(builder))


def test_an_extra_read_fails_the_case():
    assert traffic.count(copied(4096), CARD).problems == []
    (problem,) = traffic.count(copied(4096, reads=2), CARD).problems
    assert "x_ptr is asked for 2.00 times" in problem


def test_a_second_pass_from_memory_fails_too():
    """By way of the cache's model: the second launch finds nothing of a vector that is larger."""
    x, out = torch.ones(1 << 14), torch.zeros(1 << 14)
    tiny = cards.Card("tiny", "", 80, 1, 1 << 12, CARD.roof)

    def twice():
        for _ in range(2):
            copy_kernel[(256,)](x, out, x.numel(), READS=1, BLOCK=64)
        return [out]

    row = traffic.count(Case("twice", {"x_ptr": x}, twice, {"x_ptr": 2}), tiny)
    assert row.over == pytest.approx(2.0, abs=0.05)
    assert any("of the floor" in problem for problem in row.problems)


def test_a_broken_kernel_of_the_package_makes_it_fail(monkeypatch, capsys):
    """shrink's launcher reads x once more than it should."""
    shrink = kernels.shrink
    monkeypatch.setattr(kernels, "shrink", lambda *args: (shrink(*args), shrink(*args))[1])
    assert traffic.main([*SMALL, "--only", "shrink,sum"]) == 1
    shown = capsys.readouterr().out
    assert "x_ptr is asked for 2.00 times, not 1" in shown
    assert "2 calls, 1 do not hold: shrink" in shown


@pytest.mark.parametrize("rank", [8, 96])
def test_every_kernel_holds(rank, tmp_path, capsys):
    """Values off the tiles' sizes, and more ranks than a tile has."""
    file = tmp_path / "traffic.json"
    assert traffic.main([*SMALL, "--rank", str(rank), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["format"] == traffic.FORMAT
    calls = {row["case"]: row for row in result["calls"]}
    assert {"shrink", "dy-pass", "dy-pass-dg", "x-pass", "weight-norm", "sum"} <= set(calls)
    assert {"sign-fp32", "sign-bf16", "sign-8bit", "sign-tiger", "sign-rows"} <= set(calls)
    assert all(row["problems"] == [] for row in calls.values())
    assert all(row["floor"] <= row["asked"] for row in calls.values())
    assert "15 calls, 0 do not hold" in capsys.readouterr().out


def test_names_off_by_a_letter(capsys):
    assert traffic.main([*SMALL, "--only", "weight-nrm"]) == 2
    assert "did you mean weight-norm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        traffic.main(["--card", "h10"])
    assert "did you mean h100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        traffic.main(["--m", "0"])


# -------------------------------------------------------------------------------- the cache's model


def test_the_cache_forgets_the_least_recently_used():
    held = cache.Cache(3)
    for key in "abcad":
        held.touch(key, 1, False)
    assert held.read == 4
    held.touch("a", 1, False)  # used after b
    assert held.read == 4
    held.touch("b", 1, False)
    assert held.read == 5


def test_a_store_goes_to_memory_once():
    held = cache.Cache(2)
    for key in ("a", "a", "b", "c"):
        held.touch(key, 1, True)
    assert (held.read, held.written) == (0, 1)
    held.flush()
    assert held.written == 3


def test_programs_take_turns_and_are_replaced():
    assert list(cache.in_turns(["ab", "", "cde", "f"], 2)) == list("acbdfe")


@pytest.mark.parametrize("group, order", [(2, "00 10 01 11 02 12 20 21 22"), (1, "00 01 02")])
def test_the_order_of_tiles(group, order):
    places = [gemm.place(pid, 3, 3, group) for pid in range(9)]
    assert sorted(places) == [(i, j) for i in range(3) for j in range(3)]
    expected = [tuple(map(int, text)) for text in order.split()]
    assert places[: len(expected)] == expected


def test_the_model_of_the_gemm_moves_what_the_kernel_does():
    """The same cache behind the model and behind the kernel's own accesses."""
    shape = (256, 192, 128, 16)
    m, n, k, r = shape
    card = cards.Card("tiny", "", 80, 3, 1 << 15, CARD.roof)
    x, w = torch.randn(m, k).half(), torch.randn(n, k).half().t()
    t, b = torch.randn(m, r).half(), torch.randn(n, r).half().t()
    with adapter_linear_cases.on(card), counted() as launches:
        kernels.main(x, w, t, b, None, 0, None)
    tile = tiles.choose("main", torch.float16, m, n, k, r, card.arch)
    one = gemm.Gemm(*shape, torch.float16)
    modelled = gemm.cost(one, tile, card, at_a_time=3).moved
    counted_bytes = cache.replay(launches, card.l2_bytes, 3).moved
    assert counted_bytes == pytest.approx(modelled, rel=0.02)
    assert modelled > 1.2 * one.floor  # so small a cache makes it read again


@pytest.mark.parametrize("side", [64, 128])
def test_without_a_cache_every_tile_reads_its_row_and_column(side):
    card = cards.Card("no cache", "", 90, 132, 1, cards.CARDS["h100"].roof)
    m, n, k, r = 512, 384, 128, 16
    tile = tiles.Tile(side, side, 64, 16)
    elements = (k + r) * (m * (n // side) + n * (m // side)) + m * n
    found = gemm.cost(gemm.Gemm(m, n, k, r, torch.float16), tile, card, at_a_time=1)
    assert found.moved == 2 * elements


def test_the_kernels_keep_the_cards_tiles_only_inside():
    shape = Shape(64, 64, 64, 8, torch.float16, cards.CARDS["h200"])
    with adapter_linear_cases.on(shape.card):
        assert kernels.arch_of(torch.device("cpu")).device == "NVIDIA H200"
    assert kernels.arch_of(torch.device("cpu")) is tiles.INTERPRETER
