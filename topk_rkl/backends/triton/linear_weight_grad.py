"""The gradient of the head from that of K logits per row.

The pairs (row, slot) are sorted by id, so that each row of the head owns a segment of them. A segment is added up in
the order of its pairs and its row is written once, zeros included: no atomics, the same bits every time.

A hot id may own a pair of every row. The aligned windows of WINDOW pairs within one segment are therefore summed first,
side by side. The program of a segment adds the sums, and at most WINDOW - 1 pairs at each end. Only the device knows
which windows those are, so the host makes room for all. It takes a slice of H at a time. The sums take SCRATCH_BYTES at
most, or twice the size of g if that is more: a window of 256 numbers of g has at least one block of 512 sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import SCRATCH_BYTES, compile_options, plan_linear_weight_grad
from topk_rkl.backends.triton.memory import on_device_of, rounded

WINDOW = 256
MAX_PAIRS = 2**31 - 1


@triton.jit
def _add_pairs(
    total,  # [BLOCK] float32
    rows,  # (pairs,) int32: of hidden
    terms,  # (pairs,) float32: their factors
    start,
    end,
    hidden,  # (N, H) at the first column of the block
    hidden_row_stride,
    offset,  # [BLOCK] int64
    inside,  # [BLOCK] bool
):
    """total + the pairs from start to end. Most ids have few: several at a time would read as many in vain."""
    for pair in range(start, end):
        row = tl.load(rows + pair).to(tl.int64)
        x = tl.load(hidden + row * hidden_row_stride + offset, mask=inside, other=0.0)
        total += tl.load(terms + pair) * x.to(tl.float32)
    return total


@triton.jit
def window_sums_kernel(
    sorted_ids,  # (pairs,) int32
    rows,  # (pairs,) int32
    terms,  # (pairs,) float32
    hidden,  # (N, H)
    hidden_row_stride,
    hidden_column_stride,
    width,  # H
    vocab,
    sums,  # (windows, H) float32, written where the window is of one id
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = tl.program_id(0)
    start = window * WINDOW
    column = tl.load(sorted_ids + start)
    if column == tl.load(sorted_ids + start + WINDOW - 1) and column < vocab:
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        total = tl.zeros([BLOCK], tl.float32)
        offset = h.to(tl.int64) * hidden_column_stride
        total = _add_pairs(total, rows, terms, start, start + WINDOW, hidden, hidden_row_stride, offset, h < width)
        tl.store(sums + window.to(tl.int64) * width + h, total, mask=h < width)


@triton.jit
def linear_weight_grad_kernel(
    bounds,  # (V + 1,) int32: where the segment of each id starts
    rows,  # (pairs,) int32
    terms,  # (pairs,) float32
    hidden,  # (N, H)
    hidden_row_stride,
    hidden_column_stride,
    width,  # H
    sums,  # (windows, H) float32
    dhead,  # (V, H)
    dhead_row_stride,
    dhead_column_stride,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + column)
    end = tl.load(bounds + column + 1)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = h < width
    offset = h.to(tl.int64) * hidden_column_stride
    first_window = (start + WINDOW - 1) // WINDOW
    last_window = tl.maximum(end // WINDOW, first_window)  # those between are of this id alone
    total = tl.zeros([BLOCK], tl.float32)
    first_end = tl.minimum(first_window * WINDOW, end)
    total = _add_pairs(total, rows, terms, start, first_end, hidden, hidden_row_stride, offset, inside)
    at = sums + first_window.to(tl.int64) * width + h  # [BLOCK]
    for _ in range(first_window, last_window):
        total += tl.load(at, mask=inside, other=0.0)
        at += width
    total = _add_pairs(total, rows, terms, last_window * WINDOW, end, hidden, hidden_row_stride, offset, inside)
    out = rounded(total, dhead.dtype.element_ty)
    at = dhead + column * dhead_row_stride + h.to(tl.int64) * dhead_column_stride
    tl.store(at, out, mask=inside, eviction_policy="evict_first")  # the hidden states are read again


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
    span = max(1, SCRATCH_BYTES // (4 * max(1, windows) * plan.block)) * plan.block
    sums = torch.empty((windows, min(span, width)), dtype=torch.float32, device=out.device)
    sizes = {"WINDOW": WINDOW, "BLOCK": plan.block, "num_warps": plan.num_warps}
    options = compile_options(hip=torch.version.hip is not None)
    with on_device_of(out):
        for first in range(0, width, span):
            x, y = hidden[:, first : first + span], out[:, first : first + span]
            # The column block is the slow index of the grid, so that one block of all hidden states stays in L2.
            blocks = triton.cdiv(y.shape[1], plan.block)
            if windows:
                window_sums_kernel[(windows, blocks)](
                    sorted_ids, rows, terms, x, *x.stride(), y.shape[1], vocab, sums, **sizes, **options
                )  # fmt: skip
            linear_weight_grad_kernel[(vocab, blocks)](
                bounds, rows, terms, x, *x.stride(), y.shape[1], sums, y, *y.stride(), **sizes, **options
            )  # fmt: skip
