"""bench.throughput on a tiny model: it checks before it times, and prints no number for what is
wrong, cannot run, or does not fit."""

import json

import pytest
import torch

from bench import device as here
from bench.throughput import __main__ as bench
from bench.throughput import check, providers, report, run
from bench.throughput.case import Request
from bench.throughput.operations import OPERATIONS
from bench.throughput.shapes import MODELS, Model
from fastlora.cli.errors import UserError
from fastlora.ops import dropout
from fastlora.ops.adapter_linear import eager, native, onednn
from fastlora.ops.adapter_linear.contract import BACKENDS

REQUEST = Request(["tiny"], ["q"], [5], [4], [0.0], ["float32"], "cpu")
# compiling takes longer than all the rest
FEW = "bare,bare-onednn,merged,plain,peft,unsloth,fastlora"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Model(48, 16, 80, 2, 48))
    monkeypatch.setattr(run, "SETS", 3)
    monkeypatch.setattr(here, "measure_roof", lambda *_: here.Roof(1e10, 1e11))


def time_tiny(folder, *options, status=0):
    arguments = ["--shapes", "tiny", "--m", "5", "--rank", "4", "--rounds", "2", "--device", "cpu"]
    for name, value in (("--providers", FEW), ("--dropout", "0")):
        if name not in options:
            arguments += [name, value]
    assert bench.main([*arguments, "--out", str(folder), *options]) == status
    return json.loads((folder / "throughput.json").read_text())


def by_pass(result, op):
    return {row["pass"]: row for row in result["rows"] if row["op"] == op and row["layer"] != "k"}


# --- every operation ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_figures(op, tmp_path, capsys):
    result = time_tiny(tmp_path, "--op", op)
    assert result["rows"] and not any(row["wrong"] for row in result["rows"])
    for row in result["rows"]:
        assert row["op"] == op and row["floor_ms"] > 0
        assert row["chosen"] in row["ms"] and row["rival"] in row["ms"]
        assert all(len(values) == 2 for values in row["ms"].values())
    passes = OPERATIONS[op].passes
    expected = {*passes, "both"} if len(passes) > 1 else set(passes)
    assert {row["pass"] for row in result["rows"]} == expected
    printed = capsys.readouterr().out
    assert "geometric mean" in printed and "× floor" in printed
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert {"device", "threads", "driver", "versions", "commit"} <= result["conditions"].keys()
    assert "H200 (datasheet)" in result["roofs"] and "float32" in result["roofs"]


@pytest.mark.parametrize("op", ["adapter_linear", "adapter_group", "dora"])
def test_dropout_is_checked_with_the_mask_of_each(op, tmp_path):
    result = time_tiny(tmp_path, "--op", op, "--dropout", "0.3", "--m", "40", "--layers", "q")
    both = by_pass(result, op)["both"]
    assert not both["wrong"]
    assert {"plain", "peft", "fastlora-eager"} <= both["ms"].keys()


