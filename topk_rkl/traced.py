"""Numbers that change from call to call, as tensors: torch.compile then compiles nothing anew for another number."""

import torch
from torch import Tensor


def traced(
    number: float,
    like: Tensor,  # of the dtype and device that are wanted
) -> Tensor:  # ()
    """The number as a tensor. Inductor keeps the first value of a number in anything but plain arithmetic, so it is
    added to 0 (pytorch/pytorch#197889)."""
    return like.new_zeros(()) + number


def clamped(
    x: Tensor,  # (...)
    low: float,
    high: float,
) -> Tensor:  # (...)
    return torch.minimum(torch.maximum(x, traced(low, x)), traced(high, x))
