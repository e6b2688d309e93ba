"""The loss from hidden states: K rows of the head a row of them, never the logits; and the gradient of the head.

linear_weight_grad sorts the pairs (row, slot) by id, so that each row of the head owns a segment of them, adds up
a segment in the order of its pairs and writes the row once, zeros included: no atomics, the same bits every time.
A hot id may own a pair of every row. So the aligned windows of WINDOW pairs that lie within one segment are summed
first, side by side, and the program of a segment adds at most WINDOW - 1 pairs at each end and the sums between them.
Which windows those are only the device knows; the host makes room for all of them, and takes a slice of H at a time so
that this is at most SCRATCH_BYTES, or twice the size of g if that is more: a window, for its 256 numbers of g, has one
block of up to 512 sums at least.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.divergence import RENORMALIZED, encoded, slots_loss, told
from topk_rkl.backends.triton.launch import (
    SCRATCH_BYTES,
    compile_options,
    float32_halves,
    pad_k,
    plan_linear_loss,
    plan_linear_weight_grad,
)
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, rounded, row_of
from topk_rkl.divergence import REVERSE_KL, Code

WINDOW = 256
MAX_PAIRS = 2**31 - 1


@triton.jit
def _load_slots(
    ids,  # (K,) of one row
    values,  # (K,)
    slot,  # [S]
    k,
    vocab,
):
    """-> column [S] int64, the teacher's values [S] float64, live [S]: the slot is in S."""
    column = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int64)
    w = tl.load(values + slot, mask=slot < k, other=float("-inf")).to(tl.float64)
    return column, w, (column >= 0) & (column < vocab) & (w != float("-inf"))


