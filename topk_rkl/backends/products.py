"""Products of hidden states with the head, in plain PyTorch on any device, a block of positions by a block of tokens.

They are float32, or float64 for float64. Beyond the results a few blocks are held: nothing of size N V or N K H exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.divergence import capped
from topk_rkl.objective import Objective
from topk_rkl.rows import chunks, result_dtype

# At most, of a block:
ROWS = 512  # positions
SLOTS = 1 << 19  # of all its positions
LOGITS = 4 << 20  # bytes
WEIGHTS = 12 << 20  # bytes of the head's rows, and of the hidden states
SOLVED = 1 << 17  # slots whose loss is found at once: some 250 bytes each, in float64


def row_blocks(
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
) -> Iterator[slice]:
    return chunks(len(ids), 1, _most_rows(ids.shape[1], hidden))


def slot_blocks(
    ids: Tensor,  # (N, K)
) -> Iterator[slice]:
    return chunks(len(ids), ids.shape[1], SOLVED)


def token_blocks(
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    vocab: int,
) -> Iterator[slice]:
    """As many tokens as go with a block of positions."""
    rows = max(1, min(len(ids), _most_rows(ids.shape[1], hidden)))
    most = min(LOGITS // rows, WEIGHTS // hidden.shape[1]) // result_dtype(hidden).itemsize
    return chunks(vocab, 1, max(1, most))


def _most_rows(k: int, hidden: Tensor) -> int:
    return max(1, min(ROWS, SLOTS // k, WEIGHTS // (hidden.shape[1] * result_dtype(hidden).itemsize)))


def product(
    hidden: Tensor,  # (n, H)
    head: Tensor,  # (TOKENS, H) of the result's dtype
    bias: Tensor | None,  # (TOKENS,)
) -> Tensor:  # (n, TOKENS)
    with torch.autocast(hidden.device.type, enabled=False):  # a trainer's would take the products in 16 bits
        raw = hidden.to(head.dtype) @ head.T
    return raw if bias is None else raw.add_(bias)


def all_logits(
    hidden: Tensor,  # (n, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    objective: Objective,
    out: Tensor | None = None,  # (n, V)
) -> Tensor:  # (n, V)
    """Of so few positions that they may all exist."""
    dtype, no_slots = result_dtype(hidden), hidden[:, :1]
    if out is None:
        out = hidden.new_empty((len(hidden), len(head)), dtype=dtype)
    for tokens in token_blocks(no_slots, hidden, len(head)):
        weight, biases = head[tokens].to(dtype), None if bias is None else bias[tokens]
        for rows in row_blocks(no_slots, hidden):
            out[rows, tokens] = capped(product(hidden[rows], weight, biases), objective.logit_scale, objective.softcap)[
                0
            ]
    return out


def inside(
    ids: Tensor,  # (n, K)
    tokens: slice,
) -> tuple[Tensor, Tensor]:  # (n, K) bool: the id is in the block; (n, K) int64: its column there
    return (ids >= tokens.start) & (ids < tokens.stop), ids.long() - tokens.start


def add_at(
    out: Tensor,  # (n, K)
    block: Tensor,  # (n, TOKENS)
    within: Tensor,  # (n, K) bool
    place: Tensor,  # (n, K)
) -> None:
    """Adds what the block holds at the slots within it."""
    out += torch.where(within, block.gather(1, torch.where(within, place, 0)), 0)


def finite(
    x: Tensor,  # (n, H)
    dtype: torch.dtype,
) -> Tensor:  # (n, H)
    """0 for what is not finite, since 0 times that is NaN; a position that reads it is NaN in its own right."""
    return x.to(dtype, copy=True).nan_to_num_(0, 0, 0)


def zeros_for(out: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Where a sum that goes to `out` is kept: there, if it has the sum's dtype."""
    if out is None:
        return None
    return out.zero_() if out.dtype == dtype else torch.zeros_like(out, dtype=dtype)


def store(total: Tensor | None, out: Tensor | None) -> None:
    if out is not None and total is not None and total is not out:
        out.copy_(total)
