"""How the losses of many positions become one number."""

from typing import Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.rows import result_dtype
from topk_rkl.traced import traced

Reduction = Literal["none", "sum", "mean"]


def reduce(
    per_token: Tensor,  # (...), already times the weights
    weights: Tensor | None,  # (...)
    reduction: Reduction,
    denominator: float | Tensor | None,
) -> Tensor:  # (...) or ()
    """The losses themselves, their sum, or that sum over `denominator`, by default sum(weights)."""
    if reduction == "none":
        return per_token
    total = per_token.sum()
    if reduction == "sum":
        return total
    if denominator is None:
        denominator = per_token.numel() if weights is None else weights.sum(dtype=torch.float64)
    return ratio(total, denominator)


def as_factors(
    weights: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
) -> Tensor | None:  # (...) float32, or float64 for float64
    return None if weights is None else weights.to(result_dtype(student))


def ratio(total: Tensor, denominator: float | Tensor) -> Tensor:
    """total / denominator in float64, and 0 where the denominator is 0: the gradient is 0 there too, not NaN."""
    precise = total.double()
    if isinstance(denominator, Tensor):
        denominator = denominator.to(total.device, torch.float64)
    else:
        number, denominator = denominator, traced(float(denominator), precise)
        if not torch.compiler.is_compiling() and number != 0:  # the common case, in a third of the operations
            return (precise / denominator).to(total.dtype)
    empty = denominator == 0
    return torch.where(empty, 0, precise / torch.where(empty, 1, denominator)).to(total.dtype)


def require_reduction(
    reduction: str,
    denominator: float | Tensor | None,
    student: Tensor | None = None,  # (..., V) or (..., H)
) -> None:
    checks.require_one_of("reduction", reduction, get_args(Reduction))
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is given with reduction={reduction!r}; it only belongs to reduction='mean'")
    checks.require_denominator(denominator, student)
