"""Which positions count, and how much: masks, weights, reductions."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.autograd import savable
from topk_rkl.backends.reference import result_dtype
from topk_rkl.rewards import return_to_go
from topk_rkl.sequences import first_of_each, starts
from topk_rkl.settings import traced

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
        denominator = per_token.numel() if weights is None else weights.sum(dtype=torch.float64)
    return _ratio(total, denominator)


def as_factors(
    weights: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
) -> Tensor | None:
    if weights is None:
        return None
    return weights.to(result_dtype(student))


def aggregate(
    per_token: Tensor,  # (B, T), reduction="none"; any shape with cu_seqlens
    mask: Tensor,  # as per_token; bool, integer or float
    mode: Mode = "token-mean",
    *,
    denominator: float | Tensor | None = None,
    norm: float | None = None,
    cu_seqlens: Tensor | None = None,  # (sequences + 1,) int
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
        norm: the constant length of "seq-mean-token-sum-norm"; None takes T, and is refused with cu_seqlens.
        cu_seqlens: where several sequences are packed in a row: the cumulative lengths that flash-attention takes, 0
            first, over the flattened positions. They cut per_token, of any shape, such as (T,) or (1, T), into
            sequences; None takes each row for one. A sequence may be empty. What follows the last entry is one more.

    Returns:
        A 0-d tensor, float32 (float64 from float64). Counts and sums are float64 whatever the dtypes. A division by 0,
        as when nothing is kept, gives 0, and stays attached to the graph.
    """
    checks.aggregation(per_token, mask, mode, denominator, norm, cu_seqlens)
    mask = savable(mask.double())
    kept, first = (mask != 0).flatten(), starts(per_token, cu_seqlens)  # (n,), (n,)
    terms = torch.where(mask == 0, 0, per_token.double() * mask).flatten()  # (n,)
    if mode == "seq-mean-token-mean":  # the return of a sequence's first token is the sum over the sequence
        terms = _ratio(terms, return_to_go(mask, cu_seqlens=cu_seqlens).flatten()[first])
    total = terms.sum()
    if mode == "seq-mean-token-sum-norm":
        total = total / float(mask.shape[-1] if norm is None else norm)
    if mode != "token-sum":
        if denominator is None:
            denominator = mask.sum() if mode == "token-mean" else first_of_each(kept, first).sum()
        total = _ratio(total, denominator)
    return total.to(result_dtype(per_token))


def special_token_mask(
    response_ids: Tensor,  # (..., T) int
    token_ids: Iterable[int] | Tensor,
    occurrences: Literal["first", "all"] = "first",
    *,
    cu_seqlens: Tensor | None = None,  # (responses + 1,) int
) -> Tensor:  # (..., T) bool
    """Weights that drop special tokens: False at them, True elsewhere; multiply by the response mask.

    Teacher and student may spell a special token differently, and the loss there says nothing. The paper
    (arXiv 2603.25562, section 3) masks them; its code drops the first occurrence of each id in each response.

    Args:
        response_ids: (..., T) token ids; each row along the last dimension is one response.
        token_ids: the ids to drop, such as the ids of "<think>" or "<|im_end|>".
        occurrences: "first" drops the first of each id in a response, "all" drops every one.
        cu_seqlens: the responses packed in a row, as in `aggregate`.
    """
    token_ids = checks.special_tokens(response_ids, token_ids, occurrences, cu_seqlens)
    token_ids = torch.as_tensor(token_ids, device=response_ids.device).flatten()
    found = response_ids.flatten()[:, None] == token_ids  # (n, tokens)
    if occurrences == "first":
        found = first_of_each(found, starts(response_ids, cu_seqlens))
    return ~found.any(-1).view(response_ids.shape)


def _ratio(total: Tensor, denominator: float | Tensor) -> Tensor:
    """total / denominator in float64, and 0 where the denominator is 0: the gradient is 0 there too, not NaN."""
    precise = total.double()
    if isinstance(denominator, Tensor):
        denominator = denominator.to(total.device, torch.float64)
    else:
        denominator = traced(float(denominator), precise)
    empty = denominator == 0
    return torch.where(empty, 0, precise / torch.where(empty, 1, denominator)).to(total.dtype)
