"""The rows of the head that the slots of one row name: their products with a hidden state, and their weighted sum.

Kernels that share these loops and a plan of `plan_linear_loss` get the same bits.
"""

import triton
import triton.language as tl

from topk_rkl.backends.triton.sums import sum_rows


@triton.jit
def multiply_rows(
    hidden,  # (H,) of one row
    hidden_column_stride,
    width,  # H
    head,  # (V, H)
    head_row_stride,
    head_column_stride,
    bias,  # (V,) or None
    bias_column_stride,
    column,  # [SLOTS] int64: the rows of the head
    live,  # [SLOTS]: the slot has one
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> the products [SLOTS] float32, 0 where there is no row."""
    products = tl.zeros([SLOTS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        h = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = h < width
        h = h.to(tl.int64)
        x = tl.load(hidden + h * hidden_column_stride, mask=inside, other=0.0).to(tl.float32)
        at = column[:, None] * head_row_stride + h[None, :] * head_column_stride  # [SLOTS, BLOCK]
        y = tl.load(head + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += x[None, :] * y
    raw = sum_rows(products)  # [SLOTS]
    if bias is not None:
        raw += tl.load(bias + column * bias_column_stride, mask=live, other=0.0).to(tl.float32)
    return raw


@triton.jit
def add_rows(
    g,  # (K,) of one row
    ids,  # (K,)
    k,
    head,  # (V, H)
    head_row_stride,
    head_column_stride,
    width,  # H
    vocab,  # or None: g is 0 at ids outside
    out,  # (H,)
    TERMS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Writes the sum of g times the rows of the head: the last first, which L2 may still hold of `multiply_rows`."""
    for start in range(0, width, SPAN):
        h = start + tl.arange(0, SPAN)  # [SPAN]
        total = tl.zeros([SPAN], tl.float32)
        for done in range(0, k, TERMS):
            terms = tl.zeros([SPAN], tl.float32)
            for i in tl.static_range(TERMS):
                j = k - 1 - done - i
                factor = tl.load(g + j, mask=j >= 0, other=0.0)
                chosen = tl.load(ids + j, mask=j >= 0, other=0).to(tl.int64)
                if vocab is not None:
                    factor = tl.where((chosen >= 0) & (chosen < vocab), factor, 0.0)
                at = chosen * head_row_stride + h.to(tl.int64) * head_column_stride  # [SPAN]
                columns = tl.where(factor == 0.0, 0, width)  # of a row without gradient, none
                y = tl.load(head + at, mask=h < columns, other=0.0)
                terms += factor * y.to(tl.float32)
            total += terms
        tl.store(out + h, total, mask=h < width)
