"""The loss and its gradient on K slots: gather K student logits, compare, write K numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.divergence import RENORMALIZED, encoded, slots_loss, told
from topk_rkl.backends.triton.launch import compile_options, float32_halves, pad_k, slot_warps
from topk_rkl.backends.triton.memory import layout_of, on_device_of, row_of
from topk_rkl.divergence import REVERSE_KL, Code


@triton.jit
def store_loss_row(
    student,  # (V,) one row
    student_step,
    student_vocab,
    column,  # [K] ids, negative where the slot is empty
    w,  # [K] the teacher's logits or log-probs there
    weight,
    inv_t,
    numbers,
    loss,  # (1,)
    g,  # (K,)
    slot,  # [K]
    k,
    FAMILY: tl.constexpr,
):
    live = (column >= 0) & (column < student_vocab) & (w != float("-inf"))  # [K]
    z = tl.load(student + column * student_step, mask=live, other=float("-inf"))  # [K]
    w = told(column, w, student_vocab)
    row_loss, row_g = slots_loss(z, w, live, inv_t, numbers, None, FAMILY, RENORMALIZED)
    tl.store(loss, (row_loss * weight).to(tl.float32))
    tl.store(g + slot, (row_g * weight).to(tl.float32), mask=slot < k)


@triton.jit
def support_loss_kernel(
    student,  # (N, V)
    student_layout,
    student_vocab,
    ids,  # (N, K)
    values,  # (N, K)
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    numbers,
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
    values += row * k
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
    w = tl.load(values + slot, mask=slot < k, other=float("-inf")).to(tl.float64)  # [K]
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    store_loss_row(
        student, student_layout[3], student_vocab, column, w, weight, inv_t, numbers, loss, g, slot, k, FAMILY
    )


def support_loss(
    student: Tensor,  # (N, V), or in slabs
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float32
    n, k = ids.shape
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    g = torch.empty((n, k), dtype=torch.float32, device=student.device)
    if n == 0:
        return loss, g
    form, numbers = encoded(divergence)
    with on_device_of(student):
        support_loss_kernel[(n,)](
            student, layout_of(student), student.shape[-1],
            ids, values, weights, *float32_halves(1.0 / temperature), numbers,
            loss, g, k, K_PAD=pad_k(k), FAMILY=form, num_warps=slot_warps(k, form),
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
    return loss, g
