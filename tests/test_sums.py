"""The Triton kernels add float32 numbers in one order, whatever the strides and the alignment of what they load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel to compile")

ROOT = Path(__file__).parent.parent
# The sums over more than two float32: their order would be that of a layout, which no program states.
CALLS = """
import json, re, sys
import torch
from benchmarks.compiled_cost import Case, call_launcher, compile_call, gpu_target

REDUCE = re.compile(r'"tt.reduce"\\(.*?\\) <{axis = (\\d+) : i32}> \\({(.*?)}\\) : \\((.*?)\\)', re.S)
found = {}
for name, width in (("linear_loss", 64), ("linear_logits", 64), ("linear_weight_grad", 64), ("tail_logit", 0),
                    ("mass_loss", 0), ("normalize", 0), ("select_loss", 0), ("support_loss", 0)):
    case = Case(name, torch.bfloat16, 4112, 16, width)
    for kernel, _ in compile_call(lambda: call_launcher(case), gpu_target("sm_90")):
        sums = found.setdefault(kernel.metadata.name, [])
        for axis, body, tensor in REDUCE.findall(kernel.asm["ttir"]):
            if "arith.addf" in body and tensor.endswith("xf32>"):
                sums.append(int(re.findall(r"(\\d+)x", tensor)[int(axis)]))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_sum_of_float32_is_of_two_at_a_time(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", CALLS], check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    summing = {"linear_loss", "linear_logits", "tail_logit", "mass_loss", "select"}
    assert {name for name, sums in found.items() if sums} == {f"{name}_kernel" for name in summing}
    assert {size for sums in found.values() for size in sums} == {2}
