"""The loss and its gradient on K slots: gather K student logits, compare, write K numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.launch import compile_options, float32_halves, on_device_of, pad_k
from topk_rkl.divergence import REVERSE_KL, Code


@triton.jit
def reverse_kl_slots(
    z,  # [K] the student's logits, -inf where the slot is empty
    w,  # [K] the teacher's, likewise
    live,  # [K] bool: the slot is in S
    inv_t,  # float64: 1 / temperature
):
    """divergence.reverse_kl, line by line -> loss (float64), gradient [K] (float64)."""
    z = z.to(tl.float64)
    w = w.to(tl.float64)
    z_max = tl.max(z, 0)
    w_max = tl.max(w, 0)
    a = z - tl.where(z_max == float("-inf"), 0.0, z_max)  # [K]
    b = w - tl.where(w_max == float("-inf"), 0.0, w_max)  # [K]
    p = tl.exp(a * inv_t)  # [K]
    p_sum = tl.sum(p, 0)
    p_sum = tl.where(p_sum == 0.0, 1.0, p_sum)
    q_sum = tl.sum(tl.exp(b * inv_t), 0)
    q_sum = tl.where(q_sum == 0.0, 1.0, q_sum)
    p = p / p_sum
    ratio = tl.where(p == 0.0, 0.0, a - b) * inv_t - (tl.log(p_sum) - tl.log(q_sum))  # [K]
    loss = tl.sum(p * ratio, 0)
    return loss, tl.where(live, p * (ratio - loss) * inv_t, 0.0)


@triton.jit
def store_loss_row(
    student,  # (V,) one row
    student_step,
    student_vocab,
    column,  # [K] ids, negative where the slot is empty
    w,  # [K] the teacher's logits or log-probs there
    weight,
    inv_t,
    loss,  # (1,)
    g,  # (K,)
    slot,  # [K]
    k,
):
    live = (column >= 0) & (column < student_vocab) & (w != float("-inf"))  # [K]
    z = tl.load(student + column * student_step, mask=live, other=float("-inf"))  # [K]
    row_loss, row_g = reverse_kl_slots(z, tl.where(live, w, float("-inf")), live, inv_t)
    tl.store(loss, (row_loss * weight).to(tl.float32))
    tl.store(g + slot, (row_g * weight).to(tl.float32), mask=slot < k)


@triton.jit
def support_loss_kernel(
    student,  # (N, V)
    student_stride,
    student_step,
    student_vocab,
    ids,  # (N, K)
    values,  # (N, K)
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    loss,  # (N,)
    g,  # (N, K)
    k,
    K_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_PAD)  # [K]
    student += row * student_stride
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
    w = tl.load(values + slot, mask=slot < k, other=float("-inf"))  # [K]
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    store_loss_row(student, student_step, student_vocab, column, w, weight, inv_t, loss, g, slot, k)


def support_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K) float32
    assert tuple(divergence) == REVERSE_KL
    n, k = ids.shape
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    g = torch.empty((n, k), dtype=torch.float32, device=student.device)
    if n == 0:
        return loss, g
    with on_device_of(student):
        support_loss_kernel[(n,)](
            student, student.stride(0), student.stride(1), student.shape[1],
            ids, values, weights, *float32_halves(1.0 / temperature),
            loss, g, k, K_PAD=pad_k(k), num_warps=4,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
    return loss, g
