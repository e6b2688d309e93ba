"""The loss from hidden states: K rows of the head per row of them, never the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.divergence import RENORMALIZED, encoded, of_named, slots_loss
from topk_rkl.backends.triton.launch import compile_options, float32_halves, pad_k, plan_linear_loss
from topk_rkl.backends.triton.linear_rows import add_rows, multiply_rows
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, row_of
from topk_rkl.objective import Objective


@triton.jit
def _load_slots(
    ids,  # (K,) of one row
    log_probs,  # (K,)
    slot,  # [S]
    k,
    vocab,
):
    """-> column [S] int64, the log-probs [S] float64, live [S]: the slot is in S."""
    column = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int64)
    w = tl.load(log_probs + slot, mask=slot < k, other=float("-inf")).to(tl.float64)
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
    head_row_stride,
    head_column_stride,
    vocab,
    bias,  # (V,) or None
    bias_column_stride,
    ids,  # (N, K)
    log_probs,  # (N, K)
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    scale_high,
    scale_low,
    softcap_high,  # or None
    softcap_low,
    parameters,
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
    log_probs += row * k
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
        column, _, live = _load_slots(ids, log_probs, some, k, vocab)
        raw = multiply_rows(
            hidden, hidden_layout[3], width, head, head_row_stride, head_column_stride, bias, bias_column_stride,
            column, live, SLOTS, BLOCK,
        )  # fmt: skip
        tl.store(g + some, raw, mask=some < k)
    fence()

    # 2. The loss of those logits, and its gradient.
    column, w, live = _load_slots(ids, log_probs, slot, k, vocab)  # [K]
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
    w = of_named(column, w, vocab)
    row_loss, dz = slots_loss(z, w, live, inv_t, parameters, None, FAMILY, RENORMALIZED)
    dz *= weight
    tl.store(loss, (row_loss * weight).to(tl.float32))
    # A slot without gradient has +0, whatever its slope.
    tl.store(g + slot, tl.where(dz == 0.0, 0.0, dz * slope).to(tl.float32), mask=slot < k)

    # 3. The gradient of the hidden state, from the rows of the head again.
    if dhidden is not None:
        fence()
        add_rows(
            g, ids, k, head, head_row_stride, head_column_stride, width, None, dhidden,
            TERMS, SPAN,
        )  # fmt: skip


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
    (n, k), (vocab, width) = ids.shape, head.shape
    if n == 0:
        return
    family, parameters = encoded(objective.divergence)
    plan = plan_linear_loss(k, width, head.element_size(), family)
    with on_device_of(hidden):
        linear_loss_kernel[(n,)](
            hidden, layout_of(hidden), width, head, *head.stride(), vocab, bias, 0 if bias is None else bias.stride(0),
            ids, log_probs, weights, *float32_halves(1.0 / objective.temperature),
            *float32_halves(objective.logit_scale),
            *((None, None) if objective.softcap is None else float32_halves(objective.softcap)), parameters,
            loss, g, dhidden, k,
            K_PAD=pad_k(k), SLOTS=plan.slots, BLOCK=plan.block, TERMS=plan.terms, SPAN=plan.span, FAMILY=family,
            num_warps=plan.num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
