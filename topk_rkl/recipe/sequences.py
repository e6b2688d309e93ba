"""Where sequences lie: each row of (..., T) is one, or `cu_seqlens` cuts the flattened positions."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks


def starts(
    x: Tensor,  # (..., T)
    cu_seqlens: Tensor | None,  # (sequences + 1,)
) -> Tensor:  # (n,) over the flattened positions: where the sequence of each starts
    places = torch.arange(x.numel(), device=x.device)
    if cu_seqlens is None:
        return places - places % max(x.shape[-1], 1)
    cuts = pad(cu_seqlens.long(), (1, 0))  # what comes before the first entry starts at 0
    return cuts[torch.searchsorted(cuts[1:], places, right=True)]


def first_of_each(
    found: Tensor,  # (n, ...) bool
    starts: Tensor,  # (n,)
) -> Tensor:  # (n, ...) bool: what is found and was not before in the same sequence
    before = torch.cat((torch.zeros_like(found[:1], dtype=torch.long), found.cumsum(0)))[: len(found)]
    return found & (before == before[starts])


def require_cu_seqlens(
    x: Tensor | None,  # (sequences + 1,)
    name: str,
    positions: Tensor,  # (..., T)
) -> None:
    if x is None:
        return
    checks.require_tensor("cu_seqlens", x, checks.INTEGERS)
    if x.dim() != 1 or len(x) == 0:
        raise ValueError(
            f"cu_seqlens has shape {checks.shape_of(x)}; it must be (sequences + 1,): 0, and where each sequence ends "
            f"among the flattened positions of {name}"
        )
    checks.require_same_device("cu_seqlens", x, name, positions)
