"""The numbers of a loss that may change from call to call, as one small tensor that crosses the border of an op."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from topk_rkl.divergence import REVERSE_KL, Code, Terms


class Settings(NamedTuple):
    """What a backend is given."""

    temperature: float = 1.0
    divergence: Code | Terms = REVERSE_KL
    logit_scale: float = 1.0
    softcap: float | None = None


def pack(
    temperature: float = 1.0,
    code: Code = REVERSE_KL,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor | None:  # (numbers,) float64 on the CPU
    """The settings as an op takes them; None for those by default."""
    if temperature == 1 and logit_scale == 1 and softcap is None and len(code) == 1:  # the plain reverse KL alone
        return None
    numbers = (temperature, logit_scale, math.inf if softcap is None else softcap, *code)
    if torch.compiler.is_compiling():
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([traced(x, zero) for x in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def unpack(
    numbers: Tensor | None,  # as `pack` gives it
    terms: Terms | None = None,
) -> Settings:
    if numbers is None:
        return Settings(divergence=terms or REVERSE_KL)
    temperature, logit_scale, softcap, *code = numbers.tolist()
    return Settings(temperature, terms or tuple(code), logit_scale, None if softcap == math.inf else softcap)


def traced(
    number: float,
    like: Tensor,  # of the dtype and device that are wanted
) -> Tensor:  # ()
    """The number as a tensor. As a sum, since Inductor keeps the first value of a number that changes from call to call
    where it is the argument of anything but plain arithmetic (pytorch/pytorch#197889)."""
    return like.new_zeros(()) + number


def clamped(
    x: Tensor,  # (...)
    low: float,
    high: float,
) -> Tensor:  # (...)
    return torch.minimum(torch.maximum(x, traced(low, x)), traced(high, x))
