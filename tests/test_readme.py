"""The README runs as printed, and a stranger reads it in two minutes. test_docs.py holds what else it says."""

import re
from pathlib import Path

import pytest
import torch
from stand_in_servers import NAME, VLLMStandIn, serving
from tiny_models import K, collate, rows, tiny
from transformers import Trainer, TrainingArguments

from topk_rkl.trainers.transformers import distill

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ELSEWHERE = [block for block in BLOCKS if "compute_loss_func" in block]  # of teachers behind servers and in stores


def test_the_quick_start_runs_and_equals_the_plain_form() -> None:
    scope: dict = {}
    for block in BLOCKS:
        if block not in ELSEWHERE:
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


@pytest.mark.slow
def test_the_lines_on_servers_train(tmp_path: Path) -> None:
    """Against a stand-in of vLLM, as with the teacher itself. test_cli.py has the lines on a store."""
    block, teacher = ELSEWHERE[0], tiny(seed=1, layers=2).eval()
    args = TrainingArguments(str(tmp_path), max_steps=2, optim="sgd", learning_rate=1.0, report_to="none", use_cpu=True)
    scope = {"student": tiny(), "args": args, "data": rows(8), "collate": collate}
    with serving(VLLMStandIn(teacher)) as server:
        for printed, here in {"http://localhost:8000": server.url, "Qwen/Qwen3-32B": NAME, "k=32": f"k={K}"}.items():
            assert printed in block
            block = block.replace(printed, here)
        exec(block, scope)
    untrained, student = tiny(), tiny()
    loss = distill(student, teacher, k=K)
    Trainer(student, args, train_dataset=rows(8), data_collator=collate, compute_loss_func=loss).train()
    for got, want, first in zip(*(x.parameters() for x in (scope["student"], student, untrained)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert not torch.equal(want, first)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 175
