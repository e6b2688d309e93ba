"""The kernels touch no byte beside their tensors: the interpreter's loads and stores, under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

from tests.processes import HANGS, HASTEN

RUN = """
import torch
from tests.direct import Direct
from topk_rkl.backends import triton
backend = Direct(triton)
for vocab, k in ((1, 1), (33, 33), (507, 16), (2049, 65)):
    for dtype in (torch.bfloat16, torch.float32):
        student, teacher = torch.randn(2, 2, vocab).to(dtype)
        student, teacher = student.clone(), teacher.clone()  # each its own allocation, with a red zone around
        backend.select(teacher, k, True)
        loss, ids, g = backend.select_loss(student, teacher, k, torch.tensor([1.0, 0.0]), 1.0)
        backend.support_loss(student, ids, g, None, 1.0)
        ascending = torch.where(ids[:1] < 0, vocab, ids[:1]).sort().values.expand(2, k).contiguous()
        ascending[ascending == vocab] = -1
        tail = backend.tail_logit(teacher, ascending, 1.0)
        _, g, outside = backend.mass_loss(student, ascending, g, tail, None, 1.0, (2.0, 0.5, 0.5, 0.5, 0.5), "tail")
        backend.mass_grad(g, ascending, outside, loss, None, 1.0, student.clone())
        for unique in (True, False):
            backend.scatter(g, ids, loss, torch.empty_like(student), unique)
    ids = torch.tensor([[0, vocab - 1, vocab, -1, vocab + 7] * 4] * 2)
    for width in (1, 33):
        hidden, head = torch.randn(2, width).bfloat16(), torch.randn(vocab, width).bfloat16()
        g = backend.linear_logits(hidden, head, torch.randn(vocab), ids)
        backend.linear_hidden_grad(g + 1, ids, head)
print("done")
"""
PLANTED = """
import torch
import triton
import triton.language as tl

@triton.jit
def copy(source, target, N: tl.constexpr):
    tl.store(target + tl.arange(0, N), tl.load(source + tl.arange(0, N)))

source, target = torch.randn(64), torch.empty(64)
copy[(1,)](source, target, N=64)
print("in bounds", flush=True)
copy[(1,)](source, target, N=128)
print("not caught")
"""


def library(name: str) -> str | None:
    """Where gcc keeps it, or None."""
    if not shutil.which("gcc"):
        return None
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if os.path.isabs(path) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.interpreter,
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU compute-sanitizer is the tool"),
    pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed here"),
    pytest.mark.skipif(not library("libasan.so"), reason="gcc with AddressSanitizer is not installed here"),
]


def sanitized(script: Path, code: str) -> subprocess.CompletedProcess:
    script.write_text(code)
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.getcwd(),
        "TRITON_INTERPRET": "1",
    }
    return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HANGS)


def test_the_sanitizer_catches_a_planted_fault(tmp_path: Path) -> None:
    outcome = sanitized(tmp_path / "planted.py", PLANTED)
    assert outcome.returncode != 0
    assert outcome.stdout.strip() == "in bounds"
    assert "heap-buffer-overflow" in outcome.stderr


def test_no_kernel_leaves_its_tensors(tmp_path: Path) -> None:
    outcome = sanitized(tmp_path / "kernels.py", HASTEN + RUN)
    assert outcome.stdout.strip() == "done", outcome.stderr
