"""The README runs as printed, and names only tests that are there."""

import fnmatch
import re
from pathlib import Path

import torch

from benchmarks import report

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


def test_every_test_that_it_names_is_there() -> None:
    files = {path.name: re.findall(r"def (test_\w+)", path.read_text()) for path in (ROOT / "tests").glob("test_*.py")}
    every = [name for names in files.values() for name in names]
    named = re.findall(r"`((?:test_\w+\.py::)?test_[\w*]+(?:\.py)?)`", README)
    assert len(named) > 20
    for name in named:
        file, _, pattern = name.rpartition("::")
        found = name in files or fnmatch.filter(files[file] if file else every, pattern)
        assert found, name


def test_what_is_measured_is_what_the_results_say() -> None:
    marks = [mark[1] for mark in report.MARK.findall(README)]
    assert marks == ["demo", "cases", "cases", "exponents", "compiled", "gpu"]
    assert report.filled(README) == README, "run python -m benchmarks report README.md"
