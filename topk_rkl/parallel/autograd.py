"""The Functions between a vocabulary that ranks share and a loss on K numbers per row, which every rank has.

The forward pass of each has one or two collectives. The backward pass of logits has none. That of hidden states has
one: the sum of their gradient over the ranks, as a column-parallel head has.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topk_rkl import ops
from topk_rkl.autograd import (
    Gradients,
    Options,
    RowLoss,
    describe_head,
    differentiable_once,
    head_grads,
    keep_row,
    savable,
    save,
    scattered,
)
from topk_rkl.divergence import capped
from topk_rkl.objective import head_numbers
from topk_rkl.parallel.collectives import (
    all_reduce,
    as_bytes,
    dealt,
    from_bytes,
    from_owners,
    start_all_reduce,
    to_owners,
    wait,
)
from topk_rkl.parallel.logits import beside, candidates, joined, logits_at, own_logits, shard_tail
from topk_rkl.rows import result_dtype
from topk_rkl.traced import converted


class ShardedSelectLoss(RowLoss):
    """`SelectLoss` over shards: a row's owner hears of each rank's candidates, and answers with the loss and their g.

    A candidate is the teacher's logit, the student's, and whether the student has the token. Nobody needs its id: the
    candidates of lower ranks come first, and so do their ids.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_local)
        teacher: Tensor,  # (..., V_local), whose first id is that of student
        k: int,
        weights: Tensor | None,  # (...)
        objective: Tensor | None,  # (numbers,)
        options: Options,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:  # (...), and (..., K) for the backward pass
        ids, values = candidates(teacher, k, options.backend)
        if student.shape[-1] < teacher.shape[-1]:
            ids = ids.masked_fill(ids >= student.shape[-1], -1)
        told = as_bytes(
            *(x.reshape(-1, k) for x in (values.to(teacher.dtype), own_logits(student, ids), (ids >= 0).byte()))
        )
        received = beside(to_owners(told, group))  # (n, ranks, bytes)
        w, z, known = from_bytes(received, teacher.dtype, student.dtype, torch.uint8, columns=k)
        loss, g = _owned_loss(
            w.flatten(1), z.flatten(1), known.flatten(1) > 0, k, _owned_rows(weights, group), objective, options
        )
        answer = torch.cat((g.unflatten(1, (-1, k)), loss[:, None, None].expand(-1, w.shape[1], 1)), 2)
        answer = from_owners(beside(answer), len(told), group)  # (N, K + 1)
        g, loss = answer[:, :k].reshape(ids.shape), answer[:, k].contiguous().view(ids.shape[:-1])
        keep_row(ctx, student, options, g, ids, unique=True)
        return loss, g


def _owned_loss(
    w: Tensor,  # (n, ranks K) the teacher's logits
    z: Tensor,  # (n, ranks K) the student's
    known: Tensor,  # (n, ranks K) bool: the student has the token
    k: int,
    weights: Tensor | None,  # (n,)
    objective: Tensor | None,  # (numbers,)
    options: Options,
) -> tuple[Tensor, Tensor]:  # (n,), (n, ranks K)
    place, best = ops.select(w, k, False, options.backend)
    at = place.clamp(min=0).long()
    slots = torch.arange(k, dtype=torch.int32, device=w.device)
    slots = torch.where(known.gather(1, at), slots, k).masked_fill(place < 0, -1)  # K is a token the student lacks
    loss, g = ops.support_loss(z.gather(1, at), slots, best, weights, objective, options.backend, terms=options.terms)
    every = g.new_zeros((len(w), w.shape[1] + 1))  # and a column for empty slots
    return loss, every.scatter_(1, torch.where(place < 0, w.shape[1], place).long(), g)[:, :-1]


def _owned_rows(
    weights: Tensor | None,  # (...)
    group: dist.ProcessGroup,
) -> Tensor | None:  # (n,), 0 behind the last row
    return None if weights is None else dealt(weights.reshape(-1), group)[dist.get_rank(group)]


class LogitsAt(torch.autograd.Function):
    """The student's logits at the slots, whichever rank has them, on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_local)
        ids: Tensor,  # (..., K) of this rank, -1 for those of others
        options: Options,
        group: dist.ProcessGroup | None,
    ) -> Tensor:  # (..., K) float32, or float64 from float64
        keep_row(ctx, student, options, ids, unique=False)
        return converted(logits_at(student, ids, group), result_dtype(student))

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        dz: Tensor,  # (..., K)
        ids: Tensor,  # (..., K)
        student: Tensor | None,  # (..., V_local), to overwrite
    ) -> Gradients:  # (..., V_local), and nothing for the other three
        return scattered(ctx, dz.new_ones(dz.shape[:-1]), dz, ids, student), None, None, None


class LogitsAndTail(torch.autograd.Function):
    """The student's logits at the slots, and all others of all ranks as one more, on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_local)
        ids: Tensor,  # (..., K) of this rank, none twice in a row, -1 for those of others
        objective: Tensor | None,  # (numbers,)
        options: Options,
        group: dist.ProcessGroup,
    ) -> Tensor:  # (..., K + 1) float64
        tail = shard_tail(student, ids, objective, group, options.backend)
        columns = torch.cat((logits_at(student, ids, group).double(), tail[..., None]), -1)
        ctx.options = options
        save(ctx, columns, ids, student, objective)
        return columns

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        dz: Tensor,  # (..., K + 1)
        columns: Tensor,  # (..., K + 1)
        ids: Tensor,  # (..., K)
        student: Tensor,  # (..., V_local)
        objective: Tensor | None,  # (numbers,)
    ) -> Gradients:  # (..., V_local), and nothing for the other four
        overwrite = ctx.options.overwrite_student_logits
        out = student.detach() if overwrite else torch.empty(student.shape, dtype=student.dtype, device=dz.device)
        g, outside = _of_slots_and_tail(dz, columns)
        given, ones = None if overwrite else student, dz.new_ones(dz.shape[:-1])
        ops.mass_grad(g, ids, outside, ones, given, out, objective, ctx.options.backend)
        if overwrite:
            torch.autograd.graph.increment_version(student)
        return out, None, None, None, None