def test_compiled_is_timed(tmp_path):
    result = time_tiny(
        tmp_path, "--op", "adapter_linear", "--layers", "k", "--providers", "compiled"
    )
    assert {name for row in result["rows"] for name in row["ms"]} == {"compiled"}
    assert not any(row["wrong"] for row in result["rows"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    options = ("--op", "adapter_linear,dora", "--dtype", dtype, "--layers", "q", "--m", "33")
    result = time_tiny(tmp_path, *options)
    assert not any(row["wrong"] for row in result["rows"])
    assert by_pass(result, "adapter_linear")["both"]["chosen"] == "fastlora-eager"


# --- what is wrong has no number ----------------------------------------------------------------


def refused(folder, name, part):
    """The rows in which ``name`` was to have no number, because of ``part``."""
    result = time_tiny(folder, "--op", "adapter_linear", "--layers", "q", status=1)
    for row in result["rows"]:
        assert name in row["wrong"] and name not in row["ms"]
        assert part in row["absent"][name]
        assert "peft" in row["ms"]  # the rest goes on
    return result["rows"]


def test_a_broken_forward_has_no_speed_up(monkeypatch, tmp_path, capsys):
    own = eager.forward

    def off(*args, **options):
        y, t = own(*args, **options)
        return y * (1 + 1e-4), t

    monkeypatch.setattr(eager, "forward", off)
    refused(tmp_path, "fastlora-eager", "y0 is off by")
    assert "no number for fastlora-eager: wrong: y0 is off by" in capsys.readouterr().out


@pytest.mark.parametrize(("place", "name"), [(0, "dx"), (2, "dA0"), (3, "dB0")])
def test_a_broken_gradient_has_no_speed_up(place, name, monkeypatch, tmp_path):
    own = eager.backward

    def off(*args, **options):
        found = list(own(*args, **options))
        found[place] = found[place] * (1 + 1e-4)
        return tuple(found)

    monkeypatch.setattr(eager, "backward", off)
    refused(tmp_path, "fastlora-eager", f"{name} is off by")


@pytest.mark.parametrize("module", [native, onednn])
def test_where_the_chosen_backend_is_broken_nothing_is_compared(module, monkeypatch, tmp_path):
    backend = module.__name__.rpartition(".")[2]
    available = providers.backends(BACKENDS, "cpu", torch.float32)
    if backend not in available:
        pytest.skip(f"{backend} does not run here")
    own = module.forward

    def off(*args, **options):
        y, t = own(*args, **options)
        return y + 1e-3, t

    monkeypatch.setattr(module, "forward", off)
    rows = refused(tmp_path, f"fastlora-{backend}", "y0 is off by")
    if rows[0]["chosen"] == f"fastlora-{backend}":
        assert all(not run.from_data(row).speedups() for row in rows)


def test_a_mask_that_is_not_applied_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(dropout, "drop", lambda x, noise, p: x)
    result = time_tiny(
        tmp_path, "--op", "adapter_linear", "--layers", "q", "--dropout", "0.3", "--m", "40"
    )
    row = by_pass(result, "adapter_linear")["both"]
    assert "fastlora-eager" not in row["ms"]
    assert "keeps 1.000 of the elements" in row["absent"]["fastlora-eager"]


@pytest.mark.parametrize(
    ("name", "value"), [("value", None), ("gradient", None), ("value", float("inf"))]
)
def test_without_a_tolerance_nobody_has_a_number(name, value, monkeypatch, tmp_path, capsys):
    if value is None:
        monkeypatch.delitem(check.TOLERANCES, name)
    else:
        monkeypatch.setitem(check.TOLERANCES, name, value)
    result = time_tiny(tmp_path, "--op", "adapter_linear", "--layers", "q", status=1)
    assert all(not row["ms"] for row in result["rows"])
    assert "times peft" not in capsys.readouterr().out


def test_where_plain_pytorch_is_wrong_nobody_has_a_number(monkeypatch, tmp_path):
    from bench.throughput.operations import linears

    def off(*args):
        return linears.plain_layer(*args) * (1 + 1e-3)

    monkeypatch.setattr(linears.baselines, "__defaults__", (off,))
    result = time_tiny(tmp_path, "--op", "adapter_linear", "--layers", "q", status=1)
    assert all(not row["ms"] for row in result["rows"])


def test_a_broken_norm_and_a_broken_svd(monkeypatch, tmp_path):
    from bench.throughput.operations import svd_product, weight_norm

    own = weight_norm.weight_norm
    monkeypatch.setattr(weight_norm, "weight_norm", lambda *a, **o: own(*a, **o) * (1 + 1e-4))
    result = time_tiny(tmp_path / "norm", "--op", "weight_norm", "--layers", "q", status=1)
    assert "fastlora-eager" in result["rows"][0]["wrong"]

    product = svd_product.svd_product
    monkeypatch.setattr(
        svd_product,
        "svd_product",
        lambda *a: [each._replace(S=each.S * (1 + 1e-4)) for each in product(*a)],
    )
    result = time_tiny(tmp_path / "svd", "--op", "svd_product", status=1)
    assert result["rows"][0]["wrong"] == ["fastlora"]


# --- what is not there --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--op", "adapter_liner"], "no operation adapter_liner; did you mean adapter_linear"),
        (["--shapes", "lama3-8b"], "no shape lama3-8b; did you mean llama3-8b"),
        (["--layers", "gat"], "no layer gat; did you mean gate"),
        (["--dtype", "float31"], "no dtype float31; did you mean float32"),
        (["--providers", "pefd"], "no provider pefd; did you mean peft"),
        (["--device", "cuba"], "no device cuba; did you mean cuda"),
        (["--m", "1,x"], "--m takes numbers, not 1,x"),
        (["--m", "0"], "--m must be from 1"),
        (["--dropout", "1"], "--dropout must be from 0 to 0.99, not 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--op", ","], "no operation is named"),
        (["--op", "svd_lowrank", "--layers", "q"], "nothing to time"),
    ],
)
def test_what_does_not_exist_is_said(options, said, capsys):
    assert bench.main(["--device", "cpu", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert "there is no GPU that this PyTorch can use" in capsys.readouterr().err


def test_what_does_not_fit_is_skipped_with_its_size(monkeypatch, tmp_path, capsys):
    def free(device, calls=[]):  # noqa: B006
        calls.append(device)
        return 1 << 33 if len(calls) > 1 else 1 << 10

    monkeypatch.setattr(here, "free_bytes", free)
    result = time_tiny(tmp_path, "--op", "adapter_linear", "--layers", "q,gate")
    ((title, reason),) = result["skipped"].items()
    assert "tiny q" in title and "GiB, and 0.0 are free" in reason
    assert {row["layer"] for row in result["rows"]} == {"gate"}
    assert f"skipped {title}: it needs" in capsys.readouterr().out


def test_a_package_that_fails_to_import_is_said_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "site" / "unsloth" / "kernels"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('needs a GPU\\nof its own')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    providers.rival.cache_clear()
    result = time_tiny(tmp_path, "--op", "adapter_linear", "--layers", "q")
    providers.rival.cache_clear()
    assert all("peft" in row["ms"] and "unsloth" not in row["ms"] for row in result["rows"])
    printed = capsys.readouterr().out
    assert "unsloth: unsloth does not import: RuntimeError: needs a GPU" in printed


def test_a_provider_that_fails_is_said_and_the_rest_goes_on(monkeypatch, tmp_path):
    from bench.throughput.operations import linears

    def fails(*args, **options):
        raise ValueError("no such layer")

    monkeypatch.setattr(linears, "peft_layer", fails)
    result = time_tiny(tmp_path, "--op", "adapter_linear", "--layers", "q")
    for row in result["rows"]:
        assert row["absent"]["peft"] == "fails with ValueError: no such layer"
        assert "plain" in row["ms"] and not row["wrong"]


# --- files --------------------------------------------------------------------------------------


def test_what_has_changed_since_an_older_file(tmp_path, capsys):
    options = ("--op", "adapter_linear", "--layers", "q")
    old = time_tiny(tmp_path / "old", *options)
    for row in old["rows"]:
        row["ms"][row["chosen"]] = [value * 100 for value in row["ms"][row["chosen"]]]
    old["conditions"]["versions"]["torch"] = "1.0"
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    capsys.readouterr()
    time_tiny(tmp_path / "new", *options, "--compare", str(file))
    printed = capsys.readouterr().out
    assert "other torch: 1.0, now" in printed
    assert "3 of 3 shared rows changed beyond their quartiles" in printed
    assert "→" in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "no results of this bench"),
        ('{"conditions": "x"}', "no results of this bench"),
        ('{"format": 99}', "is of format 99; this version reads format 1"),
        ('{"format": 1, "conditions": {}, "rows": [{}]}', "is damaged"),
    ],
)
def test_a_file_that_cannot_be_compared_with_is_said_and_the_rest_goes_on(
    text, said, tmp_path, capsys
):
    file = tmp_path / "old.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        report.read(file)
    time_tiny(tmp_path, "--op", "weight_norm", "--layers", "q", "--compare", str(file))
    captured = capsys.readouterr()
    assert "not compared: " in captured.err and said in captured.err
    assert "weight_norm" in captured.out


