"""The device a bench runs on: its name, its memory, and the roofs that nothing on it breaks.

Two roofs are measured by the bench itself: how fast memory is copied, and how fast a large square
product runs (by the faster of the libraries at hand). The time no way of computing can undercut is
the larger of flops / rate and bytes / bandwidth. Datasheet figures of some cards stand beside them.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure import whole
from fastlora.cli.facts import devices, versions
from fastlora.ops.backend import Situation, cpu_facts, needs_onednn


@dataclass(frozen=True)
class Roof:
    """What bounds a device in one dtype."""

    bytes_per_s: float  # read plus written
    flops_per_s: float

    def seconds(self, flops: float, moved: float) -> float:
        """No less time can it take."""
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


# Dense tensor-core rates with fp32 accumulation at boost clock, and memory bandwidth, as NVIDIA
# publishes them: the Ada whitepaper (RTX 4090), the datasheets of A100 80GB SXM, H100 SXM and H200.
DATASHEETS = {
    "RTX 4090": Roof(1.008e12, 165.2e12),
    "A100 80GB": Roof(2.039e12, 312e12),
    "H100 SXM": Roof(3.35e12, 989.4e12),
    "H200": Roof(4.8e12, 989.4e12),
}

_COPIED = 1 << 28  # bytes, several times any last-level cache
_SQUARE = {"cpu": 2048, "cuda": 8192}
_ROUNDS = 7


def measure_roof(device: str, dtype: torch.dtype) -> Roof:
    """Copy bandwidth and product rate, the best of a few rounds: a roof is what can be reached."""
    kind = torch.device(device).type
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = _SQUARE[kind]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.nn.functional.linear(a, b),
    }
    if kind == "cpu" and needs_onednn(Situation(torch.device(device), dtype)) is None:
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    taken = whole(calls, _ROUNDS, device)
    seconds = {name: min(values) / 1e3 for name, values in taken.items()}
    product = min(took for name, took in seconds.items() if name != "copy")
    return Roof(2 * _COPIED / seconds["copy"], 2 * n**3 / product)


def cache_bytes(device: str) -> int:
    """The last-level cache (a GPU's L2); 32 MiB where it is not told."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << (10 if found[2] == "K" else 20))
    return max(sizes) or 32 << 20


def free_bytes(device: str) -> int:
    """Memory that could be allocated now."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def name(device: str) -> str:
    """The device as it calls itself, for a processor with what tells its generation."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = cpu_facts()
    own = str(devices()[0]["name"])
    if "cpu family" in facts:
        own += f", family {facts['cpu family']} model {facts.get('model')}"
    return own


def folder_name(device: str) -> str:
    """The name of the device's folder under bench/results."""
    if torch.device(device).type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    generation = _zen(cpu_facts())
    own = f"{devices()[0]['name']} {generation}" if generation else str(devices()[0]["name"])
    threads = torch.get_num_threads()
    return _slug(f"{own} {threads} thread{'s' if threads > 1 else ''}")


def conditions(device: str) -> dict[str, Any]:
    """What a figure depends on beside the code that is measured, as plain data."""
    return {
        "device": name(device),
        "threads": torch.get_num_threads(),
        "driver": _nvidia("driver_version") if torch.device(device).type == "cuda" else None,
        "clocks": _nvidia("clocks.sm,clocks.mem") if torch.device(device).type == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {package: version for package, version in versions().items() if version},
        "commit": commit(),
    }


def as_data(roof: Roof) -> dict[str, float]:
    return asdict(roof)


def commit() -> str | None:
    """The last commit of the code, with '+' where a file differs from it; None outside git."""
    tracked = ("--", "../fastlora", "../csrc", ".", ":!results")
    head = _git("log", "-1", "--format=%h", *tracked)
    changed = _git("status", "--porcelain", "--untracked-files=no", *tracked)
    return head + ("+" if changed else "") if head else None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None


def _nvidia(fields: str) -> str | None:
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def _zen(facts: dict[str, str]) -> str:
    """AMD's servers do not tell their generation in their name under a hypervisor."""
    try:
        family, model = int(facts["cpu family"]), int(facts["model"])
    except (KeyError, ValueError):
        return ""
    if facts.get("vendor_id") != "AuthenticAMD":
        return ""
    if family == 25:
        later = 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF
        return "zen4" if later else "zen3"
    return {23: "zen2", 26: "zen5"}.get(family, "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
