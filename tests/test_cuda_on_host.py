"""The CUDA kernels without a GPU: built for the host, where a thread is a fibre, under the address and the
undefined-behaviour sanitizer, and run on the shared cases; and built by nvcc for one generation, and not run.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE
from test_native_sanitized import ROOT, python

SHORT = """
import torch
from topk_rkl import _cuda
from topk_rkl.backends import cuda
logits = torch.randn(2, 9_000)
cuda.select(logits, 300)
print("in bounds", flush=True)
_cuda.shorten(8)
cuda.select(logits, 300)
"""
ONE_TOO_MANY = """
import torch
from topk_rkl import _cuda
row = torch.randn(5_000).bfloat16()
ids, values = torch.empty(4, dtype=torch.int32), torch.empty(4)
print("in bounds", flush=True)
_cuda.select((row.data_ptr(), 0, 5_001, 5_001, 1, 1, 0), 1, 4, True, 0, ids.data_ptr(), values.data_ptr(), (0, 0))
"""
DRIVERLESS = """
import torch
from topk_rkl import _cuda, backends
assert not _cuda.HOST and "nvcc" in _cuda.BUILD
assert "no GPU" in backends.unavailable("cuda")
try:
    _cuda.scatter(*[(0, 2, 1, 1, 1, 3, 0)] * 2, (0, 2, 1), (0, 2, 9, 9, 1, 3, 0), 3, 1, True, (0, 0))
except RuntimeError as error:
    print(error)
"""

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs them itself"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("cmake", "pybind11"))), reason="CMake or pybind11 is not installed here"
    ),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed here"),
]
on_host = pytest.mark.xdist_group("cuda on host")  # which share one build


def built(folder: Path, *options: str) -> Path:
    """A folder with the package around the extension, and with its tests."""
    import pybind11

    cmake = [sys.executable, "-m", "cmake"]
    options = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options)
    subprocess.run([*cmake, "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([*cmake, "--build", folder, "--target", "_cuda", "--parallel", "2"], check=True, capture_output=True)
    shutil.copytree(ROOT / "topk_rkl", folder / "topk_rkl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for extension in folder.glob("_cuda*.so"):
        shutil.move(extension, folder / "topk_rkl")
    shutil.copytree(ROOT / "tests", folder / "tests")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(
        tmp_path_factory.mktemp("simt"),
        "-DTOPK_RKL_CUDA=host", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1",
        "-DTOPK_RKL_SANITIZE=address,undefined",
    )  # fmt: skip


@on_host
@pytest.mark.parametrize("code", [SHORT, ONE_TOO_MANY], ids=["shared memory", "global memory"])
def test_a_step_out_of_bounds_is_caught(host: Path, code: str) -> None:
    outcome = python(host, "-c", code)
    assert outcome.returncode != 0 and outcome.stdout.strip() == "in bounds", outcome.stderr
    assert "heap-buffer-overflow" in outcome.stderr


@on_host
def test_the_shared_cases_without_a_fault(host: Path) -> None:
    # A row as long as 50,257 takes all paths; the others would take a minute more.
    cases = "cuda and not 262144 and not 151936 and not 128256 and not 49152 and not accuracy and not memory"
    options = ["-q", "-s", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore", "-k", cases]
    files = ("cuda", "select", "loss", "linear_loss", "slabs")
    outcome = python(host, "-m", "pytest", *options, *(f"tests/test_{file}.py" for file in files))
    assert outcome.returncode == 0 and " passed" in outcome.stdout, outcome.stdout + outcome.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed here")
def test_nvcc_builds_a_module_that_needs_no_driver(tmp_path: Path) -> None:
    """For one generation; an installation has all. A launch that fails names its kernel and its shape."""
    folder = built(tmp_path, "-DTOPK_RKL_CUDA=device", "-DCMAKE_CUDA_ARCHITECTURES=90a-real")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVERLESS], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "scatter_kernel of N = 3, V = 9" in done.stdout and "CUDA driver" in done.stdout