def test_rows_of_other_cells_stay_only_under_the_same_conditions(tmp_path, monkeypatch):
    time_tiny(tmp_path, "--op", "weight_norm", "--layers", "q")
    result = time_tiny(tmp_path, "--op", "weight_norm", "--layers", "gate")
    assert {row["layer"] for row in result["rows"]} == {"q", "gate"}
    result = time_tiny(tmp_path, "--op", "weight_norm", "--layers", "gate")
    assert [row["layer"] for row in result["rows"]] == ["q", "gate"]  # none twice
    monkeypatch.setattr(here, "commit", lambda: "another")
    result = time_tiny(tmp_path, "--op", "weight_norm", "--layers", "gate")
    assert {row["layer"] for row in result["rows"]} == {"gate"}


def test_what_was_measured_before_a_crash_is_in_the_file(tmp_path, monkeypatch):
    measure, calls = run.measure, []

    def crashing(operation, cell, *rest):
        calls.append(cell)
        if len(calls) == 2:
            raise MemoryError
        return measure(operation, cell, *rest)

    monkeypatch.setattr(run, "measure", crashing)
    with pytest.raises(MemoryError):
        time_tiny(tmp_path, "--op", "weight_norm", "--layers", "q,gate")
    assert len(calls) == 2 and calls[0] != calls[1]
    _, rows = report.read(tmp_path / "throughput.json")
    assert {row.cell for row in rows} == {calls[0]}


