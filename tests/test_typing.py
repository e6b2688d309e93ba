"""What a type checker sees of the public names, and what help() prints of them."""

import inspect
import pydoc
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import topk_rkl
from docs import api
from tests.processes import run

ROOT = Path(__file__).parent.parent
USER = """
import torch
from torch import Tensor
from topk_rkl import (
    JensenShannon, LinearTopKDivergenceLoss, LinearTopKReverseKLLoss, Support, TopKDivergenceLoss, TopKReverseKLLoss,
    teacher_topk, topk_divergence, topk_reverse_kl,
)

x, head = torch.zeros(2, 9), torch.zeros(9, 4)
support = teacher_topk(x, k=3)
reveal_type(support)  # Support
reveal_type(support.log_probs)  # Tensor
reveal_type(topk_reverse_kl(x, support))  # Tensor
reveal_type(topk_divergence(x, x, k=3, divergence=JensenShannon(0.5)))  # Tensor
reveal_type(TopKReverseKLLoss(3)(x, x))  # Tensor
reveal_type(TopKDivergenceLoss(3, mass="tail")(x, support, weights=None))  # Tensor
reveal_type(LinearTopKReverseKLLoss()(x, head, support, student_bias=None))  # Tensor
reveal_type(LinearTopKDivergenceLoss()(x, head, support))  # Tensor
topk_reverse_kl(x, x, reduction="batchmean")  # arg-type
topk_reverse_kl(x, (x, x))  # arg-type
topk_divergence(x, x, mass="all")  # arg-type
TopKReverseKLLoss(3)(x, x, k=3)  # call-arg
"""


@pytest.mark.slow
def test_a_type_checker_knows_every_public_name(tmp_path: Path) -> None:
    names = [f"{path}.{name}" for path in api.MODULES for name in functions(path)]
    lines = [*USER.splitlines(), *(f"import {path}" for path in api.MODULES), *(f"reveal_type({x})" for x in names)]
    (tmp_path / "user.py").write_text("\n".join(lines))
    # With the options and so the cache of `mypy` in this tree.
    done = run([sys.executable, "-m", "mypy", "--no-pretty", "--show-error-codes", str(tmp_path / "user.py")], cwd=ROOT)
    found = dict(re.findall(r"user\.py:(\d+): (?:note: Revealed type is|error:) (.*)", done.stdout))
    assert len(names) > 40, done.stdout + done.stderr
    for number, line in enumerate(lines, start=1):
        if "reveal_type" not in line and "#" not in line:
            assert str(number) not in found, (line, found[str(number)])
        elif "#" in line:
            assert line.partition("#")[2].strip() in found[str(number)], (line, found[str(number)])
        else:
            seen = found[str(number)].replace("**options: Any", "")  # which another function takes by name
            assert seen.startswith('"def (') and "Any" not in seen, seen


def functions(path: str) -> list[str]:
    return [name for name, value in api.public(import_module(path)).items() if inspect.isfunction(value)]


def test_help_of_the_package_is_short_and_names_what_there_is() -> None:
    text = pydoc.plain(pydoc.render_doc(topk_rkl))
    assert len(text) < 40_000
    exported = [name for name, value in vars(topk_rkl).items() if inspect.isfunction(value) or inspect.isclass(value)]
    assert len(exported) >= 20 and [name for name in exported if name not in text] == []
    assert "equations 7 and 8" in text and "Tensor subclass" not in text
