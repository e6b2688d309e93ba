"""examples/tensor_parallel.py as the pages run it."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from examples import tensor_parallel
from tests.processes import run
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent
COMMAND = "torchrun --nproc-per-node 4 examples/tensor_parallel.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_example_agrees_with_one_process(ranks: int) -> None:
    for page in ("docs/parallel.md", "examples/README.md", "examples/tensor_parallel.py"):
        assert COMMAND in (ROOT / page).read_text(), page
    words = COMMAND.replace("4", f"{ranks} --master-port {free_port()}").split()[1:]
    done = run([sys.executable, "-m", "torch.distributed.run", *words], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *losses, last = done.stdout.splitlines()
    for line, name in zip(losses, ("logits", "hidden states"), strict=True):
        steps = [float(x) for x in re.findall(r"\d\.\d+", line)]
        assert line.startswith(f"from {name}, ") and len(steps) == tensor_parallel.STEPS
        assert all(later < earlier for earlier, later in pairwise(steps))
    assert losses[0].split(":")[1] == losses[1].split(":")[1]
    found = re.fullmatch(rf"{ranks} ranks? differ from one process by at most (\S+)", last)
    assert found is not None and float(found[1]) <= tensor_parallel.AGREE


def test_its_comparison_sees_a_difference() -> None:
    model, other = (tensor_parallel.Model(8, None) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert tensor_parallel.difference([1.0], model, [1.0], other, None) == 0
    for p in other.parameters():
        with torch.no_grad():
            p[-1] += 2e-5
        assert tensor_parallel.difference([1.0], model, [1.0], other, None) > tensor_parallel.AGREE
        other.load_state_dict(model.state_dict())
    assert tensor_parallel.difference([1.0], model, [1.1], other, None) > 0.09
