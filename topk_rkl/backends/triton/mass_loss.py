"""The loss with the rest of the vocabulary as one more class, the tail: one read of the row forwards, one backwards.

The ids of a row ascend. A program that goes through the row then knows the next column to leave out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton import launch
from topk_rkl.backends.triton.divergence import TAIL, encoded, of_named, slots_loss
from topk_rkl.backends.triton.launch import compile_options, float32_halves, pad_k, plan_scatter, plan_tail
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, product, rounded, row_of
from topk_rkl.backends.triton.sums import sum_rows
from topk_rkl.divergence import MASSES
from topk_rkl.objective import Objective

FLOAT32_MAX = tl.constexpr(launch.FLOAT32_MAX)


@triton.jit
def _tail_of_row(
    logits,  # (V,) one row
    column_stride,
    vocab,
    ids,  # (K,) ascending, the negative ones last
    k,
    inv_t,  # float32
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of the columns outside S: the largest, or 0 for -inf, and the sum of exp((x - it) / T) as a float64."""
    TILE: tl.constexpr = BLOCK // GROUP
    column = tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [TILE, GROUP]
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    slot = 0
    named = tl.load(ids).to(tl.int32)
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        at = (start + column).to(tl.int64) * column_stride
        x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        while (named >= 0) & (named < start + BLOCK):
            x = tl.where(start + column == named, float("-inf"), x)
            slot += 1
            named = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int32)
        higher = tl.maximum(peak, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp((peak - base) * inv_t) + sum_rows(tl.exp((x - base[:, None]) * inv_t))
        peak = higher
    highest = tl.max(peak, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum((mass * tl.exp((peak - highest) * inv_t)).to(tl.float64), 0)


@triton.jit
def tail_logit_kernel(
    logits,  # (N, V)
    layout,
    vocab,
    ids,  # (N, K)
    inv_t_high,
    inv_t_low,
    out,  # (N,) float64
    k,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    x = row_of(logits, layout, tl.program_id(0))
    row = tl.program_id(0).to(tl.int64)
    peak, total = _tail_of_row(x, layout[3], vocab, ids + row * k, k, inv_t_high, BLOCK, GROUP)
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    tl.store(out + row, peak.to(tl.float64) + tl.log(total) / inv_t)


@triton.jit
def mass_loss_kernel(
    student,  # (N, V)
    student_layout,
    student_vocab,
    ids,  # (N, K)
    log_probs,  # (N, K)
    tail,  # (N,) float64
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    parameters,
    loss,  # (N,)
    g,  # (N, K)
    outside,  # (N, 2) float64
    k,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FAMILY: tl.constexpr,
    MASS: tl.constexpr,
):
    student = row_of(student, student_layout, tl.program_id(0))
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_PAD)  # [K]
    ids += row * k
    log_probs += row * k
    g += row * k
    outside += row * 2
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row)
        if weight == 0.0:
            tl.store(loss + row, 0.0)
            tl.store(g + slot, 0.0, mask=slot < k)
            tl.store(outside + tl.arange(0, 2), 0.0)
            return
    peak, total = _tail_of_row(student, student_layout[3], student_vocab, ids, k, inv_t_high, BLOCK, GROUP)
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    column = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int64)  # [K]
    w = tl.load(log_probs + slot, mask=slot < k, other=float("-inf")).to(tl.float64)  # [K]
    live = (column >= 0) & (column < student_vocab) & (w != float("-inf"))  # [K]
    z = tl.load(student + column * student_layout[3], mask=live, other=float("-inf")).to(tl.float64)  # [K]
    # The slot after the last is the tail. Where the teacher leaves it nothing, there is nothing to compare.
    is_tail = slot == k
    z = tl.where(is_tail, peak.to(tl.float64) + tl.log(total) / inv_t, z)
    w = tl.where(is_tail, tl.load(tail + row), w)
    counted = is_tail
    if MASS == TAIL:
        counted = is_tail & (w != float("-inf"))
    live = live | counted
    z = tl.where(live, z, float("-inf"))
    w = tl.where(counted, w, of_named(column, w, student_vocab))
    row_loss, row_g = slots_loss(z, w, live, inv_t, parameters, slot < k, FAMILY, MASS)
    row_g *= weight
    of_tail = tl.sum(tl.where(is_tail, row_g, 0.0), 0)
    tl.store(loss + row, (row_loss * weight).to(tl.float32))
    tl.store(g + slot, row_g.to(tl.float32), mask=slot < k)
    tl.store(outside, peak.to(tl.float64))
    # Within float32, since inf times an exponential that is 0 would be NaN.
    factor = tl.where(of_tail == 0.0, 0.0, of_tail / total)
    factor = tl.where(factor > FLOAT32_MAX, FLOAT32_MAX, tl.where(factor < -FLOAT32_MAX, -FLOAT32_MAX, factor))
    tl.store(outside + 1, factor)


