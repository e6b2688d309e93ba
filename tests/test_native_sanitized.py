"""csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer: the native cases, and rows drawn byte by byte.

By hand, for longer: `fuzz 600 SEED`, built as here, also with `-DTOPK_RKL_SANITIZE=thread`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

ROOT = Path(__file__).parent.parent
SECONDS = "10"
ONE_TOO_MANY = """
import torch
from topk_rkl import _native
row = torch.randn(5_000).bfloat16()
ids, values = torch.empty(4, dtype=torch.int32), torch.empty(4)
print("in bounds", flush=True)
_native.select((row.data_ptr(), 0, 5_001, 5_001, 1, 1, 0), 1, 4, False, 1, ids.data_ptr(), values.data_ptr())
"""

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or "native" not in BACKENDS, reason="the extension was not built here"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("cmake", "pybind11"))), reason="CMake or pybind11 is not installed here"
    ),
    pytest.mark.xdist_group("sanitized"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `fuzz`, and with the package around a sanitized extension."""
    import pybind11

    folder = tmp_path_factory.mktemp("sanitized")
    cmake = [sys.executable, "-m", "cmake"]
    options = [
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1", "-DTOPK_RKL_SANITIZE=address,undefined",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    subprocess.run([*cmake, "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([*cmake, "--build", folder, "--target", "fuzz", "_native"], check=True, capture_output=True)
    shutil.copytree(ROOT / "topk_rkl", folder / "topk_rkl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for extension in folder.glob("_native*.so"):
        shutil.move(extension, folder / "topk_rkl")
    shutil.copytree(ROOT / "tests", folder / "tests")
    return folder


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False)


def python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A Python that was not built for a sanitizer must be given its runtime before anything else."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    path = os.pathsep.join(map(str, (folder, folder / "tests")))
    return run(folder, sys.executable, *words, PYTHONPATH=path, **preload)


def test_the_sanitizer_catches_a_planted_fault_in_the_extension(build: Path) -> None:
    for outcome in (run(build, "./fuzz", "plant"), python(build, "-c", ONE_TOO_MANY)):
        assert outcome.returncode != 0 and outcome.stdout.strip() == "in bounds", outcome.stderr
        assert "heap-buffer-overflow" in outcome.stderr


def test_the_native_cases_without_a_fault(build: Path) -> None:
    options = ["-q", "-s", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore", "-k", "native"]
    files = ("native", "select", "loss", "linear", "linear_loss", "divergence", "mass", "slabs")
    tests = [f"tests/test_{file}.py" for file in files]
    outcome = python(build, "-m", "pytest", *options, *tests)
    assert outcome.returncode == 0 and " passed" in outcome.stdout, outcome.stdout + outcome.stderr


def test_any_bytes_give_the_stable_order_and_no_fault(build: Path) -> None:
    outcome = run(build, "./fuzz", SECONDS)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert int(outcome.stdout.split()[0]) > 10  # cases; a busy machine has fewer
