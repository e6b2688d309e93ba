"""A row, and the tensors of a shard that hold many: ids in 2 bytes where V allows, log-probs in the header's dtype.

Ids of 2 bytes are stored plus 1, so that 0 is an empty slot and one subtraction decodes them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.store.header import Header
from topk_rkl.support import LARGEST_LOG_SUM, Support, require_support

Tensors = dict[str, Tensor]
NARROW_VOCAB = 65_535  # ids plus 1 fit 16 bits


class Row(NamedTuple):
    """One sequence, and what the teacher says of it."""

    input_ids: Tensor
    """(T,) int32 or int64, T of at least 1."""
    support: Support
    """(T, K); position t speaks of the token after position t."""
    loss_mask: Tensor | None = None
    """(T,) bool: which tokens count as labels. None counts all."""


def id_dtype(header: Header) -> torch.dtype:
    """That of stored ids."""
    return torch.uint16 if header.vocab_size <= NARROW_VOCAB else torch.int32


def narrow(
    ids: Tensor,  # (...) int32 or int64, -1 where empty
    header: Header,
) -> Tensor:  # (...), as stored
    dtype = id_dtype(header)
    return (ids + 1).to(dtype) if dtype == torch.uint16 else ids.to(dtype)


def wide(
    ids: Tensor,  # (...), as stored
    dtype: torch.dtype,  # int32 or int64
) -> Tensor:  # (...) with memory of its own, -1 where empty
    return ids.to(dtype).sub_(1) if ids.dtype == torch.uint16 else ids.to(dtype, copy=True)


def encoded(rows: Sequence[Row], header: Header) -> Tensors:
    """The tensors of a shard. Rows without a loss_mask get one of True where others have one."""
    supports = [row.support for row in rows]
    ids, log_probs = (torch.cat([s.tensors[i] for s in supports]) for i in (0, 1))
    empty = (ids < 0) | (log_probs == -torch.inf)
    ends = torch.tensor([0, *(len(row.input_ids) for row in rows)]).cumsum(0)
    tensors = {
        "ids": narrow(ids.masked_fill(empty, -1), header),
        "log_probs": log_probs.masked_fill(empty, -torch.inf).to(header.dtype),
        "input_ids": narrow(torch.cat([row.input_ids for row in rows]), header),
        "offsets": ends,
    }
    if any(row.loss_mask is not None for row in rows):
        masks = (torch.ones_like(r.input_ids, dtype=torch.bool) if r.loss_mask is None else r.loss_mask for r in rows)
        tensors["loss_mask"] = torch.cat(list(masks))
    return tensors


def decoded(tensors: Tensors, first: int, last: int, normalized: bool) -> Row:
    """The row of positions first to last of a shard, in memory of its own."""
    ids, log_probs = wide(tensors["ids"][first:last], torch.int32), tensors["log_probs"][first:last]
    mask = tensors["loss_mask"][first:last].clone() if "loss_mask" in tensors else None
    support = Support(ids, log_probs.to(torch.float32, copy=True), normalized)
    return Row(wide(tensors["input_ids"][first:last], torch.int64), support, mask)


def layout(header: Header, rows: int, positions: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a shard."""
    return {
        "ids": (id_dtype(header), (positions, header.k)),
        "log_probs": (header.dtype, (positions, header.k)),
        "input_ids": (id_dtype(header), (positions,)),
        "offsets": (torch.int64, (rows + 1,)),
        "loss_mask": (torch.bool, (positions,)),
    }


def require_rows(rows: Sequence[Any], header: Header) -> None:
    """Refuses what is not a list of rows of this header, by the name of what is wrong."""
    checks.require_list("rows", rows, "rows")
    for i, row in enumerate(rows):
        if not isinstance(row, Row):
            raise TypeError(f"rows[{i}] is {checks.kind_of(row)}; it must be a topk_rkl.store.Row")
        _require_tokens(f"rows[{i}].input_ids", row.input_ids, header)
        _require_stored_support(f"rows[{i}].support", row.support, len(row.input_ids), header)
        if row.loss_mask is not None:
            checks.require_tensor(f"rows[{i}].loss_mask", row.loss_mask, (torch.bool,))
            if row.loss_mask.shape != row.input_ids.shape:
                raise ValueError(
                    f"rows[{i}].loss_mask has shape {checks.shape_of(row.loss_mask)}; it must be (T,), here "
                    f"{checks.shape_of(row.input_ids)} as input_ids"
                )


def _require_tokens(name: str, x: Tensor, header: Header) -> None:
    checks.require_tensor(name, x, checks.INTEGERS)
    if x.dim() != 1 or len(x) == 0:
        raise ValueError(f"{name} has shape {checks.shape_of(x)}; it must be (T,) with T of at least 1, one sequence")
    _require_on_cpu(name, x)
    low, high = (int(bound) for bound in x.aminmax())
    if low < 0 or high >= header.vocab_size:
        raise ValueError(
            f"{name} has ids from {low} to {high}; they must be from 0 to {header.vocab_size - 1}, below the header's "
            f"vocab_size = {header.vocab_size}"
        )


def _require_stored_support(name: str, x: Support, length: int, header: Header) -> None:
    require_support(name, x)
    if x.k != header.k:
        raise ValueError(f"{name} has {x.k} slots per position and the header k = {header.k}; they must be alike")
    if x.shape != (length,):
        raise ValueError(
            f"{name} has positions {tuple(x.shape)}; it must have (T,) = ({length},), one per token. One that lacks "
            "the last position, after which no token comes, is support.pad(T)"
        )
    _require_on_cpu(f"{name}.ids", x.ids)
    if x.normalized != header.normalized:
        raise ValueError(
            f"{name}.normalized is {x.normalized} and the header's normalized {header.normalized}; a set holds one kind"
        )
    highest = int(x.ids.masked_fill(x.log_probs == -torch.inf, -1).max())
    if highest >= header.vocab_size:
        raise ValueError(f"{name}.ids has {highest}; ids must be below the header's vocab_size = {header.vocab_size}")
    _require_storable(f"{name}.log_probs", x.log_probs.masked_fill(x.ids < 0, -torch.inf), header)
    if x.normalized:
        _require_probabilities(name, x)


def _require_storable(
    name: str,
    x: Tensor,  # (T, K), -inf where empty
    header: Header,
) -> None:
    """Refuses NaN, and what the header's dtype would make infinite: an empty slot is not a very small log-prob."""
    stored = x.to(header.dtype)
    wrong = stored.isnan() | (stored.isinf() & (x != -torch.inf))
    if wrong.any():
        raise ValueError(
            f"{name} has {float(x[wrong][0]):g}, which {header.log_probs_dtype} cannot hold; use a header with "
            "log_probs_dtype='float32', or empty such slots: support.without(~(support.log_probs.abs() < 6e4))"
        )


def _require_probabilities(name: str, x: Support) -> None:
    """Refuses logits that are called log-probs."""
    most = math.exp(LARGEST_LOG_SUM)
    if (_total(x) > most).any() and (over := _total(x.unique()) > most).any():  # an id may stand there twice
        position = int(over.nonzero()[0])
        raise ValueError(
            f"{name} at position {position} has probabilities that add up to {float(_total(x)[position]):.3g}; true "
            "log-probs add up to at most 1. Logits need Support(..., normalized=False) and a header that says so"
        )


def _total(x: Support) -> Tensor:  # (T,)
    """Of the probabilities of all slots that are not empty."""
    return x.log_probs.float().exp().masked_fill(x.ids < 0, 0).sum(-1)


def _require_on_cpu(name: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}; rows are written from a CPU: .to('cpu')")
