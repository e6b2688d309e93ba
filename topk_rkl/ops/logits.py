"""The ops on logits: where each meets its backend."""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.backends import choose
from topk_rkl.divergence import Terms
from topk_rkl.objective import unpack
from topk_rkl.ops.op import Pair, Triple, contiguous, new, op, rows_of


@op()
def select(
    logits: Tensor,  # (..., V)
    k: int,
    normalize: bool,
    backend: str,
) -> Iterator[Pair]:  # ids (..., K) int32, log_probs (..., K)
    ids, log_probs = new(logits, k, torch.int32), new(logits, k)
    yield ids, log_probs
    module = choose(backend, k, logits)
    for (rows,), outputs in rows_of(module, (logits,), (ids, log_probs)):
        module.select(rows, normalize, *outputs)


@op()
def support_loss(
    student: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> Iterator[Pair]:  # loss (...), g (..., K)
    loss, g = new(student), new(student, ids.shape[-1])
    yield loss, g
    at = unpack(objective, terms)
    module = choose(backend, ids.shape[-1], student, divergence=at.divergence)
    for inputs, outputs in rows_of(module, (student, *contiguous(ids, log_probs, weights)), (loss, g)):
        module.support_loss(*inputs, at, *outputs)


@op()
def select_loss(
    student: Tensor,  # (..., V_student)
    teacher: Tensor,  # (..., V)
    k: int,
    weights: Tensor | None,  # (...)
    objective: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> Iterator[Triple]:  # loss (...), ids (..., K) int32, g (..., K)
    loss, ids, g = new(student), new(student, k, torch.int32), new(student, k)
    yield loss, ids, g
    at = unpack(objective, terms)
    module = choose(backend, k, student, teacher, divergence=at.divergence)
    for inputs, outputs in rows_of(module, (student, teacher, *contiguous(weights)), (loss, ids, g)):
        module.select_loss(*inputs, at, *outputs)


@op("out")
def scatter(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    grad_output: Tensor,  # (...)
    out: Tensor,  # (..., V), overwritten
    unique: bool,
    backend: str,
) -> Iterator[None]:
    yield
    if out.shape[-1] == 0:  # a shard of the vocabulary without a token
        return
    module = choose(backend, ids.shape[-1], out)
    for inputs, outputs in rows_of(module, (*contiguous(g, ids, grad_output),), (out,)):
        module.scatter(*inputs, *outputs, unique)


@op()
def tail_logit(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    objective: Tensor | None,
    backend: str,
) -> Iterator[Tensor]:  # (...) float64
    out = new(logits, dtype=torch.float64)
    yield out
    module, vocab = choose(backend, ids.shape[-1], logits, mass="tail"), logits.shape[-1]
    ids = torch.where((ids < 0) | (ids >= vocab), vocab, ids).int().sort(-1).values  # as the kernels need them
    for inputs, outputs in rows_of(module, (logits, ids.contiguous()), (out,)):
        module.tail_logit(*inputs, unpack(objective).temperature, *outputs)


@op()
def mass_loss(
    student: Tensor,  # (..., V)
    ids: Tensor,  # (..., K) ascending, none twice in a row, the negative ones last; with "ema_pg" in any order
    log_probs: Tensor,  # (..., K)
    tail: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> Iterator[Triple]:  # loss (...), g (..., K), outside (..., 2) float64
    loss, g, outside = new(student), new(student, ids.shape[-1]), new(student, 2, torch.float64)
    yield loss, g, outside
    at = unpack(objective, terms)
    module = choose(backend, ids.shape[-1], student, divergence=at.divergence, mass=at.mass)
    ids = ids.clamp(-1, student.shape[-1]).int()  # beyond the vocabulary as before, and within the kernels' integers
    if not at.mass.startswith("ema_pg"):  # which the reference alone serves
        before, after = ids[..., :-1], ids[..., 1:]
        ordered = torch.where(before < 0, after < 0, (after < 0) | (before < after))  # (..., K - 1)
        tail = tail.masked_fill(~ordered.all(-1), torch.nan)
    given = (student, *contiguous(ids, log_probs, tail, weights))
    for inputs, outputs in rows_of(module, given, (loss, g, outside)):
        module.mass_loss(*inputs, at, *outputs)


@op("out")
def mass_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    outside: Tensor,  # (..., 2)
    grad_output: Tensor,  # (...)
    student: Tensor | None,  # (..., V), or None: out holds it
    out: Tensor,  # (..., V), overwritten
    objective: Tensor | None,
    backend: str,
) -> Iterator[None]:
    yield
    if out.shape[-1] == 0:  # a shard of the vocabulary without a token
        return
    module = choose(backend, ids.shape[-1], out, mass="tail")
    for inputs, outputs in rows_of(module, (*contiguous(g, ids, outside, grad_output), student), (out,)):
        module.mass_grad(*inputs, unpack(objective).temperature, *outputs)


@op()
def kept(x: Tensor) -> Iterator[Tensor]:
    """A copy that torch.compile saves as it is, and not what it was made of."""
    copy = x.new_empty(x.shape)
    yield copy
    copy.copy_(x)
