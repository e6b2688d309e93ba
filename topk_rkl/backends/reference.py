"""Plain PyTorch on any device: the truth that every other backend is compared with.

Rows are taken in chunks, so that what is held besides the results stays below CHUNK_BYTES.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.divergence import REVERSE_KL, Code, Terms, capped, slots_loss

CHUNK_BYTES = 32 << 20


def select(
    logits: Tensor,  # (N, V)
    k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, K) int32, (N, K) float32 (float64 from float64)
    n, vocab = logits.shape
    ids = torch.empty((n, k), dtype=torch.int32, device=logits.device)
    values = torch.empty((n, k), dtype=result_dtype(logits), device=logits.device)
    for rows in _chunks(n, bytes_per_row=(40 if normalize else 16) * vocab):
        x = logits[rows]
        chosen = _top_ids(x, k)
        w = x.gather(1, chosen).to(values.dtype)
        empty = w == -torch.inf
        if normalize:  # rounded once the difference is taken
            total = x.double().logsumexp(1, keepdim=True)
            w = w - total.masked_fill(total == torch.inf, torch.nan)
        ids[rows] = chosen.int().masked_fill(empty, -1)
        values[rows] = w.masked_fill(empty, -torch.inf)
    return ids, values


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
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code | Terms = REVERSE_KL,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float32 (float64 from float64): times the weight of the row
    n, k = ids.shape
    loss = torch.empty(n, dtype=result_dtype(student), device=student.device)
    g = torch.empty((n, k), dtype=result_dtype(student), device=student.device)
    for rows in _chunks(n, bytes_per_row=100 * k):
        live = live_slots(ids[rows], values[rows], student.shape[1])
        z = student[rows].gather(1, torch.where(live, ids[rows], 0).long())
        weight = None if weights is None else weights[rows]
        w = told(ids[rows], values[rows])
        loss[rows], g[rows] = _weigh(*slots_loss(z, w, live, temperature, divergence), weight)
    return loss, g


def select_loss(
    student: Tensor,  # (N, V_student)
    teacher: Tensor,  # (N, V)
    k: int,
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code | Terms = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K) int32, (N, K)
    ids, values = select(teacher, k)
    loss, g = support_loss(student, ids, values, weights, temperature, divergence)
    if weights is not None:
        ids = torch.where(weights[:, None] == 0, -1, ids)
    return loss, ids, g


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
        columns, value = _merge_duplicates(columns, value)
    empty = columns < 0
    columns, value = columns.masked_fill(empty, 0), value.masked_fill(empty, 0).to(out.dtype)
    # Added, not stored: an empty slot then adds 0 to column 0, and no column receives two other numbers.
    for rows in _chunks(len(out), bytes_per_row=4 * out.shape[1]):  # torch adds 16-bit numbers in a float32 copy
        out[rows].zero_().scatter_add_(1, columns[rows], value[rows])


def tail_logit(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    temperature: float,
) -> Tensor:  # (N,) float64
    """All columns but those at ids as one more logit: temperature * logsumexp(logits / temperature) over them."""
    out = torch.empty(len(ids), dtype=torch.float64, device=logits.device)
    for rows in _chunks(len(ids), bytes_per_row=24 * logits.shape[1]):
        out[rows] = as_logit(*_outside(logits[rows], ids[rows], temperature), temperature)
    return out


def as_logit(
    peak: Tensor,  # (N,) the largest of some logits
    total: Tensor,  # (N,) the sum over them of exp((logit - peak) / temperature)
    temperature: float,
) -> Tensor:  # (N,)
    return peak + temperature * total.log()


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K), none twice in a row
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,) the teacher's `tail_logit`
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code | Terms,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), others (N, 2) float64
    """support_loss with the rest of the vocabulary as one more class, which has a gradient too.

    `others` holds of each row a peak and a factor: at a column outside S the gradient is factor * exp((logit - peak) /
    temperature).
    """
    (n, k), vocab = ids.shape, student.shape[1]
    loss = torch.empty(n, dtype=result_dtype(student), device=student.device)
    g = torch.empty((n, k), dtype=result_dtype(student), device=student.device)
    others = torch.empty((n, 2), dtype=torch.float64, device=student.device)
    for rows in _chunks(n, bytes_per_row=24 * vocab + 100 * k):
        live = live_slots(ids[rows], values[rows], vocab)
        z = student[rows].gather(1, torch.where(live, ids[rows], 0).long())
        peak, total = _outside(student[rows], torch.where(live, ids[rows], -1), temperature)
        weight = None if weights is None else weights[rows]
        loss[rows], row_g, others[rows, 1] = mass_slots_loss(
            z, told(ids[rows], values[rows]), live, peak, total, tail[rows], weight, temperature, divergence, mass
        )
        g[rows], others[rows, 0] = row_g.to(g.dtype), peak
    return loss, g, others


def mass_slots_loss(
    z: Tensor,  # (N, K)
    values: Tensor,  # (N, K) as `told` has them
    live: Tensor,  # (N, K) bool
    peak: Tensor,  # (N,) the largest of the student's logits outside S
    total: Tensor,  # (N,) the sum over them of exp((logit - peak) / temperature)
    tail: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code | Terms,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (N,), g (N, K), factor (N,) float64
    # On the rest as on any slot: where the teacher leaves nothing, there is nothing to compare. p is still that of all.
    compared = (tail != -torch.inf) | (mass != "tail")
    z, w, live = (
        torch.cat((slots, last[:, None]), 1)
        for slots, last in ((z.double(), as_logit(peak, total, temperature)), (values.double(), tail), (live, compared))
    )
    loss, g = _weigh(*slots_loss(z, w, live, temperature, divergence, mass), weights)
    g, of_rest = g[:, :-1].contiguous(), g[:, -1]
    return loss, g, torch.where(of_rest == 0, 0, of_rest / total)


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
    peak = x.amax(1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0, peak)
    return peak.squeeze(1), ((x - peak) / temperature).exp_().sum(1)


def mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    others: Tensor,  # (N, 2)
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    out: Tensor,  # (N, V), overwritten
    temperature: float,
) -> None:
    """out[i] = grad_output[i] * the gradient that mass_loss found: g at the ids, and what `others` says elsewhere."""
    student = out if student is None else student
    n, vocab = out.shape
    columns = torch.where((ids < 0) | (ids >= vocab), vocab, ids).long()
    for rows in _chunks(n, bytes_per_row=32 * vocab):
        scale = grad_output[rows].double()
        peak, factor = others[rows].split(1, 1)
        factor = times(factor, scale)
        dense = torch.zeros((len(scale), vocab + 1), dtype=torch.float64, device=out.device)
        dense[:, :-1] = torch.where(factor == 0, 0, factor * ((student[rows] - peak) / temperature).exp())
        dense.scatter_(1, columns[rows], times(g[rows].double(), scale))
        out[rows] = dense[:, :-1].to(out.dtype)


def _merge_duplicates(
    columns: Tensor,  # (N, K)
    value: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:
    """One slot of each column carries the sum of all, the others are emptied; the order of the sum is fixed."""
    columns, slots = columns.sort(dim=1, stable=True)
    value = value.gather(1, slots)
    distance = 1
    while distance < columns.shape[1]:
        same = columns[:, distance:] == columns[:, :-distance]
        value[:, :-distance] += torch.where(same, value[:, distance:], 0)
        distance *= 2
    repeated = torch.zeros_like(columns, dtype=torch.bool)
    repeated[:, 1:] = columns[:, 1:] == columns[:, :-1]
    return columns.masked_fill(repeated, -1), value


def linear_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_dhidden: bool,
    divergence: Code | Terms = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (N,), g (N, K), dhidden (N, H), or (0, H) if it is not wanted
    """support_loss of the logits cap(logit_scale (hidden @ head.T + bias)), of which only K a row are computed.

    g is the gradient with respect to hidden @ head.T + bias, so that dhidden = sum_j g[:, j] head[ids[:, j]]. All is
    times the weight of the row; float32, and float64 from float64.
    """
    (n, k), (vocab, width), dtype = ids.shape, head.shape, result_dtype(hidden)
    loss = torch.empty(n, dtype=dtype, device=hidden.device)
    g = torch.empty((n, k), dtype=dtype, device=hidden.device)
    dhidden = torch.empty((n if want_dhidden else 0, width), dtype=dtype, device=hidden.device)
    for rows in _chunks(n, bytes_per_row=24 * k * width):
        columns = torch.where(live_slots(ids[rows], values[rows], vocab), ids[rows], 0).long()
        kept = head[columns].double()  # (n, K, H)
        raw = torch.einsum("nkh,nh->nk", kept, hidden[rows].double())
        if bias is not None:
            raw = raw + bias[columns]
        weight = None if weights is None else weights[rows]
        loss[rows], draw = raw_slots_loss(
            raw, ids[rows], values[rows], weight, vocab, temperature, logit_scale, softcap, divergence
        )
        g[rows] = draw.to(dtype)
        if want_dhidden:
            kept = kept.masked_fill((draw == 0)[..., None], 0)
            dhidden[rows] = torch.einsum("nkh,nk->nh", kept, draw).to(dtype)
    return loss, g, dhidden


def raw_slots_loss(
    raw: Tensor,  # (N, K) the products with the head, anything on an empty slot
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    vocab: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    divergence: Code | Terms,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float64: the loss, and its gradient with respect to raw
    z, slope = capped(raw, logit_scale, softcap)
    live, w = live_slots(ids, values, vocab), told(ids, values)
    loss, dz = _weigh(*slots_loss(z, w, live, temperature, divergence), weights)
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
        for rows in _chunks(len(g), bytes_per_row=16 * columns.shape[1] * out.shape[1:].numel()):
            added = terms[rows]
            if factor is not None:
                added = torch.where(live[rows, :, None], added[..., None] * factor[rows, None].to(g.dtype), 0)
            total.index_put_((columns[rows],), added, accumulate=True)  # in a fixed order, on a GPU too
        out.copy_(total)


def times(
    g: Tensor,  # (..., X) the gradient of a row
    grad_output: Tensor,  # (...)
) -> Tensor:  # (..., X)
    """The product, and +0 where a factor is 0 even if the other is not finite: what counts as nothing stays nothing."""
    scale = grad_output[..., None]
    return (g * scale).masked_fill_((g == 0).logical_or_(scale == 0), 0)


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; every other input gives float32 losses and gradients."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def live_slots(ids: Tensor, values: Tensor, vocab: int) -> Tensor:  # (N, K) bool
    return (ids >= 0) & (ids < vocab) & (values != -torch.inf)


def told(ids: Tensor, values: Tensor) -> Tensor:  # (N, K)
    """The teacher's values but for slots without an id: NaN or +inf at an id that the student lacks spoils the row."""
    return values.masked_fill(ids < 0, -torch.inf)


def _weigh(
    loss: Tensor,  # (N,)
    g: Tensor,  # (N, K)
    weight: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return loss, g
    dropped = weight == 0
    return (loss * weight).masked_fill(dropped, 0), (g * weight[:, None]).masked_fill(dropped[:, None], 0)


def _chunks(n: int, bytes_per_row: int) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // bytes_per_row)
    return (slice(start, start + rows) for start in range(0, n, rows))
