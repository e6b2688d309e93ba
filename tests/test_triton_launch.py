"""Triton's own launcher takes the arguments of our kernels, in their order: over a stand-in for the CUDA driver."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to launch with")

import triton

ROOT = Path(__file__).parent.parent
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
# Each launch copies what it is given; what is asked of the driver besides has an answer of no consequence.
DRIVER = """
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; } Config;
static long long seen[64]; static int sizes[64], count; static unsigned threads;
void expect(int n, const int* bytes) { count = n; memcpy(sizes, bytes, n * sizeof(int)); }
unsigned given(long long* to) { memcpy(to, seen, sizeof seen); return threads; }
int cuLaunchKernelEx(const Config* config, void* kernel, void** arguments, void** extra) {
  memset(seen, 0, sizeof seen);
  for (int i = 0; i < count; ++i) memcpy(&seen[i], arguments[i], sizes[i]);
  threads = config->block[0];
  return 0;
}
int cuPointerGetAttribute(unsigned long long* to, int attribute, unsigned long long p) { *to = p; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)8; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = 232448; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)8; return 0; }
int cuModuleGetFunction(void** kernel, void* module, const char* name) { *kernel = (void*)8; return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* kernel) { *value = 1024; return 0; }
"""
CALLS = """
import ctypes, re, torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tests.direct import Direct
from topk_rkl.backends import triton
backend = Direct(triton)

libcuda = ctypes.CDLL("libcuda.so.1")

class Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, _):
        return 0

def leaves(tree):
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple) else [tree]

def launch(kernel, *args, **options):
    compiled = run(kernel, *args, **{**options, "warmup": True})
    entry = compiled.asm["ptx"].split(".entry")[1].split(")")[0]
    sizes = [int(bits) // 8 for bits in re.findall(r"\\.param \\.[ufbs](\\d+)", entry)]
    libcuda.expect(len(sizes), (ctypes.c_int * 64)(*sizes))
    run(kernel, *args, **options)
    raw = (ctypes.c_longlong * 64)()
    assert libcuda.given(raw) == 32 * options["num_warps"], options
    passed = [x for x in leaves(args) if x is not None and not (isinstance(x, int) and x == 1)]  # 1 is compiled in
    assert len(sizes) == len(passed) + 2, (len(sizes), passed)  # scratch of Triton's own stands last
    for want, got in zip(passed, raw):
        if isinstance(want, torch.Tensor):
            assert got == want.data_ptr(), kernel
        elif isinstance(want, float):
            assert ctypes.c_float.from_buffer_copy(ctypes.c_longlong(got)).value == ctypes.c_float(want).value, kernel
        else:
            assert got == want, (kernel, want, got)
    print(kernel.__name__, flush=True)

driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, launch
student = torch.empty(3, 5, 4112, dtype=torch.bfloat16)[:, :-1]
teacher, weights = torch.empty(12, 4112, dtype=torch.bfloat16), torch.rand(12)
loss, ids, g = backend.select_loss(student, teacher, 16, weights, 0.7)
backend.scatter(g, ids, loss, student, False)
hidden, head = torch.empty(3, 5, 64, dtype=torch.bfloat16)[:, 1:], torch.empty(4112, 64, dtype=torch.bfloat16)
backend.linear_loss(hidden, head, None, ids, g, None, 1.0, 0.5, None, True)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the kernels are launched in earnest")
@pytest.mark.skipif(
    not shutil.which("gcc"), reason="gcc, which Triton's launcher is compiled with, is not installed here"
)
def test_the_arguments_arrive(tmp_path: Path) -> None:
    named = set(
        re.findall(r"\b(cu[A-Z]\w+)\(", "".join((NVIDIA / f"driver.{kind}").read_text() for kind in ("c", "py")))
    )
    others = (f"int {name}(void) {{ return 0; }}" for name in sorted(named) if f"{name}(" not in DRIVER)
    (tmp_path / "driver.c").write_text(DRIVER + "\n".join(others))
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, str(tmp_path / "driver.c")], check=True)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CALLS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["select_kernel", "merge_kernel", "scatter_kernel", "linear_loss_kernel"]
