"""csrc/cuda/launch.hpp over a stand-in for CUDA's run time: what is asked of it, whatever another thread does."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import DEVICE

from tests.processes import HANGS

ROOT = Path(__file__).parent.parent
# Two devices, on each of which the kernel has a limit. On the second it has 1,024 bytes of shared memory besides.
RUN_TIME = r"""
#include <cstdio>
#include <cuda_runtime.h>

void meanwhile();
static int current = 7, limits[] = {48 << 10, 48 << 10};

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = name != cudaDevAttrMaxSharedMemoryPerBlockOptin ? -1 : device == 0 ? 232448 : 101376;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = current == 0 ? 0 : 1024;
  attributes->maxDynamicSharedSizeBytes = limits[current];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute name, int value) {
  std::printf("limit %d on %d\n", value, current);
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  return limits[current] = value, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  meanwhile();
  std::printf("%d bytes on %d\n", int(config->dynamicSmemBytes), current);
  return int(config->dynamicSmemBytes) <= limits[current] ? cudaSuccess : cudaErrorInvalidValue;
}
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
// What a program calls before and after main.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}
"""
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "launch.hpp"

static void kernel(int) {}  // an address: nothing is run

static int between = 0, on = 0;

static void launch(int bytes, int device) {
  topk_rkl::cuda::launch("kernel of K = 5", kernel, {1, 1, 32, bytes}, {device, nullptr}, 0);
}

void meanwhile() {
  if (const int bytes = std::exchange(between, 0)) launch(bytes, on);
}

int main(int, char** words) {
  try {
    while (*++words) {
      int bytes, device;
      if (std::sscanf(*words, "between:%d:%d", &bytes, &device) == 2) between = bytes, on = device;
      else if (std::sscanf(*words, "%d:%d", &bytes, &device) == 2) launch(bytes, device);
    }
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
  int device = 0;
  cudaGetDevice(&device);
  std::printf("device %d\n", device);
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cuda launch"),  # which share one program
    pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu.py launches from two threads"),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed here"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "run_time.cpp").write_text(RUN_TIME)
    (folder / "program.cu").write_text(PROGRAM)
    options = ("-std=c++17", "-arch=sm_90a", "-cudart", "none", "-I", str(ROOT / "csrc" / "cuda"))
    command = ["nvcc", *options, "run_time.cpp", "program.cu", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


def run(program: Path, launches: str) -> list[str]:
    """What is asked of the run time in the course of launches BYTES:DEVICE, and the current device after them.

    One that is `between` comes after the next has got its limit and before it starts, as that of another thread may.
    """
    done = subprocess.run([program, *launches.split()], capture_output=True, text=True, check=True, timeout=HANGS)
    return done.stdout.splitlines()


def test_no_launch_lowers_the_limit_of_another(program: Path) -> None:
    for other in (8, 50_000):
        lines = run(program, f"between:{other}:0 90000:0 60000:0")
        assert lines == ["limit 232448 on 0", f"{other} bytes on 0", "90000 bytes on 0", "60000 bytes on 0", "device 7"]


def test_each_device_has_its_limit(program: Path) -> None:
    """Less what the kernel has besides."""
    lines = run(program, "between:60000:1 60000:0 100352:1 49152:1")
    assert lines == [
        "limit 232448 on 0", "limit 100352 on 1", "60000 bytes on 1", "60000 bytes on 0", "100352 bytes on 1",
        "49152 bytes on 1", "device 7",
    ]  # fmt: skip


def test_what_needs_no_limit_asks_for_none(program: Path) -> None:
    assert run(program, "0:0 49152:1") == ["0 bytes on 0", "49152 bytes on 1", "device 7"]


def test_more_than_the_device_has_is_refused_with_the_numbers(program: Path) -> None:
    assert run(program, "232449:0 8:0") == [
        "kernel of K = 5, 1 x 1 blocks of 32 threads and 232449 bytes: device 0 has 232448 bytes of shared memory "
        "for a block; use a smaller K or another backend",
        "device 7",
    ]
