"""Sums in one order, whatever the strides and the alignment of what was loaded.

Triton lays a block out over threads as its loads are best served, and `tl.sum` adds in the order of that layout. A sum
of two numbers has the same bits either way round, so a tree of them has the same bits in every layout.
"""

import triton
import triton.language as tl

DEEPEST = tl.constexpr(10)  # levels, of 1,024 numbers


@triton.jit
def sum_rows(
    x,  # [R, C]
):
    """-> [R]. Neighbours first: a thread has them, then a warp."""
    for _ in tl.static_range(DEEPEST):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), 2)
    return tl.reshape(x, [x.shape[0]])
