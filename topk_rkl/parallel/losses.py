"""The losses in two steps: K logits of each row, on every rank of a group that shares the vocabulary, then the losses.

One process takes them so too where temperatures differ from position to position.
"""

from typing import Any

import torch
from torch import Tensor

from topk_rkl.autograd import MassLoss, Options, SupportLoss
from topk_rkl.mass import classes
from topk_rkl.parallel.agreement import Shards, begin_alike, read_on_host, require_begin_alike
from topk_rkl.parallel.autograd import LinearLogitsAndTail, LinearLogitsAt, LogitsAndTail, LogitsAt, ShardedSelectLoss
from topk_rkl.parallel.heads import whole_head
from topk_rkl.parallel.logits import local_ids, select
from topk_rkl.rows import live_slots, result_dtype
from topk_rkl.support import Support
from topk_rkl.temperature import Temperatures, divided


def logits_loss(
    student: Tensor,  # (..., V_local)
    teacher: Tensor | Support,  # (..., V_local) logits, or a Support of (..., K)
    k: int | None,
    mass: str,
    at: Temperatures,
    sampled_ids: Tensor | None,  # (...)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,  # (numbers,)
    options: Options,
    shards: Shards | None,
) -> Tensor:  # (...)
    if mass == "renormalized" and isinstance(teacher, Tensor) and shards is not None and not at.apart:
        readable = read_on_host(student)
        if readable:
            require_begin_alike(shards)
        loss: Tensor
        loss, _ = ShardedSelectLoss.apply(student, teacher, k, weights, objective, options, shards.group)
        return loss if readable else torch.where(begin_alike(shards), loss, torch.nan)
    group, starts, vocab = *_place(shards, student.shape[-1]), student.shape[-1]
    if mass == "renormalized":
        ids, log_probs = _support(teacher, k, options, shards)
        z = LogitsAt.apply(student, local_ids(ids, starts, vocab, group), options, group)
        return _on_slots(z, ids, log_probs, weights, objective, options, student, starts[-1], at)
    ids, log_probs, tail = classes(teacher, k, starts[-1], at, sampled_ids, options.backend, shards)
    columns = LogitsAndTail.apply(student, local_ids(ids, starts, vocab, group), objective, options, group)
    return _on_classes(columns, ids, log_probs, tail, weights, objective, options, student)


def linear_loss(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V_local, H)
    bias: Tensor | None,  # (V_local,)
    teacher: Tensor | Support,  # (..., V_local) logits, or a Support of (..., K)
    k: int | None,
    mass: str,
    at: Temperatures,
    sampled_ids: Tensor | None,  # (...)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,  # (numbers,)
    options: Options,
    shards: Shards | None,
) -> Tensor:  # (...)
    if mass == "renormalized":
        ids, log_probs = _support(teacher, k, options, shards)
        if shards is None:
            head, bias, ids = whole_head(head, bias, ids)
        group, starts = _place(shards, len(head))
        local = local_ids(ids, starts, len(head), group)
        z = LinearLogitsAt.apply(hidden, head, bias, local, objective, options, group)
        return _on_slots(z, ids, log_probs, weights, objective, options, hidden, starts[-1], at)
    group, starts = _place(shards, len(head))
    ids, log_probs, tail = classes(teacher, k, starts[-1], at, sampled_ids, options.backend, shards)
    local = local_ids(ids, starts, len(head), group)
    columns = LinearLogitsAndTail.apply(hidden, head, bias, local, objective, options, group)
    return _on_classes(columns, ids, log_probs, tail, weights, objective, options, hidden)


def _place(
    shards: Shards | None,
    vocab: int,  # of this rank
) -> tuple[Any, Any]:  # the group, and (ranks + 1,) the first id of each rank, then V
    return (None, (0, vocab)) if shards is None else (shards.group, shards.student())


def _support(
    teacher: Tensor | Support,  # (..., V_local) logits, or a Support of (..., K)
    k: int | None,
    options: Options,
    shards: Shards | None,
) -> tuple[Tensor, Tensor]:  # (..., K), (..., K)
    if isinstance(teacher, Support):
        return teacher.tensors
    assert k is not None
    return select(teacher, k, False, options.backend, shards)


def _on_slots(
    z: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,  # (numbers,)
    options: Options,
    student: Tensor,  # (..., anything), of the dtype of the student's
    vocab: Tensor | int,  # () of all ranks
    at: Temperatures,
) -> Tensor:  # (...)
    """The loss on K logits per row, whose ids are the slots' numbers; K is one that the student lacks."""
    k = z.shape[-1]
    if at.student is not None:
        z = divided(z, live_slots(ids, log_probs, vocab), at.student)
    ids, log_probs = at.divided_teacher(ids, log_probs, vocab)
    slots = torch.arange(k, dtype=torch.int32, device=z.device)
    slots = torch.where(ids < vocab, slots, k).masked_fill(ids < 0, -1)
    loss: Tensor
    loss, _ = SupportLoss.apply(z, slots, log_probs, weights, objective, _small(options, z, student))
    return loss.to(result_dtype(student))


def _on_classes(
    columns: Tensor,  # (..., K + 1) float64: the logits at the slots, and the rest of the vocabulary as one more
    ids: Tensor,  # (..., K) as `classes` gives them, and so the other two
    log_probs: Tensor,  # (..., K)
    tail: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,  # (numbers,)
    options: Options,
    student: Tensor,  # (..., anything), of the dtype of the student's
) -> Tensor:  # (...)
    empty = ids < 0
    slots = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device).masked_fill(empty, -1)
    columns = columns.masked_fill(torch.nn.functional.pad(empty, (0, 1)), -torch.inf)  # no part of the rest
    loss: Tensor = MassLoss.apply(
        columns, slots, log_probs, tail, weights, objective, _small(options, columns, student)
    )
    return loss.to(result_dtype(student))


def _small(options: Options, z: Tensor, student: Tensor) -> Options:
    """Options of the loss on K numbers per row: float64 has the reference alone."""
    backend = options.backend if result_dtype(student) == z.dtype else "reference"
    return Options(backend, options.terms)
