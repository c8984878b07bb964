"""What a cubin says of its kernels, read with cuobjdump and nvdisasm: triton brings both along."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|[IDQ]MMA|[IQ]GMMA)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)
_USAGE = re.compile(r"^ Function (\S+):\s*\n\s*(.*)$", re.MULTILINE)
_CODE = re.compile(r"^\.text\.(\S+?):\s*$", re.MULTILINE)


@dataclass
class Function:
    """One kernel of a cubin; bytes. ``stack`` is where spilled registers go."""

    registers: int
    stack: int
    shared: int
    code_bytes: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)


def functions(cubin: bytes) -> dict[str, Function]:
    """By mangled name. Raises ValueError where the binary cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", str(path))
    found = {}
    for name, text in _USAGE.findall(usage.stdout):
        numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
        found[name] = Function(
            numbers["REG"], numbers["STACK"] + numbers.get("LOCAL", 0), numbers.get("SHARED", 0)
        )
    pieces = _CODE.split(listing.stdout)
    for name, code in zip(pieces[1::2], pieces[2::2], strict=True):
        instructions = _INSTRUCTION.findall(code)
        if name not in found or not instructions:
            continue
        found[name].code_bytes = 16 * len(instructions)
        for text in instructions:
            for unit in _TENSOR_CORE.findall(text.split(".")[0]):
                counts = found[name].tensor_core
                counts[unit] = counts.get(unit, 0) + 1
    if not found or not all(one.code_bytes for one in found.values()):
        said = (usage.stderr + listing.stderr).strip()[:200]
        raise ValueError(f"the binary could not be read: {said}")
    return found


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)


def _tool(name: str) -> str:
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        own = Path(found.origin).parent / "backends" / "nvidia" / "bin" / name
        if own.exists():
            return str(own)
    return shutil.which(name) or name
