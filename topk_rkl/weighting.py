"""Which positions count, and how much: masks, weights, reductions."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.autograd import savable

Mode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def reduce(
    per_token: Tensor,  # (...), already times the weights
    weights: Tensor | None,  # (...)
    reduction: str,
    denominator: float | Tensor | None,
) -> Tensor:  # (...) or ()
    """reduction "none", "sum", or "mean": the sum over `denominator`, or over sum(weights) where that is None."""
    if reduction == "none":
        return per_token
    total = per_token.sum()
    if reduction == "sum":
        return total
    if denominator is None:
        denominator = per_token.numel() if weights is None else weights.sum(dtype=per_token.dtype)
    return _ratio(total, denominator)


def as_factors(
    weights: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
) -> Tensor | None:
    if weights is None:
        return None
    return weights.to(torch.float64 if student.dtype == torch.float64 else torch.float32)


def aggregate(
    per_token: Tensor,  # (B, T), reduction="none"
    mask: Tensor,  # (B, T) bool, integer or float
    mode: Mode = "token-mean",
    *,
    denominator: float | Tensor | None = None,
    norm: float | None = None,
) -> Tensor:  # ()
    """Reduces a loss a token to one number, in the ways trainers name.

    With m the mask, l the loss and `n` the denominator:

    | mode                      | value                                              | n by default           |
    |---------------------------|----------------------------------------------------|------------------------|
    | "token-mean"              | sum over all tokens of m l, / n                    | sum of m               |
    | "token-sum"               | sum over all tokens of m l                         |                        |
    | "seq-mean-token-sum"      | sum over sequences of (sum m l), / n               | sequences with a token |
    | "seq-mean-token-mean"     | sum over sequences of (sum m l / sum m), / n       | sequences with a token |
    | "seq-mean-token-sum-norm" | sum over sequences of (sum m l / norm), / n        | sequences with a token |

    Args:
        per_token: (B, T) the loss of each token. Where the mask is 0 it counts as 0, even if it is NaN.
        mask: (B, T) weights of the tokens.
        mode: one of the table.
        denominator: the number or 0-d tensor n, where it is to be global over micro-batches and ranks.
        norm: the constant length of "seq-mean-token-sum-norm"; T where it is None.

    Returns:
        A 0-d tensor. A division by 0, as when nothing is kept, gives 0, and stays attached to the graph.
    """
    checks.aggregation(per_token, mask, mode, denominator, norm)
    mask = savable(mask.to(per_token.dtype))
    per_sequence = torch.where(mask == 0, 0, per_token * mask).sum(-1)  # (B,)
    tokens = mask.sum(-1)  # (B,)
    if mode == "token-sum":
        return per_sequence.sum()
    if mode == "token-mean":
        return _ratio(per_sequence.sum(), tokens.sum() if denominator is None else denominator)
    if mode == "seq-mean-token-mean":
        per_sequence = _ratio(per_sequence, tokens)
    elif mode == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / (mask.shape[-1] if norm is None else norm)
    return _ratio(per_sequence.sum(), (mask != 0).any(-1).sum() if denominator is None else denominator)


def special_token_mask(
    response_ids: Tensor,  # (..., T) int
    token_ids: Iterable[int] | Tensor,
    occurrences: Literal["first", "all"] = "first",
) -> Tensor:  # (..., T) bool
    """Weights that drop special tokens: False at them, True elsewhere; multiply by the response mask.

    Teacher and student may spell a special token differently, and the loss there says nothing. The paper
    (arXiv 2603.25562, section 3) masks them; its code drops the first occurrence of each id in each response.

    Args:
        response_ids: (..., T) token ids; each row along the last dimension is one response.
        token_ids: the ids to drop, such as the ids of "<think>" or "<|im_end|>".
        occurrences: "first" drops the first of each id in a response, "all" drops every one.
    """
    token_ids = checks.special_tokens(response_ids, token_ids, occurrences)
    token_ids = torch.as_tensor(token_ids, device=response_ids.device).flatten()
    found = response_ids[..., None] == token_ids  # (..., T, tokens)
    if occurrences == "first":
        found = found & (found.cumsum(-2) == 1)
    return ~found.any(-1)


def _ratio(total: Tensor, denominator: float | Tensor) -> Tensor:
    """total / denominator, and 0 where that is 0; the gradient is 0 there too, not NaN."""
    if not isinstance(denominator, Tensor):
        return total / denominator if denominator != 0 else total * 0
    denominator = denominator.to(total.device, total.dtype)
    empty = denominator == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, denominator))