class LinearLogitsAt(torch.autograd.Function):
    """The logits at the slots that the ranks' shards of the head make of the hidden states, on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V_local, H)
        bias: Tensor | None,  # (V_local,)
        ids: Tensor,  # (..., K) of this rank, -1 for those of others
        objective: Tensor | None,  # (numbers,)
        options: Options,
        group: dist.ProcessGroup | None,
    ) -> Tensor:  # (..., K), float64 where logits are not the products as they are
        raw = all_reduce(ops.linear_logits(hidden, head, bias, ids, options.backend), group)
        z, slope = _of_products(raw, objective, options)
        of_hidden, of_head, of_bias = ctx.needs_input_grad[:3]
        ctx.group, ctx.dtype = group, hidden.dtype
        describe_head(ctx, head, bias, options)
        # A frozen head is kept as it is, since a copy would be V H numbers.
        kept = savable(head, copy=False) if of_hidden else None
        save(ctx, ids, slope, kept, hidden if of_head or of_bias else None)
        return z

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        dz: Tensor,  # (..., K)
        ids: Tensor,  # (..., K)
        slope: Any,  # (..., K) or (); None is 1
        head: Any,  # (V_local, H), or None if hidden has no gradient
        hidden: Any,  # (..., H), or None if neither head nor bias has a gradient
    ) -> Gradients:  # (..., H), (V_local, H), (V_local,), and nothing for the other four
        # What is masked stays masked, whatever its slope is.
        g = dz if slope is None else torch.where(dz == 0, 0, dz * slope)
        g = g.to(torch.float64 if ctx.dtype == torch.float64 else torch.float32)
        dhidden, alone = None, ctx.group is None
        if ctx.needs_input_grad[0]:
            dhidden = g.new_empty((*g.shape[:-1], ctx.head_shape[1]))
            ops.linear_hidden_grad(g, ids, head, dhidden, ctx.options.backend)
            dhidden = dhidden if alone else start_all_reduce(dhidden, ctx.group)
        of_head = head_grads(ctx, g, ids, hidden, gathered=not alone)  # while the sum is under way
        if dhidden is not None:
            dhidden = (dhidden if alone else wait(dhidden)).to(ctx.dtype)
        return dhidden, *of_head, None, None, None, None


class LinearLogitsAndTail(torch.autograd.Function):
    """`LogitsAndTail` of the logits that the ranks' shards of the head make of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V_local, H)
        bias: Tensor | None,  # (V_local,)
        ids: Tensor,  # (..., K) of this rank, none twice in a row, -1 for those of others
        objective: Tensor | None,  # (numbers,)
        options: Options,
        group: dist.ProcessGroup,
    ) -> Tensor:  # (..., K + 1) float64
        raw = all_reduce(ops.linear_logits(hidden, head, bias, ids, options.backend), group)
        z, _ = _of_products(raw.double(), objective, options)
        tail = joined(ops.linear_tail_logit(hidden, head, bias, ids, objective, options.backend), objective, group)
        columns = torch.cat((z, tail[..., None]), -1)
        ctx.options, ctx.group = options, group
        save(ctx, columns, ids, hidden, savable(head, copy=False), bias, objective)
        return columns

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        dz: Tensor,  # (..., K + 1)
        columns: Tensor,  # (..., K + 1)
        ids: Tensor,  # (..., K)
        hidden: Tensor,  # (..., H)
        head: Tensor,  # (V_local, H)
        bias: Any,  # (V_local,), or None
        objective: Tensor | None,  # (numbers,)
    ) -> Gradients:  # (..., H), (V_local, H), (V_local,), and nothing for the other four
        of_hidden, of_head, of_bias = ctx.needs_input_grad[:3]
        g, outside = _of_slots_and_tail(dz, columns)
        dhidden = hidden.new_empty(hidden.shape, dtype=result_dtype(hidden)) if of_hidden else None
        dhead = torch.empty_like(head) if of_head else None
        dbias = torch.empty_like(bias) if of_bias else None
        given = g.to(result_dtype(hidden)), ids, outside, dz.new_ones(dz.shape[:-1]), hidden, head, bias
        ops.linear_mass_grad(*given, dhidden, dhead, dbias, objective, ctx.options.backend)
        if dhidden is not None:
            dhidden = all_reduce(dhidden, ctx.group).to(hidden.dtype)
        return dhidden, dhead, dbias, None, None, None, None


def _of_products(
    raw: Tensor,  # (..., K)
    objective: Tensor | None,  # (numbers,)
    options: Options,
) -> tuple[Tensor, Tensor | None]:  # (..., K), and (..., K) or ()
    """The logits, in float64 where they are not the products, and their derivative; None is 1."""
    if objective is None or not (options.scaled or options.capped):
        return raw, None
    scale, softcap = head_numbers(objective)
    return capped(raw.double(), scale, softcap if options.capped else None)


def _of_slots_and_tail(
    dz: Tensor,  # (..., K + 1)
    columns: Tensor,  # (..., K + 1)
) -> tuple[Tensor, Tensor]:  # (..., K), (..., 2)
    """g at the slots, and the peak and factor of the gradient at all other columns: see `reference.mass_loss`."""
    tail = columns[..., -1]
    peak = tail.masked_fill(tail == -torch.inf, 0)  # then nothing is outside
    return dz[..., :-1], torch.stack((peak, dz[..., -1]), -1)
