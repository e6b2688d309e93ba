"""The README runs as printed, and a stranger reads it in two minutes. test_docs.py holds what else it says."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_and_equals_the_plain_form() -> None:
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, scope)
    student, teacher = scope["student_logits"].detach().requires_grad_(), scope["teacher_logits"]
    want = scope["plain"](student, teacher, 32, scope["response_mask"])
    want.backward()
    torch.testing.assert_close(scope["loss"], want, rtol=1e-5, atol=0)
    torch.testing.assert_close(scope["student_logits"].grad, student.grad, rtol=1e-4, atol=1e-9)
    hidden, head = (scope[name].detach().requires_grad_() for name in ("hidden", "head"))
    want = scope["plain"](hidden @ head.T, teacher, 32, scope["response_mask"])
    want.backward()
    torch.testing.assert_close(scope["linear_loss"], want, rtol=1e-5, atol=0)
    for name, leaf in (("hidden", hidden), ("head", head)):
        torch.testing.assert_close(scope[name].grad, leaf.grad, rtol=1e-4, atol=1e-7)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 160
