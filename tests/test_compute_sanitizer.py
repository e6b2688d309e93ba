"""The CUDA kernels on a GPU under the four tools of compute-sanitizer, each shown to be on by a planted fault."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS

ROOT = Path(__file__).parent.parent
CASES = """
import torch
from tests import cases
from topk_rkl.backends import cuda
for dtype in (torch.bfloat16, torch.float32):
    for vocab, k in ((33, 33), (4_099, 300), (40_003, 64)):
        rows = cases.rows(vocab, k, dtype, ["random", "two_valued", "one_nan"], "cuda")
        cuda.select(rows, k, True)
        loss, ids, g = cuda.select_loss(rows[:1], rows[1:2], k, None, 1.0)
        cuda.support_loss(rows[:1], ids, g, loss, 0.5)
        for unique in (True, False):
            cuda.scatter(g, ids, loss, torch.empty_like(rows[:1]), unique)
    hidden, head = torch.randn(300, 1_030, device="cuda").to(dtype), torch.randn(400, 1_030, device="cuda").to(dtype)
    ids = torch.randint(-1, 400, (300, 100), device="cuda")
    values = torch.randn(300, 100, device="cuda")
    _, g, _ = cuda.sparse_head(hidden, head, head[:, 0], ids, values, None, 1.0, 1.0, 9.0, True)
    cuda.sparse_head_weight_grad(g, ids, hidden, torch.empty_like(head), torch.empty_like(head[:, 0]))
torch.cuda.synchronize()
"""
PLANTED = """
__global__ void memcheck(int* x) { x[threadIdx.x + 1] = 1; }
__global__ void initcheck(int* x) { if (x[threadIdx.x] == 7) x[0] = 1; }
__global__ void racecheck(int* x) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void synccheck(int* x) {
  if (threadIdx.x < 8) __syncwarp(0xffff0000);
  x[threadIdx.x] = 1;
}
int main() {
  int* x;
  if (cudaMalloc(&x, 64 * sizeof(int))) return 1;
  TOOL<<<1, 64>>>(x);
  cudaDeviceSynchronize();
}
"""
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels cannot run here"),
    pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed here"),
]


def checked(tool: str, *command: str) -> subprocess.CompletedProcess:
    # Without its cache torch asks CUDA for each tensor, whose ends the tool then knows.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_kernels_without_a_fault(tool: str) -> None:
    ours = ("--kernel-name", "regex:topk_rkl")  # and not those of torch
    outcome = checked(tool, *ours, sys.executable, "-c", CASES)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc, which compiles the planted fault, is not installed here")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_planted_fault_is_caught(tool: str, tmp_path: Path) -> None:
    (tmp_path / "planted.cu").write_text(PLANTED)
    program = str(tmp_path / "planted")
    subprocess.run(["nvcc", "-arch=native", f"-DTOOL={tool}", str(tmp_path / "planted.cu"), "-o", program], check=True)
    assert checked(tool, program).returncode == 9
