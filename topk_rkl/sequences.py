"""Where sequences lie: each row of (..., T) is one, or `cu_seqlens` cuts the flattened positions."""

import torch
from torch import Tensor
from torch.nn.functional import pad


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
