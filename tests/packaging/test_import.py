"""What importing costs and pulls in, and what the package carries."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fastlora

SCRIPT = """
import sys, time, torch
started = time.perf_counter()
import fastlora
seconds = time.perf_counter() - started
heavy = [m for m in ("triton", "peft", "transformers", "torch._dynamo") if m in sys.modules]
print(seconds, heavy)
"""


def test_import_is_light_and_brings_in_nothing_heavy():
    seconds = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
        )
        first, _, heavy = out.stdout.strip().partition(" ")
        assert heavy == "[]"
        seconds.append(float(first))
    assert min(seconds) < 0.3


def test_it_works_without_the_optional_packages(tmp_path):
    """A process in which triton, peft and transformers cannot be imported still trains."""
    for name in ("triton", "peft", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    script = """
import torch, fastlora
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
fastlora.inject(model, fastlora.LoRAConfig(r=2))
model(torch.randn(3, 8)).sum().backward()
try:
    fastlora.accelerate(model)
except ImportError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert "needs peft: pip install 'fastlora[peft]'" in out.stdout


def test_version_and_typing_marker():
    assert fastlora.__version__ == version("fastlora")
    assert (Path(fastlora.__file__).parent / "py.typed").exists()
    assert all(hasattr(fastlora, name) for name in fastlora.__all__)
