"""The compile matrix, run as its users do, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compile_cases import PROVIDERS, sign_momentum
from fastlora.ops.adapter_linear import tiles as adapter_linear
from fastlora.ops.weight_norm import tiles as weight_norm

SIGN_MOMENTUM = sign_momentum.KERNELS

ROOT = Path(__file__).resolve().parents[2]

triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
    pytest.skip("this triton brings no CUDA tools", allow_module_level=True)


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
    rows = json.loads(file.read_text())
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
    assert done.stdout.splitlines()[-1].startswith("90 rows, 0 with problems")


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
    done = run("--kernel", "expand")
    assert done.returncode == 2
    assert "expand" in done.stderr


def test_what_is_wrong_with_a_row_gives_a_failing_exit():
    """The judgement itself, on rows as a bad compilation would give them."""
    from bench import compile_matrix

    good = dict(kernel="main", variant="dx", dtype="bfloat16", arch=90, tile={}, limit=1000)
    good |= dict(registers=90, shared=900, estimate=950, tensor_core={"HGMMA": 4})
    judged = {
        "spills 8 bytes": {"spilled": 8},
        "takes 1001 of 1000 bytes": {"shared": 1001, "estimate": 2000},
        "more than the 900 estimated": {"shared": 1000, "estimate": 900},
        "without tensor cores": {"tensor_core": {}},
    }
    assert compile_matrix.problems(compile_matrix.Row(**good)) == []
    for message, change in judged.items():
        (found,) = compile_matrix.problems(compile_matrix.Row(**good | change))
        assert message in found
    plain = good | {"tensor_core": {}, "dtype": "float32"}
    assert compile_matrix.problems(compile_matrix.Row(**plain)) == []