@triton.jit
def mass_grad_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    outside,  # (N, 2) float64
    grad_output,  # (N,)
    student,  # (N, V), which may be out
    student_layout,
    out,  # (N, V)
    out_layout,
    vocab,
    inv_t,
    k,
    blocks,  # of a row
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    student = row_of(student, student_layout, row)
    out = row_of(out, out_layout, row)
    row = row.to(tl.int64)
    slot = tl.arange(0, K_PAD)  # [K]
    named = tl.load(ids + row * k + slot, mask=slot < k, other=-1)  # [K]
    g = tl.load(g + row * k + slot, mask=slot < k, other=0.0)  # [K]
    first = tl.program_id(0) % blocks * BLOCK
    last = tl.minimum(first + BLOCK, vocab)
    column = first + tl.arange(0, BLOCK)  # [BLOCK]
    at = column.to(tl.int64)
    scale = tl.load(grad_output + row)
    peak = tl.load(outside + row * 2).to(tl.float32)
    factor = tl.load(outside + row * 2 + 1)
    factor = tl.where((factor == 0.0) | (scale == 0.0), 0.0, factor * scale).to(tl.float32)
    x = tl.load(student + at * student_layout[3], mask=column < last, other=0.0).to(tl.float32)
    value = tl.where(factor == 0.0, 0.0, factor * tl.exp((x - peak) * inv_t))
    tl.store(out + at * out_layout[3], rounded(value, out.dtype.element_ty), mask=column < last)
    fence()
    value = product(g, scale, out.dtype.element_ty)
    tl.store(out + named.to(tl.int64) * out_layout[3], value, mask=(named >= first) & (named < last))


def tail_logit(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) ascending, none twice in a row, the negative ones last
    temperature: float,
    out: Tensor,  # (N,) float64, written
) -> None:
    n, k = ids.shape
    if n == 0:
        return
    plan = plan_tail(logits.shape[-1], k)
    with on_device_of(logits):
        tail_logit_kernel[(n,)](
            logits, layout_of(logits), logits.shape[-1], ids, *float32_halves(1.0 / temperature), out, k,
            BLOCK=plan.block, GROUP=plan.group, num_warps=plan.num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) as for `tail_logit`
    log_probs: Tensor,  # (N, K)
    tail: Tensor,  # (N,) float64
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
    outside: Tensor,  # (N, 2) float64, written
) -> None:
    n, k = ids.shape
    if n == 0:
        return
    family, parameters = encoded(objective.divergence)
    plan = plan_tail(student.shape[-1], k, family)
    with on_device_of(student):
        mass_loss_kernel[(n,)](
            student, layout_of(student), student.shape[-1], ids, log_probs, tail, weights,
            *float32_halves(1.0 / objective.temperature), parameters, loss, g, outside, k,
            K_PAD=pad_k(k + 1), BLOCK=plan.block, GROUP=plan.group, FAMILY=family,
            MASS=MASSES.index(objective.mass), num_warps=plan.num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip


def mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    outside: Tensor,  # (N, 2) float64
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    temperature: float,
    out: Tensor,  # (N, V), overwritten
) -> None:
    (n, k), vocab = ids.shape, out.shape[-1]
    if n == 0:
        return
    student = out if student is None else student
    block, num_warps = plan_scatter(vocab)
    blocks = triton.cdiv(vocab, block)
    with on_device_of(out):
        mass_grad_kernel[(n * blocks,)](  # in the order of memory, as `scatter` writes
            g, ids, outside, grad_output, student, layout_of(student), out, layout_of(out), vocab, 1.0 / temperature,
            k, blocks, K_PAD=pad_k(k), BLOCK=block, num_warps=num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
