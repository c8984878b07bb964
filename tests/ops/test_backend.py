"""Choosing a backend: order of precedence, refusals with reasons, the table."""

import threading

import pytest
import torch

import fastlora
from fastlora.ops import backend as b
from fastlora.ops import library
from fastlora.ops.adapter_linear import BACKENDS, eager, onednn
from fastlora.ops.small_solvers.contract import NATIVE_UP_TO
from tests.ops.adapter_linear.cases import operands

CPU = torch.device("cpu")


def chosen(dtype=torch.float32, requested=None):
    return b.choose("adapter_linear", BACKENDS, CPU, dtype, requested).name


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(b.ENVIRONMENT_VARIABLE, raising=False)
    b._choose.cache_clear()
    yield
    b._choose.cache_clear()


def test_argument_over_context_over_environment(monkeypatch):
    monkeypatch.setenv(b.ENVIRONMENT_VARIABLE, "eager")
    assert chosen() == "eager"
    with fastlora.use_backend("onednn"):
        assert chosen() == "onednn"
        assert chosen(requested="eager") == "eager"
        with fastlora.use_backend("eager"):
            assert chosen() == "eager"
        assert chosen() == "onednn"
    assert chosen() == "eager"


@pytest.mark.parametrize(
    "vendor, capability, expected",
    [
        ("GenuineIntel", "AVX512", "eager"),
        ("AuthenticAMD", "AVX512", "onednn"),
        ("AuthenticAMD", "AVX2", "eager"),
    ],
)
def test_onednn_is_automatic_where_mkl_is_slow(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(b, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(b.library, "missing", lambda: "there is no native core")
    monkeypatch.setattr(b.platform, "machine", lambda: "x86_64")
    assert chosen() == expected
    assert chosen(torch.float64) == "eager"
    assert chosen(torch.bfloat16) == "eager"


def test_the_native_core_is_taken_for_float32_where_there_is_one(monkeypatch):
    monkeypatch.setattr(b.library, "missing", lambda: None)
    assert chosen() == "native"
    assert chosen(torch.bfloat16) == "eager"
    b._choose.cache_clear()
    monkeypatch.setattr(b.library, "missing", lambda: "there is no native core")
    assert chosen() != "native"
    with pytest.raises(fastlora.BackendError, match="there is no native core"):
        chosen(requested="native")


def test_a_named_backend_that_cannot_run_says_every_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(fastlora.BackendError) as caught:
        chosen(torch.float64, "triton")
    text = str(caught.value)
    assert "not in float64" in text and "TRITON_INTERPRET=1" in text


def test_the_interpreter_serves_on_request_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen() != "triton"
    rows = {
        row[0]: row[2]
        for row in b.table("adapter_linear", BACKENDS, b.Situation(CPU, torch.float32))
    }
    assert "on request only" in rows["triton"]
    with pytest.raises(fastlora.BackendError, match="bfloat16 products wrongly"):
        chosen(torch.bfloat16, "triton")


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(b, "_installed", lambda package: False)
    with pytest.raises(fastlora.BackendError, match="triton is not installed"):
        chosen(requested="triton")


def test_unknown_names_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'trition'"),
        fastlora.use_backend("trition"),
    ):
        pass
    monkeypatch.setenv(b.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        chosen()


def test_nobody_can_run_it():
    with pytest.raises(
        fastlora.BackendError, match=r"no backend for float8_e5m2 on cpu: triton: .*eager: "
    ):
        chosen(torch.float8_e5m2)


def test_a_gpu_call_that_falls_back_says_so_once(recwarn):
    """Metadata is enough to choose, so the GPU's case is decided here too."""
    old = b.Backend("triton", "json", refuses=(lambda at: "its capability is 7.0",))
    plain = b.Backend("eager", "json")
    gpu = torch.device("cuda", 0)
    for _ in range(3):
        b.select("some_op", (old, plain), gpu, torch.float16)
    messages = [str(w.message) for w in recwarn if w.category is b.FallbackWarning]
    assert len(messages) == 1 and "capability is 7.0" in messages[0] and "'eager'" in messages[0]


def test_the_context_is_local_to_its_thread():
    seen = []
    with fastlora.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(b._requested.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    ran = []
    original = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *a, **k: ran.append("eager") or original(*a, **k))
    monkeypatch.setattr(
        onednn, "backward", lambda *a, **k: pytest.fail("another backend's backward")
    )
    t = operands()
    t["lora_B"].requires_grad_()
    with fastlora.use_backend("eager"):
        y = fastlora.adapter_linear(scaling=1.0, **t)
    with fastlora.use_backend("onednn"):
        y.sum().backward()
    assert ran == ["eager"]


def test_the_table_shows_what_was_asked_for(monkeypatch):
    at = b.Situation(CPU, torch.float32)

    def taken():
        return [(row[0], row[2]) for row in b.table("adapter_linear", BACKENDS, at) if row[1]]

    monkeypatch.setenv(b.ENVIRONMENT_VARIABLE, "eager")
    assert taken() == [("eager", "can run, and is taken: asked for by FASTLORA_BACKEND")]
    with fastlora.use_backend("onednn"):
        assert taken() == [("onednn", "can run, and is taken: asked for by use_backend")]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastlora.use_backend("triton"):
        assert taken() == []
        assert "though use_backend asks for it" in fastlora.explain("adapter_linear", torch.ones(1))
    monkeypatch.setenv(b.ENVIRONMENT_VARIABLE, "auto")
    with pytest.raises(
        ValueError, match=r"unknown backend 'auto' \(asked for by FASTLORA_BACKEND\)"
    ):
        fastlora.explain("adapter_linear")


@pytest.mark.parametrize("op", ["svd_lowrank", "symmetric_eigen", "small_svd"])
def test_explain_knows_the_decompositions(op, monkeypatch):
    """Sizes decide for them, and of the ways to choose by name the argument alone."""
    monkeypatch.setattr(library, "missing", lambda: None)
    rows = fastlora.explain(op, torch.ones(1)).splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["->", "eager"]
    fewest, most = NATIVE_UP_TO[0]
    where = "where q" if op == "svd_lowrank" else f"for {fewest} or more of up to {most} columns"
    assert f"native  can run, and is taken {where}" in rows[0]
    assert "has the rest" in rows[1]
    with fastlora.use_backend("eager"):
        assert fastlora.explain(op, torch.ones(1)).splitlines()[1:] == rows
    monkeypatch.setattr(library, "missing", lambda: "there is no core")
    rows = fastlora.explain(op, torch.ones(1)).splitlines()[1:]
    assert "cannot: there is no core" in rows[0] and rows[1].split()[:2] == ["->", "eager"]


def test_explain_judges_by_the_dtype_that_is_computed_in(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: None)
    half = fastlora.explain("svd_lowrank", torch.ones(1).half()).splitlines()
    assert half[0] == "svd_lowrank for float16 on cpu" and half[1].split()[:2] == ["->", "native"]
    wide = fastlora.explain("svd_lowrank", torch.ones(1).double()).splitlines()
    assert "cannot: it computes in float32, not in float64" in wide[1]


def test_explain_names_every_backend_and_the_one_taken():
    text = fastlora.explain("adapter_linear", torch.randn(2))
    assert all(name in text for name in b.NAMES)
    assert text.count("->") == 1
    with pytest.raises(ValueError, match="did you mean adapter_linear"):
        fastlora.explain("adapter_liner")
