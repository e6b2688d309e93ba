"""What tests/interpreter.py leaves out of Triton's interpreter changes no bit."""

import pytest
from conftest import BACKENDS, DEVICE

from tests.processes import HASTEN, python

CODE = """
import torch
from topk_rkl import linear_topk_reverse_kl, teacher_topk, topk_divergence, topk_reverse_kl, use_backend
torch.manual_seed(0)
student, teacher = torch.randn(2, 2, 700).bfloat16().requires_grad_(), torch.randn(2, 700).bfloat16()
teacher[0, ::9], teacher[1, 3] = 2, -torch.inf
hidden, head = torch.randn(2, 70, requires_grad=True), torch.randn(40, 70, requires_grad=True)
with use_backend("triton"):
    support = teacher_topk(teacher[:, :40], 5, normalize=True)
    loss = topk_reverse_kl(student[0], teacher, k=20) + topk_divergence(student[1], teacher, k=9, mass="tail")
    (loss + linear_topk_reverse_kl(hidden, head, support, softcap=9.0)).backward()
print(loss.item(), *(x.tolist() for x in (*support.tensors, student.grad, hidden.grad, head.grad)))
"""


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.skipif(DEVICE != "cpu" or "triton" not in BACKENDS, reason="Triton's interpreter is not used here")
def test_the_hastened_interpreter_gives_the_same_bits() -> None:
    plain, hastened = (python(start + CODE, TRITON_INTERPRET="1") for start in ("", HASTEN))
    assert plain.returncode == 0, plain.stderr
    assert hastened.stdout == plain.stdout, hastened.stderr
