"""The dense gradient from K numbers per row: zeros and values in one pass over the output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import compile_options, pad_k, plan_scatter, slot_warps
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, product, row_of
from topk_rkl.divergence import REVERSE


@triton.jit
def scatter_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    grad_output,  # (N,)
    out,  # (N, V)
    layout,
    vocab,
    k,
    blocks,  # of a row
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    out = row_of(out, layout, row)
    g += row.to(tl.int64) * k
    ids += row.to(tl.int64) * k
    slot = tl.arange(0, K_PAD)  # [K]
    column = tl.load(ids + slot, mask=slot < k, other=-1)  # [K]
    value = tl.load(g + slot, mask=slot < k, other=0.0)  # [K]
    scale = tl.load(grad_output + row)
    first = tl.program_id(0) % blocks * BLOCK
    zeroed = first + tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(out + zeroed.to(tl.int64) * layout[3], tl.zeros([BLOCK], out.dtype.element_ty), mask=zeroed < vocab)
    mine = (column >= first) & (column < tl.minimum(first + BLOCK, vocab))  # [K]
    fence()
    value = product(value, scale, out.dtype.element_ty)
    tl.store(out + column.to(tl.int64) * layout[3], value, mask=mine)


@triton.jit
def merge_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    sums,  # (N, K)
    firsts,  # (N, K), of the dtype of ids
    k,
    K_PAD: tl.constexpr,
):
    """The sum of g over the slots of an id, in their order, in the first of them, and -1 as the id of the others."""
    row = tl.program_id(0).to(tl.int64) * k
    slot = tl.arange(0, K_PAD)  # [K]
    column = tl.load(ids + row + slot, mask=slot < k, other=-1)  # [K]
    value = tl.zeros([K_PAD], tl.float32)
    first = slot < k
    for other in range(k):
        same = column == tl.load(ids + row + other)
        value += tl.where(same, tl.load(g + row + other), 0.0)
        first = first & ((slot <= other) | ~same)
    tl.store(sums + row + slot, value, mask=slot < k)
    tl.store(firsts + row + slot, tl.where(first, column, -1), mask=slot < k)


def merged(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:  # (N, K), (N, K)
    """What `merge_kernel` writes, once per row: for each block of zeros it took a third of their time."""
    (n, k), sums, firsts = ids.shape, torch.empty_like(g), torch.empty_like(ids)
    merge_kernel[(n,)](
        g, ids, sums, firsts, k, K_PAD=pad_k(k), num_warps=slot_warps(k, REVERSE),
        **compile_options(hip=torch.version.hip is not None),
    )  # fmt: skip
    return sums, firsts


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
    block, num_warps = plan_scatter(vocab)
    blocks = triton.cdiv(vocab, block)
    with on_device_of(out):
        if not unique:
            g, ids = merged(g, ids)
        scatter_kernel[(n * blocks,)](  # neighbours write neighbouring columns, which DRAM takes a twelfth faster
            g, ids, grad_output, out, layout_of(out), vocab, k, blocks,
            K_PAD=pad_k(k), BLOCK=block, num_warps=num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
