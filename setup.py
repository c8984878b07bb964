"""The build's entry; what is built is described in pyproject.toml, and csrc/ is built here.

The native core is optional: where it cannot be built fastlora is installed without it, and
``python -m fastlora info`` says so. Its CUDA part, a module of its own, is built beside it where
there is an nvcc. FASTLORA_NATIVE=0 leaves it out, FASTLORA_NATIVE=1 insists.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WISH = os.environ.get("FASTLORA_NATIVE", "")
CSRC = Path(__file__).parent.resolve() / "csrc"


class CMakeBuild(build_ext):
    """Builds csrc/ with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        try:
            import pybind11

            configure = [
                "cmake",
                *("-S", str(CSRC), "-B", str(build), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            ]
            try:
                self._cmake(build, configure)
            except subprocess.CalledProcessError:
                # an nvcc that cannot build its part must not cost the CPU its own
                self._cmake(build, [*configure, "-DFASTLORA_CUDA=OFF"])
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native core cannot be built: {error}") from error

    @staticmethod
    def _cmake(build: Path, configure: list[str]) -> None:
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


core = Extension("fastlora._C", [], optional=WISH != "1")
setup(ext_modules=[] if WISH == "0" else [core], cmdclass={"build_ext": CMakeBuild})
