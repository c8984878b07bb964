"""What one compilation gave, and what makes it fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.compile_cases.binary import Function


@dataclass
class Row:
    """One kernel in one tile, dtype and variant on one architecture. ``tile`` is empty for csrc's
    kernels, whose sizes are in their source."""

    kernel: str
    variant: str
    dtype: str
    arch: int
    tile: dict[str, int]
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    limit: int = 0
    estimate: int = 0  # what the operation's tiles.shared_bytes says of it
    multiplies: bool = True  # matrices
    tensor_core: dict[str, int] = field(default_factory=dict)
    code_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def take(self, found: Function) -> None:
        """What a binary says of it, and the verdict."""
        self.registers, self.spilled = found.registers, found.stack
        self.code_bytes, self.tensor_core = found.code_bytes, found.tensor_core
        self.problems += problems(self)


def problems(row: Row) -> list[str]:
    """What makes a compiled row fail, as sentences; [] if it is sound."""
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if row.shared > row.limit:
        found.append(f"takes {row.shared} of {row.limit} bytes of shared memory")
    # sm_100 adds a few words of barriers to any block
    if row.shared > row.estimate + 64:
        found.append(
            f"takes {row.shared} bytes of shared memory, more than the {row.estimate} estimated"
        )
    half = row.dtype in ("bfloat16", "float16")
    if half and row.multiplies and not row.tensor_core:
        found.append("multiplies without tensor cores")
    return found
