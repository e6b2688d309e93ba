"""Who is timed has been found right: the contestants of the benchmark from hidden states agree with float64."""

import pytest
import torch

from benchmarks import linear_cpu


@pytest.mark.parametrize("gradients", linear_cpu.GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contestants_agree_with_float64(dtype: torch.dtype, gradients: str) -> None:
    p = linear_cpu.problem(linear_cpu.SMALL, dtype, gradients)
    want = linear_cpu.truth(p)
    for name, step in linear_cpu.ours_and_eager(p).items():
        assert linear_cpu.checked(name, step, p, want)["error"] <= linear_cpu.TOLERANCE[dtype]


def test_a_wrong_contestant_is_refused() -> None:
    p = linear_cpu.problem(linear_cpu.SMALL, torch.float32, "dense head")
    right = linear_cpu.ours_and_eager(p)["plain"]

    def wrong() -> torch.Tensor:
        loss = right()
        p.head.grad[0, 0] += 0.1 * p.head.grad.abs().max()
        return loss

    with pytest.raises(AssertionError, match="plain is wrong by 1"):
        linear_cpu.checked("plain", wrong, p, linear_cpu.truth(p))
