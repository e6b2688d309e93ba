"""The products with K rows of the head per hidden state, and the gradient of that state: `linear_loss` in two halves.

A head that several ranks share needs them apart, since a row of the loss needs the products of all ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import compile_options, plan_linear_loss
from topk_rkl.backends.triton.linear_rows import add_rows, multiply_rows
from topk_rkl.backends.triton.memory import layout_of, on_device_of, row_of


@triton.jit
def linear_logits_kernel(
    hidden,  # (N, H)
    hidden_layout,
    width,  # H
    head,  # (V, H)
    head_row_stride,
    head_column_stride,
    vocab,
    bias,  # (V,) or None
    bias_column_stride,
    ids,  # (N, K)
    out,  # (N, K)
    k,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    hidden = row_of(hidden, hidden_layout, tl.program_id(0))
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, k, SLOTS):
        slot = first + tl.arange(0, SLOTS)  # [SLOTS]
        column = tl.load(ids + row * k + slot, mask=slot < k, other=-1).to(tl.int64)
        live = (column >= 0) & (column < vocab)
        raw = multiply_rows(
            hidden, hidden_layout[3], width, head, head_row_stride, head_column_stride, bias, bias_column_stride,
            column, live, SLOTS, BLOCK,
        )  # fmt: skip
        # A hidden state that is not finite makes NaN of the zeros that stand in for a row.
        tl.store(out + row * k + slot, tl.where(live, raw, 0.0), mask=slot < k)


def linear_logits(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    out: Tensor,  # (N, K), written
) -> None:
    (n, k), (vocab, width) = ids.shape, head.shape
    if n == 0:
        return
    plan = plan_linear_loss(k, width, head.element_size())
    with on_device_of(hidden):
        linear_logits_kernel[(n,)](
            hidden, layout_of(hidden), width, head, *head.stride(), vocab, bias, 0 if bias is None else bias.stride(0),
            ids, out, k,
            SLOTS=plan.slots, BLOCK=plan.block,
            num_warps=plan.num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip


@triton.jit
def linear_hidden_grad_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    head,  # (V, H)
    head_row_stride,
    head_column_stride,
    vocab,
    width,  # H
    out,  # (N, H)
    k,
    TERMS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    add_rows(
        g + row * k, ids + row * k, k, head, head_row_stride, head_column_stride, width, vocab, out + row * width,
        TERMS, SPAN,
    )  # fmt: skip


def linear_hidden_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    head: Tensor,  # (V, H)
    out: Tensor,  # (N, H), written
) -> None:
    (n, k), (vocab, width) = ids.shape, head.shape
    if n == 0:
        return
    plan = plan_linear_loss(k, width, head.element_size())
    with on_device_of(head):
        linear_hidden_grad_kernel[(n,)](
            g, ids, head, *head.stride(), vocab, width, out, k,
            TERMS=plan.terms, SPAN=plan.span,
            num_warps=plan.num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
