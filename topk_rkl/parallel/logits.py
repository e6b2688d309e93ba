"""Selection, single logits and the tail over a vocabulary that ranks share.

Every rank has the same rows, and gets the same results to the bit. Without shards, the functions of the teacher call
the ops and nothing else.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import ops
from topk_rkl.objective import temperature_of
from topk_rkl.parallel.agreement import Shards
from topk_rkl.parallel.collectives import all_gather, all_reduce, as_bytes, from_bytes, to_owners
from topk_rkl.rows import result_dtype


def local_ids(
    ids: Tensor,  # (...) of the whole vocabulary
    starts: Any,  # (ranks + 1,)
    vocab: int,  # of this rank's shard
    group: dist.ProcessGroup | None,
) -> Tensor:  # (...) int32 of this rank's shard, -1 for those of other ranks and of none
    first = 0 if group is None else starts[dist.get_rank(group)]
    place = ids - first  # of the least ids it wraps, to numbers above every vocabulary
    return place.masked_fill((place < 0) | (place >= vocab), -1).int()


def select(
    teacher: Tensor,  # (..., V_local)
    k: int,
    normalize: bool,
    backend: str,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor]:  # (..., K) int32 of the whole vocabulary, (..., K)
    if shards is None:
        found: tuple[Tensor, Tensor] = ops.select(teacher, k, normalize, backend)
        return found
    ids, values = candidates(teacher, k, backend)
    total = None
    if normalize:
        total = shard_tail(teacher, ids.new_full((*ids.shape[:-1], 1), -1), None, shards.group, backend)
    return merged(ids, values, total, teacher.dtype, shards, backend)


def linear_select(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V_local, H)
    bias: Tensor | None,  # (V_local,)
    k: int,
    chunk_rows: int | None,
    objective: Tensor | None,  # (numbers,)
    normalize: bool,
    full: bool,
    backend: str,
    shards: Shards | None,
) -> tuple[Tensor, Tensor]:  # (..., K) int32 of the whole vocabulary, (..., K)
    """`select` of the logits that the ranks' shards of the head make: see `ops.linear_select`."""
    if shards is None:
        ids, values, _ = ops.linear_select(
            hidden, head, bias, k, chunk_rows, objective, normalize, full, False, backend
        )
        return ids, values
    vocab = len(head)
    ids, values, total = nothing(hidden, k)
    if vocab > 0:
        given = hidden, head, bias, min(k, vocab), chunk_rows, objective
        ids, values, total = ops.linear_select(*given, False, full, normalize, backend)
    whole = joined(total, None, shards.group) if normalize else None
    return merged(*filled(ids, values, k), whole, values.dtype, shards, backend)


def teacher_logit(
    teacher: Tensor,  # (..., V_local)
    ids: Tensor,  # (..., 1) of the whole vocabulary
    shards: Shards | None,
) -> Tensor:  # (..., 1), anything at ids of no rank
    if shards is None:
        return teacher.gather(-1, ids.clamp(min=0).long())
    local = local_ids(ids, shards.teacher(), teacher.shape[-1], shards.group)
    return logits_at(teacher, local, shards.group)


def teacher_tail(
    teacher: Tensor,  # (..., V_local)
    ids: Tensor,  # (..., K) of the whole vocabulary
    objective: Tensor | None,  # (numbers,)
    backend: str,
    shards: Shards | None,
) -> Tensor:  # (...) float64
    if shards is None:
        tail: Tensor = ops.tail_logit(teacher, ids, objective, backend)
        return tail
    local = local_ids(ids, shards.teacher(), teacher.shape[-1], shards.group)
    return shard_tail(teacher, local, objective, shards.group, backend)