@triton.jit
def _capped(
    z,  # [K] float64: the product with the head, scaled
    softcap,  # float64
):
    """softcap * tanh(z / softcap) and its derivative [K], from exp alone: the interpreter has no libdevice."""
    y = z / softcap
    small = tl.exp(-2.0 * tl.abs(y))  # at most 1, so nothing overflows
    bent = (1.0 - small) / (1.0 + small)
    # 1 - small cancels where y is near 0; there the series, whose next term is below 1e-17 of the first.
    square = y * y
    series = y * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    bent = tl.where(tl.abs(y) < 0.01, series, tl.where(y < 0.0, -bent, bent))
    return softcap * bent, 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def linear_loss_kernel(
    hidden,  # (N, H)
    hidden_layout,
    width,  # H
    head,  # (V, H)
    head_stride,
    head_step,
    vocab,
    bias,  # (V,) or None
    bias_step,
    ids,  # (N, K)
    values,  # (N, K)
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    scale_high,
    scale_low,
    softcap_high,  # or None
    softcap_low,
    numbers,
    loss,  # (N,)
    g,  # (N, K)
    dhidden,  # (N, H) or None
    k,
    K_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    SPAN: tl.constexpr,
    FAMILY: tl.constexpr,
):
    hidden = row_of(hidden, hidden_layout, tl.program_id(0))
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_PAD)  # [K]
    ids += row * k
    values += row * k
    loss += row
    g += row * k
    if dhidden is not None:
        dhidden += row * width
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row)
        if weight == 0.0:
            tl.store(loss, 0.0)
            tl.store(g + slot, 0.0, mask=slot < k)
            if dhidden is not None:
                for start in range(0, width, SPAN):
                    h = start + tl.arange(0, SPAN)  # [SPAN]
                    tl.store(dhidden + h, 0.0, mask=h < width)
            return

    # 1. The products with K rows of the head. Until the end of 2 the row of g holds them.
    for first in range(0, k, SLOTS):
        some = first + tl.arange(0, SLOTS)  # [SLOTS]
        column, _, live = _load_slots(ids, values, some, k, vocab)
        products = tl.zeros([SLOTS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            h = start + tl.arange(0, BLOCK)  # [BLOCK]
            inside = h < width
            h = h.to(tl.int64)
            x = tl.load(hidden + h * hidden_layout[3], mask=inside, other=0.0).to(tl.float32)
            at = column[:, None] * head_stride + h[None, :] * head_step  # [SLOTS, BLOCK]
            y = tl.load(head + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
            products += x[None, :] * y
        raw = tl.sum(products, 1)  # [SLOTS]
        if bias is not None:
            raw += tl.load(bias + column * bias_step, mask=live, other=0.0).to(tl.float32)
        tl.store(g + some, raw, mask=some < k)
    fence()

    # 2. The loss of those logits, and its gradient.
    column, w, live = _load_slots(ids, values, slot, k, vocab)  # [K]
    z = tl.load(g + slot, mask=slot < k, other=0.0).to(tl.float64)  # [K]
    fence()  # all have read g before one writes it
    scale = tl.cast(scale_high, tl.float64) + tl.cast(scale_low, tl.float64)
    z *= scale
    slope = scale
    if softcap_high is not None:
        z, slope = _capped(z, tl.cast(softcap_high, tl.float64) + tl.cast(softcap_low, tl.float64))
        slope *= scale
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    z = tl.where(live, z, float("-inf"))
    w = told(column, w, vocab)
    row_loss, dz = slots_loss(z, w, live, inv_t, numbers, None, FAMILY, RENORMALIZED)
    dz *= weight
    tl.store(loss, (row_loss * weight).to(tl.float32))
    # A slot without gradient has +0, whatever its slope.
    tl.store(g + slot, tl.where(dz == 0.0, 0.0, dz * slope).to(tl.float32), mask=slot < k)

    # 3. The gradient of the hidden state: the rows of the head again, the last first, since L2 still holds those.
    if dhidden is not None:
        fence()
        for start in range(0, width, SPAN):
            h = start + tl.arange(0, SPAN)  # [SPAN]
            total = tl.zeros([SPAN], tl.float32)
            for done in range(0, k, TERMS):
                terms = tl.zeros([SPAN], tl.float32)
                for i in tl.static_range(TERMS):
                    j = k - 1 - done - i
                    factor = tl.load(g + j, mask=j >= 0, other=0.0)
                    chosen = tl.load(ids + j, mask=j >= 0, other=0).to(tl.int64)
                    at = chosen * head_stride + h.to(tl.int64) * head_step  # [SPAN]
                    columns = tl.where(factor == 0.0, 0, width)  # of a row without gradient, none
                    y = tl.load(head + at, mask=h < columns, other=0.0)
                    terms += factor * y.to(tl.float32)
                total += terms
            tl.store(dhidden + h, total, mask=h < width)


@triton.jit
def _add_pairs(
    total,  # [PAIRS, BLOCK] float32
    rows,  # (pairs,) int32: of hidden
    terms,  # (pairs,) float32: their factors
    start,
    end,
    hidden,  # (N, H) at the first column of the block
    hidden_stride,
    offset,  # [BLOCK] int64
    inside,  # [BLOCK] bool
    PAIRS: tl.constexpr,
):
    """total + the pairs from start to end."""
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)  # [PAIRS]
        row = tl.load(rows + pair, mask=pair < end, other=0).to(tl.int64)
        term = tl.load(terms + pair, mask=pair < end, other=0.0)
        at = row[:, None] * hidden_stride + offset[None, :]  # [PAIRS, BLOCK]
        x = tl.load(hidden + at, mask=(pair < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += term[:, None] * x
    return total


@triton.jit
def window_sums_kernel(
    sorted_ids,  # (pairs,) int32
    rows,  # (pairs,) int32
    terms,  # (pairs,) float32
    hidden,  # (N, H)
    hidden_stride,
    hidden_step,
    width,  # H
    vocab,
    sums,  # (windows, H) float32, written where the window is of one id
    WINDOW: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = tl.program_id(0)
    start = window * WINDOW
    column = tl.load(sorted_ids + start)
    if column == tl.load(sorted_ids + start + WINDOW - 1) and column < vocab:
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        total = tl.zeros([PAIRS, BLOCK], tl.float32)
        offset = h.to(tl.int64) * hidden_step
        total = _add_pairs(
            total, rows, terms, start, start + WINDOW, hidden, hidden_stride, offset, h < width, PAIRS
        )  # fmt: skip
        tl.store(sums + window.to(tl.int64) * width + h, tl.sum(total, 0), mask=h < width)


@triton.jit
def linear_weight_grad_kernel(
    bounds,  # (V + 1,) int32: where the segment of each id starts
    rows,  # (pairs,) int32
    terms,  # (pairs,) float32
    hidden,  # (N, H)
    hidden_stride,
    hidden_step,
    width,  # H
    sums,  # (windows, H) float32
    dhead,  # (V, H)
    dhead_stride,
    dhead_step,
    WINDOW: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + column)
    end = tl.load(bounds + column + 1)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = h < width
    offset = h.to(tl.int64) * hidden_step
    first_window = (start + WINDOW - 1) // WINDOW
    last_window = tl.maximum(end // WINDOW, first_window)  # those between are of this id alone
    total = tl.zeros([PAIRS, BLOCK], tl.float32)
    head_end = tl.minimum(first_window * WINDOW, end)
    total = _add_pairs(total, rows, terms, start, head_end, hidden, hidden_stride, offset, inside, PAIRS)
    for first in range(first_window, last_window, PAIRS):
        window = first + tl.arange(0, PAIRS)  # [PAIRS]
        at = window.to(tl.int64)[:, None] * width + h[None, :]  # [PAIRS, BLOCK]
        total += tl.load(sums + at, mask=(window < last_window)[:, None] & inside[None, :], other=0.0)
    total = _add_pairs(total, rows, terms, last_window * WINDOW, end, hidden, hidden_stride, offset, inside, PAIRS)
    out = rounded(tl.sum(total, 0), dhead.dtype.element_ty)
    tl.store(dhead + column * dhead_stride + h.to(tl.int64) * dhead_step, out, mask=inside)


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
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) or (0, H) float32
    (n, k), (vocab, width) = ids.shape, head.shape
    loss = torch.empty(n, dtype=torch.float32, device=hidden.device)
    g = torch.empty((n, k), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty((n if want_dhidden else 0, width), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return loss, g, dhidden
    form, numbers = encoded(divergence)
    plan = plan_linear_loss(k, width, head.element_size(), form)
    with on_device_of(hidden):
        linear_loss_kernel[(n,)](
            hidden, layout_of(hidden), width, head, *head.stride(), vocab, bias, 0 if bias is None else bias.stride(0),
            ids, values, weights, *float32_halves(1.0 / temperature), *float32_halves(logit_scale),
            *((None, None) if softcap is None else float32_halves(softcap)), numbers,
            loss, g, dhidden if want_dhidden else None, k,
            K_PAD=pad_k(k), SLOTS=plan.slots, BLOCK=plan.block, TERMS=plan.terms, SPAN=plan.span, FAMILY=form,
            num_warps=plan.num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
    return loss, g, dhidden


def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    if ids.numel() > MAX_PAIRS:
        raise ValueError(f"ids has {ids.numel()} slots; torch.sort takes at most {MAX_PAIRS}, pass fewer rows")
    outs = [(dhead, hidden)] if dhead is not None else []
    if dbias is not None:  # what the head's gradient would be from hidden states of one column of ones
        outs.append((dbias[:, None], hidden.new_ones(()).expand(len(g), 1)))
    vocab = len(outs[0][0])
    keys = torch.where((ids >= 0) & (ids < vocab) & (g != 0), ids, vocab).flatten().int()
    sorted_ids, pairs = keys.sort(stable=True)
    bounds = torch.searchsorted(sorted_ids, torch.arange(vocab + 1, dtype=torch.int32, device=g.device), out_int32=True)
    rows, terms = (pairs // g.shape[1]).int(), g.flatten().gather(0, pairs)
    for out, factor in outs:
        _sum_segments(sorted_ids, bounds, rows, terms, factor, out)


def _sum_segments(
    sorted_ids: Tensor,  # (pairs,)
    bounds: Tensor,  # (V + 1,)
    rows: Tensor,  # (pairs,)
    terms: Tensor,  # (pairs,)
    hidden: Tensor,  # (N, H)
    out: Tensor,  # (V, H), overwritten
) -> None:
    (vocab, width), windows = out.shape, len(rows) // WINDOW
    plan = plan_linear_weight_grad(width)
    step = max(1, SCRATCH_BYTES // (4 * max(1, windows) * plan.block)) * plan.block
    sums = torch.empty((windows, min(step, width)), dtype=torch.float32, device=out.device)
    sizes = {"WINDOW": WINDOW, "PAIRS": plan.pairs, "BLOCK": plan.block, "num_warps": plan.num_warps}
    options = compile_options(hip=torch.version.hip is not None)
    with on_device_of(out):
        for first in range(0, width, step):
            x, y = hidden[:, first : first + step], out[:, first : first + step]
            # The column block is the slow index of the grid, so that one block of all hidden states stays in L2.
            blocks = triton.cdiv(y.shape[1], plan.block)
            if windows:
                window_sums_kernel[(windows, blocks)](
                    sorted_ids, rows, terms, x, *x.stride(), y.shape[1], vocab, sums, **sizes, **options
                )  # fmt: skip
            linear_weight_grad_kernel[(vocab, blocks)](
                bounds, rows, terms, x, *x.stride(), y.shape[1], sums, y, *y.stride(), **sizes, **options
            )  # fmt: skip
