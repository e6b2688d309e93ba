"""The ops on hidden states and the head: where each meets its backend."""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.backends import choose, choose_linear, choose_plain, reference
from topk_rkl.backends.products import LOGITS, all_logits
from topk_rkl.divergence import Terms, capped
from topk_rkl.objective import unpack
from topk_rkl.ops.op import Triple, contiguous, new, op, rows_of
from topk_rkl.rows import chunks, result_dtype, row_views

LINEAR_BYTES = 128 << 20  # of logits at a time: enough rows for a matrix product at full speed


@op()
def linear_select(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    k: int,
    chunk_rows: int | None,
    objective: Tensor | None,
    normalize: bool,
    full: bool,
    totals: bool,
    backend: str,
) -> Iterator[Triple]:  # ids (..., K) int32, log_probs (..., K), total (...) float64, or (0,) without `totals`
    """Logits some rows at a time in one buffer, and `select` on those.

    By the platform's own matrix product; or, if `full` or where the dtypes differ, by one in float32 (float64). The
    total of a row is the logsumexp of its logits, NaN where one is +inf.
    """
    ids, log_probs = new(hidden, k, torch.int32), new(hidden, k)
    total = new(hidden, dtype=torch.float64) if totals else hidden.new_empty(0, dtype=torch.float64)
    yield ids, log_probs, total
    vocab, dtype, at = head.shape[0], result_dtype(hidden), unpack(objective)
    full |= any(x is not None and x.dtype != hidden.dtype for x in (head, bias))
    buffer_dtype = dtype if full else hidden.dtype
    chunk_rows = chunk_rows or max(1, LINEAR_BYTES // (vocab * buffer_dtype.itemsize))
    buffer = hidden.new_empty((min(chunk_rows, hidden.shape[:-1].numel()), vocab), dtype=buffer_dtype)
    module = choose(backend, k, buffer)
    for rows, of_rows, *outputs in row_views(hidden, total if totals else None, ids, log_probs):
        for some in chunks(len(rows), 1, chunk_rows):
            logits = buffer[: len(rows[some])]
            if full:
                all_logits(rows[some], head, bias, at, logits)
            elif bias is None:
                torch.mm(rows[some], head.T, out=logits)
            else:
                torch.addmm(bias, rows[some], head.T, out=logits)
            if not full and (at.logit_scale != 1 or at.softcap is not None):
                for few in chunks(len(logits), vocab * dtype.itemsize, LOGITS):
                    logits[few] = capped(logits[few].to(dtype), at.logit_scale, at.softcap)[0]
            module.select(logits, normalize, *(x[some] for x in outputs))
            if of_rows is not None:
                for few in chunks(len(logits), vocab * total.itemsize, LOGITS):
                    of_rows[some][few] = logits[few].double().logsumexp(1)
    total.masked_fill_(total == torch.inf, torch.nan)


@op()
def linear_logits(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    backend: str,
) -> Iterator[Tensor]:  # (..., K)
    """The products hidden @ head[id] + bias[id] as `linear_loss` makes them, and 0 at ids outside [0, V)."""
    out = new(hidden, ids.shape[-1])
    yield out
    module = choose(backend, ids.shape[-1], hidden, linear=True, function="linear_logits")
    if len(head) == 0:  # which has no row that could stand in for those outside
        out.zero_()
        return
    for (rows, slots), outputs in rows_of(module, (hidden, *contiguous(ids)), (out,)):
        module.linear_logits(rows, head, bias, slots, *outputs)


@op("out")
def linear_hidden_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    head: Tensor,  # (V, H)
    out: Tensor,  # (..., H) contiguous, float32 or float64, overwritten
    backend: str,
) -> Iterator[None]:
    yield
    module = choose(backend, ids.shape[-1], out, linear=True, function="linear_hidden_grad")
    if len(head) == 0:
        out.zero_()
        return
    for inputs, outputs in rows_of(module, (*contiguous(g, ids),), (out,)):
        module.linear_hidden_grad(*inputs, head, *outputs)


