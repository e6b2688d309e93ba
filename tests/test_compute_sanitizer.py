"""The CUDA kernels on a GPU under the four tools of compute-sanitizer, each shown to be on by a planted fault."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

from gpu import sanitizer
from tests.direct import reference
from tests.processes import HANGS

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

installed = pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed here")


def checked(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = sanitizer.environment()
    return subprocess.run(
        command, cwd=sanitizer.ROOT, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )


@pytest.mark.gpu
@installed
@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels cannot run here")
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_the_kernels_without_a_fault(tool: str) -> None:
    outcome = checked(sanitizer.over_the_cases(tool))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.gpu
@installed
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc, which compiles the planted fault, is not installed here")
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_planted_fault_is_caught(tool: str, tmp_path: Path) -> None:
    (tmp_path / "planted.cu").write_text(PLANTED)
    program = str(tmp_path / "planted")
    subprocess.run(["nvcc", "-arch=native", f"-DTOOL={tool}", str(tmp_path / "planted.cu"), "-o", program], check=True)
    outcome = checked(sanitizer.command(tool, program))
    assert outcome.returncode == sanitizer.FAULTS, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_the_filter_is_in_the_syntax_of_the_tool(tool: str) -> None:
    """`regex=`; with `regex:`, which is ncu's, it says "Filter ill-formed" and runs nothing."""
    command = sanitizer.over_the_cases(tool)
    key, _, pattern = command[command.index("--kernel-name") + 1].partition("=")
    assert command[0] == "compute-sanitizer" and command[command.index("--tool") + 1] == tool
    assert key == "regex" and "topk_rkl" in pattern.split("|")
    ports = {sanitizer.command(name)[sanitizer.command(name).index("--port") + 1] for name in sanitizer.TOOLS}
    assert len(ports) == len(sanitizer.TOOLS)  # side by side, each listens on its own


@pytest.mark.slow
@installed
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_the_tool_takes_the_options(tool: str) -> None:
    """Over a program that never asks for a GPU, of which the tool is told."""
    command = sanitizer.command(tool, "--require-cuda-init", "no", "true", kernels=sanitizer.CHECKED[tool])
    outcome = checked(command)
    assert outcome.returncode == 0 and "ill-formed" not in outcome.stdout + outcome.stderr, outcome.stderr


@pytest.mark.slow
def test_the_cases_are_calls_that_a_backend_takes() -> None:
    entries = ("select", "select_loss", "support_loss", "scatter", "linear_loss", "linear_weight_grad")
    backend = SimpleNamespace(**{name: Mock(wraps=getattr(reference, name)) for name in entries})
    sanitizer.run_cases(backend, "cpu")
    assert [getattr(backend, name).call_count for name in entries] == [6, 6, 6, 12, 2, 2]


def test_no_kernel_of_torch_makes_an_input() -> None:
    """initcheck counts the writes of the kernels that it checks, and copies. "meta" stands in for the GPU."""

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in tensors)

    calls: list[str] = []
    backend = SimpleNamespace(
        select=lambda *_: calls.append("select"),
        select_loss=lambda student, _, k, *__: outputs(student[:, 0], student[:, :k], student[:, :k]),
        support_loss=lambda *_: calls.append("support_loss"),
        scatter=lambda *_: calls.append("scatter"),
        linear_loss=lambda *arguments: outputs(arguments[4][:, 0], arguments[4], arguments[0]),
        linear_weight_grad=lambda *_: calls.append("weight_grad"),
    )
    with OnDevice() as seen:
        sanitizer.run_cases(backend, "meta")
    assert calls.count("select") == 6 and calls.count("scatter") == 12 and calls.count("weight_grad") == 2
    assert set(seen.names) <= {"_to_copy", "alias", "slice", "select", "empty_like"}, seen.names


class OnDevice(TorchDispatchMode):
    """The names of the operations that give a tensor on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(leaf.is_meta for leaf in tensors(result)):
            self.names.add(function.overloadpacket.__name__)
        return result


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
