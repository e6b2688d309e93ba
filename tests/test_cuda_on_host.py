"""The CUDA kernels without a GPU: built for the host, where a thread is a fibre, under the address and the
undefined-behaviour sanitizer, and run on the shared cases; and built by nvcc for one generation, and not run.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

from tests.processes import SANITIZED, built, built_for_sm_90a, can_build, package, run, sanitized_python

SHORT = """
import torch
from tests.direct import Direct
from topk_rkl import _cuda, backends
cuda, logits = Direct(backends._load("cuda")), torch.randn(2, 9_000)
cuda.select(logits, 300)
print("in bounds", flush=True)
_cuda.shorten(8)
cuda.select(logits, 300)
"""
ONE_TOO_MANY = """
import torch
from topk_rkl import _cuda
row = torch.randn(5_000).bfloat16()
ids, log_probs = torch.empty(4, dtype=torch.int32), torch.empty(4)
print("in bounds", flush=True)
logits = (row.data_ptr(), 0, 1, 5_001, 5_001, 1, 1, 0)
_cuda.select((logits, True, (ids.data_ptr(), 4), (log_probs.data_ptr(), 4)), (0, 0, 0))
"""
DRIVERLESS = """
import torch
from topk_rkl import _cuda, backends
assert not _cuda.HOST and "nvcc" in _cuda.BUILD
assert "no GPU" in backends.unavailable("cuda")
try:
    slots, out = (0, 2, 3, 1, 1, 1, 3, 0), (0, 2, 3, 9, 9, 1, 3, 0)
    _cuda.scatter((slots, slots, (0, 2, 3, 1), out, True), (0, 0, 0))
except RuntimeError as error:
    print(error)
"""

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs them itself"),
    can_build,
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed here"),
    pytest.mark.slow,
]


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package around the CUDA kernels built for the host."""
    return package(tmp_path_factory, built("cuda-on-host", "_cuda", options=("-DTOPK_RKL_CUDA=host", *SANITIZED)))


@pytest.mark.parametrize("code", [SHORT, ONE_TOO_MANY], ids=["shared memory", "global memory"])
def test_a_step_out_of_bounds_is_caught(host: Path, code: str) -> None:
    outcome = sanitized_python(host, "-c", code)
    assert outcome.returncode != 0 and outcome.stdout.strip() == "in bounds", outcome.stderr
    assert "heap-buffer-overflow" in outcome.stderr


def test_the_shared_cases_without_a_fault(host: Path) -> None:
    # A row as long as 50,257 takes all paths; the others would take a minute more.
    cases = "cuda and not 262144 and not 151936 and not 128256 and not 49152 and not accuracy and not memory"
    options = ["-q", "-s", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore", "-k", cases]
    files = ("cuda", "select", "loss", "linear_loss", "slabs", "outputs")
    outcome = sanitized_python(host, "-m", "pytest", *options, *(f"tests/test_{file}.py" for file in files))
    assert outcome.returncode == 0 and " passed" in outcome.stdout, outcome.stdout + outcome.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed here")
def test_nvcc_builds_a_module_that_needs_no_driver(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A launch that fails names its kernel and its shape."""
    folder = package(tmp_path_factory, built_for_sm_90a())
    done = run([sys.executable, "-c", DRIVERLESS], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    assert "scatter_kernel of N = 3, V = 9" in done.stdout and "CUDA driver" in done.stdout
