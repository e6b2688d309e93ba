"""The dense gradient from K numbers per row: zeros and values in one pass over the output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import compile_options, pad_k, plan_scatter
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, product, row_of


@triton.jit
def scatter_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    grad_output,  # (N,)
    out,  # (N, V)
    layout,
    vocab,
    k,
    spans,  # of a row
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    UNIQUE: tl.constexpr,
):
    row = tl.program_id(0) // spans
    out = row_of(out, layout, row)
    g += row.to(tl.int64) * k
    ids += row.to(tl.int64) * k
    slot = tl.arange(0, K_PAD)  # [K]
    column = tl.load(ids + slot, mask=slot < k, other=-1)  # [K]
    value = tl.load(g + slot, mask=slot < k, other=0.0)  # [K]
    scale = tl.load(grad_output + row)
    first = tl.program_id(0) % spans * SPAN
    last = tl.minimum(first + SPAN, vocab)
    for start in range(first, last, BLOCK):
        zeroed = start + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(out + zeroed.to(tl.int64) * layout[3], tl.zeros([BLOCK], out.dtype.element_ty), mask=zeroed < last)

    mine = (column >= first) & (column < last)  # [K]
    if not UNIQUE:  # the first slot of an id stores the sum of all of them
        value = tl.zeros([K_PAD], tl.float32)
        for other in range(k):
            same = column == tl.load(ids + other)
            value += tl.where(same, tl.load(g + other), 0.0)
            mine = mine & ((slot <= other) | ~same)
    fence()
    value = product(value, scale, out.dtype.element_ty)
    tl.store(out + column.to(tl.int64) * layout[3], value, mask=mine)


def scatter(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    grad_output: Tensor,  # (N,)
    out: Tensor,  # (N, V), overwritten
    unique: bool,
) -> None:
    (n, k), vocab = ids.shape, out.shape[-1]
    if n == 0:
        return
    plan = plan_scatter(vocab, unique)
    spans = triton.cdiv(vocab, plan.span)
    with on_device_of(out):
        scatter_kernel[(n * spans,)](  # neighbours write neighbouring columns, which DRAM takes a twelfth faster
            g, ids, grad_output, out, layout_of(out), vocab, k, spans,
            K_PAD=pad_k(k), BLOCK=plan.block, SPAN=plan.span, UNIQUE=unique, num_warps=plan.num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
