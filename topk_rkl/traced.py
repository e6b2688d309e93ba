"""What torch.compile must not take as it is written: numbers that change from call to call, and a second name."""

import torch
from torch import Tensor


def traced(
    number: float,
    like: Tensor,  # of the dtype and device that are wanted
    shape: tuple[int, ...] = (),
) -> Tensor:  # of that shape
    """The number as a tensor. Inductor keeps the first value of a number in anything but plain arithmetic, so it is
    added to 0 (pytorch/pytorch#197889)."""
    return like.new_zeros(shape) + number


def clamped(
    x: Tensor,  # (...)
    low: float,
    high: float,
) -> Tensor:  # (...)
    return torch.minimum(torch.maximum(x, traced(low, x)), traced(high, x))


def converted(
    x: Tensor,  # (...)
    dtype: torch.dtype,
) -> Tensor:  # (...)
    """What the forward pass of an autograd.Function may return: under torch.compile never x itself.

    torch 2.11 gives a tensor that a forward pass has under two names a gradient of 0 (pytorch/pytorch#180642).
    """
    return x.to(dtype, copy=torch.compiler.is_compiling())