def test_a_row_survives_its_file(tmp_path):
    time_tiny(tmp_path, "--op", "dora", "--layers", "q")
    _, rows = report.read(tmp_path / "throughput.json")
    for row in rows:
        assert run.from_data(json.loads(json.dumps(run.as_data(row)))) == row


# --- figures ------------------------------------------------------------------------------------


def made_row(ours, theirs, which="both"):
    cell = next(iter(OPERATIONS["adapter_linear"].cells(REQUEST)))
    return run.Row(
        cell, which, 1.0, 1e6, 1e6, "fastlora-eager", "peft",
        ms={"fastlora-eager": ours, "peft": theirs},
    )  # fmt: skip


def test_speed_ups_are_taken_within_a_round():
    # the machine is three times as slow in the last round: for both
    row = made_row([1.0, 1.0, 3.0], [2.0, 2.0, 6.0])
    assert row.speedups() == [2.0, 2.0, 2.0]
    assert "2.00 times peft (geometric mean of 1)" in report.summary([row])


def test_a_slower_cell_is_named():
    rows = [made_row([1.0] * 4, [2.0] * 4), made_row([2.0] * 4, [1.0] * 4)]
    text = report.summary(rows)
    assert "1.00 times peft (geometric mean of 2), from 0.50 to 2.00; 1 below 1, 1 of" in text
    assert text.splitlines()[-1].startswith("slower: adapter_linear tiny")


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_work_is_that_of_the_products_and_the_operands(which):
    op = OPERATIONS["adapter_linear"]
    cell = next(iter(op.cells(REQUEST)))
    m, n, k, r = cell.m, cell.n[0], cell.k[0], cell.rank
    work = op.work(cell, which)
    adapter = 1 if which == "forward" else 2
    assert work.flops == 2 * m * n * k + adapter * 2 * m * r * (n + k)
    operands = {"forward": m * k + m * n, "backward": 2 * m * k + m * n + m * r}[which]
    assert work.moved == 4 * (n * k + adapter * r * (n + k) + operands)


def test_a_roof_is_the_slower_of_two():
    roof = here.Roof(bytes_per_s=100.0, flops_per_s=10.0)
    assert roof.seconds(flops=20.0, moved=100.0) == 2.0
    assert roof.seconds(flops=20.0, moved=500.0) == 5.0
