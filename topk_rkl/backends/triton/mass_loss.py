"""The loss with the rest of the vocabulary as one more class: one read of the student's row forwards, one backwards.

The ids of a row ascend, so that a program which goes through the row knows the next that it has to leave out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton import launch
from topk_rkl.backends.triton.divergence import TAIL, encoded, slots_loss, told
from topk_rkl.backends.triton.launch import compile_options, float32_halves, pad_k, plan_scatter, plan_tail
from topk_rkl.backends.triton.memory import fence, layout_of, on_device_of, product, rounded, row_of
from topk_rkl.divergence import MASSES, Code

FLOAT32_MAX = tl.constexpr(launch.FLOAT32_MAX)


@triton.jit
def _tail_of_row(
    logits,  # (V,) one row
    step,
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
        x = tl.load(logits + (start + column).to(tl.int64) * step, mask=inside, other=float("-inf")).to(tl.float32)
        while (named >= 0) & (named < start + BLOCK):
            x = tl.where(start + column == named, float("-inf"), x)
            slot += 1
            named = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int32)
        higher = tl.maximum(peak, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp((peak - base) * inv_t) + tl.sum(tl.exp((x - base[:, None]) * inv_t), 1)
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
    values,  # (N, K)
    tail,  # (N,) float64
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    numbers,
    loss,  # (N,)
    g,  # (N, K)
    others,  # (N, 2) float64
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
    values += row * k
    g += row * k
    others += row * 2
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row)
        if weight == 0.0:
            tl.store(loss + row, 0.0)
            tl.store(g + slot, 0.0, mask=slot < k)
            tl.store(others + tl.arange(0, 2), 0.0)
            return
    peak, total = _tail_of_row(student, student_layout[3], student_vocab, ids, k, inv_t_high, BLOCK, GROUP)
    inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
    column = tl.load(ids + slot, mask=slot < k, other=-1).to(tl.int64)  # [K]
    w = tl.load(values + slot, mask=slot < k, other=float("-inf")).to(tl.float64)  # [K]
    live = (column >= 0) & (column < student_vocab) & (w != float("-inf"))  # [K]
    z = tl.load(student + column * student_layout[3], mask=live, other=float("-inf")).to(tl.float64)  # [K]
    # The slot after the last is the rest. Where the teacher leaves nothing, there is nothing to compare.
    rest = slot == k
    z = tl.where(rest, peak.to(tl.float64) + tl.log(total) / inv_t, z)
    w = tl.where(rest, tl.load(tail + row), w)
    counted = rest
    if MASS == TAIL:
        counted = rest & (w != float("-inf"))
    live = live | counted
    z = tl.where(live, z, float("-inf"))
    w = tl.where(counted, w, told(column, w, student_vocab))
    row_loss, row_g = slots_loss(z, w, live, inv_t, numbers, slot < k, FAMILY, MASS)
    row_g *= weight
    of_rest = tl.sum(tl.where(rest, row_g, 0.0), 0)
    tl.store(loss + row, (row_loss * weight).to(tl.float32))
    tl.store(g + slot, row_g.to(tl.float32), mask=slot < k)
    tl.store(others, peak.to(tl.float64))
    # Within float32, since inf times an exponential that is 0 would be NaN.
    factor = tl.where(of_rest == 0.0, 0.0, of_rest / total)
    factor = tl.where(factor > FLOAT32_MAX, FLOAT32_MAX, tl.where(factor < -FLOAT32_MAX, -FLOAT32_MAX, factor))
    tl.store(others + 1, factor)


@triton.jit
def mass_grad_kernel(
    g,  # (N, K)
    ids,  # (N, K)
    others,  # (N, 2) float64
    grad_output,  # (N,)
    student,  # (N, V), which may be out
    student_layout,
    out,  # (N, V)
    out_layout,
    vocab,
    inv_t,
    k,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    student = row_of(student, student_layout, tl.program_id(0))
    out = row_of(out, out_layout, tl.program_id(0))
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(first + BLOCK, vocab)
    column = first + tl.arange(0, BLOCK)  # [BLOCK]
    at = column.to(tl.int64)
    scale = tl.load(grad_output + row)
    peak = tl.load(others + row * 2).to(tl.float32)
    factor = tl.load(others + row * 2 + 1)
    factor = tl.where((factor == 0.0) | (scale == 0.0), 0.0, factor * scale).to(tl.float32)
    x = tl.load(student + at * student_layout[3], mask=column < last, other=0.0).to(tl.float32)
    value = tl.where(factor == 0.0, 0.0, factor * tl.exp((x - peak) * inv_t))
    tl.store(out + at * out_layout[3], rounded(value, out.dtype.element_ty), mask=column < last)

    slot = tl.arange(0, K_PAD)  # [K]
    column = tl.load(ids + row * k + slot, mask=slot < k, other=-1)  # [K]
    value = tl.load(g + row * k + slot, mask=slot < k, other=0.0)  # [K]
    fence()
    value = product(value, scale, out.dtype.element_ty)
    tl.store(out + column.to(tl.int64) * out_layout[3], value, mask=(column >= first) & (column < last))


def tail_logit(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) ascending, none twice in a row, the negative ones last
    temperature: float,
) -> Tensor:  # (N,) float64
    n, k = ids.shape
    out = torch.empty(n, dtype=torch.float64, device=logits.device)
    if n == 0:
        return out
    plan = plan_tail(logits.shape[-1], k)
    with on_device_of(logits):
        tail_logit_kernel[(n,)](
            logits, layout_of(logits), logits.shape[-1], ids, *float32_halves(1.0 / temperature), out, k,
            BLOCK=plan.block, GROUP=plan.group, num_warps=plan.num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
    return out


def mass_loss(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) as for `tail_logit`
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,) float64
    weights: Tensor | None,  # (N,)
    temperature: float,
    divergence: Code,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2) float64
    n, k = ids.shape
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    g = torch.empty((n, k), dtype=torch.float32, device=student.device)
    others = torch.empty((n, 2), dtype=torch.float64, device=student.device)
    if n == 0:
        return loss, g, others
    form, numbers = encoded(divergence)
    plan = plan_tail(student.shape[-1], k, form)
    with on_device_of(student):
        mass_loss_kernel[(n,)](
            student, layout_of(student), student.shape[-1], ids, values, tail, weights,
            *float32_halves(1.0 / temperature), numbers, loss, g, others, k,
            K_PAD=pad_k(k + 1), BLOCK=plan.block, GROUP=plan.group, FAMILY=form, MASS=MASSES.index(mass),
            num_warps=plan.num_warps, **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
    return loss, g, others


def mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K), none twice in a row
    others: Tensor,  # (N, 2) float64
    grad_output: Tensor,  # (N,)
    student: Tensor | None,  # (N, V), or None: out holds it
    out: Tensor,  # (N, V), overwritten
    temperature: float,
) -> None:
    (n, k), vocab = ids.shape, out.shape[-1]
    if n == 0:
        return
    student = out if student is None else student
    plan = plan_scatter(vocab, unique=True)
    with on_device_of(out):
        mass_grad_kernel[(n, triton.cdiv(vocab, plan.block))](
            g, ids, others, grad_output, student, layout_of(student), out, layout_of(out), vocab, 1.0 / temperature, k,
            K_PAD=pad_k(k), BLOCK=plan.block, num_warps=plan.num_warps,
            **compile_options(hip=torch.version.hip is not None),
        )  # fmt: skip
