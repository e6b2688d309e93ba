"""Plain PyTorch on any device: the truth that every other backend is compared with.

Every function writes into outputs that it is given: float32, or float64 from float64, where no other dtype is named.
Rows are taken in chunks. The numbers of bytes per row are what a chunk holds at its peak, temporaries included.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.divergence import capped, slots_loss
from topk_rkl.objective import Objective
from topk_rkl.rows import add_repeats, chunks, finite_max, live_slots, repeats, result_dtype, times

GATHERED = 100  # bytes per slot of a loss: the float64 numbers of slots_loss


def select(
    logits: Tensor,  # (N, V)
    normalize: bool,
    ids: Tensor,  # (N, K) int32, written
    log_probs: Tensor,  # (N, K), written
) -> None:
    n, vocab = logits.shape
    for rows in chunks(n, bytes_per_row=(40 if normalize else 16) * vocab):
        x = logits[rows]
        chosen = _top_ids(x, ids.shape[1])
        w = x.gather(1, chosen).to(log_probs.dtype)
        empty = w == -torch.inf
        if normalize:  # rounded once the difference is taken
            total = x.double().logsumexp(1, keepdim=True)
            w = w - total.masked_fill(total == torch.inf, torch.nan)
        ids[rows] = chosen.int().masked_fill(empty, -1)
        log_probs[rows] = w.masked_fill(empty, -torch.inf)


def _top_ids(
    x: Tensor,  # (N, V)
    k: int,
) -> Tensor:  # (N, K) int64, by value descending, then id ascending
    """torch.topk leaves open which of the values that equal the K-th it takes, and their order; here the lowest ids."""
    vocab = x.shape[1]
    values, ids = x.topk(k)
    kth = values[:, -1:]
    tied = (x == kth) | (x.isnan() & kth.isnan())
    countdown = torch.arange(vocab, 0, -1, dtype=torch.int32, device=x.device)
    lowest_tied = vocab - torch.where(tied, countdown, 0).topk(k).values.long()
    tied_slot = (values == kth) | (values.isnan() & kth.isnan())
    nth_tied = (tied_slot.cumsum(1) - 1).clamp(min=0)
    ids = torch.where(tied_slot, lowest_tied.gather(1, nth_tied), ids).sort(dim=1).values
    # One zero and one NaN, since a radix sort would tell them apart by their sign.
    values = x.gather(1, ids) + 0.0
    order = values.masked_fill(values.isnan(), torch.nan).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


def support_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written: times the weight of the row, as g is
    g: Tensor,  # (N, K), written
) -> None:
    for rows in chunks(len(ids), bytes_per_row=GATHERED * ids.shape[1]):
        live = live_slots(ids[rows], log_probs[rows], student.shape[1])
        z = student[rows].gather(1, torch.where(live, ids[rows], 0).long())
        w = of_named(ids[rows], log_probs[rows])
        of_rows = None if weights is None else weights[rows]
        found = slots_loss(z, w, live, objective.temperature, objective.divergence)
        loss[rows], g[rows] = _weigh(*found, of_rows)


def select_loss(
    student: Tensor,  # (N, V_student)
    teacher: Tensor,  # (N, V)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    ids: Tensor,  # (N, K) int32, written
    g: Tensor,  # (N, K), written
) -> None:
    log_probs = torch.empty_like(g, dtype=result_dtype(teacher))
    select(teacher, False, ids, log_probs)
    support_loss(student, ids, log_probs, weights, objective, loss, g)
    if weights is not None:
        ids.masked_fill_(weights[:, None] == 0, -1)


def scatter(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    grad_output: Tensor,  # (N,)
    out: Tensor,  # (N, V), overwritten
    unique: bool,
) -> None:
    """out[i] = grad_output[i] * the sum over the slots j of row i of g[i, j] at column ids[i, j], and 0 elsewhere."""
    columns = torch.where((ids >= 0) & (ids < out.shape[1]), ids, -1).long()
    value = times(g, grad_output)
    if not unique:
        columns, slots = columns.sort(dim=1, stable=True)
        value = add_repeats(columns, value.gather(1, slots), torch.add)
        columns = columns.masked_fill(repeats(columns), -1)
    empty = columns < 0
    columns, value = columns.masked_fill(empty, 0), value.masked_fill(empty, 0).to(out.dtype)
    # Added, not stored: an empty slot then adds 0 to column 0, and no column receives two other numbers.
    for rows in chunks(len(out), bytes_per_row=4 * out.shape[1]):  # torch adds 16-bit numbers in a float32 copy
        out[rows].zero_().scatter_add_(1, columns[rows], value[rows])


def scale_rows(
    g: Tensor,  # (N, X)
    grad_output: Tensor,  # (N,)
    out: Tensor,  # (N, X), written
) -> None:
    out.copy_(times(g, grad_output))


def tail_logit(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    temperature: float,
    out: Tensor,  # (N,) float64, written
) -> None:
    """All columns but those at ids as one more logit: temperature * logsumexp(logits / temperature) over them."""
    for rows in chunks(len(ids), bytes_per_row=24 * logits.shape[1]):
        out[rows] = as_logit(*_outside(logits[rows], ids[rows], temperature), temperature)


def as_logit(
    peak: Tensor,  # (N,) the largest of some logits
    total: Tensor,  # (N,) the sum over them of exp((logit - peak) / temperature)
    temperature: float,
) -> Tensor:  # (N,)
    return peak + temperature * total.log()


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K), none twice in a row
    log_probs: Tensor,  # (N, K)
    tail: Tensor,  # (N,) the teacher's `tail_logit`
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
    outside: Tensor,  # (N, 2) float64, written
) -> None:
    """support_loss with the rest of the vocabulary as one more class, the tail, which has a gradient too.

    `outside` holds a peak and a factor per row. The gradient at a column outside S is factor * exp((logit - peak) /
    temperature).
    """
    vocab = student.shape[1]
    for rows in chunks(len(ids), bytes_per_row=24 * vocab + GATHERED * ids.shape[1]):
        live = live_slots(ids[rows], log_probs[rows], vocab)
        z = student[rows].gather(1, torch.where(live, ids[rows], 0).long())
        outside[rows, 0], total = _outside(student[rows], torch.where(live, ids[rows], -1), objective.temperature)
        w = of_named(ids[rows], log_probs[rows])
        of_rows = None if weights is None else weights[rows]
        loss[rows], g[rows], outside[rows, 1] = mass_slots_loss(
            z, w, live, outside[rows, 0], total, tail[rows], of_rows, objective
        )


def mass_slots_loss(
    z: Tensor,  # (N, K)
    w: Tensor,  # (N, K) the log-probs, as `of_named` has them
    live: Tensor,  # (N, K) bool
    peak: Tensor,  # (N,) the largest of the student's logits outside S
    total: Tensor,  # (N,) the sum over them of exp((logit - peak) / temperature)
    tail: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (N,), g (N, K), factor (N,) float64
    temperature, divergence, mass = objective[:3]
    # The tail is compared as any slot is: not where the teacher leaves it nothing. p is still that of all tokens.
    compared = (tail != -torch.inf) | (mass != "tail")
    z, w, live = (
        torch.cat((slots, last[:, None]), 1)
        for slots, last in ((z.double(), as_logit(peak, total, temperature)), (w.double(), tail), (live, compared))
    )
    loss, g = _weigh(*slots_loss(z, w, live, temperature, divergence, mass), weights)
    g, of_tail = g[:, :-1].contiguous(), g[:, -1]
    return loss, g, torch.where(of_tail == 0, 0, of_tail / total)


def _outside(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
    """Of the columns that no id names: the largest, or 0 for -inf, and the sum of exp((logit - it) / temperature)."""
    n, vocab = logits.shape
    outside = torch.ones((n, vocab + 1), dtype=torch.bool, device=logits.device)
    outside.scatter_(1, torch.where((ids < 0) | (ids >= vocab), vocab, ids).long(), False)
    x = logits.double().masked_fill(~outside[:, :-1], -torch.inf)
    peak = finite_max(x)
    return peak.squeeze(1), ((x - peak) / temperature).exp_().sum(1)


def mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    outside: Tensor,  # (N, 2)
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    temperature: float,
    out: Tensor,  # (N, V), overwritten
) -> None:
    """out[i] = grad_output[i] * the gradient that mass_loss found: g at the ids, and what `outside` says elsewhere."""
    student = out if student is None else student
    n, vocab = out.shape
    columns = torch.where((ids < 0) | (ids >= vocab), vocab, ids).long()
    for rows in chunks(n, bytes_per_row=32 * vocab):
        scale = grad_output[rows].double()
        peak, factor = outside[rows].split(1, 1)
        factor = times(factor, scale)
        dense = torch.zeros((len(scale), vocab + 1), dtype=torch.float64, device=out.device)
        dense[:, :-1] = torch.where(factor == 0, 0, factor * ((student[rows] - peak) / temperature).exp())
        dense.scatter_(1, columns[rows], times(g[rows].double(), scale))
        out[rows] = dense[:, :-1].to(out.dtype)


def linear_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
    dhidden: Tensor | None,  # (N, H), written
) -> None:
    """support_loss of the logits cap(logit_scale (hidden @ head.T + bias)), of which only K per row are computed.

    g is the gradient with respect to hidden @ head.T + bias, so that dhidden = sum_j g[:, j] head[ids[:, j]]. All is
    times the weight of the row.
    """
    vocab = len(head)
    raw = torch.empty_like(g)
    linear_logits(hidden, head, bias, torch.where(live_slots(ids, log_probs, vocab), ids, -1), raw)
    for rows in chunks(len(ids), bytes_per_row=GATHERED * ids.shape[1]):
        of_rows = None if weights is None else weights[rows]
        given = raw[rows].double(), ids[rows], log_probs[rows], of_rows
        loss[rows], g[rows] = raw_slots_loss(*given, vocab, objective)
    if dhidden is not None:
        linear_hidden_grad(g, ids, head, dhidden)


def linear_logits(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    out: Tensor,  # (N, K), written
) -> None:
    """hidden @ head[id] + bias[id], rounded once, and 0 at ids outside [0, V), whatever the row that stands in."""
    known = (ids >= 0) & (ids < len(head))
    for rows, slots in _blocks(ids, head):
        columns = torch.where(known[rows, slots], ids[rows, slots], 0).long()
        raw = torch.einsum("nkh,nh->nk", head[columns].double(), hidden[rows].double())
        if bias is not None:
            raw += bias[columns]
        out[rows, slots] = raw.masked_fill_(~known[rows, slots], 0).to(out.dtype)


def linear_hidden_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    head: Tensor,  # (V, H)
    out: Tensor,  # (N, H), written
) -> None:
    """out[i] = the sum over the slots j of g[i, j] head[ids[i, j]].

    Slots with g = 0 or an id outside [0, V) are left out, whatever their rows hold.
    """
    live = (ids >= 0) & (ids < len(head)) & (g != 0)
    total = torch.zeros_like(out, dtype=torch.float64)
    for rows, slots in _blocks(ids, head):
        some = live[rows, slots]
        kept = head[torch.where(some, ids[rows, slots], 0).long()].double()
        kept.masked_fill_(~some[..., None], 0)
        total[rows] += torch.einsum("nkh,nk->nh", kept, torch.where(some, g[rows, slots], 0).double())
    out.copy_(total)


def _blocks(
    ids: Tensor,  # (N, K)
    head: Tensor,  # (V, H)
) -> Iterator[tuple[slice, slice]]:
    """Rows by slots, so few that their rows of the head may be gathered."""
    n, k = ids.shape
    slot_bytes = 24 * head.shape[1]
    for slots in chunks(k, slot_bytes):
        yield from ((rows, slots) for rows in chunks(n, (slots.stop - slots.start) * slot_bytes))


def raw_slots_loss(
    raw: Tensor,  # (N, K) the products with the head, anything on an empty slot
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    vocab: int,
    objective: Objective,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float64: the loss, and its gradient with respect to raw
    z, slope = capped(raw, objective.logit_scale, objective.softcap)
    live, w = live_slots(ids, log_probs, vocab), of_named(ids, log_probs)
    loss, dz = _weigh(*slots_loss(z, w, live, objective.temperature, objective.divergence), weights)
    # An empty slot has gradient 0 even where the row of the head that stands in for it is not finite.
    return loss, torch.where(dz == 0, 0, dz * slope)


def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    """dhead[v] = the sum of g[i, j] hidden[i] over the slots whose id is v, and dbias[v] that of g[i, j].

    Slots with g = 0 are left out: a row of weight 0 contributes nothing, whatever its hidden state holds.
    """
    live = (ids >= 0) & (g != 0)
    columns, terms = torch.where(live, ids, 0).long(), torch.where(live, g, 0)
    for out, factor in ((dhead, hidden), (dbias, None)):
        if out is None:
            continue
        total = out.zero_() if out.dtype == g.dtype else torch.zeros_like(out, dtype=g.dtype)
        for rows in chunks(len(g), bytes_per_row=16 * columns.shape[1] * out.shape[1:].numel()):
            added = terms[rows]
            if factor is not None:
                added = torch.where(live[rows, :, None], added[..., None] * factor[rows, None].to(g.dtype), 0)
            total.index_put_((columns[rows],), added, accumulate=True)  # in a fixed order, on a GPU too
        out.copy_(total)


def of_named(
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
) -> Tensor:  # (N, K)
    """The log-probs, and -inf for slots without an id. NaN or +inf at an id that the student lacks spoils the row."""
    return log_probs.masked_fill(ids < 0, -torch.inf)


def _weigh(
    loss: Tensor,  # (N,)
    g: Tensor,  # (N, K)
    weight: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return loss, g
    dropped = weight == 0
    return (loss * weight).masked_fill(dropped, 0), (g * weight[:, None]).masked_fill(dropped[:, None], 0)
