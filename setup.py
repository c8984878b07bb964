"""The build's entry; what is built is described in pyproject.toml, and csrc/ is built here.

The native core is optional: where it cannot be built fastlora is installed without it, and
``python -m fastlora info`` says so. Its CUDA part, a module of its own, is built beside it where
there is an nvcc. FASTLORA_NATIVE=0 leaves it out, FASTLORA_NATIVE=1 insists.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WISH = os.environ.get("FASTLORA_NATIVE", "")
CSRC = Path(__file__).parent.resolve() / "csrc"


class CMakeBuild(build_ext):
    """Builds a target of csrc/ with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target = ext.name.rpartition(".")[2]
        build = Path(self.build_temp).resolve() / target
        try:
            import pybind11

            configure = [
                "cmake",
                *("-S", str(CSRC), "-B", str(build), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
                # an nvcc that does not work must not cost the CPU its part
                f"-DFASTLORA_CUDA={'ON' if ext is cuda else 'OFF'}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} cannot be built: {error}") from error


sources = [str(path.relative_to(CSRC.parent)) for path in CSRC.rglob("*") if path.is_file()]
# named as what they depend on, so that a source distribution has them
core = Extension("fastlora._C", [], depends=sources, optional=WISH != "1")
cuda = Extension("fastlora._C_cuda", [], depends=sources, optional=True)
has_nvcc = "CUDACXX" in os.environ or shutil.which("nvcc") is not None
wanted = [] if WISH == "0" else [core, cuda] if has_nvcc else [core]
setup(ext_modules=wanted, cmdclass={"build_ext": CMakeBuild})
