"""The kernels of csrc/cuda, compiled by nvcc as the build does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.compile_cases.binary import functions
from bench.compile_cases.row import Row
from fastlora.ops.adapter_linear.tiles import arch_of

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# kernels that multiply half-precision matrices, and so must use tensor cores
MATRIX_KERNELS: frozenset[str] = frozenset()

_DTYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def nvcc() -> str | None:
    """The compiler that CMake would find; None where there is none."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return named or (str(usual) if usual.exists() else None)


@dataclass(frozen=True)
class Source:
    """One file, to be compiled for one architecture."""

    compiler: str
    path: Path
    arch: int

    def text(self) -> str:
        """All that its rows depend on, without a path of this machine."""
        files = [self.path, *sorted(CSRC.parent.glob("*.hpp")), *sorted(CSRC.glob("*.hpp"))]
        made_of = "".join(path.name + path.read_text() for path in files)
        return f"{_version(self.compiler)} sm_{self.arch} {made_of}"


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def sources(folder: Path = CSRC) -> list[Path]:
    return sorted(folder.glob("*.cu"))


def architectures(compiler: str) -> set[int]:
    """Those it can compile for; nvcc has known sm_100 and sm_120 since 12.8."""
    done = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True)
    return {int(number) for number in re.findall(r"sm_(\d+)\b", done.stdout)}


def readable(mangled: str) -> tuple[str, str]:
    """(function, dtype of its first template argument or "") of a mangled name."""
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
    argument = re.match(r"I(\d*\w+?)E", rest)
    return name, _DTYPES.get(argument[1], "") if argument else ""


def compile_source(
    compiler: str, source: Path, arch: int, matrix_kernels: frozenset[str] = MATRIX_KERNELS
) -> list[Row]:
    """A row for each kernel of the file, in the order of their names."""
    limit = arch_of(arch, sm_count=128).shared_bytes
    failed = Row(source.stem, source.name, "", arch, {}, limit=limit)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [compiler, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-o", str(cubin),
             str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
        failed.seconds = time.perf_counter() - started
        if done.returncode or not cubin.exists():
            said = " ".join((done.stderr or done.stdout).split())[:200]
            failed.problems.append(f"does not compile: {said}")
            return [failed]
        try:
            found = functions(cubin.read_bytes())
        except ValueError as error:
            failed.problems.append(str(error))
            return [failed]
    rows = []
    for mangled, one in sorted(found.items()):
        name, dtype = readable(mangled)
        row = Row(name, source.name, dtype, arch, {}, shared=one.shared, limit=limit)
        row.estimate, row.seconds = limit, failed.seconds / len(found)
        row.multiplies = name in matrix_kernels
        row.take(one)
        rows.append(row)
    return rows