@op()
def linear_loss(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,
    want_dhidden: bool,
    backend: str,
    terms: Terms | None = None,
) -> Iterator[Triple]:  # loss (...), g (..., K), dhidden (..., H) or (0, H)
    loss, g = new(hidden), new(hidden, ids.shape[-1])
    dhidden = hidden.new_empty(hidden.shape if want_dhidden else (0, hidden.shape[-1]), dtype=g.dtype)
    yield loss, g, dhidden
    at = unpack(objective, terms)
    module = choose_linear(backend, ids.shape[-1], hidden, len(head), at.divergence)
    given = (hidden, *contiguous(ids, log_probs, weights))
    for (rows, *slots), outputs in rows_of(module, given, (loss, g, dhidden if want_dhidden else None)):
        module.linear_loss(rows, head, bias, *slots, at, *outputs)


@op()
def scale_rows(
    g: Tensor,  # (..., X)
    grad_output: Tensor,  # (...)
    dtype: torch.dtype,
    backend: str,
) -> Iterator[Tensor]:  # (..., X)
    """`times`, rounded to dtype: in one pass where the backend has a kernel for it."""
    out = g.new_empty(g.shape, dtype=dtype)
    yield out
    module = choose(backend, 1, g, linear=True)
    kernel = getattr(module, "scale_rows", reference.scale_rows)
    shape = g.shape[:-1].numel(), g.shape[-1]
    kernel(g.contiguous().view(shape), grad_output.contiguous().view(-1), out.view(shape))


@op("dhead", "dbias")
def linear_weight_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    hidden: Tensor,  # (..., H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
    gathered: bool,  # never by a dense product, whatever the size of the head here
    backend: str,
) -> Iterator[None]:
    yield
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    if vocab > 0:  # else no row of the head was touched
        k = ids.shape[-1]
        module = choose(backend, k, hidden, linear=True) if gathered else choose_linear(backend, k, hidden, vocab)
        module.linear_weight_grad(*(x.reshape(-1, x.shape[-1]).contiguous() for x in (g, ids, hidden)), dhead, dbias)


@op()
def linear_mass_loss(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    log_probs: Tensor,  # (..., K)
    tail: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    objective: Tensor | None,
    backend: str,
    terms: Terms | None = None,
) -> Iterator[Triple]:  # loss (...), g (..., K), outside (..., 2) float64
    loss, g, outside = new(hidden), new(hidden, ids.shape[-1]), new(hidden, 2, torch.float64)
    yield loss, g, outside
    at = unpack(objective, terms)
    module = choose_plain(backend, at.mass)
    given = (hidden, *contiguous(ids, log_probs, tail, weights))
    for (rows, *slots), outputs in rows_of(module, given, (loss, g, outside)):
        module.linear_mass_loss(rows, head, bias, *slots, at, *outputs)


@op()
def linear_tail_logit(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    objective: Tensor | None,
    backend: str,
) -> Iterator[Tensor]:  # (...) float64
    out = new(hidden, dtype=torch.float64)
    yield out
    at = unpack(objective)
    module = choose_plain(backend, at.mass)
    if len(head) == 0:
        out.fill_(-torch.inf)
        return
    for (rows, slots), outputs in rows_of(module, (hidden, *contiguous(ids)), (out,)):
        module.linear_tail_logit(rows, head, bias, slots, at, *outputs)


@op("dhidden", "dhead", "dbias")
def linear_mass_grad(
    g: Tensor,  # (..., K)
    ids: Tensor,  # (..., K)
    outside: Tensor,  # (..., 2)
    grad_output: Tensor,  # (...)
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    dhidden: Tensor | None,  # (..., H), overwritten
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
    objective: Tensor | None,
    backend: str,
) -> Iterator[None]:
    yield
    if len(head) == 0:  # a shard of the vocabulary without a token
        if dhidden is not None:
            dhidden.zero_()
        return
    at = unpack(objective)
    *slots, rows = (x.reshape(-1, x.shape[-1]) for x in (g, ids, outside, hidden))
    of_rows = None if dhidden is None else dhidden.view(rows.shape)
    module = choose_plain(backend, at.mass)
    module.linear_mass_grad(*slots, grad_output.reshape(-1), rows, head, bias, of_rows, dhead, dbias, at)
