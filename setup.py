"""Builds topk_rkl._native and topk_rkl._cuda with CMake. Where that fails, the package is installed without them.

TOPK_RKL_BUILD_CUDA: "off", the default, leaves out the second: on the one GPU that was timed, Triton's were faster.
"on" insists on it, "auto" tries it where nvcc is found.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD_CUDA = os.environ.get("TOPK_RKL_BUILD_CUDA", "off")
MISSING = {
    "_native": """
The compiled extension of topk_rkl was not built ({error}).
The package works without it, slower on a CPU; to have it, install a C++20 compiler (GCC or Clang) and reinstall.
""",
    "_cuda": """
The CUDA part of the compiled extension of topk_rkl was not built ({error}).
The package works without it, with Triton on a GPU. TOPK_RKL_BUILD_CUDA=on stops here instead.
""",
}


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # what is left of an earlier build must not outlive a failed one
        if name == "_cuda" and not self.wants_cuda():
            return
        try:
            self.build(name, Path(self.build_temp).resolve() / name, target.parent)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if name == "_cuda" and BUILD_CUDA == "on":
                raise
            print(MISSING[name].format(error=error), file=sys.stderr)

    def wants_cuda(self) -> bool:
        if BUILD_CUDA not in ("auto", "on", "off"):
            raise ValueError(f"TOPK_RKL_BUILD_CUDA is {BUILD_CUDA!r}; use auto, on or off")
        found = shutil.which(os.environ.get("CUDACXX", "nvcc"))
        return BUILD_CUDA == "on" or (BUILD_CUDA == "auto" and found is not None)

    def build(self, name: str, folder: Path, target: Path) -> None:
        import pybind11

        cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
        generator = ["-G", "Ninja"] if importlib.util.find_spec("ninja") else []
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTOPK_RKL_CUDA={'device' if name == '_cuda' else 'off'}",
        ]
        subprocess.run([*cmake, "-S", ROOT, "-B", folder, "--fresh", *generator, *options], check=True)
        subprocess.run([*cmake, "--build", folder, "--target", name, "--parallel", "2"], check=True)
        subprocess.run([*cmake, "--install", folder, "--component", name, "--prefix", target], check=True)


setup(
    ext_modules=[Extension(f"topk_rkl.{name}", [], optional=BUILD_CUDA != "on") for name in MISSING],
    cmdclass={"build_ext": CMakeBuild},
)
