"""Builds topk_rkl._native with CMake. Where that fails, the package is installed without it and works without it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MISSING = """
The compiled extension of topk_rkl was not built ({error}).
The package works without it, slower on a CPU; to have it, install a C++20 compiler (GCC or Clang) and reinstall.
"""


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # what is left of an earlier build must not outlive a failed one
        try:
            self.build(Path(self.build_temp).resolve(), target.parent)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(MISSING.format(error=error), file=sys.stderr)

    def build(self, folder: Path, target: Path) -> None:
        import pybind11

        cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
        generator = ["-G", "Ninja"] if importlib.util.find_spec("ninja") else []
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run([*cmake, "-S", ROOT, "-B", folder, "--fresh", *generator, *options], check=True)
        subprocess.run([*cmake, "--build", folder, "--target", "_native", "--parallel", "2"], check=True)
        subprocess.run([*cmake, "--install", folder, "--prefix", target], check=True)


setup(
    ext_modules=[Extension("topk_rkl._native", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
