"""Programs that a test starts: a new Python, one under a sanitizer, and a build that all workers share."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import extension

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "tests"
HANGS = 3_600  # seconds, after which a program is taken to hang, on a machine however busy
HASTEN = "from tests.interpreter import hasten\nhasten()\n"  # for a Python that runs Triton's interpreter
SANITIZED = "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1", "-DTOPK_RKL_SANITIZE=address,undefined"

can_build = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("cmake", "pybind11"))), reason="CMake or pybind11 is not installed here"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with nothing but these switches set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TOPK_RKL_BACKEND")}
    return run([sys.executable, "-c", code], env=kept | environment)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, **options, capture_output=True, text=True, timeout=HANGS, check=False)


def sanitized_python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A Python that was not built for a sanitizer must be given its runtime before anything else."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    path = os.pathsep.join(map(str, (folder, folder / "tests")))
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    return run([sys.executable, *words], cwd=folder, env=os.environ | preload)


def built(name: str, *targets: str, options: tuple[str, ...]) -> Path:
    """The folder of these CMake targets, built by the first that asks for it, and anew where anything has changed."""
    folder = BUILDS / name
    given = digest(targets, options)
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "digest"
        if not done.exists() or done.read_text() != given:
            shutil.rmtree(folder, ignore_errors=True)
            build(folder, targets, options)
            done.write_text(given)
    return folder


def built_for_sm_90a() -> Path:
    """By nvcc, for one generation; an installation has all."""
    return built("cuda-for-sm-90a", "_cuda", options=("-DTOPK_RKL_CUDA=device", "-DCMAKE_CUDA_ARCHITECTURES=90a-real"))


def digest(*given: object) -> str:
    """Of the sources, what is asked for, and what it is built with."""
    compilers = [run([name, "--version"]).stdout for name in ("c++", "gcc", "nvcc") if shutil.which(name)]
    flags = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "LDFLAGS")]
    return hashlib.sha256(repr((given, extension.sources(), ROOT, sys.version, compilers, flags)).encode()).hexdigest()


def build(folder: Path, targets: tuple[str, ...], options: tuple[str, ...]) -> None:
    import pybind11

    cmake = [sys.executable, "-m", "cmake"]
    options = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options)
    subprocess.run([*cmake, "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    command = [*cmake, "--build", folder, "--target", *targets, "--parallel", "2"]
    subprocess.run(command, check=True, capture_output=True)


def package(folders: pytest.TempPathFactory, build: Path) -> Path:
    """A new folder with the package around the extensions of a build, and with the tests."""
    folder = folders.mktemp("package")  # not of the test's name, with which pytest compares the words of -k
    shutil.copytree(ROOT / "topk_rkl", folder / "topk_rkl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in build.glob("*.so"):
        shutil.copy(library, folder / "topk_rkl")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return folder
