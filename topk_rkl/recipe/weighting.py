"""Which positions count, and how the losses of many become one number."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.autograd import savable
from topk_rkl.recipe.rewards import return_to_go
from topk_rkl.recipe.sequences import first_of_each, require_cu_seqlens, starts
from topk_rkl.reduction import ratio
from topk_rkl.rows import result_dtype

Mode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Occurrences = Literal["first", "all"]


def aggregate(
    per_token: Tensor,  # (B, T), reduction="none"; any shape with cu_seqlens
    mask: Tensor,  # as per_token; bool or float
    mode: Mode = "token-mean",
    *,
    denominator: float | Tensor | None = None,
    norm: float | None = None,
    cu_seqlens: Tensor | None = None,  # (sequences + 1,) int
) -> Tensor:  # ()
    """Reduces the losses of many tokens to one number, in the ways that trainers name.

    With m the mask, l the loss and `n` the denominator:

    | mode                      | value                                              | n by default           |
    |---------------------------|----------------------------------------------------|------------------------|
    | "token-mean"              | sum over all tokens of m l, / n                    | sum of m               |
    | "token-sum"               | sum over all tokens of m l                         |                        |
    | "seq-mean-token-sum"      | sum over sequences of (sum m l), / n               | sequences with a token |
    | "seq-mean-token-mean"     | sum over sequences of (sum m l / sum m), / n       | sequences with a token |
    | "seq-mean-token-sum-norm" | sum over sequences of (sum m l / norm), / n        | sequences with a token |

    Args:
        per_token: (B, T) float, the loss of each token. Where the mask is 0 it counts as 0, even if it is NaN.
        mask: (B, T) bool or float, the weights of the tokens.
        mode: one of the table.
        denominator: the number or 0-d tensor n, such as a count over all micro-batches and ranks.
        norm: the constant length of "seq-mean-token-sum-norm"; None takes T, and is refused with cu_seqlens.
        cu_seqlens: int32 or int64, the cumulative lengths of packed sequences that flash-attention takes, 0 first.
            They cut the flattened positions of per_token, of any shape such as (T,) or (1, T), into sequences; None
            takes each row for one. A sequence may be empty. What follows the last entry is one more.

    Returns:
        A 0-d tensor, float32 (float64 from float64). Counts and sums are float64 whatever the dtypes. A division by 0,
        as when nothing is kept, gives 0, and stays attached to the graph.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _require_aggregation(per_token, mask, mode, denominator, norm, cu_seqlens)
    mask = savable(mask.double())
    kept, first = (mask != 0).flatten(), starts(per_token, cu_seqlens)  # (n,), (n,)
    terms = torch.where(mask == 0, 0, per_token.double() * mask).flatten()  # (n,)
    if mode == "seq-mean-token-mean":  # the return of a sequence's first token is the sum over the sequence
        terms = ratio(terms, return_to_go(mask, cu_seqlens=cu_seqlens).flatten()[first])
    total = terms.sum()
    if mode == "seq-mean-token-sum-norm":
        total = total / float(mask.shape[-1] if norm is None else norm)
    if mode != "token-sum":
        if denominator is None:
            denominator = mask.sum() if mode == "token-mean" else first_of_each(kept, first).sum()
        total = ratio(total, denominator)
    return total.to(result_dtype(per_token))


def special_token_mask(
    response_ids: Tensor,  # (..., T) int
    token_ids: Iterable[int] | Tensor,
    occurrences: Occurrences = "first",
    *,
    cu_seqlens: Tensor | None = None,  # (responses + 1,) int
) -> Tensor:  # (..., T) bool
    """Weights that drop special tokens: False there, True elsewhere; multiply them by the response mask.

    Teacher and student may spell a special token differently, and the loss there says nothing. The paper
    (arXiv 2603.25562, section 3) masks them; its code drops the first occurrence of each id in each response.

    Args:
        response_ids: (..., T) int32 or int64 token ids; each row along the last dimension is one response.
        token_ids: the ids to drop, such as the ids of "<think>" or "<|im_end|>".
        occurrences: "first" drops the first of each id in a response, "all" drops every one.
        cu_seqlens: the responses packed in a row, as in `aggregate`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    token_ids = _require_special_tokens(response_ids, token_ids, occurrences, cu_seqlens)
    token_ids = torch.as_tensor(token_ids, device=response_ids.device).flatten()
    found = response_ids.flatten()[:, None] == token_ids  # (n, tokens)
    if occurrences == "first":
        found = first_of_each(found, starts(response_ids, cu_seqlens))
    return ~found.any(-1).view(response_ids.shape)


def _require_aggregation(
    per_token: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    mode: str,
    denominator: float | Tensor | None,
    norm: float | None,
    cu_seqlens: Tensor | None,  # (sequences + 1,)
) -> None:
    checks.require_tensor("per_token", per_token, checks.FLOATS)
    checks.require_factors("mask", mask)
    wanted = per_token.dim() == 2 if cu_seqlens is None else per_token.dim() > 0
    if not wanted or mask.shape != per_token.shape:
        raise ValueError(
            f"per_token has shape {checks.shape_of(per_token)} and mask {checks.shape_of(mask)}; both must be (B, T), "
            "or of one shape with cu_seqlens"
        )
    checks.require_same_device("mask", mask, "per_token", per_token)
    require_cu_seqlens(cu_seqlens, "per_token", per_token)
    checks.require_one_of("mode", mode, get_args(Mode))
    if denominator is not None and mode == "token-sum":
        raise ValueError("denominator is given with mode='token-sum', which divides by nothing; leave it out")
    checks.require_denominator(denominator, per_token)
    if norm is not None:
        if mode != "seq-mean-token-sum-norm":
            raise ValueError(f"norm is given with mode={mode!r}; it only belongs to 'seq-mean-token-sum-norm'")
        checks.require_positive("norm", norm)
    elif mode == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        raise ValueError("norm is None with cu_seqlens, and the length of a packed row is no response's; pass norm")


def _require_special_tokens(
    response_ids: Tensor,  # (..., T)
    token_ids: object,  # an Iterable[int] or Tensor
    occurrences: str,
    cu_seqlens: Tensor | None,  # (responses + 1,)
) -> list[int] | Tensor:
    """The ids, as ints."""
    checks.require_tensor("response_ids", response_ids, checks.INTEGERS)
    if response_ids.dim() == 0:
        raise ValueError("response_ids has no dimension; it must be (..., T)")
    if isinstance(token_ids, Tensor):
        checks.require_tensor("token_ids", token_ids, checks.INTEGERS)
        checks.require_same_reality("token_ids", token_ids, "response_ids", response_ids)
    elif isinstance(token_ids, str):
        raise TypeError("token_ids is a str; it must be a sequence of token ids")
    else:
        token_ids = checks.require_integers("token_ids", token_ids)
        for x in token_ids:
            if abs(x) > checks.LARGEST:
                raise ValueError(f"token_ids has {x}; a token id is at most {checks.LARGEST}")
    checks.require_one_of("occurrences", occurrences, get_args(Occurrences))
    require_cu_seqlens(cu_seqlens, "response_ids", response_ids)
    return token_ids