def candidates(
    logits: Tensor,  # (..., V_local)
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (..., K) int32 of this shard, (..., K)
    """The K best of this rank's shard, filled up with empty slots."""
    if logits.shape[-1] == 0:
        ids, values, _ = nothing(logits, k)
        return ids, values
    ids, values = ops.select(logits, min(k, logits.shape[-1]), False, backend)
    return filled(ids, values, k)


def nothing(
    like: Tensor,  # (..., X)
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (..., K) int32, (..., K), (...) float64
    """What a shard without a token has to offer: empty slots, and the logsumexp of no logit."""
    lead = like.shape[:-1]
    ids = like.new_full((*lead, k), -1, dtype=torch.int32)
    values = like.new_full((*lead, k), -torch.inf, dtype=result_dtype(like))
    return ids, values, like.new_full(lead, -torch.inf, dtype=torch.float64)


def filled(
    ids: Tensor,  # (..., fewer)
    values: Tensor,  # (..., fewer)
    k: int,
) -> tuple[Tensor, Tensor]:  # (..., K), (..., K)
    if ids.shape[-1] == k:
        return ids, values
    missing = (0, k - ids.shape[-1])
    return pad(ids, missing, value=-1), pad(values, missing, value=-torch.inf)


def merged(
    ids: Tensor,  # (..., K) candidates of this rank, counted from its first id
    values: Tensor,  # (..., K) their logits, best first
    total: Tensor | None,  # (...) float64: the logsumexp of the row, to have log-probs
    dtype: torch.dtype,  # that holds the logits
    shards: Shards,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (..., K) int32 of the whole vocabulary, (..., K)
    """The K best of all ranks' candidates. From 3 ranks on each row is merged by one rank, which sends less."""
    lead, k, group = ids.shape[:-1], ids.shape[-1], shards.group
    ids = torch.where(ids < 0, -1, ids + shards.teacher()[dist.get_rank(group)]).int()
    own = as_bytes(ids.view(-1, k), values.reshape(-1, k).to(dtype))
    if dist.get_world_size(group) <= 2:
        ids, values = _best(all_gather(own, group), k, dtype, backend)
    else:
        block = _best(to_owners(own, group), k, dtype, backend)
        every = all_gather(as_bytes(*block), group).flatten(0, 1)[: len(own)]
        ids, values = from_bytes(every, *(x.dtype for x in block), columns=k)
    if total is not None:  # rounded once the difference is taken
        difference = values - total.masked_fill(total == torch.inf, torch.nan).view(-1, 1)
        values = difference.to(values.dtype).masked_fill(ids < 0, -torch.inf)
    return ids.view(*lead, k), values.view(*lead, k)


def _best(
    received: Tensor,  # (ranks, n, bytes)
    k: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (n, K) int32, (n, K)
    """A stable sort by value: candidates of lower ranks come first, and so do their ids."""
    ids, values = from_bytes(beside(received), torch.int32, dtype, columns=k)
    place, best = ops.select(values.flatten(1), k, False, backend)
    return ids.flatten(1).gather(1, place.clamp(min=0).long()).masked_fill(place < 0, -1), best


def beside(
    x: Tensor,  # (ranks, n, X)
) -> Tensor:  # (n, ranks, X)
    return x.transpose(0, 1)


def logits_at(
    logits: Tensor,  # (..., V_local)
    local: Tensor,  # (..., K) ids as `local_ids` gives them
    group: dist.ProcessGroup | None,
) -> Tensor:  # (..., K) on every rank, 0 at ids of no rank
    """One rank has the logit and the others 0, so the sum is exact in any dtype."""
    return all_reduce(own_logits(logits, local), group)


def own_logits(
    logits: Tensor,  # (..., V_local)
    local: Tensor,  # (..., K)
) -> Tensor:  # (..., K), 0 at ids of other ranks
    if logits.shape[-1] == 0:
        return logits.new_zeros(local.shape)
    return logits.gather(-1, local.clamp(min=0).long()).masked_fill(local < 0, 0)


def shard_tail(
    logits: Tensor,  # (..., V_local)
    local: Tensor,  # (..., K)
    objective: Tensor | None,  # (numbers,)
    group: dist.ProcessGroup,
    backend: str,
) -> Tensor:  # (...) float64 on every rank
    """All columns of all ranks but those at ids as one logit: see `ops.tail_logit`."""
    if logits.shape[-1] == 0:
        own = logits.new_full(logits.shape[:-1], -torch.inf, dtype=torch.float64)
    else:
        own = ops.tail_logit(logits, local, objective, backend)
    return joined(own, objective, group)


def joined(
    own: Tensor,  # (...) float64: the tail of this rank's shard
    objective: Tensor | None,  # (numbers,)
    group: dist.ProcessGroup,
) -> Tensor:  # (...) float64 on every rank
    if own.numel() == 0:
        return own
    temperature = temperature_of(objective)
    return (all_gather(own, group) / temperature).logsumexp(0) * temperature
