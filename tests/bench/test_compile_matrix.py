"""The compile matrix, run as its users do, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compile_cases import PROVIDERS, cuda, sign_momentum
from bench.compile_cases import row as rows_of
from fastlora.ops.adapter_linear import tiles as adapter_linear
from fastlora.ops.weight_norm import tiles as weight_norm

SIGN_MOMENTUM = sign_momentum.KERNELS

ROOT = Path(__file__).resolve().parents[2]

triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
    pytest.skip("this triton brings no CUDA tools", allow_module_level=True)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """main() switches it off for its process, which here runs other tests too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def run(*arguments):
    # the interpreter's variable is set by these tests' own process, and must not matter there
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compile_matrix", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_kernel_compiles_for_every_architecture(tmp_path):
    """No spill, no overflow of shared memory, tensor cores wherever half precision multiplies."""
    file = tmp_path / "rows.json"
    done = run("--reduced", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    everything = json.loads(file.read_text())["rows"]
    rows = [row for row in everything if row["tile"]]
    compiled = {(row["kernel"], row["arch"]) for row in rows}
    kernels = (*adapter_linear.KERNELS, *weight_norm.KERNELS, *SIGN_MOMENTUM)
    assert compiled == {(k, a) for k in kernels for a in (80, 86, 89, 90, 100, 120)}
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["code_bytes"] > 0
        assert row["spilled"] == 0
        assert row["shared"] <= row["limit"]
        assert bool(row["tensor_core"]) == (
            row["kernel"] not in ("drop", "sum", "finish", *SIGN_MOMENTUM)
        )
    by_name = {(row["kernel"], row["arch"]): row["tensor_core"] for row in rows}
    assert "HMMA" in by_name["main", 80]
    assert "HGMMA" in by_name["main", 90]
    assert "UTCHMMA" in by_name["main", 100]
    assert done.stdout.splitlines()[-1].startswith(f"{len(everything)} rows, 0 with problems")
    assert len(rows) == 96
    native = {(row["kernel"], row["dtype"], row["arch"]) for row in everything if not row["tile"]}
    assert ("csrc/cuda is left out" in done.stdout) == (len(native) < 24)
    if cuda.nvcc() is not None:
        for kernel in ("eigen_kernel", "svd_kernel"):
            assert {dtype for name, dtype, _ in native if name == kernel} == {"float32", "float64"}


@pytest.mark.parametrize("operation, kernels", [(adapter_linear, 10), (weight_norm, 2)])
def test_the_matrix_has_every_tile_that_can_be_chosen(operation, kernels):
    assert len(operation.KERNELS) == kernels
    for kernel in operation.KERNELS:
        for arch in (80, 86, 89, 90, 100, 120):
            for dtype in ("float32", "float16", "bfloat16"):
                given = PROVIDERS[kernel].cases(kernel, dtype, arch, reduced=False)
                facts = adapter_linear.arch_of(arch, 128)
                chosen = operation.candidates(kernel, getattr(torch, dtype), facts)
                assert {case.tile for case in given} == set(chosen)


def test_an_unknown_name_is_refused():
    done = run("--kernel", "mian")
    assert done.returncode == 2
    assert "there is no kernel 'mian'; did you mean main?" in done.stderr


def test_what_is_wrong_with_a_row_gives_a_failing_exit():
    """The judgement itself, on rows as a bad compilation would give them."""
    good = dict(kernel="main", variant="dx", dtype="bfloat16", arch=90, tile={}, limit=1000)
    good |= dict(registers=90, shared=900, estimate=950, tensor_core={"HGMMA": 4})
    judged = {
        "spills 8 bytes": {"spilled": 8},
        "takes 1001 of 1000 bytes": {"shared": 1001, "estimate": 2000},
        "more than the 900 estimated": {"shared": 1000, "estimate": 900},
        "without tensor cores": {"tensor_core": {}},
    }
    assert rows_of.problems(rows_of.Row(**good)) == []
    for message, change in judged.items():
        (found,) = rows_of.problems(rows_of.Row(**good | change))
        assert message in found
    plain = good | {"tensor_core": {}, "dtype": "float32"}
    assert rows_of.problems(rows_of.Row(**plain)) == []


# ---------------------------------------------------------------------------------------- csrc/cuda


@pytest.mark.parametrize(
    "mangled, expected",
    [
        ("_Z3addPf", ("add", "")),
        ("_ZN8fastlora4cuda41_GLOBAL__N__e2ef1799_9_jacobi_cu_9cd9ce6510svd_kernelIfEEvNS_3SvdEPdi",
         ("svd_kernel", "float32")),
        ("_ZN8fastlora9up_kernelI6__halfEEvPT_", ("up_kernel", "float16")),
        ("plain", ("plain", "")),
    ],
)  # fmt: skip
def test_names_are_readable(mangled, expected):
    assert cuda.readable(mangled) == expected


needs_nvcc = pytest.mark.skipif(cuda.nvcc() is None, reason="needs nvcc")

SPILLS = """
__global__ void __launch_bounds__(1024, 2) greedy_kernel(float* x) {
    float a[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i)
        #pragma unroll
        for (int j = 0; j < 64; j += 7) a[i] = a[i] * a[j] + a[63 - i];
    #pragma unroll
    for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = a[i];
}
"""
PLAIN = """
#include <cuda_fp16.h>
template <class T> __global__ void product_kernel(const T* a, const T* b, float* c, int k) {
    float sum = 0;
    for (int i = 0; i < k; ++i) sum += float(a[i]) * float(b[i * 32 + threadIdx.x]);
    c[threadIdx.x] = sum;
}
template __global__ void product_kernel<__half>(const __half*, const __half*, float*, int);
"""


@needs_nvcc
def test_a_planted_spill_fails(tmp_path, monkeypatch, capsys):
    """The whole command, on a kernel that asks for more registers than it allows itself."""
    from bench import compile_matrix

    (tmp_path / "greedy.cu").write_text(SPILLS)
    monkeypatch.setattr(cuda, "sources", lambda: [tmp_path / "greedy.cu"])
    arguments = ["--kernel", "cuda", "--arch", "90"]
    assert compile_matrix.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "greedy_kernel" in shown and "spills" in shown
    (tmp_path / "greedy.cu").write_text(SPILLS.replace("(1024, 2)", "(256)"))
    assert compile_matrix.main(arguments) == 0


@needs_nvcc
def test_a_matrix_kernel_without_tensor_cores_fails(tmp_path):
    source = tmp_path / "product.cu"
    source.write_text(PLAIN)
    (row,) = cuda.compile_source(cuda.nvcc(), source, 80, frozenset({"product_kernel"}))
    assert (row.kernel, row.dtype) == ("product_kernel", "float16")
    assert row.problems == ["multiplies without tensor cores"]
    (row,) = cuda.compile_source(cuda.nvcc(), source, 80, frozenset())
    assert row.problems == [] and row.code_bytes > 0 and row.registers > 0


@needs_nvcc
def test_a_source_that_does_not_compile_is_a_row(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken_kernel( {")
    (row,) = cuda.compile_source(cuda.nvcc(), source, 80)
    assert "does not compile" in row.problems[0]


def test_without_nvcc_that_is_said(monkeypatch):
    from bench import compile_matrix

    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    assert compile_matrix.cuda_cases((90,)) == ([], ["there is no nvcc: csrc/cuda is left out"])


# -------------------------------------------------------------------------------------- its file


def test_a_file_is_gone_on_from(tmp_path):
    """Rows of the same source are taken from it, those of another are compiled again, and what
    this run was not asked for stays."""
    file = tmp_path / "rows.json"

    def compiled(*kernels):
        asked = ["--kernel", *kernels, "--arch", "90", "--dtype", "float16", "--workers", "1"]
        done = run(*asked, "--json", str(file))
        rows = json.loads(file.read_text())["rows"]
        return done.returncode, done.stdout.splitlines()[-1], rows

    failed, said, first = compiled("sum")
    assert not failed and "taken" not in said and len(first) == 3
    failed, said, both = compiled("sum", "drop")
    assert not failed and "6 rows, " in said and "; 3 taken from the file" in said
    assert [row for row in both if row["kernel"] == "sum"] == first

    # one row of drop's was made from other source; one of sum's has a problem
    both[[row["kernel"] for row in both].index("drop")]["key"] = "0" * 16
    both[[row["kernel"] for row in both].index("sum")]["problems"] = ["spills 8 bytes"]
    content = {"format": "fastlora.bench.compile_matrix/1", "rows": both}
    file.write_text(json.dumps(content))
    failed, said, rows = compiled("sum")
    assert failed and "3 rows, 1 with problems" in said and "; 3 taken from the file" in said
    assert len(rows) == 5, "what no source of today gives goes, drop's others stay"


@pytest.mark.parametrize("content", ["[]", '{"format": "another", "rows": []}', "no json"])
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / "rows.json"
    file.write_text(content)
    done = run("--kernel", "sum", "--json", str(file))
    assert done.returncode == 2 and "fastlora.bench.compile_matrix/1" in done.stderr
    assert file.read_text() == content


def test_workers_must_be_positive():
    done = run("--workers", "0")
    assert done.returncode == 2 and "--workers must be at least 1" in done.stderr
