"""The loss and its gradient on K slots: gather K student logits, compare, write K numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.divergence import RENORMALIZED, encoded, of_named, slots_loss
from topk_rkl.backends.triton.launch import compile_options, float32_halves, pad_k, slot_warps
from topk_rkl.backends.triton.memory import layout_of, on_device_of, row_of
from topk_rkl.objective import Objective


@triton.jit
def store_loss_row(
    student,  # (V,) one row
    student_column_stride,
    student_vocab,
    column,  # [K] ids, negative where the slot is empty
    w,  # [K] the log-probs there
    weight,
    inv_t,
    parameters,
    loss,  # (1,)
    g,  # (K,)
    slot,  # [K]
    k,
    FAMILY: tl.constexpr,
):
    live = (column >= 0) & (column < student_vocab) & (w != float("-inf"))  # [K]
    z = tl.load(student + column * student_column_stride, mask=live, other=float("-inf"))  # [K]
    w = of_named(column, w, student_vocab)
    row_loss, row_g = slots_loss(z, w, live, inv_t, parameters, None, FAMILY, RENORMALIZED)
    tl.store(loss, (row_loss * weight).to(tl.float32))
    tl.store(g + slot, (row_g * weight).to(tl.float32), mask=slot < k)


@triton.jit
def support_loss_kernel(
    student,  # (N, V)
    student_layout,
    student_vocab,
    ids,  # (N, K)
    log_probs,  # (N, K)
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    parameters,
    loss,  # (N,)
    g,  # (N, K)
    k,
    K_PAD: tl.constexpr,
    FAMILY: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.arange(0, K_PAD)  # [K]
    student = row_of(student, student_layout, row)
    row = row.to(tl.int64)
    ids += row * k
    log_probs += row * k
    g += row * k
    loss += row
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row)
        if weight == 0.0:
            tl.store(loss, 0.0)
            tl.store(g + slot, 0.0, mask=slot < k)
            return
    column = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int64)  # [K]
    w = tl.load(log_probs + slot, mask=slot < k, other=float("-inf")).to(tl.float64)  # [K]
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    store_loss_row(
        student, student_layout[3], student_vocab, column, w, weight, inv_t, parameters, loss, g, slot, k, FAMILY
    )


def support_loss(
    student: Tensor,  # (N, V), or in slabs
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
) -> None:
    n, k = ids.shape
    if n == 0:
        return
    family, parameters = encoded(objective.divergence)
    with on_device_of(student):
        support_loss_kernel[(n,)](
            student, layout_of(student), student.shape[-1],
            ids, log_probs, weights, *float32_halves(1.0 / objective.temperature), parameters,
            loss, g, k, K_PAD=pad_k(k), FAMILY=family, num_warps=slot_warps(k, family),
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
